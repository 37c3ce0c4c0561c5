"""compare: the theory beside the simulation, observable by observable, with z-scores."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from lora_theory.arguments import check_problem, checked_integer
from lora_theory.observables import FINETUNING, PRETRAINING, Estimate, to_plain
from lora_theory.problem import Problem, ProblemError, Teacher
from lora_theory.simulation import Simulation, simulate
from lora_theory.simulation.sizes import Sizes
from lora_theory.status import Status
from lora_theory.sweeps import kept_simulations
from lora_theory.theory import FinetuningPrediction, Prediction, PretrainingPrediction, predict

__all__ = ["Agreement", "Comparison", "agreements", "compare", "extrapolate"]

#: The measured cross term in the test errors of fine-tuning.
_CROSS_TERMS = {"test_error": "cross_term", "frozen_test_error": "frozen_cross_term"}
#: Observables of fine-tuning whose leading finite-D offset is 1/√D; the others have 1/D.
_ROOT_OFFSETS = ("q", "m", "train_error", *_CROSS_TERMS)


@dataclass(frozen=True)
class Agreement:
    """One observable in both worlds.

    ``simulation`` is the mean at the one D, or its limit D → ∞ by weighted least squares in
    D^{-``power``}; ``z`` = (simulation − theory)/√(error² + quadrature error²), None where neither
    has an error.  ``corrected``: the measured cross term was subtracted first.
    """

    stage: str
    observable: str
    theory: float
    quadrature_error: float
    simulation: Estimate
    power: float | None
    corrected: bool
    z: float | None


@dataclass(frozen=True)
class Comparison:
    """The answer of :func:`compare`: the prediction, the simulations and their agreement."""

    problem: Problem
    status: Status
    prediction: Prediction
    simulations: tuple[Simulation, ...]
    agreements: tuple[Agreement, ...]

    def to_frame(self) -> pd.DataFrame:
        """One row per observable."""
        rows = []
        for agreement in self.agreements:
            row = {**agreement.__dict__}
            estimate = row.pop("simulation")
            row |= {"simulation": estimate.mean, "error": estimate.error, "count": estimate.count}
            rows.append(row)
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values under the attribute names."""
        return {
            "problem": to_plain(self.problem),
            "status": self.status.value,
            "agreements": to_plain(self.agreements),
            "prediction": self.prediction.to_dict(),
            "simulations": [simulation.to_dict() for simulation in self.simulations],
        }


def compare(
    problem: Problem,
    dims: int | Sequence[int],
    seeds: int,
    *,
    seed: int = 0,
    starts: int = 1,
    dtype: str = "float64",
    device: str | None = None,
    nodes: int | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Comparison:
    """Predict, simulate at one or several D, and say how far apart the two are.

    At one D the finite-D offset is part of the difference.  From several D every observable is
    extrapolated by weighted least squares in 1/D, or in 1/√D for q, m and the errors of
    fine-tuning, where the task is correlated with K = S0 − Ŝ; for the teacher of a power law no
    faster than in D^{−(1−2γ)}.  For linear attention the measured
    cross term 2(T+1)/T (w*ᵀKw* − wᵀKw)/D^{3/2} is subtracted from the test errors, which leaves
    1/D (docs/theory.md, section 7).  The simulation starts where the predicted branch is: at w* for
    "informed", else it is the random start of lowest loss.  Pre-training is compared as trained:
    what a compression leaves shows in fine-tuning.

    Args:
        dims: D, or several different D.
        seeds: runs per D, at least 2.
        seed, starts, dtype, device, progress: as in :func:`lora_theory.simulate`.
        nodes: as in :func:`lora_theory.predict`.
        out: folder of a :func:`lora_theory.sweep` that keeps every run: an interrupted call goes
            on where it stopped, and more D or seeds add to the runs that are there.

    Raises:
        ProblemError: an argument is not allowed.

    Example:
        >>> from lora_theory import Pretraining, Problem, compare
        >>> problem = Problem(
        ...     tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        ...     pretraining=Pretraining(samples=0.5, penalty=0.2),
        ... )
        >>> comparison = compare(problem, dims=24, seeds=4)
        >>> comparison.agreements[0].observable, abs(comparison.agreements[0].z) < 6
        ('Q', True)
    """
    check_problem(problem, covariance=True)
    several = _listed(dims)
    if not several or len(set(several)) != len(several):
        raise ProblemError(f"dims = {dims!r} is not allowed: it must be one or several different D")
    seeds = checked_integer("seeds", seeds, 2)
    for dim in several:
        Sizes.of(problem, dim)  # refuses here what would fail after hours
    prediction = predict(problem, nodes=nodes)
    effort: dict[str, Any] = {"starts": max(starts, 1), "dtype": dtype, "device": device}
    if out is None:
        simulations = tuple(
            simulate(problem, dim, seeds, seed=seed, **effort, progress=progress) for dim in several
        )
    else:
        simulations = kept_simulations(
            problem, several, seeds, out, seed=seed, **effort, progress=progress
        )
    statuses = [prediction.status, *(simulation.status for simulation in simulations)]
    failed = Status.NOT_CONVERGED in statuses
    return Comparison(
        problem=problem,
        status=Status.NOT_CONVERGED if failed else prediction.status,
        prediction=prediction,
        simulations=simulations,
        agreements=agreements(prediction, {s.dim: pd.DataFrame(s.runs) for s in simulations}),
    )


def _listed(dims: Any) -> list[Any]:
    """One or several D, not yet checked."""
    return list(dims) if isinstance(dims, Iterable) and not isinstance(dims, str) else [dims]


def agreements(prediction: Prediction, runs: Mapping[int, pd.DataFrame]) -> tuple[Agreement, ...]:
    """A prediction beside runs of its problem, one row per seed as in ``Simulation.runs``, by D."""
    tokens, linear = prediction.problem.tokens, prediction.problem.activation == "linear"
    dims = list(runs)
    slowest = _slowest_power(prediction.problem.teacher)
    found = []
    for name in PRETRAINING:
        samples = [table[f"pretraining.{name}"].to_numpy() for table in runs.values()]
        found.append(_agree("pretraining", name, prediction.pretraining, samples, dims, slowest))
    lora = prediction.finetuning
    if lora is None:
        return tuple(found)
    for name in FINETUNING:
        samples = [_samples(table, lora.branch, name) for table in runs.values()]
        corrected = linear and name in _CROSS_TERMS
        if corrected:
            factor, term = 2 * (tokens + 1) / tokens, _CROSS_TERMS[name]
            offsets = [_samples(table, lora.branch, term) for table in runs.values()]
            samples = [s - factor * o for s, o in zip(samples, offsets, strict=True)]
        power = min(0.5 if name in _ROOT_OFFSETS and not corrected else 1.0, slowest)
        found.append(_agree("finetuning", name, lora, samples, dims, power, corrected))
    return tuple(found)


def _slowest_power(teacher: Teacher) -> float:
    """Of offsets in 1/D: that of a power-law teacher's Tr S0²/D, else 1."""
    if teacher.exponent is None:
        return 1.0
    return min(1.0, 1 - 2 * teacher.exponent)


def _samples(table: pd.DataFrame, branch: str, name: str) -> Float[np.ndarray, " seeds"]:
    """One number per run: from the start w*, or of several random starts the one of lowest loss."""
    if branch == "informed":
        return np.asarray(table[f"finetuning.{name}"])
    losses = table.filter(regex=r"^finetuning_random\.\d+\.objective$").to_numpy()
    values = table.filter(regex=rf"^finetuning_random\.\d+\.{name}$").to_numpy()
    return np.asarray(values[np.arange(len(table)), losses.argmin(axis=1)])


def _agree(
    stage: str,
    name: str,
    theory: PretrainingPrediction | FinetuningPrediction,
    samples: Sequence[Float[np.ndarray, " seeds"]],
    dims: Sequence[int],
    power: float = 1.0,
    corrected: bool = False,
) -> Agreement:
    simulation = extrapolate([Estimate.of(sample) for sample in samples], dims, power)
    value, quadrature = float(getattr(theory, name)), theory.quadrature_error[name]
    error = math.hypot(simulation.error or 0.0, quadrature)
    z = (simulation.mean - value) / error if error > 0 and math.isfinite(value) else None
    used = power if len(dims) > 1 else None
    return Agreement(stage, name, value, quadrature, simulation, used, corrected, z)


def extrapolate(estimates: Sequence[Estimate], dims: Sequence[int], power: float) -> Estimate:
    """The limit D → ∞ of estimates at several D: weighted least squares in a + b·D^{-power}.

    One estimate is returned as it is.  The error is that of the fit, from the errors of the points.
    """
    if len(estimates) == 1:
        return estimates[0]
    means = np.array([estimate.mean for estimate in estimates])
    errors = np.array([estimate.error for estimate in estimates], dtype=float)
    design = np.stack([np.ones(len(dims)), np.asarray(dims, dtype=float) ** -power], axis=1)
    if not np.all(errors > 0):  # exact observables, such as those of weights that vanish
        limit = np.linalg.lstsq(design, means, rcond=None)[0][0]
        return Estimate(float(limit), 0.0, sum(estimate.count for estimate in estimates))
    weighted = design / errors[:, None]
    covariance = np.linalg.inv(weighted.T @ weighted)
    limit = (covariance @ weighted.T @ (means / errors))[0]
    count = sum(estimate.count for estimate in estimates)
    return Estimate(float(limit), math.sqrt(covariance[0, 0]), count)
