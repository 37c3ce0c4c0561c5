"""Matrices of low rank near given weights, each the exact minimiser of its own distance.

All are Ŵ = L⁻ᵀ SVD_k(Lᵀ W R) R⁻¹ for different roots L and R, which minimises ‖Lᵀ(W − Ŵ)R‖_F; the
anchored one has another target (docs/lowrank.md, section 3).  Weights are m×n: outputs × inputs.
Everything is computed in double precision, with triangular solves and no inverse.

Common arguments:
    weights: W, finite, m×n.
    rank: k, from 1 to min(m, n).
    factors: return :class:`Factors` in place of their product.

Results are NumPy float64, or if ``weights`` is a JAX array, JAX arrays of its type.  Gram matrices
are arrays, or a :class:`~lora_theory.lowrank.Gram`, which is taken per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import solve_triangular
from scipy.linalg import svd as scipy_svd

from lora_theory.arguments import checked_integer
from lora_theory.lowrank.checks import (
    Matrix,
    checked_array,
    checked_gram,
    checked_matrix,
    checked_number,
    cholesky_root,
    mean_of_diagonal,
)
from lora_theory.lowrank.grams import gram_array
from lora_theory.problem import ProblemError

__all__ = ["Factors", "aa_svd", "asvd", "fwsvd", "obd", "obd_spectrum", "svd", "svd_llm"]

#: What keeps the weights of ASVD and FWSVD away from zero, as in their code.
_SMALLEST_SCALE, _SMALLEST_ROW = 1e-6, 1e-6


class Factors(NamedTuple):
    """Ŵ = left @ right, of equal Frobenius norms: neither is hard to train further."""

    left: Any
    right: Any


def svd(weights: Any, rank: int, *, factors: bool = False) -> Any:
    """Ŵ = SVD_k(W), the nearest matrix of that rank.

    Raises:
        ProblemError: weights that are no finite matrix, a rank out of range.

    Example:
        >>> svd([[3.0, 0.0], [0.0, 1.0]], rank=1).round(9).tolist()
        [[3.0, 0.0], [0.0, 0.0]]
    """
    W, rank = _checked(weights, rank)
    m, n = W.shape
    return _closest(weights, W, rank, np.eye(m), np.eye(n), factors)


def fwsvd(weights: Any, rank: int, *, row_weights: Any, factors: bool = False) -> Any:
    """Ŵ = D⁻¹SVD_k(DW) with D = diag(√I): outputs weighted by their Fisher information (FWSVD).

    Args:
        row_weights: I_i = Σ_j (∂L/∂W_ij)² ≥ 0, (m,); those below 10⁻⁶ of their mean count as that.

    Raises:
        ProblemError: as :func:`svd`; row weights of another shape, negative, or all zero.

    Example:
        >>> fwsvd([[3.0, 0.0], [0.0, 1.0]], rank=1, row_weights=[1.0, 100.0]).round(9).tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """
    W, rank = _checked(weights, rank)
    information = _not_negative("row_weights", row_weights, W.shape[0])
    information = information / information.max()
    rows = np.sqrt(np.maximum(information, _SMALLEST_ROW * information.mean()))
    return _closest(weights, W, rank, np.diag(rows), np.eye(W.shape[1]), factors)


def asvd(
    weights: Any, rank: int, *, input_scale: Any, alpha: float = 0.5, factors: bool = False
) -> Any:
    """Ŵ = SVD_k(WS)S⁻¹ with S = diag(scale^α + 10⁻⁶): inputs weighted by their size (ASVD).

    Args:
        input_scale: mean |x_j| of every input over the calibration tokens, ≥ 0, (n,).
        alpha: α ≥ 0; 0 is :func:`svd`.

    Raises:
        ProblemError: as :func:`svd`; scales of another shape, negative, or all zero; α < 0.

    Example:
        >>> asvd([[3.0, 0.0], [0.0, 1.0]], rank=1, input_scale=[1.0, 100.0]).round(9).tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """
    W, rank = _checked(weights, rank)
    scale = _not_negative("input_scale", input_scale, W.shape[1])
    with np.errstate(over="ignore"):
        columns = scale ** checked_number("alpha", alpha) + _SMALLEST_SCALE
    if not np.all(np.isfinite(columns)):
        raise ProblemError(
            f"alpha = {alpha!r} is not allowed: input_scale^alpha must be finite, and input_scale "
            f"goes up to {scale.max():.3g}"
        )
    return _closest(weights, W, rank, np.eye(W.shape[0]), np.diag(columns), factors)


def svd_llm(
    weights: Any, rank: int, *, input_gram: Any, damping: float = 0.0, factors: bool = False
) -> Any:
    """Ŵ = SVD_k(WR)R⁻¹ with RRᵀ = Σ x xᵀ: the least Σ‖Wx − Ŵx‖² over calibration inputs (SVD-LLM).

    Args:
        input_gram: Σ x xᵀ, n×n, of any scale.
        damping: added to its diagonal, in units of the mean diagonal; needed where it is singular.

    Raises:
        ProblemError: as :func:`svd`; a Gram matrix of another shape, not finite, not symmetric,
            with negative eigenvalues, singular without damping, or of too few tokens.

    Example:
        >>> gram = [[1.0, 0.0], [0.0, 100.0]]
        >>> svd_llm([[3.0, 0.0], [0.0, 1.0]], rank=1, input_gram=gram).round(9).tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """
    W, rank = _checked(weights, rank)
    right = _root("input_gram", input_gram, W.shape[1], damping)
    return _closest(weights, W, rank, np.eye(W.shape[0]), right, factors)


def obd(
    weights: Any,
    rank: int,
    *,
    input_gram: Any,
    output_gram: Any,
    damping: float = 0.1,
    factors: bool = False,
) -> Any:
    """Ŵ = L⁻ᵀSVD_k(LᵀWR)R⁻¹ with RRᵀ = E[x xᵀ], LLᵀ = E[g gᵀ] (OBD-LLM, arXiv 2604.00821).

    It minimises the second-order change of the loss, ½tr(E[g gᵀ]ΔW E[x xᵀ]ΔWᵀ), where the Hessian
    is the Kronecker product of the two (x and g independent) and the gradient zero.  The least
    value is ½Σ_{i>k}σ_i² of :func:`obd_spectrum`.

    Args:
        input_gram: E[x xᵀ] of the inputs, n×n.
        output_gram: E[g gᵀ] of g = ∂loss/∂output, m×m.
        damping: added to the diagonal of each, in units of its mean diagonal.

    Raises:
        ProblemError: as :func:`svd_llm`, of each Gram matrix.

    Example:
        >>> weights, likely = [[3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 4.0]]
        >>> obd(weights, 1, input_gram=likely, output_gram=likely, damping=0.0).round(9)
        array([[0., 0.],
               [0., 1.]])
    """
    W, rank = _checked(weights, rank)
    left = _root("output_gram", output_gram, W.shape[0], damping)
    right = _root("input_gram", input_gram, W.shape[1], damping)
    return _closest(weights, W, rank, left, right, factors)


def obd_spectrum(
    weights: Any, *, input_gram: Any = None, output_gram: Any = None, damping: float = 0.1
) -> Matrix:
    """Singular values of LᵀWR: half their squares are what dropping each costs, in units of loss.

    For :func:`~lora_theory.lowrank.allocate_ranks`.  The units are those of the loss per token if
    both Gram matrices are means over tokens, and g belongs to the loss of one token.

    Args:
        input_gram, output_gram, damping: as for :func:`obd`; without one, its root is 1.

    Returns:
        min(m, n) numbers, the largest first.

    Raises:
        ProblemError: as :func:`obd`.

    Example:
        >>> obd_spectrum([[3.0, 0.0], [0.0, 1.0]]).tolist()
        [3.0, 1.0]
    """
    W = checked_matrix("weights", weights)
    m, n = W.shape
    left = np.eye(m) if output_gram is None else _root("output_gram", output_gram, m, damping)
    right = np.eye(n) if input_gram is None else _root("input_gram", input_gram, n, damping)
    with np.errstate(over="ignore", invalid="ignore"):
        whitened = left.T @ W @ right
    if not np.all(np.isfinite(whitened)):
        raise ProblemError(_TOO_LARGE.format(size=np.abs(W).max()))
    return np.asarray(_svd(whitened)[1])


def aa_svd(
    weights: Any,
    rank: int,
    *,
    input_gram: Any,
    cross_gram: Any,
    damping: float = 0.0,
    factors: bool = False,
) -> Any:
    """The least Σ‖Wx − Ŵx'‖², x' the inputs in the compressed network (AA-SVD, arXiv 2604.02119).

    Ŵ = SVD_k(M)R⁻¹ with M = W(Σ x x'ᵀ)R⁻ᵀ and RRᵀ = Σ x'x'ᵀ (its theorem 3.2); the least value is
    Σ‖Wx‖² − ‖M‖_F² + Σ_{i>k}σ_i(M)².  With x = x' this is :func:`svd_llm`.

    Args:
        input_gram: Σ x'x'ᵀ of the inputs in the partly compressed network, n×n.
        cross_gram: Σ x x'ᵀ, original inputs first, n×n; its transpose gives something far worse.
        damping: ε in units of the mean diagonal of ``input_gram``, added to the diagonals of both:
            the minimiser then includes ε‖W − Ŵ‖².

    Raises:
        ProblemError: as :func:`svd_llm`, of each Gram matrix; ``cross_gram`` need not be symmetric.

    Example:
        >>> import numpy as np
        >>> aa_svd([[2.0, 0.0], [0.0, 1.0]], 2, input_gram=np.eye(2), cross_gram=3 * np.eye(2))
        array([[6., 0.],
               [0., 3.]])
    """
    W, rank = _checked(weights, rank)
    n = W.shape[1]
    cross = checked_array("cross_gram", gram_array(cross_gram), (n, n), f"({n}, {n})")
    gram = checked_gram("input_gram", gram_array(input_gram), n)
    right = cholesky_root("input_gram", gram, checked_number("damping", damping))
    right, root_size = _of_order_one(right)
    cross, cross_size = _of_order_one(cross + damping * mean_of_diagonal(gram) * np.eye(n))
    unit, size = _of_order_one(W)
    target = solve_triangular(right, (unit @ cross).T, lower=True).T
    size *= cross_size / root_size / root_size
    return _truncated(weights, target, size, rank, np.eye(W.shape[0]), right, factors)


def _closest(weights: Any, W: Matrix, rank: int, left: Matrix, right: Matrix, factors: bool) -> Any:
    """The minimiser of ‖Lᵀ(W − Ŵ)R‖_F for lower triangular L and R."""
    left, right = left / np.abs(left).max(), right / np.abs(right).max()
    unit, size = _of_order_one(W)
    return _truncated(weights, left.T @ unit @ right, size, rank, left, right, factors)


def _truncated(
    weights: Any,
    target: Matrix,
    size: float,
    rank: int,
    left: Matrix,
    right: Matrix,
    factors: bool,
) -> Any:
    """size · L⁻ᵀSVD_k(target)R⁻¹, all of order one but the size."""
    U, s, Vt = _svd(target)
    half = np.sqrt(s[:rank])
    B = solve_triangular(left, U[:, :rank] * half, trans="T", lower=True)
    A = solve_triangular(right, Vt[:rank].T * half, trans="T", lower=True).T
    norms = np.linalg.norm(B), np.linalg.norm(A)
    balance = np.sqrt(norms[1] / norms[0]) if all(norms) else 1.0
    B, A = np.sqrt(size) * balance * B, np.sqrt(size) / balance * A
    if factors:
        return Factors(_like(weights, B), _like(weights, A))
    with np.errstate(over="ignore", invalid="ignore"):
        product = B @ A
    if not np.all(np.isfinite(product)):
        raise ProblemError(_TOO_LARGE.format(size=size))
    return _like(weights, product)


_TOO_LARGE = (
    "weights or Gram matrices are too large for double precision, entries up to {size:.3g}: bring "
    "them to order one, which changes only the scale of the result"
)


def _svd(matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Singular vectors and values; by QR iterations where divide and conquer does not converge."""
    try:
        return np.linalg.svd(matrix, full_matrices=False)
    except np.linalg.LinAlgError:  # seen on positive matrices of low rank
        return scipy_svd(matrix, full_matrices=False, lapack_driver="gesvd")  # type: ignore[no-any-return]


def _of_order_one(array: Matrix) -> tuple[Matrix, float]:
    """What has the same zeros, without overflow or underflow of its squares; and the scale."""
    size = float(np.abs(array).max())
    return (array / size, size) if size > 0 else (array, 1.0)


def _like(weights: Any, result: Matrix) -> Any:
    """NumPy for everything but JAX."""
    if not isinstance(weights, jax.Array):
        return result
    return jnp.asarray(result, weights.dtype)


def _checked(weights: Any, rank: Any) -> tuple[Matrix, int]:
    W = checked_matrix("weights", weights)
    return W, checked_integer("rank", rank, 1, min(W.shape))


def _root(name: str, gram: Any, size: int, damping: Any) -> Matrix:
    array = checked_gram(name, gram_array(gram), size)
    return cholesky_root(name, array, checked_number("damping", damping))


def _not_negative(name: str, value: Any, size: int) -> Matrix:
    array = checked_array(name, value, (size,), f"({size},)")
    if np.any(array < 0) or not np.any(array > 0):
        raise ProblemError(f"{name} must be ≥ 0, and not all 0: they go from {array.min():.3g}")
    return array
