"""Stage two: what a run draws to fine-tune w, W frozen (docs/theory.md, section 1)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from lora_theory.attention import attention
from lora_theory.problem import Problem
from lora_theory.selection import kept
from lora_theory.simulation.data import Draw, draw_normal, draw_sequences, draw_task_vector
from lora_theory.simulation.fields import Weights, centred_fields, noisy_fields
from lora_theory.simulation.minimise import Task
from lora_theory.simulation.pretraining import PretrainingData
from lora_theory.simulation.sizes import Sizes
from lora_theory.simulation.tokens import decay_of, seen, token_scale

__all__ = ["FinetuningData", "finetuning_data", "finetuning_task", "random_start"]


class FinetuningData(NamedTuple):
    """What the second stage sees: sequences with both fields, and the task vector behind them."""

    task_vector: Float[Array, "D 1"]  # w*, or C'^{1/2}w*
    sequences: Float[Array, "n T D"]
    frozen_fields: Float[Array, "n T T"]  # βh, of the pre-trained weights
    teacher_fields: Float[Array, "n T T"]  # h^y, with their noise, without the task vector
    scale: Float[Array, "D 1"] | None = None  # C'^{1/2}


def finetuning_data(
    key: Key[Array, ""],
    problem: Problem,
    sizes: Sizes,
    pretraining: PretrainingData,
    weights: Weights,
) -> FinetuningData:
    """The first pre-training sequences as far as they are re-used, then fresh ones.

    The former have the noise of their pre-training, or are drawn another one.  Of a pool of fresh
    ones those of lowest score are taken.
    """
    stage, reused = problem.finetuning, sizes.reused_sequences
    assert stage is not None
    dtype = pretraining.start.dtype.type
    noise_strength = dtype(problem.label_noise)
    scale = token_scale(problem, sizes.dim, dtype, later=True)
    teacher, weights = seen(pretraining.teacher, scale), seen(weights, scale)

    def drawn(purpose: Draw, count: int) -> tuple[Array, Array]:
        return draw_sequences(purpose.key(key), count, sizes.tokens, sizes.dim, dtype)

    def labelled(sequences: Array, noise: Array) -> tuple[Array, Array]:
        return sequences, noisy_fields(sequences, teacher, noise, noise_strength)

    task_vector = draw_task_vector(Draw.TASK_VECTOR.key(key), sizes.dim, stage.signal, dtype)
    task_vector = task_vector if scale is None else scale * task_vector
    parts = []
    if reused:
        old = pretraining.sequences[:reused]
        if stage.redraws_noise:
            parts.append(labelled(old, drawn(Draw.FINETUNING_NOISE, reused)[1]))
        else:
            parts.append((old, pretraining.teacher_fields[:reused]))
    if stage.chosen:
        pool, noise = drawn(Draw.FINETUNING_SEQUENCES, sizes.pool_sequences)
        beta = stage.rescaling * problem.inverse_temperature
        logits = beta * np.asarray(centred_fields(pool, weights), dtype=np.float64)
        best = kept(stage.chosen, logits, sizes.finetuning_sequences)
        parts.append(labelled(pool[best], noise[best]))
    elif fresh := sizes.finetuning_sequences - reused:
        parts.append(labelled(*drawn(Draw.FINETUNING_SEQUENCES, fresh)))
    sequences, teacher_fields = map(jnp.concatenate, zip(*parts, strict=True))
    frozen = dtype(stage.rescaling) * centred_fields(sequences, weights)
    return FinetuningData(task_vector, sequences, frozen, teacher_fields, scale)


def finetuning_task(data: FinetuningData, problem: Problem) -> Task:
    """Fit the noisy labels σ(τ0(h^y + χ*χ*ᵀ − q₀I)) with σ(τ(βh + χχᵀ − qI))."""
    stage, dtype = problem.finetuning, data.sequences.dtype.type
    assert stage is not None
    shifted = data.teacher_fields + centred_fields(data.sequences, data.task_vector)
    labels = attention(dtype(problem.teacher.inverse_temperature) * shifted, problem.activation)
    return Task(
        data.sequences,
        data.frozen_fields,
        labels,
        dtype(stage.penalty),
        dtype(problem.inverse_temperature),
        decay_of(data.scale),
    )


def random_start(
    key: Key[Array, ""],
    index: int,
    task_vector: Float[Array, "D 1"],
    signal: float,
    scale: Float[Array, "D 1"] | None = None,
) -> Float[Array, "D 1"]:
    """A start of iid N(0, q₀) entries: as long as w* on average, independent of it.

    Under tokens of covariance C' multiplied by ``scale``, C'^{1/2}.
    """
    start_key = jax.random.fold_in(Draw.FINETUNING_STARTS.key(key), index)
    start: Array = signal**0.5 * draw_normal(start_key, task_vector.shape, task_vector.dtype)
    return start if scale is None else scale * start
