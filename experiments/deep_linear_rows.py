"""What the figure `deep_linear` computes: problems, rates, spectra.

Rates predicted from the layers beside measured ones; singular values of the layers over training,
at equal gain; what the PC layer does not prevent: a rank that falls, decay with nothing against it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from figure_tools import Profile

from lora_theory import Estimate
from lora_theory.compilation import double_precision
from lora_theory.lowrank import precondition
from lora_theory.lowrank.deep_linear import (
    Training,
    asymptotic_factor,
    envelope,
    rates,
    tangent_kernel,
    train,
)
from lora_theory.lowrank.polynomials import PRECONDITIONING

RATE = 0.1  # η, of all panels but the comparison of speeds
WIDTHS = (8, 8, 7, 6)  # n_0, …, n_3 of the first panel
SPREADS, DEPTHS = (1.5, 4.0, 10.0), (2, 3, 4)  # of the second: σ_1/σ_n of every layer at the start
SIDE, LAYERS = 12, 3  # of the square layers of the third and fourth panel
MIDDLE = 1  # the layer shown there
RANK_TARGET, RANK_START = (1.0, 0.6, 0.4, 0.0), (1.0, 0.3, 0.2, 0.1)
DECAY = 0.01
LEARNING_RATES = tuple(0.05 * 2 ** (step / 2) for step in range(11))  # to 1.6
RESOLVED = 1.5  # second over first rate, from which on a run shows the first alone
FITTED = 1e-6  # share of the loss at which a run counts as fitted
PLAIN = None


class Start(NamedTuple):
    """Layers, inputs and targets, each with the seeds in front."""

    layers: list[np.ndarray]
    inputs: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, seeds: int, draw: Callable[[np.random.Generator], Any]) -> Start:
        """Seed i is always the same, however many there are."""
        drawn = [draw(np.random.default_rng([20, seed])) for seed in range(seeds)]
        layers, inputs, targets = zip(*drawn, strict=True)
        stacked = [np.stack(one) for one in zip(*layers, strict=True)]
        return cls(stacked, np.stack(inputs), np.stack(targets))

    @property
    def norms(self) -> np.ndarray:
        """(S, L): ‖W_l‖_F."""
        return np.stack([np.linalg.norm(W, axis=(1, 2)) for W in self.layers], axis=1)

    def equal_gains(self, degree: int | None) -> np.ndarray:
        """γ with which ‖W_eff‖_F is ‖W‖_F at the start."""
        if degree is PLAIN:
            return np.ones_like(self.norms)

        def acting(W: jax.Array) -> jax.Array:
            return precondition(W, degree=degree).effective

        with double_precision():
            lifted = [np.asarray(jax.vmap(acting)(jnp.asarray(W))) for W in self.layers]
        return self.norms / self._replace(layers=lifted).norms

    def trained(self, degree: int | None, steps: int, **changes: Any) -> Training:
        settings = {"learning_rate": RATE, "gains": self.equal_gains(degree), **changes}
        return train(*self, steps=steps, degree=degree, **settings)


def spread_matrix(rng: Any, rows: int, columns: int, spread: float) -> np.ndarray:
    """Random singular vectors, singular values from 1 to 1/spread at equal ratios."""
    U, s, Vt = np.linalg.svd(rng.standard_normal((rows, columns)), full_matrices=False)
    return U * np.geomspace(1, 1 / spread, len(s)) @ Vt


def noisy(rng: Any, teacher: np.ndarray, X: np.ndarray) -> np.ndarray:
    """Targets outside the row space of X as well: f* > 0."""
    return teacher @ X + 0.1 * rng.standard_normal((len(teacher), X.shape[1])) / X.shape[1] ** 0.5


def near(rng: Any, spread: float) -> Any:
    """Layers of :data:`WIDTHS` and a teacher whose layers are close to them."""
    layers = [spread_matrix(rng, m, n, spread) for n, m in itertools.pairwise(WIDTHS)]
    X = spread_matrix(rng, WIDTHS[0], 24, 1.5)
    teacher = np.eye(WIDTHS[0])
    for W in layers:
        teacher = (W + 0.15 * rng.standard_normal(W.shape) / W.shape[1] ** 0.5) @ teacher
    return layers, X, noisy(rng, teacher, X)


def far(rng: Any, depth: int, spread: float) -> Any:
    """Depth layers, the last two narrower, and a teacher that has nothing to do with them."""
    widths = (6,) * (depth - 1) + (5, 4)
    layers = [spread_matrix(rng, m, n, spread) for n, m in itertools.pairwise(widths)]
    X = spread_matrix(rng, 6, 24, 2)
    return layers, X, noisy(rng, spread_matrix(rng, 4, 6, 3), X)


def gaussian(rng: Any) -> Any:
    """Square Gaussian layers of norm about 1."""
    layers = [rng.standard_normal((SIDE, SIDE)) / (2 * SIDE**0.5) for _ in range(LAYERS)]
    X = spread_matrix(rng, SIDE, 36, 2)
    return layers, X, noisy(rng, spread_matrix(rng, SIDE, SIDE, 3), X)


def falling(rng: Any) -> Any:
    """Two symmetric layers of one eigenbasis, a target of lower rank in it; X = 1."""
    Q = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    jitter = np.array([1, *rng.uniform(0.9, 1.1, 3)])
    W = Q * (jitter * RANK_START) @ Q.T
    return [W, W], np.eye(4), Q * RANK_TARGET @ Q.T


def name(degree: int | None) -> str:
    return "plain" if degree is PLAIN else f"degree {degree}"


# -- what is computed --------------------------------------------------------------------------


def loss_rows(profile: Profile) -> Iterator[dict[str, Any]]:
    """f − f* over training, a bound that holds for every seed, and the exact last slope."""
    seeds, steps = profile.pick(quick=4, full=16), 1200
    arms = [("plain", PLAIN, 2.0), ("degree 9", 9, 2.0), ("degree 9, orthogonal", 9, 1.0)]
    for arm, degree, spread in arms:
        start = Start.of(seeds, lambda rng, spread=spread: near(rng, spread))
        found = start.trained(degree, steps)
        shared = {"panel": "loss", "arm": arm, "degree": degree, "seeds": seeds}
        relative = found.excess / found.excess[:, :1]
        places = np.arange(0, steps + 1, 20)
        yield from over_time(
            shared | {"observable": "excess"}, places, relative[:, places], log=True
        )
        lowest = [spectrum[..., -1].min(axis=1) for spectrum in found.spectra]
        for layer, values in enumerate(lowest, start=1):
            yield measured(shared | {"observable": "least_singular_value", "layer": layer}, values)
        factors = [factor(found, start, seed) for seed in range(seeds)]
        slope = {**shared, "source": "theory", "observable": "asymptotic_factor"}
        yield slope | summary(np.array(factors), log=True)
        tail = relative[:, -1:] * np.array(factors)[:, None] ** (2 * (places - steps))
        yield from over_time(
            shared | {"observable": "tail"}, places, tail, log=True, source="theory"
        )
        highest = np.max([spectrum[..., 0].max(axis=1) for spectrum in found.spectra], axis=0)
        bounds = [
            envelope(
                found.excess[seed, 0], lowest=[values[seed] for values in lowest],
                highest=highest[seed], widths=WIDTHS, inputs=start.inputs[seed],
                learning_rate=RATE, steps=steps,
            )
            for seed in range(seeds)
        ]  # fmt: skip
        relative_bounds = np.array(bounds) / found.excess[:, :1]
        yield from over_time(
            shared | {"observable": "envelope"}, places, relative_bounds[:, places], log=True,
            source="theory",
        )  # fmt: skip
        # a bound if never above 1
        worst = (found.excess / np.array(bounds))[:, 1:].max(axis=1)
        yield measured(shared | {"observable": "share_of_envelope"}, worst)


def factor(found: Training, start: Start, seed: int, **named: Any) -> float:
    return asymptotic_factor(found.final(seed), start.inputs[seed], RATE, **named)


def rate_rows(profile: Profile) -> Iterator[dict[str, Any]]:
    """Rates at the end against measured ones, over depths and starts, and wrong rates."""
    seeds, steps, every = profile.pick(quick=4, full=16), profile.pick(quick=6000, full=20000), 20
    problems = profile.pick(
        quick=[(2, 4.0, PLAIN), (3, 4.0, PLAIN), (3, 4.0, 9), (3, 10.0, 9)],
        full=list(itertools.product(DEPTHS, SPREADS, (PLAIN, 5, 9))),
    )
    for depth, spread, degree in problems:
        start = Start.of(seeds, lambda rng, depth=depth, spread=spread: far(rng, depth, spread))
        found = start.trained(degree, steps, every=every)
        shared = {"panel": "rates", "arm": name(degree), "degree": degree, "depth": depth}
        shared |= {"spread": spread}
        kept, values = [], []
        for seed in range(seeds):
            slope = last_slope(found.excess[seed], every)
            if slope is not None:
                kept.append(seed)
                values.append(slope)
        yield {**shared, "source": "simulation", "observable": "runs_fitted", "value": len(kept),
               "seeds": seeds}  # fmt: skip
        if len(kept) < 3:
            continue
        shared["seeds"] = len(kept)
        slopes = np.array(values)
        yield measured(shared | {"observable": "rate"}, slopes, log=True)
        predicted = [predictions(found, start, seed, degree) for seed in kept]
        for kind in predicted[0]:
            theory = np.array([one[kind] for one in predicted])
            row = {**shared, "kind": kind}
            yield {**row, "source": "theory", "observable": "rate"} | summary(theory, log=True)
            yield measured({**row, "observable": "rate_ratio"}, slopes / theory)
        exact = np.array([one["exact"] for one in predicted])
        second = np.array([second_rate(found, start, seed) for seed in kept])
        alone = second > RESOLVED * exact
        yield {
            **shared,
            "source": "simulation",
            "observable": "runs_resolved",
            "value": alone.sum(),
        }
        if alone.sum() >= 3:
            ratio = (slopes / exact)[alone]
            shared["seeds"] = len(ratio)
            yield measured({**shared, "observable": "rate_ratio_resolved"}, ratio)


def predictions(found: Training, start: Start, seed: int, degree: int | None) -> dict[str, float]:
    """Decay of the residual per step: exact, two bounds (plain layers), two wrong ones."""
    layers, X = found.final(seed), start.inputs[seed]
    U, s, _ = np.linalg.svd(X, full_matrices=False)
    result = {"exact": -math.log(factor(found, start, seed))}
    if degree is PLAIN:
        constants = rates(layers, X)
        for kind in ("layerwise", "product"):
            mu = getattr(constants, kind)
            result[kind] = -math.log1p(-RATE * mu * (2 - RATE * constants.largest)) / 2
    result["without layers"] = -math.log(1 - RATE * s[-1] ** 2)
    white = U * s[0]
    result["white inputs"] = -math.log(asymptotic_factor(layers, white, RATE))
    return result


def second_rate(found: Training, start: Start, seed: int) -> float:
    """The second smallest decay of the residual per step."""
    eigenvalues = np.linalg.eigvals(tangent_kernel(found.final(seed), start.inputs[seed]))
    return float(np.sort(-np.log(np.abs(1 - RATE * eigenvalues)))[1])


def last_slope(excess: np.ndarray, every: int) -> float | None:
    """Decay of the residual per step in its last decades above rounding; None if not reached."""
    residual = np.sqrt(excess / excess[0])
    late = np.flatnonzero((residual < 1e-9) & (residual > 1e-12))
    if len(late) < 5 or residual[-1] > 1e-10:
        return None
    return float(np.log(residual[late[0]] / residual[late[-1]]) / (every * (late[-1] - late[0])))


def spectrum_rows(profile: Profile) -> Iterator[dict[str, Any]]:
    """Singular values of the middle layer over training, all arms at equal ‖W_eff‖_F."""
    seeds, steps, every = profile.pick(quick=4, full=16), 4000, 10
    start = Start.of(seeds, gaussian)
    for degree in (PLAIN, 1, 5, 9):
        found = start.trained(degree, steps, every=every)
        shared = {"panel": "spectrum", "arm": name(degree), "degree": degree, "seeds": seeds}
        spectrum = found.spectra[MIDDLE]
        places = np.unique(np.r_[0, 10, np.geomspace(1, steps / every, 24).astype(int)])
        for label, index in (("largest", 0), ("smallest", -1)):
            yield from over_time(
                shared | {"observable": label}, places, spectrum[:, places, index], log=True,
                spacing=every,
            )  # fmt: skip
        relative = found.excess / found.excess[:, :1]
        yield from over_time(
            shared | {"observable": "excess"}, places, relative[:, places], log=True, spacing=every
        )
        for place in (0, 10, steps // every):  # start, middle, end
            for index in range(SIDE):
                row = {**shared, "observable": "singular_value", "step": every * place}
                yield measured({**row, "index": index + 1}, spectrum[:, place, index], log=True)
            norms = np.linalg.norm(spectrum[:, place], axis=-1)
            yield measured({**shared, "observable": "norm", "step": every * place}, norms)
            conditions = found.conditions[:, place]
            row = {**shared, "observable": "gmcn", "step": every * place}
            yield measured(row, conditions, log=True)


def speed_rows(profile: Profile) -> Iterator[dict[str, Any]]:
    """Steps until f − f* has fallen to a share, each arm at its best learning rate."""
    seeds, steps, every = profile.pick(quick=4, full=16), 2000, 5
    start = Start.of(seeds, gaussian)
    lifted = 1 / start.equal_gains(9)
    scaled = start._replace(
        layers=[W * lifted[:, i, None, None] for i, W in enumerate(start.layers)]
    )
    arms = {
        "plain": (start, PLAIN, {}),
        "degree 1": (start, 1, {}),
        "degree 5": (start, 5, {}),
        "degree 9": (start, 9, {}),
        "plain, enlarged": (scaled, PLAIN, {}),
        "degree 9, gain 1": (start, 9, {"gains": 1.0}),
    }
    goal = FITTED * start.trained(PLAIN, 1).excess[:, :1]  # one for all arms
    reference = None
    for arm, (begin, degree, changes) in arms.items():
        best: tuple[float, np.ndarray] | None = None
        for rate in LEARNING_RATES:
            found = begin.trained(degree, steps, every=every, learning_rate=rate, **changes)
            reached = found.excess <= goal
            count = np.where(reached.any(axis=1), every * reached.argmax(axis=1), np.inf)
            if best is None or np.log(count).mean() < np.log(best[1]).mean():
                best = rate, count
        assert best is not None
        rate, count = best
        shared = {"panel": "speed", "arm": arm, "degree": degree, "learning_rate": rate}
        shared |= {"seeds": seeds}
        fitted = int(np.isfinite(count).sum())
        yield {**shared, "source": "simulation", "observable": "runs_fitted", "value": fitted}
        if fitted < seeds:
            continue
        yield measured(shared | {"observable": "steps_to_fit"}, count, log=True)
        reference = count if reference is None else reference
        if degree is not PLAIN or begin is not start:
            yield measured(shared | {"observable": "steps_ratio"}, count / reference, log=True)


def rank_rows(profile: Profile) -> Iterator[dict[str, Any]]:
    """A target of lower rank: the smallest singular value of both layers falls as 1/√t."""
    seeds, steps, every = profile.pick(quick=4, full=16), 20000, 20
    start = Start.of(seeds, falling)
    for degree in (PLAIN, 1, 3, 9):
        found = start.trained(degree, steps, every=every)
        shared = {"panel": "rank", "arm": name(degree), "degree": degree, "seeds": seeds}
        places = np.unique(np.geomspace(1, steps / every, 16).astype(int))
        smallest = found.spectra[0][:, places, -1]
        yield from over_time(
            shared | {"observable": "smallest"}, places, smallest, log=True, spacing=every
        )
        slope = 1.0 if degree is PLAIN else PRECONDITIONING[degree][0]
        finals = [found.final(seed)[0] for seed in range(seeds)]
        gains = np.array([1.0 if degree is PLAIN else float(layer.gain) for layer in finals])
        growth = 2 * RATE * (slope * gains) ** 2  # of 1/σ² per step
        begun = found.spectra[0][:, :1, -1] ** -2.0
        law = (begun + growth[:, None] * every * places) ** -0.5
        yield from over_time(
            shared | {"observable": "smallest"}, places, law, log=True, spacing=every,
            source="theory",
        )  # fmt: skip
        inverse = found.spectra[0][:, :, -1] ** -2.0
        half = len(found.steps) // 2
        measured_growth = (inverse[:, -1] - inverse[:, half]) / (steps - every * half)
        yield measured(shared | {"observable": "growth_ratio"}, measured_growth / growth)
        # control: the slope of g_d left out
        wrong = measured_growth * slope**2 / growth
        yield measured(shared | {"observable": "growth_ratio_without_slope"}, wrong)
        share = found.excess[:, -1] * 2 * found.spectra[0][:, -1, -1] ** -4.0
        yield measured(shared | {"observable": "loss_of_smallest"}, share)


def decay_rows(profile: Profile) -> Iterator[dict[str, Any]]:
    """Decay λ‖W‖²: σ̂ of the first layer; γ held, or trained to stand against it."""
    seeds, steps, every = profile.pick(quick=4, full=16), 4000, 20
    start = Start.of(seeds, lambda rng: far(rng, 3, 4.0))
    shrink = 1 - 2 * RATE * DECAY
    for arm, degree, changes in [
        ("plain", PLAIN, {}),
        ("degree 9", 9, {"train_gain": False}),
        ("degree 9, γ trained", 9, {}),
    ]:
        found = start.trained(degree, steps, every=every, decay=DECAY, **changes)
        shared = {"panel": "decay", "arm": arm, "degree": degree, "seeds": seeds}
        scales = found.scales[:, :, 0] - (0.0 if degree is PLAIN else 1e-7)  # what the layer adds
        scales = scales / scales[:, :1]
        places = np.arange(0, steps // every + 1, 10)
        finite = np.isfinite(found.excess[:, places])
        runs = int(finite[:, -1].sum())
        yield {**shared, "source": "simulation", "observable": "runs_finite", "value": runs}
        whole = places[finite.all(axis=0)]
        yield from over_time(
            shared | {"observable": "scale"}, whole, np.abs(scales[:, whole]), log=True,
            spacing=every,
        )  # fmt: skip
        if runs == seeds:
            late = 3 * len(found.steps) // 4  # the steps turn W, the less the smaller it is
            last = np.log(scales[:, -1] / scales[:, late]) / (steps - every * late)
            yield measured(shared | {"observable": "decay_ratio"}, last / math.log(shrink))
    yield from (
        {"panel": "decay", "arm": "predicted", "source": "theory", "observable": "scale",
         "step": every * place, "value": shrink ** (every * place), "error": 0.0}
        for place in places
    )  # fmt: skip


def over_time(
    shared: dict[str, Any],
    places: np.ndarray,
    values: np.ndarray,
    *,
    log: bool = False,
    spacing: int = 1,
    source: str = "simulation",
) -> Iterator[dict[str, Any]]:
    for place, column in zip(places, values.T, strict=True):
        yield {**shared, "source": source, "step": spacing * int(place)} | summary(column, log=log)


def measured(shared: dict[str, Any], values: np.ndarray, log: bool = False) -> dict[str, Any]:
    return {**shared, "source": "simulation"} | summary(values, log=log)


def summary(values: np.ndarray, log: bool = False) -> dict[str, Any]:
    """Mean and standard error over seeds; of the logarithm where values span decades."""
    estimate = Estimate.of(np.log(values) if log else values)
    mean = math.exp(estimate.mean) if log else estimate.mean
    error = estimate.error * (mean if log else 1.0)
    return {"value": mean, "error": error, "lowest": values.min(), "highest": values.max()}


PARTS = {
    # programs that two of them share are compiled once
    "rates": (rate_rows,), "square": (spectrum_rows, speed_rows), "loss": (loss_rows,),
    "rank": (rank_rows,), "decay": (decay_rows,),
}  # fmt: skip
