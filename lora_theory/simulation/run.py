"""One run: draw the data of a seed, train both stages, measure (docs/theory.md, section 1)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from lora_theory.problem import Problem
from lora_theory.simulation.finetuning import finetuning_data, finetuning_task, random_start
from lora_theory.simulation.measure import (
    cross_terms,
    effective_noise,
    matrix_overlaps,
    sampled_errors,
    vector_overlaps,
)
from lora_theory.simulation.minimise import Minimum, Task, minimise
from lora_theory.simulation.pretraining import PretrainingData, pretraining_data, pretraining_task
from lora_theory.simulation.results import Numbers, SeedRecord
from lora_theory.simulation.sizes import Sizes

__all__ = ["Effort", "run_seed"]


class Effort(NamedTuple):
    """How much is computed, and how precisely."""

    dtype: type[np.floating[Any]]
    starts: int
    test_sequences: int
    gradient_tolerance: float
    max_iterations: int


def run_seed(
    problem: Problem, sizes: Sizes, effort: Effort, key: Key[Array, ""]
) -> tuple[SeedRecord, dict[str, np.ndarray]]:
    """The numbers of one run, and its teachers and trained weights."""
    dtype, activation = effort.dtype, problem.activation
    data = pretraining_data(key, sizes, problem.label_noise, dtype)
    task = pretraining_task(data, dtype(problem.pretraining.penalty), activation=activation)
    pretrained = _descend(task, data.start, activation, effort)
    task_vector, minima = _finetuned(problem, sizes, effort, key, data, pretrained.weights)

    test, frozen, *tuned = sampled_errors(
        key,
        effort.test_sequences,
        problem,
        pretrained.weights,
        data.teacher,
        task_vector,
        [minimum.weights for minimum in minima],
    )
    W, W0 = _double(pretrained.weights), _double(data.teacher)
    w_star, *vectors = (_double(w)[:, 0] for w in [task_vector, *(m.weights for m in minima)])
    overlaps = matrix_overlaps(W, W0)
    noise = effective_noise(overlaps["Q"], overlaps["M"], overlaps["Q0"], problem.label_noise)
    record = SeedRecord(
        pretraining=overlaps | test.named("test_error") | _descent(pretrained, sizes.dim**2),
        effective_noise=noise,
        finetuning=tuple(
            vector_overlaps(vector, w_star)
            | error.named("test_error")
            | frozen.named("frozen_test_error")
            | cross_terms(W, W0, vector, w_star)
            | _descent(minimum, sizes.dim)
            for vector, error, minimum in zip(vectors, tuned, minima, strict=True)
        ),
    )
    arrays = {"W0": W0, "W": W}
    if vectors:
        arrays |= {"w_star": w_star, "w": vectors[0]}
    if record.random:
        arrays["w_random"] = vectors[record.lowest_random]
    return record, arrays


def _double(array: Array) -> np.ndarray:
    return np.asarray(array, dtype=np.float64)


def _finetuned(
    problem: Problem,
    sizes: Sizes,
    effort: Effort,
    key: Key[Array, ""],
    pretraining: PretrainingData,
    weights: Array,
) -> tuple[Array, list[Minimum]]:
    """w*, and the minima reached from w* and from the random starts (0 and none without w).

    The descents follow one another instead of sharing one batch: more starts then do not change
    the earlier ones by as much as a rounding.
    """
    finetuning = problem.finetuning
    if finetuning is None:
        return jnp.zeros((sizes.dim, 1), effort.dtype), []
    data = finetuning_data(key, sizes, finetuning, problem.label_noise, pretraining, weights)
    task = finetuning_task(data, effort.dtype(finetuning.penalty), activation=problem.activation)
    starts = [data.task_vector] + [
        random_start(key, index, data.task_vector, finetuning.signal)
        for index in range(effort.starts)
    ]
    minima = [_descend(task, start, problem.activation, effort) for start in starts]
    return data.task_vector, minima


def _descend(task: Task, start: Array, activation: str, effort: Effort) -> Minimum:
    minimum: Minimum = minimise(
        task, start, effort.gradient_tolerance, effort.max_iterations, activation=activation
    )
    return minimum


def _descent(minimum: Minimum, scale: int) -> Numbers:
    """How a descent ended; ``scale`` turns its loss into L/D² or L'/D."""
    return {
        "train_error": float(minimum.train_error),
        "objective": float(minimum.objective) / scale,
        "gradient_norm": float(minimum.relative_gradient),
        "iterations": int(minimum.iterations),
        "converged": bool(minimum.converged),
    }
