"""Theory beside simulation on some thirty problems: every observable, extrapolated to D → ∞.

Both activations, T = 1 … 4, fresh, re-used and chosen sequences, every penalty, and everything else
that a problem may have.  The full profile trains every problem at three D and keeps one row per run
in validation_runs.csv beside the table; each cell of the table is one observable of one problem,
extrapolated by ``lora_theory.compare`` (powers: docs/theory.md, section 7), with its z-score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import decay
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from figure_tools import Experiment, Profile
from matplotlib.figure import Figure
from scipy.stats import norm

from lora_theory import (
    EffectiveNoise,
    Finetuning,
    Prediction,
    Pretraining,
    Problem,
    finetune,
    predict,
)
from lora_theory.compare import agreements
from lora_theory.files import written_whole
from lora_theory.laws import law_of
from lora_theory.spelling import texts_of
from lora_theory.sweeps import kept_simulations

RUNS = Path(__file__).resolve().parent.parent / "figures" / "validation_runs.csv"
#: D and runs per D in both profiles; every problem has seeds of its own.
SIZES = {"quick": ((20, 28, 40), 4), "full": ((50, 80, 130), 16)}
SEED = 2026
#: Problems of the quick profile.
FEW = ("linear-2-fresh", "linear-2-reused", "softmax-2-fresh", "softmax-2-truncated")


def _problem(
    activation: str,
    tokens: int,
    teacher: tuple[float, float],
    pretraining: tuple[float, ...],
    finetuning: tuple[float, float, str] | None,
    signal: float = 1.0,
) -> Problem:
    stage = None
    if finetuning is not None:
        samples, penalty, sequences = finetuning
        stage = Finetuning(samples=samples, penalty=penalty, sequences=sequences, signal=signal)
    return Problem(
        activation=activation,
        tokens=tokens,
        teacher_rank=teacher[0],
        label_noise=teacher[1],
        pretraining=Pretraining(
            samples=pretraining[0], penalty=pretraining[1], rank=(*pretraining, 1.0)[2]
        ),
        finetuning=stage,
    )


#: name: problem; both activations, T = 1 … 4, fresh and re-used, with and without noise.
PROBLEMS = {
    "softmax-2-fresh": _problem("softmax", 2, (0.5, 0.5), (0.5, 0.05), (4.0, 0.2, "fresh")),
    "softmax-2-reused": _problem("softmax", 2, (0.5, 0.5), (0.2, 0.02), (3.0, 0.2, "reused")),
    "softmax-2-clean": _problem("softmax", 2, (0.5, 0.0), (1.0, 0.1), (6.0, 0.3, "fresh"), 2.0),
    "softmax-3-fresh": _problem("softmax", 3, (1.0, 0.5), (0.1, 0.1), (3.0, 0.5, "fresh")),
    "softmax-3-reused": _problem("softmax", 3, (1.0, 0.5), (0.2, 0.05), (3.0, 0.2, "reused")),
    "softmax-4-fresh": _problem("softmax", 4, (0.5, 1.0), (0.1, 0.05), (3.0, 0.3, "fresh")),
    "linear-1-fresh": _problem("linear", 1, (0.5, 0.2), (3.0, 0.1), (12.0, 0.2, "fresh")),
    "linear-2-fresh": _problem("linear", 2, (0.5, 0.5), (0.2, 0.02), (3.0, 0.2, "fresh")),
    "linear-2-reused": _problem("linear", 2, (0.5, 0.5), (0.2, 0.2), (3.0, 0.2, "reused")),
    "linear-2-narrow": _problem("linear", 2, (0.3, 0.5), (0.3, 0.4, 0.6), (5.0, 1.0, "fresh"), 0.5),
    "linear-3-reused": _problem("linear", 3, (1.0, 0.5), (0.1, 0.1), (3.0, 0.5, "reused")),
    "linear-4-fresh": _problem("linear", 4, (2.0, 1.0), (0.1, 0.1), (2.0, 0.5, "fresh")),
    "softmax-2-pretraining": _problem("softmax", 2, (0.5, 0.5), (0.5, 0.01), None),
}

#: name: (the problem above that it is, with which fields changed); everything else a problem may
#: have: penalties, teachers, temperatures, truncation, covariance, selection, partial re-use.
VARIED: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax-2-nuclear": (
        "softmax-2-fresh",
        {"pretraining.regularizer": "nuclear_norm", "teacher.law": "goe", "teacher_rank": None},
    ),
    "softmax-2-frobenius": ("softmax-2-reused", {"pretraining.regularizer": "frobenius"}),
    "softmax-2-temperatures": (
        "softmax-2-fresh",
        {"inverse_temperature": 1.5, "teacher.inverse_temperature": 0.8},
    ),
    "softmax-2-truncated": ("softmax-2-reused", {"compression.rank": 0.3}),
    "softmax-2-half-reused": ("softmax-2-reused", {"finetuning.reused_fraction": 0.5}),
    "softmax-2-selected": (
        "softmax-2-fresh",
        {"finetuning.selection.pool": 20.0, "finetuning.selection.score": "cross_token"},
    ),
    "softmax-2-rescaled": ("softmax-2-fresh", {"finetuning.rescaling": 1.3}),
    "softmax-2-covariance": (
        "softmax-2-fresh",
        {"covariance.eigenvalues": [0.5, 1.5], "pretraining.penalty": 0.1},
    ),
    "softmax-3-selected": (
        "softmax-3-fresh",
        {"finetuning.selection.pool": 30.0, "finetuning.selection.score": "low_variance"},
    ),
    "linear-2-frobenius": ("linear-2-reused", {"pretraining.regularizer": "frobenius"}),
    "linear-2-separable": (
        "linear-2-fresh",
        {
            "pretraining.regularizer": "separable",
            "pretraining.function": "abs(s)**1.5",
            "pretraining.penalty": 0.2,
            "teacher.law": "power_law",
            "teacher.exponent": 0.25,
            "teacher_rank": None,
        },
    ),
    "linear-2-low-rank-decay": (
        "linear-2-fresh",
        {"pretraining.regularizer": "low_rank_decay", "pretraining.penalty": 0.2},
    ),
    "linear-2-preconditioned": (
        "linear-2-fresh",
        {
            "pretraining.regularizer": "preconditioned",
            "pretraining.degree": 3,
            "pretraining.scale": 2.0,
            "pretraining.penalty": 0.1,
        },
    ),
    "linear-2-truncated": ("linear-2-fresh", {"compression.rank": 0.3}),
    "linear-2-redrawn": ("linear-2-reused", {"finetuning.noise": "redrawn"}),
    "linear-2-shifted": (
        "linear-2-fresh",
        {
            "covariance.eigenvalues": [0.5, 1.5],
            "covariance.shifted": [1.5, 0.5],
            "pretraining.penalty": 0.2,
        },
    ),
    "linear-3-selected": (
        "linear-4-fresh",
        {
            "tokens": 3,
            "finetuning.selection.pool": 20.0,
            "finetuning.selection.score": "low_variance",
        },
    ),
}
PROBLEMS |= {name: PROBLEMS[base].replace(fields) for name, (base, fields) in VARIED.items()}


def seed_of(name: str) -> int:
    """The root of its random numbers."""
    return SEED + list(PROBLEMS).index(name)


def trained(name: str, profile: Profile, store: Path) -> pd.DataFrame:
    """One row per run of a problem, from w*."""
    dims, seeds = SIZES[profile.name]
    tables = []
    for dim in dims:
        effort = {"seed": seed_of(name), "starts": 0, "dtype": "float32"}
        (result,) = kept_simulations(PROBLEMS[name], [dim], seeds, store / name, **effort)
        table = pd.DataFrame(result.runs)
        keep = [c for c in table if c.startswith(("pretraining.", "finetuning."))]
        table = table[["seed_index", "dim", "seed", "dtype", *keep]]
        table.insert(0, "problem", name)
        tables.append(table)
    return pd.concat(tables)


def prediction_of(problem: Problem) -> Prediction:
    """The prediction of what descent from w* finds, after descent from weights of order one.

    Of low-rank decay these end on the metastable branch (docs/theory.md, section 2.8).
    """
    found = predict(problem)
    if found.finetuning is None:
        return found
    informed = next(branch for branch in found.branches if branch.branch == "informed")
    first = found.pretraining
    if problem.pretraining.regularizer == "low_rank_decay":
        values, _ = decay.metastable(problem.alone)
        Q, M, Q0 = values["Q"], values["M"], float(law_of(problem).moments()[1])
        names = ("Q", "M", "V", "test_error", "train_error", "learned_rank")
        numbers = {name: values[name] for name in names} | {"overlap": M / (Q * Q0) ** 0.5}
        first = dataclasses.replace(first, **numbers)
        noise = EffectiveNoise(gain=M / Q, variance=Q0 + problem.label_noise / 2 - M**2 / Q, Q=Q)
        assert problem.finetuning is not None
        branches = finetune(
            noise, problem.finetuning, tokens=problem.tokens, activation=problem.activation
        )
        informed = next(branch for branch in branches if branch.branch == "informed")
    return dataclasses.replace(found, pretraining=first, finetuning=informed)


def predicted(name: str, runs: pd.DataFrame | None = None) -> Iterator[dict[str, Any]]:
    """The cells of a problem: its observables in theory and, from runs, in simulation."""
    problem = PROBLEMS[name]
    prediction = prediction_of(problem)
    if runs is None:
        runs = runs_of(pd.read_csv(RUNS), name)
    dims = sorted(runs["dim"].unique())
    shared = {"problem": name, **texts_of(problem), "source": "comparison"}
    shared |= {"status": prediction.status.value, "dims": " ".join(map(str, dims))}
    shared |= {"seeds": len(runs) // len(dims), "root_seed": seed_of(name)}
    missed = ~runs.filter(regex=r"\.converged$").astype(bool).all(axis=1)
    shared["missed"] = int(missed.sum())
    for cell in agreements(prediction, {dim: runs[runs["dim"] == dim] for dim in dims}):
        yield {
            **shared, "stage": cell.stage, "observable": cell.observable, "theory": cell.theory,
            "quadrature_error": cell.quadrature_error, "simulation": cell.simulation.mean,
            "error": cell.simulation.error, "power": cell.power, "corrected": cell.corrected,
            "z": cell.z,
        }  # fmt: skip


def runs_of(runs: pd.DataFrame, name: str) -> pd.DataFrame:
    return runs[runs["problem"] == name]


def rows_of(name: str, runs: pd.DataFrame) -> list[dict[str, Any]]:
    return list(predicted(name, runs_of(runs, name)))


def compute(profile: Profile, store: Path) -> pd.DataFrame:
    names = profile.pick(quick=FEW, full=list(PROBLEMS))
    kept = store.parent / RUNS.name
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        if "simulation" in profile.sources:
            runs = pd.concat(pool.map(trained, names, repeat(profile), repeat(store)))
            with written_whole(kept) as stream:
                runs.to_csv(stream, index=False, float_format="%.8g")
        runs = pd.read_csv(kept)
        parts = pool.map(rows_of, names, repeat(runs))
        return pd.DataFrame(list(chain.from_iterable(parts)))


STAGES = {"pretraining": ("#0072B2", "o"), "finetuning": ("#E69F00", "s")}
SHOWN = {"pretraining": "pre-training", "finetuning": "fine-tuning"}


#: What is special about a problem, where its name does not say it well.
SPECIAL = {
    "reused": "re-used",
    "clean": "no label noise",
    "narrow": "narrow factor",
    "pretraining": "pre-training alone",
    "nuclear": "nuclear norm",
    "frobenius": "Frobenius norm",
    "low-rank-decay": "low-rank decay",
    "truncated": "truncated weights",
    "half-reused": "half re-used",
    "selected": "chosen from a pool",
    "rescaled": "rescaled weights",
    "covariance": "covariance of tokens",
    "separable": "separable penalty",
    "redrawn": "re-used, noise redrawn",
    "shifted": "shifted covariance",
}


def spelled_out(name: str) -> str:
    """The name of a problem, spelled out."""
    activation, tokens, what = name.split("-", 2)
    return f"{activation}, T = {tokens}, {SPECIAL.get(what, what)}"


def draw(table: pd.DataFrame) -> Figure:
    names = list(dict.fromkeys(table["problem"]))
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(7.2, max(2.8, 1.2 + 0.155 * len(names))),
        layout="constrained",
        width_ratios=(3, 2),
    )
    left.axvspan(-2, 2, color="0.92", linewidth=0)
    left.axvline(0, color="0.6", linewidth=0.8)
    for stage, (color, marker) in STAGES.items():
        part = table[table["stage"] == stage]
        heights = part["problem"].map(names.index) + (0.15 if stage == "finetuning" else -0.15)
        left.plot(part["z"], heights, marker, color=color, mfc="none", label=SHOWN[stage])
    left.set_yticks(range(len(names)), [spelled_out(name) for name in names], fontsize=6)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set_xlabel("z = (simulation − theory) / error")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    z = np.sort(table["z"].dropna())
    normal = norm.ppf((np.arange(len(z)) + 0.5) / len(z))
    right.plot(normal, normal, color="0.5", linewidth=0.8, label="standard normal")
    right.plot(normal, z, ".", color="black", markersize=3, label=f"{len(z)} cells")
    right.set_xlabel("quantile of a standard normal variable")
    right.set_ylabel("z, in increasing order")
    right.set_aspect("equal")
    right.legend(loc="upper left")
    return figure


def summary(table: pd.DataFrame) -> dict[str, float]:
    """χ² per cell with its error, the share |z| < 2, the largest |z| and its chance; the
    mean z of the one observable that is off, the frozen error of softmax.

    The chance is that of a larger one among as many independent standard normal variables.

    The observables of a problem come from the same runs: errors are by leaving out one problem
    after the other.
    """
    cells = table.dropna(subset="z")
    squares = cells["z"].pow(2).groupby(cells["problem"]).agg(["sum", "count"])
    without = (squares["sum"].sum() - squares["sum"]) / (squares["count"].sum() - squares["count"])
    count = len(squares)
    frozen = cells["observable"].eq("frozen_test_error") & cells["activation"].eq("softmax")
    error = np.sqrt((count - 1) / count * np.sum((without - without.mean()) ** 2))
    return {
        "bias": float(cells.loc[frozen, "z"].mean()),
        "bias_error": float(frozen.sum() ** -0.5),  # each z has an error of 1
        "cells": len(cells),
        "problems": count,
        "chi2": float(squares["sum"].sum() / squares["count"].sum()),
        "chi2_error": float(error),
        "within": float((cells["z"].abs() < 2).mean()),
        "largest": float(cells["z"].abs().max()),
        "chance": float(1 - (1 - 2 * norm.sf(cells["z"].abs().max())) ** len(cells)),
    }


def caption(table: pd.DataFrame) -> str:
    found = summary(table)
    worst = table.loc[table["z"].abs().idxmax()]
    return (
        "**Validation.** Theory against simulation: observables of both stages "
        f"({found['cells']:.0f} cells, {found['problems']:.0f} problems), simulated at "
        f"D = {worst['dims'].replace(' ', ', ')} with {worst['seeds']:.0f} runs each and "
        "extrapolated to D → ∞ by weighted least squares in 1/D, or in 1/√D for q, m, the "
        "training error of LoRA, for softmax all its errors, and everything of the power-law "
        "teacher (docs/theory.md, section 7). Left: z-scores by problem "
        "(activation, T, what is special; parameters in the table); grey: |z| < 2. Right: all of "
        "them in order, against a standard normal variable. The errors are those of simulation and "
        f"quadrature. χ² per cell {found['chi2']:.2f} ± {found['chi2_error']:.2f} (cells of one "
        "problem share their runs; error from leaving out problems); |z| < 2: "
        f"{found['within']:.0%}; largest |z| {found['largest']:.1f} "
        f"({spelled_out(worst['problem'])}; {SHOWN[worst['stage']]}, "
        f"{worst['observable']}), which independent cells exceed with a chance of "
        f"{found['chance']:.0%}. The frozen error of softmax has a mean z of {found['bias']:.2f} ± "
        f"{found['bias_error']:.2f}: its next offset, in 1/D, is larger than its errors. Low-rank "
        "decay is compared with its metastable branch, where descent ends (docs/theory.md, "
        "section 2.8). Runs that did not converge, kept: "
        f"{table.groupby('problem')['missed'].first().sum():.0f}."
    )


EXPERIMENT = Experiment("validation", compute, draw, caption)
