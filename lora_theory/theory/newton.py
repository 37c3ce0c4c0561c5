"""Many small minimisations at once: Levenberg–Marquardt–Newton with the problems on the last axis.

Arrays are (n, nodes) and (n, n, nodes): n is at most 14, so the linear algebra is written out over
n and vectorised over nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = ["Expansion", "Objective", "inverse_trace", "minimise", "solve_positive_definite"]

# few nodes are this share of all; they are finished in groups of this share
_FEW, _GROUPS, _SMALLEST_GROUP = 4, 16, 64


class Expansion(NamedTuple):
    """Value, gradient and Hessian of one objective per node."""

    value: Float[Array, " nodes"]
    gradient: Float[Array, "n nodes"]
    hessian: Float[Array, "n n nodes"]


#: (points, *data) to an expansion; every array has the nodes last.
Objective = Callable[..., Expansion]


def _cholesky(matrix: Float[Array, "n n nodes"], instead: float) -> list[Array]:
    """Columns of L (columns[j][i − j] = L_ij for i ≥ j), ``instead`` for pivots that are ≤ 0."""
    columns: list[Array] = []
    for j in range(matrix.shape[0]):
        column = matrix[j:, j]
        for i, earlier in enumerate(columns):
            column = column - earlier[j - i :] * earlier[j - i]
        columns.append(column / jnp.sqrt(jnp.where(column[0] > 0, column[0], instead)))
    return columns


def solve_positive_definite(
    matrix: Float[Array, "n n nodes"], right: Float[Array, "n nodes"], *, instead: float = 1.0
) -> Float[Array, "n nodes"]:
    """A⁻¹b by Cholesky for every node, with ``instead`` in place of pivots that are ≤ 0.

    NaN there makes the solution NaN where A is not positive definite.
    """
    n = matrix.shape[0]
    columns = _cholesky(matrix, instead)
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
    return jnp.stack(solution)


def inverse_trace(matrix: Float[Array, "n n nodes"]) -> Float[Array, " nodes"]:
    """tr A⁻¹ = ‖L⁻¹‖² for every node, A = LLᵀ positive definite."""
    n = matrix.shape[0]
    columns = _cholesky(matrix, 1.0)
    total = jnp.zeros(matrix.shape[-1])
    for unit in range(n):
        entries: list[Array] = []  # of column ``unit`` of L⁻¹, from the diagonal down
        for i in range(unit, n):
            entry = jnp.where(i == unit, 1.0, 0.0)
            for j, known in enumerate(entries):
                entry = entry - columns[unit + j][i - unit - j] * known
            entries.append(entry / columns[i][0])
        total = total + sum(entry**2 for entry in entries)
    return total


def minimise(
    objective: Objective,
    start: Float[Array, "n nodes"],
    data: tuple[Array, ...],
    curvature: Float[Array, ""],
    *,
    wanted: Bool[Array, " nodes"],
    tolerance: float,
    max_steps: int,
) -> tuple[Float[Array, "n nodes"], Float[Array, " nodes"]]:
    """A local minimum per node, descending monotonically from ``start``, and its value.

    Newton steps on H + μI; μ grows where H + μI is not positive definite or the objective does
    not fall, and shrinks where it does.  A node stops once its undamped step is below
    ``tolerance``·(1 + |u|); Newton converges quadratically, so that step leaves its square.  Once
    few nodes are left, they are gathered and finished in small groups.

    Args:
        objective: value, gradient and Hessian at (n, nodes) points, given ``data``.
        data: what the objective depends on, nodes last.
        curvature: natural scale of the Hessian, the first nonzero μ.
        wanted: the nodes to descend on; the others keep their start, with value inf.
        max_steps: for all nodes together and again for each group.
    """
    nodes = start.shape[-1]
    group = min(max(_SMALLEST_GROUP, nodes // _GROUPS), nodes)
    state = _State(start, jnp.full(nodes, jnp.inf), jnp.zeros(nodes), ~wanted)

    def descend(state: _State, data: tuple[Array, ...], left: int) -> _State:
        def unfinished(carry: _Carry) -> Array:
            return jnp.sum(~carry[1].done) > left

        def step(carry: _Carry) -> _Carry:
            return _step(objective, *carry, data, curvature, tolerance, max_steps)

        # the first step, of length zero, finds gradient and Hessian
        gradient = jnp.zeros_like(state.point)
        hessian = jnp.eye(len(gradient))[:, :, None] + gradient[None]
        return jax.lax.while_loop(unfinished, step, (jnp.asarray(0), state, gradient, hessian))[1]

    def finish(state: _State) -> _State:
        slow = jnp.argsort(state.done)[:group]
        part = _State(*(entry[..., slow] for entry in state))
        part = descend(part, tuple(entry[..., slow] for entry in data), 0)
        both = zip(state, part, strict=True)
        return _State(*(entry.at[..., slow].set(new) for entry, new in both))

    if group < nodes:
        state = descend(state, data, nodes // _FEW)
    state = jax.lax.while_loop(lambda state: ~jnp.all(state.done), finish, state)
    return state.point, state.value


class _State(NamedTuple):
    point: Float[Array, "n nodes"]
    value: Float[Array, " nodes"]
    damping: Float[Array, " nodes"]
    done: Bool[Array, " nodes"]


#: Steps so far, state, gradient and Hessian.
_Carry = tuple[Array, _State, Array, Array]


def _step(
    objective: Objective,
    count: Array,
    state: _State,
    gradient: Array,
    hessian: Array,
    data: tuple[Array, ...],
    curvature: Array,
    tolerance: float,
    max_steps: int,
) -> _Carry:
    point, value, damping, done = state
    damped = hessian + damping * jnp.eye(point.shape[0])[:, :, None]
    move = solve_positive_definite(damped, gradient, instead=jnp.nan)
    candidate = point - move
    new = objective(candidate, *data)
    falls = new.value <= value + 1e-13 * (1.0 + jnp.abs(value))
    # false where the value is NaN: a damped Hessian that is not positive definite
    accepted = falls & jnp.isfinite(new.value) & ~done
    small = jnp.max(jnp.abs(move), 0) <= tolerance * (1 + jnp.max(jnp.abs(point), 0))
    converged = accepted & small & (damping <= curvature * 1e-3) & (count > 0)
    smaller = jnp.where(damping <= 1e-2 * curvature, 0.0, damping / 6)
    larger = jnp.maximum(4 * damping, curvature)
    moved = _State(
        jnp.where(accepted, candidate, point),
        jnp.where(accepted, new.value, value),
        jnp.where(accepted, smaller, larger),
        done | converged | (count + 1 >= max_steps),
    )
    return (
        count + 1,
        moved,
        jnp.where(accepted, new.gradient, gradient),
        jnp.where(accepted, new.hessian, hessian),
    )
