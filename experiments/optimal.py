"""The pre-training penalty to choose depends on what LoRA is to be good at: where, and how much.

Around T = 2, κ0 = Δ = .5, κ = 1, α = .2, α' = 3, λ' = .2, q0 = 1: λ* of the pre-training error E,
of the effective noise, of the error E' and of the overlap o after LoRA, against α, κ0, Δ and T; and
what it costs in E' to take another λ* than its own.  Linear attention with re-used sequences and
softmax with fresh ones; linear with fresh ones has one λ* for all (docs/theory.md, section 4.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

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
from numpy.polynomial import Polynomial

from lora_theory import (
    Estimate,
    Finetuning,
    Optimum,
    Pretraining,
    Problem,
    Simulation,
    optimize,
    predict,
)
from lora_theory.sweeps import kept_simulations

PENALTY, SAMPLES = "pretraining.penalty", "pretraining.samples"
SEQUENCES = {"linear": "reused", "softmax": "fresh"}
OBJECTIVES = (
    "pretraining.test_error", "effective_noise", "finetuning.test_error", "finetuning.overlap",
)  # fmt: skip
OWN = "finetuning.test_error"
#: What is varied: name, and the values in the full and the quick profile.
VARIED = {
    SAMPLES: (r"pre-training samples $\alpha$", (0.14, 0.2, 0.4, 0.8), (0.2, 0.8)),
    "teacher_rank": (r"teacher rank $\kappa_0$", (0.2, 0.5, 0.8), (0.5,)),
    "label_noise": (r"label noise $\Delta$", (0.2, 0.5, 0.7), (0.5,)),
    "tokens": ("tokens $T$", (2, 3), (2,)),
}
BASE = {SAMPLES: 0.2, "teacher_rank": 0.5, "label_noise": 0.5, "tokens": 2}
#: Where the search of λ* starts and what it covers, and nodes per block in the full profile.
FIRST_PENALTY, BOX = 0.05, {"linear": (0.002, 2.0), "softmax": (0.001, 0.5)}
NODES = {"linear": 1024, "softmax": 256}
#: Of the polynomials through simulated means: exact ones move their minimum by less than .2 %.
DEGREE = 5
#: Ends of λ in the simulations, by α.
SIMULATED = {
    "linear": {0.2: (0.03, 0.3), 0.4: (0.04, 0.4), 0.8: (0.06, 0.6)},
    "softmax": {0.2: (0.008, 0.1), 0.4: (0.016, 0.2), 0.8: (0.03, 0.3)},
}


def problem(activation: str, changes: Mapping[str, Any] | None = None) -> Problem:
    base = Problem(
        tokens=2,
        activation=activation,
        teacher_rank=0.5,
        label_noise=0.5,
        pretraining=Pretraining(samples=0.2, penalty=FIRST_PENALTY),
        finetuning=Finetuning(samples=3.0, penalty=0.2, sequences=SEQUENCES[activation]),
    )
    return base.replace(changes or {})


def theory(activation: str, field: str, profile: Profile, store: Path) -> Iterator[dict[str, Any]]:
    """Rows of λ* along a field, and of E' and o there; the base is among those along α."""
    settings = {"nodes": profile.pick(quick=32, full=NODES[activation]), "blocks": profile.blocks}
    for value in VARIED[field][profile.pick(quick=2, full=1)]:
        if field == SAMPLES or value != BASE[field]:
            yield from optima(problem(activation, {field: value}), settings)


def optima(asked: Problem, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of one problem: λ* for every objective, and what it costs."""
    box = {PENALTY: BOX[asked.activation]}
    found = {name: optimize(asked, [PENALTY], name, within=box, **settings) for name in OBJECTIVES}
    losses = {name: _losses(best, settings) for name, best in found.items()}
    for name, best in found.items():
        shared = {**best.problem.to_flat(), "source": "theory", "objective": name}
        shared |= {"status": best.status.value, "at_bound": bool(best.at_bound)}

        def row(observable: str, value: float, error: float, shared: Any = shared) -> dict:
            return {**shared, "observable": observable, "value": value, "error": error}

        yield row("best_penalty", best.optimum[PENALTY], best.errors[PENALTY])
        for observable, values in losses[name].items():
            estimate = Estimate.of(values)
            yield row(observable, estimate.mean, estimate.error or math.nan)
            excess = Estimate.of(values / losses[ITS_OWN[observable]][observable] - 1)
            ratio = math.log(best.optimum[PENALTY] / found[ITS_OWN[observable]].optimum[PENALTY])
            # the excess grows as the square of the distance
            moved = 2 * excess.mean * best.errors[PENALTY] / best.optimum[PENALTY]
            moved = moved / ratio if ratio else 0.0
            yield row(f"excess_{observable}", excess.mean, math.hypot(excess.error or 0, moved))


#: The objective that a loss is least for.
ITS_OWN = {"test_error": "finetuning.test_error", "misalignment": "finetuning.overlap"}


def _losses(best: Optimum, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """E' and 1 − o at an optimum, on two sets of nodes."""
    stages = [predict(best.problem, seed=seed, **settings).finetuning for seed in (0, 1)]
    return {
        "test_error": np.array([stage.test_error for stage in stages]),
        "misalignment": np.array([1 - stage.overlap for stage in stages]),
    }


def simulation(
    activation: str, field: str, profile: Profile, store: Path
) -> Iterator[dict[str, Any]]:
    """Rows of simulations along λ, and of the λ* they show; all λ share their seeds."""
    if field != SAMPLES:
        return
    dims, seeds, count = profile.pick(quick=((32,), 8, 6), full=((50, 100), 32, 7))
    for samples, ends in list(SIMULATED[activation].items())[: profile.pick(quick=1, full=3)]:
        penalties = np.geomspace(*ends, count)
        losses = {dim: {name: [] for name in OBJECTIVES} for dim in dims}
        labels: dict[int, dict[str, Any]] = {}
        for penalty in penalties.tolist():
            asked = problem(activation, {SAMPLES: samples, PENALTY: penalty})
            effort = {"starts": 1, "dtype": "float32", "gradient_tolerance": tolerance(asked)}
            for result in kept_simulations(asked, dims, seeds, store / activation, **effort):
                shared = {**asked.to_flat(), "source": "simulation", "dim": result.dim}
                shared |= {"seeds": seeds, "dtype": "float32"}
                shared |= {"root_seed": result.environment["seed"]}
                labels[result.dim] = {n: label for n, label in shared.items() if n != PENALTY}
                shared["status"] = result.status.value
                for name, values in measured(result).items():
                    losses[result.dim][name].append(values)
                    yield {**shared, "objective": name, **estimated("loss", Estimate.of(values))}
        for dim in dims:
            for name, observable, estimate in fitted(penalties, losses[dim]):
                yield {**labels[dim], "objective": name, **estimated(observable, estimate)}


def measured(result: Simulation) -> dict[str, np.ndarray]:
    """What is to be small, of every run."""
    runs = pd.DataFrame(result.runs)
    noise = runs["effective_noise.variance"]
    if result.problem.activation == "linear":
        noise = noise + (1 - runs["effective_noise.gain"]) ** 2 * runs["pretraining.Q"]
    losses = {
        "pretraining.test_error": runs["pretraining.test_error"],
        "effective_noise": noise,
        "finetuning.test_error": corrected_error(result.problem, runs),
        "finetuning.overlap": 1 - runs["finetuning.overlap"],
    }
    return {name: values.to_numpy() for name, values in losses.items()}


def fitted(
    penalties: np.ndarray, losses: Mapping[str, list[np.ndarray]]
) -> Iterator[tuple[str, str, Estimate]]:
    """λ* of polynomials in log λ, ln(λ*/λ*_E'), the excess of E' there; jackknife errors."""
    x, table = np.log(penalties), {name: np.array(part) for name, part in losses.items()}
    for name in OBJECTIVES:

        def numbers(runs: np.ndarray, name: str = name) -> np.ndarray:
            curves = {
                which: Polynomial.fit(x, np.log(table[which][:, runs].mean(axis=1)), DEGREE)
                for which in (name, OWN)
            }
            at, own = (lowest(curves[which], x[0], x[-1]) for which in (name, OWN))
            return np.array([at, at - own, math.expm1(curves[OWN](at) - curves[OWN](own))])

        log, ratio, excess = jackknife(numbers, table[name].shape[1])
        if log.error is not None and math.isfinite(log.error):  # inside, whatever run is left out
            penalty = math.exp(log.mean)
            yield name, "best_penalty", Estimate(penalty, penalty * log.error, log.count)
            if name != OWN:
                yield name, "log_ratio", ratio
                yield name, "excess_test_error", excess


def lowest(curve: Polynomial, low: float, high: float) -> float:
    """Where a curve has its lowest minimum between two ends, NaN if it has none there."""
    roots = curve.deriv().roots()
    roots = roots[np.isreal(roots)].real
    inside = [float(x) for x in roots if low < x < high and curve.deriv(2)(x) > 0]
    return min(inside, key=curve, default=math.nan)


def jackknife(numbers: Callable[[np.ndarray], np.ndarray], count: int) -> list[Estimate]:
    """Numbers of all runs, with errors from leaving out one run after the other."""
    runs = np.arange(count)
    without = np.array([numbers(runs[runs != run]) for run in runs])
    errors = np.sqrt((count - 1) / count * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
    return [Estimate(float(v), float(e), count) for v, e in zip(numbers(runs), errors, strict=True)]


ROWS = {"theory": theory, "simulation": simulation}


def rows_of(source: str, name: str, profile: Profile, store: Path) -> list[dict[str, Any]]:
    activation, field = name.split(" ")
    return list(ROWS[source](activation, field, profile, store))


def compute(profile: Profile, store: Path) -> pd.DataFrame:
    jobs = [f"{activation} {field}" for activation in ("softmax", "linear") for field in VARIED]
    return computed(rows_of, jobs, profile, store)


#: Rows of the figure: activation, what is shown, its axis and its ticks.
PANELS = (
    ("linear", "best_penalty", "linear, re-used\nbest penalty $\\lambda^*$"),
    ("linear", "excess_test_error", "linear, re-used\nexcess of $E'$ (%)"),
    ("softmax", "best_penalty", "softmax, fresh\nbest penalty $\\lambda^*$"),
    ("softmax", "excess_test_error", "softmax, fresh\nexcess of $E'$ (%)"),
)
LABELS = {
    "pretraining.test_error": "pre-training error $E$",
    "effective_noise": r"effective noise",
    "finetuning.test_error": "error after LoRA $E'$",
    "finetuning.overlap": "alignment $o$",
}
#: Okabe–Ito colour, line and marker.
STYLES = dict(
    zip(
        OBJECTIVES,
        (
            ("#000000", "-", "o"),
            ("#E69F00", "-.", "^"),
            ("#0072B2", "--", "s"),
            ("#D55E00", ":", "D"),
        ),
        strict=True,
    )
)
#: Simulated points of one α beside each other.
NUDGED = dict(zip(OBJECTIVES, (0.92, 0.97, 1.03, 1.08), strict=True))
#: Below this an excess is not told from 0.
FLOOR = 1e-4


def largest(table: pd.DataFrame) -> pd.DataFrame:
    """The table with simulations of its largest D alone."""
    return table[table["dim"].isna() | (table["dim"] == table["dim"].max())]


def draw(table: pd.DataFrame) -> Figure:
    table = largest(table)
    figure, axes = plt.subplots(4, 4, figsize=(7.0, 7.4), layout="constrained")
    for row, (activation, observable, label) in enumerate(PANELS):
        for column, field in enumerate(VARIED):
            panel = axes[row, column]
            panel.sharey(axes[row, 0])
            panel.tick_params(labelleft=column == 0)
            _draw_panel(panel, along(table, activation, field), field, observable)
            if row == len(PANELS) - 1:
                panel.set_xlabel(VARIED[field][0])
        axes[row, 0].set_ylabel(label)
    handles = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=4, title="best for"
    )
    return figure


def along(table: pd.DataFrame, activation: str, field: str) -> pd.DataFrame:
    """The rows of an activation on the line through the base along a field."""
    part = table[table["activation"] == activation]
    for other in BASE:
        if other != field:
            part = part[np.isclose(part[other], BASE[other])]
    return part.sort_values(field)


def _draw_panel(panel: Any, part: pd.DataFrame, field: str, observable: str) -> None:
    scale = 100 if observable.startswith("excess") else 1
    panel.set_xscale("log")
    panel.set_yscale("log")
    for name, (color, dashes, marker) in STYLES.items():
        here = (part["objective"] == name) & (part["observable"] == observable)
        rows = solved(part[here & (part["source"] == "theory")])
        points = part[here & (part["source"] == "simulation") & (field == SAMPLES)]
        if scale == 100:
            rows, points = (some[some["value"] > FLOOR] for some in (rows, points))
        heights = scale * rows["value"]
        panel.plot(rows[field], heights, color=color, linestyle=dashes, label=LABELS[name])
        if len(rows):
            shade_unstable(panel, field, rows, heights, color)
        edge = rows["at_bound"].astype(bool)
        for some, face in ((~edge, color), (edge, "white")):
            panel.errorbar(
                rows[field][some], heights[some], scale * rows["error"][some],
                fmt=marker, color=color, mfc=face, ms=2.5, capsize=0, linewidth=0.8, zorder=2,
            )  # fmt: skip
        panel.errorbar(
            points[field] * NUDGED[name], scale * points["value"], scale * points["error"],
            fmt=marker, color=color, mfc="white", mec="black", mew=0.6, ms=5, capsize=2,
            linewidth=0.8, zorder=3,
        )  # fmt: skip
    ticks = [*VARIED[field][1]]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_xticks([], minor=True)


def caption(table: pd.DataFrame) -> str:
    theory = table[table["source"] == "theory"]
    best = theory[theory["observable"] == "best_penalty"]
    simulated = largest(table).query("source == 'simulation'")
    counts = {name: int((best["status"] == name).sum()) for name in ("unstable", "not_converged")}
    return (
        "**The penalty to pre-train with.** λ* of the least pre-training error E, effective noise "
        "(linear: Δ_eff = Δ/2 + Q0 − 2M + Q, softmax: the variance Δ/2 + Q0 − M²/Q) and error E' "
        "after LoRA, and of the best overlap o, against α, κ0, Δ and T, and below each what λ* of "
        "another objective costs in E', relative to its own. Around T = 2, κ0 = Δ = 0.5, κ = 1, "
        "α = 0.2, α' = 3, λ' = 0.2, q0 = 1; linear attention with re-used sequences (e = 1), "
        "softmax with fresh ones (e = 0). Small symbols and lines: theory, errors from a second "
        "set of nodes; open ones: the best λ is the end of the box "
        f"({BOX['linear'][0]:g} linear, {BOX['softmax'][0]:g} softmax), which for the overlap of "
        "linear attention stands for λ → 0. Large symbols with a black edge: simulation, "
        f"D = {simulated['dim'].iloc[0]:.0f}, {simulated['seeds'].iloc[0]:.0f} seeds, the same at "
        "every λ: minima of polynomials in log λ through the means, errors by the jackknife over "
        "seeds, beside each other at each α; for linear attention the measured O(1/√D) cross term "
        "of docs/theory.md, section 7, is subtracted from E', offsets O(1/D) remain. "
        f"At the base: {'; '.join(_base_text(largest(table), name) for name in SEQUENCES)}. "
        f"Of {len(best)} λ*, {int(best['at_bound'].astype(bool).sum())} are at an end, "
        f"{counts['unstable']} where the theory is unstable (pale bands), "
        f"{counts['not_converged']} not converged (left out); excesses below {100 * FLOOR:g} % are "
        "not shown."
    )


def _base_text(table: pd.DataFrame, activation: str) -> str:
    part = table[(table["activation"] == activation)]
    for field, value in BASE.items():
        part = part[np.isclose(part[field], value)]
    texts = []
    for name in OBJECTIVES:
        here = part[part["objective"] == name].set_index(["source", "observable"])
        numbers = {
            source: Estimate(*here.loc[(source, "best_penalty"), ["value", "error"]], 2)
            for source in ("theory", "simulation")
            if (source, "best_penalty") in here.index
        }
        text = f"{LABELS[name]} {numbers['theory']}".replace("$", "")
        if bool(here.loc[("theory", "best_penalty"), "at_bound"]):
            text += ", the end"
        elif "simulation" in numbers:
            text += f" (simulated {numbers['simulation']})"
        if name != OWN:
            excess = here.loc[("theory", "excess_test_error")]
            text += f", E' + {Estimate(100 * excess['value'], 100 * excess['error'], 2)} %"
        texts.append(text)
    return f"{activation}, " + "; ".join(texts)


EXPERIMENT = Experiment("optimal", compute, draw, caption)
