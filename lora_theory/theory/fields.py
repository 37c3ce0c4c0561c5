"""Coordinates of the pre-activations and the derivatives of the softmax loss in them.

Nodes are the last axis throughout: fields h are (T, T, nodes), coordinates z are (n, nodes).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_theory.attention import attention

__all__ = ["RowExpansion", "field_basis", "field_count", "softmax_loss", "to_fields"]


def field_count(tokens: int, activation: str) -> int:
    """n: independent directions of h that σ sees, T(T+1)/2, less the flat one for softmax."""
    return tokens * (tokens + 1) // 2 - (activation == "softmax")


def field_basis(tokens: int, activation: str) -> np.ndarray:
    """Symmetric matrices E_i, (T, T, n), with h = Σ_i z_i E_i and z_i iid of the variance of z_ab.

    In the coordinates z_ab = h_ab/√(1 + δ_ab), a ≤ b, of docs/theory.md section 1 the basis is
    orthonormal.  Adding one number to all logits does not change a softmax: for it the direction
    f_ab ∝ 1/√(1 + δ_ab) (h ∝ 11ᵀ) is left out.
    """
    pairs = [(a, b) for a in range(tokens) for b in range(a, tokens)]
    flat = np.array([2**-0.5 if a == b else 1.0 for a, b in pairs])
    directions = np.eye(len(pairs))
    if activation == "softmax":
        rotation = np.linalg.qr(np.column_stack([flat, directions[:, 1:]]))[0]
        directions = rotation[:, 1:]
    basis = np.zeros((tokens, tokens, directions.shape[1]))
    for (a, b), row in zip(pairs, directions, strict=True):
        basis[a, b] = basis[b, a] = row * (2**0.5 if a == b else 1.0)
    return basis


def to_fields(
    basis: Float[np.ndarray, "T T n"], coordinates: Float[Array, "n nodes"]
) -> Float[Array, "T T nodes"]:
    """h = Σ_i z_i E_i for every node."""
    return jnp.einsum("abn,nN->abN", jnp.asarray(basis), coordinates)


class RowExpansion(NamedTuple):
    """ℓ(h; y) = ‖y − σ(h)‖² with its derivatives in the entries of h, row by row."""

    value: Float[Array, " nodes"]
    gradient: Float[Array, "T T nodes"]  # ∂ℓ/∂h_ab, the rows of h taken independent
    hessian: Float[Array, "T T T nodes"]  # ∂²ℓ/∂h_ab∂h_ac


def softmax_loss(
    fields: Float[Array, "T T nodes"], labels: Float[Array, "T T nodes"]
) -> RowExpansion:
    """Squared error of the row softmax of ``fields`` and its first two derivatives.

    With p = σ(h_a·), d = p − y_a· and c = p·d, row a has gradient 2p∘(d − c) and Hessian
    2[diag(p∘(d − c) + p²) − r pᵀ − p rᵀ + ‖p‖²ppᵀ], r = p∘(d − c + p) (by differentiation).
    """
    p = attention(fields, "softmax", row_axis=0)
    d = p - labels
    residual = p * (d - jnp.sum(p * d, axis=1, keepdims=True))
    r = residual + p**2
    squared = jnp.sum(p**2, axis=1)[:, None, None]
    outer = p[:, :, None] * p[:, None]
    cross = r[:, :, None] * p[:, None]
    diagonal = jnp.eye(p.shape[0])[None, :, :, None] * r[:, :, None]
    hessian = 2 * (diagonal - cross - jnp.swapaxes(cross, 1, 2) + squared * outer)
    return RowExpansion(jnp.sum(d**2, axis=(0, 1)), 2 * residual, hessian)
