"""Truncation of trained weights where tokens have a covariance: in which metric, on whose tokens.

T = 2, κ0 = Δ = .5, κ = 1, α = .3, α' = 4, λ' = .2, q0 = 1; λ = .1 (linear), .02 (softmax).  The
eigenvalues of C are spread evenly in log c, of mean 1; those of C' are c^p, made to have mean 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from figure_tools import Experiment, Profile, computed, shade_unstable, solved
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lora_theory import Compression, Covariance, Estimate, Finetuning, Pretraining, Problem, predict
from lora_theory.attention import attention
from lora_theory.compilation import double_precision
from lora_theory.simulation.data import draw_sequences, run_key
from lora_theory.simulation.fields import Symmetric, centred_fields
from lora_theory.simulation.measure import as_matrix
from lora_theory.simulation.run import Effort, finetuned_runs, pretrained_weights
from lora_theory.simulation.sizes import Sizes
from lora_theory.simulation.tokens import levels_of
from lora_theory.theory.errors import Errors, OrderParameters
from lora_theory.theory.nodes import Discretisation
from lora_theory.theory.predict import solve_pretraining
from lora_theory.theory.roots import standard_error
from lora_theory.theory.used import DRAWN_SIZE, compressed_draw, drawn_weights
from lora_theory.theory.weights import Constants

PENALTY = {"linear": 0.1, "softmax": 0.02}
LEVELS = 10
#: Condition number of C, share of eigenvalues kept and exponent of C' where they are not varied.
BASE = {"condition": 30.0, "rank": 0.1, "power": 1.0}


class Method(NamedTuple):
    """What is done to Ŝ, and how it is drawn."""

    whitening: str | None
    calibration: str
    label: str
    color: str
    dashes: Any
    marker: str


METHODS = {
    "whole": Method(None, "pretraining", "not compressed", "black", (0, (1, 1.5)), "s"),
    "two_sided": Method("two_sided", "pretraining", "two-sided", "#0072B2", "-", "o"),
    "one_sided": Method("one_sided", "pretraining", "one-sided", "#E69F00", (0, (5, 2)), "^"),
    "none": Method("none", "pretraining", "none", "#D55E00", (0, (3, 1, 1, 1)), "D"),
    "shifted": Method("two_sided", "finetuning", "two-sided, $C'$", "#009E73", (0, (5, 2)), "v"),
    "anchored": Method("two_sided", "anchored", "anchored", "#CC79A7", (0, (2, 1)), "P"),
}
#: Of AA-SVD, in the metric of the tied factor.
OBJECTIVES = {"none": "①", "two_sided": "②", "shifted": "③", "anchored": "④"}
#: What is varied: the methods, and the values of the lines and of the points.
VARIED = {
    "condition": (
        ("whole", "two_sided", "one_sided", "none"),
        (1.0, 3.0, 10.0, 30.0, 100.0),
        (1.0, 10.0, 100.0),
    ),
    "rank": (
        ("whole", "two_sided", "one_sided", "none"), (0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3),
        (0.02, 0.1, 0.2),
    ),
    "power": (
        ("none", "two_sided", "shifted", "anchored"), (1.0, 0.75, 0.5, 0.25, 0.0, -0.5, -1.0),
        (0.5, 0.0, -1.0),
    ),
}  # fmt: skip
NODES = {"linear": 512, "softmax": 256}
DRAWS = 6


def levels(condition: float, power: float = 1.0) -> tuple[float, ...]:
    c = condition ** (power * np.linspace(-0.5, 0.5, LEVELS))
    return tuple((c / c.mean()).tolist())


def problem(activation: str, method: str, at: dict[str, float]) -> Problem:
    way = METHODS[method]
    shifted = None if at["power"] == 1 else levels(at["condition"], at["power"])
    compression = None
    if way.whitening is not None:
        compression = Compression(
            rank=at["rank"], whitening=way.whitening, calibration=way.calibration
        )
    return Problem(
        tokens=2,
        activation=activation,
        teacher_rank=0.5,
        label_noise=0.5,
        covariance=Covariance(eigenvalues=levels(at["condition"]), shifted=shifted),
        pretraining=Pretraining(samples=0.3, penalty=PENALTY[activation]),
        compression=compression,
        finetuning=Finetuning(samples=4.0, penalty=0.2),
    )


def cases(profile: Profile, *, simulated: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """Methods and places, each once."""
    seen = set()
    for name, (methods, lines, points) in VARIED.items():
        values = profile.pick(quick=points[::2], full=points if simulated else lines)
        for value in values:
            for method in methods:
                at = BASE | {name: value}
                key = (method, *at.values())
                if key not in seen and not (method == "whole" and name == "rank" and value != 0.1):
                    seen.add(key)
                    yield method, at


def rows_of(source: str, activation: str, profile: Profile, store: Path) -> list[dict[str, Any]]:
    make = {"theory": theory, "simulation": simulation}[source]
    return list(make(activation, profile))


def labels(asked: Problem, method: str, at: dict[str, float]) -> dict[str, Any]:
    flat = asked.to_flat()
    for name in ("covariance.eigenvalues", "covariance.shifted"):
        flat.pop(name, None)
    return {**flat, "method": method, **at}


def theory(activation: str, profile: Profile) -> Iterator[dict[str, Any]]:
    for method, at in cases(profile, simulated=False):
        yield from predicted(activation, method, at, profile)


def predicted(
    activation: str, method: str, at: dict[str, float], profile: Profile
) -> Iterator[dict[str, Any]]:
    """The same of one method at one place."""
    nodes = profile.pick(quick=64, full=NODES[activation])
    asked = problem(activation, method, at)
    found = predict(asked, nodes=nodes, blocks=profile.pick(quick=3, full=8))
    stage, noise = found.finetuning, found.effective_noise
    shared = labels(asked, method, at) | {"source": "theory", "status": found.status.value}
    for part, names in (
        (stage, ("test_error", "overlap", "frozen_test_error")),
        (noise, ("gain", "variance")),
    ):
        for name in names:
            error = part.quadrature_error[name]
            yield {**shared, "observable": name, "value": getattr(part, name), "error": error}
    if method != "whole":
        size = profile.pick(quick=200, full=DRAWN_SIZE)
        draws = profile.pick(quick=2, full=DRAWS)
        for name, (value, error) in predicted_distortions(asked, size, draws).items():
            yield {**shared, "observable": name, "value": value, "error": error}


def predicted_distortions(asked: Problem, size: int, draws: int) -> dict[str, tuple[float, float]]:
    """E‖σ_S'(x') − σ_Ŝ(x')‖² and E‖σ_S'(x') − σ_Ŝ(x)‖², anchored, over matrices of the law."""
    constants = Constants.of(asked)
    assert constants.correlated is not None
    settings = Discretisation.checked(NODES[asked.activation], 8, 0, 1e-10)
    parts = []
    with double_precision():
        at = solve_pretraining(asked.alone, settings).unknowns
        for seed in range(draws):
            drawn = drawn_weights(at, 1.0, constants.correlated, size, 77 + seed)
            S, c = drawn.S, drawn.levels
            after = np.repeat(asked.covariance.later, len(c) // LEVELS)
            left = compressed_draw(S, asked.compression, c, after)
            both = np.sqrt(c * after)
            pairs = [(S, S, c), (S, S, after), (left, left, after), (left, S, after)]
            pairs.append((left, S, both))
            Q, Q_later, Q_left, cross, anchored = (
                float(weight @ (A * B) @ weight) / len(c) for A, B, weight in pairs
            )
            parts.append(
                [
                    distortion(asked, Q_later, cross, Q_left),
                    distortion(asked, Q, anchored, Q_left),
                ]
            )
    values = np.array(parts)
    means, errors = values.mean(axis=0), standard_error(values)
    names = ("distortion", "anchored_distortion")
    return {n: (float(m), float(e)) for n, m, e in zip(names, means, errors, strict=True)}


def distortion(asked: Problem, first: float, cross: float, second: float) -> float:
    """E‖σ(z) − σ(z')‖² for Gaussian fields of these variances and covariance."""
    law = Errors(asked.activation, asked.tokens, first, blocks=2, seed=0)
    return float(law.at(OrderParameters.same(second, cross, 0.0, 0.0, 2), 0.0).mean())


def simulation(activation: str, profile: Profile) -> Iterator[dict[str, Any]]:
    dim, seeds = profile.pick(quick=(40, 3), full=(100, 24))
    effort = Effort(np.float64, 0, 1, profile.pick(quick=1000, full=10_000), 1e-5, 20_000)
    keys = [run_key(0, index) for index in range(seeds)]
    trained: dict[float, Any] = {}
    with double_precision():
        for method, at in cases(profile, simulated=True):
            asked = problem(activation, method, at)
            sizes = Sizes.of(asked, dim)
            if at["condition"] not in trained:
                runs = [pretrained_weights(asked, sizes, effort, [key]) for key in keys]
                trained[at["condition"]] = runs
            columns: dict[str, list[float]] = {}
            missed = 0
            for key, first in zip(keys, trained[at["condition"]], strict=True):
                ((record, arrays),) = finetuned_runs(asked, sizes, effort, [key], first)
                missed += not record.pretraining["converged"]
                missed += not record.finetuning[0]["converged"]
                for name, value in measured(asked, record, arrays, first[2][0], key).items():
                    columns.setdefault(name, []).append(value)
            shared = labels(asked, method, at) | {"source": "simulation", "status": "converged"}
            shared |= {"dim": dim, "seeds": seeds, "missed": missed}
            for name, values in columns.items():
                found = Estimate.of(values)
                yield {**shared, "observable": name, "value": found.mean, "error": found.error}


def measured(
    asked: Problem, record: Any, arrays: dict[str, np.ndarray], weights: Any, key: jax.Array
) -> dict[str, float]:
    """Errors, for linear attention without their measured O(1/√D) cross terms, and distortions."""
    stage = record.finetuning[0]
    factor = 2 * (asked.tokens + 1) / asked.tokens if asked.activation == "linear" else 0.0
    found = {
        "test_error": stage["test_error"] - factor * stage["cross_term"],
        "frozen_test_error": stage["frozen_test_error"] - factor * stage["frozen_cross_term"],
        "overlap": stage["overlap"],
        "gain": record.effective_noise["gain"],
        "variance": record.effective_noise["variance"],
    }
    if asked.compression is None:
        return found
    S, left = as_matrix(weights), arrays["S_frozen"]
    roots = [np.sqrt(levels_of(asked, len(S), later=later)) for later in (False, True)]
    sequences, _ = draw_sequences(
        jax.random.fold_in(key, 1000), 4000, asked.tokens, len(S), np.float64
    )
    heads = [
        np.asarray(
            attention(
                centred_fields(sequences, Symmetric(matrix * np.outer(root, root))),
                asked.activation,
            )
        )
        for matrix, root in ((left, roots[1]), (S, roots[1]), (S, roots[0]))
    ]
    for name, other in (("distortion", heads[1]), ("anchored_distortion", heads[2])):
        found[name] = float(((heads[0] - other) ** 2).sum(axis=(1, 2)).mean())
    return found


def compute(profile: Profile, store: Path) -> pd.DataFrame:
    return computed(rows_of, ("softmax", "linear"), profile, store)


PANELS = (
    ("condition", "distortion", "condition number of $C$", "distortion"),
    ("condition", "test_error", "condition number of $C$", "test error $E'$"),
    ("rank", "test_error", r"share kept $\rho_r$", "test error $E'$"),
    ("power", "test_error", "$p$ of $C'=C^p$", "test error $E'$"),
    ("power", "anchored_distortion", "$p$ of $C'=C^p$", "distortion from\nthe old outputs"),
)


def draw(table: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(2, 5, figsize=(7.0, 3.9), sharex="col", layout="constrained")
    for row, activation in enumerate(("linear", "softmax")):
        part = solved(table[table["activation"] == activation])
        for column, (name, observable, axis, height) in enumerate(PANELS):
            panel = axes[row, column]
            panel.set_xscale("linear" if name == "power" else "log")
            panel.set_yscale("log")
            for method in VARIED[name][0]:
                _draw_line(panel, part, name, observable, method)
            panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            panel.yaxis.set_minor_formatter(FuncFormatter(_if_round))
            if row:
                panel.set_xlabel(axis)
            else:
                panel.set_title(height)
        axes[row, 0].set_ylabel(activation)
    for column, (name, *_) in enumerate(PANELS):
        if name == "power":
            axes[0, column].set_xlim(1.1, -1.1)
        else:
            values = VARIED[name][2]
            axes[0, column].set_xticks(values, [f"{value:g}" for value in values])
            axes[0, column].set_xticks([], minor=True)
    handles = {}
    for panel in (axes[0, 1], axes[0, 3]):
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=6, handlelength=2.4,
        columnspacing=1.4,
    )  # fmt: skip
    return figure


def _if_round(y: float, _: int) -> str:
    """Labels of 2, 3, 4, 6 and 8 alone between the powers of ten."""
    return f"{y:g}" if f"{y:e}"[0] in "23468" else ""


def _draw_line(panel: Any, part: pd.DataFrame, name: str, observable: str, method: str) -> None:
    way = METHODS[method]
    rows = selected(part, name, observable, method)
    if name == "rank" and method == "whole":
        for _, row in rows[rows["source"] == "theory"].iterrows():
            panel.axhline(row["value"], color=way.color, linestyle=way.dashes, linewidth=1.0)
        return
    if rows.empty:
        return
    line = rows[rows["source"] == "theory"].sort_values(name)
    points = rows[rows["source"] == "simulation"]
    label = f"{OBJECTIVES[method]} {way.label}" if method in OBJECTIVES else way.label
    panel.plot(line[name], line["value"], color=way.color, linestyle=way.dashes, label=label)
    if observable == "test_error":  # the distortion is that of stage one
        shade_unstable(panel, name, line, line["value"], way.color)
    panel.errorbar(
        points[name], points["value"], points["error"],
        fmt=way.marker, color=way.color, mfc="white", capsize=1.5, linewidth=0.8, zorder=3,
    )  # fmt: skip


def selected(part: pd.DataFrame, name: str, observable: str, method: str) -> pd.DataFrame:
    """The rows of a method along what is varied."""
    here = (part["method"] == method) & (part["observable"] == observable)
    for other, value in BASE.items():
        if other != name:
            here &= part[other] == value
    return part[here]


def value_of(
    table: pd.DataFrame, source: str, activation: str, method: str, observable: str, **at: float
) -> tuple[float, float]:
    """A number of the table and its error."""
    rows = table[(table["source"] == source) & (table["activation"] == activation)]
    rows = rows[(rows["method"] == method) & (rows["observable"] == observable)]
    for name, value in (BASE | at).items():
        rows = rows[rows[name] == value]
    (row,) = rows.to_dict("records")
    return row["value"], row["error"]


def caption(table: pd.DataFrame) -> str:
    simulated = table[table["source"] == "simulation"]

    def numbers(activation: str, observable: str, methods: Mapping[str, str], **at: float) -> str:
        found = (
            (name, value_of(table, "theory", activation, method, observable, **at))
            for method, name in methods.items()
        )
        return ", ".join(f"{name} {Estimate(*value, 1)}" for name, value in found)

    ways = {method: METHODS[method].label for method in ("two_sided", "one_sided", "none")}
    texts = []
    for activation in ("linear", "softmax"):
        for symbol, observable in (("distortion", "distortion"), ("E'", "test_error")):
            values = numbers(activation, observable, ways, condition=100.0)
            texts.append(f"{activation}, {symbol} at condition number 100: {values}")
            values = numbers(activation, observable, OBJECTIVES, power=0.5)
            texts.append(f"{activation}, {symbol} at p = 0.5: {values}")
        values = numbers(activation, "anchored_distortion", OBJECTIVES, power=0.5)
        texts.append(f"{activation}, distortion from the old outputs at p = 0.5: {values}")
    lines = table[(table["source"] == "theory") & (table["observable"] == "test_error")]
    missed = simulated.drop_duplicates(["activation", "method", *BASE])["missed"].sum()
    return (
        "**Figure.** Truncation of the trained weights to rank ρᵣD where tokens have a covariance "
        "C. Distortion of the attention, E‖σ_S' − σ_Ŝ‖², and test error E' after LoRA (label noise "
        "included), against the condition number of C, the share of eigenvalues kept, and the "
        "exponent p of C' = C^p, the covariance in fine-tuning (p = 1: no shift, p = 0: white, "
        "p = −1: inverted). Truncated are C^{1/2}SC^{1/2} (two-sided), SC^{1/2} (one-sided, then "
        "made symmetric), or S (none); with C' in place of C; anchored: "
        "C'^{-1/2}·trunc(C^{1/2}SC^{1/2})·C'^{-1/2}; ① to ④: objectives of AA-SVD on the tied "
        "factor. Lines: theory; symbols: simulation from w*, "
        f"D = {simulated['dim'].iloc[0]:.0f}, mean ± standard error of "
        f"{simulated['seeds'].iloc[0]:.0f} seeds, the same teachers and data for all methods; for "
        "linear attention the measured O(1/√D) cross term is subtracted from E', for softmax it is "
        "not; offsets O(1/D) remain. T = 2, κ0 = 0.5, κ = 1, Δ = 0.5, α = 0.3, λ = 0.1 (linear), "
        "0.02 (softmax), α' = 4, λ' = 0.2, q0 = 1; where not varied the condition number is 30, "
        f"ρᵣ = 0.1, p = 1. Theory: {'; '.join(texts)}. Theory points that are unstable, with a "
        f"pale band: {(lines['status'] == 'unstable').sum()}, not converged (left "
        f"out): {(lines['status'] == 'not_converged').sum()} of {len(lines)}; descents that missed "
        f"the gradient tolerance: {missed:.0f}."
    )


EXPERIMENT = Experiment("covariance", compute, draw, caption)
