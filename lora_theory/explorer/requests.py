"""Which view is asked for, with its options; what it shows and how that is computed again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from lora_theory.explorer import views
from lora_theory.explorer.answers import COARSE, FINE, Precision
from lora_theory.explorer.controls import CONTROLS, Control, Range, ranges
from lora_theory.explorer.exports import Recipe
from lora_theory.explorer.noise_view import PARTS
from lora_theory.explorer.points import REFUSED
from lora_theory.explorer.trial import Trial
from lora_theory.explorer.views import OBSERVABLES, Measured, View
from lora_theory.problem import Problem, ProblemError
from lora_theory.spelling import number

__all__ = ["Request", "option_controls"]

VIEWS = {
    "curve": "Curve", "trajectory": "Trajectory", "spectrum": "Spectrum",
    "noise": "Effective noise", "map": "Phase map", "trial": "Simulation",
}  # fmt: skip
_PRECISIONS = {"coarse": COARSE, "fine": FINE}
_ALONG = ("curve", "trajectory")
_LABELS = {control.name: control.label for control in CONTROLS}


def option_controls(problem: Problem) -> tuple[Control, ...]:
    """The choice of the view and the options of each, for the fields of a problem."""
    fields = tuple(ranges(problem))

    def option(name: str, label: str, default: str, *shown: str, **more: Any) -> Control:
        needs = (("view", shown),) if shown else ()
        return Control(name, label, help="", group="", default=default, needs=needs, **more)

    return (
        option("view", "view", "curve", choices=tuple(VIEWS.items()), buttons=True),
        option("along", "along", "pretraining.penalty", *_ALONG, choices=fields),
        option("from", "from", "", *_ALONG),
        option("to", "to", "", *_ALONG),
        option("x", "across", "pretraining.penalty", "map", choices=fields),
        option("y", "up", "finetuning.samples", "map", choices=fields),
        option("show", "show", "gain", "map", choices=tuple(OBSERVABLES)),
        option("points", "points per axis", "9", "map", choices=("9", "17", "25")),
        option("nodes", "nodes", "coarse", "map", choices=tuple(_PRECISIONS)),
        option("dims", "dimensions D", "40, 60", "trial"),
        option("seeds", "runs per D", "8", "trial", range=Range(2, 32, "integer")),
        option("simulate", "Simulate", "0", "trial", action=True),
        option("cancel", "Cancel", "0", "trial", action=True),
    )


@dataclasses.dataclass(frozen=True)
class Request:
    """A view and the values of the options, as text.

    Example:
        >>> from lora_theory.explorer.controls import CONTROLS, problem_of
        >>> problem = problem_of({control.name: control.default for control in CONTROLS})
        >>> Request.of(problem, {"view": "map"}).options["points"]
        '9'
    """

    options: Mapping[str, str]

    @property
    def along(self) -> bool:
        """Whether the view runs along a field, with the trials that lie on it."""
        return self.view in _ALONG

    @property
    def shows_trials(self) -> bool:
        """Whether a trial may change the view."""
        return self.along or self.view == "trial"

    @classmethod
    def of(cls, problem: Problem, options: Mapping[str, str]) -> Request:
        """With the defaults of what is left out."""
        defaults = {control.name: control.default for control in option_controls(problem)}
        return cls({**defaults, **options})

    @property
    def view(self) -> str:
        """Its name, one of VIEWS."""
        return self.options["view"]

    def views(
        self, problem: Problem, measured: Sequence[Measured], trial: Trial | None
    ) -> Iterator[View]:
        """The view, better and better.

        Raises:
            ProblemError: the view has no meaning for the problem, or an option is not allowed.
        """
        self._check(problem)
        if self.along:
            show = views.curve if self.view == "curve" else views.trajectory
            along = self.options["along"]
            within = self._within(problem, "along", "from", "to")
            yield from show(problem, along, within, measured=measured)
        elif self.view == "spectrum":
            yield from views.learned_spectrum(problem)
        elif self.view == "noise":
            yield from views.noise(problem)
        elif self.view == "map":
            yield from views.phase_map(
                problem,
                self.options["x"], self._within(problem, "x"),
                self.options["y"], self._within(problem, "y"),
                self.options["show"], points=self._integer("points"), precision=self._precision,
            )  # fmt: skip
        else:
            yield self._trial(problem, trial)

    def _check(self, problem: Problem) -> None:
        """Refuse what no menu offers."""
        for control in option_controls(problem):
            value = self.options[control.name]
            names = [c if isinstance(c, str) else c[0] for c in control.choices]
            if names and control.applies(self.options) and value not in names:
                raise ProblemError(
                    f"{control.name} = {value!r} is not allowed for this problem: it must be one "
                    f"of {', '.join(names)}"
                )

    def _trial(self, problem: Problem, trial: Trial | None) -> View:
        if trial is None or not trial.comparable:
            raise ProblemError(
                "No simulation of this problem has two runs at each D yet: press Simulate, and "
                "theory and simulation are put side by side as the runs end."
            )
        runs = {dim: pd.DataFrame(trial.runs[dim]) for dim in trial.dims}
        return views.comparison(problem, runs)

    def size(self) -> tuple[tuple[int, ...], int]:
        """D and runs of a simulation.

        Raises:
            ProblemError: these are no integers.
        """
        dims = tuple(self._whole("dims", text) for text in self.options["dims"].split(","))
        seeds = self._integer("seeds")
        if seeds < 2 or len(set(dims)) < len(dims):
            raise ProblemError(
                f"dims = {self.options['dims']}, seeds = {seeds} is not allowed: it must be one or "
                "several different D and at least 2 runs"
            )
        return dims, seeds

    def address(self, problem: Problem) -> dict[str, str]:
        """The options that differ from their defaults."""
        return {
            control.name: self.options[control.name]
            for control in option_controls(problem)
            if self.options[control.name] != control.default and not control.action
        }

    def recipe(self, problem: Problem, view: View | None) -> Recipe:
        """How the view is computed again, in the shell and in Python."""
        predicted = Recipe(problem, ["predict"], ["prediction = predict(problem)"], ["predict"])
        if self.view == "spectrum":
            return Recipe(problem, ["spectrum"], ["learned = spectrum(problem)"], ["spectrum"])
        if self.view == "trial":
            dims, seeds = self.size()
            if view is not None:
                runs = view.table[view.table["source"] == "simulation"].groupby("dim")["runs"]
                dims, seeds = tuple(map(int, runs.min().index)), int(runs.min().min())
            call = f"comparison = compare(problem, dims={list(dims)}, seeds={seeds})"
            flags = ["compare", "--dims", *map(str, dims), "--seeds", str(seeds)]
            return Recipe(problem, ["compare"], [call], flags)
        if view is None:
            return predicted
        coarse = self.view == "map" and self._precision == COARSE
        theory = dataclasses.asdict(COARSE) if coarse else {}
        given = "".join(f", {name}={value}" for name, value in theory.items())
        fields, rows = self._points(problem, view)
        if not rows:  # theory refuses all
            return predicted
        calls = [
            f"fields, values = {fields!r}, {rows!r}",
            "points = [problem.replace(dict(zip(fields, row))) for row in values]",
            f"predictions = predict_many(points{given})",
        ]
        columns = dict(zip(fields, map(list, zip(*rows, strict=True)), strict=True))
        return Recipe(problem, ["predict_many"], calls, varied=columns, theory=theory)

    def _points(self, problem: Problem, view: View) -> tuple[list[str], list[tuple[Any, ...]]]:
        """What a view varies, and the values at the points that theory answers."""
        axes = {"x": "x", "y": "y"} if self.view == "map" else {"x": "along"}
        fields = [self.options[option] for option in axes.values()]
        table = view.table
        if self.view == "noise":  # its parts follow from the effective noise at each penalty
            fields = ["pretraining.penalty"]
            table = table[(table["field"] == fields[0]) & table["observable"].isin(PARTS)]
        else:
            table = table[table["source"] == "theory"]
        answered = table[~table["status"].str.startswith(REFUSED)]
        known = ranges(problem)
        kinds = [int if known[field].scale == "integer" else float for field in fields]
        rows = answered[list(axes)].drop_duplicates().sort_values(list(axes)).to_numpy().tolist()
        return fields, [
            tuple(kind(value) for kind, value in zip(kinds, row, strict=True)) for row in rows
        ]

    def _within(self, problem: Problem, axis: str, *ends: str) -> tuple[float, float]:
        """The ends of an axis: those that are given, else those of the slider."""
        values = list(ranges(problem)[self.options[axis]][:2])
        for position, name in enumerate(ends):
            if text := self.options[name].strip():
                value = number(text)
                if isinstance(value, str):
                    raise ProblemError(f"{name} = {text} is not allowed: it must be a number")
                values[position] = value
        low, high = values
        if not -math.inf < low < high < math.inf:
            raise ProblemError(f"from = {low:g}, to = {high:g} is not allowed: they must rise")
        return low, high

    @property
    def _precision(self) -> Precision:
        return _PRECISIONS.get(self.options["nodes"], COARSE)

    def _integer(self, name: str) -> int:
        return self._whole(name, self.options[name])

    @staticmethod
    def _whole(name: str, text: str) -> int:
        value = number(text.strip())
        if not isinstance(value, int):
            raise ProblemError(f"{name} = {text} is not allowed: it must be an integer")
        return value
