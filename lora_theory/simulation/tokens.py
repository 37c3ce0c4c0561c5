"""Tokens of covariance C: x = C^{1/2}g (docs/theory.md, sections 2.9 and 3.8).

Sequences hold g, iid standard normal; weights are multiplied by C^{1/2} before they meet them:
x_aᵀSx_b = g_aᵀ(C^{1/2}SC^{1/2})g_b.  Descents run over C^{1/2}W, whose weight decay is Σ W²/c.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_theory.problem import Problem
from lora_theory.simulation.fields import Symmetric, Weights

__all__ = ["decay_of", "levels_of", "seen", "token_scale"]


def levels_of(problem: Problem, dim: int, *, later: bool = False) -> Float[np.ndarray, " D"]:
    """The diagonal of C, or of C' of fine-tuning: each level D/n times, as evenly as D allows."""
    if problem.covariance is None:
        return np.ones(dim)
    covariance = problem.covariance
    values = np.array(covariance.later if later else covariance.eigenvalues)
    return np.asarray(values[np.arange(dim) * values.size // dim])


def token_scale(
    problem: Problem, dim: int, dtype: Any, *, later: bool = False
) -> Float[Array, "D 1"] | None:
    """The diagonal of C^{1/2} as a column; None where the tokens have no covariance."""
    if problem.covariance is None:
        return None
    return jnp.asarray(np.sqrt(levels_of(problem, dim, later=later))[:, None], dtype)


def seen(weights: Weights, scale: Float[Array, "D 1"] | None) -> Weights:
    """C^{1/2}W of a factor, C^{1/2}SC^{1/2} of a matrix."""
    if scale is None:
        return weights
    if isinstance(weights, Symmetric):
        return Symmetric(scale * weights.matrix * scale.T)
    return scale * weights


def decay_of(scale: Float[Array, "D 1"] | None) -> Float[Array, "D 1"] | None:
    """1/c, by which the squares of C^{1/2}W are to be multiplied in weight decay on W."""
    return None if scale is None else 1 / scale**2
