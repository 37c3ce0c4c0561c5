"""Drawing of the effective noise in parts, from its table alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from lora_theory.explorer.drawing import (
    BLACK,
    BLUE,
    GREY,
    RED,
    gap_handles,
    label_field,
    legend_below,
    mark_gaps,
    mark_own,
    shade_unstable,
    style,
)
from lora_theory.status import Status

__all__ = ["draw_noise"]

_PENALTY, _RESCALING = "pretraining.penalty", "finetuning.rescaling"
#: Areas from below: dark to light, so that they stay apart in greyscale.
_AREAS = {
    "label_noise": ("label noise Δ/2", "#3B4A5A", ""),
    "not_learned": ("not learned, Q₀ − M²/Q", "#56B4E9", ""),
    "wrong_scale": ("wrong scale, (1 − g)²Q", "#F5D98B", "////"),
}


def draw_noise(table: pd.DataFrame) -> Figure:
    """Parts against λ; against β, above E' where there is fine-tuning."""
    error = table[table["observable"] == "finetuning.test_error"]
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    columns = figure.add_gridspec(1, 2)
    left, right = columns[0], columns[1]
    first = figure.add_subplot(left)
    inner = right.subgridspec(2, 1, height_ratios=(1.5, 1)) if len(error) else None
    second = figure.add_subplot(right if inner is None else inner[0])
    for panel, field in ((first, _PENALTY), (second, _RESCALING)):
        style(panel)
        _draw_parts(panel, table[table["field"] == field])
        label_field(panel.xaxis, field, logarithmic=True)
        panel.set_ylabel("effective noise")
    if inner is not None:
        third = figure.add_subplot(inner[1], sharex=second)
        style(third)
        _draw_error(third, table[table["field"] == _RESCALING], error)
        label_field(third.xaxis, _RESCALING, logarithmic=True)
        second.set_xlabel("")
        second.tick_params(labelbottom=False)
    handles: list[Any] = [
        Patch(facecolor=color, hatch=hatch, edgecolor="0.4", lw=0, label=words)
        for words, color, hatch in _AREAS.values()
    ]
    handles.append(Line2D([], [], color=BLACK, lw=1.4, label="sum Δ_eff"))
    if (table["observable"] == "training").any():
        words = "noise of the training sequences"
        handles.append(Line2D([], [], color=RED, ls="-.", lw=1.6, label=words))
    handles.append(Line2D([], [], color=BLACK, ls=(0, (4, 2)), lw=1.2, label="best λ*, β*"))
    handles.append(Line2D([], [], color=GREY, ls=":", lw=1.2, label="chosen"))
    legend_below(figure, handles + gap_handles(table), 3)
    return figure


def _draw_parts(panel: Any, rows: pd.DataFrame) -> None:
    panel.set_xscale("log")
    total = rows[rows["observable"] == "total"].sort_values("x")
    bad = (total["status"] == Status.NOT_CONVERGED.value).to_numpy()
    x = total["x"].to_numpy(float)
    height, below = np.zeros(len(x)), np.zeros(len(x))
    for name, (_, color, hatch) in _AREAS.items():
        part = rows[rows["observable"] == name].set_index("x")["value"].reindex(x)
        height = below + np.where(bad, np.nan, part.to_numpy(float))
        panel.fill_between(
            x, below, height, facecolor=color, hatch=hatch, edgecolor="0.6" if hatch else color,
            linewidth=0, alpha=0.9,
        )  # fmt: skip
        below = height
    panel.plot(x, below, color=BLACK, linewidth=1.4)
    shade_unstable(panel, x, below, total["status"] == Status.UNSTABLE.value, BLACK)
    training = rows[rows["observable"] == "training"].sort_values("x")
    panel.plot(
        training["x"], training["value"], color=RED, linestyle="-.", linewidth=1.6,
        path_effects=[withStroke(linewidth=3.2, foreground="white")],
    )  # fmt: skip
    best, own = rows[rows["observable"] == "best"], total.loc[total["chosen"], "x"]
    _mark(panel, best, own)
    top = float(np.nanmax(below)) if np.isfinite(below).any() else 1.0
    # far from β* the wrong scale is much larger than what is of interest
    middle = float(np.nanmedian(below)) if np.isfinite(below).any() else 1.0
    panel.set_ylim(0, min(1.06 * top, 5 * middle))
    if len(x) > 1:
        panel.set_xlim(x[0], x[-1])
    mark_gaps(panel, total)


def _mark(panel: Any, best: pd.DataFrame, own: pd.Series) -> None:
    if len(best):
        panel.axvline(best["x"].iloc[0], color=BLACK, linestyle=(0, (4, 2)), linewidth=1.2)
    if len(own):
        mark_own(panel, float(own.iloc[0]))
        panel.lines[-1].set(zorder=3, color=GREY, linewidth=1.4)


def _draw_error(panel: Any, rows: pd.DataFrame, error: pd.DataFrame) -> None:
    panel.set_xscale("log")
    kept = error[error["status"] != Status.NOT_CONVERGED.value].sort_values("x")
    x, y = kept["x"].to_numpy(float), kept["value"].to_numpy(float)
    panel.plot(x, y, color=BLUE, linestyle="--", marker="o", ms=3, linewidth=1.3)
    if len(y):
        panel.plot(x[np.argmin(y)], y.min(), "o", color=BLUE, mfc="none", ms=8)
    panel.fill_between(x, y - kept["error"], y + kept["error"], color=BLUE, alpha=0.2, lw=0)
    shade_unstable(panel, x, y, kept["status"] == Status.UNSTABLE.value, BLUE)
    total = rows[rows["observable"] == "total"]
    _mark(panel, rows[rows["observable"] == "best"], total.loc[total["chosen"], "x"])
    mark_gaps(panel, error)
    if len(y):
        panel.set_ylim(0.9 * y.min(), min(1.05 * y.max(), 4 * float(np.median(y))))
    panel.set_ylabel("E' after LoRA")
