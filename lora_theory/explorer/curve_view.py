"""Curves of both stages along one field, and the trajectory of LoRA's overlap and error."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lora_theory.compare import Agreement
from lora_theory.explorer.answers import COARSE, FINE, Precision, asked, tried
from lora_theory.explorer.draw_curve import draw_curve, draw_trajectory
from lora_theory.explorer.points import (
    View,
    checked_field,
    every_second,
    geometric,
    grid,
    named,
    own_value,
    pending,
    precision_text,
    row_of,
    status_text,
    timed,
)
from lora_theory.explorer.stretches import path, stretches
from lora_theory.problem import Problem, ProblemError

__all__ = ["Measured", "curve", "trajectory"]

_FIRST = ("pretraining.test_error", "pretraining.overlap")
_SECOND = ("finetuning.test_error", "finetuning.frozen_test_error", "finetuning.overlap")


@dataclass(frozen=True)
class Measured:
    """Simulations of a problem, as :func:`lora_theory.compare` has them."""

    problem: Problem
    dims: tuple[int, ...]
    agreements: tuple[Agreement, ...]


def curve(
    problem: Problem,
    field: str,
    within: Sequence[float],
    points: int = 25,
    measured: Sequence[Measured] = (),
) -> Iterator[View]:
    """Errors and overlaps against a field: coarse over its range, then fine from the own value."""
    for table, done in _tables(problem, field, within, points, measured):
        caption = _curve_caption(table, field, done)
        yield View(table, caption, done, functools.partial(draw_curve, table))


def trajectory(
    problem: Problem,
    field: str,
    within: Sequence[float],
    points: int = 25,
    measured: Sequence[Measured] = (),
) -> Iterator[View]:
    """Overlap and error after LoRA as a field moves, and where a lower error has a worse overlap.

    The predictions are those of :func:`curve`.
    """
    if problem.finetuning is None:
        raise ProblemError(
            "a trajectory shows error and overlap after LoRA: give the problem finetuning.samples "
            "and finetuning.penalty"
        )
    for table, done in _tables(problem, field, within, points, measured):
        shown = table[table["observable"].isin(("finetuning.test_error", "finetuning.overlap"))]
        shown = shown.reset_index(drop=True)
        caption = _trajectory_caption(shown, field, done)
        yield View(shown, caption, done, functools.partial(draw_trajectory, shown))


def _tables(
    problem: Problem,
    field: str,
    within: Sequence[float],
    points: int,
    measured: Sequence[Measured],
) -> Iterator[tuple[pd.DataFrame, float]]:
    checked_field(problem, field)
    own, values = own_value(problem, field), grid(field, within, points)
    if own is not None:
        near = 1e-9 * abs(own)
        values = sorted([value for value in values if abs(value - own) > near] + [own])
    center = values.index(own) if own is not None else len(values) // 2
    outwards = sorted(range(len(values)), key=lambda i: (abs(i - center), i))
    coarse = sorted({*every_second(range(len(values))), center}, key=outwards.index)
    work = [(i, COARSE) for i in coarse] + [(i, FINE) for i in outwards]
    names = _FIRST if problem.finetuning is None else (*_FIRST, *_SECOND)
    labels = {"field": field, "logarithmic": geometric(*map(float, within))}
    simulated = _measured_rows(problem, field, measured, names, labels)
    rows = {
        i: [
            row_of(None, None, name, COARSE, **labels, x=value, chosen=i == center) | {field: value}
            for name in names
        ]
        for i, value in enumerate(values)
    }
    finished = 0

    def computed(job: tuple[int, Precision]) -> int:
        index, precision = job
        value = values[index]
        point = asked(lambda: problem.replace({field: value}))
        found = tried(point, precision)
        flat = problem if isinstance(point, ProblemError) else point
        here = labels | {"x": value, "chosen": index == center and own is not None}
        rows[index] = [row_of(flat, found, name, precision, **here) for name in names]
        for row in rows[index]:
            row[field] = value
        return index

    for part in timed(map(computed, work), len(coarse)):
        finished += len(part)
        table = pd.DataFrame([row for i in sorted(rows) for row in rows[i]] + simulated)
        yield table, finished / len(work)


def _measured_rows(
    problem: Problem,
    field: str,
    measured: Sequence[Measured],
    names: Sequence[str],
    labels: dict[str, Any],
) -> list[dict[str, Any]]:
    """Those that differ in the field alone."""

    def others(one: Problem) -> dict[str, Any]:
        return {name: value for name, value in one.to_flat().items() if name != field}

    rows = []
    for one in measured:
        value = own_value(one.problem, field)
        if value is None or others(one.problem) != others(problem):
            continue
        for agreement in one.agreements:
            if (name := f"{agreement.stage}.{agreement.observable}") in names:
                estimate = agreement.simulation
                rows.append(
                    {**labels, "x": value, "chosen": False, "source": "simulation",
                     "observable": name, "value": estimate.mean, "error": estimate.error,
                     "status": "measured", "dims": " ".join(map(str, one.dims)),
                     "runs": estimate.count, **one.problem.to_flat()}
                )  # fmt: skip
    return rows


def _points(table: pd.DataFrame) -> pd.DataFrame:
    """The theory, one row per point: the worst status is that of the last observable."""
    return (
        table[(table["source"] == "theory") & ~pending(table)]
        .groupby("x", sort=True)
        .last()
        .reset_index()
    )


def _shared(
    table: pd.DataFrame, field: str, done: float, marks: tuple[str, str] = ("shaded", "marked ×")
) -> str:
    points, theory = _points(table), table[table["source"] == "theory"]
    own = points[points["chosen"]]
    fine = int((points["precision"] == "fine").sum())
    x = table.loc[table["source"] == "theory", "x"]
    text = f"{x.nunique()} values of {field} from {x.min():g} to {x.max():g}"
    if len(own):
        at = own["x"].iloc[0]
        marked = "marked" if at > 0 or not own["logarithmic"].iloc[0] else "not on this axis"
        text += f", the chosen {at:g} {marked}"
    if done < 1:
        text += f"; {fine} of them refined yet, the pale dotted rest and its flags are preliminary"
    parts = [f"{text}.", precision_text(theory), status_text(points["status"], marks)]
    simulated = table[table["source"] == "simulation"]
    if len(simulated):
        dims = " and ".join(sorted(set(simulated["dims"])))
        runs = simulated["runs"].astype(int)
        count = " to ".join(map(str, sorted({int(runs.min()), int(runs.max())})))
        offset = "" if " " in dims else ", the offset of finite D included"
        parts.append(
            f"Points with bars: simulation ± standard error, D = {dims}, {count} runs{offset}."
        )
    return " ".join(filter(None, parts))


def _curve_caption(table: pd.DataFrame, field: str, done: float) -> str:
    stages = "pre-training (E) and after LoRA (E')"
    if not table["observable"].str.startswith("finetuning").any():
        stages = "pre-training (E)"
    return (
        f"Test errors, label noise included, and overlaps of {stages} against {named(field)}; "
        f"bands are quadrature errors. {_shared(table, field, done)}"
    )


def _trajectory_caption(table: pd.DataFrame, field: str, done: float) -> str:
    found = [stretch for stretch in stretches(table) if stretch.mismatch]
    decided = [stretch for stretch in found if stretch.decided]
    if decided:
        where = ", ".join(f"from {s.start:.3g} to {s.end:.3g}" for s in decided)
        text = (
            f"Mismatch, a lower error with a worse alignment (thick): {where} (up to the spacing "
            "of the points)."
        )
    else:
        text = (
            "No mismatch: between no two neighbouring points do E' and o fall together by more "
            "than their errors."
        )
    if len(found) > len(decided):
        text += f" Within the quadrature errors, not counted: {len(found) - len(decided)}."
    if done < 1:
        text += " Preliminary."
    if path(table)["o"].notna().sum() < 2:
        text = ""
    return (
        f"Test error E' after LoRA against its overlap o as {named(field)} moves, which rises "
        f"along the arrow. {text} {_shared(table, field, done, ('marked ×', 'left out'))}"
    )
