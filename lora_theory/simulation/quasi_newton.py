"""Limited-memory BFGS: the descent direction from the last few steps (Nocedal & Wright, 7.4)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

__all__ = ["History", "descent_direction", "empty_history", "remember"]

MEMORY = 10
FIRST_STEP = 0.1  # length of the first step relative to the weights


class History(NamedTuple):
    """The last steps of the weights and the changes of the gradient that came with them."""

    steps: Float[Array, "memory D P"]
    changes: Float[Array, "memory D P"]
    inverse_curvatures: Float[Array, " memory"]  # 1/(step · change); 0 in an empty slot
    stored: Integer[Array, ""]  # pairs so far; the newest is in slot (stored − 1) mod memory


def empty_history(weights: Float[Array, "D P"]) -> History:
    """A history without pairs; the direction is then that of steepest descent."""
    pairs = jnp.zeros((MEMORY, *weights.shape), weights.dtype)
    return History(pairs, pairs, jnp.zeros(MEMORY, weights.dtype), jnp.zeros((), jnp.int32))


def remember(history: History, step: Float[Array, "D P"], change: Float[Array, "D P"]) -> History:
    """The history with one more pair, unless the curvature along the step is not positive."""
    curvature = jnp.vdot(step, change)
    usable = curvature > 0
    slot = history.stored % MEMORY

    def replaced(
        entries: Float[Array, "memory ..."], new: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        return entries.at[slot].set(jnp.where(usable, new, entries[slot]))

    return History(
        replaced(history.steps, step),
        replaced(history.changes, change),
        replaced(history.inverse_curvatures, 1 / curvature),
        history.stored + usable,
    )


def descent_direction(
    history: History, weights: Float[Array, "D P"], gradient: Float[Array, "D P"]
) -> Float[Array, "D P"]:
    """−H ∇L with the two-loop recursion; a short step along −∇L while the history is empty."""
    steps, changes, inverse_curvatures, stored = history

    def backward(age: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        vector, weights_of = carry
        slot = (stored - 1 - age) % MEMORY
        weight = inverse_curvatures[slot] * jnp.vdot(steps[slot], vector)
        return vector - weight * changes[slot], weights_of.at[slot].set(weight)

    def forward(position: int, vector: Array) -> Array:
        slot = (stored + position) % MEMORY
        weight = inverse_curvatures[slot] * jnp.vdot(changes[slot], vector)
        longer: Array = vector + (weights_of[slot] - weight) * steps[slot]
        return longer

    empty_slots = jnp.zeros(MEMORY, gradient.dtype)
    vector, weights_of = jax.lax.fori_loop(0, MEMORY, backward, (gradient, empty_slots))
    newest = (stored - 1) % MEMORY
    scale = jnp.where(
        stored > 0,
        1 / (inverse_curvatures[newest] * jnp.sum(changes[newest] ** 2)),
        FIRST_STEP * jnp.linalg.norm(weights) / jnp.linalg.norm(gradient),
    )
    ascent: Array = jax.lax.fori_loop(0, MEMORY, forward, scale * vector)
    return -ascent
