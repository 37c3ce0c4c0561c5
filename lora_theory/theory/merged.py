"""The eigenvalue that a merged LoRA vector adds to the frozen weights (docs/theory.md, 2.7)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq

__all__ = ["MergedOutlier", "merged_outlier"]


@dataclass(frozen=True)
class MergedOutlier:
    """The outlier of the merged βŜ + wwᵀ/√D, whose second part has the norm q√D.

    It exists where q√D exceeds ``threshold``; if not, eigenvalue and overlaps are None.
    """

    dim: int
    strength: float  #: q√D
    eigenvalue: float | None
    squared_overlap: float | None  #: (uᵀw)²/‖w‖² of its eigenvector u
    task_overlap: float | None  #: (uᵀw*)²/‖w*‖²
    threshold: float  #: smallest q√D with an outlier
    smallest_dim: float  #: and smallest D, infinite where w = 0


def merged_outlier(
    eigenvalues: Float[np.ndarray, " n"],
    shares: Float[np.ndarray, " n"],
    mass_at_zero: float,
    top: float,
    *,
    q: float,
    overlap: float,
    dim: int,
) -> MergedOutlier:
    """The root x of G(x) = 1/(q√D) above the spectrum, G its Stieltjes transform.

    u ∝ (x − βŜ)⁻¹w, so (uᵀw)²/‖w‖² = G²/(−G') = −1/((q√D)²G'(x)), as w is generic in the
    eigenbasis of Ŝ; of w* it sees the part along w, ``overlap``² of it.

    Args:
        eigenvalues, shares, mass_at_zero, top: the spectrum and its upper end.
        q, overlap: of the LoRA vector.
        dim: D.

    Example:
        >>> found = merged_outlier(np.array([1.0]), np.array([0.5]), 0.5, 1.0,
        ...                        q=0.5, overlap=1.0, dim=16)
        >>> round(0.5 / found.eigenvalue + 0.5 / (found.eigenvalue - 1), 9)  # 1/(q√D)
        0.5
        >>> found.threshold  # the transform has a pole at the top
        0.0
    """
    kept = shares > 0
    s, share = eigenvalues[kept], shares[kept]

    def transform(x: float, power: int = 1) -> float:
        with np.errstate(divide="ignore"):
            zero = mass_at_zero / np.float64(x) ** power if mass_at_zero > 0 else 0.0
            return float(np.sum(share / (x - s) ** power) + zero)

    strength = q * math.sqrt(dim)
    threshold = math.inf if math.isinf(top) else 1 / transform(top)
    smallest = (threshold / q) ** 2 if q > 0 else math.inf
    if not strength > threshold:
        return MergedOutlier(dim, strength, None, None, None, threshold, smallest)
    # 1/(x − smallest eigenvalue) ≤ G ≤ 1/(x − top)
    x = float(brentq(lambda x: strength * transform(x) - 1, top, top + strength, rtol=1e-13))
    squared = 1 / (strength**2 * transform(x, 2))
    return MergedOutlier(dim, strength, x, squared, overlap**2 * squared, threshold, smallest)
