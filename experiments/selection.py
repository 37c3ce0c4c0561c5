"""Beyond the published choice: what sequences chosen from a pool are worth, and the best score.

T = 2, κ0 = Δ = .5, κ = 1, α = .2, λ' = .2, q0 = 1, fresh sequences.  Left: the worth of low
variance, ᾱ' = 100, α' = 4, along λ, which moves the gain M/Q of the frozen weights.  Right:
softmax, ᾱ' = 60, α' = 3, λ = .05, the score |h − target|² up to a constant, f − c(h_12 − mean h_aa)
with f the variance without its flat direction; c moves the target towards the other token.

Rows test_error_ratio: E' over that of any sequences, the simulated one paired by seed.  Row
best_c: where the theory of the family is least, its error from other nodes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from figure_tools import (
    CURVES,
    Experiment,
    Profile,
    computed,
    measured_rows,
    predicted_rows,
    shade_unstable,
    solved,
)
from matplotlib.figure import Figure
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize_scalar

from lora_theory import Estimate, Finetuning, Prediction, Pretraining, Problem, Selection, predict
from lora_theory.sweeps import kept_simulations

ACTIVATIONS, PENALTY = ("softmax", "linear"), "pretraining.penalty"
ANY = "uniform"
#: Of the theory in the full profile, per block.
NODES = 2048
#: λ of the theory and of the simulations.
PENALTIES = {
    "quick": (0.01, 0.1, 0.5),
    "full": (0.005, 0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.35, 0.6),
}
SIMULATED = {"quick": (0.1,), "full": (0.01, 0.1, 0.35)}
FLATLESS = "variance - (diagonal + cross)**2/2"
#: c of the theory and of the simulations.
TARGETS = {
    "quick": (-1.0, 0.5, 2.0),
    "full": (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 4.0),
}
TRIED = {"quick": (0.5,), "full": (-1.0, 0.5, 2.5)}
#: Scores drawn as levels beside the family.
LEVELS = {"low_variance": "low\nvariance", "cross_token": "large\ncross"}
SCORE = "finetuning.selection.score"


def along_penalty(activation: str, penalty: float, score: str) -> Problem:
    selection = Selection(pool=100.0, score=score)
    return _problem(activation, penalty, 4.0, selection)


def in_family(c: float) -> Problem:
    text = f"{FLATLESS} - ({c:g})*(cross - diagonal)"
    return _problem("softmax", 0.05, 3.0, Selection(pool=60.0, score="function", function=text))


def named(score: str) -> Problem:
    return _problem("softmax", 0.05, 3.0, Selection(pool=60.0, score=score))


def _problem(activation: str, penalty: float, samples: float, selection: Selection) -> Problem:
    return Problem(
        tokens=2,
        activation=activation,
        teacher_rank=0.5,
        label_noise=0.5,
        pretraining=Pretraining(samples=0.2, penalty=penalty),
        finetuning=Finetuning(samples=samples, penalty=0.2, selection=selection),
    )


def _gain(prediction: Prediction) -> float:
    return prediction.effective_noise.gain


@functools.cache
def solve(asked: Problem, profile: Profile, seed: int = 0) -> Prediction:
    nodes = profile.pick(quick=128, full=NODES)
    return predict(asked, nodes=nodes, blocks=profile.blocks, seed=seed)


def theory(activation: str, profile: Profile, store: Path) -> Iterator[dict[str, Any]]:
    for penalty in PENALTIES[profile.name]:
        both = _any_and_low_variance(activation, penalty, profile)
        for found in both:
            yield from predicted_rows(found, {"panel": "gain", "at": _gain(found)})
        yield _ratio(both)
    if activation != "softmax":
        return
    for score in (ANY, *LEVELS):
        yield from predicted_rows(solve(named(score), profile), {"panel": "level", "at": math.nan})
    for c in TARGETS[profile.name]:
        yield from predicted_rows(solve(in_family(c), profile), {"panel": "family", "at": c})
    yield best_in_family(profile)


def _any_and_low_variance(activation: str, penalty: float, profile: Profile) -> list[Prediction]:
    scores = ANY, "low_variance"
    return [solve(along_penalty(activation, penalty, score), profile) for score in scores]


def _ratio(both: list[Prediction]) -> dict[str, Any]:
    stages = [found.finetuning for found in both]
    ratio = stages[1].test_error / stages[0].test_error
    errors = [s.quadrature_error["test_error"] / s.test_error for s in stages]
    return next(predicted_rows(both[1], {"panel": "gain", "at": _gain(both[1])})) | {
        "observable": "test_error_ratio", "value": ratio, "error": ratio * math.hypot(*errors),
    }  # fmt: skip


def predicted_ratio(activation: str, penalty: float, profile: Profile) -> dict[str, Any]:
    """Row of E' with low variance over that with any sequences."""
    return _ratio(_any_and_low_variance(activation, penalty, profile))


def best_in_family(profile: Profile) -> dict[str, Any]:
    """Row of the c of least E', its error from other nodes."""
    places = []
    for seed in range(profile.pick(quick=2, full=3)):
        found = {c: solve(in_family(c), profile, seed) for c in TARGETS[profile.name]}
        places.append(least({c: one.finetuning.test_error for c, one in found.items()}))
    best = Estimate.of(places)
    return {
        **in_family(0.0).to_flat(), "panel": "family", "source": "theory", "start": "informed",
        "status": "converged", "observable": "best_c", "value": best.mean, "error": best.error,
    }  # fmt: skip


def least(values: dict[float, float]) -> float:
    """Where the cubic spline through the values is least."""
    c, heights = np.array(list(values)), np.array(list(values.values()))
    middle = int(np.clip(heights.argmin(), 1, len(c) - 2))
    bounds = (c[middle - 1], c[middle + 1])
    return float(minimize_scalar(CubicSpline(c, heights), bounds=bounds, method="bounded").x)


def simulation(activation: str, profile: Profile, store: Path) -> Iterator[dict[str, Any]]:
    dim, seeds = profile.pick(quick=(40, 4), full=(100, 32))

    def ratio(
        asked: Problem, reference: Problem, labels: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        errors = []
        for one in (asked, reference):
            effort = {"starts": 1, "dtype": "float32"}
            (result,) = kept_simulations(one, [dim], seeds, store / activation, **effort)
            errors.append(pd.DataFrame(result.runs)["finetuning.test_error"])
            rows = list(measured_rows(result, labels))
            yield from rows
            if one is asked:
                first = rows[0]
        # to first order in the scatter, the ratio of the means
        means = [float(error.mean()) for error in errors]
        found = Estimate.of(means[0] / means[1] * (1 + errors[0] / means[0] - errors[1] / means[1]))
        numbers = {"value": found.mean, "error": found.error}
        yield first | {"observable": "test_error_ratio"} | numbers

    for penalty in SIMULATED[profile.name]:
        asked, plain = (along_penalty(activation, penalty, s) for s in ("low_variance", ANY))
        found = predict(asked.replace(finetuning=None), nodes=64)
        yield from ratio(asked, plain, {"panel": "gain", "at": _gain(found)})
    if activation == "softmax":
        for c in TRIED[profile.name]:
            yield from ratio(in_family(c), named(ANY), {"panel": "family", "at": c})
        for score in LEVELS:
            yield from ratio(named(score), named(ANY), {"panel": "level", "at": math.nan})


def rows_of(source: str, activation: str, profile: Profile, store: Path) -> list[dict[str, Any]]:
    return list({"theory": theory, "simulation": simulation}[source](activation, profile, store))


def compute(profile: Profile, store: Path) -> pd.DataFrame:
    return computed(rows_of, ACTIVATIONS, profile, store)


def draw(table: pd.DataFrame) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, 3.0), layout="constrained")
    part = solved(table)
    _draw_gain(left, part)
    _draw_family(right, part)
    return figure


def _draw_gain(panel: Any, part: pd.DataFrame) -> None:
    panel.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    panel.axvline(1, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    for activation, (color, dashes, marker) in zip(ACTIVATIONS, CURVES[1:], strict=True):
        here = part[(part["activation"] == activation) & (part["panel"] == "gain")]
        line = rows_by(here, "test_error_ratio", "theory")
        points = rows_by(here, "test_error_ratio", "simulation")
        panel.plot(line["at"], line["value"], color=color, linestyle=dashes, label=activation)
        low, high = line["value"] - line["error"], line["value"] + line["error"]
        panel.fill_between(line["at"], low, high, color=color, alpha=0.2, linewidth=0)
        shade_unstable(panel, "at", line, line["value"], color)
        _points(panel, points, color, marker)
    panel.set_xscale("log")
    ticks = (0.8, 1, 1.5, 2, 3, 5)
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_xticks([], minor=True)
    panel.set_xlabel(r"gain $M/Q$ of the frozen weights, along $\lambda$")
    panel.set_ylabel("$E'$ with low variance over\n$E'$ with any sequences")
    panel.legend()


def _draw_family(panel: Any, part: pd.DataFrame) -> None:
    softmax = part[part["activation"] == "softmax"]
    family, named_scores = (softmax[softmax["panel"] == name] for name in ("family", "level"))
    line, plain = rows_by(family, "test_error", "theory"), level(softmax, ANY)
    color, dashes, marker = CURVES[1]
    heights, error = line["value"] / plain["value"], line["error"] / plain["value"]
    panel.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    panel.plot(line["at"], heights, color=color, linestyle=dashes)
    panel.fill_between(line["at"], heights - error, heights + error, color=color, alpha=0.2, lw=0)
    unstable = line["status"] == "unstable"
    panel.plot(line["at"][unstable], heights[unstable], "s", color=color, alpha=0.3, ms=7, zorder=1)
    _points(panel, rows_by(family, "test_error_ratio", "simulation"), color, marker)
    best = softmax[softmax["observable"] == "best_c"].iloc[0]
    ends = best["value"] - best["error"], best["value"] + best["error"]
    panel.axvspan(*ends, color="0.85", zorder=0)
    # the named scores beside the family, each a level
    ticks = [tick for tick in (-1, 0, 1, 2, 3, 4) if tick <= line["at"].max()]
    labels = [f"{tick}" for tick in ticks]
    for score, (shade, _, symbol) in zip(LEVELS, CURVES[::2], strict=True):
        place, here = ticks[-1] + 1.3, level(softmax, score)
        height, width = here["value"] / plain["value"], here["error"] / plain["value"]
        panel.plot([place - 0.35, place + 0.35], [height] * 2, color=shade)
        panel.fill_between(
            [place - 0.35, place + 0.35], height - width, height + width,
            color=shade, alpha=0.2, linewidth=0,
        )  # fmt: skip
        measured = rows_by(named_scores, "test_error_ratio", "simulation", by=SCORE)
        _points(panel, measured[measured[SCORE] == score].assign(at=place), shade, symbol)
        ticks, labels = [*ticks, place], [*labels, LEVELS[score]]
    panel.set_xticks(ticks, labels)
    panel.set_xlabel("target $c$ of the score (softmax), and named scores")
    panel.set_ylabel("$E'$ over $E'$ with any sequences")


def rows_by(part: pd.DataFrame, name: str, source: str, *, by: str = "at") -> pd.DataFrame:
    """The rows of an observable by the place on the axis."""
    here = (part["observable"] == name) & (part["source"] == source)
    return part[here].sort_values(by)


def level(softmax: pd.DataFrame, score: str) -> pd.Series:
    """The theory of E' for a named score."""
    here = (softmax["panel"] == "level") & (softmax["source"] == "theory")
    here &= (softmax[SCORE] == score) & (softmax["observable"] == "test_error")
    return softmax[here].iloc[0]


def _points(panel: Any, points: pd.DataFrame, color: str, marker: str) -> None:
    panel.errorbar(
        points["at"], points["value"], points["error"],
        fmt=marker, color=color, mfc="white", capsize=1.5, linewidth=0.8, zorder=3,
    )  # fmt: skip


def caption(table: pd.DataFrame) -> str:
    simulated = table[table["source"] == "simulation"]
    theory_rows = table[(table["source"] == "theory") & (table["observable"] == "test_error")]
    unstable = (theory_rows["status"] == "unstable").sum()
    softmax = table[table["activation"] == "softmax"]
    best = softmax[softmax["observable"] == "best_c"].iloc[0]
    plain = level(softmax, ANY)
    texts = []
    for score in LEVELS:
        here = level(softmax, score)
        texts.append(f"{score} {_ratio_text(here, plain)}")
    family = rows_by(softmax[softmax["panel"] == "family"], "test_error", "theory")
    lowest = family.loc[family["value"].idxmin()]
    return (
        "**What choosing is worth.** Test error E' after LoRA (label noise included) on sequences "
        "chosen from a pool, over that on any sequences. Left: low variance of the frozen logits, "
        "pool 100, α' = 4, against the gain M/Q of the frozen weights, moved by λ from 0.005 to "
        "0.6; for linear attention nothing is gained where M/Q = 1. Right: softmax, pool 60, "
        "α' = 3, λ = 0.05, the score variance - (diagonal + cross)²/2 - c(cross - diagonal), that "
        "is the distance of the logits, without the direction that softmax does not see, from a "
        f"target; its best c = {Estimate(best['value'], best['error'], 1)} (grey) and the least E' "
        f"of the points of theory, at c = {lowest['at']:g}: {_ratio_text(lowest, plain)}; by name: "
        f"{', '.join(texts)}. Lines: theory, with a band of its quadrature error; markers: "
        "simulation from the informed start, both stages trained, "
        f"D = {simulated['dim'].iloc[0]:.0f}, mean ± standard error of "
        f"{simulated['seeds'].iloc[0]:.0f} seeds, ratios paired by seed. T = 2, κ0 = Δ = 0.5, "
        f"κ = 1, α = 0.2, λ' = 0.2, q0 = 1. Theory points unstable, with a pale band or square: "
        f"{unstable}."
    )


def _ratio_text(row: pd.Series, plain: pd.Series) -> str:
    ratio = row["value"] / plain["value"]
    error = ratio * math.hypot(row["error"] / row["value"], plain["error"] / plain["value"])
    return str(Estimate(ratio, error, 1))


EXPERIMENT = Experiment("selection", compute, draw, caption)
