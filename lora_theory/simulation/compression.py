"""What is frozen of the trained weights (docs/theory.md, section 2.8)."""

from __future__ import annotations

import jax.numpy as jnp

from lora_theory.lowrank import svd
from lora_theory.simulation.fields import Symmetric, Weights
from lora_theory.simulation.measure import as_matrix
from lora_theory.simulation.sizes import Sizes

__all__ = ["compressed"]


def compressed(weights: Weights, sizes: Sizes) -> Weights:
    """The eigenvalues of S of largest size, as many as the compression keeps, or all of it."""
    if sizes.kept_rank is None:
        return weights
    trained = weights.matrix if isinstance(weights, Symmetric) else weights
    left = svd(as_matrix(weights), sizes.kept_rank)
    return Symmetric(jnp.asarray((left + left.T) / 2, trained.dtype))
