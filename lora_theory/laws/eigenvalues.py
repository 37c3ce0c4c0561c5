"""A teacher with any given eigenvalues."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

__all__ = ["Eigenvalues"]


class Eigenvalues(NamedTuple):
    """Equal shares of D at each of the given eigenvalues: G0 = mean of 1/(w − s)."""

    values: Float[np.ndarray, " n"] | Array

    def stieltjes(self, w: Complex[Array, "..."]) -> Complex[Array, "..."]:
        """Rational; infinite at the eigenvalues."""
        return jnp.mean(1 / (w[..., None] - jnp.asarray(self.values)), axis=-1)

    def edges(self) -> tuple[float | Array, float | Array]:
        """Smallest and largest."""
        return jnp.min(jnp.asarray(self.values)), jnp.max(jnp.asarray(self.values))

    def bands(self) -> list[tuple[float, float]]:
        """The different eigenvalues."""
        return [(float(value), float(value)) for value in np.unique(np.asarray(self.values))]

    def moments(self) -> tuple[float | Array, float | Array]:
        """Means of s and s²."""
        return self.values.mean(), (self.values**2).mean()

    def spectrum(self, dim: int, rng: np.random.Generator) -> Float[np.ndarray, " D"]:
        """Each repeated D/n times, as evenly as D allows."""
        values = np.sort(np.asarray(self.values, dtype=np.float64))
        return values[np.arange(dim) * values.size // dim]
