"""What a law of the teacher's eigenvalues has to provide."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Complex, Float

__all__ = ["Law"]


@runtime_checkable
class Law(Protocol):
    """The law ρ of the eigenvalues of S0 in the limit D → ∞.

    A law is a NamedTuple of numbers (and arrays), so that JAX can trace it: its parameters may
    change without anything being compiled again.  A new law is one file beside this one with the
    methods below, and one line in ``lora_theory/laws/__init__.py``.
    """

    def stieltjes(self, w: Complex[Array, "..."]) -> Complex[Array, "..."]:
        """G0(w) = ∫ρ(ds)/(w − s) for Im w ≥ 0, analytic in Im w > 0; traced by JAX."""

    def edges(self) -> tuple[float | Array, float | Array]:
        """Smallest and largest point of the support; at most one of them infinite."""

    def bands(self) -> list[tuple[float, float]]:
        """The intervals that the support consists of, from left to right; single points too."""

    def moments(self) -> tuple[float | Array, float | Array]:
        """∫s ρ(ds) and Q0 = ∫s² ρ(ds), both finite."""

    def spectrum(self, dim: int, rng: np.random.Generator) -> Float[np.ndarray, " D"]:
        """Eigenvalues of one S0 of size ``dim``: random, or the quantiles of ρ."""
