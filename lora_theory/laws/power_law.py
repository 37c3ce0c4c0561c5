"""A teacher whose eigenvalues fall as a power of their rank."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

__all__ = ["PowerLaw"]

# x from 0 to 1 in panels that narrow towards both ends, where x^γ and the pole need it
_PANELS = np.concatenate([0.5 ** np.arange(30, 0, -2), 1 - 0.5 ** np.arange(3, 51, 2)])
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def _rule() -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    ends = np.concatenate([[0.0], _PANELS, [1.0]])
    middle, half = (ends[1:] + ends[:-1]) / 2, (ends[1:] - ends[:-1]) / 2
    points = (middle[:, None] + half[:, None] * _POINTS).ravel()
    return points, (half[:, None] * _WEIGHTS).ravel()


class PowerLaw(NamedTuple):
    """Eigenvalues s_i = √(1 − 2γ)(i/D)^{−γ}, i = 1 … D, 0 < γ < 1/2: Q0 = 1, no upper edge.

    G0(w) = ∫₀¹ x^γ dx/(w x^γ − c), c = √(1 − 2γ).  The pole x = (c/w)^{1/γ} has a negative
    argument, so the integral is taken along a path of positive ones.
    """

    exponent: float | Array  # γ

    def stieltjes(self, w: Complex[Array, "..."]) -> Complex[Array, "..."]:
        """By Gauss–Legendre panels on the path x = t e^{i(1 − t)}."""
        points, weights = (jnp.asarray(part) for part in _rule())
        # x^γ on the sheet of the path
        power = points**self.exponent * jnp.exp(1j * self.exponent * (1 - points))
        slope = jnp.exp(1j * (1 - points)) * (1 - 1j * points)
        least = jnp.sqrt(1 - 2 * self.exponent)
        transform: Array = jnp.sum(
            weights * slope * power / (w[..., None] * power - least), axis=-1
        )
        return transform

    def edges(self) -> tuple[float | Array, float | Array]:
        """From √(1 − 2γ) to infinity."""
        return jnp.sqrt(1 - 2 * self.exponent), jnp.inf

    def bands(self) -> list[tuple[float, float]]:
        """One, without an end."""
        return [(math.sqrt(1 - 2 * float(self.exponent)), math.inf)]

    def moments(self) -> tuple[float | Array, float | Array]:
        """√(1 − 2γ)/(1 − γ) and 1."""
        return (1 - 2 * self.exponent) ** 0.5 / (1 - self.exponent), 1.0

    def spectrum(self, dim: int, rng: np.random.Generator) -> Float[np.ndarray, " D"]:
        """The middles of D equal shares."""
        rank = (np.arange(dim) + 0.5) / dim
        return np.asarray(np.sqrt(1 - 2 * float(self.exponent)) * rank ** -float(self.exponent))
