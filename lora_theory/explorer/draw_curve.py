"""Drawing of curves and trajectories, from their tables alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lora_theory.explorer.drawing import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    RED,
    figure_of,
    gap_handles,
    label_field,
    legend_below,
    mark_gaps,
    mark_own,
    shade_unstable,
)
from lora_theory.explorer.points import named, pending
from lora_theory.explorer.stretches import path, stretches
from lora_theory.status import Status

__all__ = ["draw_curve", "draw_trajectory"]

#: Panels of a curve: observables with words, colour, line style and marker.
_ERRORS = {
    "pretraining.test_error": ("E, pre-training", BLACK, "-", "o"),
    "finetuning.test_error": ("E', LoRA", BLUE, "--", "s"),
    "finetuning.frozen_test_error": ("E', frozen weights", ORANGE, "-.", "^"),
}
_OVERLAPS = {
    "pretraining.overlap": ("pre-training", BLACK, "-", "o"),
    "finetuning.overlap": ("LoRA", BLUE, "--", "s"),
}
#: From this overlap on the axis is that of 1 − o.
_ALIGNED = 0.9
_PANELS = {"test error": _ERRORS, "overlap": _OVERLAPS}


def draw_curve(table: pd.DataFrame) -> Figure:
    """Errors on the left, overlaps on the right."""
    figure, panels = figure_of(1, 2)
    field, logarithmic = table["field"].iloc[0], bool(table["logarithmic"].iloc[0])
    theory = table[(table["source"] == "theory") & ~pending(table)]
    own = theory.loc[theory["chosen"], "x"]
    handles = []
    for panel, (name, looks) in zip(panels[0], _PANELS.items(), strict=True):
        if logarithmic:
            panel.set_xscale("log")
        for observable, (words, *look) in looks.items():
            rows = table[table["observable"] == observable]
            if len(rows):
                _draw_line(panel, rows, *look)
                if looks is _ERRORS:
                    handles.append(_line(words, *look))
        panel.set_ylabel(name)
        x = table["x"][table["x"] > 0] if logarithmic else table["x"]
        margin = 0.0 if logarithmic else 0.02 * float(np.ptp(x))
        panel.set_xlim(x.min() - margin, x.max() + margin)
        label_field(panel.xaxis, field, logarithmic)
        mark_own(panel, float(own.iloc[0]) if len(own) else None)
        last = theory.groupby("x").last().reset_index()
        mark_gaps(panel, last)
    panels[0, 0].set_ylim(bottom=0)
    if theory["precision"].eq("coarse").any():
        handles.append(Line2D([], [], color=GREY, ls=(0, (1, 1.5)), lw=1, label="preliminary"))
    legend_below(figure, handles + gap_handles(theory), 5)
    return figure


def _line(words: str, color: str, dashes: Any, marker: str) -> Line2D:
    return Line2D([], [], color=color, linestyle=dashes, marker=marker, ms=4, label=words)


def _draw_line(panel: Any, rows: pd.DataFrame, color: str, dashes: str, marker: str) -> None:
    theory = rows[(rows["source"] == "theory") & ~pending(rows)]
    simulated = rows[rows["source"] == "simulation"]
    x = theory["x"].to_numpy(float)
    solved = (theory["status"] != Status.NOT_CONVERGED.value).to_numpy()
    y = np.where(solved, theory["value"].to_numpy(float), np.nan)
    error = theory["error"].to_numpy(float)
    fine = (theory["precision"] == "fine").to_numpy()
    panel.plot(x, y, color=color, linestyle=(0, (1, 1.5)), linewidth=1.0, alpha=0.45)
    panel.plot(x[fine], y[fine], color=color, linestyle=dashes, linewidth=1.4)
    panel.fill_between(x, y - error, y + error, color=color, alpha=0.13, linewidth=0)
    unstable = (theory["status"] == Status.UNSTABLE.value).to_numpy()
    shade_unstable(panel, x, y, unstable, color)
    own = theory["chosen"].to_numpy(bool)
    panel.plot(x[own], y[own], marker, color=color, ms=5, zorder=4)
    if len(simulated):
        panel.errorbar(
            simulated["x"], simulated["value"], simulated["error"].astype(float), fmt=marker,
            color=color, mfc="white", ms=4.5, capsize=2, linewidth=1, zorder=5,
        )  # fmt: skip


def draw_trajectory(table: pd.DataFrame) -> Figure:
    """E' against o, with values of the field along the line."""
    figure, panels = figure_of(1, 1, 4.2)
    panel, points = panels[0, 0], path(table)
    fine = (points["precision"] == "fine").to_numpy()
    o, error = points["o"].to_numpy(), points["E"].to_numpy()
    panel.plot(o, error, color=GREY, linestyle=(0, (1, 1.5)), linewidth=1.0)
    panel.plot(o[fine], error[fine], color=BLACK, linewidth=1.2)
    found = [stretch for stretch in stretches(table) if stretch.mismatch and stretch.decided]
    for stretch in found:
        part = points[points["x"].between(stretch.start, stretch.end)]
        panel.plot(part["o"], part["E"], color=RED, linewidth=3.2, linestyle=(0, (2, 0.7)))
    unstable = points["status"] == Status.UNSTABLE.value
    panel.plot(o[unstable], error[unstable], "x", color=GREY, ms=4)
    own = points["chosen"].to_numpy(bool)
    panel.plot(o[own], error[own], "*", color=BLUE, ms=13, mec="white", zorder=6)
    _draw_measured(panel, table)
    _stretch_axes(panel, points)
    _draw_arrow(panel, points[fine] if fine.sum() > 2 else points)
    _write_values(panel, points)
    stretched = panel.get_xscale() == "function"
    scale = ", on the scale of log(1 − o)" if stretched else ""
    panel.set_xlabel(f"overlap o of LoRA and task{scale}")
    panel.set_ylabel("test error E' after LoRA")
    handles = [
        Line2D([], [], color=BLACK, lw=1.2, label=f"along {named(table['field'].iloc[0])}"),
        Line2D([], [], color=BLUE, marker="*", ms=9, mec="white", ls="", label="chosen problem"),
    ]
    if found:
        words = "mismatch: lower error, worse alignment"
        handles.append(Line2D([], [], color=RED, lw=3.2, ls=(0, (2, 0.7)), label=words))
    if unstable.any():
        handles.append(Line2D([], [], color=GREY, marker="x", ls="", ms=4, label="unstable"))
    if not fine.all():
        handles.append(Line2D([], [], color=GREY, ls=(0, (1, 1.5)), lw=1, label="preliminary"))
    legend_below(figure, handles, 3)
    return figure


def _draw_measured(panel: Any, table: pd.DataFrame) -> None:
    rows = table[table["source"] == "simulation"]
    for _, both in rows.groupby(["x", "dims"] if len(rows) else "x"):
        pair = both.set_index("observable")
        if {"finetuning.test_error", "finetuning.overlap"} <= set(pair.index):
            vertical, across = pair.loc["finetuning.test_error"], pair.loc["finetuning.overlap"]
            panel.errorbar(
                across["value"], vertical["value"], vertical["error"], across["error"], fmt="s",
                color=BLUE, mfc="white", ms=4.5, capsize=2, linewidth=1, zorder=5,
            )  # fmt: skip


def _places(panel: Any, points: pd.DataFrame) -> tuple[pd.DataFrame, Any]:
    """The points that are known, and where they are in the panel, whose limits they set."""
    known = points[np.isfinite(points["o"]) & np.isfinite(points["E"])]
    panel.autoscale_view()
    to_panel = panel.transData + panel.transAxes.inverted()
    return known, to_panel.transform(known[["o", "E"]].to_numpy(float)) if len(known) else []


def _draw_arrow(panel: Any, points: pd.DataFrame) -> None:
    """One arrow along the line, in the direction in which the field rises."""
    _, places = _places(panel, points)
    if len(places) < 2:
        return
    steps = np.diff(places, axis=0)
    start = int(np.argmax(np.hypot(*steps.T)))
    panel.annotate(
        "", places[start] + 0.6 * steps[start], places[start] + 0.4 * steps[start],
        xycoords="axes fraction", textcoords="axes fraction",
        arrowprops={"arrowstyle": "-|>,head_width=.35,head_length=.7", "color": BLACK},
    )  # fmt: skip


def _stretch_axes(panel: Any, points: pd.DataFrame) -> None:
    """Logarithmic in 1 − o near 1, and in E' where it varies much."""
    o, error = points["o"].to_numpy(float), points["E"].to_numpy(float)
    o, error = o[np.isfinite(o)], error[np.isfinite(error)]
    if len(o) and _ALIGNED < o.max() < 1:
        panel.set_xscale("function", functions=(_far, _near))
        distances = [d * 10.0**-k for k in range(9) for d in (1, 0.5, 0.2)]
        margin = 1.25
        low, high = 1 - margin * (1 - o.min()), 1 - (1 - o.max()) / margin
        panel.set_xlim(low, high)
        ticks = [1 - distance for distance in distances if low <= 1 - distance <= high]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    if len(error) and error.max() > 3 * error.min() > 0:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())


def _far(overlap: Any) -> Any:
    return -np.log(np.maximum(1 - np.asarray(overlap, float), 1e-12))


def _near(distance: Any) -> Any:
    return 1 - np.exp(-np.asarray(distance, float))


def _write_values(panel: Any, points: pd.DataFrame) -> None:
    """A few values of the field beside their points, the chosen one first."""
    known, places = _places(panel, points)
    taken: list[Any] = []
    for i in np.argsort(~known["chosen"].to_numpy(bool), kind="stable"):
        row, here = known.iloc[i], places[i]
        if any(np.abs(here - other).max() < 0.11 for other in taken):
            continue
        taken.append(here)
        weight = "bold" if row["chosen"] else "normal"
        panel.annotate(
            f"{row['x']:.3g}", (row["o"], row["E"]), (4, 4), textcoords="offset points",
            fontsize=7, fontweight=weight,
        )  # fmt: skip
