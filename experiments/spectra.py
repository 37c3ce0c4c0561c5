"""The learned spectrum at four sample ratios: bulk, mass at zero, and the spikes of the teacher.

The set of published Fig 3, softmax attention, with two spikes added to the teacher's matrix: one
that always sticks out of the bulk and one that does only where α is large enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, product, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from figure_tools import Experiment, Profile, solved
from matplotlib.figure import Figure

from lora_theory import Estimate, Pretraining, Problem, simulate, spectrum
from lora_theory.problem import Teacher

SAMPLES = "pretraining.samples"
ALPHAS = (0.05, 0.2, 0.8, 3.0)
SPIKES = (3.0, 6.0)
#: Trained eigenvalues below this, of order one otherwise, count as 0.
ZERO = 1e-3
BINS = 12  # of the histogram, up to the edge of the predicted bulk and one beyond it


def problem(samples: float) -> Problem:
    return Problem(
        tokens=2,
        activation="softmax",
        teacher_rank=0.5,
        label_noise=0.5,
        teacher=Teacher(spikes=SPIKES),
        pretraining=Pretraining(samples=samples, penalty=0.02),
    )


def learned(samples: float, profile: Profile) -> Any:
    return spectrum(problem(samples), nodes=profile.nodes, blocks=profile.blocks, points=200)


def theory(samples: float, profile: Profile, store: Path) -> Iterator[dict[str, Any]]:
    found = learned(samples, profile)
    shared = {**_fields(samples), "source": "theory", "status": found.status.value}
    for at, value in zip(found.eigenvalues, found.density, strict=True):
        yield {**shared, "observable": "density", "eigenvalue": at, "value": value}
    for name in ("mass_at_zero", "rank", "effective_rank"):
        error = found.quadrature_error[name]
        yield {**shared, "observable": name, "value": getattr(found, name), "error": error}
    for outlier in found.outliers:
        yield {
            **shared,
            "observable": "outlier",
            "spike": outlier.spike,
            "value": outlier.eigenvalue,
            "error": found.quadrature_error["outliers"],
        }
    # below it no spike is seen
    yield {**shared, "observable": "visible_spike", "value": found.visible_spikes[1]}


def simulation(samples: float, profile: Profile, store: Path) -> Iterator[dict[str, Any]]:
    """Trained systems: a histogram without as many largest eigenvalues as there are outliers."""
    dim, seeds = profile.pick(quick=(40, 4), full=(100, 8))
    store.mkdir(parents=True, exist_ok=True)
    path = store / f"alpha{samples:g}.npz"
    result = simulate(
        problem(samples), dim, seeds, dtype="float32", save=path, test_sequences=1000,
        gradient_tolerance=5e-3,  # relative to λ; rounding does not shrink with it
    )  # fmt: skip
    shared = {**_fields(samples), "source": "simulation", "status": result.status.value}
    shared |= {"dim": dim, "seeds": seeds, "root_seed": result.environment["seed"]}
    shared |= {"dtype": result.environment["dtype"]}
    factors = np.load(path)["W"]
    levels = np.linalg.svd(factors, compute_uv=False) ** 2 / np.sqrt(factors[0].size)
    expected = learned(samples, profile)
    count = len(expected.outliers)
    top = expected.bands[-1][1]
    ends = np.linspace(0, top * (1 + 1 / BINS), BINS + 2)
    inside = [row[row > ZERO] for row in levels[:, count:]]
    heights = np.array([np.histogram(row, ends)[0] for row in inside]) / (dim * np.diff(ends))
    for left, right, column in zip(ends[:-1], ends[1:], heights.T, strict=True):
        yield {**shared, "observable": "histogram", "left": left, "right": right, **_of(column)}
    yield {**shared, "observable": "mass_at_zero", **_of(1 - np.mean(levels > ZERO, axis=1))}
    second = dim * np.sum(levels**2, axis=1)
    yield {**shared, "observable": "effective_rank", **_of(np.sum(levels, axis=1) ** 2 / second)}
    for outlier, column in zip(reversed(expected.outliers), levels.T[:count], strict=True):
        yield {**shared, "observable": "outlier", "spike": outlier.spike, **_of(column)}


def _fields(samples: float) -> dict[str, Any]:
    return {**problem(samples).to_flat(), "teacher.spikes": ",".join(map(str, SPIKES))}


def _of(values: np.ndarray) -> dict[str, Any]:
    estimate = Estimate.of(values)
    return {"value": estimate.mean, "error": estimate.error}


ROWS = {"theory": theory, "simulation": simulation}


def rows_of(source: str, samples: float, profile: Profile, store: Path) -> list[dict[str, Any]]:
    return list(ROWS[source](samples, profile, store))


def compute(profile: Profile, store: Path) -> pd.DataFrame:
    # two processes share the jobs; the largest systems come first
    sources, samples = zip(*product(profile.sources, ALPHAS[::-1]), strict=True)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        parts = pool.map(rows_of, sources, samples, repeat(profile), repeat(store))
        return pd.DataFrame(list(chain.from_iterable(parts)))


BLUE, RED = "#0072B2", "#D55E00"  # Okabe–Ito


def draw(table: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(1, 4, figsize=(7.2, 2.5), layout="constrained")
    for panel, samples in zip(axes, ALPHAS, strict=True):
        _draw_panel(panel, solved(table[table[SAMPLES] == samples]))
        panel.set_title(rf"$\alpha=N/D^2={samples:g}$")
        panel.set_xlabel(r"eigenvalue $s$ of $\hat S$")
    axes[0].set_ylabel("density")
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, handlelength=1.8)
    return figure


def _draw_panel(panel: Any, part: pd.DataFrame) -> None:
    if part["source"].nunique() < 2:
        panel.text(0.5, 0.5, "not converged", transform=panel.transAxes, ha="center")
        return
    rows = {
        key: group.dropna(axis=1, how="all")
        for key, group in part.groupby(["source", "observable"], sort=False)
    }
    bars, curve = rows["simulation", "histogram"], rows["theory", "density"]
    middle, width = (bars["left"] + bars["right"]) / 2, bars["right"] - bars["left"]
    panel.bar(
        middle, bars["value"], width, color="0.85", edgecolor="0.6", linewidth=0.4,
        yerr=bars["error"], ecolor="0.45", error_kw={"linewidth": 0.6},
        label="simulation, bulk",
    )  # fmt: skip
    panel.plot(curve["eigenvalue"], curve["value"], color="black", label="theory, bulk")
    top = 1.45 * max(bars["value"].max(), curve["value"].max())
    panel.set_ylim(0, top)
    for _, outlier in rows.get(("theory", "outlier"), pd.DataFrame()).iterrows():
        name = rf"$\theta={outlier['spike']:g}$"
        panel.axvline(
            outlier["value"], ymax=0.3, color=BLUE, linestyle="--", linewidth=1.1,
            label="theory, outliers" if outlier["spike"] == max(SPIKES) else None,
        )  # fmt: skip
        panel.text(outlier["value"], 0.32 * top, name, color=BLUE, ha="center", fontsize=6.5)
    measured = rows.get(("simulation", "outlier"))
    if measured is not None:
        panel.errorbar(
            measured["value"], np.full(len(measured), 0.12 * top), xerr=measured["error"],
            fmt="o", color=RED, mfc="white", capsize=1.5, linewidth=0.8, zorder=3,
            label="simulation, outliers",
        )  # fmt: skip
    zero = [rows[source, "mass_at_zero"].iloc[0] for source in ("theory", "simulation")]
    panel.text(
        0.97, 0.97,
        f"share at $s=0$:\n{zero[0]['value']:.3f} (theory)\n{zero[1]['value']:.3f} (simulation)",
        transform=panel.transAxes, ha="right", va="top", fontsize=6.5,
    )  # fmt: skip
    panel.set_xlim(0, 1.12 * panel.get_xlim()[1])


def caption(table: pd.DataFrame) -> str:
    simulated = table[table["source"] == "simulation"]
    spikes = " and ".join(f"{spike:g}" for spike in SPIKES)
    theory_of = table[table["source"] == "theory"]
    thresholds = "; ".join(
        f"{row['value']:.2f} at α = {row[SAMPLES]:g}"
        for _, row in theory_of[theory_of["observable"] == "visible_spike"]
        .sort_values(SAMPLES)
        .iterrows()
    )
    scores = "; ".join(
        f"α = {samples:g}: " + ", ".join(_scores(table[table[SAMPLES] == samples]))
        for samples in ALPHAS
    )
    return (
        "**Spectra.** Eigenvalues of the pre-trained Ŝ for a teacher S0 = W0W0ᵀ/√(P0D) + two "
        f"spikes θvvᵀ of θ = {spikes}, at four sample ratios α. Black lines: density for D → ∞, "
        "which integrates to the rank; the rest of the eigenvalues is 0, with the shares written "
        "in the panels. Grey: histogram of trained systems without the largest eigenvalues, of "
        "which there are as many as predicted outliers. Dashed lines: predicted outliers; circles: "
        f"largest trained eigenvalues. Simulation: D = {simulated['dim'].iloc[0]:.0f}, mean ± "
        f"standard error of {simulated['seeds'].iloc[0]:.0f} seeds; the height of the circles has "
        "no meaning. Softmax, T = 2, κ0 = 0.5, κ = 1, Δ = 0.5, λ = 0.02. Smallest spike that "
        f"is seen outside of the bulk: θ = {thresholds}. Trained (predicted) values: {scores}. "
        f"Trained eigenvalues below {ZERO:g} count as 0; offsets are O(1/D), those of the "
        "spikes among them, which add Σθ²/D to Q0 and 1/D each to the rank."
    )


def _scores(part: pd.DataFrame) -> Iterator[str]:
    theory_of, simulated = (part[part["source"] == s] for s in ("theory", "simulation"))
    for _, row in simulated[simulated["observable"].isin(("effective_rank", "outlier"))].iterrows():
        same = theory_of[theory_of["observable"] == row["observable"]]
        name = "effective rank"
        if row["observable"] == "outlier":
            same, name = same[same["spike"] == row["spike"]], f"outlier of θ = {row['spike']:g}"
        expected = same["value"].iloc[0]
        yield f"{name} {Estimate(row['value'], row['error'], 1)} ({expected:.3f})"


EXPERIMENT = Experiment("spectra", compute, draw, caption)
