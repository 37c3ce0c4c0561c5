"""The effective noise in parts, against the penalty of pre-training and the rescaling."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from lora_theory.explorer.answers import COARSE, FINE, Precision, answer, asked, tried
from lora_theory.explorer.draw_noise import draw_noise
from lora_theory.explorer.points import REFUSED, View, precision_text, status_text, timed
from lora_theory.observables import Estimate
from lora_theory.problem import Problem, ProblemError
from lora_theory.status import Status
from lora_theory.theory import Prediction, optimize
from lora_theory.theory.units import Units

__all__ = ["PARTS", "noise", "parts_of"]

_PENALTY, _RESCALING = "pretraining.penalty", "finetuning.rescaling"
#: What the total is made of, from below.
PARTS = ("label_noise", "not_learned", "wrong_scale")
#: Ends of both axes as factors; points of the sums, of rescaled problems.
_AROUND, _COUNT = 100.0, 21
_TIMES, _FINELY, _SOLVED = 2.0, 61, 11


def parts_of(found: Prediction, rescaling: float | None = None) -> dict[str, tuple[float, float]]:
    """Δ/2, Q0 − M²/Q and (1 − g)²Q with quadrature errors, and their sum "total".

    In the fields of the activation, τ0 z^y − τz (docs/theory.md, sections 2.6 and 4.1).

    Args:
        rescaling: β of the frozen weights, that of the problem if left out; what is not learned
            does not depend on it.
    """
    problem, seen = found.problem, found.effective_noise
    student, teacher = Units.of(problem)
    errors = seen.quadrature_error or {}
    factor = 1.0 if rescaling is None else rescaling / problem.rescaling
    label = teacher**2 * problem.label_noise / 2
    square = teacher**2
    parts = {
        "label_noise": (label, 0.0),
        "not_learned": (square * seen.variance - label, square * errors["variance"]),
        "wrong_scale": (0.0, 0.0),
    }
    if seen.Q > 0:
        gain, Q = seen.gain * teacher / student, student**2 * seen.Q
        error = 2 * abs(factor - gain) * Q * errors["gain"] * teacher / student
        parts["wrong_scale"] = (factor - gain) ** 2 * Q, error
    values, spreads = zip(*parts.values(), strict=True)
    return parts | {"total": (sum(values), math.hypot(*spreads))}


def best_rescaling(found: Prediction) -> tuple[float, float]:
    """β*, where nothing is left of the wrong scale, and its quadrature error.

    M/Q of weights without rescaling; with temperatures τ and τ0, (M/Q)τ0/τ.
    """
    student, teacher = Units.of(found.problem)
    noise, unit = found.effective_noise, teacher / student * found.problem.rescaling
    return noise.gain * unit, (noise.quadrature_error or {})["gain"] * unit


def noise(problem: Problem) -> Iterator[View]:
    """Label noise, what is not learned and the wrong scale: against λ, and against β.

    First the sums, then the best penalty, then E' and the noise of the training sequences for
    rescaled weights.
    """
    weights = problem.replace(finetuning=None)
    precisions = [FINE] if problem.activation == "linear" else [COARSE, FINE]
    state = _State(problem, answer(weights, precisions[0]))
    own = problem.pretraining.penalty
    values = (own * np.geomspace(1 / _AROUND, _AROUND, _COUNT)).tolist()
    values[_COUNT // 2] = own
    order = sorted(range(_COUNT), key=lambda i: abs(i - _COUNT // 2))
    jobs = [functools.partial(state.at_penalty, values[i], p) for p in precisions for i in order]
    later = [functools.partial(state.best_penalty, precision) for precision in precisions]
    if _trained_elsewhere(problem):
        later += [functools.partial(state.trained, values[i]) for i in order]
    if problem.finetuning is not None:
        around = functools.partial(state.rescaled, precision=COARSE)
        later += [functools.partial(around, index) for index in range(_SOLVED)]
        finer = functools.partial(state.rescaled, precision=FINE)
        later += [functools.partial(finer, index) for index in range(_SOLVED)]
    done = 0
    for part in timed((job() for job in jobs + later), _COUNT):
        done += len(part)
        share = done / (len(jobs) + len(later))
        table = state.table()
        yield View(table, state.caption(share), share, functools.partial(draw_noise, table))


def _where(symbol: str, at: float, low: float, high: float) -> str:
    """The place of a least point, known up to its neighbours."""
    if at in (low, high):
        return f"at the end of the range, {symbol} = {at:.3g}, or beyond"
    return f"between {symbol} = {low:.3g} and {high:.3g}"


def _trained_elsewhere(problem: Problem) -> bool:
    """Whether the sequences of training have another noise than fresh ones."""
    stage = problem.finetuning
    special = stage is not None and (stage.reused > 0 or stage.chosen is not None)
    return special and problem.activation == "linear"


class _State:
    """The rows that are there, and what was found about them."""

    def __init__(self, problem: Problem, own: Prediction) -> None:
        self._problem, self._weights, self._own = problem, own.problem, own
        self._rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        self._optimum = ""

    def table(self) -> pd.DataFrame:
        """All rows, by axis, quantity and value."""
        rows = [row for part in self._rows.values() for row in part]
        flat = {
            name: value
            for name, value in self._problem.to_flat().items()
            if name not in (_PENALTY, _RESCALING)
        }
        table = pd.DataFrame([row | flat for row in rows])
        return table.sort_values(["field", "observable", "x"], ignore_index=True)

    def _row(
        self, field: str, x: float, name: str, found: Prediction | ProblemError, **numbers: Any
    ) -> dict[str, Any]:
        own = {_PENALTY: self._problem.pretraining.penalty, _RESCALING: self._problem.rescaling}
        row = {"field": field, "x": x, "chosen": x == own[field], "observable": name}
        row |= {**own, field: x, "value": math.nan, "error": math.nan, "nodes": None}
        if isinstance(found, ProblemError):
            return row | {"status": f"{REFUSED}{found}"} | numbers
        return row | {"status": found.pretraining.status.value} | numbers

    def at_penalty(self, value: float, precision: Precision) -> None:
        """The parts at a penalty; at the own one also against the rescaling."""
        asking = asked(lambda: self._weights.replace({_PENALTY: value}))
        found = tried(asking, precision)
        rescaling, rows = self._problem.rescaling, []
        if isinstance(found, ProblemError):
            self._rows[_PENALTY, value] = [self._row(_PENALTY, value, "total", found)]
            return
        used = {"nodes": precision.points(found.problem.tokens), "blocks": precision.blocks}
        for name, (size, error) in parts_of(found, rescaling).items():
            rows.append(self._row(_PENALTY, value, name, found, value=size, error=error, **used))
        self._rows[_PENALTY, value] = rows
        if value == self._problem.pretraining.penalty:
            self._own = found
            self._against_rescaling(found, used)

    def _against_rescaling(self, found: Prediction, used: dict[str, Any]) -> None:
        rows = []
        for beta in self._rescalings(_FINELY):
            for name, (size, error) in parts_of(found, beta).items():
                rows.append(
                    self._row(_RESCALING, beta, name, found, value=size, error=error, **used)
                )
        best, error = best_rescaling(found)
        if math.isfinite(best):
            rows.append(self._row(_RESCALING, best, "best", found, value=best, error=error, **used))
        self._rows[_RESCALING,] = rows

    def _rescalings(self, count: int) -> list[float]:
        """Around the best and the own rescaling, both among them."""
        best, own = best_rescaling(self._own)[0], self._problem.rescaling
        known = [own, best] if math.isfinite(best) and best > 0 else [own]
        values = np.geomspace(min(known) / _TIMES, max(known) * _TIMES, count - len(known))
        return sorted({*values.tolist(), *known})

    def best_penalty(self, precision: Precision) -> None:
        """λ* of the weights without rescaling, or the least of the points that are there."""
        used = {"nodes": precision.points(self._problem.tokens), "blocks": precision.blocks}
        try:
            if self._problem.rescaling != 1 and self._problem.activation == "linear":
                raise ProblemError("it would be that of weights without rescaling")
            found = optimize(
                self._weights, [_PENALTY], "effective_noise",
                nodes=precision.nodes, blocks=precision.blocks,
            )  # fmt: skip
        except ProblemError as refusal:
            name = "total" if self._problem.activation == "linear" else "variance"
            at, low, high = self._least(_PENALTY, name)
            words = "the least of what is shown"
            self._optimum = (
                f"{words} is {_where('λ', at, low, high)} (no search for the optimum: {refusal})"
            )
            numbers = {"value": at, "error": (high - low) / 2, **used}
        else:
            at, error = found.optimum[_PENALTY], found.errors[_PENALTY]
            edge = ", an end of the range" if found.at_bound else ""
            what = "sum" if self._problem.activation == "linear" else "sum of the lower two parts"
            self._optimum = f"least {what} at λ* = {Estimate(at, error, 1)}{edge}"
            numbers = {"value": at, "error": error, **used}
        self._rows[_PENALTY, "best"] = [self._row(_PENALTY, at, "best", self._own, **numbers)]

    def _least(self, field: str, name: str) -> tuple[float, float, float]:
        """The point of least value, and its neighbours."""
        table = self.table()
        table = table[table["status"] != Status.NOT_CONVERGED.value]
        if name == "variance":
            rows = table[(table["field"] == field) & table["observable"].isin(PARTS[:2])]
            rows = rows.groupby("x", as_index=False)["value"].sum()
        else:
            rows = table[(table["field"] == field) & (table["observable"] == name)]
        rows = rows[np.isfinite(rows["value"])].sort_values("x")
        x, i = rows["x"].to_numpy(float), int(np.argmin(rows["value"].to_numpy(float)))
        return float(x[i]), float(x[max(i - 1, 0)]), float(x[min(i + 1, len(x) - 1)])

    def trained(self, value: float) -> None:
        """The noise of the sequences that LoRA is trained on, at a penalty."""
        asking = asked(lambda: self._problem.replace({_PENALTY: value}))
        found = tried(asking, COARSE)
        self._rows[_PENALTY, "training", value] = [self._training(_PENALTY, value, found, COARSE)]

    def _training(
        self, field: str, x: float, found: Prediction | ProblemError, precision: Precision
    ) -> dict[str, Any]:
        if isinstance(found, ProblemError):
            return self._row(field, x, "training", found)
        seen = found.effective_noise
        value, error = seen.delta_eff_training, (seen.quadrature_error or {})["delta_eff_training"]
        used = {"nodes": precision.points(found.problem.tokens), "blocks": precision.blocks}
        return self._row(field, x, "training", found, value=value, error=error, **used)

    def rescaled(self, index: int, precision: Precision) -> None:
        """E' of rescaled weights."""
        values = self._rescalings(_SOLVED)
        value = values[index]
        asking = asked(lambda: self._problem.replace({_RESCALING: value}))
        found = tried(asking, precision)
        name, rows = "finetuning.test_error", []
        if isinstance(found, ProblemError):
            rows.append(self._row(_RESCALING, value, name, found))
        else:
            stage = found.finetuning
            assert stage is not None
            used = {"nodes": precision.points(found.problem.tokens), "blocks": precision.blocks}
            numbers: dict[str, Any] = {
                "value": stage.test_error,
                "error": stage.quadrature_error["test_error"],
            }
            numbers |= {"status": found.status.value}
            rows.append(self._row(_RESCALING, value, name, found, **numbers, **used))
            if _trained_elsewhere(self._problem):
                rows.append(self._training(_RESCALING, value, found, precision))
        self._rows[_RESCALING, name, value] = rows

    def caption(self, done: float) -> str:
        """What is shown, and what was found."""
        problem, table = self._problem, self.table()
        linear = problem.activation == "linear"
        text = (
            "What the labels' fields differ by from those of the frozen weights, as areas that "
            "add up to Δ_eff: label noise Δ/2, what of the teacher is not learned, Q₀ − M²/Q, and "
            "the wrong scale, (1 − g)²Q with the gain g = M/Q. Left: against the penalty λ of "
            "pre-training; right: against the rescaling β of the frozen weights; own values "
            "marked. "
        )
        if not linear:
            text += (
                "Softmax does not feel this one sum: gain and noise variance (the lower two areas) "
                "are what it feels. "
            )
        if (problem.inverse_temperature, problem.teacher.inverse_temperature) != (1.0, 1.0):
            text += "In units of the arguments of the activation, temperatures included. "
        text += f"Dashed: {self._optimum}; " if self._optimum else ""
        best = table[(table["field"] == _RESCALING) & (table["observable"] == "best")]
        if len(best):
            row = best.iloc[0]
            best_value = Estimate(row["value"], row["error"], 1)
            text += f"β* = g = {best_value} leaves no wrong scale. "
        text += self._felt(table)
        unfinished = "" if done == 1 else "Preliminary. "
        points = table[(table["field"] == _PENALTY) & (table["observable"] == "total")]
        return f"{text}{unfinished}{precision_text(table)} {status_text(points['status'])}".strip()

    def _felt(self, table: pd.DataFrame) -> str:
        """Where E' and the training noise are least along β, if not at β*."""
        text = ""
        if self._own.effective_noise.Q == 0:  # nothing is there to be rescaled
            return text
        for name, words in (
            ("finetuning.test_error", "E' is least (ringed)"),
            ("training", "The noise of the training sequences is least"),
        ):
            rows = table[(table["field"] == _RESCALING) & (table["observable"] == name)]
            if np.isfinite(rows["value"]).sum() >= _SOLVED - 1:
                text += f"{words} {_where('β', *self._least(_RESCALING, name))}. "
        return text
