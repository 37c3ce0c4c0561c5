"""The weight side of LoRA where tokens have a covariance C' (docs/theory.md, section 3.8).

The logits see w̃ = C'^{1/2}w, decayed by λ'w̃²/c': at the eigenvalue c, of mean c̄ = tr C',

    w̃ = (m̂w̃* + √q̂ζ)/R_c,  R_c = 2λ'/c + v̂,  ∫w̃*² = q0c̄.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["VectorSide", "vector_side"]

# of Newton's method from below, which cannot overshoot
_STEPS = 60


class VectorSide(NamedTuple):
    """What follows from the response v = ∫1/R_c."""

    v_hat: Float[Array, ""]
    signal: Float[Array, ""]  # ∫cR⁻¹/c̄: m/q̃0 = m̂ times this, q̃0 = q0c̄
    noise: Float[Array, ""]  # ∫R⁻²: the part of q that is noise is q̂ times this
    bent: Float[Array, ""]  # ∫cR⁻²/c̄ − signal²: what m̂ adds to q − m²/q̃0 beside, over q̃0
    own_noise: Float[Array, ""]  # ∫R⁻²/c, of ‖w‖² as noise of ‖w̃‖²
    mean: Float[Array, ""]  # c̄


def vector_side(
    v: Float[Array, ""], penalty: Float[Array, ""] | float, levels: Float[Array, " n"]
) -> VectorSide:
    """v̂ from v = ∫1/(2λ'/c + v̂), by Newton's method on the harmonic mean of R_c, and the rest.

    The harmonic mean is concave and grows from 0 at v̂ = −2λ'/max c: from there the iterates grow
    towards the root.

    Example:
        >>> side = vector_side(jnp.asarray(0.5), 0.2, jnp.ones(3))
        >>> round(float(side.v_hat), 6), round(float(side.noise), 6)  # 1/v − 2λ', v²
        (1.6, 0.25)
    """
    pull = 2 * penalty / levels

    def harmonic(v_hat: Array) -> tuple[Array, Array]:
        left = 1 / (pull + v_hat)
        mean = 1 / jnp.mean(left)
        return mean, mean**2 * jnp.mean(left**2)

    def step(_: int, v_hat: Array) -> Array:
        mean, slope = harmonic(v_hat)
        return jnp.asarray(v_hat + (1 / v - mean) / slope)

    # one step beyond the pole, where the mean has the slope n
    first = -jnp.min(pull) + 1 / (v * levels.size)
    found = jax.lax.stop_gradient(jax.lax.fori_loop(0, _STEPS, step, first))
    mean, slope = harmonic(found)
    # a last step, through which derivatives go
    v_hat = found + (1 / v - mean) / jax.lax.stop_gradient(slope)
    left, average = 1 / (pull + v_hat), jnp.mean(levels)
    signal = jnp.mean(levels * left) / average
    return VectorSide(
        v_hat,
        signal,
        jnp.mean(left**2),
        jnp.mean(levels * left**2) / average - signal**2,
        jnp.mean(left**2 / levels),
        average,
    )
