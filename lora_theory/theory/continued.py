"""A branch of a problem followed along one of its fields, around folds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from lora_theory.compilation import double_precision
from lora_theory.observables import plain_fields, to_plain
from lora_theory.problem import Problem, ProblemError
from lora_theory.theory import finetuning as lora
from lora_theory.theory.averages import Averages
from lora_theory.theory.branches import HELD, BranchErrors, branch_prediction
from lora_theory.theory.continuation import Curve, follow
from lora_theory.theory.gradients import continuous_fields
from lora_theory.theory.informed import Branches
from lora_theory.theory.nodes import Discretisation
from lora_theory.theory.predict import (
    check_predictable,
    flagged,
    frozen_weights,
    pretraining_averages,
    pretraining_prediction,
    solve_pretraining,
)
from lora_theory.theory.results import FinetuningPrediction, PretrainingPrediction
from lora_theory.theory.roots import Root, refine, root_at
from lora_theory.theory.stability import finetuning_stability, pretraining_stability
from lora_theory.theory.units import Units
from lora_theory.theory.weights import Constants

__all__ = ["Continuation", "continuation"]

_BRANCHES = ("pretraining", "informed", "uninformed")
_MOST_STEPS, _INFORMED, _NEAR = 200, 0.05, 0.02
_OVERLAP = lora.OBSERVABLES.index("overlap")
_ENDS = {
    "range": "the end of the range",
    "steps": f"{_MOST_STEPS} steps",
    "stalled": "no further root was found: raise nodes",
    "left": "the informed branch has merged with m = 0",
}


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A branch as a curve: the field need not grow along it, and turns back at a fold."""

    problem: Problem
    over: str  #: the field
    branch: str
    values: tuple[float, ...]  #: of the field
    predictions: tuple[FinetuningPrediction | PretrainingPrediction, ...]
    folds: tuple[float, ...]  #: values of the field where the curve turns back
    ends: tuple[str, str]  #: why it ends, at the first and at the last point

    @property
    def table(self) -> pd.DataFrame:
        """One row per point: the field, status and residual, observables and their errors."""
        rows = []
        for value, prediction in zip(self.values, self.predictions, strict=True):
            plain = to_plain(prediction)
            errors = plain.pop("quadrature_error")
            named = {f"{name}.error": error for name, error in errors.items()}
            rows.append({self.over: value, **plain, **named})
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values."""
        return plain_fields(self)


def continuation(
    problem: Problem,
    over: str,
    *,
    within: tuple[float, float],
    branch: str = "informed",
    nodes: int | None = None,
    blocks: int = 8,
    seed: int = 0,
    tolerance: float = 1e-8,
) -> Continuation:
    """A branch through the solution of a problem, along one of its fields and around folds.

    Pseudo-arclength continuation in the unknowns and the logarithm of the field, from the value in
    the problem towards both ends (docs/theory.md, section 5; Keller 1977).  Between two folds three
    roots coexist; the one of least ``potential`` is the minimiser (section 3.3).

    Args:
        problem: where the curve begins.
        over: dotted name of a field with positive numbers, as "finetuning.samples".
        within: ends of the field, around its value in the problem.
        branch: "informed" or "uninformed" (m = 0) of LoRA, or "pretraining".
        nodes, blocks, seed, tolerance: as in :func:`lora_theory.predict`.

    Raises:
        ProblemError: an argument is not allowed, or there is no such branch in the problem.

    Example:
        >>> from lora_theory import Finetuning, Pretraining, Problem, continuation
        >>> problem = Problem(
        ...     tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        ...     pretraining=Pretraining(samples=0.2, penalty=0.02),
        ...     finetuning=Finetuning(samples=3.0, penalty=0.2),
        ... )
        >>> curve = continuation(problem, "finetuning.penalty", within=(0.15, 0.3), nodes=64)
        >>> curve.folds, curve.table["overlap"].between(0.9, 1.0).all().item()
        ((), True)
    """
    check_predictable(problem)
    value, ends = _checked(problem, over, within, branch)
    discretisation = Discretisation.checked(nodes, blocks, seed, tolerance)
    kind = _Pretraining if branch == "pretraining" else _Finetuning
    with double_precision():
        stage = kind(problem, over, branch, discretisation)
        start = stage.start(value)
        curves = [
            follow(
                stage.averages, value, start, towards=end, within=ends, tolerance=tolerance,
                stop=lambda point: stage.has_left(point.observables), steps=_MOST_STEPS,
            )
            for end in ends
        ]  # fmt: skip
        whole = Curve((*_reversed(curves[0]), *curves[1].points[1:]), curves[1].end)
        points = [point for point in whole.points if ends[0] <= point.field <= ends[1]]
        predictions = tuple(stage.prediction(point.field, point.unknowns) for point in points)
    return Continuation(
        problem=problem,
        over=over,
        branch=branch,
        values=tuple(point.field for point in points),
        predictions=predictions,
        folds=tuple(fold for fold in whole.folds() if ends[0] <= fold <= ends[1]),
        ends=(_ENDS[curves[0].end], _ENDS[curves[1].end]),
    )


def _reversed(curve: Curve) -> list[Any]:
    return [point._replace(direction=-point.direction) for point in reversed(curve.points)]


def _checked(
    problem: Problem, over: str, within: tuple[float, float], branch: str
) -> tuple[float, tuple[float, float]]:
    """The value of the field in the problem, and the ends."""
    if branch not in _BRANCHES:
        names = ", ".join(f'"{name}"' for name in _BRANCHES)
        raise ProblemError(f"branch = {branch!r} is not allowed: it must be one of {names}")
    if branch != "pretraining" and problem.finetuning is None:
        raise ProblemError(
            f'branch = "{branch}" is not allowed without fine-tuning: give one, or "pretraining"'
        )
    fields = [
        name
        for name in continuous_fields(problem)
        if branch != "pretraining" or not name.startswith(("finetuning", "compression"))
    ]
    if over not in fields:
        raise ProblemError(
            f"over = {over!r} is not allowed: it must be one of {', '.join(fields)}, of which this "
            "branch of the problem has positive numbers"
        )
    value = float(problem.to_flat()[over])
    try:
        low, high = sorted(map(float, within))
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 < low <= value <= high < math.inf:
        raise ProblemError(
            f"within = {within!r} is not allowed: it must be two positive numbers around {over} = "
            f"{value:g}"
        )
    for end in (low, high):
        problem.replace({over: end})  # refuses what the field does not allow
    return value, (low, high)


def _polished(averages: Averages, x: Float[np.ndarray, " n"], tolerance: float) -> Root:
    """The root at a point of the curve, whose residual may be what jumps leave; by Newton's method,
    unless that leads away, as at a fold."""
    values = averages.at(x, search=True)
    found = refine(averages, x, tolerance=tolerance)
    near = bool(np.abs(found.unknowns - x).max() < _NEAR)
    return found if near and found.is_good(tolerance) else root_at(x, values)


class _Pretraining:
    """The equations of stage one along a field."""

    def __init__(
        self, problem: Problem, over: str, branch: str, discretisation: Discretisation
    ) -> None:
        self._problem, self._over = problem.alone, over
        self._discretisation = discretisation

    def _at(self, value: float) -> Problem:
        return self._problem.replace({self._over: value})

    def start(self, value: float) -> Float[np.ndarray, " 3"]:
        return solve_pretraining(self._at(value), self._discretisation).unknowns

    def averages(self, value: float, like: Averages | None) -> Averages:
        averages, _ = pretraining_averages(self._at(value), self._discretisation)
        return averages if like is None else averages.like(like)

    def has_left(self, observables: Float[np.ndarray, "R K"]) -> bool:
        return False

    def prediction(self, value: float, x: Float[np.ndarray, " 3"]) -> PretrainingPrediction:
        problem, averages = self._at(value), self.averages(value, None)
        root = _polished(averages, x, self._discretisation.tolerance)
        weights, constants = frozen_weights(problem, root), Constants.of(problem)
        found = pretraining_prediction(problem, root, weights, self._discretisation)
        stability = pretraining_stability(averages, root, constants, problem.tokens)
        return Units.of(problem).pretraining(flagged(found, stability))


class _Finetuning:
    """The equations of a branch of stage two along a field."""

    def __init__(
        self, problem: Problem, over: str, branch: str, discretisation: Discretisation
    ) -> None:
        self._problem, self._over, self._branch = problem, over, branch
        self._discretisation = discretisation
        self._branches = functools.lru_cache(maxsize=8)(self._branches_at)

    def _at(self, value: float) -> Problem:
        return self._problem.replace({self._over: value})

    def _branches_at(self, value: float) -> Branches:
        return Branches(self._at(value), self._discretisation)

    def start(self, value: float) -> Float[np.ndarray, " 3"]:
        branches = self._branches(value)
        solve: Callable[[float], Root] = getattr(branches, self._branch)
        root = solve(branches.stage.samples)
        informed = self._branch == "uninformed" or root.observables[_OVERLAP] > _INFORMED
        if not root.is_good(branches.tolerance) or not informed:
            raise ProblemError(
                f'branch = "{self._branch}" is not allowed here: at {self._over} = {value:g} there '
                "is no such solution; begin where predict(…).branches has it"
            )
        return root.unknowns

    def averages(self, value: float, like: Averages | None) -> Averages:
        averages = self._branches(value).nodes.averages(HELD[self._branch])
        return averages if like is None else averages.like(like)

    def has_left(self, observables: Float[np.ndarray, "R K"]) -> bool:
        return self._branch == "informed" and bool(observables[:, _OVERLAP].mean() < _INFORMED)

    def prediction(self, value: float, x: Float[np.ndarray, " 3"]) -> FinetuningPrediction:
        problem, at, averages = self._at(value), self._branches(value), self.averages(value, None)
        root = _polished(averages, x, at.tolerance)
        errors = BranchErrors(
            at.weights, at.nodes.task.signal, problem.tokens, problem.activation,
            self._discretisation,
        )  # fmt: skip
        found = branch_prediction(self._branch, root, errors, at.tolerance, math.nan)
        stability = finetuning_stability(averages, root, at.nodes.task)
        return Units.of(problem).finetuning(flagged(found, stability))
