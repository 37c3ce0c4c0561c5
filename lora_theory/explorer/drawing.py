"""What the figures of the explorer share: colours, panels, axes, marks.

No pyplot and no rc parameters: pages draw on several threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lora_theory.explorer.points import REFUSED, named
from lora_theory.status import Status

__all__ = [
    "BLACK", "BLUE", "GREY", "ORANGE", "RED", "figure_of", "gap_handles", "label_field",
    "legend_below", "mark_gaps", "mark_own", "shade_unstable", "style",
]  # fmt: skip

# Okabe–Ito, with a line style each where lines are told apart
BLACK, BLUE, ORANGE, RED, GREY = "#000000", "#0072B2", "#E69F00", "#D55E00", "0.55"
_TEXT, _SMALL = 8.5, 7.5


def figure_of(rows: int, columns: int, height: float = 3.7, **settings: Any) -> tuple[Figure, Any]:
    """A figure of the width of a page, and its panels."""
    figure = Figure(figsize=(7.2, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **settings)
    for panel in panels.flat:
        style(panel)
    return figure, panels


def style(panel: Any) -> None:
    """Sizes of a panel, two spines."""
    panel.tick_params(labelsize=_SMALL)
    panel.xaxis.label.set_size(_TEXT)
    panel.yaxis.label.set_size(_TEXT)
    panel.title.set_size(_TEXT)
    panel.spines[["top", "right"]].set_visible(False)


def label_field(axis: Any, field: str, logarithmic: bool) -> None:
    """Name, scale and plain numbers of the axis of a field."""
    axis.axes.set(**{f"{axis.axis_name}label": named(field)})
    if logarithmic:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        low, high = axis.get_view_interval()
        wide = high / low
        subs = (1.0,) if wide > 300 else (1.0, 3.0) if wide > 30 else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def legend_below(figure: Figure, handles: list[Any], columns: int = 4) -> None:
    """The legend, outside of the panels."""
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, fontsize=_SMALL, frameon=False,
        handlelength=2.4, columnspacing=1.4,
    )  # fmt: skip


def mark_own(panel: Any, x: float | None) -> None:
    """The line of the chosen problem."""
    if x is not None and (x > 0 or panel.get_xscale() != "log"):
        panel.axvline(x, color=GREY, linestyle=":", linewidth=1.0, zorder=0)


def shade_unstable(panel: Any, x: Any, y: Any, unstable: Any, color: str) -> None:
    """A broad pale band along the unstable points of a line, halfway to their neighbours."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    at = np.log(x) if panel.get_xscale() == "log" and np.all(x > 0) else x
    for i in np.flatnonzero(np.asarray(unstable)):
        ends = [max(i - 0.5, 0), float(i), min(i + 0.5, len(x) - 1)]
        part = np.interp(ends, np.arange(len(x)), at)
        panel.plot(
            np.exp(part) if at is not x else part, np.interp(ends, np.arange(len(y)), y),
            color=color, alpha=0.22, linewidth=6, zorder=1, solid_capstyle="butt",
        )  # fmt: skip


def mark_gaps(panel: Any, points: pd.DataFrame) -> None:
    """× where the equations were not solved, ▾ outside of the theory, at the foot of the panel."""
    foot = panel.get_xaxis_transform()
    unsolved = points[points["status"] == Status.NOT_CONVERGED.value]
    refused = points[points["status"].astype(str).str.startswith(REFUSED)]
    marks = {"clip_on": False, "transform": foot, "linestyle": "", "zorder": 5, "color": RED}
    for rows, marker in ((unsolved, "x"), (refused, "v")):
        if len(rows):
            panel.plot(rows["x"], np.full(len(rows), 0.03), marker=marker, mfc="white", **marks)


def gap_handles(table: pd.DataFrame) -> list[Any]:
    """Legend of what :func:`mark_gaps` and :func:`shade_unstable` show, if anything."""
    statuses = table["status"].astype(str)
    handles: list[Any] = []
    if (statuses == Status.UNSTABLE.value).any():
        handles.append(Patch(color="0.5", alpha=0.3, label="unstable"))
    if (statuses == Status.NOT_CONVERGED.value).any():
        handles.append(Line2D([], [], color=RED, marker="x", ls="", label="not converged"))
    if statuses.str.startswith(REFUSED).any():
        handles.append(
            Line2D([], [], color=RED, marker="v", mfc="white", ls="", label="outside of theory")
        )
    return handles
