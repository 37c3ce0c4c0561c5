"""Published Fig 1's set: test error and overlap after LoRA against λ, λ', α and α'.

Given for that figure: fresh sequences, α = .1, α' = 3, T = 3, κ0 = κ = 1, Δ = .5, λ ∈ {.01, .1, 1},
λ' ∈ {.05, .5, 1}, simulations at D = 150.  Assumed here: λ = .1 and λ' = .5 where the other is on
the axis or one of them is kept, q0 = 1, and the ranges of the axes.
"""

from __future__ import annotations

import functools
from itertools import product
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
    shade_unstable,
    simulation_rows,
    solved,
    theory_rows,
)
from matplotlib.figure import Figure

from lora_theory import Finetuning, Pretraining, Problem, Status

BASE = {"pretraining.samples": 0.1, "finetuning.samples": 3.0}
BASE |= {"pretraining.penalty": 0.1, "finetuning.penalty": 0.5}
PENALTIES = ("pretraining.penalty", (0.01, 0.1, 1.0))
LORA_PENALTIES = ("finetuning.penalty", (0.05, 0.5, 1.0))
SYMBOLS = {
    "pretraining.penalty": r"$\lambda$",
    "finetuning.penalty": r"$\lambda'$",
    "pretraining.samples": r"$\alpha=N/D^2$",
    "finetuning.samples": r"$\alpha'=N'/D$",
}
#: axis: (its ends, simulated values in the quick and in the full profile, what the curves vary)
PANELS = {
    "pretraining.penalty": ((0.003, 3.0), (0.01, 0.3), (0.01, 0.1, 0.3, 1.0), LORA_PENALTIES),
    "finetuning.penalty": ((0.02, 4.0), (0.05, 1.0), (0.05, 0.2, 0.5, 1.0), PENALTIES),
    "pretraining.samples": ((0.03, 1.0), (0.1,), (0.05, 0.1, 0.2, 0.4), PENALTIES),
    "finetuning.samples": ((1.0, 20.0), (3.0,), (2.0, 3.0, 6.0, 12.0), LORA_PENALTIES),
}
ACTIVATIONS = ("softmax", "linear")


def problem(activation: str, fields: dict[str, float]) -> Problem:
    values = BASE | fields
    return Problem(
        tokens=3,
        activation=activation,
        teacher_rank=1.0,
        label_noise=0.5,
        pretraining=Pretraining(
            samples=values["pretraining.samples"], penalty=values["pretraining.penalty"]
        ),
        finetuning=Finetuning(
            samples=values["finetuning.samples"], penalty=values["finetuning.penalty"]
        ),
    )


def rows_of(source: str, activation: str, profile: Profile, store: Path) -> list[dict[str, Any]]:
    """All rows of theory, or of simulation, of one activation."""
    kept = functools.partial(simulation_rows, store=store / activation)
    compute_rows = {"theory": theory_rows, "simulation": kept}[source]
    rows: list[dict[str, Any]] = []
    for axis, (ends, few, many, (curve, levels)) in PANELS.items():
        values = np.geomspace(*ends, profile.points).tolist()
        if source == "simulation":
            values = profile.pick(quick=few, full=many)
            levels = profile.pick(quick=(BASE[curve],), full=levels)
        for level, x in product(levels, values):
            labels = {"axis": axis, "curve": curve, "level": level}
            rows += compute_rows(problem(activation, {axis: x, curve: level}), labels, profile)
    return rows


def compute(profile: Profile, store: Path) -> pd.DataFrame:
    return computed(rows_of, ACTIVATIONS, profile, store)


def draw(table: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(
        4, 4, figsize=(7.2, 7.4), sharex="col", sharey="row", layout="constrained"
    )
    rows = [(a, o) for a in ACTIVATIONS for o in ("test_error", "overlap")]
    for row, (activation, observable) in enumerate(rows):
        for column, axis in enumerate(PANELS):
            panel = axes[row, column]
            part = solved(table[(table["activation"] == activation) & (table["axis"] == axis)])
            _draw_panel(panel, part, axis, observable)
            if row == 3:
                panel.set_xlabel(SYMBOLS[axis])
            if row == 0:
                symbol = SYMBOLS[PANELS[axis][3][0]]
                panel.legend(
                    title=f"curves: {symbol}", title_fontsize=7, ncols=3, handlelength=1.7,
                    columnspacing=0.7, handletextpad=0.4, loc="lower center",
                    bbox_to_anchor=(0.5, 1.0),
                )  # fmt: skip
        label = {"test_error": "test error $E'$", "overlap": "overlap $o$"}[observable]
        axes[row, 0].set_ylabel(f"{activation}\n{label}")
    return figure


def _draw_panel(panel: Any, part: pd.DataFrame, axis: str, observable: str) -> None:
    chosen = part[part["observable"] == observable]
    for (color, dashes, marker), level in zip(CURVES, PANELS[axis][3][1], strict=True):
        here = chosen[chosen["level"] == level]
        theory = here[here["source"] == "theory"].sort_values(axis)
        panel.plot(theory[axis], theory["value"], dashes, color=color, label=f"{level:g}")
        shade_unstable(panel, axis, theory, theory["value"], color)
        ties = theory[theory["status"] == Status.TIE.value]
        panel.plot(ties[axis], ties["value"], "x", color=color, ms=5, mew=1.2)
        points = here[(here["source"] == "simulation") & (here["start"] == "informed")]
        panel.errorbar(
            points[axis], points["value"], points["error"],
            fmt=marker, color=color, mfc="white", capsize=1.5, linewidth=0.8, zorder=3,
        )  # fmt: skip
        if observable == "test_error":
            frozen = part[(part["observable"] == "frozen_test_error") & (part["level"] == level)]
            frozen = frozen[frozen["source"] == "theory"].sort_values(axis)
            panel.plot(frozen[axis], frozen["value"], ":", color=color, linewidth=0.8)
    panel.set_xscale("log")


def caption(table: pd.DataFrame) -> str:
    simulation = table[table["source"] == "simulation"]
    unsolved = table[(table["source"] == "theory") & (table["status"] == "not_converged")]
    errors = solved(table[(table["source"] == "theory") & (table["observable"] != "overlap")])
    error = (errors["error"] / errors["value"]).max()
    unstable = (errors["status"] == Status.UNSTABLE.value).sum() // 2
    ties = (errors["status"] == Status.TIE.value).sum() // 2
    crosses = (
        f"Crosses ({ties} in all): ties, where the potentials of the informed and of another "
        "branch differ by less than their errors, and either may be the solution. "
    )
    return (
        "**Figure 1.** Test error E' (label noise included) and overlap o after rank-one LoRA, for "
        "softmax and linear attention. Lines: theory; dotted: frozen weights without LoRA; "
        f"markers: simulation from the informed start, D = {simulation['dim'].iloc[0]:.0f}, mean ± "
        f"standard error of {simulation['seeds'].iloc[0]:.0f} seeds. T = 3, κ0 = κ = 1, Δ = 0.5, "
        "q0 = 1, fresh sequences; where not on the axis or in the legend, α = 0.1, α' = 3, "
        "λ = 0.1, λ' = 0.5 (set of the published Fig 1; assumed: these λ and λ' in the panels that "
        "vary others, q0, the ranges of the axes). At finite D the errors carry an O(1/√D) offset. "
        f"Largest quadrature error of a theory point: {error:.1%}; "
        f"theory points left out as not converged: {unsolved['level'].count() // 3}. "
        f"{crosses if ties else ''}Pale bands ({unstable} points in all): the replica-symmetric "
        "solution is unstable, by a replicon ≥ 1 or by jumps that matter. "
        "Where λ is so large that the weights vanish, the curves no longer depend on it. "
        "The table also holds the lowest of two random starts."
    )


EXPERIMENT = Experiment("figure1", compute, draw, caption)
