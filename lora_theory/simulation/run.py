"""Runs: draw the data of some seeds, train both stages, measure (docs/theory.md, section 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from lora_theory.problem import Problem
from lora_theory.simulation.compression import compressed
from lora_theory.simulation.fields import Symmetric, Weights
from lora_theory.simulation.finetuning import finetuning_data, finetuning_task, random_start
from lora_theory.simulation.measure import (
    as_matrix,
    cross_terms,
    effective_noise,
    learned_rank,
    matrix_overlaps,
    sampled_errors,
    vector_overlaps,
)
from lora_theory.simulation.minimise import (
    FACTOR,
    Form,
    Minimum,
    Task,
    minimise,
    minimise_together,
    student,
)
from lora_theory.simulation.pretraining import PretrainingData, pretraining_data, pretraining_task
from lora_theory.simulation.results import Numbers, SeedRecord
from lora_theory.simulation.sampled import sampled_minimum, teacher_alone
from lora_theory.simulation.sizes import Sizes
from lora_theory.simulation.tokens import seen, token_scale

__all__ = ["Effort", "descend", "finetuned_runs", "measured", "pretrained_weights", "run_seeds"]


class Effort(NamedTuple):
    """How much is computed, and how precisely."""

    dtype: type[np.floating[Any]]
    starts: int
    batch: int
    test_sequences: int
    gradient_tolerance: float
    max_iterations: int
    pretrained: str = "trained"  # or "sampled", from the theory
    start_scale: float = 1.0  # of the factor at which pre-training starts


def run_seeds(
    problem: Problem, sizes: Sizes, effort: Effort, keys: Sequence[Key[Array, ""]]
) -> list[tuple[SeedRecord, dict[str, np.ndarray]]]:
    """The numbers of some runs, trained together, and the teachers and trained weights of each."""
    return finetuned_runs(
        problem, sizes, effort, keys, pretrained_weights(problem, sizes, effort, keys)
    )


def finetuned_runs(
    problem: Problem,
    sizes: Sizes,
    effort: Effort,
    keys: Sequence[Key[Array, ""]],
    first: tuple[list[PretrainingData], list[Minimum], list[Weights]],
) -> list[tuple[SeedRecord, dict[str, np.ndarray]]]:
    """The same after the ``first`` stage, which problems that differ later share."""
    data, pretrained, weights = first
    frozen = [compressed(run, problem, sizes) for run in weights]
    finetuned = _finetuned(problem, sizes, effort, keys, data, frozen)
    return [
        measured(problem, sizes, effort, *run)
        for run in zip(keys, data, pretrained, weights, frozen, *finetuned, strict=True)
    ]


def pretrained_weights(
    problem: Problem, sizes: Sizes, effort: Effort, keys: Sequence[Key[Array, ""]]
) -> tuple[list[PretrainingData], list[Minimum], list[Weights]]:
    """The first stage of each run: its data, how it ended, and the weights that it trained."""
    if effort.pretrained == "sampled":
        data = [teacher_alone(key, problem, sizes, effort.dtype) for key in keys]
        sampled = [
            sampled_minimum(key, problem, sizes, run) for key, run in zip(keys, data, strict=True)
        ]
        return data, [minimum for minimum, _ in sampled], [weights for _, weights in sampled]
    data = [pretraining_data(key, problem, sizes, effort.dtype) for key in keys]
    tasks = [pretraining_task(run, problem) for run in data]
    form, starts = Form.of(problem.pretraining), [effort.start_scale * run.start for run in data]
    pretrained = descend(tasks, starts, problem, effort, form)
    trained = [
        minimum.weights if run.scale is None else minimum.weights / run.scale
        for run, minimum in zip(data, pretrained, strict=True)
    ]
    return data, pretrained, [student(weights, form) for weights in trained]


def measured(
    problem: Problem,
    sizes: Sizes,
    effort: Effort,
    key: Key[Array, ""],
    data: PretrainingData,
    pretrained: Minimum,
    weights: Weights,
    frozen_weights: Weights,
    task_vector: Array,
    minima: Sequence[Minimum],
) -> tuple[SeedRecord, dict[str, np.ndarray]]:
    """The numbers of a run, and its teacher and trained weights."""
    later = token_scale(problem, sizes.dim, effort.dtype, later=True)
    trained, teacher = seen(weights, data.scale), seen(data.teacher, data.scale)
    frozen_seen, later_teacher = trained, teacher
    if frozen_weights is not weights or _shifts(problem):
        frozen_seen = seen(frozen_weights, later)
    if _shifts(problem):
        later_teacher = seen(data.teacher, later)
    test, frozen, *tuned = sampled_errors(
        key,
        effort.test_sequences,
        problem,
        trained,
        frozen_seen,
        teacher,
        later_teacher,
        task_vector,
        [minimum.weights for minimum in minima],
    )
    S, S0 = as_matrix(frozen_seen), as_matrix(later_teacher)
    w_star, *vectors = (_double(w)[:, 0] for w in [task_vector, *(m.weights for m in minima)])
    trained_matrix = S if frozen_seen is trained else as_matrix(trained)
    overlaps = matrix_overlaps(trained_matrix, as_matrix(teacher))
    overlaps["learned_rank"] = learned_rank(trained_matrix)
    used = matrix_overlaps(S, S0)
    # C'^{-1/2} from what the logits see to w itself
    own = np.ones(sizes.dim) if later is None else 1 / _double(later)[:, 0]
    beta = problem.rescaling
    tau, tau_0 = problem.inverse_temperature, problem.teacher.inverse_temperature
    noise = effective_noise(beta**2 * used["Q"], beta * used["M"], used["Q0"], problem.label_noise)
    record = SeedRecord(
        pretraining=overlaps | test.named("test_error") | _descent(pretrained, sizes.dim**2),
        effective_noise=noise,
        finetuning=tuple(
            vector_overlaps(own * vector, own * w_star)
            | error.named("test_error")
            | frozen.named("frozen_test_error")
            | cross_terms(tau * beta * S, tau_0 * S0, tau**0.5 * vector, tau_0**0.5 * w_star)
            | _descent(minimum, sizes.dim)
            for vector, error, minimum in zip(vectors, tuned, minima, strict=True)
        ),
    )
    arrays = dict([_named("W0", "S0", data.teacher), _named("W", "S", weights)])
    if sizes.kept_rank is not None:
        arrays["S_frozen"] = as_matrix(frozen_weights)
    if vectors:
        arrays |= {"w_star": own * w_star, "w": own * vectors[0]}
    if record.random:
        arrays["w_random"] = own * vectors[record.lowest_random]
    return record, arrays


def _shifts(problem: Problem) -> bool:
    """Whether fine-tuning has tokens of another covariance."""
    return problem.covariance is not None and problem.covariance.shifts


def _named(factor: str, matrix: str, weights: Weights) -> tuple[str, np.ndarray]:
    """The name under which weights are saved, and the array."""
    if isinstance(weights, Symmetric):
        return matrix, _double(weights.matrix)
    return factor, _double(weights)


def _double(array: Array) -> np.ndarray:
    return np.asarray(array, dtype=np.float64)


def _finetuned(
    problem: Problem,
    sizes: Sizes,
    effort: Effort,
    keys: Sequence[Key[Array, ""]],
    pretraining: Sequence[PretrainingData],
    weights: Sequence[Weights],
) -> tuple[list[Array], list[list[Minimum]]]:
    """w* of each run, and its minima, from w* and from the random starts (0 and none without w).

    Starts follow one another instead of sharing one batch: more starts then do not change the
    earlier ones by as much as a rounding.
    """
    finetuning = problem.finetuning
    if finetuning is None:
        return [jnp.zeros((sizes.dim, 1), effort.dtype)] * len(keys), [[]] * len(keys)
    data = [
        finetuning_data(key, problem, sizes, stage, frozen)
        for key, stage, frozen in zip(keys, pretraining, weights, strict=True)
    ]
    tasks = [finetuning_task(run, problem) for run in data]
    vectors = [run.task_vector for run in data]
    starts = [vectors] + [
        [
            random_start(key, index, run.task_vector, finetuning.signal, run.scale)
            for key, run in zip(keys, data, strict=True)
        ]
        for index in range(effort.starts)
    ]
    minima = [descend(tasks, start, problem, effort) for start in starts]
    return vectors, [list(run) for run in zip(*minima, strict=True)]


def descend(
    tasks: Sequence[Task],
    starts: Sequence[Array],
    problem: Problem,
    effort: Effort,
    form: Form = FACTOR,
) -> list[Minimum]:
    """One descent per run, all in one batch."""
    limits = effort.gradient_tolerance, effort.max_iterations
    kind: Any = {"activation": problem.activation, "form": form}
    if len(tasks) == 1:
        return [minimise(tasks[0], starts[0], *limits, **kind)]
    together = jax.tree.map(lambda *parts: jnp.stack(parts), *tasks)
    minima = minimise_together(together, jnp.stack(starts), *limits, **kind)
    return [jax.tree.map(lambda part, run=run: part[run], minima) for run in range(len(tasks))]


def _descent(minimum: Minimum, scale: int) -> Numbers:
    """How a descent ended; ``scale`` turns its loss into L/D² or L'/D."""
    return {
        "train_error": float(minimum.train_error),
        "objective": float(minimum.objective) / scale,
        "gradient_norm": float(minimum.relative_gradient),
        "iterations": int(minimum.iterations),
        "converged": bool(minimum.converged),
    }
