"""Two rounds of active fine-tuning: is the current w, or the frozen weights, to choose by?

Every strategy labels as many sequences from pools of the same size; its two batches are taken at
random, by a score of the frozen logits, or by the same score of those with w₁ merged in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lora_theory import (
    Finetuning,
    Pretraining,
    Problem,
    SecondRound,
    SecondRoundSimulation,
    Selection,
    second_round,
    simulate_second_round,
)

#: By what the first and the second batch are chosen.
STRATEGIES = {
    "random, random": ("random", "random"),
    "random, frozen": ("random", "frozen"),
    "random, current": ("random", "current"),
    "frozen, frozen": ("frozen", "frozen"),
    "frozen, current": ("frozen", "current"),
}
SAMPLES, POOL = 1.5, 60.0
OBSERVED = ("q", "m", "overlap", "test_error", "train_error")


def problem(activation: str) -> Problem:
    return Problem(
        tokens=2,
        activation=activation,
        teacher_rank=0.5,
        label_noise=0.5,
        pretraining=Pretraining(samples=0.2, penalty=0.05),
        finetuning=Finetuning(samples=SAMPLES, penalty=0.2),
    )


def two_rounds(
    base: Problem, strategy: str, score: str, *, samples: float = SAMPLES, pool: float = POOL,
    dim: int | None = None, seeds: int = 0, **settings: Any,
) -> SecondRound | SecondRoundSimulation:  # fmt: skip
    """A strategy by theory or, with ``dim``, simulated; both pools hold ``pool``·D sequences."""
    first, second = STRATEGIES[strategy]
    chosen = Selection(pool=pool, score=score)
    asked = base.replace({"finetuning.selection": None if first == "random" else chosen})
    choice: dict[str, Any] = {"samples": samples}
    if second != "random":
        choice |= {"selection": chosen, "by": second}
    if dim is None:
        return second_round(asked, **choice, **settings)
    return simulate_second_round(asked, dim, seeds, **choice, **settings)


def rows(
    activation: str, score: str, strategies: Iterable[str] = STRATEGIES, **settings: Any
) -> Iterator[dict[str, Any]]:
    """Tidy rows, one per strategy and observable; ``settings`` as for :func:`two_rounds`."""
    for strategy in strategies:
        found = two_rounds(problem(activation), strategy, score, **settings)
        shared = {"activation": activation, "score": score, "strategy": strategy}
        if isinstance(found, SecondRound):
            shared |= {"source": "theory", "status": found.status.value}
            numbers = {n: (getattr(found, n), found.quadrature_error[n]) for n in OBSERVED}
        else:
            shared |= {"source": "simulation", "status": "missed" if found.missed else "converged"}
            measured = ((name, getattr(found.second, name)) for name in OBSERVED)
            numbers = {name: (estimate.mean, estimate.error) for name, estimate in measured}
        for name, (value, error) in numbers.items():
            yield {**shared, "observable": name, "value": value, "error": error}
