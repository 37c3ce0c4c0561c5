"""Centred pre-activations of a sequence under a factor W (docs/theory.md, section 1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["centred_fields", "noisy_fields"]


@jax.jit
def centred_fields(
    sequences: Float[Array, "n T D"], weights: Float[Array, "D P"]
) -> Float[Array, "n T T"]:
    """Centred pre-activations (X W WᵀXᵀ − ‖W‖²_F I)/(D√P) of every sequence.

    With W ∈ R^{D×P} this is h_ab = (x_aᵀ S x_b − δ_ab Tr S)/√D, S = WWᵀ/√(PD); with the one
    column w it is χχᵀ − qI, χ = Xw/√D, q = ‖w‖²/D.
    """
    count, tokens, dim = sequences.shape
    rank, exact = weights.shape[1], jax.lax.Precision.HIGHEST
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
    teacher: Float[Array, "D P0"],
    noise: Float[Array, "n T T"],
    label_noise: Float[Array, ""],
) -> Float[Array, "n T T"]:
    """h^y = h⁰ + √Δ ξ: variance Δ is added on the diagonal, Δ/2 off it."""
    fields: Array = centred_fields(sequences, teacher)
    return fields + jnp.sqrt(label_noise) * noise
