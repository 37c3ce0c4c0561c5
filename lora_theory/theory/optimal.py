"""Optimal pre-training: the fields of a problem at which an objective is best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import minimize

from lora_theory.compilation import double_precision
from lora_theory.observables import plain_fields
from lora_theory.problem import Problem, ProblemError
from lora_theory.status import Status
from lora_theory.theory.gradients import OTHER_SEED, NoSolutionError, Tangents, check_fields
from lora_theory.theory.nodes import Discretisation
from lora_theory.theory.predict import check_predictable, predict, predict_many

__all__ = ["OBJECTIVES", "Optimum", "optimize"]

#: What can be optimised, and whether more of it is better.
OBJECTIVES = {
    "finetuning.test_error": False,
    "finetuning.overlap": True,
    "pretraining.test_error": False,
    "effective_noise": False,
}
#: Ends of a box that is not given, as factors of the value; points of the scan of each field.
_BOX, _SCAN = 100.0, 9
#: The largest gradient that counts as 0, and steps until then.
_FLAT, _STEPS = 1e-5, 40
#: The largest one that is left by the jumps of single nodes.
_STEEP = 1e-3
#: Relative difference below which two values of the objective are equal.
_EQUAL = 1e-6
#: Part of the width of a box, on a logarithmic scale, within which its end counts as reached.
_EDGE = 1e-6
#: Upper ends of fields that have one.
_LARGEST = {"finetuning.reused_fraction": 1.0, "compression.rank": 1.0, "teacher.exponent": 0.49}


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """Where an objective is best.

    ``gradient_norm`` is that of d log(objective)/d log(fields), for an overlap o of d log(1 − o),
    without the components that point out of the box at an end in ``at_bound``.  Errors come from a
    second, independent set of nodes, NaN where that has no solution.  ``status`` is that of the
    prediction there, or "not_converged" where the search has not ended at a flat place.
    """

    problem: Problem  #: at the optimum
    minimised: str | None  #: the name of the objective if it is minimised …
    maximised: str | None  #: … or maximised
    optimum: dict[str, float]
    objective: float
    gradient_norm: float
    at_bound: tuple[str, ...]
    status: Status
    within: dict[str, tuple[float, float]]
    errors: dict[str, float]  #: of the optimum and, under "objective", of its value

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values under the attribute names."""
        return {**plain_fields(self), "status": self.status.value}


def optimize(
    problem: Problem,
    over: Sequence[str],
    objective: str = "finetuning.test_error",
    *,
    within: Mapping[str, tuple[float, float]] | None = None,
    nodes: int | None = None,
    blocks: int = 8,
    seed: int = 0,
    tolerance: float = 1e-10,
) -> Optimum:
    """The fields ``over`` at which ``objective`` is best, the others as in ``problem``.

    Each field is scanned over its box in turn, then a quasi-Newton method (L-BFGS-B in the
    logarithms of the fields) descends with the derivatives of :func:`lora_theory.gradient`.

    Args:
        problem: what is held.
        over: dotted names of fields with positive numbers.
        objective: "finetuning.test_error" or "pretraining.test_error", minimised;
            "finetuning.overlap", maximised; or "effective_noise", minimised: Δ_eff of the weights
            without rescaling for linear attention, for softmax the variance Δ/2 + Q0 − M²/Q, which
            is that after the best rescaling.
        within: ends of the box by field; without, a hundredth and a hundred times its value.
        nodes, blocks, seed, tolerance: as in :func:`lora_theory.predict`.

    Raises:
        ProblemError: unknown objective or field, a field that does not change the objective, a box
            without the value in it, or no solution anywhere.

    Example:
        >>> from lora_theory import Pretraining, Problem, optimize
        >>> problem = Problem(
        ...     tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        ...     pretraining=Pretraining(samples=0.2, penalty=0.02),
        ... )
        >>> best = optimize(problem, ["pretraining.penalty"], "effective_noise")
        >>> round(best.optimum["pretraining.penalty"], 3), round(best.objective, 3), best.at_bound
        (0.104, 0.467, ())
    """
    check_predictable(problem)
    if objective not in OBJECTIVES:
        names = ", ".join(f'"{name}"' for name in OBJECTIVES)
        raise ProblemError(f"objective = {objective!r} is not allowed: it must be one of {names}")
    check_fields(problem, over)
    if objective.startswith("finetuning") and problem.finetuning is None:
        raise ProblemError(
            f'objective = "{objective}" is not allowed without fine-tuning: give it '
            "finetuning.samples and finetuning.penalty"
        )
    if not objective.startswith("finetuning"):
        later = ("finetuning",) if objective == "effective_noise" else ("finetuning", "compression")
        for name in over:
            if name.startswith(later):
                raise ProblemError(
                    f'over = "{name}" is not allowed with objective = "{objective}", which it does '
                    "not change"
                )
    box = _box(problem, over, within)
    goal = _Goal(problem, tuple(over), objective)
    settings = [
        Discretisation.checked(nodes, blocks, one, tolerance) for one in (seed, seed + OTHER_SEED)
    ]
    with double_precision():
        start = goal.scanned(box, settings[0])
        found = goal.descended(start, box, settings[0])
        other = goal.descended(found.x, box, settings[1])
    status = predict(goal.at(found.x), **settings[0]._asdict()).status
    if found.gradient_norm > _STEEP:
        status = Status.NOT_CONVERGED
    optimum = {name: float(value) for name, value in zip(over, np.exp(found.x), strict=True)}
    shifts = np.abs(np.exp(other.x) - np.exp(found.x)) / 2
    return Optimum(
        problem=problem.replace(optimum),
        minimised=None if OBJECTIVES[objective] else objective,
        maximised=objective if OBJECTIVES[objective] else None,
        optimum=optimum,
        objective=found.value,
        gradient_norm=found.gradient_norm,
        at_bound=tuple(name for name, edge in zip(over, found.at_bound, strict=True) if edge),
        status=status,
        within={name: box[name] for name in over},
        errors=dict(zip(over, shifts.tolist(), strict=True))
        | {"objective": abs(other.value - found.value) / 2},
    )


def _box(
    problem: Problem, over: Sequence[str], within: Mapping[str, tuple[float, float]] | None
) -> dict[str, tuple[float, float]]:
    flat, box = problem.to_flat(), {}
    for name in within or ():
        if name not in over:
            raise ProblemError(f"within.{name} is not allowed: it must be one of {', '.join(over)}")
    for name in over:
        value = float(flat[name])
        largest = min(value * _BOX, _LARGEST.get(name, math.inf))
        given = (within or {}).get(name, (value / _BOX, largest))
        try:
            low, high = map(float, given)
        except (TypeError, ValueError):
            low = high = math.nan
        if not 0 < low < high < math.inf or not low <= value <= high:
            raise ProblemError(
                f"within.{name} = {given!r} is not allowed: it must be two positive numbers around "
                f"its value {value:g}"
            )
        for end in (low, high):
            problem.replace({name: end})  # refuses what the field does not allow
        box[name] = low, high
    return box


class _Place(NamedTuple):
    x: Float[np.ndarray, " n"]  # logarithms of the fields
    value: float
    gradient_norm: float
    at_bound: Bool[np.ndarray, " n"]


class _Goal:
    """The objective as a function of the logarithms of the fields."""

    def __init__(self, problem: Problem, over: tuple[str, ...], objective: str) -> None:
        self._problem = (
            problem if objective.startswith("finetuning") else problem.replace(finetuning=None)
        )
        self._over, self._maximised = over, OBJECTIVES[objective]
        if objective == "effective_noise":
            part = "delta_eff" if problem.activation == "linear" else "variance"
            objective = f"effective_noise.{part}"
        self._name = objective

    def _loss(self, value: float) -> tuple[float, float]:
        """log E, or log(1 − o), and its derivative with respect to the objective."""
        distance = 1 - value if self._maximised else value
        if not distance > 0:
            return math.inf, 0.0
        return math.log(distance), (-1 if self._maximised else 1) / distance

    def at(self, x: Float[np.ndarray, " n"]) -> Problem:
        """The problem with these fields."""
        return self._problem.replace(dict(zip(self._over, np.exp(x).tolist(), strict=True)))

    def scanned(
        self, box: dict[str, tuple[float, float]], settings: Discretisation
    ) -> Float[np.ndarray, " n"]:
        """The best of a few points along each field in turn."""
        flat = self._problem.to_flat()
        x = np.log([flat[name] for name in self._over])
        part, attribute = self._name.split(".")
        for i, name in enumerate(self._over):
            points = np.tile(x, (_SCAN + 1, 1))
            low, high = np.log(box[name])
            points[1:, i] = np.linspace(low, high, _SCAN)
            found = predict_many([self.at(point) for point in points], **settings._asdict())
            losses = [
                self._loss(getattr(getattr(answer, part), attribute))[0]
                if answer.status.is_solved
                else math.inf
                for answer in found
            ]
            if min(losses) == math.inf:
                raise ProblemError(
                    f"over = {name!r}: the equations have no solution anywhere from "
                    f"{box[name][0]:g} to {box[name][1]:g}"
                )
            x = points[int(np.argmin(losses))]
        return x

    def descended(
        self,
        start: Float[np.ndarray, " n"],
        box: dict[str, tuple[float, float]],
        settings: Discretisation,
    ) -> _Place:
        """The local optimum from a start."""
        low, high = np.log([box[name] for name in self._over]).T
        edge = _EDGE * (high - low)
        places: list[_Place] = []

        def logarithm(x: Float[np.ndarray, " n"]) -> tuple[float, Float[np.ndarray, " n"]]:
            x = np.clip(x, low, high)
            try:
                tangents = Tangents(self.at(x), settings)
            except NoSolutionError:  # the line search comes nearer
                return math.inf, np.zeros(len(x))
            value = tangents.values[self._name]
            loss, by_value = self._loss(value)
            slopes = [tangents.slopes(name)[self._name] for name in self._over]
            gradient = by_value * np.array(slopes) * np.exp(x)
            free = ~(((x <= low + edge) & (gradient > 0)) | ((x >= high - edge) & (gradient < 0)))
            places.append(_Place(x, value, float(np.linalg.norm(gradient * free)), ~free))
            return loss, gradient

        minimize(
            logarithm, start, jac=True, method="L-BFGS-B", bounds=list(zip(low, high, strict=True)),
            options={"gtol": _FLAT, "ftol": 0.0, "maxiter": _STEPS, "maxls": 10},
            callback=lambda x: _stop_if(places[-1].gradient_norm < _FLAT),
        )  # fmt: skip
        if not places:  # on other nodes there may be no solution at the start
            nothing = np.full(len(start), math.nan)
            return _Place(nothing, math.nan, math.nan, np.zeros(len(start), dtype=bool))
        losses = [self._loss(place.value)[0] for place in places]
        good = [p for p, loss in zip(places, losses, strict=True) if loss <= min(losses) + _EQUAL]
        return min(good, key=lambda place: place.gradient_norm)


def _stop_if(flat: bool) -> None:
    if flat:
        raise StopIteration
