"""Coordinates of the pre-activations and the derivatives of the softmax loss in them.

Nodes are the last axis throughout: fields h are (T, T, nodes), coordinates z are (n, nodes).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_theory.attention import attention

__all__ = [
    "RowExpansion",
    "field_basis",
    "field_count",
    "field_pairs",
    "full_basis",
    "softmax_field_hessian",
    "softmax_loss",
    "to_fields",
]


def field_count(tokens: int, activation: str) -> int:
    """n: independent directions of h that σ sees, T(T+1)/2, less the flat one for softmax."""
    return tokens * (tokens + 1) // 2 - (activation == "softmax")


def field_basis(tokens: int, activation: str) -> np.ndarray:
    """Symmetric matrices E_i, (T, T, n), with h = Σ_i z_i E_i and z_i iid of the variance of z_ab.

    In the coordinates z_ab = h_ab/√(1 + δ_ab), a ≤ b, of docs/theory.md section 1 the basis is
    orthonormal.  Adding one number to all logits does not change a softmax: for it the direction
    f_ab ∝ 1/√(1 + δ_ab) (h ∝ 11ᵀ) is left out, by the reflection that takes it to the first pair.
    """
    if activation == "softmax":
        return full_basis(tokens)[:, :, 1:]
    return _symmetric(tokens, np.eye(len(field_pairs(tokens))))


def full_basis(tokens: int) -> np.ndarray:
    """The softmax basis with the flat direction before the others: all of h, (T, T, T(T+1)/2)."""
    mirror, square = _reflection(tokens)
    return _symmetric(tokens, np.eye(len(mirror)) - 2 / square * np.outer(mirror, mirror))


def _symmetric(tokens: int, directions: np.ndarray) -> np.ndarray:
    """Matrices h from the coordinates z_ab, a ≤ b, along the first axis."""
    basis = np.zeros((tokens, tokens, directions.shape[1]))
    for (a, b), row in zip(field_pairs(tokens), directions, strict=True):
        basis[a, b] = basis[b, a] = row * (2**0.5 if a == b else 1.0)
    return basis


def field_pairs(tokens: int) -> list[tuple[int, int]]:
    """The pairs a ≤ b of z_ab, in order."""
    return [(a, b) for a in range(tokens) for b in range(a, tokens)]


def _reflection(tokens: int) -> tuple[np.ndarray, float]:
    """f/‖f‖ − e_1 and its square: I − 2wwᵀ/w² exchanges the flat direction f and e_1."""
    flat = np.array([2**-0.5 if a == b else 1.0 for a, b in field_pairs(tokens)])
    mirror = flat / np.linalg.norm(flat)
    mirror[0] -= 1
    return mirror, float(mirror @ mirror)


def softmax_field_hessian(rows: Float[Array, "T T T nodes"]) -> Float[Array, "n n nodes"]:
    """Hessian in the coordinates of :func:`field_basis` from that of every row of h.

    In the pairs it is sparse; and as it annihilates the flat direction f, the reflection costs only
    multiples of its first row: with w = f/‖f‖ − e_1 and i, j ≥ 2,
    H'_ij = H_ij + 2(w_i H_1j + w_j H_i1)/w² + 4 w_i w_j H_11/w⁴.
    """
    tokens = rows.shape[0]
    pairs = field_pairs(tokens)

    def entry(i: tuple[int, int], j: tuple[int, int]) -> Array:
        total = jnp.zeros(rows.shape[-1])
        for row in set(i) & set(j):
            column_i, column_j = (pair[0] + pair[1] - row for pair in (i, j))
            total += rows[row, column_i, column_j]
        scale = (2**0.5 if i[0] == i[1] else 1.0) * (2**0.5 if j[0] == j[1] else 1.0)
        return scale * total

    mirror, square = _reflection(tokens)
    first = [entry(pairs[0], pair) for pair in pairs]
    count = len(pairs)
    columns: list[list[Array]] = [[first[0]] * (count - 1) for _ in range(count - 1)]
    for i in range(1, count):
        for j in range(i, count):
            value = entry(pairs[i], pairs[j]) + 2 / square * (
                mirror[i] * first[j] + mirror[j] * first[i]
            )
            value += 4 / square**2 * mirror[i] * mirror[j] * first[0]
            columns[i - 1][j - 1] = columns[j - 1][i - 1] = value
    return jnp.stack([jnp.stack(column) for column in columns])


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
