"""What a simulation returns: estimates over seeds, and the runs they are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from lora_theory.observables import Estimate, plain_fields
from lora_theory.problem import Problem
from lora_theory.status import Status

__all__ = [
    "EffectiveNoiseRuns",
    "FinetuningRuns",
    "Numbers",
    "PretrainingRuns",
    "SeedRecord",
    "Simulation",
    "from_runs",
    "summarise",
]

#: Up to this Q (or q) nothing was learnt; overlap and gain are then 0 by convention.
NOTHING_LEARNT = 1e-6

#: Named numbers of one stage of one run.
Numbers = dict[str, float]


@dataclass(frozen=True)
class PretrainingRuns:
    """The pre-training stage over all seeds (docs/theory.md, section 1)."""

    Q: Estimate  #: Tr S²/D
    M: Estimate  #: Tr S S₀/D
    overlap: Estimate  #: M/√(Q Q₀), Q₀ measured
    learned_rank: Estimate  #: share of the eigenvalues of Ŝ above 10⁻³ of the largest
    test_error: Estimate  #: E
    train_error: Estimate  #: mean loss per training sequence, penalty excluded
    objective: Estimate  #: L/D² with its penalty
    Q0: Estimate  #: Tr S₀²/D of the drawn teachers, 1 + κ₀ for D → ∞
    gradient_norm: float  #: largest ‖∇L‖/‖2λW‖ of the runs
    missed: int  #: runs that missed the gradient tolerance


@dataclass(frozen=True)
class EffectiveNoiseRuns:
    """What the fine-tuning sees of the pre-training (docs/theory.md, section 4), Q₀ measured."""

    gain: Estimate  #: M/Q
    variance: Estimate  #: Δ/2 + Q₀ − M²/Q
    Q: Estimate  #: Tr S²/D of the weights that are frozen


@dataclass(frozen=True)
class FinetuningRuns:
    """The fine-tuning stage over all seeds (docs/theory.md, sections 1 and 10)."""

    q: Estimate  #: ‖w‖²/D
    m: Estimate  #: |w·w*|/D
    overlap: Estimate  #: |w·w*|/(‖w‖‖w*‖)
    test_error: Estimate  #: E'
    train_error: Estimate  #: mean loss per training sequence, penalty excluded
    frozen_test_error: Estimate  #: E' at χ = 0, q = 0
    objective: Estimate  #: L'/D with its penalty
    cross_term: Estimate  #: (w*ᵀKw* − wᵀKw)/D^{3/2}, K = S₀ − Ŝ: O(1/√D), in E' at finite D
    frozen_cross_term: Estimate  #: w*ᵀKw*/D^{3/2}, in the frozen error at finite D
    gradient_norm: float  #: largest ‖∇L'‖/‖2λ'w‖ of the runs
    missed: int  #: runs that missed the gradient tolerance
    start_mean: FinetuningRuns | None = None  #: per seed the mean over all random starts


@dataclass(frozen=True)
class Simulation:
    """The answer of :func:`simulate`: the observables of a prediction, measured.

    ``finetuning`` started at w* (informed); ``finetuning_random`` is, for every seed, the random
    start that reached the lowest loss, and its ``start_mean`` the mean over all random starts.
    The last three are None without fine-tuning (``finetuning_random`` also without random starts).
    """

    problem: Problem
    dim: int
    seeds: int
    status: Status
    pretraining: PretrainingRuns
    effective_noise: EffectiveNoiseRuns
    finetuning: FinetuningRuns | None
    finetuning_random: FinetuningRuns | None
    environment: dict[str, Any]  #: root seed, dtype, device, tolerance, versions, …
    runs: tuple[
        dict[str, Any], ...
    ]  #: one flat row per seed: every number the estimates are made of

    @property
    def remedy(self) -> str:
        """What to do about the status."""
        return self.status.remedy

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as for JSON; attribute names are the keys."""
        return {**plain_fields(self), "status": self.status.value}


class SeedRecord(NamedTuple):
    """The raw numbers of one run; ``finetuning`` holds the informed start, then the random ones."""

    pretraining: Numbers
    effective_noise: Numbers
    finetuning: tuple[Numbers, ...]

    @property
    def random(self) -> tuple[Numbers, ...]:
        """The random starts of the fine-tuning."""
        return self.finetuning[1:]

    @property
    def lowest_random(self) -> int:
        """Which entry of ``finetuning`` is the random start that reached the lowest loss."""
        return min(
            range(1, len(self.finetuning)), key=lambda start: self.finetuning[start]["objective"]
        )

    def row(self) -> Numbers:
        """One flat row: ``pretraining.Q``, …, ``finetuning.q``, ``finetuning_random.0.q``, …"""
        names = ["finetuning", *(f"finetuning_random.{start}" for start in range(len(self.random)))]
        groups = {"pretraining": self.pretraining, "effective_noise": self.effective_noise}
        groups |= dict(zip(names, self.finetuning, strict=False))
        return {
            f"{group}.{name}": groups[group][name] for group in groups for name in groups[group]
        }


def summarise(
    problem: Problem,
    dim: int,
    environment: dict[str, Any],
    records: Sequence[SeedRecord],
    first: int = 0,
) -> Simulation:
    """Estimates over the records; a run that missed the tolerance is counted, never dropped.

    ``first`` is the index of the first run.
    """
    pretraining = PretrainingRuns(**_summary(PretrainingRuns, [[r.pretraining] for r in records]))
    noise = _summary(EffectiveNoiseRuns, [[r.effective_noise] for r in records])
    missed = pretraining.missed
    informed = random = None
    if records[0].finetuning:
        informed = _finetuning([r.finetuning[:1] for r in records])
        missed += informed.missed
        if records[0].random:
            start_mean = _finetuning([r.random for r in records])
            lowest = _finetuning([[r.finetuning[r.lowest_random]] for r in records])
            random = dataclasses.replace(lowest, start_mean=start_mean)
            missed += start_mean.missed
    return Simulation(
        problem=problem,
        dim=dim,
        seeds=len(records),
        status=_status(missed, records),
        pretraining=pretraining,
        effective_noise=EffectiveNoiseRuns(**noise),
        finetuning=informed,
        finetuning_random=random,
        environment=environment,
        runs=tuple(
            {**environment, "dim": dim, "seed_index": index, **record.row()}
            for index, record in enumerate(records, first)
        ),
    )


def from_runs(problem: Problem, runs: Sequence[Mapping[str, Any]]) -> Simulation:
    """The simulation that has these ``runs``: from rows that were stored."""
    records = []
    for run in runs:
        groups: dict[str, dict[str, Any]] = {}
        for column, value in run.items():
            group, _, name = column.rpartition(".")
            groups.setdefault(group, {})[name] = value
        random = sum(group.startswith("finetuning_random.") for group in groups)
        names = ["finetuning", *(f"finetuning_random.{start}" for start in range(random))]
        stages = tuple(groups[name] for name in names if name in groups)
        records.append(SeedRecord(groups["pretraining"], groups["effective_noise"], stages))
    environment = {name: value for name, value in runs[0].items() if "." not in name}
    dim, first = environment.pop("dim"), environment.pop("seed_index")
    return summarise(problem, dim, environment, records, first)


def _status(missed: int, records: Sequence[SeedRecord]) -> Status:
    if missed:
        return Status.NOT_CONVERGED
    learnt = [record.pretraining["Q"] for record in records]
    learnt += [record.finetuning[0]["q"] for record in records if record.finetuning]
    return Status.COLLAPSED if min(learnt) <= NOTHING_LEARNT else Status.CONVERGED


def _finetuning(groups: Sequence[Sequence[Numbers]]) -> FinetuningRuns:
    return FinetuningRuns(**_summary(FinetuningRuns, groups))


def _summary(part: type, groups: Sequence[Sequence[Numbers]]) -> dict[str, Any]:
    """The fields of ``part``, one group of numbers per seed: its mean is one independent value."""
    summary: dict[str, Any] = {}
    for name in (entry.name for entry in dataclasses.fields(part)):
        if name == "gradient_norm":
            summary[name] = max(numbers[name] for group in groups for numbers in group)
        elif name == "missed":
            summary[name] = sum(not numbers["converged"] for group in groups for numbers in group)
        elif name != "start_mean":
            summary[name] = Estimate.of(
                [fmean(numbers[name] for numbers in group) for group in groups]
            )
    return summary
