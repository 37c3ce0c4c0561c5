"""Drawing of a map, from its table alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy.ndimage import distance_transform_edt

from lora_theory.explorer.drawing import BLACK, figure_of, label_field, legend_below
from lora_theory.explorer.points import OBSERVABLES, REFUSED, pending
from lora_theory.status import Status

__all__ = ["draw_map"]

_Grid = Float[np.ndarray, "rows columns"]


def draw_map(table: pd.DataFrame) -> Figure:
    """Colours of the observable; hatched where the theory is unstable or has no answer."""
    figure, panels = figure_of(1, 1, 4.4)
    panel, first = panels[0, 0], table.iloc[0]
    values = table.pivot(index="y", columns="x", values="value").astype(float)
    status = table.pivot(index="y", columns="x", values="status").astype(str)
    x, y = values.columns.to_numpy(float), values.index.to_numpy(float)
    edges = _edges(x, bool(first["x_logarithmic"])), _edges(y, bool(first["y_logarithmic"]))
    for axis, field, ends in zip("xy", ("x_field", "y_field"), edges, strict=True):
        logarithmic = bool(first[f"{axis}_logarithmic"])
        panel.set(**{f"{axis}lim": (ends[0], ends[-1])})
        if logarithmic:
            panel.set(**{f"{axis}scale": "log"})
        label_field(panel.xaxis if axis == "x" else panel.yaxis, first[field], logarithmic)
    missing = table.assign(missing=pending(table))
    waiting = missing.pivot(index="y", columns="x", values="missing").to_numpy(bool)
    refused = status.apply(lambda column: column.str.startswith(REFUSED)).to_numpy()
    gaps = refused | (status == Status.NOT_CONVERGED.value).to_numpy()
    shown = np.where(gaps, np.nan, values.to_numpy())
    handles: list[Any] = []
    if np.isfinite(shown).any():
        _draw_colours(figure, panel, (x, y), edges, shown, waiting, str(first["observable"]))
    if first["observable"] == "gain":
        handles.append(Line2D([], [], color=BLACK, lw=1.5, label="gain = 0"))
    unstable = (status == Status.UNSTABLE.value).to_numpy()
    for region, hatch, color, words in (
        (unstable, "...", "0.35", "unstable"),
        (gaps, "xxx", "0.5", "no answer of theory"),
    ):
        if region.any():
            _hatch(panel, edges, region, hatch, color)
            handles.append(
                Patch(facecolor="white", edgecolor=color, hatch=hatch, lw=0, label=words)
            )
    x_own, y_own = first["x_own"], first["y_own"]
    if pd.notna(x_own) and pd.notna(y_own) and x[0] <= x_own <= x[-1] and y[0] <= y_own <= y[-1]:
        panel.plot(x_own, y_own, "*", color="white", mec=BLACK, ms=14, zorder=6)
        handles.append(
            Line2D([], [], color="white", mec=BLACK, marker="*", ms=11, ls="", label="chosen")
        )
    if waiting.any():
        handles.append(Patch(facecolor="0.9", lw=0, label="paler: not computed yet"))
    if handles:
        legend_below(figure, handles, 4)
    return figure


def _edges(centers: Float[np.ndarray, " n"], logarithmic: bool) -> Float[np.ndarray, " m"]:
    """Where cells end."""
    at = np.log(centers) if logarithmic else centers
    if len(at) == 1:
        at = np.array([at[0] - 0.5, at[0] + 0.5])
    else:
        middle = (at[1:] + at[:-1]) / 2
        at = np.concatenate([[2 * at[0] - middle[0]], middle, [2 * at[-1] - middle[-1]]])
    return np.exp(at) if logarithmic else at


def _draw_colours(
    figure: Figure,
    panel: Any,
    centers: tuple[Any, Any],
    edges: tuple[Any, Any],
    shown: _Grid,
    waiting: Bool[np.ndarray, "rows columns"],
    name: str,
) -> None:
    finite = shown[np.isfinite(shown)]
    low, high = float(finite.min()), float(finite.max())
    # errors vary over decades
    scale = LogNorm if 0 < 4 * low < high and not name.endswith("overlap") else Normalize
    norm: Normalize = scale(low, max(high, low + 1e-12))
    look = "viridis"
    if name == "gain":
        # both sides have their own scale, as losses may be much smaller than gains
        size = max(np.abs(finite).max(), 1e-12)
        norm = TwoSlopeNorm(0, min(low, -0.05 * size), max(high, 0.05 * size))
        look = "RdBu"
    _, nearest = distance_transform_edt(waiting, return_indices=True)
    filled = shown[tuple(nearest)]
    mesh = panel.pcolormesh(*edges, shown, cmap=look, norm=norm, rasterized=True)
    paler = np.where(waiting, filled, np.nan)
    panel.pcolormesh(*edges, paler, cmap=look, norm=norm, alpha=0.45, rasterized=True)
    symbol, words = OBSERVABLES[name]
    bar = figure.colorbar(mesh, ax=panel, aspect=25, pad=0.02)
    bar.set_label(f"{words}, {symbol}", size=8.5)
    bar.ax.tick_params(labelsize=7.5, which="both")
    if isinstance(norm, LogNorm):
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    if name == "gain":
        _draw_sides(panel, centers, filled)
        bar.ax.axhline(0, color=BLACK, linewidth=1.5)


def _draw_sides(panel: Any, centers: tuple[Any, Any], gain: _Grid) -> None:
    """The line of no gain, and what is on its sides."""
    if min(gain.shape) < 2 or not (np.nanmin(gain) < 0 < np.nanmax(gain)):
        return
    panel.contour(*centers, gain, [0.0], colors=BLACK, linewidths=1.5)
    for side, words in ((gain < 0, "LoRA worse\nthan frozen"), (gain > 0, "LoRA better")):
        if side.sum() >= 4:
            # the cell that is farthest from the other side and from the edges
            depth = distance_transform_edt(np.pad(side, 1))[1:-1, 1:-1]
            j, i = np.unravel_index(int(np.argmax(depth)), depth.shape)
            panel.text(
                centers[0][i], centers[1][j], words, ha="center", va="center", fontsize=8,
                bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 2}, zorder=5,
            )  # fmt: skip


def _hatch(
    panel: Any, edges: tuple[Any, Any], region: Bool[np.ndarray, "rows columns"], hatch: str,
    color: str,
) -> None:  # fmt: skip
    x, y = edges
    for j, i in np.argwhere(region):
        panel.add_patch(
            Rectangle(
                (x[i], y[j]), x[i + 1] - x[i], y[j + 1] - y[j], facecolor="none", edgecolor=color,
                hatch=hatch, linewidth=0, zorder=3,
            )
        )  # fmt: skip
