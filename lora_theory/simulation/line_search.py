"""Step length along a descent direction: strong Wolfe conditions by bracketing and secants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

__all__ = ["Step", "line_search"]

SUFFICIENT_DECREASE = 1e-4
CURVATURE = 0.5
MAX_TRIALS = 40
ROUNDING = 10  # in units of the machine precision of the value


class Step(NamedTuple):
    """The accepted step; if not ``found``, the longest trial that decreased the value enough."""

    length: Float[Array, ""]
    found: Bool[Array, ""]


class _Bracket(NamedTuple):
    trial: Float[Array, ""]
    low: Float[Array, ""]  # decreased enough and still descends
    low_slope: Float[Array, ""]
    high: Float[Array, ""]  # too far; inf while unknown
    high_slope: Float[Array, ""]
    found: Bool[Array, ""]
    trials: Integer[Array, ""]


def line_search(
    along: Callable[[Float[Array, ""]], tuple[Float[Array, ""], Float[Array, ""]]],
    dtype: Any,
) -> Step:
    """A step t > 0 with φ(t) ≤ φ(0) + 10⁻⁴ t φ'(0) and |φ'(t)| ≤ |φ'(0)|/2.

    ``along`` maps t to (φ(t), φ'(t)), with φ'(0) < 0.  The first trial is t = 1, the natural step
    of a quasi-Newton direction.  The decrease is tested up to rounding, so the search still works
    where φ no longer resolves the progress but φ' does.
    """
    value_0, slope_0 = along(jnp.zeros((), dtype))
    slack = ROUNDING * float(np.finfo(dtype).eps) * jnp.abs(value_0)

    def unfinished(state: _Bracket) -> Bool[Array, ""]:
        return ~state.found & (state.trials < MAX_TRIALS)

    def advance(state: _Bracket) -> _Bracket:
        trial = state.trial
        value, slope = along(trial)
        decreased = value <= value_0 + SUFFICIENT_DECREASE * trial * slope_0 + slack
        found = decreased & (jnp.abs(slope) <= CURVATURE * jnp.abs(slope_0))
        too_far = ~decreased | (slope > 0)
        moved = state._replace(
            low=jnp.where(too_far, state.low, trial),
            low_slope=jnp.where(too_far, state.low_slope, slope),
            high=jnp.where(too_far, trial, state.high),
            high_slope=jnp.where(too_far, jnp.where(decreased, slope, jnp.inf), state.high_slope),
            found=found,
            trials=state.trials + 1,
        )
        following = jnp.where(
            jnp.isfinite(moved.high), _inside(moved), _beyond(moved, state.low, state.low_slope)
        )
        return moved._replace(trial=jnp.where(found, trial, following))

    zero = jnp.zeros_like(value_0)
    infinite = jnp.full_like(value_0, jnp.inf)
    start = _Bracket(
        zero + 1, zero, slope_0, infinite, infinite, jnp.zeros((), bool), jnp.zeros((), jnp.int32)
    )
    end = jax.lax.while_loop(unfinished, advance, start)
    return Step(jnp.where(end.found, end.trial, end.low), end.found)


def _inside(state: _Bracket) -> Float[Array, ""]:
    """The secant root of φ' in the bracket, or its middle when the secant is of no use."""
    width = state.high - state.low
    root = state.low - state.low_slope * width / (state.high_slope - state.low_slope)
    useful = (root > state.low + 0.05 * width) & (root < state.high - 0.05 * width)
    return jnp.where(useful, root, state.low + 0.5 * width)


def _beyond(
    state: _Bracket, previous: Float[Array, ""], previous_slope: Float[Array, ""]
) -> Float[Array, ""]:
    """A longer trial while φ still descends: the secant root, 1.5 to 6 times as long."""
    secant = (state.low - previous) / (state.low_slope - previous_slope)
    root = state.low - state.low_slope * secant
    return jnp.where(
        jnp.isfinite(root), jnp.clip(root, 1.5 * state.low, 6 * state.low), 4 * state.low
    )
