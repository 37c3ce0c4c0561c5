"""The two losses of the model on given attention matrices; they agree for D → ∞."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

__all__ = ["loss_on_attention", "loss_on_outputs"]


def loss_on_attention(student: ArrayLike, teacher: ArrayLike) -> Float[np.ndarray, " n"]:
    """‖σ_student − σ_teacher‖²_F of every sequence: the loss that is trained and tested here.

    Args:
        student: attention matrices, (n, T, T).
        teacher: attention matrices, (n, T, T).

    Example:
        >>> float(loss_on_attention(np.zeros((1, 2, 2)), np.ones((1, 2, 2)))[0])
        4.0
    """
    gap = np.asarray(student, dtype=np.float64) - np.asarray(teacher, dtype=np.float64)
    return np.asarray(np.sum(gap**2, axis=(1, 2)))


def loss_on_outputs(
    student: ArrayLike, teacher: ArrayLike, sequences: ArrayLike
) -> Float[np.ndarray, " n"]:
    """D⁻¹‖(σ_student − σ_teacher) X‖²_F of every sequence: the loss of the paper, on ŷ = σX.

    Since XXᵀ/D → I it tends to :func:`loss_on_attention`, with a gap of order 1/√D per sequence
    (docs/theory.md, section 1; losses of arXiv 2606.05899).

    Args:
        student: attention matrices, (n, T, T).
        teacher: attention matrices, (n, T, T).
        sequences: the inputs X, (n, T, D).

    Example:
        >>> X = np.array([[[1.0, -1.0], [1.0, 1.0]]])  # XXᵀ/D = I: no gap
        >>> float(loss_on_outputs(np.zeros((1, 2, 2)), np.ones((1, 2, 2)), X)[0])
        4.0
    """
    inputs = np.asarray(sequences, dtype=np.float64)
    gap = np.asarray(student, dtype=np.float64) - np.asarray(teacher, dtype=np.float64)
    return np.asarray(np.sum((gap @ inputs) ** 2, axis=(1, 2)) / inputs.shape[2])
