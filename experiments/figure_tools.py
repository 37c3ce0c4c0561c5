"""What the figures share: profiles, points of theory and simulation, style, files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, product, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lora_theory import Estimate, Prediction, Problem, Simulation, Status, predict
from lora_theory.files import written_whole
from lora_theory.sweeps import kept_simulations

# Okabe–Ito colours that stay apart in greyscale too, with a line style and a marker each.
CURVES = (("#000000", "-", "o"), ("#0072B2", "--", "s"), ("#E69F00", "-.", "^"))

#: What a row of a table may come from, in the order of the rows.
SOURCES = ("theory", "simulation")

STYLE = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}


@dataclass(frozen=True)
class Profile:
    """How much to compute: "quick" for a look, "full" for publication."""

    name: str
    nodes: int | None  # of the theory, per block; None for the default
    blocks: int
    points: int  # per theory curve
    dim: int
    seeds: int
    sources: tuple[str, ...] = SOURCES  # what is computed; the table keeps its rows of the others

    def pick(self, *, quick: Any, full: Any) -> Any:
        """One of two values, by the name of the profile."""
        return full if self.name == "full" else quick


QUICK = Profile("quick", nodes=64, blocks=3, points=4, dim=48, seeds=4)
FULL = Profile("full", nodes=512, blocks=8, points=9, dim=150, seeds=4)


@dataclass(frozen=True)
class Experiment:
    """One figure: what it computes, how it is drawn from the table alone, and what it says."""

    name: str
    compute: Callable[[Profile, Path], pd.DataFrame]  # the folder keeps runs until all are done
    draw: Callable[[pd.DataFrame], Figure]
    caption: Callable[[pd.DataFrame], str]

    def run(self, profile: Profile, folder: Path) -> None:
        """Compute the rows of the profile's sources, write the table, draw what was written."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.csv"
        rest = [source for source in SOURCES if source not in profile.sources]
        former = pd.read_csv(path) if rest else None  # fails now rather than after the computation
        store = folder / f"{self.name}-runs"
        computed = self.compute(profile, store)
        tables = {source: former if source in rest else computed for source in SOURCES}
        parts = [table[table["source"] == source] for source, table in tables.items()]
        parts.append(computed[~computed["source"].isin(SOURCES)])  # data of others
        with written_whole(path) as stream:
            pd.concat(parts).to_csv(stream, index=False, float_format="%.8g")
        shutil.rmtree(store, ignore_errors=True)
        self.redraw(folder)

    def redraw(self, folder: Path) -> None:
        """Draw the figure again from its table."""
        table = pd.read_csv(folder / f"{self.name}.csv")
        with mpl.rc_context(STYLE):
            figure = self.draw(table)
            figure.savefig(folder / f"{self.name}.png")
            figure.savefig(folder / f"{self.name}.pdf", metadata={"CreationDate": None})
            plt.close(figure)
        (folder / f"{self.name}.md").write_text(self.caption(table) + "\n", encoding="utf-8")


def computed(
    rows_of: Callable[[str, str, Profile, Path], list[dict[str, Any]]],
    activations: Sequence[str],
    profile: Profile,
    store: Path,
) -> pd.DataFrame:
    """The rows of every source and activation; two processes share these jobs.

    They are taken in this order: the longest, the theory of softmax, is to come first.
    """
    names, sources = zip(*product(activations, profile.sources), strict=True)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        parts = pool.map(rows_of, sources, names, repeat(profile), repeat(store))
        return pd.DataFrame(list(chain.from_iterable(parts)))


#: Observables of fine-tuning that the tables hold.
OBSERVED = ("test_error", "overlap", "frozen_test_error")
#: Those that are compared seed by seed.
PAIRED = ("test_error", "overlap")


def theory_rows(problem: Problem, labels: Mapping[str, Any], profile: Profile) -> Iterator[dict]:
    """Tidy rows of the prediction, one per observable of fine-tuning."""
    prediction = predict(problem, nodes=profile.nodes, blocks=profile.blocks)
    yield from predicted_rows(prediction, labels)


def predicted_rows(prediction: Prediction, labels: Mapping[str, Any]) -> Iterator[dict]:
    """The same of a prediction that is there."""
    stage = prediction.finetuning
    shared = {**labels, **prediction.problem.to_flat(), "source": "theory", "start": stage.branch}
    shared |= {"status": prediction.status.value}
    for name in OBSERVED:
        error = stage.quadrature_error[name]
        yield {**shared, "observable": name, "value": getattr(stage, name), "error": error}


def simulation_rows(
    problem: Problem, labels: Mapping[str, Any], profile: Profile, store: Path
) -> Iterator[dict]:
    """Tidy rows of the simulation from w* and, lowest of two, from random starts."""
    effort = {"starts": 2, "dtype": "float32"}
    (result,) = kept_simulations(problem, [profile.dim], profile.seeds, store, **effort)
    yield from measured_rows(result, labels)


def measured_rows(result: Simulation, labels: Mapping[str, Any]) -> Iterator[dict]:
    """The same of a simulation that is there."""
    shared = {**labels, **result.problem.to_flat(), "source": "simulation"}
    shared |= {"status": result.status.value, "dim": result.dim, "seeds": result.seeds}
    environment = result.environment
    shared |= {"root_seed": environment["seed"], "dtype": environment["dtype"]}
    starts = {"informed": result.finetuning, "random": result.finetuning_random}
    for start, stage in starts.items():
        for name in OBSERVED:
            estimate = getattr(stage, name)
            numbers = {"value": estimate.mean, "error": estimate.error}
            yield {**shared, "start": start, "observable": name, **numbers}


def paired_rows(
    problems: Mapping[float, Problem],
    reference: float,
    dim: int,
    seeds: int,
    store: Path,
    pretrained: str = "trained",
) -> Iterator[dict]:
    """Simulations along a field, by its values, and their differences from that at ``reference``.

    All share their seeds, so that the differences have less noise.  For linear attention E' is
    also there without its measured O(1/√D) cross term (docs/theory.md, section 7), and so are its
    differences.
    """
    samples: dict[float, dict[str, pd.Series]] = {}
    labels: dict[float, dict[str, Any]] = {}
    for value, asked in problems.items():
        effort = {"starts": 2, "dtype": "float32", "gradient_tolerance": tolerance(asked)}
        if pretrained != "trained":
            effort["pretrained"] = pretrained
        (result,) = kept_simulations(asked, [dim], seeds, store, **effort)
        yield from measured_rows(result, {})
        runs = pd.DataFrame(result.runs)
        samples[value] = {name: runs[f"finetuning.{name}"] for name in PAIRED}
        shared = {**asked.to_flat(), "source": "simulation", "start": "informed"}
        shared |= {"status": result.status.value, "dim": dim, "seeds": seeds}
        shared |= {"root_seed": result.environment["seed"], "dtype": result.environment["dtype"]}
        if asked.activation == "linear":
            samples[value]["test_error"] = corrected_error(asked, runs)
            corrected = Estimate.of(samples[value]["test_error"])
            yield {**shared, **estimated("corrected_test_error", corrected)}
        labels[value] = shared
    for name, value in product(PAIRED, samples):
        if value != reference:
            difference = Estimate.of(samples[value][name] - samples[reference][name])
            yield {**labels[value], **estimated(f"{name}_difference", difference)}


def tolerance(asked: Problem) -> float:
    """Of gradients, relative to λ: rounding in float32 does not shrink with it."""
    return max(1e-3, 1e-4 / asked.pretraining.penalty)


def corrected_error(asked: Problem, runs: pd.DataFrame) -> pd.Series:
    """E' of every run, for linear attention without its measured O(1/√D) cross term.

    docs/theory.md, section 7.
    """
    error = runs["finetuning.test_error"]
    if asked.activation != "linear":
        return error
    return error - 2 * (asked.tokens + 1) / asked.tokens * runs["finetuning.cross_term"]


def estimated(observable: str, estimate: Estimate) -> dict[str, Any]:
    """What a row says of an observable."""
    return {"observable": observable, "value": estimate.mean, "error": estimate.error}


def limit(rows: pd.DataFrame, power: float = 1.0) -> tuple[float, float]:
    """D → ∞ of simulations at two D on a straight line in 1/D^power, with its error."""
    rows = rows.sort_values("dim")
    small, large = rows["dim"] ** -power
    weights = np.array([-large, small]) / (small - large)
    return float(weights @ rows["value"]), float(np.linalg.norm(weights * rows["error"]))


def shade_unstable(
    panel: Any, axis: str, rows: pd.DataFrame, heights: pd.Series, color: str
) -> None:
    """A broad pale band along the parts of a theory curve that are unstable."""
    x, unstable = rows[axis].to_numpy(), (rows["status"] == Status.UNSTABLE.value).to_numpy()
    # halfway to the neighbours, on logarithmic axes unless x may be negative
    between = np.sqrt(x[1:] * x[:-1]) if np.all(x > 0) else (x[1:] + x[:-1]) / 2
    heights = np.asarray(heights)
    if panel.get_yscale() == "log":
        middle = np.sqrt(heights[1:] * heights[:-1])
    else:
        middle = (heights[1:] + heights[:-1]) / 2
    fine, high = np.empty(2 * x.size - 1), np.empty(2 * x.size - 1)
    fine[::2], fine[1::2], high[::2], high[1::2] = x, between, heights, middle
    for place in np.flatnonzero(unstable):
        part = slice(max(2 * place - 1, 0), 2 * place + 2)
        panel.plot(
            fine[part], high[part], color=color, alpha=0.25, linewidth=6, zorder=1,
            solid_capstyle="butt",
        )  # fmt: skip


def solved(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows whose numbers may be shown."""
    return rows[rows["status"] != Status.NOT_CONVERGED.value]
