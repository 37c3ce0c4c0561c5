"""Where LoRA helps and where it hurts: regions in (α', Δ_eff) and in (α', α), softmax, T = 2.

Theory on a fine grid, random-start simulations on a coarse one.  Assumed: κ0 = .5, κ = 1, λ = .1,
λ' = .5, q0 = 1; α = .5 in the first map, whose Δ_eff comes from the label noise; Δ = .5 in the
second.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from figure_tools import Experiment, Profile
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from lora_theory import Finetuning, Prediction, Pretraining, Problem, predict
from lora_theory.sweeps import kept_simulations

SAMPLES = (0.3, 10.0)
TICKS = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0)


class Map(NamedTuple):
    """One panel: the field of its vertical axis, its ends, and the axis as it is shown."""

    name: str
    field: str
    ends: tuple[float, float]
    label: str


MAPS = (
    Map("noise", "label_noise", (0.05, 3.0), r"effective noise $\Delta_{\rm eff}$"),
    Map("samples", "pretraining.samples", (0.05, 2.0), r"pre-training samples $\alpha$"),
)
#: A task is one row of a map: all α' at one value of the vertical axis, which share their
#: pre-training; memory is that of one row.
BASE = Problem(
    tokens=2,
    activation="softmax",
    teacher_rank=0.5,
    label_noise=0.5,
    pretraining=Pretraining(samples=0.5, penalty=0.1),
    finetuning=Finetuning(samples=1.0, penalty=0.5),
)


def axis(ends: tuple[float, float], points: int) -> list[float]:
    """Points equally spaced in the logarithm."""
    return [float(f"{value:.4g}") for value in np.geomspace(*ends, points)]


def theory(which: Map, value: float, profile: Profile) -> list[dict[str, Any]]:
    """One row of a map."""
    nodes, points = profile.pick(quick=(64, 8), full=(128, 32))
    rows = []
    for samples in axis(SAMPLES, points):
        problem = BASE.replace({which.field: value, "finetuning.samples": samples})
        answer = predict(problem, nodes=nodes)
        rows.append(labels(which, answer.problem, effective_noise(answer)) | regions(answer))
    return rows


def effective_noise(answer: Prediction) -> float:
    """Δ/2 + Q0 − 2M + Q, also for softmax."""
    noise = answer.effective_noise
    return noise.label_variance - 2 * noise.M + noise.Q


def labels(which: Map, problem: Problem, height: float) -> dict[str, Any]:
    """What names a cell; its height is on the axis that is shown."""
    shown = height if which.name == "noise" else problem.pretraining.samples
    return {"map": which.name, **problem.to_flat(), "height": shown}


def regions(answer: Prediction) -> dict[str, Any]:
    """What is the case in a cell."""
    best = answer.finetuning
    others = [branch for branch in answer.branches if branch.branch != "informed"]
    growth = others[0].signal_growth if others else math.nan
    return {
        "source": "theory",
        "status": answer.status.value,
        "branch": best.branch,
        "test_error": best.test_error,
        "error": best.quadrature_error["test_error"],
        "frozen_test_error": best.frozen_test_error,
        "overlap": best.overlap,
        "informed": any(branch.branch == "informed" for branch in answer.branches),
        "signal_growth": growth,
        "replicon": answer.stability["finetuning"].replicon,
        "jump_mass": best.jump_mass,
    }


def simulation(which: Map, profile: Profile, store: Path) -> Iterator[dict[str, Any]]:
    """Cells of the coarse grid: the lowest of two random starts."""
    dim, seeds, points = profile.pick(quick=(40, 4, 2), full=(80, 8, 5))
    for value, samples in itertools.product(inner(which.ends, points), inner(SAMPLES, points)):
        problem = BASE.replace({which.field: value, "finetuning.samples": samples})
        effort = {"starts": 2, "dtype": "float32"}
        (found,) = kept_simulations(problem, [dim], seeds, store / which.name, **effort)
        stage, overlaps = found.finetuning_random, found.pretraining
        assert stage is not None
        noise = problem.label_noise / 2 + overlaps.Q0.mean - 2 * overlaps.M.mean + overlaps.Q.mean
        yield labels(which, problem, noise) | {
            "source": "simulation",
            "status": found.status.value,
            "dim": dim,
            "seeds": seeds,
            "root_seed": found.environment["seed"],
            "test_error": stage.test_error.mean,
            "error": stage.test_error.error,
            "frozen_test_error": stage.frozen_test_error.mean,
            "overlap": stage.overlap.mean,
        }


def inner(ends: tuple[float, float], points: int) -> list[float]:
    """Points in the middle of equal parts of an axis."""
    low, high = map(math.log, ends)
    shares = (np.arange(points) + 0.5) / points
    return [float(f"{math.exp(low + share * (high - low)):.4g}") for share in shares]


def compute(profile: Profile, store: Path) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    if "theory" in profile.sources:
        points = profile.pick(quick=8, full=32)
        tasks = [(which, value) for which in MAPS for value in axis(which.ends, points)]
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            for part in pool.map(theory, *zip(*tasks, strict=True), itertools.repeat(profile)):
                rows += part
    if "simulation" in profile.sources:
        for which in MAPS:
            rows += simulation(which, profile, store)
    return pd.DataFrame(rows)


def gain(rows: pd.DataFrame) -> pd.Series:
    """log10 of E' over that of the frozen weights: negative where LoRA helps."""
    return np.log10(rows["test_error"] / rows["frozen_test_error"])


def draw(table: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(7.0, 3.3), layout="constrained")
    limit = float(gain(table).abs().quantile(0.98))
    norm = TwoSlopeNorm(0.0, -limit, max(limit / 3, float(gain(table).max())))
    for panel, which in zip(axes, MAPS, strict=True):
        mesh = _draw_map(panel, table[table["map"] == which.name], which, norm)
    bar = figure.colorbar(mesh, ax=axes, shrink=0.9, aspect=30)
    bar.set_label(r"$\log_{10}\,E'/E'_{\rm frozen}$:  LoRA helps $< 0 <$ hurts")
    figure.legend(handles=_legend(), loc="outside lower center", ncols=4, handlelength=1.6)
    return figure


def _draw_map(panel: Any, rows: pd.DataFrame, which: Map, norm: TwoSlopeNorm) -> Any:
    cells = rows[rows["source"] == "theory"]
    grid = {
        name: cells.assign(gain=gain(cells)).pivot(
            index="height", columns="finetuning.samples", values=name
        )
        for name in ("gain", "branch", "informed", "signal_growth", "status")
    }
    x, y = grid["gain"].columns.to_numpy(float), grid["gain"].index.to_numpy(float)
    mesh = panel.pcolormesh(
        x, y, grid["gain"], cmap="RdBu_r", norm=norm, shading="nearest", rasterized=True
    )
    panel.contour(x, y, grid["gain"], [0.0], colors="black", linewidths=1.2)
    informed = (grid["branch"] == "informed").to_numpy(float)
    panel.contour(x, y, informed, [0.5], colors="#009E73", linewidths=1.4, linestyles="--")
    both = grid["informed"].to_numpy(bool) & (grid["signal_growth"].to_numpy(float) < 1)
    unstable = (grid["status"] == "unstable").to_numpy(float)
    plt.rcParams.update({"hatch.linewidth": 0.4, "hatch.color": "0.25"})
    for region, hatch in ((both.astype(float), "////"), (unstable, "....")):
        if region.max() > 0.5:
            panel.contourf(x, y, region, [0.5, 1.5], colors="none", hatches=[hatch])
    points = rows[rows["source"] == "simulation"]
    panel.scatter(
        points["finetuning.samples"], points["height"], c=gain(points), cmap="RdBu_r", norm=norm,
        marker="s", s=45, edgecolors="black", linewidths=0.9, zorder=4,
    )  # fmt: skip
    panel.set(xscale="log", yscale="log", xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    for side, (low, high) in ((panel.xaxis, (x[0], x[-1])), (panel.yaxis, (y[0], y[-1]))):
        shown = [tick for tick in TICKS if low <= tick <= high]
        side.set_ticks(shown, [f"{tick:g}" for tick in shown])
        side.set_minor_locator(NullLocator())
    panel.set_xlabel(r"fine-tuning samples $\alpha'$")
    panel.set_ylabel(which.label)
    return mesh


def _legend() -> list[Any]:
    return [
        Line2D([], [], color="black", lw=1.2, label="LoRA neither helps nor hurts"),
        Line2D([], [], color="#009E73", lw=1.4, ls="--", label="informed branch minimises"),
        Patch(facecolor="none", edgecolor="black", hatch="////", lw=0.5, label="coexistence"),
        Patch(facecolor="none", edgecolor="black", hatch="....", lw=0.5, label="unstable"),
    ]


def caption(table: pd.DataFrame) -> str:
    simulated = table[table["source"] == "simulation"]
    cells = table[table["source"] == "theory"]
    nearest = _paired(table)
    agreement = np.abs(nearest["simulated"] - nearest["predicted"])
    return (
        "**Phases.** Where rank-one LoRA helps and where it hurts, against fine-tuning samples α' "
        "and the effective noise Δ_eff = Δ/2 + Q0 - 2M + Q of the frozen weights (varied by the "
        "label noise Δ), or the pre-training samples α. Colour: theory, test error E' of the "
        "branch of least potential over that of the frozen weights; squares: simulation, lowest "
        f"of two random starts, D = {simulated['dim'].iloc[0]:.0f}, mean of "
        f"{simulated['seeds'].iloc[0]:.0f} seeds. Black line: no gain. Dashed green: the informed "
        "branch has the least potential on its right. Hatched: coexistence, the informed branch "
        "exists and m = 0 is stable, so that small signals do not grow. Dotted: the replica-"
        "symmetric solution is unstable (replicon ≥ 1 or jumps that matter). Softmax, T = 2, "
        "κ0 = 0.5, κ = 1, λ = 0.1, λ' = 0.5, q0 = 1; α = 0.5 on the left, Δ = 0.5 on the right. "
        f"Theory: {len(cells)} points, {(cells['status'] == 'unstable').sum()} of them unstable, "
        f"{(cells['status'] == 'not_converged').sum()} not converged. Simulation and nearest "
        f"theory point differ by {agreement.median():.3f} in log10 at the median, at most "
        f"{agreement.max():.3f}."
    )


def _paired(table: pd.DataFrame) -> pd.DataFrame:
    """The simulated gain and that of the nearest theory point of the same map."""
    rows = []
    for name, part in table.assign(gain=gain(table)).groupby("map"):
        cells = part[part["source"] == "theory"]
        for _, point in part[part["source"] == "simulation"].iterrows():
            far = sum(
                np.log(cells[axis] / point[axis]) ** 2 for axis in ("finetuning.samples", "height")
            )
            near = cells.loc[far.idxmin()]
            rows.append({"map": name, "simulated": point["gain"], "predicted": near["gain"]})
    return pd.DataFrame(rows)


EXPERIMENT = Experiment("phases", compute, draw, caption)
