"""The attention non-linearity σ on T×T pre-activations, shared by theory and simulation."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

__all__ = ["attention"]


def attention(
    scores: Float[Array, "..."], activation: str, *, row_axis: int = -2
) -> Float[Array, "..."]:
    """σ of pre-activations whose rows (queries) and columns (keys) lie on two neighbouring axes.

    "softmax": σ(A)_ab = exp(A_ab)/Σ_c exp(A_ac); "linear": σ(A) = A/T (docs/theory.md, section 1).

    Args:
        scores: pre-activations; axis ``row_axis`` counts a, the next axis counts b.
        activation: "softmax" or "linear".
        row_axis: -2 for arrays (..., T, T); 0 for arrays (T, T, nodes).
    """
    column_axis = row_axis + 1
    if activation == "softmax":
        return jax.nn.softmax(scores, axis=column_axis)
    return scores / scores.shape[column_axis]
