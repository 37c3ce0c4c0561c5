"""Published Fig 3's set: the pre-training penalty of least error is not that of best alignment.

Given for that figure: re-used sequences, T = 2, Δ = .5, κ0 = .5, κ = 1, α = .2, α' = 3; error and
overlap against λ.  Assumed here: λ' = .2, q0 = 1, the range of λ; fresh sequences are added.

λ*_E' and λ*_o, the penalties of least E' and best o, are rows of the table: *_best_penalty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, product, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from figure_tools import (
    PAIRED,
    Experiment,
    Profile,
    paired_rows,
    predicted_rows,
    shade_unstable,
    solved,
)
from matplotlib.figure import Figure
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize_scalar

from lora_theory import Estimate, Finetuning, Prediction, Pretraining, Problem, predict

PENALTY = "pretraining.penalty"
PANELS = tuple(product(("softmax", "linear"), ("fresh", "reused")))
#: E' and 1 − o are what gets minimised.
OBJECTIVES = PAIRED
#: λ of the simulations and, between and around them, of the theory.
SIMULATED = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)
BETWEEN = (0.001, 0.0015, 0.002, 0.003, 0.007, 0.015, 0.07, 0.15, 0.3, 0.4, 0.7, 1.4, 2.0)
#: Up to where the weights nearly vanish (softmax: they do at .85).
LARGEST = {"softmax": 0.5, "linear": 2.0}
#: The simulations at λ = FEW are compared, seed by seed, with those near λ*_E'.
FEW, NEAR_LEAST_ERROR = 0.005, {"softmax": 0.03, "linear": 0.1}
#: Of the theory in the full profile, per block.
NODES = {"softmax": 2048, "linear": 1024}
#: Half the width in log λ of the parabola whose vertex, on other nodes, gives the error of λ*.
WIDTH = 0.3


def problem(activation: str, sequences: str, penalty: float) -> Problem:
    return Problem(
        tokens=2,
        activation=activation,
        teacher_rank=0.5,
        label_noise=0.5,
        pretraining=Pretraining(samples=0.2, penalty=penalty),
        finetuning=Finetuning(samples=3.0, penalty=0.2, sequences=sequences),
    )


def up_to_largest(activation: str, penalties: tuple[float, ...]) -> list[float]:
    return sorted(penalty for penalty in penalties if penalty <= LARGEST[activation])


def objective(stage: Any, name: str) -> float:
    return 1 - stage.overlap if name == "overlap" else getattr(stage, name)


def best_penalty(penalties: Any, values: Any) -> float:
    """Where the cubic spline through the values, in log λ, is least; maybe the first or last λ."""
    order = np.argsort(penalties)
    x, y = np.log(np.asarray(penalties)[order]), np.asarray(values)[order]
    lowest = int(np.argmin(y))
    if lowest in (0, len(x) - 1):
        return float(np.asarray(penalties)[order][lowest])
    bounds = (x[lowest - 1], x[lowest + 1])
    return float(np.exp(minimize_scalar(CubicSpline(x, y), bounds=bounds, method="bounded").x))


def theory(
    activation: str, sequences: str, profile: Profile, store: Path
) -> Iterator[dict[str, Any]]:
    """Rows of a curve, of the points that refine its minima, and of the minima."""
    nodes = profile.pick(quick=64, full=NODES[activation])
    penalties = profile.pick(quick=(BETWEEN[0], *SIMULATED), full=SIMULATED + BETWEEN)

    def predicted(penalty: float, seed: int = 0) -> Prediction:
        asked = problem(activation, sequences, penalty)
        return predict(asked, nodes=nodes, blocks=profile.blocks, seed=seed)

    curve: dict[float, Prediction] = {}
    for penalty in up_to_largest(activation, penalties):
        curve[penalty] = predicted(penalty)
        yield from predicted_rows(curve[penalty], {})

    for name in OBJECTIVES:
        best = _least(curve, name)
        for _ in range(2):
            if best not in curve:
                curve[best] = predicted(best)
                yield from predicted_rows(curve[best], {})
            best, former = _least(curve, name), best
        error = None  # none is known where the first λ, or the last, is best
        if min(curve) < best < max(curve):
            error = math.hypot(best - former, _scatter(predicted, best, name, profile))
        yield {
            **problem(activation, sequences, best).to_flat(),
            "source": "theory",
            "start": curve[former].finetuning.branch,
            "status": curve[former].status.value,
            "observable": f"{name}_best_penalty",
            "value": best,
            "error": error,
        }


def _least(curve: dict[float, Prediction], name: str) -> float:
    return best_penalty(list(curve), [objective(p.finetuning, name) for p in curve.values()])


def _scatter(
    predicted: Callable[[float, int], Prediction], best: float, name: str, profile: Profile
) -> float:
    """Standard deviation of λ* over independent sets of nodes: the quadrature error of one set."""
    vertices = []
    for seed in range(1, profile.pick(quick=3, full=5)):
        stages = [predicted(best * math.exp(step), seed).finetuning for step in (-WIDTH, 0, WIDTH)]
        left, middle, right = (objective(stage, name) for stage in stages)
        vertices.append(WIDTH / 2 * (left - right) / (left + right - 2 * middle))
    return float(best * np.std(vertices, ddof=1))


def simulation(
    activation: str, sequences: str, profile: Profile, store: Path
) -> Iterator[dict[str, Any]]:
    """Rows of the simulations; all λ share their seeds, so differences along λ have less noise."""
    dim, seeds = profile.pick(quick=(48, 8), full=(100, 32))
    reference = NEAR_LEAST_ERROR[activation]
    penalties = profile.pick(quick=(FEW, reference, 0.5), full=SIMULATED)
    penalties = up_to_largest(activation, penalties)
    problems = {penalty: problem(activation, sequences, penalty) for penalty in penalties}
    return paired_rows(problems, reference, dim, seeds, store / activation / sequences)


ROWS = {"theory": theory, "simulation": simulation}


def rows_of(
    source: str, activation: str, sequences: str, profile: Profile, store: Path
) -> list[dict[str, Any]]:
    return list(ROWS[source](activation, sequences, profile, store))


def compute(profile: Profile, store: Path) -> pd.DataFrame:
    # two processes share the jobs, the theory of softmax first, which takes longest
    jobs = [
        (source, activation, sequences)
        for activation in ("softmax", "linear")
        for source in profile.sources
        for sequences in ("fresh", "reused")
    ]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        parts = pool.map(rows_of, *zip(*jobs, strict=True), repeat(profile), repeat(store))
        return pd.DataFrame(list(chain.from_iterable(parts)))


TITLES = {"fresh": "fresh sequences, e = 0", "reused": "re-used sequences, e = 1"}
LABELS = {"test_error": "test error $E'$", "overlap": "misalignment $1-o$"}
#: Symbol, Okabe–Ito colour, line and marker of the two optima.
OPTIMA = {
    "test_error": (r"$\lambda^*_{E'}$", "#0072B2", "-", "v"),
    "overlap": (r"$\lambda^*_o$", "#D55E00", (0, (4, 2)), "D"),
}
#: The ends of the vertical axes, and their ticks.
AXES = {
    ("softmax", "test_error"): ((0.175, 0.55), (0.2, 0.3, 0.4, 0.5)),
    ("softmax", "overlap"): ((0.009, 0.3), (0.01, 0.03, 0.1, 0.3)),
    ("linear", "test_error"): ((0.68, 1.7), (0.7, 0.8, 1.0, 1.2, 1.5)),
    ("linear", "overlap"): ((0.0025, 0.08), (0.003, 0.01, 0.03)),
}


def draw(table: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(2, 4, figsize=(7.0, 3.8), sharex="col", layout="constrained")
    for column, panel in enumerate(PANELS):
        part = panel_rows(table, *panel)
        for row, name in enumerate(OBJECTIVES):
            _draw_panel(axes[row, column], part, name)
            axes[row, column].tick_params(labelleft=column % 2 == 0)
            axes[row, 0].set_ylabel(LABELS[name])
        axes[0, column].set_title(f"{panel[0]}\n{TITLES[panel[1]]}", pad=14)
        axes[1, column].set_xlabel(r"pre-training penalty $\lambda$")
        _name_optima(axes[0, column], part)
    axes[1, 3].legend(loc="upper left", handlelength=1.5)
    return figure


def panel_rows(table: pd.DataFrame, activation: str, sequences: str) -> pd.DataFrame:
    here = (table["activation"] == activation) & (table["finetuning.sequences"] == sequences)
    return table[here]


def optima(part: pd.DataFrame) -> dict[str, float]:
    """λ of least E' and of best o."""
    values = part.set_index("observable")["value"]
    return {name: float(values[f"{name}_best_penalty"]) for name in OBJECTIVES}


def _draw_panel(panel: Any, part: pd.DataFrame, name: str) -> None:
    activation, best, shown = part["activation"].iloc[0], optima(part), solved(part)
    curve = shown[(shown["source"] == "theory") & (shown["observable"] == name)]
    curve = curve.sort_values(PENALTY)
    corrected = activation == "linear" and name == "test_error"
    points = shown[(shown["source"] == "simulation") & (shown["start"] == "informed")]
    points = points[points["observable"] == ("corrected_test_error" if corrected else name)]
    heights = [1 - c["value"] if name == "overlap" else c["value"] for c in (curve, points)]
    panel.plot(curve[PENALTY], heights[0], color="black", label="theory")
    shade_unstable(panel, PENALTY, curve, heights[0], "black")
    panel.errorbar(
        points[PENALTY], heights[1], points["error"],
        fmt="o", color="black", mfc="white", capsize=1.5, linewidth=0.8, zorder=3,
        label="simulation",
    )  # fmt: skip
    panel.axvspan(*sorted(best.values()), color="0.88", linewidth=0, zorder=0)
    for which, (_, color, dashes, marker) in OPTIMA.items():
        panel.axvline(best[which], color=color, linestyle=dashes, linewidth=1.0, zorder=1)
        if which == name:
            height = np.interp(best[which], curve[PENALTY], heights[0])
            panel.plot(best[which], height, marker, color=color, ms=5.5, zorder=4, clip_on=False)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(curve[PENALTY].min(), curve[PENALTY].max())
    ends, ticks = AXES[activation, name]
    panel.set_ylim(ends)
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_yticks([], minor=True)


def _name_optima(panel: Any, part: pd.DataFrame) -> None:
    """The symbols of both optima above a panel; in one where they coincide."""
    best, transform = optima(part), panel.get_xaxis_transform()
    if abs(math.log(best["test_error"] / best["overlap"])) < 0.01:
        text = " = ".join(symbol for symbol, *_ in OPTIMA.values())
        panel.text(best["overlap"], 1.02, text, transform=transform, ha="center", fontsize=8)
        return
    for name, (symbol, color, *_) in OPTIMA.items():
        at_edge = best[name] <= part[PENALTY].min()
        text = rf"{symbol}$\to 0$" if at_edge else symbol
        side = "right" if best[name] == min(best.values()) and not at_edge else "left"
        panel.text(best[name], 1.02, text, transform=transform, ha=side, color=color, fontsize=8)


def caption(table: pd.DataFrame) -> str:
    simulated = table[table["source"] == "simulation"]
    shown = table[(table["source"] == "theory") & table["observable"].isin(OBJECTIVES)]
    jumping = shown["status"].isin(("jumps", "unstable"))
    parts = [panel_rows(table, *panel) for panel in PANELS]
    optima_text = "; ".join(_optima_text(part) for part in parts)
    differences = [p for p in parts if p["observable"].eq("overlap_difference").any()]
    contrast_text = "; ".join(_contrast_text(part) for part in differences)
    return (
        "**Figure 3.** The pre-training penalty λ of least test error is not that of best "
        "alignment. Test error E' after LoRA (label noise included) and misalignment 1 - o, both "
        "better when lower, against λ, with fresh (e = 0) and re-used (e = 1) fine-tuning "
        "sequences. Lines: theory; circles: simulation from the informed start w*, "
        f"D = {simulated['dim'].iloc[0]:.0f}, mean ± standard error of "
        f"{simulated['seeds'].iloc[0]:.0f} seeds, the same at every λ; for linear attention the "
        "measured O(1/√D) cross term of docs/theory.md, section 7, is subtracted from E', for "
        "softmax it is not; offsets O(1/D) remain. Triangles and full blue lines: λ*_E', least "
        "E'; diamonds and dashed red lines: λ*_o, best o; grey: the gap between the two. T = 2, "
        "κ0 = 0.5, κ = 1, Δ = 0.5, α = 0.2, α' = 3, e = 1: set of the published Fig 3; assumed: "
        "λ' = 0.2, q0 = 1, the range of λ (up to where the weights nearly vanish; E' above the "
        "panels is cut off). "
        f"Theory: {optima_text}. "
        "Simulated differences, paired by seed (in brackets theory; z of the simulated mean, "
        f"against 0): {contrast_text}. "
        f"Theory points with jumps of the proximal operator: {jumping.sum() // 2}, of which "
        f"unstable, with a pale band: {(shown['status'] == 'unstable').sum() // 2}; "
        f"not converged (left out): {(shown['status'] == 'not_converged').sum() // 2} of "
        f"{len(shown) // 2}. For softmax and fresh sequences an uninformed branch coexists; the "
        "table also holds the lowest of two random starts.\n"
    ).strip()


def _optima_text(part: pd.DataFrame) -> str:
    theory_of = part[part["source"] == "theory"].set_index("observable")
    texts = []
    for name in OBJECTIVES:
        symbol, row = {"test_error": "λ*_E'", "overlap": "λ*_o"}[name], f"{name}_best_penalty"
        best, error = theory_of.loc[row, ["value", "error"]]
        text = f"{symbol} = {Estimate(best, error, 1)}"
        if best <= part[PENALTY].min():
            text = f"{symbol} → 0, at λ = {best:g}"
        numbers = ", ".join(
            f"{letter} = {_theory_at(part, which, best)}"
            for letter, which in (("E'", "test_error"), ("o", "overlap"))
        )
        texts.append(f"{text} ({numbers})")
    return f"{_panel_name(part)}: " + ", ".join(texts)


def _contrast_text(part: pd.DataFrame) -> str:
    near = NEAR_LEAST_ERROR[part["activation"].iloc[0]]
    texts = []
    for letter, name in (("E'", "test_error"), ("o", "overlap")):
        rows = part[(part["observable"] == f"{name}_difference") & (part[PENALTY] == FEW)]
        value, error = rows[["value", "error"]].iloc[0]
        expected = _theory_at(part, name, FEW).mean - _theory_at(part, name, near).mean
        texts.append(
            f"{letter} {Estimate(value, error, 1)} ({expected:.2g}), z = {value / error:.0f}"
        )
    return f"{_panel_name(part)}, λ = {FEW:g} minus λ = {near:g}: " + ", ".join(texts)


def _theory_at(part: pd.DataFrame, name: str, penalty: float) -> Estimate:
    rows = part[(part["source"] == "theory") & (part["observable"] == name)]
    row = rows.iloc[np.abs(np.log(rows[PENALTY] / penalty)).argmin()]
    return Estimate(row["value"], row["error"], 1)


def _panel_name(part: pd.DataFrame) -> str:
    flag = {"fresh": 0, "reused": 1}[part["finetuning.sequences"].iloc[0]]
    return f"{part['activation'].iloc[0]}, e = {flag}"


EXPERIMENT = Experiment("figure3", compute, draw, caption)
