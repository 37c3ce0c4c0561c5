"""The teacher's matrix S0 at finite D (docs/theory.md, sections 1 and 2)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from lora_theory.laws import law_of
from lora_theory.problem import Problem
from lora_theory.simulation.data import Draw, draw_normal
from lora_theory.simulation.fields import Symmetric, Weights
from lora_theory.simulation.measure import as_matrix
from lora_theory.simulation.sizes import Sizes

__all__ = ["draw_teacher"]


def draw_teacher(key: Key[Array, ""], problem: Problem, sizes: Sizes, dtype: Any) -> Weights:
    """W0 of the Wishart law, or S0 with eigenvalues of another law in a uniformly random basis.

    Spikes θ are added as θvvᵀ with orthonormal, uniformly random v.
    """
    own, dim = Draw.TEACHER.key(key), sizes.dim
    teacher = problem.teacher
    if teacher.law == "wishart":
        factor = draw_normal(own, (dim, sizes.teacher_rank), dtype)
        if teacher.spikes is None:
            return factor
        matrix = as_matrix(factor)
    else:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(own)))
        levels = law_of(problem).spectrum(dim, rng)
        basis = _orthonormal(rng, dim, dim)
        matrix = (basis * levels) @ basis.T
    if teacher.spikes is not None:
        rng = np.random.default_rng([1, *np.asarray(jax.random.key_data(own))])
        directions = _orthonormal(rng, dim, len(teacher.spikes))
        matrix = matrix + (directions * np.array(teacher.spikes)) @ directions.T
    return Symmetric(jnp.asarray(matrix, dtype=dtype))


def _orthonormal(rng: np.random.Generator, dim: int, count: int) -> np.ndarray:
    """Columns of a uniformly random orthogonal matrix."""
    basis, triangle = np.linalg.qr(rng.standard_normal((dim, count)))
    return basis * np.sign(np.diag(triangle))
