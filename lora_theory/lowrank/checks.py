"""Matrices and Gram matrices given by the user: double precision, or one sentence of refusal."""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from lora_theory.problem import ProblemError

__all__ = [
    "Matrix", "checked_array", "checked_gram", "checked_matrix", "checked_number",
    "cholesky_root", "mean_of_diagonal",
]  # fmt: skip

Matrix = NDArray[np.float64]

#: Relative to the largest entry: the asymmetry that float32 sums may have.
_ASYMMETRY = 1e-5


def checked_array(name: str, value: Any, shape: tuple[int | None, ...], allowed: str) -> Matrix:
    """Finite real numbers of a shape, None for any positive length."""
    if isinstance(value, jax.core.Tracer):
        raise ProblemError(f"{name} is traced by JAX: call this outside of jit, vmap and grad")
    try:
        array = np.asarray(value)
        if np.iscomplexobj(array):
            raise ValueError
        array = array.astype(np.float64)
    except (TypeError, ValueError):
        raise ProblemError(f"{name} is no array of numbers: it must hold real numbers") from None
    lengths = zip(array.shape, shape, strict=False)
    fits = array.ndim == len(shape) and all(
        length > 0 and wanted in (None, length) for length, wanted in lengths
    )
    if not fits:
        raise ProblemError(f"{name} of shape {array.shape} is not allowed: it must be {allowed}")
    if not np.all(np.isfinite(array)):
        count = int(np.sum(~np.isfinite(array)))
        raise ProblemError(f"{name} has {count} entries that are not finite: all must be")
    return array


def checked_matrix(name: str, value: Any) -> Matrix:
    """A finite matrix."""
    return checked_array(name, value, (None, None), "a matrix")


def checked_number(
    name: str, value: Any, *, positive: bool = False, largest: float = math.inf
) -> float:
    """A finite number ≥ 0, or > 0, up to ``largest``."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    lowest_fits = is_number and (value > 0 if positive else value >= 0)
    if not lowest_fits or not math.isfinite(value) or value > largest:
        allowed = ("> 0" if positive else "≥ 0") + (
            " and finite" if largest == math.inf else f" and ≤ {largest:g}"
        )
        raise ProblemError(f"{name} = {value!r} is not allowed: it must be {allowed}")
    return float(value)


def checked_gram(name: str, value: Any, size: int) -> Matrix:
    """A symmetric matrix of a size, made exactly so."""
    gram = checked_array(name, value, (size, size), f"({size}, {size})")
    half, largest = gram / 2, float(np.abs(gram).max())
    asymmetry = float(np.abs(half - half.T).max()) / largest * 2 if largest > 0 else 0.0
    if asymmetry > _ASYMMETRY:
        raise ProblemError(
            f"{name} is not symmetric: it must be, and differs from its transpose by "
            f"{asymmetry:.1e} of its largest entry"
        )
    return np.asarray(half + half.T)


def mean_of_diagonal(gram: Matrix) -> float:
    """Of numbers whose sum may overflow."""
    return float(np.sum(np.diag(gram) / len(gram)))


def cholesky_root(name: str, gram: Matrix, damping: float) -> Matrix:
    """The lower L with LLᵀ = gram + damping · (mean of its diagonal) · 1.

    Raises:
        ProblemError: the gram has a negative eigenvalue, or is singular with that damping.
    """
    size = len(gram)
    eigenvalues = np.linalg.eigvalsh(gram)
    lowest, highest = float(eigenvalues[0]), float(eigenvalues[-1])
    # what sums in float32 may leave of a zero
    if highest <= 0 or lowest < -1e-5 * highest:
        raise ProblemError(
            f"{name} has eigenvalues from {lowest:.3g} to {highest:.3g}: as a Gram matrix it must "
            "have no negative one, and not only zeros"
        )
    shift = damping * mean_of_diagonal(gram)
    if lowest + shift <= 4 * size * np.finfo(float).eps * (highest + shift):
        raise ProblemError(
            f"{name} is singular with damping = {damping:g}: its eigenvalues go from {lowest:.3g} "
            f"to {highest:.3g}; take more calibration tokens or a larger damping"
        )
    return np.asarray(np.linalg.cholesky(gram + shift * np.eye(size)))
