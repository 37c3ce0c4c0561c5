"""Where a change that lowers the test error lowers the alignment too.

A knob x (λ, λ' or α) is mismatched where dE'/dlog x and do/dlog x have one sign.  Maps of both
derivatives, over (λ, α) and (λ, λ'); trajectories of (o, E') along λ and α with simulations, in
which a mismatch is a part that rises; and the penalties of least E' and best o where only a share
of the sequences, or the sequences but not their noise, are re-used.

Set: that of figure 3 with λ' = 1, where less of softmax theory is unstable.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from figure3 import OPTIMA, PENALTY
from figure_tools import PAIRED, SOURCES, Experiment
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from mismatch_rows import SAMPLES, SHARES, TASK_PENALTY, TRAJECTORIES, compute
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import label, uniform_filter

from lora_theory import Estimate

#: Differences from the reference that the caption tells.
COMPARED = {
    "linear fresh": ((PENALTY, 0.02), (SAMPLES, 0.4)),
    "linear reused": ((PENALTY, 0.02), (SAMPLES, 0.4)),
    "softmax fresh": ((PENALTY, 0.1), (SAMPLES, 3.0)),
    "softmax reused": ((PENALTY, 0.1),),
}
#: A sign is known from so many errors on.
CERTAIN = 3
MAPS = ("linear reused", "softmax fresh", "softmax reused")
ALONG_PENALTY = ("linear fresh", "linear reused", "softmax fresh", "softmax reused")
WORDS = {
    PENALTY: r"pre-training penalty $\lambda$",
    SAMPLES: r"pre-training samples $\alpha$",
    TASK_PENALTY: r"LoRA penalty $\lambda'$",
}
SYMBOLS = {PENALTY: r"\lambda", SAMPLES: r"\alpha"}
LETTERS = {PENALTY: "λ", SAMPLES: "α", TASK_PENALTY: "λ'"}
TICKS = (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
SHADE, POINT = "#A6D5F2", "#000000"
MARKS = {"uncertain": (".", "0.3"), "uncertain too": ("o", "#D55E00"), "unstable": ("x", "0.3")}


def case_rows(table: pd.DataFrame, case: str, part: str) -> pd.DataFrame:
    activation, sequences = case.split()
    here = (table["activation"] == activation) & (table["finetuning.sequences"] == sequences)
    return table[here & (table["part"] == part)]


class Slopes(NamedTuple):
    """dE'/dlog x and do/dlog x of a map, by its second axis and λ."""

    values: dict[str, pd.DataFrame]
    errors: dict[str, np.ndarray]  #: root mean squares over neighbours, as each is of two values
    status: pd.DataFrame

    @classmethod
    def of(cls, rows: pd.DataFrame, upwards: str, knob: str) -> Slopes:
        grids: dict[str, dict[str, pd.DataFrame]] = {"value": {}, "error": {}, "status": {}}
        for name in PAIRED:
            chosen = rows[(rows["knob"] == knob) & (rows["observable"] == f"{name}_slope")]
            for column, found in grids.items():
                found[name] = chosen.pivot(index=upwards, columns=PENALTY, values=column)
        errors = {}
        for name, grid in grids["error"].items():
            known = grid.notna().to_numpy(float)
            squares = uniform_filter(grid.fillna(0.0).to_numpy() ** 2, 3, mode="nearest")
            share = uniform_filter(known, 3, mode="nearest")
            errors[name] = np.sqrt(squares / np.where(share > 0, share, np.nan))
        return cls(grids["value"], errors, grids["status"]["test_error"])

    def signs(self) -> np.ndarray:
        """1 where error and alignment disagree, −1 where they agree, 0 where it is not known."""
        known = [
            np.abs(grid.to_numpy()) > CERTAIN * self.errors[n] for n, grid in self.values.items()
        ]
        product = np.prod([grid.to_numpy() for grid in self.values.values()], axis=0)
        return np.where(np.all(known, axis=0), np.sign(product), 0)

    def optimum(self, row: int, name: str) -> Estimate | None:
        """λ of least E' or best o in a row, where the integral of the slopes is; None at an end."""
        x = np.log(self.values[name].columns.to_numpy(float))
        slopes = self.values[name].to_numpy()[row] * (-1 if name == "overlap" else 1)
        known = np.isfinite(slopes)
        if known.sum() < 3:
            return None
        curve = PchipInterpolator(x[known], slopes[known])
        roots = curve.roots(extrapolate=False)
        best = min([*x[known][[0, -1]], *roots], key=curve.antiderivative())
        if best not in roots:
            return None
        error = np.interp(best, x, self.errors[name][row]) / abs(curve(best, 1))
        return Estimate(float(np.exp(best)), float(np.exp(best) * error), 1)


def draw(table: pd.DataFrame) -> Figure:
    figure = plt.figure(figsize=(7.0, 8.6))
    sides = {"left": 0.075, "right": 0.985}
    maps = figure.add_gridspec(2, 3, top=0.915, bottom=0.535, hspace=0.12, wspace=0.2, **sides)
    rest = figure.add_gridspec(2, 4, top=0.465, bottom=0.05, hspace=0.42, wspace=0.36, **sides)
    for row, upwards in enumerate((SAMPLES, TASK_PENALTY)):
        for column, case in enumerate(MAPS):
            panel = figure.add_subplot(maps[row, column])
            _draw_map(panel, case_rows(table, case, f"map {upwards}"), upwards)
            panel.set_title(name_of(case) if row == 0 else "")
            panel.set_xlabel(WORDS[PENALTY] if row == 1 else "")
            panel.tick_params(labelbottom=row == 1)
            panel.set_ylabel(WORDS[upwards] if column == 0 else "")
    paths = [(case, PENALTY) for case in ALONG_PENALTY]
    paths += [("linear reused", SAMPLES), ("softmax fresh", SAMPLES)]
    for number, (case, knob) in enumerate(paths):
        row, column = divmod(number, 4)
        panel = figure.add_subplot(rest[row, column])
        _draw_trajectory(panel, case_rows(table, case, f"along {knob}"), knob)
        panel.set_title(rf"{name_of(case)}, along ${SYMBOLS[knob]}$", fontsize=7)
        panel.set_ylabel("test error $E'$" if column == 0 else "")
    for column, activation in ((2, "linear"), (3, "softmax")):
        panel = figure.add_subplot(rest[1, column])
        _draw_shares(panel, table[table["activation"] == activation])
        panel.set_title(f"{activation}, shares", fontsize=7)
    figure.legend(handles=_map_legend(), loc="upper center", ncols=4)
    return figure


def name_of(case: str) -> str:
    activation, sequences = case.split()
    return f"{activation}, e = {int(sequences == 'reused')}"


def _draw_map(panel: Any, rows: pd.DataFrame, upwards: str) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    if rows.empty:
        return
    for knob in (PENALTY, upwards):
        slopes = Slopes.of(rows, upwards, knob)
        x, y = (np.asarray(axis, float) for axis in (slopes.status.columns, slopes.status.index))
        fine_x, fine_y = np.geomspace(x[0], x[-1], 200), np.geomspace(y[0], y[-1], 200)
        product = 1.0
        for grid in slopes.values.values():
            across = PchipInterpolator(np.log(x), grid.fillna(0.0), axis=1)(np.log(fine_x))
            product = product * PchipInterpolator(np.log(y), across)(np.log(fine_y))
        shown = _with_known_points(product > 0, slopes.signs() > 0)
        look = {"colors": [SHADE]} if knob == PENALTY else {"colors": "none", "hatches": ["/////"]}
        panel.contourf(fine_x, fine_y, shown, levels=(0.5, 1.5), **look)
        uncertain, marks = slopes.signs() == 0, dict(zip((PENALTY, upwards), MARKS, strict=False))
        _mark(panel, x, y, uncertain, marks[knob])
        if knob == PENALTY:
            _mark(panel, x, y, (slopes.status == "unstable").to_numpy(), "unstable")
            for name, (_, color, dashes, _) in OPTIMA.items():
                best = [slopes.optimum(row, name) for row in range(len(y))]
                places = [np.nan if one is None else one.mean for one in best]
                panel.plot(places, y, color=color, linestyle=dashes)
    panel.set_xlim(x[0], x[-1])
    panel.set_ylim(y[0], y[-1])
    _plain_ticks(panel.yaxis, y)


def _plain_ticks(axis: Any, values: np.ndarray) -> None:
    """Powers of ten and what lies between, as they are said."""
    ticks = [tick for tick in TICKS if values.min() * 0.999 <= tick <= values.max() * 1.001]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _with_known_points(region: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The connected parts of a region that hold a point of the coarser grid where it is known."""
    parts, _ = label(region)
    rows, columns = (
        np.arange(n) * (f - 1) / (n - 1) for n, f in zip(known.shape, region.shape, strict=True)
    )
    at = parts[np.ix_(np.rint(rows).astype(int), np.rint(columns).astype(int))]
    return np.isin(parts, at[known & (at > 0)])


def _mark(panel: Any, x: np.ndarray, y: np.ndarray, where: np.ndarray, name: str) -> None:
    marker, color = MARKS[name]
    rows, columns = np.nonzero(where)
    panel.plot(
        x[columns], y[rows], marker, color=color, mfc="none" if marker == "o" else color, ms=3.5,
        mew=0.7, clip_on=False, zorder=4,
    )  # fmt: skip


def _map_legend() -> list[Any]:
    """Handles of what the maps show."""
    lines = [
        Line2D([], [], color=color, linestyle=dashes, label=symbol)
        for symbol, color, dashes, _ in OPTIMA.values()
    ]
    words = (r"sign of $\lambda$'s not known", "of the other knob's", "theory unstable")
    marks = [
        Line2D([], [], linestyle="", marker=marker, color=color, ms=3.5, label=word,
               mfc="none" if marker == "o" else color)
        for (marker, color), word in zip(MARKS.values(), words, strict=True)
    ]  # fmt: skip
    return [
        Patch(facecolor=SHADE, label=r"mismatch of $\lambda$"),
        Patch(facecolor="none", edgecolor="0.4", hatch="/////", label=r"of $\alpha$ or $\lambda'$"),
        *lines, *marks,
    ]  # fmt: skip


def along(rows: pd.DataFrame, source: str, knob: str, suffix: str = "") -> pd.DataFrame:
    """Values and errors of E' and o along a knob; E' without its cross term where that is known."""
    names = dict(zip((f"{name}{suffix}" for name in PAIRED), PAIRED, strict=True))
    if "corrected_test_error" in set(rows["observable"]) and source == "simulation" and not suffix:
        del names["test_error"]
        names["corrected_test_error"] = "test_error"
    part = rows[(rows["source"] == source) & rows["observable"].isin(names)]
    part = part[part["start"] != "random"].replace({"observable": names})
    return part.pivot(index=knob, columns="observable", values=["value", "error", "status"])


def _draw_trajectory(panel: Any, rows: pd.DataFrame, knob: str) -> None:
    curve, points = (along(rows, source, knob) for source in SOURCES)
    panel.set_xlabel("overlap $o$")
    panel.xaxis.set_major_locator(MaxNLocator(3))
    if curve.empty:
        return
    x = np.log(curve.index.to_numpy(float))
    fine = np.linspace(x[0], x[-1], 300)
    splines = [PchipInterpolator(x, curve["value", name].astype(float)) for name in PAIRED]
    error, overlap = (spline(fine) for spline in splines)
    rising = splines[0](fine, 1) * splines[1](fine, 1) > 0
    panel.plot(
        np.where(rising, overlap, np.nan), np.where(rising, error, np.nan), color=SHADE,
        linewidth=6, zorder=0, solid_capstyle="butt",
    )  # fmt: skip
    panel.plot(overlap, error, color="black")
    middle = len(fine) * 5 // 6
    panel.annotate(
        "", (overlap[middle + 3], error[middle + 3]), (overlap[middle], error[middle]),
        arrowprops={"arrowstyle": "-|>", "color": "black", "linewidth": 1},
    )  # fmt: skip
    unstable = curve[curve["status", "overlap"] == "unstable"]
    panel.plot(unstable["value", "overlap"], unstable["value", "test_error"], "x", color="0.3")
    if points.empty:
        return
    panel.errorbar(
        points["value", "overlap"], points["value", "test_error"],
        points["error", "test_error"], points["error", "overlap"],
        fmt="o", color=POINT, mfc="white", capsize=1.5, linewidth=0.8, zorder=3,
    )  # fmt: skip
    panel.plot(
        points["value", "overlap"], points["value", "test_error"], color="0.6", linewidth=0.6
    )
    panel.autoscale_view()
    to_panel = panel.transData + panel.transAxes.inverted()
    last = np.full(2, -1.0)
    for value, row in points["value"].iterrows():
        here = to_panel.transform((row["overlap"], row["test_error"]))
        if np.abs(here - last).max() < 0.1:  # no room
            continue
        last = here
        panel.annotate(
            f"{value:g}", (row["overlap"], row["test_error"]), (3, 3), fontsize=5.5,
            textcoords="offset points",
        )  # fmt: skip


def shares(table: pd.DataFrame, noise: str) -> dict[float, dict[str, Estimate | None]]:
    """λ*_E' and λ*_o by the share of re-used sequences."""
    chosen = (table["noise"] == noise) | (table["share"] == 0)  # fresh ones have none
    rows = table[(table["part"] == "share") & chosen]
    slopes = Slopes.of(rows, "share", PENALTY)
    return {
        float(share): {name: slopes.optimum(row, name) for name in PAIRED}
        for row, share in enumerate(slopes.status.index)
    }


def _draw_shares(panel: Any, table: pd.DataFrame) -> None:
    lowest = table.loc[table["part"] == "share", PENALTY].min()
    for noise, filled in (("shared", True), ("redrawn", False)):
        if not (table["noise"] == noise).any():
            continue
        found = shares(table, noise)
        ends = {}
        for name, (_, color, dashes, marker) in OPTIMA.items():
            best = [found[share][name] for share in found]
            ends[name] = np.array([lowest if one is None else one.mean for one in best])
            errors = [0.0 if one is None else one.error for one in best]
            panel.errorbar(
                list(found), ends[name], errors, color=color, linestyle=dashes if filled else ":",
                marker=marker, mfc=color if filled else "white", capsize=1.5, linewidth=0.9,
            )  # fmt: skip
        if filled:
            panel.fill_between(list(found), *ends.values(), color=SHADE, linewidth=0, zorder=0)
    panel.set_yscale("log")
    panel.set_xlabel("re-used share $r$")
    panel.set_ylabel(r"best $\lambda$", labelpad=0)
    _plain_ticks(panel.yaxis, np.array(panel.get_ylim()))


def caption(table: pd.DataFrame) -> str:
    simulated = table[table["source"] == "simulation"]
    runs = "; ".join(
        f"{activation}, {sequences}, along {LETTERS[part.removeprefix('along ')]}: {dim:.0f}, "
        f"{seeds:.0f}" + (" (weights drawn from their law)" if kind == "sampled" else "")
        for activation, sequences, part, dim, seeds, kind in simulated[
            ["activation", "finetuning.sequences", "part", "dim", "seeds", "pretrained"]
        ].drop_duplicates().itertuples(index=False)
    )  # fmt: skip
    fixed = "; ".join(
        f"{activation}: λ = {penalty:g}"
        for activation, penalty in table.loc[
            table["part"] == f"along {SAMPLES}", ["activation", PENALTY]
        ].drop_duplicates().itertuples(index=False)
    )  # fmt: skip
    return (
        "**Mismatch.** Where changing a knob x lowers the test error E' after LoRA and the overlap "
        "o together, or raises both: dE'/dlog x and do/dlog x have one sign. Top: theory over the "
        "pre-training penalty λ and α (first row, λ' = 1) or the LoRA penalty λ' (second row, "
        "α = 0.2). Blue: λ is mismatched; hatched: the knob of the vertical axis is. Lines: λ of "
        "least E' and of best o, where one is inside. Derivatives by implicit differentiation on "
        "two sets of nodes per cell; a sign counts as known where both derivatives exceed "
        f"{CERTAIN} errors (root mean square over neighbouring cells); where not, marked. "
        f"Cells: {_cells_text(table)}. "
        "Third row: trajectories along λ, and the first two panels of the fourth: along α "
        f"({fixed}); the arrow points to larger values, numbers name the simulated ones. Lines: "
        "theory; blue where error and overlap rise or fall together; circles: simulation from the "
        f"informed start w*, mean ± standard error (D, seeds: {runs}), "
        "the seeds the same along a trajectory; for linear attention the measured O(1/√D) cross "
        "term of docs/theory.md, section 7, is subtracted from E', for softmax it is not. "
        "Simulated differences, paired by seed (in brackets theory; z of the simulated mean, "
        "against 0): "
        f"{_differences_text(table)}. "
        "Last two panels: λ of least E' and of best o against the share r of re-used sequences, "
        "others fresh; filled, with their noise (blue: the interval of mismatch), open, with noise "
        "drawn anew; at the lower edge where the least λ is best. "
        f"log(λ*_E'/λ*_o): {_widths_text(table)}. "
        "T = 2, κ0 = Δ = 0.5, κ = 1, q0 = 1, α' = 3, where not named α = 0.2 and λ' = 1. Crosses: "
        "the replica-symmetric theory is unstable. Theory points not converged: "
        f"{(table['status'] == 'not_converged').sum()} of {len(table) - len(simulated)} rows."
    )


def _cells_text(table: pd.DataFrame) -> str:
    texts = []
    for case, upwards in product((*MAPS, "linear fresh"), (SAMPLES, TASK_PENALTY)):
        rows = case_rows(table, case, f"map {upwards}")
        if rows.empty:
            continue
        counts = []
        for knob in (PENALTY, upwards):
            signs = Slopes.of(rows, upwards, knob).signs()
            counts.append(f"{LETTERS[knob]} {(signs > 0).sum()} ({(signs == 0).sum()})")
        texts.append(f"{case}, over {LETTERS[upwards]}: {', '.join(counts)} of {signs.size}")
    return "mismatched (in brackets: sign not known) " + "; ".join(texts)


def differences(table: pd.DataFrame, case: str, knob: str) -> pd.DataFrame:
    """Simulated and predicted differences of E' and o from those at the reference, by the knob."""
    rows = case_rows(table, case, f"along {knob}")
    simulated = along(rows, "simulation", knob, "_difference")
    theory_of = along(rows, "theory", knob)["value"].astype(float)
    (at,) = (path.reference for path in TRAJECTORIES[case] if path.knob == knob)
    found = {}
    for name in PAIRED:
        for column in ("value", "error"):
            found[name, column] = simulated[column, name].astype(float)
        expected = theory_of[name] - theory_of.loc[at, name]
        found[name, "theory"] = expected[simulated.index]
    return pd.DataFrame(found)


def _differences_text(table: pd.DataFrame) -> str:
    texts = []
    for case, compared in COMPARED.items():
        for knob, value in compared:
            rows = case_rows(table, case, f"along {knob}")
            here = rows["observable"].eq("overlap_difference") & (rows[knob] == value)
            if not here.any():  # in the quick profile
                continue
            found = differences(table, case, knob)
            parts = []
            for letter, name in (("E'", "test_error"), ("o", "overlap")):
                mean, error, expected = found.loc[value, name]
                z = f"z = {mean / error:.0f}"
                parts.append(f"{letter} {Estimate(mean, error, 1)} ({expected:.2g}), {z}")
            (at,) = (path.reference for path in TRAJECTORIES[case] if path.knob == knob)
            texts.append(f"{case}, {LETTERS[knob]} = {value:g} minus {at:g}: {', '.join(parts)}")
    return "; ".join(texts)


def _widths_text(table: pd.DataFrame) -> str:
    texts = []
    for activation, noise in SHARES:
        rows = table[table["activation"] == activation]
        if not (rows["noise"] == noise).any():
            continue
        widths = []
        for share, best in shares(rows, noise).items():
            error, overlap = (best[name] for name in PAIRED)
            if overlap is None or error is None:
                text = "∞" if overlap is None else "not known"
            else:
                relative = math.hypot(error.error / error.mean, overlap.error / overlap.mean)
                text = str(Estimate(math.log(error.mean / overlap.mean), relative, 1))
            widths.append(f"r = {share:g}: {text}")
        texts.append(f"{activation}, {noise} noise: {', '.join(widths)}")
    return "; ".join(texts)


EXPERIMENT = Experiment("mismatch", compute, draw, caption)
