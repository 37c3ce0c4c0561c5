"""What each method does to singular values: functions of plain numbers, for theory and for tests.

They take NumPy or JAX arrays of singular values, of one matrix along the last axis and in any
order, and return the same kind; JAX may trace them.
"""

from __future__ import annotations

from typing import Any

from lora_theory.lowrank.polynomials import (
    of_numbers,
    polar_polynomials,
    polar_slope,
    preconditioning_polynomial,
)

__all__ = ["decayed", "polar", "preconditioned", "truncated"]


def decayed(
    singular_values: Any,
    step: Any,
    *,
    method: str = "svd",
    steps: int | None = None,
    clip: bool = True,
) -> Any:
    """Singular values after :func:`lora_theory.lowrank.shrink`: max(σ − step, 0) for "svd".

    Of the other methods σ − step·f_K(σ/s), with s of all singular values given.  Without ``clip``
    a negative value is one whose singular vector has changed sign.

    Example:
        >>> import numpy as np
        >>> decayed(np.array([2.0, 0.3]), 0.5).tolist()
        [1.5, 0.0]
        >>> decayed(np.array([2.0, 0.3]), 0.5, method="newton_schulz").round(2).tolist()
        [1.5, 0.03]
    """
    s, xp = singular_values, singular_values.__array_namespace__()
    if not clip:
        return s - step * polar(s, method=method, steps=steps)
    if method == "svd":
        return xp.maximum(s - step, xp.zeros_like(s))
    polynomials = polar_polynomials(method, steps)
    floor = polar_slope(polynomials) * step
    return s - step * _iterated(s, xp.maximum(_norm(s), xp.asarray(floor)), polynomials)


def polar(singular_values: Any, *, method: str = "svd", steps: int | None = None) -> Any:
    """Singular values of :func:`lora_theory.lowrank.polar_factor`: 1 for "svd", 0 where σ = 0.

    Example:
        >>> import numpy as np
        >>> polar(np.array([1.0, 0.01]), method="newton_schulz", steps=5).round(4).tolist()
        [1.0, 0.0758]
    """
    if method == "svd":
        return 0.0 * singular_values + (singular_values > 0)
    return _iterated(singular_values, _norm(singular_values), polar_polynomials(method, steps))


def preconditioned(
    singular_values: Any, *, degree: int = 9, gain: Any = 1.0, scale: Any = None
) -> Any:
    """γσ̂g_d(σ/σ̂), those of :class:`lora_theory.lowrank.Preconditioned` (arXiv 2606.06470).

    Args:
        degree: d = 1, 3, 5, 7 or 9.
        gain: γ.
        scale: σ̂, the largest singular value if left out.

    Example:
        >>> import numpy as np
        >>> preconditioned(np.array([2.0, 0.2]), degree=9).round(3).tolist()
        [2.0, 0.707]
    """
    polynomial = preconditioning_polynomial(degree)
    s = singular_values
    top = s.__array_namespace__().max(s, axis=-1, keepdims=True) if scale is None else scale
    return gain * top * of_numbers(s / top, polynomial)


def truncated(singular_values: Any, rank: int) -> Any:
    """The ``rank`` largest kept, the others 0; of equal ones the first.

    Example:
        >>> import numpy as np
        >>> truncated(np.array([0.5, 2.0, 1.0]), 2).tolist()
        [0.0, 2.0, 1.0]
    """
    xp = singular_values.__array_namespace__()
    places = xp.argsort(xp.argsort(-singular_values, axis=-1, stable=True), axis=-1, stable=True)
    return singular_values * (places < rank)


def _norm(s: Any) -> Any:
    return s.__array_namespace__().sqrt((s * s).sum(axis=-1, keepdims=True))


def _iterated(s: Any, scale: Any, polynomials: tuple[tuple[float, ...], ...]) -> Any:
    xp = s.__array_namespace__()
    result = s / xp.where(scale > 0, scale, xp.asarray(1.0, dtype=s.dtype))
    for polynomial in polynomials:
        result = of_numbers(result, polynomial)
    return result
