"""What the noise left by pre-training costs in fine-tuning sequences, and how to split a budget."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from figure_tools import CURVES, Experiment, limit, shade_unstable, solved
from matplotlib.figure import Figure
from price_rows import BUDGET, BUDGETS, COST, COSTS, HELD, LINES, SEQUENCES, SHARES, compute

from lora_theory import Estimate

NOISE = r"$\Delta_{\rm eff}$ (linear), variance (softmax)"
NOISES = {
    "linear": r"effective noise $\Delta_{\rm eff}$",
    "softmax": r"variance $\Delta/2+Q_0-M^2/Q$",
}


def draw(table: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(4, 2, figsize=(7.0, 9.0), layout="constrained")
    for column, activation in enumerate(("linear", "softmax")):
        part = table[table["activation"] == activation]
        _draw_lines(axes[0, column], part, activation)
        _draw_along(axes[3, column], part)
        axes[0, column].set_title(activation)
        axes[3, column].set_title(activation)
    _draw_prices(axes[1, 0], table)
    _draw_check(axes[1, 1], table)
    _draw_splits(axes[2, 0], table, "best_share")
    _draw_splits(axes[2, 1], table, "best_test_error")
    for panel, letter in zip(axes.flat, "abcdefgh", strict=True):
        panel.set_title(f"({letter})", loc="left")
    return figure


def _names(line: tuple[Any, ...]) -> str:
    name, level, gain, _ = line
    text = f"$o={level:g}$" if name == "overlap" else f"$E'={level:g}$"
    return text if gain == 1 else f"{text}, gain {gain:g}"


def _line(part: pd.DataFrame, line: tuple[Any, ...], observable: str) -> pd.DataFrame:
    name, level, gain, _ = line
    here = (part["observable"] == observable) & (part["equal"] == name)
    here &= np.isclose(part["level"], level) & np.isclose(part["gain"], gain)
    return part[here & part["value"].notna()].sort_values("variance")


#: Okabe–Ito colours and lines of the four lines of an activation.
LOOKS = (*((color, dashes) for color, dashes, _ in CURVES), ("#CC79A7", (0, (1, 1))))


def _draw_lines(panel: Any, part: pd.DataFrame, activation: str) -> None:
    for line, (color, dashes) in zip(LINES[activation], LOOKS, strict=True):
        rows = _line(part, line, "needed")
        panel.errorbar(
            rows["variance"], rows["value"], rows["error"], color=color, linestyle=dashes,
            label=_names(line),
        )  # fmt: skip
    systems = part[(part["source"] == "simulation") & part["equal"].notna()]
    for kind, face in (("line", "black"), ("control", "white")):
        points = systems[systems["observable"] == f"{kind}_overlap"]
        panel.plot(points["variance"], points[SEQUENCES], "o", color="black", mfc=face, ms=4)
    panel.set_yscale("log")
    panel.set_yticks((1, 2, 3, 5, 7), ("1", "2", "3", "5", "7"))
    panel.set_yticks([], minor=True)
    panel.set_xlabel(NOISES[activation])
    panel.set_ylabel(r"fine-tuning samples $\alpha'$")
    panel.legend(handlelength=2.4)


def _draw_prices(panel: Any, table: pd.DataFrame) -> None:
    for activation, width in (("linear", 1.2), ("softmax", 2.2)):
        part = table[table["activation"] == activation]
        for line, (color, dashes) in zip(LINES[activation], LOOKS, strict=True):
            if line[2] == 1:
                rows = _line(part, line, "price_of_variance")
                panel.errorbar(
                    rows["variance"], rows["value"], rows["error"], color=color, linestyle=dashes,
                    linewidth=width, label=f"{activation}, {_names(line)}",
                )  # fmt: skip
    panel.set_yscale("log")
    panel.set_xlabel(NOISE)
    panel.set_ylabel(r"price: slope of $\alpha'$")
    panel.legend(loc="upper right", bbox_to_anchor=(1.0, 1.05))


def _draw_check(panel: Any, table: pd.DataFrame) -> None:
    for activation, (color, _, marker) in zip(("linear", "softmax"), CURVES, strict=False):
        part = table[(table["activation"] == activation) & table["equal"].notna()]
        for kind, dashes, face in (("line", "-", color), ("control", "--", "white")):
            rows = part[part["observable"] == f"{kind}_overlap"].sort_values("variance")
            theory, points = rows[rows["source"] == "theory"], _overlaps(rows)
            panel.plot(theory["variance"], theory["value"], color=color, linestyle=dashes)
            panel.errorbar(
                points.index, points["value"], points["error"], fmt=marker, color=color,
                mfc=face, capsize=1.5, linewidth=0.8, zorder=3,
                label=f"{activation}, {'on the line' if kind == 'line' else 'same $α′$'}",
            )  # fmt: skip
    panel.set_xlabel(NOISE)
    panel.set_ylabel("overlap $o$")
    panel.set_ylim(bottom=0.74)
    panel.legend(loc="lower left")


def _overlaps(rows: pd.DataFrame) -> pd.DataFrame:
    """Simulated overlaps by the noise, as D → ∞ if there are two D."""
    simulated = rows[rows["source"] == "simulation"]
    found = {
        variance: limit(part) if len(part) > 1 else tuple(part[["value", "error"]].iloc[0])
        for variance, part in simulated.groupby("variance")
    }
    return pd.DataFrame.from_dict(found, orient="index", columns=["value", "error"])


def _draw_splits(panel: Any, table: pd.DataFrame, observable: str) -> None:
    for cost, (color, _, marker) in zip(COSTS, CURVES, strict=True):
        for activation, dashes in (("linear", "-"), ("softmax", "--")):
            here = (table["activation"] == activation) & (table["cost"] == cost)
            rows = table[here & (table["observable"] == observable)].sort_values("budget")
            panel.errorbar(
                rows["budget"], rows["value"], rows["error"], color=color, linestyle=dashes,
                marker=marker, label=f"$c={cost:g}$" if activation == "linear" else None,
            )  # fmt: skip
    panel.set_xscale("log")
    panel.set_xlabel(r"budget $B=\alpha+c\alpha'$")
    panel.set_xticks(BUDGETS, [f"{budget:g}" for budget in BUDGETS])
    panel.set_xticks([], minor=True)
    if observable == "best_share":
        panel.set_ylabel("best share of fine-tuning")
        panel.legend(loc="center left", bbox_to_anchor=(0.0, 0.3))
    else:
        panel.set_ylabel("test error $E'$ there")
        panel.legend(loc="upper right")


def _draw_along(panel: Any, part: pd.DataFrame) -> None:
    rows = part[part["share"].notna()].sort_values("share")
    rows = rows[rows["observable"] == "test_error"]
    rows = rows[rows["dim"].isna() | (rows["dim"] == rows["dim"].max())]
    theory, points = (solved(rows[rows["source"] == name]) for name in ("theory", "simulation"))
    panel.plot(theory["share"], theory["value"], color="black")
    shade_unstable(panel, "share", theory, theory["value"], "black")
    panel.errorbar(
        points["share"], points["value"], points["error"],
        fmt="o", color="black", mfc="white", capsize=1.5, linewidth=0.8,
    )  # fmt: skip
    panel.set_xlabel("share of fine-tuning")
    panel.set_ylabel("test error $E'$")


def caption(table: pd.DataFrame) -> str:
    simulated = table[table["source"] == "simulation"]
    along = table[table["observable"].eq("test_error") & (table["source"] == "theory")]
    splits = table[table["observable"].eq("best_share")]
    unsolved = int((pd.concat([along, splits])["status"] == "not_converged").sum())
    unstable = int((pd.concat([along, splits])["status"] == "unstable").sum())
    return (
        "**The price of noise, and how to split a budget.** T = 2, κ0 = Δ = 0.5, κ = 1, λ' = 0.2, "
        "q0 = 1, fresh sequences. (a, b) Fine-tuning samples α' that an overlap o, or an error E', "
        "takes against the noise that pre-training left: Δ_eff for linear attention, for softmax "
        "the variance at a given gain M/Q (1 where none is named). (c) Slopes of the lines at gain "
        "1, thin for linear attention and thick for softmax: what one unit of noise costs. (d) "
        "Overlaps of trained systems, the circles in (a, b): filled, α' from the line of equal "
        "overlap; open, α' of the system in the middle for all; lines: theory. (e, f) The share "
        "cα'/B of fine-tuning and the error E' where both are best, λ included, for a budget "
        "B = α + cα' (N = αD² and N' = α'D sequences: one of fine-tuning costs as much as cD of "
        "pre-training); full lines linear attention, dashed softmax. (g, h) E' along the share at "
        f"B = {BUDGET:g}, c = {COST:g}, λ the best for linear attention and {HELD['softmax']:g} "
        f"for softmax. Simulations: {simulated['seeds'].iloc[0]:.0f} seeds, mean ± standard "
        f"error, informed start, D = {simulated['dim'].max():.0f}, in (d) extrapolated in 1/D from "
        f"D = {' and '.join(f'{dim:.0f}' for dim in sorted(simulated['dim'].unique()))}; for "
        "linear attention the O(1/√D) cross term is subtracted from E'. Error bars of the theory: "
        "two sets of nodes. "
        f"Simulated overlaps: {'; '.join(_overlap_text(table, name) for name in NOISES)}. "
        f"E' simulated off the best split minus near it, at the largest D, in brackets theory: "
        f"{'; '.join(_differences(table, name) for name in NOISES)}. Theory points of (e) to (h) "
        f"that are unstable: {unstable}; not converged: {unsolved}."
    )


def _overlap_text(table: pd.DataFrame, activation: str) -> str:
    part = table[table["activation"] == activation]
    texts = []
    for kind, words in (("line", "on the line"), ("control", "with one α'")):
        rows = _overlaps(part[part["observable"] == f"{kind}_overlap"])
        numbers = ", ".join(str(Estimate(row.value, row.error, 2)) for row in rows.itertuples())
        texts.append(f"{words} {numbers}")
    return f"{activation}, {', '.join(texts)}"


def _differences(table: pd.DataFrame, activation: str) -> str:
    part = table[(table["activation"] == activation)]
    curve = part[(part["source"] == "theory") & part["share"].notna()]
    curve = curve[curve["observable"] == "test_error"].sort_values("share")
    rows = part[part["observable"] == "test_error_difference"].sort_values("share")
    rows = rows[rows["dim"] == rows["dim"].max()]
    texts = []
    for row in rows.itertuples():
        ends = np.interp([row.share, SHARES[0]], curve["share"], curve["value"])
        texts.append(
            f"share {row.share:g} {Estimate(row.value, row.error, 2)} ({ends[0] - ends[1]:.2g})"
        )
    return f"{activation}, {', '.join(texts)}"


EXPERIMENT = Experiment("price", compute, draw, caption)
