"""From how many fine-tuning sequences on a descent from a random start finds the informed minimum.

Not a threshold of the equations: local descent can stay far from the minimum of the loss
(docs/theory.md, section 3.3).  It is measured on trained systems at finite D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from lora_theory.arguments import check_problem, checked_integer
from lora_theory.observables import plain_fields
from lora_theory.problem import Problem, ProblemError
from lora_theory.simulation.api import simulate

__all__ = ["RandomStart", "RandomStartThreshold", "random_start_threshold"]

#: A random start has reached the loss of the informed one up to this part of it.
_SAME_LOSS = 1e-4
#: An overlap above this many 1/√D is no chance: that of a random vector is |N(0, 1)|/√D.
_INFORMED = 3.0
_SMALLEST_DIM = 16
#: α' from one bracketing step to the next, the range over the first value, and bisections.
_STEP, _RANGE, _BISECTIONS = 2.0, 64.0, 3


class RandomStart(NamedTuple):
    """The runs at one number of samples."""

    samples: float  #: α' = N'/D, as rounded
    successes: int
    runs: int
    missed: int  #: descents, of both stages, that missed the gradient tolerance


@dataclass(frozen=True, kw_only=True)
class RandomStartThreshold:
    """What :func:`random_start_threshold` measures; ``value`` is None for the ``reason`` given."""

    problem: Problem
    value: float | None  #: α' at which half of the runs succeed
    error: float | None  #: its standard error
    dim: int
    seeds: int
    starts: int
    table: tuple[RandomStart, ...]  #: by growing α'
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values."""
        return plain_fields(self)


def random_start_threshold(
    problem: Problem,
    *,
    dim: int,
    seeds: int,
    starts: int = 1,
    seed: int = 0,
    pretrained: str | None = None,
) -> RandomStartThreshold:
    """α' = N'/D from which half of the descents from a random start find the informed minimum.

    A run fine-tunes from w* and from ``starts`` random vectors (:func:`lora_theory.simulate`).  It
    succeeds if its lowest random start ends at most 10⁻⁴ (relative) above the penalised loss of the
    informed one, and both have an overlap above 3/√D.  α' is doubled or halved from
    finetuning.samples until the share of successes has crossed one half, then bisected three times
    in log α'; every α' has runs of its own, so that all are independent.  The value is exp μ of the
    logistic law P(success) = 1/(1 + exp(−(log α' − μ)/σ)) of maximum likelihood over all runs, its
    error from the observed information.  Where at most one α' has both failures and successes, with
    failures only below and successes only above it, the likelihood has no maximum; μ then lies
    between the last α' without success and the first without failure, or the least and largest
    tried: the value is their geometric mean, its relative error half their distance in log α'.

    It is a property of systems of dimension D, of the descent (L-BFGS) and of the number of starts,
    and moves with all three.

    Args:
        problem: with a fine-tuning, whose samples are the first α' tried.
        dim: embedding dimension D, at least 16.
        seeds: runs per α'.
        starts: random starts per run, of which the lowest counts.
        seed: root of all random numbers; the same seed gives the same table.
        pretrained: as in :func:`lora_theory.simulate`; by default "sampled" where the fine-tuning
            sequences are fresh, which trains no pre-training, else "trained".

    Raises:
        ProblemError: an argument is not allowed, or the problem has no fine-tuning.

    Example:
        >>> from lora_theory import Finetuning, Pretraining, random_start_threshold
        >>> problem = Problem(
        ...     tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.1,
        ...     pretraining=Pretraining(samples=1.0, penalty=0.1),
        ...     finetuning=Finetuning(samples=2.0, penalty=0.2),
        ... )
        >>> found = random_start_threshold(problem, dim=16, seeds=3)
        >>> 0.1 < found.value < 10 and found.error > 0
        True
    """
    check_problem(problem)
    stage = problem.finetuning
    if stage is None:
        raise ProblemError("finetuning = None is not allowed here: it must be a Finetuning")
    dim = checked_integer("dim", dim, _SMALLEST_DIM)
    seeds, starts = checked_integer("seeds", seeds, 2), checked_integer("starts", starts, 1)
    if pretrained is None:
        drawn = problem.pretraining.regularizer != "low_rank_decay"
        pretrained = "sampled" if stage.sequences == "fresh" and drawn else "trained"
    table: dict[int, RandomStart] = {}

    def share(count: int) -> float:
        """Of successes with ``count`` fine-tuning sequences."""
        if count not in table:
            simulation = simulate(
                problem.replace({"finetuning.samples": count / dim}), dim, seeds,
                seed=seed, first=seeds * len(table), starts=starts, pretrained=pretrained,
                test_sequences=2,
            )  # fmt: skip
            successes = sum(_succeeds(run, dim, starts) for run in simulation.runs)
            missed = sum(
                not value
                for run in simulation.runs
                for column, value in run.items()
                if column.endswith(".converged")
            )
            table[count] = RandomStart(count / dim, successes, seeds, missed)
        return table[count].successes / seeds

    def result(value: float | None, error: float | None, reason: str = "") -> RandomStartThreshold:
        return RandomStartThreshold(
            problem=problem, value=value, error=error, dim=dim, seeds=seeds, starts=starts,
            table=tuple(table[count] for count in sorted(table)), reason=reason,
        )  # fmt: skip

    first = max(1, round(stage.samples * dim))
    most = math.floor(first * _RANGE)
    if stage.reused:
        most = min(most, math.floor(round(problem.pretraining.samples * dim**2) / stage.reused))
    if stage.selection is not None:
        most = min(most, math.floor(stage.selection.pool * dim))
    bracket = _bracket(share, first, max(1, math.ceil(first / _RANGE)), most)
    if bracket is None:
        rows = sorted(table)
        few = share(rows[-1]) < 0.5
        return result(
            None, None,
            f"{'fewer' if few else 'more'} than half of the random starts succeed at all α' from "
            f"{rows[0] / dim:.3g} to {rows[-1] / dim:.3g}: "
            + ("lower label_noise or the penalties" if few else "raise dim, or label_noise"),
        )  # fmt: skip
    low, high = bracket
    for _ in range(_BISECTIONS):
        middle = round(math.sqrt(low * high))
        if middle in (low, high):
            break
        low, high = (low, middle) if share(middle) >= 0.5 else (middle, high)
    fitted = _fitted(list(table.values()))
    if fitted is None:
        return result(None, None, "successes do not grow with α': raise seeds")
    return result(math.exp(fitted[0]), math.exp(fitted[0]) * fitted[1])


def _succeeds(run: dict[str, Any], dim: int, starts: int) -> bool:
    names = [f"finetuning_random.{start}" for start in range(starts)]
    lowest = min(names, key=lambda name: run[f"{name}.objective"])
    informed = min(run[f"{name}.overlap"] for name in ("finetuning", lowest))
    reached = run[f"{lowest}.objective"] <= (1 + _SAME_LOSS) * run["finetuning.objective"]
    return bool(reached and informed > _INFORMED / math.sqrt(dim))


def _bracket(share: Any, first: int, least: int, most: int) -> tuple[int, int] | None:
    """Two numbers of sequences between which the share of successes crosses one half."""
    count = min(max(first, least), most)
    up = share(count) < 0.5
    while True:
        last = count
        count = round(min(most, count * _STEP) if up else max(least, count / _STEP))
        if count == last:
            return None
        if (share(count) < 0.5) != up:
            return (last, count) if up else (count, last)


def _fitted(rows: Sequence[RandomStart]) -> tuple[float, float] | None:
    """Centre of the logistic law in log α' and its error; None where successes do not grow."""
    logs, successes, runs = np.array([(math.log(r.samples), r.successes, r.runs) for r in rows]).T
    failed, succeeded = logs[successes < runs].max(), logs[successes > 0].min()
    if failed <= succeeded:
        # separated: likelihoods grow without bound as σ → 0
        low = max(logs[successes == 0], default=logs.min())
        high = min(logs[successes == runs], default=logs.max())
        return float((low + high) / 2), float((high - low) / 2)
    shift, scale = logs.mean(), max(float(logs.std()), 1e-9)
    x = np.column_stack([np.ones_like(logs), (logs - shift) / scale])

    def loss(line: np.ndarray) -> tuple[float, np.ndarray]:
        at = x @ line
        value = (runs * np.logaddexp(0.0, at) - successes * at).sum()
        return float(value), x.T @ (runs * expit(at) - successes)

    found = minimize(loss, np.array([0.0, 1.0]), jac=True, method="BFGS")
    line = found.x
    if not line[1] > 0:
        return None
    share = expit(x @ line)
    covariance = np.linalg.inv((x.T * (runs * share * (1 - share))) @ x)
    centre = -line[0] / line[1]
    slope = np.array([-1.0, -centre]) / line[1]
    error = math.sqrt(slope @ covariance @ slope)
    return float(shift + scale * centre), float(scale * error)
