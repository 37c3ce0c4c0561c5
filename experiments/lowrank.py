"""What low-rank methods do to the effective noise, and LoRA to that: one axis for all of them.

Each method has a strength: weight decay and low-rank decay their penalty, a preconditioned factor
the scale ŝ beyond which no eigenvalue grows, truncation the rank that is kept of weights trained
with weight decay.  With tokens of covariance 1, SVD, SVD-LLM, OBD and AA-SVD are that truncation;
the last row, where tokens have another covariance, tells them apart.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from covariance import levels
from figure_tools import (
    Experiment,
    Profile,
    computed,
    corrected_error,
    estimated,
    shade_unstable,
    solved,
    tolerance,
)
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lora_theory import (
    Compression,
    Estimate,
    Finetuning,
    Prediction,
    Pretraining,
    Problem,
    predict_many,
)
from lora_theory.sweeps import kept_simulations


class Method(NamedTuple):
    """A method, the field of its strength, and where it is computed and measured."""

    name: str
    label: str
    field: str
    ends: tuple[float, float]
    measured: tuple[float, ...]
    pretraining: dict[str, Any]
    color: str
    line: str
    marker: str
    truncates: bool = False
    metric: dict[str, str] | None = None  # of a truncation, where tokens have a covariance


METHODS = (
    Method(
        "weight_decay", "weight decay, λ", "pretraining.penalty", (0.004, 1.0), (0.01, 0.1, 0.5),
        {}, "#000000", "-", "o",
    ),
    Method(
        "low_rank_decay", "low-rank decay, λ", "pretraining.penalty", (0.004, 0.7),
        (0.02, 0.1, 0.4), {"regularizer": "low_rank_decay"}, "#0072B2", "--", "s",
    ),
    Method(
        "preconditioned", "preconditioned (d = 9), ŝ", "pretraining.scale", (1.3, 12.0),
        (1.6, 2.5, 6.0),
        {"regularizer": "preconditioned", "degree": 9, "scale": 4.0, "penalty": 0.3},
        "#E69F00", "-.", "^",
    ),
    Method(
        "truncation", "truncation, ρᵣ", "compression.rank", (0.04, 0.66), (0.08, 0.15, 0.3),
        {}, "#CC79A7", ":", "D", truncates=True,
    ),
)  # fmt: skip
#: Truncation where tokens have a covariance, and in fine-tuning another one.
METRICS = tuple(
    Method(
        name,
        label,
        "compression.rank",
        (0.04, 0.4),
        (0.08, 0.15),
        {},
        color,
        line,
        marker,
        truncates=True,
        metric=metric,
    )
    for name, label, metric, color, line, marker in (
        ("svd", "SVD (AA-SVD ①)", {"whitening": "none"}, "#D55E00", "-.", "D"),
        ("svd_llm", "SVD-LLM", {"whitening": "one_sided"}, "#E69F00", "--", "^"),
        ("obd", "OBD (AA-SVD ②)", {}, "#0072B2", "-", "o"),
        ("aa_svd_3", "AA-SVD ③", {"calibration": "finetuning"}, "#009E73", "--", "v"),
        ("aa_svd_4", "AA-SVD ④", {"calibration": "anchored"}, "#CC79A7", ":", "P"),
    )
)
ACTIVATIONS = ("softmax", "linear", "metrics")
SEQUENCES = ("fresh", "reused")
#: Of the last row: tokens of fine-tuning as before, or shifted.
TOKENS = {"same": ("svd", "svd_llm", "obd"), "shifted": ("svd", "obd", "aa_svd_3", "aa_svd_4")}
CONDITION, POWER = 30.0, 0.5
#: Method, sequences or tokens, and strength.
Key = tuple[str, str, float]
SAMPLES = {"linear": 3.0, "softmax": 5.0}
NOISE = {"linear": "delta_eff", "softmax": "variance"}
#: Of the theory in the full profile, per block.
NODES = 256


def asked(activation: str, method: Method, sequences: str, strength: float) -> Problem:
    """κ0 = ½, Δ = ½, α = 0.4, λ' = 0.2; λ = 0.02 of what is truncated; α' by activation."""
    problem = Problem(
        tokens=2, activation=activation, teacher_rank=0.5, label_noise=0.5,
        pretraining=Pretraining(samples=0.4, **({"penalty": 0.02} | method.pretraining)),
        compression=Compression(rank=0.5) if method.truncates else None,
        finetuning=Finetuning(samples=SAMPLES[activation], penalty=0.2, sequences=sequences),
    )  # fmt: skip
    return problem.replace({method.field: strength})


def asked_of_tokens(method: Method, tokens: str, rank: float) -> Problem:
    """The same of linear attention, with tokens of a covariance C and, shifted, √C."""
    problem = asked("linear", method, "fresh", rank)
    assert method.metric is not None
    metric = {f"compression.{name}": value for name, value in method.metric.items()}
    shifted = levels(CONDITION, POWER) if tokens == "shifted" else None
    covariance = {"covariance.eigenvalues": levels(CONDITION), "covariance.shifted": shifted}
    return problem.replace(covariance | metric)


def jobs(row: str, profile: Profile, *, simulated: bool) -> dict[Key, Problem]:
    """What a row of panels asks."""
    points = profile.pick(quick=5, full=17)
    found = {}
    for method in METRICS if row == "metrics" else METHODS:
        kinds: Sequence[str] = SEQUENCES
        if row == "metrics":
            kinds = [tokens for tokens, names in TOKENS.items() if method.name in names]
        elif simulated:
            kinds = profile.pick(quick=SEQUENCES[:1], full=SEQUENCES)
        strengths = method.measured[:: profile.pick(quick=2, full=1)]
        if not simulated:
            count = points if row != "metrics" else profile.pick(quick=3, full=7)
            strengths = tuple(float(f"{s:.4g}") for s in np.geomspace(*method.ends, count))
        for kind, strength in itertools.product(kinds, strengths):
            make = asked_of_tokens if row == "metrics" else functools.partial(asked, row)
            found[method.name, kind, strength] = make(method, kind, strength)
    return found


def theory(row: str, profile: Profile, store: Path) -> Iterator[dict[str, Any]]:
    """Rank of the frozen weights, their noise, E' and overlap along every strength."""
    asked_for = jobs(row, profile, simulated=False)
    nodes = profile.pick(quick=64, full=NODES)
    predictions = predict_many(asked_for.values(), nodes=nodes, blocks=profile.blocks)
    for key, found in zip(asked_for, predictions, strict=True):
        yield from predicted_rows(row, key, found)


def predicted_rows(row: str, key: Key, found: Prediction) -> Iterator[dict[str, Any]]:
    """The same of one prediction."""
    stage, noise = found.finetuning, found.effective_noise
    stability = found.stability["pretraining"]
    assert stage is not None
    assert noise.quadrature_error is not None
    assert stability is not None
    shared = _labels(row, key, found.problem) | {
        "source": "theory", "status": found.status.value, "start": stage.branch,
        "replicon": stability.replicon,
    }  # fmt: skip
    rank = found.pretraining.learned_rank
    if found.problem.compression is not None:
        rank = min(rank, found.problem.compression.rank)
    rows = {"rank": (rank, 0.0)}
    for name in ("gain", NOISE[found.problem.activation]):
        rows[name] = getattr(noise, name), noise.quadrature_error[name]
    for name in ("test_error", "overlap"):
        rows[name] = getattr(stage, name), stage.quadrature_error[name]
    for name, (value, error) in rows.items():
        yield {**shared, "observable": name, "value": value, "error": error}


def simulation(row: str, profile: Profile, store: Path) -> Iterator[dict[str, Any]]:
    """The same, really trained; E' of linear attention without its measured cross term."""
    dim, seeds = profile.pick(quick=(40, 2), full=(120, 5))
    for key, problem in jobs(row, profile, simulated=True).items():
        effort = {"starts": 1, "dtype": "float32", "gradient_tolerance": tolerance(problem)}
        (result,) = kept_simulations(problem, [dim], seeds, store / row, **effort)
        shared = _labels(row, key, problem) | {
            "source": "simulation", "start": "informed", "status": result.status.value,
            "dim": dim, "seeds": seeds, "root_seed": result.environment["seed"],
            "dtype": result.environment["dtype"],
        }  # fmt: skip
        for name, values in measured(problem, pd.DataFrame(result.runs), dim).items():
            yield {**shared, **estimated(name, Estimate.of(values))}


def measured(problem: Problem, runs: pd.DataFrame, dim: int) -> dict[str, pd.Series]:
    """Observables of every run."""
    rank = runs["pretraining.learned_rank"]
    if problem.compression is not None:
        rank = rank.clip(upper=round(problem.compression.rank * dim) / dim)
    gain, variance, Q = (runs[f"effective_noise.{name}"] for name in ("gain", "variance", "Q"))
    noise = {"delta_eff": variance + (1 - gain) ** 2 * Q, "variance": variance}
    name = NOISE[problem.activation]
    return {
        "rank": rank, "gain": gain, name: noise[name],
        "test_error": corrected_error(problem, runs), "overlap": runs["finetuning.overlap"],
    }  # fmt: skip


def _labels(row: str, key: Key, problem: Problem) -> dict[str, Any]:
    method, kind, strength = key
    flat = problem.to_flat()
    for name in ("covariance.eigenvalues", "covariance.shifted"):  # by CONDITION and POWER
        flat.pop(name, None)
    return flat | {"row": row, "method": method, "kind": kind, "strength": strength}


ROWS = {"theory": theory, "simulation": simulation}


def rows_of(source: str, row: str, profile: Profile, store: Path) -> list[dict[str, Any]]:
    return list(ROWS[source](row, profile, store))


def compute(profile: Profile, store: Path) -> pd.DataFrame:
    return computed(rows_of, ACTIVATIONS, profile, store)


def wide(table: pd.DataFrame, **chosen: str) -> pd.DataFrame:
    """Points of one method: a column per observable, and its error."""
    for name, value in chosen.items():
        table = table[table[name] == value]
    table = solved(table)
    parts = {
        name: rows.set_index("strength")[["value", "error", "status"]]
        for name, rows in table.groupby("observable")
    }
    if not parts:
        return pd.DataFrame()
    found = pd.DataFrame({name: rows["value"] for name, rows in parts.items()})
    for name, rows in parts.items():
        found[f"{name}.error"] = rows["error"]
    found["status"] = next(iter(parts.values()))["status"]
    return found.sort_index()


WHITE = (
    ("rank", "noise", "fresh"), ("noise", "test_error", "fresh"), ("noise", "test_error", "reused")
)  # fmt: skip
PANELS = {
    "linear": WHITE,
    "softmax": WHITE,
    "metrics": (("rank", "noise", "same"), ("noise", "test_error", "same"),
                ("rank", "noise", "shifted")),
}  # fmt: skip
LABELS = {
    "delta_eff": "effective noise $\\Delta_{\\rm eff}$",
    "variance": "variance of the labels",
    "rank": "rank of frozen weights / D",
}
SHOWN = {"fresh": "fresh", "reused": "re-used", "same": "same tokens", "shifted": "shifted"}
TITLES = {
    "linear": "linear attention", "softmax": "softmax attention",
    "metrics": "linear attention, tokens with a covariance",
}  # fmt: skip


def draw(table: pd.DataFrame) -> Figure:
    """Two activations and other tokens, three panels each."""
    figure, panels = plt.subplots(3, 3, figsize=(7, 7), layout="constrained")
    for (row, contents), line in zip(PANELS.items(), panels, strict=True):
        noise = NOISE["softmax" if row == "softmax" else "linear"]
        for (x, y, kind), panel in zip(contents, line, strict=True):
            x, y = (noise if name == "noise" else name for name in (x, y))
            for method in METRICS if row == "metrics" else METHODS:
                _curve(panel, table, x, y, method, {"row": row, "kind": kind})
            panel.set_xlabel(LABELS[x])
            shifted = ", shifted" if kind == "shifted" else ""
            panel.set_ylabel(LABELS[y] + shifted if y == noise else f"test error E', {SHOWN[kind]}")
            if x != "rank":
                panel.set_xscale("log")
            panel.set_yscale("log")
            for axis in (panel.xaxis, panel.yaxis) if x != "rank" else (panel.yaxis,):
                axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_formatter(NullFormatter())
        line[0].set_title(TITLES[row], loc="left", fontweight="bold")
    for methods, place in ((METHODS, "upper"), (METRICS, "lower")):
        handles = [
            Line2D([], [], color=m.color, linestyle=m.line, marker=m.marker, label=m.label)
            for m in methods
        ]
        figure.legend(handles=handles, loc=f"outside {place} center", ncols=len(methods))
    return figure


def _curve(
    panel: Any, table: pd.DataFrame, x: str, y: str, method: Method, chosen: dict[str, str]
) -> None:
    """Theory and simulation of a method, where it has any."""
    lines = wide(table, source="theory", method=method.name, **chosen)
    if not len(lines):
        return
    panel.plot(lines[x], lines[y], method.line, color=method.color)
    shade_unstable(panel, "x", lines.assign(x=lines[x]), lines[y], method.color)
    points = wide(table, source="simulation", method=method.name, **chosen)
    if len(points):
        panel.errorbar(
            points[x], points[y], points[f"{y}.error"], points[f"{x}.error"],
            fmt=method.marker, color=method.color, elinewidth=0.8, markersize=3.5,
        )  # fmt: skip


#: Ranks of the table in the caption.
_RANKS = (0.1, 0.2, 0.3)


def caption(table: pd.DataFrame) -> str:
    """What the figure shows, with its numbers."""
    chosen = table[table["source"] == "simulation"]
    dim, seeds = int(chosen["dim"].iloc[0]), int(chosen["seeds"].iloc[0])
    lines = [
        "Low-rank methods on one axis: what they do to the noise through which pre-training "
        "reaches LoRA (left: against the rank that is frozen), and E' against that noise (middle: "
        "fresh sequences, right: re-used ones). T = 2, κ₀ = Δ = ½, α = 0.4, λ' = 0.2, α' = 3 "
        "(linear), 5 (softmax). Lines: theory along the strength of each method; points with "
        f"standard errors: simulation, D = {dim}, {seeds} seeds (E' of linear attention without "
        "its measured cross term). Pale bands: unstable against replica symmetry breaking, always "
        "so for low-rank decay. Last row: truncation to ρᵣ where tokens have a covariance of "
        f"condition number {CONDITION:g}, and (right, noise against rank) another one, its root, "
        "in fine-tuning; where it is 1, SVD, SVD-LLM, OBD and AA-SVD are one truncation.",
        "",
        "| attention | method | least noise | its rank | E' there | noise at rank "
        + " | noise at rank ".join(f"{rank:g}" for rank in _RANKS)
        + " |",
        "|---|---|---|---|---|" + "---|" * len(_RANKS),
    ]
    for row in PANELS:
        noise = NOISE["softmax" if row == "softmax" else "linear"]
        for method in METRICS if row == "metrics" else METHODS:
            for kind in ("fresh", *TOKENS):
                found = wide(table, source="theory", row=row, method=method.name, kind=kind)
                if not len(found):
                    continue
                best = found.loc[found[noise].idxmin()]
                numbers = [best[noise], best["rank"], best["test_error"]]
                numbers += [at_rank(found, noise, rank) for rank in _RANKS]
                shown = ["–" if np.isnan(number) else f"{number:.3f}" for number in numbers]
                label = method.label + (f", {SHOWN[kind]}" if kind in TOKENS else "")
                lines.append(f"| {TITLES[row]} | {label} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def at_rank(found: pd.DataFrame, name: str, rank: float) -> float:
    """An observable where the rank is this one, between the points along the strength."""
    ordered = found.sort_values("rank")
    inside = ordered["rank"].iloc[0] <= rank <= ordered["rank"].iloc[-1]
    return float(np.interp(rank, ordered["rank"], ordered[name])) if inside else float("nan")


EXPERIMENT = Experiment("lowrank", compute, draw, caption)
