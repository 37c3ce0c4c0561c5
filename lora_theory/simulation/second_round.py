"""Two rounds of active fine-tuning, really trained (docs/theory.md, section 3.7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from lora_theory.arguments import checked_integer
from lora_theory.compilation import double_precision
from lora_theory.observables import Estimate
from lora_theory.parts import Finetuning, Selection
from lora_theory.problem import Problem
from lora_theory.selection import kept
from lora_theory.simulation.api import checked_effort
from lora_theory.simulation.compression import compressed
from lora_theory.simulation.data import Draw, draw_sequences, run_key
from lora_theory.simulation.fields import Weights, centred_fields, noisy_fields
from lora_theory.simulation.finetuning import FinetuningData, finetuning_data, finetuning_task
from lora_theory.simulation.pretraining import PretrainingData
from lora_theory.simulation.results import FinetuningRuns, Simulation, summarise
from lora_theory.simulation.run import Effort, descend, measured, pretrained_weights
from lora_theory.simulation.sampled import check_sampled
from lora_theory.simulation.sizes import Sizes
from lora_theory.theory.second_round import checked_second

__all__ = ["SecondRoundSimulation", "simulate_second_round"]


@dataclass(frozen=True)
class SecondRoundSimulation:
    """The answer of :func:`simulate_second_round`, both fits started at w*."""

    first: Simulation  #: the first round alone, as :func:`lora_theory.simulate` has it
    second: FinetuningRuns  #: w₂
    p: Estimate  #: |w₁·w₂|/D
    missed: int  #: runs that missed the gradient tolerance in any of their descents
    runs: tuple[dict[str, Any], ...]  #: one row per seed, w₂ under "finetuning", and p


def simulate_second_round(
    problem: Problem,
    dim: int,
    seeds: int,
    *,
    samples: float,
    selection: Selection | None = None,
    by: str = "current",
    seed: int = 0,
    first: int = 0,
    pretrained: str = "trained",
    dtype: str = "float64",
    test_sequences: int = 20_000,
    gradient_tolerance: float | None = None,
    max_iterations: int = 20_000,
) -> SecondRoundSimulation:
    """Two rounds trained and measured at finite D, as :func:`lora_theory.second_round` has them.

    A run is that of :func:`lora_theory.simulate` with the same seed: its weights, its sequences of
    the first round, its w₁ from w*.  Of round(ᾱ₂D) new sequences the round(α₂D) of lowest score of
    the logits τ(βh + χ₁χ₁ᵀ − q₁I) are then labelled, and w₂ is fitted from w* to both batches.

    Args:
        samples, selection, by: as for :func:`lora_theory.second_round`; the others as for
            :func:`lora_theory.simulate`, except that runs are trained one by one.

    Raises:
        ProblemError: an argument is not allowed, or the system is too small for the problem.

    Example:
        >>> from lora_theory import Pretraining
        >>> problem = Problem(
        ...     tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        ...     pretraining=Pretraining(samples=0.2, penalty=0.05),
        ...     finetuning=Finetuning(samples=2.0, penalty=0.2),
        ... )
        >>> found = simulate_second_round(
        ...     problem, 16, 2, samples=2.0, selection=Selection(pool=20.0, score="cross_token"),
        ...     pretrained="sampled", test_sequences=100,
        ... )
        >>> found.second.overlap.count, found.missed
        (2, 0)
    """
    second = checked_second(problem, samples, selection, by)
    trained = pretrained != "sampled"
    sizes = Sizes.of(problem, dim, trained=trained)
    later = Sizes.of(problem.replace(finetuning=second), dim, trained=trained)
    seeds = checked_integer("seeds", seeds, 1)
    seed = checked_integer("seed", seed, 0, 2**32 - 1)
    first = checked_integer("first", first, 0, 2**32 - seeds)
    effort = checked_effort(
        0, 1, pretrained, dtype, test_sequences, gradient_tolerance, max_iterations
    )
    if effort.pretrained == "sampled":
        check_sampled(problem)
    rounds, products = [], []
    with double_precision():
        for index in range(first, first + seeds):
            key = run_key(seed, index)
            records, product = _run(key, problem, second, by, sizes, later, effort)
            rounds.append(records)
            products.append(product)
    environment = {"seed": seed, "dtype": dtype, "pretrained": pretrained}
    before, after = (
        summarise(problem, sizes.dim, environment, list(records), first)
        for records in zip(*rounds, strict=True)
    )
    assert before.finetuning is not None
    assert after.finetuning is not None
    return SecondRoundSimulation(
        first=before,
        second=after.finetuning,
        p=Estimate.of(products),
        missed=before.pretraining.missed + before.finetuning.missed + after.finetuning.missed,
        runs=tuple(run | {"p": p} for run, p in zip(after.runs, products, strict=True)),
    )


def _run(
    key: Key[Array, ""],
    problem: Problem,
    second: Finetuning,
    by: str,
    sizes: Sizes,
    later: Sizes,
    effort: Effort,
) -> tuple[Sequence[Any], float]:
    """The records of both rounds, and |w₁·w₂|/D."""
    (data,), (pretrained,), (trained,) = pretrained_weights(problem, sizes, effort, [key])
    weights = compressed(trained, problem, sizes)
    batch = finetuning_data(key, problem, sizes, data, weights)
    records, start = [], batch.task_vector
    vectors: list[Array] = []
    for _ in range(2):
        if vectors:
            merged = vectors[0] if by == "current" else jnp.zeros_like(start)
            batch = _with_second(key, problem, second, later, data, weights, batch, merged)
        (minimum,) = descend([finetuning_task(batch, problem)], [start], problem, effort)
        vectors.append(minimum.weights)
        run = data, pretrained, trained, weights, start, [minimum]
        records.append(measured(problem, sizes, effort, key, *run)[0])
    w_1, w_2 = (np.asarray(vector, dtype=np.float64)[:, 0] for vector in vectors)
    return records, abs(float(w_1 @ w_2)) / sizes.dim


def _with_second(
    key: Key[Array, ""],
    problem: Problem,
    second: Finetuning,
    sizes: Sizes,
    pretraining: PretrainingData,
    weights: Weights,
    first: FinetuningData,
    merged: Array,
) -> FinetuningData:
    """Both batches; the second is chosen by the logits of the weights with ``merged`` in them."""
    dtype, count = pretraining.start.dtype.type, sizes.finetuning_sequences
    pool, noise = draw_sequences(
        Draw.SECOND_ROUND_SEQUENCES.key(key), sizes.pool_sequences or count, sizes.tokens,
        sizes.dim, dtype,
    )  # fmt: skip
    frozen = dtype(second.rescaling) * centred_fields(pool, weights)
    if second.chosen:
        logits = problem.inverse_temperature * (frozen + centred_fields(pool, merged))
        best = kept(second.chosen, np.asarray(logits, dtype=np.float64), count)
        pool, noise, frozen = pool[best], noise[best], frozen[best]
    fields = noisy_fields(pool, pretraining.teacher, noise, dtype(problem.label_noise))
    return FinetuningData(
        first.task_vector,
        jnp.concatenate([first.sequences, pool]),
        jnp.concatenate([first.frozen_fields, frozen]),
        jnp.concatenate([first.teacher_fields, fields]),
    )
