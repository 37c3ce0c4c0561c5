"""Training with a penalty on the eigenvalues of a symmetric S, or the singular values of a factor.

It may have kinks and need not be convex: accelerated proximal gradient descent (Beck and Teboulle,
SIAM J. Imaging Sci. 2, 2009), with a step found by backtracking and the momentum dropped where it
leads uphill (O'Donoghue and Candès, Found. Comput. Math. 15, 2015).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from lora_theory.expression import Expression
from lora_theory.theory.separable import scalar_proximal

__all__ = ["ProximalEnd", "nuclear_proximal", "proximal_descent", "spectral_proximal"]

#: At a step η: the minimiser of ‖W' − W‖²/2η + penalty, and the penalty there.
Proximal = Callable[[Array, Array], tuple[Array, Array]]

#: The step may grow by this factor per iteration, and is halved until the loss is bounded by its
#: quadratic model, at most so often.
_GROWTH, _HALVINGS = 1.2, 40
#: The generalised gradient is compared with that of the loss, but not below this part of the first.
_SMALLEST = 1e-3


class ProximalEnd(NamedTuple):
    """Where the descent stopped."""

    weights: Float[Array, "D P"]
    data_loss: Float[Array, ""]
    penalty: Float[Array, ""]
    relative_gradient: Float[Array, ""]
    iterations: Integer[Array, ""]


class _State(NamedTuple):
    weights: Float[Array, "D P"]
    data_loss: Float[Array, ""]
    penalty: Float[Array, ""]
    ahead: Float[Array, "D P"]  # with the momentum
    momentum: Float[Array, ""]
    step: Float[Array, ""]
    relative_gradient: Float[Array, ""]
    iterations: Integer[Array, ""]
    lowest: Float[Array, ""]
    since_lowest: Integer[Array, ""]


def spectral_proximal(function: str, strength: Float[Array, ""]) -> Proximal:
    """Of c Σ R(s_i) on the eigenvalues of a symmetric S, R an expression of s."""
    R = Expression(function)

    def proximal(S: Array, step: Array) -> tuple[Array, Array]:
        levels, vectors = jnp.linalg.eigh(S)
        kept = scalar_proximal(function, levels, 2 * step * strength)
        return (vectors * kept) @ vectors.T, strength * jnp.sum(R(kept, jnp))

    return proximal


def nuclear_proximal(strength: Float[Array, ""]) -> Proximal:
    """Of c‖W‖_*: singular values are lowered by cη, those below vanish."""

    def proximal(W: Array, step: Array) -> tuple[Array, Array]:
        left, sigma, right = jnp.linalg.svd(W, full_matrices=False)
        kept = jnp.maximum(sigma - step * strength, 0.0)
        return (left * kept) @ right, strength * jnp.sum(kept)

    return proximal


def proximal_descent(
    loss: Callable[[Float[Array, "D P"]], Float[Array, ""]],
    proximal: Proximal,
    start: Float[Array, "D P"],
    tolerance: Float[Array, ""],
    max_iterations: Integer[Array, ""],
    patience: int,
) -> ProximalEnd:
    """A local minimum of loss(W) and a penalty, to be traced.

    It stops where the generalised gradient (W − prox(W − η∇loss))/η is ``tolerance`` times ∇loss,
    after ``max_iterations``, or where nothing is lowered ``patience`` times.

    Args:
        loss: of W, or of a symmetric S. proximal: of the penalty. start: W.
        tolerance, max_iterations, patience: when it stops.
    """
    value_and_grad = jax.value_and_grad(loss)
    first = jnp.linalg.norm(jax.grad(loss)(start))

    def advance(state: _State) -> _State:
        value, gradient = value_and_grad(state.ahead)

        def steeper(trial: tuple[Array, Array, Array, Array, Array]) -> Array:
            step, S, data, _, count = trial
            move = S - state.ahead
            model = value + jnp.sum(gradient * move) + jnp.sum(move**2) / (2 * step)
            room = 8 * np.finfo(value.dtype).eps * jnp.abs(value)
            steep: Array = ~(data <= model + room) & (count < _HALVINGS)
            return steep

        def tried(step: Array, count: Array) -> tuple[Array, Array, Array, Array, Array]:
            S, penalty = proximal(state.ahead - step * gradient, step)
            return step, S, loss(S), penalty, count

        step, S, data, penalty, _ = jax.lax.while_loop(
            steeper,
            lambda trial: tried(trial[0] / 2, trial[4] + 1),
            tried(state.step * _GROWTH, jnp.zeros((), jnp.int32)),
        )
        uphill = jnp.sum((state.ahead - S) * (S - state.weights)) > 0
        momentum = (1 + jnp.sqrt(1 + 4 * state.momentum**2)) / 2
        momentum = jnp.where(uphill, 1.0, momentum)
        weight = jnp.where(uphill, 0.0, (state.momentum - 1) / momentum)
        size = jnp.maximum(jnp.linalg.norm(gradient), _SMALLEST * first)
        objective = data + penalty
        return _State(
            S,
            data,
            penalty,
            S + weight * (S - state.weights),
            momentum,
            step,
            jnp.linalg.norm(state.ahead - S) / (step * size),
            state.iterations + 1,
            jnp.minimum(objective, state.lowest),
            jnp.where(objective < state.lowest, 0, state.since_lowest + 1),
        )

    def unfinished(state: _State) -> Bool[Array, ""]:
        moving = (state.iterations < max_iterations) & (state.since_lowest < patience)
        return (state.relative_gradient > tolerance) & moving

    one, nothing = jnp.ones((), start.dtype), jnp.zeros((), jnp.int32)
    length = start.shape[0] ** 0.5 / jnp.maximum(first, 1e-30)
    begin = _State(
        start, one, one, start, one, length, one * jnp.inf, nothing, one * jnp.inf, nothing
    )
    end = jax.lax.while_loop(unfinished, advance, begin)
    return ProximalEnd(
        end.weights, end.data_loss, end.penalty, end.relative_gradient, end.iterations
    )
