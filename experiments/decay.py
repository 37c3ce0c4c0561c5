"""Low-rank decay against weight decay: the rank that each learns, and how it depends on the start.

Linear attention.  The theory of low-rank decay has two lines: the least minimum, whose eigenvalues
jump to 0 where that costs less, and the metastable one, whose eigenvalues vanish only where their
local minimum does (docs/theory.md, section 2.8).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from figure_tools import Experiment, Profile, estimated, tolerance
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_theory import Estimate, Pretraining, Problem, predict
from lora_theory.compilation import double_precision
from lora_theory.sweeps import kept_simulations
from lora_theory.theory import pretraining as pre
from lora_theory.theory.averages import Averages
from lora_theory.theory.errors import effective_noise
from lora_theory.theory.parametrised import LowRankDecay
from lora_theory.theory.roots import solve
from lora_theory.theory.weights import Constants, kept_at

#: Rank of Ŝ over D, E and the training loss.
OBSERVED = ("learned_rank", "test_error", "train_error", "objective")


class Curve(NamedTuple):
    """A line of theory, and where it is measured, from starts of some scale."""

    name: str
    label: str
    regularizer: str
    ends: tuple[float, float]
    color: str
    line: str
    metastable: bool = False


class Runs(NamedTuple):
    """Simulations from one kind of start."""

    name: str
    label: str
    regularizer: str
    penalties: tuple[float, ...]
    start_scale: float
    color: str
    marker: str


CURVES = (
    Curve("weight_decay", "weight decay", "weight_decay", (0.005, 1.0), "#000000", "-"),
    Curve(
        "least", "low-rank decay, least minimum", "low_rank_decay", (0.005, 0.8), "#0072B2", "--"
    ),
    Curve(
        "metastable", "low-rank decay, metastable", "low_rank_decay", (0.005, 0.8), "#E69F00",
        "-.", metastable=True,
    ),
)  # fmt: skip
RUNS = (
    Runs("weight_decay", "weight decay, start of order 1", "weight_decay", (0.02, 0.1, 0.4), 1.0,
         "#000000", "o"),
    Runs("order_one", "low-rank decay, start of order 1", "low_rank_decay",
         (0.02, 0.1, 0.3, 0.6), 1.0, "#E69F00", "s"),
    Runs("small", "low-rank decay, start of order 1/20", "low_rank_decay", (0.02, 0.1, 0.3), 0.05,
         "#CC79A7", "^"),
)  # fmt: skip


def asked(regularizer: str, penalty: float) -> Problem:
    """T = 2, κ0 = Δ = ½, α = 0.4."""
    return Problem(
        tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        pretraining=Pretraining(samples=0.4, penalty=penalty, regularizer=regularizer),
    )  # fmt: skip


def theory(curve: Curve, profile: Profile, store: Path) -> Iterator[dict[str, Any]]:
    """Observables along λ; they have no quadrature error."""
    for penalty in np.geomspace(*curve.ends, profile.pick(quick=6, full=25)):
        yield from predicted(curve, float(f"{penalty:.4g}"))


def predicted(curve: Curve, penalty: float) -> Iterator[dict[str, Any]]:
    """The same at one λ."""
    problem = asked(curve.regularizer, penalty)
    shared = {"curve": curve.name, "source": "theory", **problem.to_flat()}
    values, replicon = (metastable if curve.metastable else least)(problem)
    for name in OBSERVED:
        number = {"observable": name, "value": values[name], "error": 0.0}
        yield {**shared, "replicon": replicon, **number}


def least(problem: Problem) -> tuple[dict[str, float], float]:
    """The prediction, and its replicon."""
    found = predict(problem)
    stability = found.stability["pretraining"]
    assert stability is not None
    assert found.pretraining.residual < 1e-8
    stage = found.pretraining
    values = [stage.learned_rank, stage.test_error, stage.train_error, stage.potential]
    return dict(zip(OBSERVED, values, strict=True)), stability.replicon


def metastable(problem: Problem) -> tuple[dict[str, float], float]:
    """The solution whose eigenvalues s(y) stay while they have a local minimum; its s jumps too.

    Besides what is observed also the order parameters.
    """
    constants = Constants.of(problem)
    assert isinstance(constants.regularizer, LowRankDecay)
    branch = LowRankDecay(constants.regularizer.strength, metastable=True)
    constants = constants._replace(regularizer=branch)
    start = np.log(problem.pretraining.samples * np.array([0.3, 1.0, 1.0]))
    with double_precision():
        equations = pre.LinearPretraining(constants, tokens=problem.tokens)
        root = solve(
            Averages(equations, [None], 1), start, coarse=1, tolerance=1e-10,
            relaxation=pre.relaxation,
        )  # fmt: skip
        rank = kept_at(root.unknowns, constants).rank
    assert root.residual < 1e-8
    values = dict(zip(pre.OBSERVABLES, root.observables.tolist(), strict=True))
    noise = effective_noise(values["Q"], values["M"], constants.label_variance)
    values["test_error"] = (problem.tokens + 1) / problem.tokens * float(noise)
    values |= {"learned_rank": rank, "objective": values["potential"]}
    return values, np.inf


def simulation(runs: Runs, profile: Profile, store: Path) -> Iterator[dict[str, Any]]:
    """The same, trained."""
    dims, seeds = profile.pick(quick=((32,), 2), full=((60, 120), 5))
    for penalty in runs.penalties[:: profile.pick(quick=2, full=1)]:
        problem = asked(runs.regularizer, penalty)
        effort = {"starts": 0, "dtype": "float32", "start_scale": runs.start_scale}
        effort["gradient_tolerance"] = tolerance(problem)
        for result in kept_simulations(problem, list(dims), seeds, store / runs.name, **effort):
            shared = {"curve": runs.name, "source": "simulation", **problem.to_flat()}
            shared |= {"status": result.status.value, "dim": result.dim, "seeds": seeds}
            shared |= {"root_seed": result.environment["seed"], "dtype": "float32"}
            table = pd.DataFrame(result.runs)
            for name in OBSERVED:
                yield {**shared, **estimated(name, Estimate.of(table[f"pretraining.{name}"]))}


def rows_of(job: Curve | Runs, profile: Profile, store: Path) -> list[dict[str, Any]]:
    if isinstance(job, Curve):
        return list(theory(job, profile, store))
    return list(simulation(job, profile, store))


def compute(profile: Profile, store: Path) -> pd.DataFrame:
    jobs = {"simulation": RUNS, "theory": CURVES}
    chosen = [job for source in sorted(profile.sources) for job in jobs[source]]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        parts = pool.map(rows_of, chosen, itertools.repeat(profile), itertools.repeat(store))
        return pd.DataFrame(list(itertools.chain.from_iterable(parts)))


def wide(table: pd.DataFrame, curve: str, source: str) -> pd.DataFrame:
    """Observables of a curve by λ, and errors, at the largest D."""
    rows = table[(table["curve"] == curve) & (table["source"] == source)]
    if source == "simulation":
        rows = rows[rows["dim"] == rows["dim"].max()]
    found = rows.pivot_table(
        index="pretraining.penalty", columns="observable", values=["value", "error"]
    )
    return found.sort_index()


PANELS = (
    ("pretraining.penalty", "learned_rank"),
    ("pretraining.penalty", "test_error"),
    ("learned_rank", "test_error"),
)
LABELS = {
    "pretraining.penalty": "penalty λ",
    "learned_rank": "learned rank / D",
    "test_error": "test error E",
}


def draw(table: pd.DataFrame) -> Figure:
    """Rank and error against the penalty, and against each other."""
    figure, panels = plt.subplots(1, 3, figsize=(7, 2.9), layout="constrained")
    for (x, y), panel in zip(PANELS, panels, strict=True):

        def along(found: pd.DataFrame, part: str = "value", x: str = x) -> Any:
            if x == "pretraining.penalty":
                return found.index if part == "value" else None
            return found[part][x]

        for curve in CURVES:
            found = wide(table, curve.name, "theory")
            panel.plot(along(found), found["value"][y], curve.line, color=curve.color)
        for runs in RUNS:
            found = wide(table, runs.name, "simulation")
            panel.errorbar(
                along(found), found["value"][y], found["error"][y], along(found, "error"),
                fmt=runs.marker, color=runs.color, elinewidth=0.8,
            )  # fmt: skip
        panel.set_xlabel(LABELS[x])
        panel.set_ylabel(LABELS[y])
        if x == "pretraining.penalty":
            panel.set_xscale("log")
        if y == "test_error":
            panel.set_ylim(0.5, 1.0)
    handles = [Line2D([], [], color=c.color, linestyle=c.line, label=c.label) for c in CURVES]
    handles += [
        Line2D([], [], color=runs.color, linestyle="", marker=runs.marker, label=runs.label)
        for runs in RUNS
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def caption(table: pd.DataFrame) -> str:
    """What the figure shows, with its numbers."""
    measured = table[table["source"] == "simulation"]
    dims = ", ".join(f"{dim:.0f}" for dim in sorted(measured["dim"].unique()))
    lines = [
        "Low-rank decay λ√D‖W‖_* against weight decay λ‖W‖²: learned rank and test error of linear "
        "attention after pre-training, T = 2, κ₀ = Δ = ½, α = 0.4. Lines: theory; dash-dotted, the "
        "metastable branch. Points: simulation at the largest D, mean ± standard error. The "
        "replicon of weight decay is "
        f"{replicons(table, 'weight_decay'):.2f} at most; that of low-rank decay is infinite at "
        "every λ, for s(y) jumps within the spectrum. A start of order 1/20 leaves the range of E "
        "that is shown.",
        "",
        f"Rank, E and L/D² (simulation at D = {dims}):",
        "",
        "| λ | least minimum | metastable | D | start of order 1 | start of order 1/20 |",
        "|---|---|---|---|---|---|",
    ]
    for penalty in RUNS[1].penalties:
        for dim in sorted(measured["dim"].unique()):
            cells = [between(table, name, penalty) for name in ("least", "metastable")]
            cells += [f"{dim:.0f}"]
            cells += [shown(measured, name, penalty, dim) for name in ("order_one", "small")]
            lines.append(f"| {penalty:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


_LISTED = ("learned_rank", "test_error", "objective")


def replicons(table: pd.DataFrame, curve: str) -> float:
    """The largest of a curve."""
    return float(table[table["curve"] == curve]["replicon"].max())


def between(table: pd.DataFrame, curve: str, penalty: float) -> str:
    """Observables of a line of theory at a λ between its points."""
    found = wide(table, curve, "theory")["value"]
    at = [np.interp(np.log(penalty), np.log(found.index), found[name]) for name in _LISTED]
    return ", ".join(f"{value:.3f}" for value in at)


def shown(measured: pd.DataFrame, name: str, penalty: float, dim: float) -> str:
    """The same of simulations."""
    rows = measured[(measured["curve"] == name) & (measured["dim"] == dim)]
    rows = rows[rows["pretraining.penalty"] == penalty].set_index("observable")
    if rows.empty:
        return "–"
    return ", ".join(
        str(Estimate(rows["value"][one], rows["error"][one], int(rows["seeds"].iloc[0])))
        for one in _LISTED
    )


EXPERIMENT = Experiment("decay", compute, draw, caption)
