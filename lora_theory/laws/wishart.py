"""S0 = W0W0ᵀ/√(P0D): the teacher of the model."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

__all__ = ["Wishart"]


class Wishart(NamedTuple):
    """Eigenvalues of W0W0ᵀ/√(P0D), W0 ∈ R^{D×P0} iid standard normal, κ0 = P0/D.

    With c = 1/√κ0, G0 solves cwG² − (w + c − 1/c)G + 1 = 0; Q0 = 1 + κ0 (docs/theory.md,
    section 2).

    Example:
        >>> mean, second = Wishart(0.25).moments()
        >>> mean, second
        (0.5, 1.25)
    """

    rank: float | Array  # κ0

    def stieltjes(self, w: Complex[Array, "..."]) -> Complex[Array, "..."]:
        """The root that decays as 1/w, in the form that does not cancel."""
        c = 1 / jnp.sqrt(self.rank)
        left, right = self._bulk()
        return 2 / (w + c - 1 / c + jnp.sqrt(w - right) * jnp.sqrt(w - left))

    def _bulk(self) -> tuple[float | Array, float | Array]:
        """Ends of the spectrum apart from the eigenvalue 0 of κ0 < 1."""
        root = self.rank**0.25
        return (root - 1 / root) ** 2, (root + 1 / root) ** 2

    def edges(self) -> tuple[float | Array, float | Array]:
        """From 0 where P0 < D."""
        left, right = self._bulk()
        return jnp.where(jnp.asarray(self.rank) < 1, 0.0, left), right

    def bands(self) -> list[tuple[float, float]]:
        """The bulk, and apart from it the eigenvalue 0 where P0 < D."""
        left, right = map(float, self._bulk())
        return [(0.0, 0.0), (left, right)] if float(self.rank) < 1 else [(left, right)]

    def moments(self) -> tuple[float | Array, float | Array]:
        """√κ0 and 1 + κ0."""
        return self.rank**0.5, 1 + self.rank

    def spectrum(self, dim: int, rng: np.random.Generator) -> Float[np.ndarray, " D"]:
        """Of a random W0 with P0 = round(κ0 D) columns."""
        columns = max(1, round(float(self.rank) * dim))
        factor = rng.standard_normal((dim, columns))
        singular = np.linalg.svd(factor, compute_uv=False)
        found = np.zeros(dim)
        found[: singular.size] = singular**2 / np.sqrt(columns * dim)
        return found
