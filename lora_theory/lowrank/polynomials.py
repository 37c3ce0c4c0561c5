"""Odd polynomials of a matrix: they act on its singular values and leave its singular vectors.

Wₓ = U diag(p(σ)) Vᵀ for p(σ) = Σ_i c_i σ^{2i+1} is a few matrix products, no decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_theory.arguments import checked_integer, is_integer
from lora_theory.problem import ProblemError

__all__ = [
    "POLAR_STEPS",
    "PRECONDITIONING",
    "of_matrix",
    "of_numbers",
    "polar_polynomials",
    "polar_slope",
    "preconditioning_polynomial",
]

#: c_0, c_1, … by degree, of arXiv 2606.06470; 1 leaves the spectrum as it is.
PRECONDITIONING: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    3: (1.507, -0.507),
    5: (2.083, -1.643, 0.560),
    7: (2.909, -4.649, 4.023, -1.283),
    9: (3.625, -9.261, 14.097, -10.351, 2.890),
}

_NEWTON_SCHULZ = (1.5, -0.5)
#: Published for singular values in [10⁻³, 1] (arXiv 2505.16932, algorithm 1); the last one repeats.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
#: Steps after which every singular value above 10⁻⁵‖W‖_F has become 1, the resolution of float32.
POLAR_STEPS = {"newton_schulz": 32, "polar_express": 15}


def preconditioning_polynomial(degree: Any) -> tuple[float, ...]:
    """c_0, c_1, … of a degree, or a :class:`ProblemError` that says which there are."""
    if not is_integer(degree) or degree not in PRECONDITIONING:
        allowed = ", ".join(map(str, PRECONDITIONING))
        raise ProblemError(f"degree = {degree!r} is not allowed: it must be one of {allowed}")
    return PRECONDITIONING[int(degree)]


def polar_polynomials(method: str, steps: int | None) -> tuple[tuple[float, ...], ...]:
    """The polynomials to apply one after the other to singular values in [0, 1].

    "newton_schulz" repeats ½σ(3 − σ²), "polar_express" takes the published ones in turn.
    """
    if method not in tuple(POLAR_STEPS):
        allowed = '"svd", ' + ", ".join(f'"{name}"' for name in POLAR_STEPS)
        raise ProblemError(f"method = {method!r} is not allowed: it must be one of {allowed}")
    count = POLAR_STEPS[method] if steps is None else checked_integer("steps", steps, 1)
    if method == "newton_schulz":
        return (_NEWTON_SCHULZ,) * count
    last = len(_POLAR_EXPRESS) - 1
    return tuple(_POLAR_EXPRESS[min(step, last)] for step in range(count))


def polar_slope(polynomials: Sequence[Sequence[float]]) -> float:
    """The largest factor by which any σ in [0, 1] grows, reached for σ → 0: the product of c_0."""
    return math.prod(polynomial[0] for polynomial in polynomials)


def of_matrix(
    matrix: Float[Array, "*stack m n"], coefficients: Sequence[float] | Array
) -> Float[Array, "*stack m n"]:
    """U diag(p(σ)) Vᵀ by Horner's rule, with the Gram matrix of the smaller side."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    wide = jnp.swapaxes(matrix, -1, -2) if tall else matrix
    gram = _product(wide, jnp.swapaxes(wide, -1, -2))
    identity = jnp.eye(wide.shape[-2], dtype=matrix.dtype)
    last = coefficients[len(coefficients) - 1]
    inner = last * identity
    for i in reversed(range(len(coefficients) - 1)):
        inner = _product(inner, gram) + coefficients[i] * identity
    result = _product(inner, wide)
    return jnp.swapaxes(result, -1, -2) if tall else result


def of_numbers(numbers: Any, coefficients: Sequence[float]) -> Any:
    """p(σ) of plain numbers or arrays of any library."""
    squares, inner = numbers * numbers, 0.0
    for coefficient in reversed(coefficients):
        inner = inner * squares + coefficient
    return numbers * inner


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
