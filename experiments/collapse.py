"""Data collapse: pre-trainings of one effective noise lead to one curve of LoRA.

Six pre-trainings differ in the law and rank of the teacher, the penalty and its strength, the
amount of data, the label noise and a rescaling of the frozen weights.  One field (linear attention)
or two (softmax) of each are solved for, such that all have the effective noise of the first.
Linear: one number, Δ_eff = Δ/2 + Q0 − 2M + Q.  Softmax: gain M/Q and variance Δ/2 + Q0 − M²/Q, at
one Q_y = Δ/2 + Q0.  Controls share less: Δ_eff, but with re-used sequences or, for softmax, with
another gain; gain and variance, but with another Q_y.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, repeat
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from figure_tools import (
    OBSERVED,
    Experiment,
    Profile,
    predicted_rows,
    shade_unstable,
    solved,
    tolerance,
)
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.optimize import root

from lora_theory import Finetuning, Prediction, Pretraining, Problem, Status, predict
from lora_theory.compare import agreements
from lora_theory.laws import law_of
from lora_theory.sweeps import kept_simulations

ACTIVATIONS = ("softmax", "linear")
SEQUENCES, SAMPLES, PENALTY = "finetuning.samples", "pretraining.samples", "pretraining.penalty"
REGULARIZER, RESCALING = "pretraining.regularizer", "finetuning.rescaling"
#: α' of the theory, and of the simulations whose weights are drawn from the law that pre-training
#: has for D → ∞, which makes large D cheap, or trained; with re-used sequences they must be.
LEVELS, SIMULATED = (3.0, 4.0, 5.2, 7.0), {"sampled": (3.0, 4.0, 7.0), "trained": (5.2,)}
#: Seeds by D; every point has systems of its own.
SEEDS = {
    "sampled": {"quick": {40: 4, 80: 4}, "full": {100: 12, 400: 8}},
    "trained": {"full": {48: 8, 120: 6}},
}

STANDARD = Problem(
    tokens=2,
    activation="linear",
    teacher_rank=0.2,
    label_noise=0.5,
    pretraining=Pretraining(samples=0.15, penalty=0.02),
    finetuning=Finetuning(samples=3.0, penalty=0.5),
)
FROBENIUS = {"teacher_rank": 0.4, REGULARIZER: "frobenius"}
GAUSSIAN = {"teacher_rank": None, "teacher.law": "goe", REGULARIZER: "nuclear_norm"}
POWER_LAW = {"teacher_rank": None, "teacher.law": "power_law", "teacher.exponent": 0.25}
REUSED = {"finetuning.sequences": "reused"}


class Family(NamedTuple):
    """One pre-training: what differs from STANDARD, and starts of the fields to be solved for."""

    fields: dict[str, Any]
    unknown: Mapping[str, float] = MappingProxyType({})


LINEAR = {
    "A": Family({}),
    "B": Family({"teacher_rank": 0.1}, {SAMPLES: 0.133}),
    "C": Family(FROBENIUS | {SAMPLES: 0.3}, {PENALTY: 0.36}),
    "D": Family(GAUSSIAN | {SAMPLES: 0.8}, {PENALTY: 1.43}),
    "E": Family(POWER_LAW | {SAMPLES: 0.6}, {PENALTY: 0.65}),
    "F": Family({PENALTY: 0.2}, {RESCALING: 0.68}),
}
#: Q0 + Δ/2 = 1.4 for A to F.
LESS = {"activation": "softmax", "label_noise": 0.4, SAMPLES: 0.12, PENALTY: 0.004}
SOFTMAX = {
    "A": Family(LESS),
    "B": Family(LESS | {"teacher_rank": 0.1, "label_noise": 0.6}, {SAMPLES: 0.167, PENALTY: 0.013}),
    "C": Family(
        LESS | FROBENIUS | {"label_noise": 0.0, SAMPLES: 0.2}, {PENALTY: 0.29, RESCALING: 3.0}
    ),
    "D": Family(
        LESS | GAUSSIAN | {"label_noise": 0.8, SAMPLES: 0.8}, {PENALTY: 0.16, RESCALING: 1.7}
    ),
    "E": Family(
        LESS | POWER_LAW | {"label_noise": 0.8, SAMPLES: 1.2}, {PENALTY: 0.183, RESCALING: 1.59}
    ),
    "F": Family(LESS, {PENALTY: 0.071, RESCALING: 1.94}),
}
CONTROLS = {
    "linear": {name: Family(LINEAR[name[0]].fields | REUSED, LINEAR[name[0]].unknown)
               for name in ("C, re-used", "D, re-used")},
    "softmax": {
        "other gain": Family(LESS, {PENALTY: 0.0236}),
        "other label variance": Family(
            LESS | {"teacher_rank": 1.0, SAMPLES: 0.4},
            {PENALTY: 0.105, RESCALING: 1.92},
        ),
    },
}  # fmt: skip
FAMILIES = {"linear": LINEAR | CONTROLS["linear"], "softmax": SOFTMAX | CONTROLS["softmax"]}
NAMES = tuple(LINEAR)
#: All that the quick profile computes.
FEW = ("A", "F", "other gain")


class Summary(NamedTuple):
    """What LoRA on fresh sequences sees of the frozen weights as they are used."""

    label_variance: float
    M: float
    Q: float

    @classmethod
    def of(cls, asked: Problem, profile: Profile) -> Summary:
        found = predict(asked.replace(finetuning=None), nodes=profile.nodes, blocks=profile.blocks)
        label_variance = float(law_of(asked).moments()[1]) + asked.label_noise / 2
        beta, stage = asked.rescaling, found.pretraining
        return cls(label_variance, beta * stage.M, beta**2 * stage.Q)

    def to_dict(self) -> dict[str, float]:
        """Also as gain, variance and Δ_eff."""
        gain, variance = self.M / self.Q, self.label_variance - self.M**2 / self.Q
        effective = self.label_variance - 2 * self.M + self.Q
        return {**self._asdict(), "gain": gain, "variance": variance, "delta_eff": effective}


def matched(
    start: Problem, unknown: Mapping[str, float], target: Summary, profile: Profile
) -> Problem:
    """The problem whose unknown fields give the target's Δ_eff or, if two, gain and variance."""
    names = ("delta_eff",) if len(unknown) == 1 else ("gain", "variance")
    aims = np.array([target.to_dict()[name] for name in names])

    def at(logarithms: Any) -> Problem:
        return start.replace(dict(zip(unknown, np.exp(logarithms).tolist(), strict=True)))

    def mismatch(logarithms: Any) -> Any:
        found = Summary.of(at(logarithms), profile).to_dict()
        return np.array([found[name] for name in names]) / aims - 1

    first = np.log(list(unknown.values()))
    # the step of the slopes is far above what the solver leaves of the residual
    found = root(mismatch, first, tol=1e-10, options={"eps": 1e-5})
    if np.abs(found.fun).max() > 1e-8:
        raise RuntimeError(f"no {' and '.join(unknown)} match {target}: {found.message}")
    return at(found.x)


def family(activation: str, name: str, profile: Profile) -> tuple[Problem, Summary]:
    """A pre-training with its unknown fields, and what is seen of it."""
    fields, unknown = FAMILIES[activation][name]
    asked = STANDARD.replace(fields)
    if unknown:
        target = Summary.of(STANDARD.replace(FAMILIES[activation]["A"].fields), profile)
        asked = matched(asked, unknown, target, profile)
    return asked, Summary.of(asked, profile)


def rows_of(activation: str, name: str, profile: Profile, store: Path) -> list[dict[str, Any]]:
    asked, summary = family(activation, name, profile)
    labels = {"family": name, **summary.to_dict()}
    rows: list[dict[str, Any]] = []
    for level in LEVELS:
        here = asked.replace({SEQUENCES: level})
        prediction = predict(here, nodes=profile.nodes, blocks=profile.blocks)
        rows += predicted_rows(prediction, labels)
        for pretrained, levels in SIMULATED.items():
            possible = pretrained == "trained" or here.finetuning.sequences == "fresh"
            wanted = level in profile.pick(quick=levels[1:2], full=levels)
            if "simulation" in profile.sources and wanted and possible:
                place = list(FAMILIES[activation]).index(name)
                effort = {"pretrained": pretrained, "seed": 100 * place + LEVELS.index(level)}
                rows += simulated(prediction, labels, effort, profile, store / activation / name)
    return rows


def simulated(
    prediction: Prediction,
    labels: dict[str, Any],
    effort: dict[str, Any],
    profile: Profile,
    store: Path,
) -> Iterator[dict[str, Any]]:
    """Rows of each D and of their limit, dim = ∞."""
    asked, seeds = prediction.problem, SEEDS[effort["pretrained"]][profile.name]
    further = {"starts": 0, "test_sequences": 10_000, "dtype": "float32"}
    results = {
        dim: kept_simulations(
            asked, [dim], count, store, gradient_tolerance=tolerance(asked), **effort, **further
        )[0]
        for dim, count in seeds.items()
    }
    runs = {dim: pd.DataFrame(result.runs) for dim, result in results.items()}
    missed = any(not result.status.is_solved for result in results.values())
    status = Status.NOT_CONVERGED if missed else Status.CONVERGED
    for dims in (*([dim] for dim in seeds), list(seeds)):
        limit = math.inf if len(dims) > 1 else dims[0]
        shared = {**labels, **asked.to_flat(), "source": "simulation", "start": "informed"}
        shared |= {"status": status.value, "dim": limit, "seeds": sum(seeds[dim] for dim in dims)}
        shared |= {"root_seed": effort["seed"], "dtype": further["dtype"]}
        shared |= {"pretrained": effort["pretrained"]}
        for found in agreements(prediction, {dim: runs[dim] for dim in dims}):
            if found.stage == "finetuning" and found.observable in OBSERVED:
                numbers = {"value": found.simulation.mean, "error": found.simulation.error}
                yield {**shared, "observable": found.observable, **numbers}


def compute(profile: Profile, store: Path) -> pd.DataFrame:
    profile = dataclasses.replace(profile, nodes=profile.pick(quick=64, full=512))
    # softmax, which takes longer, first
    jobs = [
        (activation, name)
        for activation in ACTIVATIONS
        for name in FAMILIES[activation]
        if profile.name == "full" or name in FEW
    ]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        parts = pool.map(rows_of, *zip(*jobs, strict=True), repeat(profile), repeat(store))
        return pd.DataFrame(list(chain.from_iterable(parts)))


#: Okabe–Ito colour and marker of the families, and line style too of the controls.
FAMILY_STYLES = {
    "A": ("#000000", "o"), "B": ("#0072B2", "s"), "C": ("#E69F00", "^"),
    "D": ("#009E73", "D"), "E": ("#56B4E9", "v"), "F": ("#CC79A7", "P"),
}  # fmt: skip
CONTROL_STYLES = (("#D55E00", "--", "X"), ("#D55E00", ":", "*"))
TEXTS = {
    "A": "Wishart, weight decay",
    "B": "lower rank, other $\\alpha$",
    "C": "Wishart, Frobenius",
    "D": "Gaussian, nuclear norm",
    "E": "power law, weight decay",
    "F": "as A, more penalty, rescaled",
    "C, re-used": "control: C, re-used",
    "D, re-used": "control: D, re-used",
    "other gain": r"control: equal $\Delta_{\rm eff}$, other gain",
    "other label variance": r"control: equal pair, other $Q_0+\Delta/2$",
}
LABELS = {"test_error": "test error $E'$", "overlap": "misalignment $1-o$"}
#: Horizontal shifts that keep the markers apart, as factors of α'.
SHIFTS = dict(zip(NAMES, np.linspace(0.95, 1.05, len(NAMES)), strict=True))


def present(table: pd.DataFrame, names: Iterable[str]) -> list[str]:
    """Those that the table has; the quick profile leaves some out."""
    return [name for name in names if name in set(table["family"])]


def pick(table: pd.DataFrame, activation: str, name: str, observable: str) -> pd.DataFrame:
    """The theory of one family and, where simulated, the limit of the simulations beside it."""
    here = (table["activation"] == activation) & (table["family"] == name)
    rows = table[here & (table["observable"] == observable)].set_index(SEQUENCES).sort_index()
    limit = rows[(rows["source"] == "simulation") & np.isinf(rows["dim"])]
    columns = {"value": "simulation", "error": "deviation", "pretrained": "pretrained"}
    theory = rows[rows["source"] == "theory"]
    return theory.drop(columns="pretrained").join(limit[list(columns)].rename(columns=columns))


def scores(theory: pd.DataFrame, simulation: pd.DataFrame) -> pd.Series:
    """(simulation − theory)/error, where simulated; the two may be those of different families."""
    error = np.hypot(simulation["deviation"], theory["error"])
    return ((simulation["simulation"] - theory["value"]) / error).dropna()


def draw(table: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(
        3, 2, figsize=(7.0, 6.8), sharex=True, layout="constrained",
        height_ratios=(3, 3, 1.6),
    )  # fmt: skip
    for column, activation in enumerate(reversed(ACTIVATIONS)):
        for row, name in enumerate(LABELS):
            _draw_panel(axes[row, column], table, activation, name)
            axes[row, 0].set_ylabel(LABELS[name])
        _draw_scores(axes[2, column], table, activation)
        axes[0, column].set_title(activation)
        axes[2, column].set_xlabel(r"fine-tuning samples $\alpha'=N'/D$")
        axes[2, column].set_xscale("log")
        axes[2, column].set_xticks(LEVELS, [f"{level:g}" for level in LEVELS])
        axes[2, column].set_xticks([], minor=True)
    axes[2, 0].set_ylabel("(simulation − theory)\n/ error")
    handles, texts = axes[0, 0].get_legend_handles_labels()
    more, others = axes[0, 1].get_legend_handles_labels()
    seen = dict(zip(texts + others, handles + more, strict=True))
    figure.legend(seen.values(), seen.keys(), loc="outside upper center", ncols=3)
    return figure


def _draw_panel(panel: Any, table: pd.DataFrame, activation: str, observable: str) -> None:
    controls = zip(CONTROLS[activation], CONTROL_STYLES, strict=True)
    styles = {name: ("black", "-", *style) for name, style in FAMILY_STYLES.items()}
    styles |= {name: (color, dashes, color, marker) for name, (color, dashes, marker) in controls}
    for name in present(table, styles):
        line, dashes, color, marker = styles[name]
        rows = solved(pick(table, activation, name, observable))
        if observable == "overlap":
            rows = rows.assign(value=1 - rows["value"], simulation=1 - rows["simulation"])
        points, control = rows.dropna(subset="simulation"), name not in NAMES
        width = 1.2 if control else 0.8
        panel.plot(rows.index, rows["value"], color=line, linestyle=dashes, linewidth=width)
        shade_unstable(panel, SEQUENCES, rows.reset_index(), rows["value"].to_numpy(), line)
        for pretrained, part in points.groupby("pretrained"):
            panel.errorbar(
                part.index * SHIFTS.get(name, 1.0), part["simulation"], part["deviation"],
                fmt=marker, color=color, mfc=color if pretrained == "trained" else "white",
                capsize=1.5, linewidth=0.8, zorder=3,
            )  # fmt: skip
        label = TEXTS[name] if control else f"{name}: {TEXTS[name]}"
        panel.plot(
            [], [], marker, color=color, linestyle=dashes if control else "", mfc="white",
            label=label,
        )  # fmt: skip
    panel.plot([], [], color="black", linewidth=0.8, label="theory of A to F, six lines")
    for filling, label in (
        ("white", "open: weights of the predicted law"),
        ("0.5", "filled: both stages trained"),
    ):
        panel.plot([], [], "o", color="0.5", mfc=filling, label=label)
    if observable == "overlap":
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())


def _draw_scores(panel: Any, table: pd.DataFrame, activation: str) -> None:
    panel.axhspan(-2, 2, color="0.92", linewidth=0, zorder=0)
    panel.axhline(0, color="0.6", linewidth=0.8, zorder=1)
    for name in present(table, NAMES):
        color, marker = FAMILY_STYLES[name]
        for observable, filling in (("test_error", color), ("overlap", "white")):
            rows = pick(table, activation, name, observable)
            found = scores(rows, rows)
            panel.plot(found.index * SHIFTS[name], found, marker, color=color, mfc=filling)


def spread(table: pd.DataFrame, activation: str, observable: str) -> float:
    """Largest relative difference of the theory of any family from that of A."""
    curves = [pick(table, activation, name, observable)["value"] for name in present(table, NAMES)]
    return float(max((curve / curves[0] - 1).abs().max() for curve in curves))


def chi_square(
    table: pd.DataFrame, activation: str, observable: str, against: str | None = None
) -> tuple[float, int]:
    """Sum of the squared scores of all families, against their own theory or another's; number."""
    found = []
    for name in present(table, NAMES):
        rows = pick(table, activation, name, observable)
        wrong = rows if against is None else pick(table, activation, against, observable)
        found += scores(wrong, rows).to_list()
    return float(np.square(found).sum()), len(found)


def caption(table: pd.DataFrame) -> str:
    simulated = table[table["source"] == "simulation"]
    sizes = {kind: _sizes(part) for kind, part in simulated.groupby("pretrained")}
    theory = table[table["source"] == "theory"]
    unstable, unsolved = (
        (theory["status"] == name).sum() // len(OBSERVED) for name in ("unstable", "not_converged")
    )
    return (
        "**Data collapse.** Test error E' and overlap o after rank-one LoRA on fresh sequences, "
        "against the number of fine-tuning sequences, for six pre-trainings A to F of one "
        "effective noise, and two controls. Lines: theory, one for every family, A to F in black "
        "on top of each other. Markers, shifted sideways to be seen: simulation from the informed "
        "start. Filled: both stages trained, at D = "
        f"{sizes.get('trained', '…')}. Open: LoRA trained on weights drawn from the law that each "
        f"pre-training has for D → ∞, at D = {sizes['sampled']}. Extrapolated to D → ∞ in 1/D "
        "(softmax, E', and power law, γ = 0.25: in 1/√D; linear, E': its "
        "measured O(1/√D) cross term subtracted first), with standard errors; every point has "
        "systems of its own. Bottom: (simulation - theory)/error of A to F, E' filled, o open; "
        "grey: ±2. T = 2, λ' = 0.5, κ = 1, q0 = 1. "
        + " ".join(_families_text(theory, activation) for activation in reversed(ACTIVATIONS))
        + " "
        + "; ".join(_agreement_text(table, activation) for activation in reversed(ACTIVATIONS))
        + f". Theory points unstable, with a pale band: {unstable}; not converged, left out: "
        f"{unsolved}."
    )


def _sizes(simulated: pd.DataFrame) -> str:
    seeds = simulated[np.isfinite(simulated["dim"])].groupby("dim")["seeds"].first()
    return " and ".join(f"{dim:.0f} ({count:.0f} seeds)" for dim, count in seeds.items())


def _families_text(theory: pd.DataFrame, activation: str) -> str:
    texts = []
    for name in present(theory, FAMILIES[activation]):
        unknown = FAMILIES[activation][name].unknown
        here = (theory["activation"] == activation) & (theory["family"] == name)
        row = theory[here].iloc[0]
        law = {"wishart": f"κ0 = {row['teacher_rank']:g}", "power_law": "γ = 0.25"}
        given = [row["teacher.law"], law.get(row["teacher.law"], ""), row[REGULARIZER]]
        numbers = [f"Δ = {row['label_noise']:g}"]
        symbols = {SAMPLES: "α", PENALTY: "λ", RESCALING: "β"}
        numbers += [
            f"{symbol} = {row[field]:.4g}" + ("*" if field in unknown else "")
            for field, symbol in symbols.items()
            if field != RESCALING or row[field] != 1
        ]
        texts.append(f"{name}: " + ", ".join([g for g in given if g] + numbers).replace("_", " "))
    first = theory[(theory["activation"] == activation) & (theory["family"] == "A")].iloc[0]
    shared = f"Δ_eff = {first['delta_eff']:.4g}"
    if activation == "softmax":
        shared = (
            f"gain {first['gain']:.4g}, variance {first['variance']:.4g} at Q0 + Δ/2 = "
            f"{first['label_variance']:.4g}"
        )
    return f"{activation}, {shared} (* solved for): " + "; ".join(texts) + "."


def _agreement_text(table: pd.DataFrame, activation: str) -> str:
    texts = []
    for letter, name in (("E'", "test_error"), ("o", "overlap")):
        theory = table[(table["activation"] == activation) & (table["observable"] == name)]
        theory = theory[theory["source"] == "theory"]
        error = (theory["error"] / theory["value"])[theory["family"].isin(NAMES)].max()
        own, count = chi_square(table, activation, name)
        others = ", ".join(
            f"{chi_square(table, activation, name, control)[0]:.0f}"
            for control in present(table, CONTROLS[activation])
        )
        texts.append(
            f"{letter}: theory of A to F equal to {max(spread(table, activation, name), 1e-8):.0e} "
            f"of its value (quadrature error {error:.0e}), χ² = {own:.0f} of {count} simulated "
            f"points, against the theory of the controls {others}"
        )
    return f"{activation}, " + ", ".join(texts)


EXPERIMENT = Experiment("collapse", compute, draw, caption)
