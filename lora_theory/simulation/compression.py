"""What is frozen of the trained weights (docs/theory.md, sections 2.8 and 2.9)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from lora_theory.lowrank import svd
from lora_theory.lowrank.tied import compress_tied
from lora_theory.problem import Problem
from lora_theory.simulation.fields import Symmetric, Weights
from lora_theory.simulation.measure import as_matrix
from lora_theory.simulation.sizes import Sizes
from lora_theory.simulation.tokens import levels_of

__all__ = ["compressed"]


def compressed(weights: Weights, problem: Problem, sizes: Sizes) -> Weights:
    """The eigenvalues of S of largest size, as many as the compression keeps, or all of it.

    Under tokens with a covariance those in the metric that the compression asks for.
    """
    stage, rank = problem.compression, sizes.kept_rank
    if stage is None or rank is None:
        return weights
    trained = weights.matrix if isinstance(weights, Symmetric) else weights
    S = as_matrix(weights)
    if problem.covariance is None:
        left = svd(S, rank)
        left = (left + left.T) / 2
    else:
        grams = (np.diag(levels_of(problem, len(S), later=later)) for later in (False, True))
        left = compress_tied(
            S, rank, whitening=stage.whitening, calibration=stage.calibration,
            **dict(zip(("covariance", "shifted"), grams, strict=True)),
        )  # fmt: skip
    return Symmetric(jnp.asarray(left, trained.dtype))
