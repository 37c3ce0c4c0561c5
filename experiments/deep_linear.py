"""Deep linear networks: how fast gradient descent converges, plain and with the PC layer."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from itertools import chain, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from deep_linear_rows import (
    DECAY,
    DEPTHS,
    FITTED,
    LAYERS,
    PARTS,
    RATE,
    RESOLVED,
    SIDE,
    SPREADS,
    WIDTHS,
)  # fmt: skip
from figure_tools import Experiment, Profile
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullFormatter

from lora_theory import Estimate


def rows_of(part: str, profile: Profile) -> list[dict[str, Any]]:
    return [row for rows in PARTS[part] for row in rows(profile)]


def compute(profile: Profile, store: Path) -> pd.DataFrame:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        parts = pool.map(rows_of, PARTS, repeat(profile))
        return pd.DataFrame(list(chain.from_iterable(parts)))


#: Colour, line style, marker.
STYLES = {
    "plain": ("#0072B2", "-", "o"),
    "degree 1": ("#000000", ":", "v"),
    "degree 3": ("#009E73", "-.", "D"),
    "degree 5": ("#E69F00", "-.", "s"),
    "degree 9": ("#D55E00", "--", "^"),
    "degree 9, orthogonal": ("#CC79A7", ":", "v"),
    "degree 9, γ trained": ("#CC79A7", ":", "v"),
}


def draw(table: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(2, 3, figsize=(7.2, 5.2), layout="constrained")
    panels = (_loss, _rates, _extremes, _spectra, _rank, _decay)
    names = ("loss", "rates", "spectrum", "spectrum", "rank", "decay")
    for letter, panel, paint, name in zip("abcdef", axes.flat, panels, names, strict=True):
        paint(panel, table[table["panel"] == name])
        title = panel.get_title()
        panel.set_title("")
        panel.set_title(f"({letter}) {title}", loc="left")
    return figure


def _bars(rows: pd.DataFrame) -> np.ndarray:
    """Errors of logarithms, as distances below and above."""
    factor = np.exp(rows["error"] / rows["value"])
    return np.array([rows["value"] * (1 - 1 / factor), rows["value"] * (factor - 1)])


def _points(panel: Any, rows: pd.DataFrame, arm: str, **named: Any) -> None:
    color, _, marker = STYLES[arm]
    settings = {"fmt": marker, "color": color, "capsize": 1.5, "linewidth": 0.8, "markersize": 3}
    panel.errorbar(rows["step"], rows["value"], yerr=_bars(rows), **settings | named)


def _loss(panel: Any, part: pd.DataFrame) -> None:
    for arm in ("plain", "degree 9", "degree 9, orthogonal"):
        rows = part[(part["arm"] == arm) & (part["observable"] == "excess")]
        fill = "white" if "orthogonal" in arm else STYLES[arm][0]
        _points(panel, rows[rows["step"] % 100 == 0], arm, label=arm, mfc=fill)
    plain = part[part["arm"] == "plain"]
    bound, tail = (plain[plain["observable"] == kind] for kind in ("envelope", "tail"))
    panel.plot(bound["step"], bound["value"], color="black", linestyle="--", label="plain: bound")
    tail = tail[tail["step"] >= 100]
    panel.plot(tail["step"], tail["value"], color="black", label="plain: exact slope", zorder=0)
    panel.set_yscale("log")
    panel.set_ylim(1e-20, 1e2)
    panel.set(title="bounded layers", xlabel="steps $t$", ylabel=r"$(f_t-f^*)/(f_0-f^*)$")
    panel.legend(loc="lower left", handlelength=1.8, fontsize=6)


def _rates(panel: Any, part: pd.DataFrame) -> None:
    keys = ["arm", "depth", "spread"]
    rows = part[part["observable"] == "rate"]
    slopes = rows[rows["source"] == "simulation"].set_index(keys)
    theory = rows[rows["source"] == "theory"].set_index("kind")

    def pairs(kind: str, arm: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        there = theory.loc[kind]
        there = there[there["arm"] == arm].set_index(keys)
        return there, slopes.loc[there.index]

    for kind, marker, label in [
        ("layerwise", "o", "bound (plain)"),
        ("without layers", "x", "wrong: no layers"),
        ("white inputs", "+", "wrong: white $X$"),
    ]:
        there, here = pairs(kind, "plain")
        panel.plot(
            there["value"], here["value"], marker, color="0.55", mfc="white", label=label,
            zorder=1,
        )  # fmt: skip
    for arm in ("plain", "degree 5", "degree 9"):
        there, here = pairs("exact", arm)
        color, _, marker = STYLES[arm]
        panel.errorbar(
            there["value"], here["value"], xerr=_bars(there), yerr=_bars(here), fmt=marker,
            color=color, capsize=1.5, linewidth=0.6, label=arm,
        )  # fmt: skip
    ends = [0.5 * slopes["value"].min(), 2 * slopes["value"].max()]
    panel.plot(ends, ends, color="black", linewidth=0.8, zorder=0)
    panel.set(xscale="log", yscale="log", title="rate at the minimum")
    panel.set(xlabel=r"predicted $-\ln\varphi$", ylabel=r"measured $-\ln\varphi$ per step")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g}"))
        axis.set_minor_formatter(NullFormatter())
    panel.legend(loc="lower right", handlelength=1, fontsize=6, borderpad=0)
    panel.set_ylim(ends[0] / 5, ends[1])


def _extremes(panel: Any, part: pd.DataFrame) -> None:
    for arm in ("plain", "degree 1", "degree 5", "degree 9"):
        color, style, _ = STYLES[arm]
        for which in ("largest", "smallest"):
            rows = part[(part["arm"] == arm) & (part["observable"] == which) & (part["step"] > 0)]
            below, above = _bars(rows)
            panel.fill_between(
                rows["step"],
                rows["value"] - below,
                rows["value"] + above,
                color=color,
                alpha=0.2,
                linewidth=0,
            )
            panel.plot(
                rows["step"], rows["value"], color=color, linestyle=style,
                label=arm if which == "largest" else None,
            )  # fmt: skip
    panel.text(15, 1.15, r"$\sigma_1$", va="bottom")
    panel.text(1200, 0.2, rf"$\sigma_{{{SIDE}}}$", va="bottom")
    panel.set(xscale="log", yscale="log", title="one layer, equal gain")
    panel.set(xlabel="steps $t$", ylabel=r"singular values of $W_{\rm eff}$")
    panel.set_ylim(0.003, 2)
    panel.legend(loc="lower right", handlelength=2.2)


def _spectra(panel: Any, part: pd.DataFrame) -> None:
    rows = part[part["observable"] == "singular_value"]
    fills = ("white", "0.75", None)
    for arm in ("plain", "degree 9"):
        color, style, marker = STYLES[arm]
        for step, fill in zip(sorted(rows["step"].unique()), fills, strict=True):
            at = rows[(rows["arm"] == arm) & (rows["step"] == step)]
            panel.errorbar(
                at["index"], at["value"], yerr=_bars(at), marker=marker, linestyle=style,
                color=color, mfc=fill or color, capsize=1.5, linewidth=0.8,
                label=f"{arm}, $t={step:.0f}$",
            )  # fmt: skip
    panel.set(yscale="log", title="its spectrum")
    panel.xaxis.set_major_locator(MultipleLocator(3))
    panel.set(xlabel="index $i$", ylabel=r"$\sigma_i$ of $W_{\rm eff}$")
    panel.legend(loc="lower left", handlelength=2.2, fontsize=6)


def _rank(panel: Any, part: pd.DataFrame) -> None:
    rows = part[part["observable"] == "smallest"]
    for arm in ("plain", "degree 3", "degree 9"):
        color, style, _ = STYLES[arm]
        at = rows[rows["arm"] == arm]
        theory = at[at["source"] == "theory"]
        panel.plot(theory["step"], theory["value"], color=color, linestyle=style)
        _points(panel, at[at["source"] == "simulation"], arm, label=arm, mfc="white")
    panel.set(xscale="log", yscale="log", title="target of lower rank")
    panel.set(xlabel="steps $t$", ylabel=r"$\sigma_{\min}$ of $W_{\rm eff}$")
    panel.legend(loc="lower left", title="lines: theory", title_fontsize=7)


def _decay(panel: Any, part: pd.DataFrame) -> None:
    rows = part[part["observable"] == "scale"]
    theory = rows[rows["source"] == "theory"]
    label = r"$(1-2\eta\lambda)^t$"
    panel.plot(theory["step"], theory["value"], color="black", linestyle="--", label=label)
    words = {"plain": "plain", "degree 9": r"degree 9, $\gamma$ held"}
    words["degree 9, γ trained"] = r"degree 9, $\gamma$ trained"
    for arm, word in words.items():
        _points(panel, rows[rows["arm"] == arm], arm, label=word, mfc="white")
    panel.set(yscale="log", title="weight decay")
    panel.set(xlabel="steps $t$", ylabel=r"$\hat\sigma_t/\hat\sigma_0$, first layer")
    panel.legend(loc="lower left")


def caption(table: pd.DataFrame) -> str:
    def rows(panel: str, observable: str) -> pd.DataFrame:
        return table[(table["panel"] == panel) & (table["observable"] == observable)]

    def estimates(panel: str, observable: str) -> str:
        found = rows(panel, observable)
        found = found[found["source"] == "simulation"]
        return ", ".join(f"{row['arm']} {_estimate(row)}" for _, row in found.iterrows())

    ratios = rows("rates", "rate_ratio")
    exact = ratios[ratios["kind"] == "exact"]
    distance = (exact["value"] - 1).abs()
    plain = ratios[ratios["arm"] == "plain"]
    alone = rows("rates", "rate_ratio_resolved")
    wrong = ", ".join(
        f"{of['value'].min():.2f} to {of['value'].max():.2f} {words}"
        for kind, words in (
            ("without layers", "for ησ_min(X)² alone"),
            ("white inputs", "with all singular values of X equal"),
        )
        for of in [plain[plain["kind"] == kind]]
    )
    fitted = rows("rates", "runs_fitted")
    least = rows("loss", "least_singular_value")
    shares = rows("loss", "share_of_envelope").set_index("arm")["highest"]
    finite = rows("decay", "runs_finite").set_index("arm").loc["degree 9, γ trained"]
    learning = rows("speed", "steps_to_fit")
    speeds = ", ".join(
        f"{row['arm']} {row['value']:.0f} ± {row['error']:.0f} (η = {row['learning_rate']:.2g})"
        for _, row in learning.iterrows()
    )
    return (
        "**Deep linear networks.** Gradient descent on ½‖W_L…W_1X − Y‖², plain layers and layers "
        f"in the PC parametrisation; mean ± standard error of {table['seeds'].max():.0f} seeds, "
        f"of logarithms where axes are logarithmic; η = {RATE}. "
        f"(a) Widths {WIDTHS}, targets of layers close to those at the start; singular values of "
        "the layers at the start from 1 to 0.5, or all 1 (orthogonal). The bound takes the "
        "smallest and largest singular values that each run went through; plain runs reach at most "
        f"{shares['plain']:.2g} of it after the start. For the PC layer the same formula fails, "
        "though its layers too stay bounded (smallest singular value of any run "
        f"{least['lowest'].min():.2f}). "
        "The exact slope is 2 ln φ of the residual, φ the spectral radius of 1 − ηK at the end. "
        f"(b) Depths {DEPTHS}, σ_1/σ_n at the start {SPREADS}, targets unrelated to the start; a "
        "point per problem. Measured over predicted, mean over seeds: at most "
        f"{distance.max():.1g} from 1, where the second rate is close; in each of the "
        f"{alone['seeds'].sum():.0f} runs whose second rate is {RESOLVED} times the first, at most "
        f"{max(alone['highest'].max() - 1, 1 - alone['lowest'].min()):.0e}. Wrong rates, plain: "
        f"{wrong}. "
        f"Runs that reached the minimum to rounding: {fitted['value'].sum():.0f} of "
        f"{fitted['seeds'].sum():.0f}; points are of those. "
        f"(c), (d) {LAYERS} square Gaussian layers of {SIDE}, every arm with the same ‖W_eff‖_F at "
        "the start; the middle layer. Steps until the loss has fallen to "
        f"{FITTED:g}, each at its best η: {speeds}; ratio to plain, by seed: "
        f"{estimates('speed', 'steps_ratio')}. "
        "(e) Two layers, a target of rank 3 of 4, layers and target with common singular vectors. "
        "Lines: 1/σ² grows by 2η(c_0γ)² a step, c_0 the slope of g_d at 0. Measured over predicted "
        f"growth in the second half: {estimates('rank', 'growth_ratio')}. "
        f"(f) Decay λ = {DECAY} on the weights. Slope of ln σ̂ over ln(1 − 2ηλ) in the last "
        f"quarter: {estimates('decay', 'decay_ratio')}. With γ trained as well, "
        f"{finite['seeds'] - finite['value']:.0f} of {finite['seeds']:.0f} runs diverge; points up "
        "to the first of them."
    )


def _estimate(row: pd.Series) -> Estimate:
    return Estimate(row["value"], row["error"], int(row["seeds"]))


EXPERIMENT = Experiment("deep_linear", compute, draw, caption)
