"""Stage one: what a run draws for the pre-training of W (docs/theory.md, section 1)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lora_theory.attention import attention
from lora_theory.simulation.data import Draw, draw_normal, draw_sequences
from lora_theory.simulation.fields import noisy_fields
from lora_theory.simulation.minimise import Task
from lora_theory.simulation.sizes import Sizes

__all__ = ["PretrainingData", "pretraining_data", "pretraining_task"]


class PretrainingData(NamedTuple):
    """Teacher, data and start of the first stage."""

    teacher: Float[Array, "D P0"]  # W0
    sequences: Float[Array, "N T D"]
    teacher_fields: Float[Array, "N T T"]  # h^y, with their noise
    start: Float[Array, "D P"]  # where the descent on W begins


def pretraining_data(
    key: Key[Array, ""], sizes: Sizes, label_noise: float, dtype: Any
) -> PretrainingData:
    """Teacher, sequences, noisy teacher fields and the start of the descent.

    The start has iid N(0, 1) entries, which gives S eigenvalues of order one, as the teacher's.
    """
    dim = sizes.dim
    teacher = draw_normal(Draw.TEACHER.key(key), (dim, sizes.teacher_rank), dtype)
    start = draw_normal(Draw.PRETRAINING_START.key(key), (dim, sizes.student_rank), dtype)
    sequences, noise = draw_sequences(
        Draw.PRETRAINING_SEQUENCES.key(key), sizes.pretraining_sequences, sizes.tokens, dim, dtype
    )
    fields = noisy_fields(sequences, teacher, noise, dtype(label_noise))
    return PretrainingData(teacher, sequences, fields, start)


@functools.partial(jax.jit, static_argnames="activation")
def pretraining_task(data: PretrainingData, penalty: Float[Array, ""], *, activation: str) -> Task:
    """Fit the noisy labels σ(h^y) with σ(h)."""
    frozen = jnp.zeros_like(data.teacher_fields)
    return Task(data.sequences, frozen, attention(data.teacher_fields, activation), penalty)
