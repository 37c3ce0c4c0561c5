"""Many small minimisations at once: Levenberg–Marquardt–Newton with the problems on the last axis.

Arrays are (n, nodes) and (n, n, nodes): n is at most 14, so the linear algebra is written out over
n and vectorised over nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["Expansion", "minimise", "solve_positive_definite"]


class Expansion(NamedTuple):
    """Value, gradient and Hessian of one objective per node."""

    value: Float[Array, " nodes"]
    gradient: Float[Array, "n nodes"]
    hessian: Float[Array, "n n nodes"]


def solve_positive_definite(
    matrix: Float[Array, "n n nodes"], right: Float[Array, "n ... nodes"]
) -> tuple[Float[Array, "n ... nodes"], Float[Array, " nodes"]]:
    """A⁻¹b by Cholesky for every node, and the smallest pivot (≤ 0: A is not positive definite)."""
    n = matrix.shape[0]
    columns: list[Array] = []  # columns[j][i − j] = L_ij for i ≥ j
    smallest = jnp.full(matrix.shape[-1], jnp.inf)
    for j in range(n):
        column = matrix[j:, j]
        for i, earlier in enumerate(columns):
            column = column - earlier[j - i :] * earlier[j - i]
        smallest = jnp.minimum(smallest, column[0])
        columns.append(column / jnp.sqrt(jnp.where(column[0] > 0, column[0], 1.0)))
    half: list[Array] = []
    for i in range(n):
        entry = right[i]
        for j in range(i):
            entry = entry - columns[j][i - j] * half[j]
        half.append(entry / columns[i][0])
    solution: list[Array] = [right[0]] * n
    for i in reversed(range(n)):
        entry = half[i]
        for j in range(i + 1, n):
            entry = entry - columns[i][j - i] * solution[j]
        solution[i] = entry / columns[i][0]
    return jnp.stack(solution), smallest


def minimise(
    expand: Callable[[Float[Array, "n nodes"]], Expansion],
    start: Float[Array, "n nodes"],
    curvature: Float[Array, ""],
    *,
    tolerance: float,
    max_steps: int,
) -> Float[Array, "n nodes"]:
    """A local minimum per node, descending monotonically from ``start``.

    Newton steps on H + μI; μ grows where H + μI is not positive definite or the objective does
    not fall, and shrinks where it does.  A node stops once its undamped step is below
    ``tolerance``·(1 + |u|); Newton converges quadratically, so that step leaves its square.

    Args:
        expand: value, gradient and Hessian at (n, nodes) points.
        curvature: natural scale of the Hessian, the first nonzero μ.
    """

    def unfinished(state: tuple[Array, ...]) -> Array:
        return (state[0] < max_steps) & ~jnp.all(state[-1])

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        count, point, value, gradient, hessian, damping, done = state
        damped = hessian + damping * jnp.eye(point.shape[0])[:, :, None]
        move, pivot = solve_positive_definite(damped, gradient)
        candidate = point - move
        new = expand(candidate)
        falls = new.value <= value + 1e-13 * (1.0 + jnp.abs(value))
        accepted = (pivot > 0) & falls & jnp.isfinite(new.value) & ~done
        small = jnp.max(jnp.abs(move), 0) <= tolerance * (1 + jnp.max(jnp.abs(point), 0))
        converged = accepted & small & (damping <= curvature * 1e-3)
        smaller = jnp.where(damping <= 1e-2 * curvature, 0.0, damping / 6)
        larger = jnp.maximum(4 * damping, curvature)
        return (
            count + 1,
            jnp.where(accepted, candidate, point),
            jnp.where(accepted, new.value, value),
            jnp.where(accepted, new.gradient, gradient),
            jnp.where(accepted, new.hessian, hessian),
            jnp.where(accepted, smaller, larger),
            done | converged,
        )

    nodes = start.shape[-1]
    first = expand(start)
    state = (0, start, *first, jnp.zeros(nodes), jnp.zeros(nodes, bool))
    return jax.lax.while_loop(unfinished, step, state)[1]
