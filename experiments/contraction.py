"""Where message passing contracts and where it never settles, beside the replicon of the theory.

Pre-training against its penalty: linear attention, whose problem is convex, and softmax attention
on noisy labels.  LoRA against its samples, on frozen weights drawn from their asymptotic law; the
linear one has the parameters of the example in docs/theory.md, section 6.2.
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
from figure_tools import Experiment, Profile, solved
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lora_theory import Estimate, Finetuning, Pretraining, Problem, predict
from lora_theory.simulation.message_passing import message_passing

PENALTIES, SAMPLES = "pretraining.penalty", "finetuning.samples"


class Column(NamedTuple):
    """One column of the figure: a problem, and the field of its horizontal axis."""

    name: str
    problem: Problem
    field: str
    ends: tuple[float, float]
    measured: tuple[float, ...]
    dim: int
    seeds: int

    @property
    def stage(self) -> str:
        """The stage that is shown."""
        return self.field.partition(".")[0]


def _problem(activation: str, noise: float, samples: float, penalty: float | None) -> Problem:
    """With α and, for LoRA, λ'; what the axis of a column shows is replaced."""
    return Problem(
        tokens=2,
        activation=activation,
        teacher_rank=0.5,
        label_noise=noise,
        pretraining=Pretraining(samples=samples, penalty=0.02),
        finetuning=None if penalty is None else Finetuning(samples=3.0, penalty=penalty),
    )


PENALTY_ENDS, SAMPLE_ENDS = (0.003, 0.3), (1.0, 8.0)
MEASURED_PENALTIES = (0.003, 0.01, 0.03, 0.06, 0.1, 0.3)
MEASURED_SAMPLES = (1.0, 1.2, 1.5, 2.0, 4.0, 8.0)
COLUMNS = (
    Column(
        "pre-training, linear", _problem("linear", 0.5, 0.2, None),
        PENALTIES, PENALTY_ENDS, MEASURED_PENALTIES, dim=150, seeds=6,
    ),
    Column(
        "pre-training, softmax", _problem("softmax", 3.0, 0.35, None),
        PENALTIES, PENALTY_ENDS, MEASURED_PENALTIES, dim=100, seeds=6,
    ),
    Column(
        "LoRA, linear", _problem("linear", 0.5, 0.2, 0.1),
        SAMPLES, SAMPLE_ENDS, MEASURED_SAMPLES, dim=300, seeds=12,
    ),
    Column(
        "LoRA, softmax", _problem("softmax", 0.5, 0.2, 0.5),
        SAMPLES, SAMPLE_ENDS, MEASURED_SAMPLES, dim=300, seeds=12,
    ),
)  # fmt: skip
ITERATIONS = 200


def theory(column: Column, profile: Profile) -> Iterator[dict[str, Any]]:
    """Replicon and jump mass, along the axis."""
    for value in np.geomspace(*column.ends, profile.pick(quick=4, full=17)):
        yield from predicted(column, float(f"{value:.4g}"), profile)


def predicted(column: Column, value: float, profile: Profile) -> Iterator[dict[str, Any]]:
    """The same at one place."""
    problem = column.problem.replace({column.field: value})
    answer = predict(problem, nodes=profile.pick(quick=64, full=512), blocks=profile.blocks)
    found, stage = answer.stability[column.stage], getattr(answer, column.stage)
    assert found is not None
    shared = _labels(column, problem) | {"source": "theory", "status": stage.status.value}
    shared |= {"stable": found.is_stable}
    numbers = {
        "growth": (found.replicon, found.error),
        "jump_mass": (found.jump_mass, found.jump_error),
    }
    for name, (number, error) in numbers.items():
        yield {**shared, "observable": name, "value": number, "error": error}


def simulation(column: Column, profile: Profile) -> Iterator[dict[str, Any]]:
    """Growth of perturbations where message passing settled, and the share of runs that did."""
    dim, seeds = profile.pick(quick=(column.dim // 3, 3), full=(column.dim, column.seeds))
    for value in column.measured[:: profile.pick(quick=3, full=1)]:
        problem = column.problem.replace({column.field: value})
        how = {"stage": column.stage, "iterations": ITERATIONS}
        if column.stage == "finetuning":
            how["pretrained"] = "sampled"
        found = [
            getattr(message_passing(problem, dim, index=index, **how), column.stage)
            for index in range(seeds)
        ]
        settled = [run for run in found if run.settled]
        shared = _labels(column, problem) | {"source": "simulation", "status": "converged"}
        shared |= {"dim": dim, "seeds": seeds, "root_seed": 0, "dtype": "float64"}
        shared |= {"settled": len(settled)}
        yield {**shared, "observable": "share_settled", **_of([run.settled for run in found])}
        change = [run.change[-20:].mean() for run in found if not run.settled]
        if change:
            yield {**shared, "observable": "last_change", **_of(change)}
        if settled:
            growth = [run.growth.mean for run in settled]
            yield {**shared, "observable": "growth", **_of(growth)}


def _labels(column: Column, problem: Problem) -> dict[str, Any]:
    return {"column": column.name, **problem.to_flat(), "at": problem.to_flat()[column.field]}


def _of(values: list[float]) -> dict[str, Any]:
    estimate = Estimate.of(values)
    return {"value": estimate.mean, "error": estimate.error}


ROWS = {"theory": theory, "simulation": simulation}


def rows_of(source: str, column: Column, profile: Profile) -> list[dict[str, Any]]:
    return list(ROWS[source](column, profile))


def compute(profile: Profile, store: Path) -> pd.DataFrame:
    # two processes share the jobs; the longest come first
    order = [COLUMNS[index] for index in (1, 0, 3, 2)]
    jobs = list(itertools.product(sorted(profile.sources), order))
    sources, columns = zip(*jobs, strict=True)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        parts = pool.map(rows_of, sources, columns, itertools.repeat(profile))
        return pd.DataFrame(list(itertools.chain.from_iterable(parts)))


BLUE, RED, SHADE = "#0072B2", "#D55E00", "0.9"  # Okabe–Ito


def draw(table: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(
        2, 4, figsize=(7.2, 3.5), layout="constrained", sharex="col", sharey="row",
        height_ratios=(2, 1),
    )  # fmt: skip
    for column, pair in zip(COLUMNS, axes.T, strict=True):
        _draw_column(*pair, column, solved(table[table["column"] == column.name]))
    axes[0, 0].set_ylabel("growth per iteration,\nsquared")
    axes[1, 0].set_ylabel("share of runs\nthat settle")
    axes[0, 0].set_ylim(0, 1.3)
    axes[1, 0].set_ylim(-0.08, 1.08)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=4, handlelength=1.8)
    return figure


def _draw_column(top: Any, bottom: Any, column: Column, part: pd.DataFrame) -> None:
    growth = part[part["observable"] == "growth"]
    curve = growth[growth["source"] == "theory"].sort_values("at")
    x, value, error = (curve[name].to_numpy(float) for name in ("at", "value", "error"))
    for panel in (top, bottom):
        for left, right in _unstable(curve):
            panel.axvspan(left, right, color=SHADE, linewidth=0, zorder=0)
        panel.set_xscale("log")
        panel.set_xlim(column.ends[0] / 1.15, column.ends[1] * 1.15)
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if x[-1] < 1 else (1, 2, 4, 8)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.minorticks_off()
    top.fill_between(x, value - error, value + error, color="black", alpha=0.25, linewidth=0)
    top.plot(x, value, color="black")
    top.axhline(1, color=BLUE, linestyle="--", linewidth=0.9)
    points = growth[growth["source"] == "simulation"]
    every = points["settled"] == points["seeds"]
    for rows, fill in ((points[every], RED), (points[~every], "white")):
        top.errorbar(
            rows["at"], rows["value"], yerr=rows["error"], fmt="o", color=RED, mfc=fill,
            capsize=1.5, linewidth=0.8, zorder=3,
        )  # fmt: skip
    shares = part[part["observable"] == "share_settled"]
    bars = np.array([_interval(*row) for row in shares[["settled", "seeds"]].to_numpy(int)])
    bottom.errorbar(
        shares["at"], shares["value"], yerr=np.abs(bars.T - shares["value"].to_numpy()), fmt="s",
        color=RED, capsize=1.5, linewidth=0.8, clip_on=False, zorder=3,
    )  # fmt: skip
    top.set_title(column.name)
    bottom.set_xlabel(r"penalty $\lambda$" if column.field == PENALTIES else r"samples $\alpha'$")


def _unstable(curve: pd.DataFrame) -> Iterator[tuple[float, float]]:
    """Intervals around the points of the theory that are unstable, halfway to the next ones."""
    x = curve["at"].to_numpy(float)
    between = np.sqrt(x[1:] * x[:-1])
    ends = np.concatenate([[x[0] / 2], between, [2 * x[-1]]])
    unstable = ~curve["stable"].to_numpy(bool)
    for is_unstable, group in itertools.groupby(range(len(x)), key=lambda i: unstable[i]):
        if is_unstable:
            cells = list(group)
            yield ends[cells[0]], ends[cells[-1] + 1]


def _interval(settled: int, seeds: int) -> tuple[float, float]:
    """Wilson's interval of one standard error: its width does not vanish at 0 or all."""
    share = settled / seeds
    center = (share + 0.5 / seeds) / (1 + 1 / seeds)
    half = math.sqrt(share * (1 - share) / seeds + 0.25 / seeds**2) / (1 + 1 / seeds)
    return center - half, center + half


def _legend() -> list[Any]:
    dot = {"color": RED, "linestyle": "none"}
    return [
        Line2D([], [], color="black", label="theory: replicon ± error"),
        Line2D([], [], color=BLUE, linestyle="--", lw=0.9, label="threshold 1"),
        Line2D([], [], marker="o", **dot, label="measured, all runs settle"),
        Line2D([], [], marker="o", mfc="white", **dot, label="measured, some settle"),
        Patch(facecolor=SHADE, label="theory: unstable"),
        Line2D([], [], marker="s", **dot, label="share of runs that settle"),
    ]


def caption(table: pd.DataFrame) -> str:
    simulated = table[table["source"] == "simulation"]
    sizes = "; ".join(
        f"{column.name}, D = {part['dim'].iloc[0]:.0f}, {part['seeds'].iloc[0]:.0f} seeds"
        for column in COLUMNS
        for part in [simulated[simulated["column"] == column.name]]
    )
    scores = " ".join(_score(column, table[table["column"] == column.name]) for column in COLUMNS)
    return (
        "**Contraction.** Message passing at finite D. Top: squared growth per iteration of a "
        "random perturbation of the weights; bottom: share of the runs that settle, a relative "
        f"step below 1e-9 within {ITERATIONS} undamped iterations. Lines: replicon of the theory "
        "± quadrature error, blind to jumps; for softmax its variance is infinite near cusps of "
        "the proximal operator. Circles: runs that settled, mean ± standard error; open where some "
        "did not, which selects, none where no run did. Squares: Wilson's interval of "
        "one standard error. Grey: the theory is unstable, by a replicon ≥ 1 or by jumps of the "
        "proximal operator, of a mass above 1 % and four errors. T = 2, κ0 = 0.5, κ = 1. "
        "Pre-training: linear, Δ = 0.5, α = 0.2, a convex problem; softmax, Δ = 3, α = 0.35. LoRA: "
        "Δ = 0.5, α = 0.2, λ = 0.02, fresh sequences, λ' = 0.1 (linear) or 0.5 (softmax), from w*, "
        f"on frozen weights drawn from their asymptotic law. Sizes: {sizes}. {scores} "
        "Growth at finite D has an offset of order 1/D."
    )


def _score(column: Column, part: pd.DataFrame) -> str:
    """How many runs settle where, and the distance of measured growth and replicon there."""
    growth = part[part["observable"] == "growth"]
    curve = growth[growth["source"] == "theory"].sort_values("at")
    shares = part[part["observable"] == "share_settled"]
    stable = _stable_at(curve, shares["at"].to_numpy(float))
    text = f"{column.name[0].upper()}{column.name[1:]}: "
    if not stable.all():
        text += f"{_counts(shares[~stable])} settle where the theory is unstable, "
    text += f"{_counts(shares[stable])} settle where it is stable"
    points = growth[growth["source"] == "simulation"]
    points = points[_stable_at(curve, points["at"].to_numpy(float))]
    x = np.log(curve["at"].to_numpy(float))
    line, spread = (
        np.interp(np.log(points["at"].to_numpy(float)), x, curve[name].to_numpy(float))
        for name in ("value", "error")
    )
    gap = np.abs(points["value"].to_numpy(float) - line)
    apart = gap / np.hypot(points["error"].to_numpy(float), spread)
    return (
        f"{text}, with growth and replicon at most {gap[apart.argmax()]:.3f}, "
        f"{apart.max():.1f} standard errors, apart."
    )


def _counts(shares: pd.DataFrame) -> str:
    return f"{shares['settled'].sum():.0f} of {shares['seeds'].sum():.0f} runs"


def _stable_at(curve: pd.DataFrame, at: np.ndarray) -> np.ndarray:
    inside = [[left <= x <= right for left, right in _unstable(curve)] for x in at]
    return ~np.array([any(entry) for entry in inside])


EXPERIMENT = Experiment("contraction", compute, draw, caption)
