"""What low-rank methods do to the effective noise, and LoRA to that: one axis for all of them.

Each method has a strength: weight decay and low-rank decay their penalty, a preconditioned factor
the scale ŝ beyond which no eigenvalue grows, truncation the rank that is kept of weights trained
with weight decay.  With tokens of covariance 1, SVD, SVD-LLM, OBD and AA-SVD are that truncation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
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

from lora_theory import Compression, Estimate, Finetuning, Pretraining, Problem, predict_many
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
        (1.6, 2.5, 6.0), {"regularizer": "preconditioned", "degree": 9, "penalty": 0.3},
        "#E69F00", "-.", "^",
    ),
    Method(
        "truncation", "truncation, ρᵣ", "compression.rank", (0.04, 0.66), (0.08, 0.15, 0.3),
        {}, "#CC79A7", ":", "D", truncates=True,
    ),
)  # fmt: skip
ACTIVATIONS = ("softmax", "linear")
SEQUENCES = ("fresh", "reused")
SAMPLES = {"linear": 3.0, "softmax": 5.0}
NOISE = {"linear": "delta_eff", "softmax": "variance"}


def asked(activation: str, method: Method, sequences: str, strength: float) -> Problem:
    """κ0 = ½, Δ = ½, α = 0.4, λ' = 0.2; λ = 0.02 of what is truncated; α' by activation."""
    problem = Problem(
        tokens=2, activation=activation, teacher_rank=0.5, label_noise=0.5,
        pretraining=Pretraining(
            samples=0.4, **({"penalty": 0.02, "scale": _scale(method)} | method.pretraining)
        ),
        compression=Compression(rank=0.5) if method.truncates else None,
        finetuning=Finetuning(samples=SAMPLES[activation], penalty=0.2, sequences=sequences),
    )  # fmt: skip
    return problem.replace({method.field: strength})


def _scale(method: Method) -> float | None:
    return 4.0 if "degree" in method.pretraining else None


def theory(activation: str, profile: Profile, store: Path) -> Iterator[dict[str, Any]]:
    """Rank of the frozen weights, their noise, E' and overlap along every strength."""
    points = profile.pick(quick=5, full=17)
    keys = [
        (method, sequences, float(f"{strength:.4g}"))
        for method in METHODS
        for sequences in SEQUENCES
        for strength in np.geomspace(*method.ends, points)
    ]
    problems = [asked(activation, *key) for key in keys]
    nodes = profile.pick(quick=64, full=256)
    predictions = predict_many(problems, nodes=nodes, blocks=profile.blocks)
    for (method, sequences, strength), found in zip(keys, predictions, strict=True):
        stage, noise = found.finetuning, found.effective_noise
        assert stage is not None
        assert noise.quadrature_error is not None
        stability = found.stability["pretraining"]
        assert stability is not None
        shared = _labels(activation, method, sequences, strength) | {
            **found.problem.to_flat(), "source": "theory", "status": found.status.value,
            "start": stage.branch, "replicon": stability.replicon,
        }  # fmt: skip
        rank = found.pretraining.learned_rank
        if found.problem.compression is not None:
            rank = min(rank, found.problem.compression.rank)
        rows = {"rank": (rank, 0.0)}
        for name in ("gain", NOISE[activation]):
            rows[name] = getattr(noise, name), noise.quadrature_error[name]
        for name in ("test_error", "overlap"):
            rows[name] = getattr(stage, name), stage.quadrature_error[name]
        for name, (value, error) in rows.items():
            yield {**shared, "observable": name, "value": value, "error": error}


def simulation(activation: str, profile: Profile, store: Path) -> Iterator[dict[str, Any]]:
    """The same, really trained; E' of linear attention without its measured cross term."""
    dim, seeds = profile.pick(quick=(40, 2), full=(120, 5))
    for method in METHODS:
        for sequences in profile.pick(quick=SEQUENCES[:1], full=SEQUENCES):
            for strength in method.measured[:: profile.pick(quick=2, full=1)]:
                problem = asked(activation, method, sequences, strength)
                effort = {
                    "starts": 1, "dtype": "float32", "gradient_tolerance": tolerance(problem),
                }  # fmt: skip
                (result,) = kept_simulations(problem, [dim], seeds, store / activation, **effort)
                shared = _labels(activation, method, sequences, strength) | {
                    **problem.to_flat(), "source": "simulation", "start": "informed",
                    "status": result.status.value, "dim": dim, "seeds": seeds,
                    "root_seed": result.environment["seed"], "dtype": result.environment["dtype"],
                }  # fmt: skip
                for name, values in measured(problem, pd.DataFrame(result.runs), dim).items():
                    yield {**shared, **estimated(name, Estimate.of(values))}


def measured(problem: Problem, runs: pd.DataFrame, dim: int) -> dict[str, pd.Series]:
    """Observables of every run."""
    rank = runs["pretraining.learned_rank"]
    if problem.compression is not None:
        rank = rank.clip(upper=round(problem.compression.rank * dim) / dim)
    gain, variance = (runs[f"effective_noise.{name}"] for name in ("gain", "variance"))
    # variance = Q_y − gain²Q
    Q = (problem.label_noise / 2 + runs["pretraining.Q0"] - variance) / gain**2
    noise = {"delta_eff": variance + (1 - gain) ** 2 * Q, "variance": variance}
    name = NOISE[problem.activation]
    return {
        "rank": rank, "gain": gain, name: noise[name],
        "test_error": corrected_error(problem, runs), "overlap": runs["finetuning.overlap"],
    }  # fmt: skip


def _labels(activation: str, method: Method, sequences: str, strength: float) -> dict[str, Any]:
    return {"method": method.name, "sequences": sequences, "strength": strength}


ROWS = {"theory": theory, "simulation": simulation}


def rows_of(source: str, activation: str, profile: Profile, store: Path) -> list[dict[str, Any]]:
    return list(ROWS[source](activation, profile, store))


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


PANELS = (
    ("rank", "noise", "fresh", "rank of frozen weights / D"),
    ("noise", "test_error", "fresh", ""),
    ("noise", "test_error", "reused", ""),
)
NOISE_LABEL = {
    "linear": "effective noise $\\Delta_{\\rm eff}$",
    "softmax": "variance of the labels",
}


def draw(table: pd.DataFrame) -> Figure:
    """Two activations, three panels each."""
    figure, panels = plt.subplots(2, 3, figsize=(7, 4.7), layout="constrained")
    for activation, row in zip(("linear", "softmax"), panels, strict=True):
        noise = NOISE[activation]
        for (x, y, sequences, x_label), panel in zip(PANELS, row, strict=True):
            x, y = (noise if name == "noise" else name for name in (x, y))
            for method in METHODS:
                chosen = {
                    "activation": activation, "method": method.name, "sequences": sequences,
                }  # fmt: skip
                lines = wide(table, source="theory", **chosen)
                panel.plot(lines[x], lines[y], method.line, color=method.color)
                shade_unstable(panel, "x", lines.assign(x=lines[x]), lines[y], method.color)
                points = wide(table, source="simulation", **chosen)
                if len(points):
                    panel.errorbar(
                        points[x], points[y], points[f"{y}.error"], points[f"{x}.error"],
                        fmt=method.marker, color=method.color, elinewidth=0.8, markersize=3.5,
                    )  # fmt: skip
            panel.set_xlabel(x_label or NOISE_LABEL[activation])
            panel.set_ylabel(
                NOISE_LABEL[activation] if y == noise else f"test error E', {_SHOWN[sequences]}"
            )
            if x != "rank":
                panel.set_xscale("log")
            panel.set_yscale("log")
            for axis in (panel.xaxis, panel.yaxis) if x != "rank" else (panel.yaxis,):
                axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_formatter(NullFormatter())
        row[0].set_title(f"{activation} attention", loc="left", fontweight="bold")
    handles = [
        Line2D([], [], color=m.color, linestyle=m.line, marker=m.marker, label=m.label)
        for m in METHODS
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    return figure


_SHOWN = {"fresh": "fresh", "reused": "re-used"}
_RANKS = (0.2, 0.3)


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
        "so for low-rank decay. Tokens have covariance 1: SVD, SVD-LLM, OBD and AA-SVD are one "
        "truncation.",
        "",
        "| attention | method | least noise | its rank | E' there | noise at rank "
        + " | noise at rank ".join(f"{rank:g}" for rank in _RANKS)
        + " |",
        "|---|---|---|---|---|" + "---|" * len(_RANKS),
    ]
    for activation in ("linear", "softmax"):
        for method in METHODS:
            found = wide(
                table, source="theory", activation=activation, method=method.name,
                sequences="fresh",
            )  # fmt: skip
            best = found.loc[found[NOISE[activation]].idxmin()]
            numbers = [best[NOISE[activation]], best["rank"], best["test_error"]]
            numbers += [at_rank(found, NOISE[activation], rank) for rank in _RANKS]
            shown = ["–" if np.isnan(number) else f"{number:.3f}" for number in numbers]
            lines.append(f"| {activation} | {method.label} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def at_rank(found: pd.DataFrame, name: str, rank: float) -> float:
    """An observable where the rank is this one, between the points along the strength."""
    ordered = found.sort_values("rank")
    inside = ordered["rank"].iloc[0] <= rank <= ordered["rank"].iloc[-1]
    return float(np.interp(rank, ordered["rank"], ordered[name])) if inside else float("nan")


EXPERIMENT = Experiment("lowrank", compute, draw, caption)
