"""Results as text for people: aligned columns, ``value ± error``, statuses with their remedy."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lora_theory.observables import Estimate
from lora_theory.problem import Problem
from lora_theory.status import Status

if TYPE_CHECKING:
    from lora_theory.compare import Comparison
    from lora_theory.simulation import Simulation
    from lora_theory.sweeps import Plan, Summary
    from lora_theory.sweeps.tasks import Task
    from lora_theory.theory import LearnedSpectrum, Optimum, Prediction, Thresholds

__all__ = [
    "aligned", "comparison_table", "optimum_table", "plan_table", "prediction_table",
    "simulation_table", "spectrum_table", "sweep_table", "thresholds_table",
]  # fmt: skip

#: A relative error this small is floating-point noise in an exact number.
_ROUNDING = 1e-12
#: Tasks that a plan lists by name.
_SHOWN = 20
_BRANCH_COLUMNS = ("potential", "overlap", "test_error")


def prediction_table(prediction: Prediction) -> str:
    """Both stages, the effective noise and the branches, with quadrature errors."""
    lines = _head(prediction.problem, prediction.status, errors="± quadrature error")
    stages: list[tuple[str, Any]] = [
        ("pretraining", prediction.pretraining),
        ("effective_noise", prediction.effective_noise),
        ("finetuning", prediction.finetuning),
    ]
    for title, stage in stages:
        if stage is None:
            continue
        notes = [stage.branch] if title == "finetuning" else []
        if hasattr(stage, "status"):
            notes += [stage.status.value, f"relative residual {stage.residual:.1e}"]
        lines += ["", _title(title, notes)]
        lines += aligned(_predicted_rows(stage), indent=2)
    if len(prediction.branches) > 1:
        lines += ["", "branches (least potential first)"]
        rows: list[Sequence[str]] = [("branch", "status", *_BRANCH_COLUMNS)]
        for branch in prediction.branches:
            values = (_predicted(branch, name) for name in _BRANCH_COLUMNS)
            rows.append((branch.branch, branch.status.value, *values))
        lines += aligned(rows, indent=2)
    return "\n".join(lines)


def thresholds_table(found: Thresholds) -> str:
    """Each threshold with its error and what it is a value of; why the others are none."""
    fields = {"interpolation": "pretraining.samples", "ridgeless_Q": "Q", "ridgeless_M": "M"}
    rows: list[Sequence[str]] = [("threshold", "of", "value")]
    for name, error in found.errors.items():
        value = getattr(found, name)
        shown = "none" if value is None else _with_error(value, error)
        rows.append((name, fields.get(name, "finetuning.samples"), shown))
    lines = [*_wrapped("problem", _fields(found.problem)), "", *aligned(rows)]
    for name, reason in found.reasons.items():
        lines += textwrap.wrap(f"{name}: {reason}", 100, subsequent_indent="  ")
    return "\n".join(lines)


def optimum_table(found: Optimum) -> str:
    """Where the objective is best, with errors from a second set of nodes."""
    goal = f"minimised: {found.minimised}" if found.minimised else f"maximised: {found.maximised}"
    rows: list[Sequence[str]] = [("field", "optimum", "from", "to", "")]
    for name, value in found.optimum.items():
        ends = [_plain(end) for end in found.within[name]]
        edge = "at the end of its box" if name in found.at_bound else ""
        rows.append((name, _with_error(value, found.errors[name]), *ends, edge))
    lines = [*_head(found.problem, found.status, errors="± error from other nodes"), "", goal]
    lines += aligned([("value", _with_error(found.objective, found.errors["objective"])),
                      ("gradient_norm", _plain(found.gradient_norm))], indent=2)  # fmt: skip
    return "\n".join([*lines, "", *aligned(rows)])


def spectrum_table(learned: LearnedSpectrum) -> str:
    """Bands, mass at zero and outliers of the learned spectrum, with quadrature errors."""
    lines = _head(learned.problem, learned.status, errors="± quadrature error")
    names = ("mass_at_zero", "rank", "effective_rank", "mean", "second_moment")
    lines += ["", "eigenvalues (shares and means over D)"]
    lines += aligned([(name, _predicted(learned, name)) for name in names], indent=2)
    error = learned.quadrature_error
    rows: list[Sequence[str]] = [("band", "from", "to")]
    for number, ends in enumerate(learned.bands, 1):
        rows.append((str(number), *(_with_error(end, error["bands"]) for end in ends)))
    lines += ["", "bands", *aligned(rows, indent=2)]
    rows = [("spike", "eigenvalue", "squared_overlap")]
    for outlier in learned.outliers:
        where = _with_error(outlier.eigenvalue, error["outliers"])
        rows.append((_plain(outlier.spike), where, _plain(outlier.squared_overlap)))
    below, above = ("none" if s is None else _plain(s) for s in learned.visible_spikes)
    lines += ["", f"outliers (spikes seen below: {below}, above: {above})"]
    lines += aligned(rows, indent=2) if learned.outliers else []
    if learned.merged is not None:
        values = dataclasses.asdict(learned.merged).items()
        shown = [(name, "none" if value is None else _plain(value)) for name, value in values]
        lines += ["", "merged LoRA", *aligned(shown, indent=2)]
    return "\n".join(lines)


def simulation_table(simulation: Simulation) -> str:
    """Both stages and the random starts, with standard errors over the seeds."""
    environment = simulation.environment
    runs = f"{simulation.seeds} run" + ("s" if simulation.seeds > 1 else "")
    lines = _head(
        simulation.problem,
        simulation.status,
        system=f"D = {simulation.dim}, {runs}, root seed {environment['seed']}, "
        f"{environment['dtype']} on {environment['device']}",
        errors="standard errors over the runs",
    )
    informed, random = simulation.finetuning, simulation.finetuning_random
    lines += _measured("pretraining", [], [simulation.pretraining])
    lines += _measured("effective_noise", [], [simulation.effective_noise])
    if informed is not None:
        lines += _measured("finetuning", ["from w*"], [informed])
    if random is not None:
        note = "lowest loss; mean over the starts"
        lines += _measured("finetuning_random", [note], [random, random.start_mean])
    return "\n".join(lines)


def comparison_table(comparison: Comparison) -> str:
    """Theory beside simulation: value ± quadrature error, mean ± standard error, z-score."""
    dims = ", ".join(str(simulation.dim) for simulation in comparison.simulations)
    several = ", extrapolated to D → ∞" if len(comparison.simulations) > 1 else ""
    lines = _head(
        comparison.problem,
        comparison.status,
        system=f"D = {dims}{several}",
        errors="± quadrature error (theory), ± standard error over the runs (simulation)",
    )
    by_stage = groupby(comparison.agreements, key=lambda agreement: agreement.stage)
    for stage, agreements in by_stage:
        rows: list[Sequence[str]] = [("", "theory", "simulation", "z")]
        for agreement in agreements:
            theory = _with_error(agreement.theory, agreement.quadrature_error)
            z = "" if agreement.z is None else f"{agreement.z:+.1f}"
            rows.append((agreement.observable, theory, str(agreement.simulation), z))
        lines += ["", stage, *aligned(rows, indent=2)]
    return "\n".join(lines)


def sweep_table(summary: Summary) -> str:
    """Rows by source and status, and where they are."""
    rows = [(name, str(count)) for name, count in summary.rows.items()]
    return "\n".join([*aligned([("rows", ""), *rows]), "", f"table    {summary.table}"])


def plan_table(plan: Plan) -> str:
    """The first tasks to be computed, and what all of them would take."""
    lines = [
        f"{task.source:<12}" + ", ".join(f"{n} = {_plain(v)}" for n, v in _varying(task, plan))
        for task in plan.missing[:_SHOWN]
    ]
    if len(plan.missing) > _SHOWN:
        lines.append(f"… and {len(plan.missing) - _SHOWN:,} more")
    if plan.impossible:
        lines.append(f"{plan.impossible} of them will fail: their D does not fit their problem")
    hours, minutes = divmod(round(plan.seconds / 60), 60)
    took = f"{hours} h {minutes} min" if hours else f"{minutes} min"
    if plan.seconds < 120:
        took = f"{plan.seconds:.0f} s"
    return "\n".join(
        [
            *lines,
            "",
            f"tasks    {len(plan.tasks):,}, {len(plan.missing):,} of them to do",
            f"time     about {took} on one core, within a factor of a few, compilation apart",
            f"memory   about {plan.memory / 2**30:.1f} GiB per worker",
        ]
    )


def _varying(task: Task, plan: Plan) -> Iterable[tuple[str, Any]]:
    """The fields and settings of a task that are not the same in all."""
    own, *others = (
        {**other.problem.to_flat(), **other.settings} for other in (task, *plan.tasks[:_SHOWN])
    )
    for name, value in own.items():
        if name in ("dim", "first", "seeds") or any(o.get(name, value) != value for o in others):
            yield name, value


def aligned(rows: Iterable[Sequence[str]], indent: int = 0) -> list[str]:
    """Rows of cells as lines with aligned columns.

    Example:
        >>> print(*aligned([("name", "value"), ("Q", "1.7")]), sep="|")
        name  value|Q     1.7
    """
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
    return [" " * indent + line.rstrip() for line in padded]


def _head(problem: Problem, status: Status, **more: str) -> list[str]:
    rows = {"status": f"{status.value}: {status.remedy}", "problem": _fields(problem), **more}
    return [line for name, text in rows.items() for line in _wrapped(name, text)]


def _fields(problem: Problem) -> str:
    return ", ".join(f"{name}={_plain(value)}" for name, value in problem.to_flat().items())


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(f"{name:<9}{text}", 100, subsequent_indent=" " * 9, break_on_hyphens=False)


def _title(name: str, notes: Iterable[str]) -> str:
    text = ", ".join(notes)
    return f"{name} ({text})" if text else name


def _predicted_rows(stage: Any) -> Iterable[tuple[str, str]]:
    for entry in dataclasses.fields(stage):
        if isinstance(getattr(stage, entry.name), float) and entry.name != "residual":
            yield entry.name, _predicted(stage, entry.name)


def _predicted(stage: Any, name: str) -> str:
    value, errors = getattr(stage, name), stage.quadrature_error or {}
    return _with_error(value, errors.get(name))


def _with_error(value: float, error: float | None) -> str:
    if math.isnan(value):
        return "undefined"
    rounding = error is None or error <= _ROUNDING * abs(value)
    return str(Estimate(value, None if rounding else error, 1))


def _measured(name: str, notes: list[str], stages: Sequence[Any]) -> list[str]:
    missed = getattr(stages[-1], "missed", 0)
    if missed:
        notes = [*notes, f"{missed} descents missed the gradient tolerance"]
    names = [f.name for f in dataclasses.fields(stages[0])]
    names = [name for name in names if isinstance(getattr(stages[0], name), Estimate)]
    rows = [(name, *(str(getattr(stage, name)) for stage in stages)) for name in names]
    return ["", _title(name, notes), *aligned(rows, indent=2)]


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
