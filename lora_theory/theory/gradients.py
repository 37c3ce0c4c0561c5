"""Derivatives of predictions with respect to the fields of a problem, without solving again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from lora_theory.compilation import double_precision
from lora_theory.observables import plain_fields
from lora_theory.problem import Problem, ProblemError
from lora_theory.selection import score_name
from lora_theory.theory import finetuning as lora
from lora_theory.theory.averages import Averages, BlockValues
from lora_theory.theory.branches import HELD, BranchErrors, FinetuningNodes, branch_prediction
from lora_theory.theory.nodes import Discretisation
from lora_theory.theory.predict import (
    check_predictable,
    effective_noise,
    frozen_weights,
    predict,
    pretraining_averages,
    pretraining_prediction,
    solve_pretraining,
)
from lora_theory.theory.results import FinetuningPrediction
from lora_theory.theory.roots import Root, root_at
from lora_theory.theory.units import Units

__all__ = [
    "OTHER_SEED",
    "Gradient",
    "NoSolutionError",
    "Tangents",
    "check_fields",
    "continuous_fields",
    "gradient",
]

#: Difference of the logarithm of a field: wide enough to average over the jumps of single nodes,
#: and where there are no nodes.
_STEP, _STEP_WITHOUT_NODES = 2e-2, 1e-3
OTHER_SEED = 7919
#: Numbers about a solution, not of it.
_NO_OBSERVABLES = ("residual", "jump_mass", "signal_growth")


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """Observables of a problem and their derivatives, from two independent sets of nodes.

    ``values[observable]`` is the mean of both, ``slopes[observable][field]`` its derivative with
    respect to the field, ``errors`` half of the differences.
    """

    problem: Problem
    values: dict[str, float]
    slopes: dict[str, dict[str, float]]
    errors: dict[str, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values under the attribute names."""
        return plain_fields(self)


def continuous_fields(problem: Problem) -> tuple[str, ...]:
    """The fields of ``problem`` that have positive numbers which may be varied.

    Raises:
        ProblemError: sequences are chosen by a score under which the nodes move by jumps.
    """
    chosen = problem.finetuning.chosen if problem.finetuning else None
    if chosen and chosen.score != "low_variance":
        raise ProblemError(
            f"finetuning.selection.score = {score_name(chosen.score)!r} is not allowed where "
            'fields vary continuously: it must be "uniform" or "low_variance"'
        )
    return tuple(
        name for name, value in problem.to_flat().items() if isinstance(value, float) and value > 0
    )


def gradient(
    problem: Problem,
    fields: Sequence[str],
    *,
    nodes: int | None = None,
    blocks: int = 8,
    seed: int = 0,
    tolerance: float = 1e-10,
) -> Gradient:
    """Derivatives of all observables with respect to ``fields``, by implicit differentiation.

    At a solution x of r(x, θ) = 0, dx/dθ = −(∂_x r)⁻¹ ∂_θ r, in stage one and, through Q, M and V,
    in stage two.  ∂_θ r is a central difference of the equations at fixed x, which takes no
    solution; the observables are differences at x ± dx.  Jumps of the proximal operator are left
    out of ∂_x r: an error of the order of the jump mass, at most 1 % where the theory is stable.

    Args:
        problem: where; the branch of LoRA is that of ``predict``.
        fields: dotted names of fields with positive numbers.
        nodes, blocks, seed, tolerance: as in :func:`lora_theory.predict`.

    Raises:
        ProblemError: a field has no positive number to vary, the problem has no solution, or a
            setting is not allowed.

    Example:
        >>> from lora_theory import Pretraining, Problem, gradient
        >>> problem = Problem(
        ...     tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        ...     pretraining=Pretraining(samples=0.2, penalty=0.02),
        ... )
        >>> found = gradient(problem, ["pretraining.penalty", "label_noise"])
        >>> slopes = found.slopes["pretraining.test_error"]
        >>> slopes["pretraining.penalty"] < 0 < slopes["label_noise"]  # a larger penalty is better
        True
    """
    check_predictable(problem)
    check_fields(problem, fields)
    with double_precision():
        found = [
            Tangents(problem, Discretisation.checked(nodes, blocks, one, tolerance))
            for one in (seed, seed + OTHER_SEED)
        ]
        slopes = [{field: one.slopes(field) for field in fields} for one in found]
    values, names = [one.values for one in found], list(found[0].values)
    return Gradient(
        problem=problem,
        values={name: (values[0][name] + values[1][name]) / 2 for name in names},
        slopes={
            name: {f: (slopes[0][f][name] + slopes[1][f][name]) / 2 for f in fields}
            for name in names
        },
        errors={
            name: {f: abs(slopes[0][f][name] - slopes[1][f][name]) / 2 for f in fields}
            for name in names
        },
    )


def check_fields(problem: Problem, fields: Sequence[str]) -> None:
    """Refuse what is no continuous field of the problem."""
    allowed = continuous_fields(problem)
    if isinstance(fields, str) or not fields:
        raise ProblemError(
            f"over = {fields!r} is not allowed: it must be one or more of {', '.join(allowed)}"
        )
    for name in fields:
        if name not in allowed:
            raise ProblemError(
                f"over = {name!r} is not allowed: it must be one of {', '.join(allowed)}, the "
                "fields of this problem with positive numbers"
            )
    if len(set(fields)) < len(fields):
        raise ProblemError(f"over = {list(fields)!r} is not allowed: a field occurs twice")


class NoSolutionError(ProblemError):
    """There is nothing to differentiate."""


class Tangents:
    """A solution on one set of nodes, and its linear response."""

    def __init__(self, problem: Problem, discretisation: Discretisation) -> None:
        self._problem, self._discretisation = problem, discretisation
        found = predict(problem, **discretisation._asdict())
        if not found.status.is_solved:
            raise NoSolutionError(
                "this problem has no solution to differentiate: its status is "
                f'"{found.status.value}"'
            )
        self._first: Averages | None = None
        self._second: Averages | None = None
        self._x = solve_pretraining(problem.alone, discretisation).unknowns
        self._first, at = self._pretraining(problem, self._x)
        self._inverse = _inverse(at)
        self._branch, self._w = "", np.zeros(3)
        root = root_at(self._x, at)
        if found.finetuning is not None:
            self._branch, self._w = found.finetuning.branch, _unknowns(problem, found.finetuning)
            self._second, at, _ = self._finetuning(problem, root, self._w)
            self._second_inverse = _inverse(at)
        self.values = self._numbers(problem, root, self._w)

    def slopes(self, field: str) -> dict[str, float]:
        """The derivative of every observable with respect to a field."""
        here = self._problem.to_flat()[field]
        ends = [self._moved(field, here, step) for step in (-1, 1)]
        width = ends[1].value - ends[0].value
        rows = [self._pretraining(end.problem, self._x)[1].mean for end in ends]
        dx = -self._inverse @ (rows[1] - rows[0]) / width
        roots = []
        for end in ends:
            x = self._x + (end.value - here) * dx
            roots.append(root_at(x, self._pretraining(end.problem, x)[1]))
        dw = np.zeros(3)
        if self._second is not None:
            rows = [
                self._finetuning(end.problem, root, self._w)[1].mean
                for end, root in zip(ends, roots, strict=True)
            ]
            dw = -self._second_inverse @ (rows[1] - rows[0]) / width
        low, high = (
            self._numbers(end.problem, root, self._w + (end.value - here) * dw)
            for end, root in zip(ends, roots, strict=True)
        )
        return {name: (high[name] - low[name]) / width for name in self.values}

    def _moved(self, field: str, here: float, direction: int) -> _End:
        """The problem a step further, or as it is at the end of what the field allows."""
        linear = self._problem.activation == "linear"
        step = _STEP_WITHOUT_NODES if linear and not self._branch else _STEP
        value = here * math.exp(direction * step)
        try:
            return _End(value, self._problem.replace({field: value}))
        except ProblemError:
            return _End(here, self._problem)

    def _pretraining(
        self, problem: Problem, x: Float[np.ndarray, " 3"]
    ) -> tuple[Averages, BlockValues]:
        """The equations of stage one at a point."""
        averages = pretraining_averages(problem.alone, self._discretisation)[0]
        averages = averages if self._first is None else averages.like(self._first)
        return averages, averages.at(x, search=True)

    def _finetuning(
        self, problem: Problem, root: Root, w: Float[np.ndarray, " 3"]
    ) -> tuple[Averages, BlockValues, BranchErrors]:
        """The equations of stage two at a point, for the weights of a root of stage one."""
        assert problem.finetuning is not None
        stage, weights = Units.of(problem).stage(problem.finetuning), frozen_weights(problem, root)
        shape = problem.tokens, problem.activation, self._discretisation
        averages = FinetuningNodes(stage, weights, *shape).averages(HELD[self._branch])
        averages = averages if self._second is None else averages.like(self._second)
        errors = BranchErrors(weights, stage.signal, *shape)
        return averages, averages.at(w, search=True), errors

    def _numbers(
        self, problem: Problem, root: Root, w: Float[np.ndarray, " 3"]
    ) -> dict[str, float]:
        """All observables at a root of stage one and given unknowns of stage two."""
        units, tolerance = Units.of(problem), self._discretisation.tolerance
        weights = frozen_weights(problem, root)
        first = pretraining_prediction(problem, root, weights, self._discretisation)
        parts: dict[str, Any] = {
            "pretraining": units.pretraining(first),
            "effective_noise": units.effective_noise(
                effective_noise(problem, weights, self._discretisation)
            ),
        }
        if self._branch:
            _, at, errors = self._finetuning(problem, root, w)
            second = branch_prediction(self._branch, root_at(w, at), errors, tolerance, math.nan)
            parts["finetuning"] = units.finetuning(second)
        return {
            f"{part}.{name}": value
            for part, result in parts.items()
            for name, value in vars(result).items()
            if isinstance(value, float) and name not in _NO_OBSERVABLES
        }


class _End(NamedTuple):
    value: float
    problem: Problem


def _inverse(at: BlockValues) -> Float[np.ndarray, "n n"]:
    """Of the Jacobian of the residuals; at a fold, of least norm."""
    count = at.jacobian.shape[1]
    inverse: Float[np.ndarray, "n n"] = np.linalg.pinv(at.jacobian[:count])
    return inverse


def _unknowns(problem: Problem, found: FinetuningPrediction) -> Float[np.ndarray, " 3"]:
    """(log s, m/q0, log v) of a branch, without temperatures."""
    assert problem.finetuning is not None
    units = Units.of(problem)
    q0 = units.stage(problem.finetuning).signal
    q, v = found.q * units.student, found.v * units.student
    m = found.m * math.sqrt(units.student * units.teacher)
    log_s = 0.5 * math.log(q - m**2 / q0) if found.branch != "zero" else lora.ZERO_SPREAD
    return np.array([log_s, m / q0, math.log(v)])
