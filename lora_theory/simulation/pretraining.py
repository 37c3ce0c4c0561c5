"""Stage one: what a run draws for the pre-training of W (docs/theory.md, section 1)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lora_theory.attention import attention
from lora_theory.problem import Problem
from lora_theory.simulation.data import Draw, draw_normal, draw_sequences
from lora_theory.simulation.fields import Weights, noisy_fields
from lora_theory.simulation.minimise import Task
from lora_theory.simulation.sizes import Sizes
from lora_theory.simulation.teacher import draw_teacher
from lora_theory.simulation.tokens import decay_of, seen, token_scale

__all__ = ["PretrainingData", "pretraining_data", "pretraining_task"]


class PretrainingData(NamedTuple):
    """Teacher, data and start of the first stage."""

    teacher: Weights  # W0, or S0
    sequences: Float[Array, "N T D"]  # g of tokens x = C^{1/2}g
    teacher_fields: Float[Array, "N T T"]  # h^y, with their noise
    start: Float[Array, "D P"]  # where the descent begins, in the form of the regularizer
    scale: Float[Array, "D 1"] | None = None  # C^{1/2}; the start contains it


def pretraining_data(
    key: Key[Array, ""], problem: Problem, sizes: Sizes, dtype: Any
) -> PretrainingData:
    """Teacher, sequences, noisy teacher fields and the start of the descent.

    The start is a factor with iid N(0, 1) entries, which gives S eigenvalues of order one, as the
    teacher's, before a polynomial scaled to singular values up to σ̂/4; the unfactorised S of the
    Frobenius and separable penalties starts at 0.
    """
    dim, own = sizes.dim, Draw.PRETRAINING_START.key(key)
    teacher = draw_teacher(key, problem, sizes, dtype)
    stage = problem.pretraining
    columns = {"nuclear_norm": 2 * dim, "frobenius": dim, "separable": dim}
    start = draw_normal(own, (dim, columns.get(stage.regularizer, sizes.student_rank)), dtype)
    if stage.regularizer in ("frobenius", "separable"):
        start = jnp.zeros_like(start)
    if stage.scale is not None:
        P = start.shape[1]
        start = start * (stage.scale**0.5 * start.size**0.25 / 4 / (dim**0.5 + P**0.5))
    sequences, noise = draw_sequences(
        Draw.PRETRAINING_SEQUENCES.key(key), sizes.pretraining_sequences, sizes.tokens, dim, dtype
    )
    scale = token_scale(problem, dim, dtype)
    fields = noisy_fields(sequences, seen(teacher, scale), noise, dtype(problem.label_noise))
    start = start if scale is None else scale * start
    return PretrainingData(teacher, sequences, fields, start, scale)


def pretraining_task(data: PretrainingData, problem: Problem) -> Task:
    """Fit the noisy labels σ(τ0 h^y) with σ(τh)."""
    dtype = data.sequences.dtype.type
    labels = dtype(problem.teacher.inverse_temperature) * data.teacher_fields
    return Task(
        data.sequences,
        jnp.zeros_like(labels),
        attention(labels, problem.activation),
        dtype(problem.pretraining.penalty),
        dtype(problem.inverse_temperature),
        decay_of(data.scale),
    )
