"""How long a task will take and how much memory it needs, roughly, before it is run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from lora_theory.problem import ProblemError
from lora_theory.simulation.sizes import Sizes
from lora_theory.sweeps.tasks import Task, defaults_of
from lora_theory.theory.nodes import Discretisation

__all__ = ["calibration", "expected_memory", "expected_seconds"]

#: Measured on one core: seconds per node and per prediction, by tokens, and per iteration of one
#: run the multiplications and additions per second in float64; iterations at moderate penalties.
_SECONDS_PER_NODE = {1: 3e-5, 2: 6e-5, 3: 1e-4, 4: 4e-4}
_LINEAR_SECONDS, _MOST_PER_NODE = 0.2, 1e-3
_FLOPS, _ITERATIONS = 1.5e10, 150
_BASE_MEMORY, _BYTES = 0.8 * 2**30, 48


def expected_seconds(task: Task) -> float:
    """Seconds of one task on one core, without compilation: right within a factor of a few."""
    problem, settings = task.problem, task.settings
    if task.source == "theory":
        if problem.activation == "linear":
            return _LINEAR_SECONDS
        nodes = Discretisation(
            **{name: (defaults_of("theory") | settings)[name] for name in Discretisation._fields}
        )
        points = nodes.points(problem.tokens) * nodes.blocks
        return 0.5 + 2.0 * points * _SECONDS_PER_NODE.get(problem.tokens, _MOST_PER_NODE)
    sizes = _sizes(task)
    if sizes is None:
        return 0.0
    rows = 0 if _sampled(task) else sizes.pretraining_sequences * sizes.tokens
    step = 4.0 * rows * sizes.dim * sizes.student_rank
    fast = 2 if settings.get("dtype") == "float32" else 1
    return float(settings["seeds"] * (step * _ITERATIONS / _FLOPS / fast + 0.2))


def expected_memory(task: Task) -> float:
    """Bytes that the worker of a task needs at most, roughly."""
    sizes = _sizes(task) if task.source == "simulation" else None
    if sizes is None:
        return _BASE_MEMORY
    first = sizes.dim if _sampled(task) else sizes.pretraining_sequences
    sequences = max(first, sizes.finetuning_sequences)
    width = 0.5 if task.settings.get("dtype") == "float32" else 1.0
    runs = int(min(task.settings.get("batch", 1), task.settings["seeds"]))
    return _BASE_MEMORY + runs * width * _BYTES * sequences * sizes.tokens * sizes.dim


def calibration(log: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Median ratio of measured to expected seconds of the tasks in a log, by source."""
    ratios: dict[str, list[float]] = {}
    for entry in log:
        if entry.get("expected", 0) > 0 and entry.get("error") is None:
            ratios.setdefault(entry["source"], []).append(entry["seconds"] / entry["expected"])
    return {source: statistics.median(found) for source, found in ratios.items()}


def _sampled(task: Task) -> bool:
    return bool(task.settings.get("pretrained") == "sampled")


def _sizes(task: Task) -> Sizes | None:
    """None where the system cannot be simulated: such a task fails at once."""
    try:
        return Sizes.of(task.problem, task.settings["dim"], trained=not _sampled(task))
    except ProblemError:
        return None
