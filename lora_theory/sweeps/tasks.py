"""One task of a sweep: a point, its theory or some runs of its simulation, and the rows of it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lora_theory.doctor import installed_version
from lora_theory.problem import Problem
from lora_theory.simulation import Simulation, simulate
from lora_theory.simulation.results import from_runs
from lora_theory.theory import Prediction, predict

__all__ = ["FAILED", "RESULTS_VERSION", "SOURCES", "Row", "Task", "defaults_of"]

#: Raised when the same task would give rows of another meaning; results of others are not read.
RESULTS_VERSION = 2
SOURCES = ("theory", "simulation")
#: The status of rows that only say why there is no result.
FAILED = "failed"
#: Settings that say where, not what: rows hold them, names of results do not.
_ELSEWHERE = ("device",)
#: A row of the table: plain values by column.
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What is computed at once: the rows of one result file."""

    problem: Problem
    source: str  # "theory" or "simulation"
    settings: dict[str, Any]  # arguments of predict or simulate

    @property
    def identity(self) -> dict[str, Any]:
        """What the result depends on, defaults left out: new fields do not change it."""
        defaults = {spec.name: spec.default for spec in Problem.specs()}
        flat = self.problem.to_flat().items()
        known = defaults_of(self.source)
        return {
            "results_version": RESULTS_VERSION,
            "source": self.source,
            "problem": {name: value for name, value in flat if value != defaults[name]},
            # a second stage whose fields are all defaults is still asked for
            "finetuning": self.problem.finetuning is not None,
            "settings": {
                name: value
                for name, value in sorted(self.settings.items())
                if value != known[name] and name not in _ELSEWHERE
            },
        }

    @functools.cached_property
    def key(self) -> str:
        """The name of the result file: a hash of :attr:`identity`."""
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def rows(self) -> list[Row]:
        """Compute: one row for a prediction, one per run for simulations."""
        if self.source == "theory":
            return [self._labels() | _predicted(predict(self.problem, **self.settings))]
        runs = simulate(self.problem, **self.settings).runs
        return [self._labels() | _measured(from_runs(self.problem, [run])) for run in runs]

    def failure(self, error: str) -> list[Row]:
        """The same rows with nothing but the reason why there are no numbers."""
        dim, first = self.settings.get("dim"), self.settings.get("first", 0)
        shared = self._labels() | {"status": FAILED, "error": " ".join(error.split())}
        if self.source == "theory":
            return [shared]
        runs = range(first, first + self.settings["seeds"])
        return [shared | {"dim": dim, "seed": i, "root_seed": self.settings["seed"]} for i in runs]

    def _labels(self) -> Row:
        return {"source": self.source, **self.problem.to_flat()}


@functools.cache
def defaults_of(source: str) -> dict[str, Any]:
    """The defaults of the settings of a task, those of predict or simulate."""
    call = predict if source == "theory" else simulate
    return {name: entry.default for name, entry in inspect.signature(call).parameters.items()}


def _environment() -> Row:
    return {
        "results_version": RESULTS_VERSION,
        "lora_theory": installed_version("lora-theory"),
        "jax": jax.__version__,
        "numpy": np.__version__,
    }


def _predicted(prediction: Prediction) -> Row:
    """Values and quadrature errors (``.error``), statuses and residuals of both stages."""
    row: Row = {"status": prediction.status.value}
    for name in ("pretraining", "effective_noise", "finetuning"):
        stage = getattr(prediction, name)
        if stage is not None:
            row |= {f"{name}.{key}": value for key, value in _stage(stage)}
    device = jax.devices()[0]
    where = {"dtype": "float64", "device": device.device_kind, "platform": device.platform}
    return row | where | _environment()


def _stage(stage: Any) -> Iterator[tuple[str, Any]]:
    errors = stage.quadrature_error or {}
    for entry in dataclasses.fields(stage):
        value = getattr(stage, entry.name)
        if entry.name == "quadrature_error":
            continue
        yield entry.name, getattr(value, "value", value)
        if entry.name in errors:
            yield f"{entry.name}.error", errors[entry.name]


def _measured(simulation: Simulation) -> Row:
    """One run: its numbers under the names of the theory, and how its descents ended."""
    (run,) = simulation.runs
    labels = {
        "status": simulation.status.value,
        "dim": run["dim"],
        "seed": run["seed_index"],
        "root_seed": run["seed"],
    }
    rest = {name: v for name, v in run.items() if name not in ("dim", "seed", "seed_index")}
    return labels | rest | _environment()
