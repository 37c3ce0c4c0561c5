"""A symmetric Gaussian teacher."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

__all__ = ["GOE"]


class GOE(NamedTuple):
    """Eigenvalues of a symmetric Gaussian matrix: the semicircle on [−2, 2], Q0 = 1.

    G0 = (w − √(w² − 4))/2.  Half of the eigenvalues are negative: a student S = WWᵀ/√(PD) ⪰ 0
    cannot learn them, an unfactorised one can.
    """

    def stieltjes(self, w: Complex[Array, "..."]) -> Complex[Array, "..."]:
        """In the form that does not cancel."""
        return 2 / (w + jnp.sqrt(w - 2) * jnp.sqrt(w + 2))

    def edges(self) -> tuple[float | Array, float | Array]:
        """±2."""
        return -2.0, 2.0

    def bands(self) -> list[tuple[float, float]]:
        """One."""
        return [(-2.0, 2.0)]

    def moments(self) -> tuple[float | Array, float | Array]:
        """0 and 1."""
        return 0.0, 1.0

    def spectrum(self, dim: int, rng: np.random.Generator) -> Float[np.ndarray, " D"]:
        """Of a random matrix with entries of variance (1 + δ_ij)/D."""
        square = rng.standard_normal((dim, dim))
        return np.linalg.eigvalsh((square + square.T) / np.sqrt(2 * dim))
