"""Centred pre-activations of a sequence under weights (docs/theory.md, section 1)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["Symmetric", "Weights", "centred_fields", "noisy_fields"]


class Symmetric(NamedTuple):
    """Weights given as the matrix S itself, of any signature."""

    matrix: Float[Array, "D D"]


#: A factor W ∈ R^{D×P} of S = WWᵀ/√(PD), or S.
Weights = Float[Array, "D P"] | Symmetric


@jax.jit
def centred_fields(sequences: Float[Array, "n T D"], weights: Weights) -> Float[Array, "n T T"]:
    """Centred pre-activations h_ab = (x_aᵀ S x_b − δ_ab Tr S)/√D of every sequence.

    With a factor W ∈ R^{D×P} this is (X W WᵀXᵀ − ‖W‖²_F I)/(D√P); with the one column w it is
    χχᵀ − qI, χ = Xw/√D, q = ‖w‖²/D.
    """
    count, tokens, dim = sequences.shape
    exact = jax.lax.Precision.HIGHEST
    if isinstance(weights, Symmetric):
        S = weights.matrix
        images = jnp.matmul(sequences.reshape(-1, dim), S, precision=exact)
        images = images.reshape(count, tokens, dim)
        products = jnp.einsum("nap,nbp->nab", images, sequences, precision=exact)
        centred: Array = (products - jnp.trace(S) * jnp.eye(tokens, dtype=S.dtype)) / dim**0.5
        return centred
    rank = weights.shape[1]
    # one flat product, twice as fast as the batched one
    flat = jnp.matmul(sequences.reshape(-1, dim), weights, precision=exact)
    projections = flat.reshape(count, tokens, rank)
    products = jnp.einsum("nap,nbp->nab", projections, projections, precision=exact)
    trace = jnp.sum(weights**2) * jnp.eye(tokens, dtype=weights.dtype)
    fields: Array = (products - trace) / (dim * rank**0.5)
    return fields


@jax.jit
def noisy_fields(
    sequences: Float[Array, "n T D"],
    teacher: Weights,
    noise: Float[Array, "n T T"],
    label_noise: Float[Array, ""],
) -> Float[Array, "n T T"]:
    """h^y = h⁰ + √Δ ξ: variance Δ is added on the diagonal, Δ/2 off it."""
    fields: Array = centred_fields(sequences, teacher)
    return fields + jnp.sqrt(label_noise) * noise
