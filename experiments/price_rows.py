"""Rows of the figure price: what noise costs in fine-tuning sequences, and how to split a budget.

First, lines of equal overlap (and error) after LoRA: α' against the effective noise for linear
attention, against the variance at given gains M/Q for softmax; their slopes are the price.  Second,
the best (α, α', λ) of a budget B = α + cα', N = αD² and N' = α'D: c is the price of a fine-tuning
sequence in units of D pre-training sequences.  T = 2, κ0 = Δ = .5, κ = 1, λ' = .2, q0 = 1; fresh
sequences.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from figure_tools import Profile, computed, corrected_error, estimated, tolerance
from scipy.optimize import brentq, minimize
from scipy.special import expit, logit

from lora_theory import (
    EffectiveNoise,
    Estimate,
    Finetuning,
    Pretraining,
    Problem,
    finetune,
    gradient,
    optimize,
    predict,
)
from lora_theory.sweeps import kept_simulations
from lora_theory.theory.results import FinetuningPrediction

PENALTY, SAMPLES, SEQUENCES = "pretraining.penalty", "pretraining.samples", "finetuning.samples"
ACTIVATIONS = ("softmax", "linear")
#: Variance of the labels' fields, 1 + κ0 + Δ/2.
LABELS = 1.75
#: Lines: what is equal, its value, the gain, and the ends of the noise.
LINES = {
    "linear": (
        ("overlap", 0.9, 1.0, (0.28, 1.5)),
        ("overlap", 0.95, 1.0, (0.28, 1.5)),
        ("overlap", 0.98, 1.0, (0.28, 1.5)),
        ("test_error", 1.0, 1.0, (0.28, 0.62)),
    ),
    "softmax": (
        ("overlap", 0.9, 1.0, (0.3, 1.1)),
        ("overlap", 0.9, 0.7, (0.3, 1.1)),
        ("overlap", 0.9, 1.6, (0.3, 1.1)),
        ("test_error", 0.2, 1.0, (0.3, 0.62)),
    ),
}
#: Where the α' of a line are looked for, and the steps of the differences that give its slope.
WITHIN, STEP = (0.3, 60.0), 0.04
#: Pre-trainings (α, λ) of the simulations on a line of equal overlap, the second is the reference.
TRAINED = {
    "linear": (0.95, ((0.5, 0.1), (0.2, 0.1), (0.1, 0.1))),
    "softmax": (0.9, ((0.8, 0.06), (0.4, 0.06), (0.2, 0.03))),
}
#: Prices of a fine-tuning sequence, budgets, and the split along which E' is simulated.
COSTS, BUDGETS = (0.03, 0.1, 0.3), (0.4, 0.8, 1.6, 3.2)
#: Those of softmax, which takes longer.
FEWER_COSTS, FEWER_BUDGETS = (0.1,), (0.8, 1.6, 3.2)
#: Budgets that buy no more than this α' are left out: LoRA does not pay (docs/results).
LEAST = 2.0
#: Where the search of a split starts: the best of these shares, at this λ.
SCANNED, STARTED = (0.2, 0.35, 0.5, 0.65), {"linear": 0.1, "softmax": 0.05}
#: The first share is near the best, the others are compared with it.
BUDGET, COST, SHARES = 0.8, 0.1, (0.4, 0.15, 0.25, 0.55, 0.7, 0.85)
#: λ along the split; for linear attention the best at every α.
HELD = {"softmax": 0.06}
#: Nodes per block of the splits, and of all else.
NODES, FINE = {"linear": 256, "softmax": 64}, 512
#: Points of a line in the full profile; what of the noise has a price.
POINTS = {"linear": 8, "softmax": 4}
PRICED = {"linear": ("variance",), "softmax": ("variance", "gain")}


def problem(
    activation: str, samples: float, sequences: float, penalty: float, **changes: Any
) -> Problem:
    return Problem(
        tokens=2,
        activation=activation,
        teacher_rank=0.5,
        label_noise=0.5,
        pretraining=Pretraining(samples=samples, penalty=penalty),
        finetuning=Finetuning(samples=sequences, penalty=0.2),
    )


class Noise(NamedTuple):
    """What LoRA sees of pre-training; for linear attention the gain is 1 and variance Δ_eff."""

    activation: str
    gain: float
    variance: float

    def finetuned(self, sequences: float, **settings: Any) -> FinetuningPrediction | None:
        """The informed branch of LoRA on it, if there is one."""
        norm = (LABELS - self.variance) / self.gain**2
        noise = EffectiveNoise(gain=self.gain, variance=self.variance, Q=norm)
        task = Finetuning(samples=sequences, penalty=0.2)
        found = finetune(noise, task, tokens=2, activation=self.activation, **settings)
        return next((branch for branch in found if branch.branch == "informed"), None)

    def gap(self, name: str, level: float, sequences: float, **settings: Any) -> float:
        """How much better than a level: positive for more overlap, or less error."""
        stage = self.finetuned(sequences, **settings)
        if stage is None:
            return -1.0
        return stage.overlap - level if name == "overlap" else level - stage.test_error

    def needed(self, name: str, level: float, **settings: Any) -> float:
        """α' of a level, NaN if it takes more than is looked at."""
        low, high = np.log(WITHIN)
        gap = functools.partial(self.gap, name, level, **settings)
        if not gap(math.exp(low)) < 0 < gap(math.exp(high)):
            return math.nan
        return math.exp(brentq(lambda log: gap(math.exp(log)), low, high, xtol=1e-4))

    def price(self, of: str, name: str, level: float, sequences: float, **settings: Any) -> float:
        """−(∂o/∂x)/(∂o/∂α') for x the variance, the slope of the line, or the gain; or of E'."""
        here = getattr(self, of)
        width = STEP * here
        ends = [self._replace(**{of: here + sign * width}) for sign in (1, -1)]
        up, down = (end.gap(name, level, sequences, **settings) for end in ends)
        more, less = (
            self.gap(name, level, sequences * math.exp(sign * STEP), **settings) for sign in (1, -1)
        )
        by_samples = (more - less) / (2 * sequences * math.sinh(STEP))
        return -(up - down) / (2 * width) / by_samples


def lines(activation: str, profile: Profile) -> Iterator[dict[str, Any]]:
    """Rows of α' and of the prices along the lines, on two sets of nodes."""
    count = profile.pick(quick=3, full=POINTS[activation])
    for name, level, gain, ends in LINES[activation][: profile.pick(quick=1, full=4)]:
        for variance in np.geomspace(*ends, count).tolist():
            yield from priced(Noise(activation, gain, variance), name, level, profile)


def priced(noise: Noise, name: str, level: float, profile: Profile) -> Iterator[dict[str, Any]]:
    """The same at one noise."""
    nodes = profile.pick(quick=32, full=FINE)
    both = [{"nodes": nodes, "blocks": profile.blocks, "seed": seed} for seed in (0, 1)]
    needed = [noise.needed(name, level, **settings) for settings in both]
    numbers = {"needed": needed}
    for of in PRICED[noise.activation] if np.isfinite(needed).all() else ():
        numbers[f"price_of_{of}"] = [
            noise.price(of, name, level, sequences, **settings)
            for sequences, settings in zip(needed, both, strict=True)
        ]
    shared = {"activation": noise.activation, "source": "theory", "equal": name}
    shared |= {"level": level, "gain": noise.gain, "variance": noise.variance}
    for observable, values in numbers.items():
        yield {**shared, **estimated(observable, Estimate.of(values))}


class Split(NamedTuple):
    """The best of a budget: the share of fine-tuning, λ, ln E'."""

    share: float
    penalty: float
    log_error: float

    @classmethod
    def best(cls, activation: str, budget: float, cost: float, **settings: Any) -> Split:
        """From the best of a few shares, by descent in (logit share, log λ) with derivatives."""
        fields = (SAMPLES, SEQUENCES, PENALTY)

        def logarithm(x: np.ndarray) -> tuple[float, np.ndarray]:
            share, penalty = float(expit(x[0])), math.exp(x[1])
            found = gradient(divided(activation, budget, cost, share, penalty), fields, **settings)
            by = found.slopes["finetuning.test_error"]
            along = budget * (by[SEQUENCES] / cost - by[SAMPLES]) * share * (1 - share)
            value = found.values["finetuning.test_error"]
            return math.log(value), np.array([along, by[PENALTY] * penalty]) / value

        penalty = STARTED[activation]
        tried = {
            share: predict(divided(activation, budget, cost, share, penalty), **settings)
            for share in SCANNED
        }
        usable = {s: one.finetuning.test_error for s, one in tried.items() if one.status.is_solved}
        start = min(usable, key=usable.__getitem__)
        ends = [tuple(logit((0.02, 0.98))), tuple(np.log((0.002, 1.0)))]
        found = minimize(
            logarithm, (logit(start), math.log(penalty)), jac=True, method="L-BFGS-B",
            bounds=ends, options={"gtol": 1e-5, "ftol": 1e-10, "maxiter": 30, "maxls": 8},
        )  # fmt: skip
        return cls(float(expit(found.x[0])), math.exp(found.x[1]), float(found.fun))


def divided(activation: str, budget: float, cost: float, share: float, penalty: float) -> Problem:
    """A budget of which a share goes to fine-tuning."""
    return problem(activation, budget * (1 - share), budget * share / cost, penalty)


def splits(activation: str, profile: Profile) -> Iterator[dict[str, Any]]:
    """Rows of the best splits, with what another set of nodes says of them."""
    linear = activation == "linear"
    for cost in profile.pick(quick=COSTS[1:2], full=COSTS if linear else FEWER_COSTS):
        for budget in profile.pick(quick=BUDGETS[1:2], full=BUDGETS if linear else FEWER_BUDGETS):
            if budget / cost >= LEAST:
                yield from best_split(activation, budget, cost, profile)


def best_split(
    activation: str, budget: float, cost: float, profile: Profile
) -> Iterator[dict[str, Any]]:
    """The same of one budget."""
    nodes = profile.pick(quick=32, full=NODES[activation])
    settings = {"nodes": nodes, "blocks": profile.blocks}
    found, other = (Split.best(activation, budget, cost, seed=seed, **settings) for seed in (0, 1))
    asked = divided(activation, budget, cost, found.share, found.penalty)
    stages = [predict(asked, seed=seed, **settings) for seed in (0, 1)]
    shared = {**asked.to_flat(), "source": "theory", "budget": budget, "cost": cost}
    shared |= {"status": stages[0].status.value, "start": stages[0].finetuning.branch}
    numbers = {
        "best_share": (found.share, other.share),
        "best_penalty": (found.penalty, other.penalty),
        "best_test_error": np.exp((found.log_error, other.log_error)),
        "overlap": [stage.finetuning.overlap for stage in stages],
    }
    for observable, values in numbers.items():
        yield {**shared, **estimated(observable, Estimate.of(values))}


def penalty_at(activation: str, samples: float) -> float:
    """λ along the split: for linear attention that of least noise, error and misalignment."""
    if activation in HELD:
        return HELD[activation]
    asked = problem(activation, samples, 1.0, 0.1)
    return optimize(asked, [PENALTY], "effective_noise").optimum[PENALTY]


def split_at(activation: str, share: float) -> Problem:
    """The budget of the simulations, divided."""
    penalty = penalty_at(activation, BUDGET * (1 - share))
    return divided(activation, BUDGET, COST, share, penalty)


def along(activation: str, profile: Profile) -> Iterator[dict[str, Any]]:
    """Rows of E' and o along the split of one budget."""
    settings = {"nodes": profile.pick(quick=32, full=FINE)}
    for share in profile.pick(
        quick=SHARES[1::2], full=sorted((0.1, 0.2, 0.32, 0.47, 0.62, 0.78, *SHARES))
    ):
        asked = split_at(activation, float(share))
        answer = predict(asked, blocks=profile.blocks, **settings)
        stage = answer.finetuning
        shared = {**asked.to_flat(), "source": "theory", "budget": BUDGET, "cost": COST}
        shared |= {"share": share, "status": answer.status.value, "start": stage.branch}
        for name in ("test_error", "overlap"):
            estimate = Estimate(getattr(stage, name), stage.quadrature_error[name], 1)
            yield {**shared, **estimated(name, estimate)}


def seen_noise(activation: str, samples: float, penalty: float) -> Noise:
    """What LoRA sees of a pre-training."""
    found = predict(problem(activation, samples, 1.0, penalty).replace(finetuning=None))
    noise = found.effective_noise
    if activation == "linear":
        return Noise(activation, 1.0, noise.delta_eff)
    return Noise(activation, noise.gain, noise.variance)


class System(NamedTuple):
    """What is trained on a line of equal overlap, or off it, with the middle α' for all."""

    kind: str
    noise: Noise
    asked: Problem

    @property
    def labels(self) -> dict[str, Any]:
        """Those of its rows."""
        seen = {"gain": self.noise.gain, "variance": self.noise.variance}
        level = TRAINED[self.asked.activation][0]
        return {"equal": "overlap", "level": level, "observable": f"{self.kind}_overlap", **seen}


def systems(activation: str, profile: Profile) -> list[System]:
    level, pretrainings = TRAINED[activation]
    pretrainings = pretrainings[: profile.pick(quick=2, full=3)]
    settings = {"nodes": profile.pick(quick=32, full=FINE)}
    noises = [seen_noise(activation, *one) for one in pretrainings]
    # N' is an integer at every D of the full profile
    needed = [round(one.needed("overlap", level, **settings) * 50) / 50 for one in noises]
    return [
        System(kind, noise, problem(activation, samples, used, penalty))
        for (samples, penalty), noise, own in zip(pretrainings, noises, needed, strict=True)
        for kind, used in (("line", own), ("control", needed[1]))
    ]


def theory(activation: str, profile: Profile, store: Path) -> Iterator[dict[str, Any]]:
    yield from lines(activation, profile)
    for one in systems(activation, profile):
        nodes = profile.pick(quick=32, full=FINE)
        stage = one.noise.finetuned(one.asked.finetuning.samples, nodes=nodes)
        numbers = {"value": stage.overlap, "error": stage.quadrature_error["overlap"]}
        yield {**one.asked.to_flat(), "source": "theory", **one.labels, **numbers}
    yield from splits(activation, profile)
    yield from along(activation, profile)


def simulation(activation: str, profile: Profile, store: Path) -> Iterator[dict[str, Any]]:
    """Rows of trained systems on a line of equal overlap and off it, and along a split."""
    trained = systems(activation, profile)
    shares = profile.pick(quick=SHARES[:1], full=SHARES)
    divided_at = {share: split_at(activation, share) for share in shares}
    for dim in profile.pick(quick=(40,), full=(50, 100)):
        for one in trained:
            runs, shared = simulated(one.asked, dim, profile, store)
            estimate = Estimate.of(runs["o"])
            yield {**shared, **one.labels, "value": estimate.mean, "error": estimate.error}
        reference: pd.Series | None = None
        for share, asked in divided_at.items():
            runs, shared = simulated(asked, dim, profile, store)
            shared |= {"budget": BUDGET, "cost": COST, "share": share}
            yield {**shared, **estimated("test_error", Estimate.of(runs["E'"]))}
            yield {**shared, **estimated("overlap", Estimate.of(runs["o"]))}
            if reference is None:
                reference = runs["E'"]
            else:
                difference = Estimate.of(runs["E'"] - reference)
                yield {**shared, **estimated("test_error_difference", difference)}


def simulated(
    asked: Problem, dim: int, profile: Profile, store: Path
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """E' and o of every run from the informed start, and the labels of their rows."""
    seeds = profile.pick(quick=8, full=32)
    effort = {"starts": 1, "dtype": "float32", "gradient_tolerance": tolerance(asked)}
    (result,) = kept_simulations(asked, [dim], seeds, store / asked.activation, **effort)
    shared = {**asked.to_flat(), "source": "simulation", "status": result.status.value}
    shared |= {"dim": dim, "seeds": seeds, "root_seed": result.environment["seed"]}
    runs = pd.DataFrame(result.runs)
    error = corrected_error(asked, runs)
    return pd.DataFrame({"E'": error, "o": runs["finetuning.overlap"]}), shared


ROWS = {"theory": theory, "simulation": simulation}


def rows_of(source: str, activation: str, profile: Profile, store: Path) -> list[dict[str, Any]]:
    return list(ROWS[source](activation, profile, store))


def compute(profile: Profile, store: Path) -> pd.DataFrame:
    return computed(rows_of, ACTIVATIONS, profile, store)
