"""The polar factor of a matrix, by decomposition or by matrix products alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_theory.lowrank.polynomials import of_matrix, polar_polynomials
from lora_theory.problem import ProblemError

__all__ = [
    "at_least_single",
    "check_method",
    "checked_matrices",
    "iterated",
    "norm_of",
    "polar_factor",
    "polar_of",
]


def polar_factor(
    matrix: Float[Array, "*stack m n"], *, method: str = "svd", steps: int | None = None
) -> Float[Array, "*stack m n"]:
    """The polar factor UVᵀ of W = U diag(σ) Vᵀ: every positive singular value becomes 1.

    It is the gradient of the nuclear norm Σσ; where W is singular, the subgradient of least norm
    (zeros stay zeros, here those below max(m, n)·ε·σ₁).

    "newton_schulz" iterates X ← ½X(3 − XᵀX) from W/‖W‖_F, "polar_express" the polynomials of
    arXiv 2505.16932 (algorithm 1).  Both grow small singular values by a bounded factor a step, 1.5
    for the first: after K = 5 steps those below ‖W‖_F/1.5⁵ are merely multiplied, and the result
    is nearly W itself.  The default number of steps brings all above 10⁻⁵‖W‖_F to 1.

    Args:
        matrix: W, or a stack of them, floating-point.  It may be traced by JAX.
        method: "svd", "newton_schulz" or "polar_express".
        steps: K of the last two; "svd" has none.

    Raises:
        ProblemError: no such method, steps that are not a positive integer or given for "svd",
            anything but floating-point matrices.

    Example:
        >>> import jax.numpy as jnp
        >>> W = jnp.diag(jnp.array([3.0, 0.01]))
        >>> print(jnp.diag(polar_factor(W)))
        [1. 1.]
        >>> print(jnp.diag(polar_factor(W, method="newton_schulz", steps=5)).round(3))
        [1.    0.025]
    """
    check_method(method, steps)
    given = checked_matrices("matrix", matrix)
    result: Array = polar_of(at_least_single(given), method, steps).astype(given.dtype)
    return result


@partial(jax.jit, static_argnames=("method", "steps"))
def polar_of(
    W: Float[Array, "*stack m n"], method: str, steps: int | None
) -> Float[Array, "*stack m n"]:
    """The polar factor of checked arguments."""
    if method == "svd":
        U, s, Vt = jnp.linalg.svd(W, full_matrices=False)
        smallest = max(W.shape[-2:]) * float(np.finfo(W.dtype).eps) * s[..., :1]
        kept = jnp.where(s > smallest, 1.0, 0.0).astype(W.dtype)
        return jnp.matmul(U * kept[..., None, :], Vt, precision=jax.lax.Precision.HIGHEST)
    return iterated(W, norm_of(W), polar_polynomials(method, steps))


def check_method(method: str, steps: int | None) -> None:
    """Refuse a method that there is not, and steps that it does not have."""
    if method != "svd":
        polar_polynomials(method, steps)
    elif steps is not None:
        raise ProblemError(f"steps = {steps!r} is not allowed with method = 'svd': leave it out")


def iterated(
    W: Float[Array, "*stack m n"],
    scale: Float[Array, "*stack"],
    polynomials: tuple[tuple[float, ...], ...],
) -> Float[Array, "*stack m n"]:
    """The polynomials one after the other, of W/scale; of zero if W is."""
    start = W / jnp.where(scale > 0, scale, 1)[..., None, None]
    rows = jnp.asarray(polynomials, dtype=W.dtype)
    result: Array = jax.lax.scan(_applied, start, rows)[0]
    return result


def _applied(matrix: Array, coefficients: Array) -> tuple[Array, None]:
    return of_matrix(matrix, coefficients), None


def norm_of(W: Float[Array, "*stack m n"]) -> Float[Array, "*stack"]:
    """‖W‖_F, without overflow or underflow of the squares."""
    largest = jnp.max(jnp.abs(W), axis=(-2, -1))
    scaled = W / jnp.where(largest > 0, largest, 1)[..., None, None]
    return largest * jnp.sqrt(jnp.sum(scaled**2, axis=(-2, -1)))


def at_least_single(matrix: Array) -> Array:
    """Half precision as float32, everything else as it is."""
    return matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))


def checked_matrices(name: str, value: Any) -> Array:
    """A stack of floating-point matrices, traced or not; refused by shape and type."""
    array = value if isinstance(value, jax.Array) else jnp.asarray(value)
    if array.ndim < 2 or 0 in array.shape or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ProblemError(
            f"{name} of shape {array.shape} and type {array.dtype} is not allowed: it must be a "
            "matrix, or a stack of matrices, of real floating-point numbers"
        )
    return array
