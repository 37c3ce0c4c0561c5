"""Order parameters and test errors of trained weights (docs/theory.md, sections 1, 4 and 10)."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from lora_theory.attention import attention
from lora_theory.problem import Problem
from lora_theory.simulation.data import Draw, sequence_chunks
from lora_theory.simulation.fields import Symmetric, Weights, centred_fields, noisy_fields
from lora_theory.simulation.results import NOTHING_LEARNT, Numbers

__all__ = [
    "SampledError",
    "as_matrix",
    "cross_terms",
    "effective_noise",
    "learned_rank",
    "matrix_overlaps",
    "sampled_errors",
    "vector_overlaps",
]


#: Smaller eigenvalues, next to the largest, count as 0.
_VISIBLE = 1e-3

Matrix = Float[np.ndarray, "D D"]
Vector = Float[np.ndarray, " D"]


def as_matrix(weights: Weights) -> Matrix:
    """S of given weights, in float64."""
    if isinstance(weights, Symmetric):
        return np.asarray(weights.matrix, dtype=np.float64)
    factor = np.asarray(weights, dtype=np.float64)
    return np.asarray(factor @ factor.T / math.sqrt(factor.size))


def matrix_overlaps(S: Matrix, S0: Matrix) -> Numbers:
    """Q = Tr S²/D, M = Tr S S₀/D, Q₀ = Tr S₀²/D and M/√(Q Q₀)."""
    Q, M, Q0 = (float(np.sum(left * right)) / len(S) for left, right in ((S, S), (S, S0), (S0, S0)))
    overlap = M / math.sqrt(Q * Q0) if Q > NOTHING_LEARNT else 0.0
    return {"Q": Q, "M": M, "Q0": Q0, "overlap": overlap}


def learned_rank(S: Matrix) -> float:
    """The share of eigenvalues above 10⁻³ of the largest; smaller ones are on their way to 0."""
    sizes = np.abs(np.linalg.eigvalsh(S))
    return float(np.mean(sizes > _VISIBLE * max(sizes.max(), NOTHING_LEARNT)))


def effective_noise(Q: float, M: float, Q0: float, label_noise: float) -> Numbers:
    """Gain M/Q and variance Δ/2 + Q₀ − M²/Q of the teacher's field given the student's."""
    gain = M / Q if Q > NOTHING_LEARNT else 0.0
    return {"gain": gain, "variance": label_noise / 2 + Q0 - gain * M, "Q": Q}


def vector_overlaps(vector: Vector, task_vector: Vector) -> Numbers:
    """q = ‖w‖²/D, m = |w·w*|/D and the alignment |w·w*|/(‖w‖‖w*‖)."""
    dim = vector.size
    q, q_0 = float(vector @ vector) / dim, float(task_vector @ task_vector) / dim
    m = abs(float(vector @ task_vector)) / dim
    return {"q": q, "m": m, "overlap": m / math.sqrt(q * q_0) if q > NOTHING_LEARNT else 0.0}


def cross_terms(S: Matrix, S0: Matrix, vector: Vector, task_vector: Vector) -> Numbers:
    """(w*ᵀKw* − wᵀKw)/D^{3/2} and w*ᵀKw*/D^{3/2} with K = S₀ − Ŝ (docs/theory.md, section 7).

    They are O(1/√D) and absent from the asymptotics: for σ(A) = A/T the test error E' (the frozen
    one) of a finite system holds exactly 2(T+1)/T times the first (the second).  Inverse
    temperatures are part of the arguments (docs/theory.md, section 2.6).
    """
    gap, scale = S0 - S, len(S) ** 1.5
    frozen, tuned = (float(w @ gap @ w) / scale for w in (task_vector, vector))
    return {"cross_term": frozen - tuned, "frozen_cross_term": frozen}


class SampledError(NamedTuple):
    """A mean loss over test sequences, and the standard error of that mean."""

    mean: float
    sampling: float

    def named(self, name: str) -> Numbers:
        """Both numbers by name, as in a row."""
        return {name: self.mean, f"{name}_sampling": self.sampling}


@functools.partial(jax.jit, static_argnames="activation")
def _losses(
    sequences: Float[Array, "n T D"],
    noise: Float[Array, "n T T"],
    weights: Weights,
    frozen_weights: Weights | None,
    teacher: Weights,
    later_teacher: Weights | None,
    numbers: Float[Array, " 4"],
    task_vector: Float[Array, "D 1"],
    vectors: list[Float[Array, "D 1"]],
    *,
    activation: str,
) -> Float[Array, "errors n"]:
    label_noise, rescaling, temperature, temperature_0 = numbers
    trained = centred_fields(sequences, weights)
    used = trained if frozen_weights is None else centred_fields(sequences, frozen_weights)
    frozen = rescaling * used
    fields = noisy_fields(sequences, teacher, noise, label_noise)
    later = fields
    if later_teacher is not None:
        later = noisy_fields(sequences, later_teacher, noise, label_noise)
    shifted = later + centred_fields(sequences, task_vector)
    tuned = [frozen + centred_fields(sequences, vector) for vector in vectors]

    def loss(label: Array, student: Array) -> Float[Array, " n"]:
        gap = attention(temperature_0 * label, activation) - attention(
            temperature * student, activation
        )
        return jnp.sum(gap**2, axis=(1, 2))

    losses = [loss(fields, trained), *(loss(shifted, student) for student in [frozen, *tuned])]
    return jnp.stack(losses).astype(jnp.float64)


def sampled_errors(
    key: Key[Array, ""],
    count: int,
    problem: Problem,
    weights: Weights,
    frozen_weights: Weights,
    teacher: Weights,
    later_teacher: Weights,
    task_vector: Float[Array, "D 1"],
    vectors: list[Float[Array, "D 1"]],
) -> list[SampledError]:
    """Losses on ``count`` fresh sequences, label noise included (docs/theory.md, section 1).

    First E of the trained ``weights`` (pre-training task), then of those that are frozen the error
    alone (fine-tuning task, χ = 0, q = 0) and E' with each of the ``vectors``, all on the same
    sequences.  The teacher and the weights are what these sequences see: of tokens with another
    covariance in the second stage than in the first, two of each.
    """
    dtype, dim = task_vector.dtype.type, task_vector.shape[0]
    chunks = sequence_chunks(Draw.TEST_SEQUENCES.key(key), count, problem.tokens, dim, dtype)
    activation = problem.activation
    temperatures = problem.inverse_temperature, problem.teacher.inverse_temperature
    numbers = np.array([problem.label_noise, problem.rescaling, *temperatures], dtype)
    others = None if frozen_weights is weights else frozen_weights
    later = None if later_teacher is teacher else later_teacher
    factors = weights, others, teacher, later, numbers, task_vector, vectors
    parts = [_losses(*chunk, *factors, activation=activation) for chunk in chunks]
    losses = np.concatenate(parts, axis=1)
    means, deviations = losses.mean(axis=1), losses.std(axis=1, ddof=1)
    return [
        SampledError(float(mean), float(deviation) / math.sqrt(count))
        for mean, deviation in zip(means, deviations, strict=True)
    ]
