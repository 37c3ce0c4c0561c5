"""Two rounds of active fine-tuning: is the current w, or the frozen weights, to choose by?

T = 2, κ0 = Δ = .5, κ = 1, α = .2, λ = .05, q0 = 1.  The first batch is any α₁ sequences, to which
w₁ is fitted; the second is α₂ = α₁ of a pool of ᾱ₂, taken at random or by a score of the frozen
logits or of those with w₁ merged in; then w₂ is fitted to both.  Against ᾱ₂.

Rows …_difference: less that of a second batch taken at random, paired by seed where simulated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
from figure_tools import (
    Experiment,
    Profile,
    computed,
    corrected_error,
    shade_unstable,
    solved,
)
from matplotlib.figure import Figure

from lora_theory import (
    Estimate,
    Finetuning,
    Pretraining,
    Problem,
    SecondRound,
    Selection,
    second_round,
    simulate_second_round,
)

#: λ', α₁ = α₂; pools of the theory and of the simulations; nodes per block in the full profile.
SETS = {
    "softmax": {"penalty": 0.5, "samples": 3.0, "pools": (6.0, 12.0, 30.0, 60.0, 120.0)},
    "linear": {"penalty": 0.2, "samples": 1.5, "pools": (3.0, 6.0, 12.0, 30.0, 60.0)},
}
SIMULATED = {"softmax": (12.0, 120.0), "linear": (6.0, 60.0)}
NODES = {"softmax": 512, "linear": 1024}
RANDOM = "random"


class Choice(NamedTuple):
    """How the second batch is taken."""

    by: str
    score: str

    def settings(self, pool: float) -> dict[str, Any]:
        """Arguments of the programs."""
        if self.by == RANDOM:
            return {}
        return {"selection": Selection(pool=pool, score=self.score), "by": self.by}

    @property
    def name(self) -> str:
        return " ".join(self)


ANY = Choice(RANDOM, "")
CHOICES = tuple(
    Choice(by, score) for score in ("cross_token", "low_variance") for by in ("frozen", "current")
)
OBSERVED = ("test_error", "overlap")


def problem(activation: str) -> Problem:
    chosen = SETS[activation]
    return Problem(
        tokens=2,
        activation=activation,
        teacher_rank=0.5,
        label_noise=0.5,
        pretraining=Pretraining(samples=0.2, penalty=0.05),
        finetuning=Finetuning(samples=chosen["samples"], penalty=chosen["penalty"]),
    )


def labels(activation: str, source: str, choice: Choice, pool: float) -> dict[str, Any]:
    shared = {**problem(activation).to_flat(), "source": source, "choice": choice.name}
    return shared | {"second_pool": pool}


def theory(activation: str, profile: Profile, store: Path) -> Iterator[dict[str, Any]]:
    samples, pools = SETS[activation]["samples"], SETS[activation]["pools"]
    yield from predicted(activation, ANY, samples, profile)
    for choice in CHOICES:
        for pool in profile.pick(quick=pools[2:5:2], full=pools):
            yield from predicted(activation, choice, pool, profile)


@functools.cache
def solve(activation: str, choice: Choice, pool: float, profile: Profile) -> SecondRound:
    return second_round(
        problem(activation), samples=SETS[activation]["samples"], **choice.settings(pool),
        nodes=profile.pick(quick=128, full=NODES[activation]), blocks=profile.blocks,
    )  # fmt: skip


def predicted(
    activation: str, choice: Choice, pool: float, profile: Profile
) -> Iterator[dict[str, Any]]:
    """Rows of one second batch."""
    plain = solve(activation, ANY, SETS[activation]["samples"], profile)
    found = solve(activation, choice, pool, profile)
    shared = labels(activation, "theory", choice, pool) | {"status": found.status.value}
    for name in OBSERVED:
        value, error = getattr(found, name), found.quadrature_error[name]
        yield {**shared, "observable": name, "value": value, "error": error}
        if choice != ANY:
            value = value - getattr(plain, name)
            error = math.hypot(error, plain.quadrature_error[name])
            yield {**shared, "observable": f"{name}_difference", "value": value, "error": error}


def simulation(activation: str, profile: Profile, store: Path) -> Iterator[dict[str, Any]]:
    """On weights of the law that pre-training has for D → ∞; all choices share their seeds."""
    samples, pools = SETS[activation]["samples"], SIMULATED[activation]
    for dim, seeds in profile.pick(quick={50: 4}, full={60: 64, 240: 48}).items():
        plain: pd.DataFrame | None = None
        for choice in (ANY, *CHOICES):
            for pool in (samples,) if choice == ANY else profile.pick(quick=pools[1:], full=pools):
                found = simulate_second_round(
                    problem(activation), dim, seeds, samples=samples, pretrained="sampled",
                    dtype="float32", **choice.settings(pool),
                )  # fmt: skip
                shared = labels(activation, "simulation", choice, pool)
                shared |= {"status": "not_converged" if found.missed else "converged"}
                shared |= {"dim": dim, "seeds": seeds, "root_seed": 0, "dtype": "float32"}
                every = pd.DataFrame(found.runs)
                error = corrected_error(problem(activation), every)
                runs = pd.DataFrame({"test_error": error, "overlap": every["finetuning.overlap"]})
                if plain is None:
                    plain = runs
                else:
                    runs = runs.join((runs - plain).add_suffix("_difference"))
                for name, values in runs.items():
                    estimate = Estimate.of(values)
                    numbers = {"value": estimate.mean, "error": estimate.error}
                    yield {**shared, "observable": name, **numbers}


ROWS = {"theory": theory, "simulation": simulation}


def rows_of(source: str, activation: str, profile: Profile, store: Path) -> list[dict[str, Any]]:
    return list(ROWS[source](activation, profile, store))


def compute(profile: Profile, store: Path) -> pd.DataFrame:
    return computed(rows_of, list(SETS), profile, store)


#: Okabe–Ito colour, line, marker and its shift along ᾱ₂.
LOOKS = dict(
    zip(
        CHOICES,
        (
            ("#0072B2", "--", "s", 0.95),
            ("#0072B2", "-", "o", 1.0),
            ("#E69F00", "-.", "D", 1.05),
            ("#D55E00", ":", "^", 1.1),
        ),
        strict=True,
    )
)
TEXTS = {"cross_token": "large cross-token", "low_variance": "low variance"}
WORDS = {"frozen": "frozen logits", "current": "logits with $w_1$"}
HEIGHTS = {"test_error_difference": r"$E'-E'_{\rm any}$", "overlap_difference": r"$o-o_{\rm any}$"}


def pick(table: pd.DataFrame, activation: str, choice: Choice, observable: str) -> pd.DataFrame:
    here = (table["activation"] == activation) & (table["choice"] == choice.name)
    return table[here & (table["observable"] == observable)].sort_values("second_pool")


def draw(table: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(2, 2, figsize=(7.0, 4.6), sharex="col", layout="constrained")
    for column, activation in enumerate(reversed(SETS)):
        for row, (observable, height) in enumerate(HEIGHTS.items()):
            _draw_panel(axes[row, column], table, activation, observable)
            axes[row, 0].set_ylabel(height)
        pools = SETS[activation]["pools"]
        axes[0, column].set_title(activation)
        axes[1, column].set_xscale("log")
        axes[1, column].set_xticks(pools, [f"{pool:g}" for pool in pools])
        axes[1, column].set_xticks([], minor=True)
        axes[1, column].set_xlabel(r"pool of the second batch $\bar\alpha_2$")
    handles, texts = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=2, title="second batch by")
    return figure


def _draw_panel(panel: Any, table: pd.DataFrame, activation: str, observable: str) -> None:
    panel.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    for choice, (color, dashes, marker, shift) in LOOKS.items():
        rows = pick(table, activation, choice, observable)
        line = solved(rows[rows["source"] == "theory"])
        points = rows[rows["dim"] == table["dim"].max()]
        label = f"{TEXTS[choice.score]}, {WORDS[choice.by]}"
        panel.plot(line["second_pool"], line["value"], color=color, linestyle=dashes, label=label)
        low, high = line["value"] - line["error"], line["value"] + line["error"]
        panel.fill_between(line["second_pool"], low, high, color=color, alpha=0.15, linewidth=0)
        shade_unstable(panel, "second_pool", line, line["value"], color)
        panel.errorbar(
            points["second_pool"] * shift, points["value"], points["error"],
            fmt=marker, color=color, mfc="white", capsize=1.5, linewidth=0.8, zorder=3,
        )  # fmt: skip


def caption(table: pd.DataFrame) -> str:
    simulated = table[table["dim"] == table["dim"].max()]
    theory = table[(table["source"] == "theory") & table["observable"].eq("test_error")]
    counts = {name: int((theory["status"] == name).sum()) for name in ("unstable", "not_converged")}
    return (
        "**A second batch chosen by the current vector.** Test error E' and overlap o after two "
        "rounds, less those with any second batch. The first batch is any α₁ sequences, the second "
        "α₂ = α₁ of a pool ᾱ₂: those of the largest cross-token logit h_12, or of the lowest "
        "variance, of the frozen logits βh or of those with the first vector merged in, βh + χχᵀ "
        "(docs/theory.md, section 3.7). T = 2, κ0 = Δ = 0.5, κ = 1, α = 0.2, λ = 0.05, q0 = 1; "
        + "; ".join(
            f"{name} α₁ = {chosen['samples']:g}, λ' = {chosen['penalty']:g}"
            for name, chosen in reversed(SETS.items())
        )
        + ". Lines and narrow bands: theory and its quadrature error; broad pale bands: unstable. "
        f"Symbols: simulation, D = {simulated['dim'].iloc[0]:.0f}, "
        f"{simulated['seeds'].iloc[0]:.0f} runs on weights of the law that pre-training has for "
        "D → ∞, differences paired by seed; for linear attention the O(1/√D) cross term is "
        f"subtracted from E'. At the largest pool: {'; '.join(_text(table, a) for a in SETS)}. "
        f"Of {len(theory)} theory points {counts['unstable']} are unstable and "
        f"{counts['not_converged']} not converged."
    )


def _text(table: pd.DataFrame, activation: str) -> str:
    plain = pick(table, activation, ANY, "test_error")
    plain = plain[plain["source"] == "theory"].iloc[0]
    texts = [f"any {Estimate(plain['value'], plain['error'], 2)}"]
    for choice in CHOICES:
        rows = pick(table, activation, choice, "test_error_difference")
        rows = rows[rows["second_pool"] == rows["second_pool"].max()]
        theory = rows[rows["source"] == "theory"].iloc[0]
        measured = rows[rows["dim"] == table["dim"].max()].iloc[0]
        numbers = (Estimate(row["value"], row["error"], 2) for row in (theory, measured))
        name = f"{choice.by} {choice.score.replace('_', ' ')}"
        texts.append("{} {} (simulated {})".format(name, *numbers))
    return f"{activation}, E' {', '.join(texts)}"


EXPERIMENT = Experiment("rounds", compute, draw, caption)
