"""One observable over two fields, filled in from coarse to fine."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lora_theory.explorer.answers import COARSE, Precision, asked, tried
from lora_theory.explorer.draw_map import draw_map
from lora_theory.explorer.points import (
    OBSERVABLES,
    View,
    checked_field,
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
from lora_theory.problem import Problem, ProblemError
from lora_theory.status import Status

__all__ = ["phase_map"]


def phase_map(
    problem: Problem,
    x: str,
    x_within: Sequence[float],
    y: str,
    y_within: Sequence[float],
    observable: str,
    points: int = 9,
    precision: Precision = COARSE,
) -> Iterator[View]:
    """An observable of :data:`OBSERVABLES` over two fields; every fourth cell first, then all."""
    _check(problem, x, y, observable)
    across, upwards = grid(x, x_within, points), grid(y, y_within, points)
    shared = {
        "x_field": x, "y_field": y,
        "x_logarithmic": geometric(*map(float, x_within)),
        "y_logarithmic": geometric(*map(float, y_within)),
        "x_own": own_value(problem, x), "y_own": own_value(problem, y),
    }  # fmt: skip
    rows = {
        (i, j): row_of(None, None, observable, precision, **shared, x=a, y=b)
        for j, b in enumerate(upwards)
        for i, a in enumerate(across)
    }

    def computed(cell: tuple[int, int]) -> tuple[int, int]:
        i, j = cell
        changes = {x: across[i], y: upwards[j]}
        point = asked(lambda: problem.replace(changes))
        found = tried(point, precision)
        flat = problem if isinstance(point, ProblemError) else point
        labels: dict[str, Any] = {**shared, "x": across[i], "y": upwards[j]}
        rows[cell] = row_of(flat, found, observable, precision, **labels) | changes
        return cell

    finished = 0
    order = _order(len(across), len(upwards))
    coarsest = sum(1 for i, j in order if i % 4 == j % 4 == 0)
    for part in timed(map(computed, order), coarsest):
        finished += len(part)
        table = pd.DataFrame(list(rows.values()))
        done = finished / len(rows)
        yield View(table, _caption(table, done), done, functools.partial(draw_map, table))


def _check(problem: Problem, x: str, y: str, observable: str) -> None:
    for field in (x, y):
        checked_field(problem, field)
    if x == y:
        raise ProblemError(f"x = y = {x!r} is not allowed: a map needs two different fields")
    if observable not in OBSERVABLES:
        names = ", ".join(OBSERVABLES)
        raise ProblemError(f"observable = {observable!r} is not allowed: it must be one of {names}")
    if problem.finetuning is None and (observable == "gain" or observable.startswith("finetuning")):
        raise ProblemError(
            f"observable = {observable!r} is not allowed without fine-tuning: give the problem "
            "finetuning.samples and finetuning.penalty"
        )


def _order(columns: int, rows: int) -> list[tuple[int, int]]:
    """Cells of every fourth column and row first, then of every second, then the rest."""

    def level(cell: tuple[int, int]) -> tuple[int, int, int]:
        i, j = cell
        coarse = 0 if i % 4 == j % 4 == 0 else 1 if i % 2 == j % 2 == 0 else 2
        return coarse, j, i

    return sorted(((i, j) for j in range(rows) for i in range(columns)), key=level)


def _caption(table: pd.DataFrame, done: float) -> str:
    name = table["observable"].iloc[0]
    symbol, words = OBSERVABLES[name]
    x, y = table["x_field"].iloc[0], table["y_field"].iloc[0]
    known = ~pending(table)
    text = f"{words[:1].upper()}{words[1:]}, {symbol}, over {named(x)} and {named(y)}"
    text += f", {len(table)} cells" if done == 1 else f", {known.sum()} of {len(table)} cells yet"
    parts = [f"{text}."]
    if name == "gain":
        solved = table["status"] != Status.NOT_CONVERGED.value
        values = table["value"].where(solved).to_numpy(float)
        errors, finite = table["error"].to_numpy(float), int(np.isfinite(values).sum())
        worse, unknown = int((values < -errors).sum()), int((np.abs(values) <= errors).sum())
        parts.append(
            f"Black line: no gain; LoRA is worse than the frozen weights in {worse} of {finite} "
            f"cells, and within the quadrature errors neither in {unknown}."
        )
    if _inside(table):
        parts.append("Star: the chosen problem.")
    flags = status_text(table.loc[known, "status"], ("dotted", "crossed"), "cells")
    parts += [precision_text(table), flags]
    if "coarse" in set(table["precision"]) and Status.UNSTABLE.value in set(table["status"]):
        parts.append("With so few nodes that is a rough flag: more of them may clear it.")
    return " ".join(filter(None, parts))


def _inside(table: pd.DataFrame) -> bool:
    row = table.iloc[0]
    return all(
        pd.notna(row[f"{axis}_own"])
        and table[axis].min() <= row[f"{axis}_own"] <= table[axis].max()
        for axis in ("x", "y")
    )
