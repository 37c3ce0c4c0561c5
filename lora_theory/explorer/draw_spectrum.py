"""Drawing of the learned spectrum, from its table alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.integrate import cumulative_trapezoid

from lora_theory.explorer.drawing import BLACK, BLUE, RED, figure_of, legend_below, style
from lora_theory.observables import Estimate
from lora_theory.status import Status

__all__ = ["draw_spectrum"]

#: Share of a bulk without an edge that is left out on a side.
_TAIL = 0.01
#: Height in mean densities at which a peak is cut.
_TALL = 6.0


def draw_spectrum(table: pd.DataFrame) -> Figure:
    """The density; on the right axis shares and squared overlaps, as stems."""
    figure, panels = figure_of(1, 1, 3.6)
    panel, rows = panels[0, 0], dict(iter(table.groupby("observable")))
    stems = panel.twinx()
    style(stems)
    stems.spines["right"].set_visible(True)
    stems.set(ylim=(0, 1.05), ylabel="share at 0, squared overlap of outliers")
    panel.set_xlabel("eigenvalue s of the trained S")
    panel.set_ylabel("density")
    if (table["status"] == Status.NOT_CONVERGED.value).any():
        panel.text(0.5, 0.5, "not converged", transform=panel.transAxes, ha="center", color=RED)
        return figure
    _draw_density(panel, rows)
    zero = rows["mass_at_zero"].iloc[0]
    stems.plot([0, 0], [0, zero["value"]], color=BLUE, linewidth=2.4)
    stems.plot([0], [zero["value"]], "o", color=BLUE, ms=6)
    share = Estimate(zero["value"], zero["error"], 1)
    stems.annotate(
        f"share at s = 0:\n{share}", (0, zero["value"]), (8, -4),
        textcoords="offset points", va="top", fontsize=8, color=BLUE,
    )  # fmt: skip
    for _, outlier in rows.get("outlier", pd.DataFrame()).iterrows():
        stems.plot([outlier["eigenvalue"]] * 2, [0, outlier["value"]], "--", color=RED, lw=1.4)
        stems.plot(outlier["eigenvalue"], outlier["value"], "D", color=RED, ms=5)
        stems.annotate(
            f"θ = {outlier['spike']:g}", (outlier["eigenvalue"], outlier["value"]), (0, 6),
            textcoords="offset points", ha="center", fontsize=7.5, color=RED,
        )  # fmt: skip
    handles = [
        Line2D([], [], color=BLACK, lw=1.3, label="density of the bulk"),
        Line2D([], [], color=BLUE, lw=2.4, marker="o", label="share at zero"),
    ]
    if "outlier" in rows:
        handles.append(Line2D([], [], color=RED, ls="--", marker="D", label="outliers"))
    legend_below(figure, handles, 3)
    return figure


def _draw_density(panel: Any, rows: dict[str, pd.DataFrame]) -> None:
    if "density" not in rows:
        return
    at, density = rows["density"][["eigenvalue", "value"]].to_numpy(float).T
    starts = rows["band_start"]["eigenvalue"].to_numpy(float)
    ends = rows["band_end"]["eigenvalue"].to_numpy(float)
    for low, high in zip(starts, ends, strict=True):
        inside = (at >= low) & (at <= high)
        order = np.argsort(at[inside])
        x, y = at[inside][order], density[inside][order]
        panel.plot(x, y, color=BLACK, linewidth=1.3)
        panel.fill_between(x, 0, y, color="0.88", linewidth=0)
    # a density may diverge at an edge
    low, high = _most(at, density)
    order, top = np.argsort(at), float(density.max())
    mean = float(np.trapezoid(density[order], at[order])) / max(high - low, 1e-12)
    panel.set_ylim(0, 1.1 * min(top, _TALL * mean))
    if top > _TALL * mean:
        panel.annotate(
            f"up to {top:.3g}", (at[np.argmax(density)], 1), (-6, -4), va="top", ha="right",
            xycoords=panel.get_xaxis_transform(), textcoords="offset points", fontsize=7.5,
        )  # fmt: skip
    outside = rows["outlier"]["eigenvalue"].to_list() if "outlier" in rows else []
    places = [0.0, *outside, *starts[np.isfinite(starts)], *ends[np.isfinite(ends)]]
    if not np.isfinite([*starts, *ends]).all():
        places += [low, high]
    margin = 0.04 * (max(places) - min(places))
    panel.set_xlim(min(places) - margin, max(places) + margin)


def _most(at: Any, density: Any) -> tuple[float, float]:
    """Ends between which most of a bulk lies."""
    order = np.argsort(at)
    share = cumulative_trapezoid(density[order], at[order], initial=0.0)
    kept = at[order][(share > _TAIL * share[-1]) & (share < (1 - _TAIL) * share[-1])]
    return float(kept.min()), float(kept.max())
