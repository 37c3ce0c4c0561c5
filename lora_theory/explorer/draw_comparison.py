"""Drawing of theory beside simulations, from its table alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

from lora_theory.explorer.drawing import BLACK, BLUE, RED, figure_of, legend_below

__all__ = ["draw_comparison", "far_z"]

_NAMES = {
    "pretraining.Q": "Q", "pretraining.M": "M", "pretraining.overlap": "overlap, pre-training",
    "pretraining.test_error": "E, pre-training",
    "pretraining.train_error": "training error, pre-training", "finetuning.q": "q",
    "finetuning.m": "m", "finetuning.overlap": "overlap o, LoRA",
    "finetuning.test_error": "E', LoRA", "finetuning.train_error": "training error, LoRA",
    "finetuning.frozen_test_error": "E', frozen weights",
}  # fmt: skip


def draw_comparison(table: pd.DataFrame) -> Figure:
    """One panel per observable, against 1/D."""
    names = [name for name in _NAMES if (table["observable"] == name).any()]
    columns = 4 if len(names) > 6 else 3
    count = math.ceil(len(names) / columns)
    figure, panels = figure_of(count, columns, 1.7 * count + 0.6)
    for panel in panels.flat[len(names) :]:
        panel.set_visible(False)
    for panel, name in zip(panels.flat, names, strict=False):
        _draw_panel(panel, table[table["observable"] == name])
        _name(panel, table[table["observable"] == name], _NAMES[name], far_z(table))
    for column in range(columns):
        last = max(row for row in range(count) if row * columns + column < len(names))
        panels[last, column].set_xlabel("1/D")
    handles = [
        Line2D([], [], color=BLACK, lw=1.3, label="theory, D → ∞"),
        Line2D([], [], color=BLUE, marker="o", mfc="white", ls="", label="simulation"),
    ]
    if (table["source"] == "limit").any():
        handles.append(Line2D([], [], color=RED, marker="D", ls="", label="extrapolated"))
    legend_below(figure, handles, 3)
    return figure


def _draw_panel(panel: Any, rows: pd.DataFrame) -> None:
    (theory,) = rows[rows["source"] == "theory"][["value", "error"]].to_numpy(float)
    panel.axhline(theory[0], color=BLACK, linewidth=1.3)
    panel.axhspan(theory[0] - theory[1], theory[0] + theory[1], color=BLACK, alpha=0.15, lw=0)
    for source, color, marker in (("simulation", BLUE, "o"), ("limit", RED, "D")):
        part = rows[rows["source"] == source]
        if len(part):
            at = np.where(part["dim"].notna(), 1 / part["dim"].astype(float), 0.0)
            panel.errorbar(
                at, part["value"], part["error"].astype(float), fmt=marker, color=color,
                mfc="white" if source == "simulation" else color, ms=4, capsize=2, linewidth=1,
            )  # fmt: skip
    panel.set_xlim(left=-0.12 * panel.get_xlim()[1])
    panel.locator_params(axis="x", nbins=3)
    panel.locator_params(axis="y", nbins=4)


def far_z(table: pd.DataFrame) -> float:
    """The |z| that any of the observables passes by chance in one of a hundred comparisons.

    A two-sided t quantile; its degrees of freedom are those of the fewest runs at a D.
    """
    fewest = int(table.loc[table["source"] == "simulation", "runs"].min())
    level = 0.01 / (2 * table["observable"].nunique())
    return float(stats.t.ppf(1 - level, max(fewest - 1, 1)))


def _name(panel: Any, rows: pd.DataFrame, words: str, far: float) -> None:
    """The observable, and z below it."""
    judged, color = rows.loc[rows["z"].notna(), "z"], BLACK
    if len(judged):
        z = float(judged.iloc[0])
        words, color = f"{words}\nz = {z:.1f}", RED if abs(z) > far else BLACK
    panel.set_title(words, fontsize=7.5, loc="left", color=color)
