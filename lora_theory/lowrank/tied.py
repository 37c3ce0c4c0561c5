"""Low-rank compression of the tied matrix S of an attention head, whose tokens have a covariance.

Keys and queries are one matrix, so that what a method leaves has to be symmetric: its symmetric
part is kept.  The logits are linear in S, and those of the symmetric and of the antisymmetric part
are uncorrelated, so that dropping the latter only lowers the distortion of a symmetric S; but the
rank may double.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from lora_theory.lowrank.compression import aa_svd, obd, svd, svd_llm

__all__ = ["compress_tied"]


def compress_tied(
    S: Float[np.ndarray, "D D"],
    rank: int,
    *,
    whitening: str,
    calibration: str,
    covariance: Float[np.ndarray, "D D"],
    shifted: Float[np.ndarray, "D D"],
) -> Float[np.ndarray, "D D"]:
    """S' of rank k (one-sided: up to 2k), truncated in the metric of tokens x, x' or both.

    "none": SVD_k(S).  "one_sided": the symmetric part of SVD_k(SR)R⁻¹ (SVD-LLM), RRᵀ = C for
    calibration on "pretraining" tokens, C' for "finetuning", and SVD_k(SC^{1/2})C'^{-1/2} for
    "anchored" (AA-SVD's ④).  "two_sided": L⁻ᵀSVD_k(LᵀSL)L⁻¹ (OBD) likewise, anchored
    C'^{-1/2}SVD_k(C^{1/2}SC^{1/2})C'^{-1/2}.

    Args:
        S: symmetric.
        rank: k.
        covariance, shifted: C and C', diagonal or not, positive definite; "anchored" takes the
            symmetric roots.

    Example:
        >>> C = np.diag([1.0, 100.0])
        >>> kind = {"calibration": "pretraining", "covariance": C, "shifted": C}
        >>> compress_tied(np.diag([3.0, 1.0]), 1, whitening="two_sided", **kind).round(9)
        array([[0., 0.],
               [0., 1.]])
    """
    anchored = calibration == "anchored"
    gram = shifted if calibration == "finetuning" else covariance
    if whitening == "none":
        left = svd(S, rank)
    elif whitening == "two_sided":
        left = obd(S, rank, input_gram=gram, output_gram=gram, damping=0.0)
        if anchored:
            change = np.linalg.solve(_root(shifted), _root(covariance))
            left = change @ left @ change.T
    elif anchored:
        cross = _root(covariance) @ _root(shifted)
        left = aa_svd(S, rank, input_gram=shifted, cross_gram=cross)
    else:
        left = svd_llm(S, rank, input_gram=gram)
    return np.asarray((left + left.T) / 2)


def _root(matrix: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D D"]:
    """The symmetric square root."""
    levels, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(levels)) @ vectors.T)
