"""What the figure on the mismatch computes: derivatives, trajectories, simulations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from figure3 import PENALTY
from figure3 import problem as problem_of_figure3
from figure_tools import PAIRED, Profile, computed, paired_rows, predicted_rows

from lora_theory import Problem, ProblemError, gradient, predict

SAMPLES, TASK_PENALTY = "pretraining.samples", "finetuning.penalty"
#: Activation and sequences of the jobs that two processes share, the longest first.
CASES = ("softmax fresh", "softmax reused", "linear reused", "linear fresh")
#: Of the theory in the full profile, per block; also along the trajectories.
NODES, NODES_ALONG = 256, 512


class Axis(NamedTuple):
    """Values at equal ratios, fewer of them in the quick profile."""

    low: float
    high: float
    quick: int
    full: int

    def values(self, profile: Profile) -> list[float]:
        count = profile.pick(quick=self.quick, full=self.full)
        return np.geomspace(self.low, self.high, count).tolist()


#: λ of the maps and where shares are re-used, and the other axes of the maps.
ACROSS = {"softmax": Axis(0.003, 0.3, 3, 8), "linear": Axis(0.003, 1.0, 4, 10)}
UPWARDS = {
    ("softmax", SAMPLES): Axis(0.1, 0.8, 2, 4),
    ("softmax", TASK_PENALTY): Axis(0.2, 1.3, 2, 4),  # further up w vanishes
    ("linear", SAMPLES): Axis(0.05, 1.0, 3, 8),
    ("linear", TASK_PENALTY): Axis(0.05, 3.0, 2, 5),
}
#: Shares of re-used sequences in both profiles; 0 are fresh sequences.
SHARES = {
    ("softmax", "shared"): ((), (0.0, 0.25, 0.5, 1.0)),
    ("softmax", "redrawn"): ((), (0.5, 1.0)),
    ("linear", "shared"): ((0.5,), (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)),
    ("linear", "redrawn"): ((1.0,), (0.25, 0.5, 0.75, 1.0)),
}


class Trajectory(NamedTuple):
    """A knob, its values in theory and, in both profiles, simulated."""

    knob: str
    theory: Axis
    simulated: tuple[tuple[float, ...], tuple[float, ...]]
    reference: float  #: what the others are compared with, seed by seed
    penalty: float = math.nan  #: λ where that is not the knob
    pretrained: str = "trained"  #: or "sampled": the weights are drawn from their law
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((48, 4), (100, 16))  #: D and runs

    def problem(self, case: str, value: float) -> Problem:
        fixed = {} if self.knob == PENALTY else {PENALTY: self.penalty}
        return problem(case, {**fixed, self.knob: value})


PENALTIES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
LINEAR = (
    Trajectory(PENALTY, Axis(0.004, 0.6, 3, 8), ((0.02, 0.1), (*PENALTIES, 0.4)), 0.1),
    Trajectory(SAMPLES, Axis(0.05, 1.0, 3, 8), ((), (0.05, 0.1, 0.2, 0.4)), 0.1, penalty=0.03),
)
SOFTMAX = Trajectory(PENALTY, Axis(0.004, 0.3, 3, 6), ((0.05,), PENALTIES), 0.05)
TRAJECTORIES = {
    "linear fresh": LINEAR,
    "linear reused": LINEAR,
    # fresh sequences scatter more
    "softmax fresh": (
        SOFTMAX._replace(sizes=((48, 4), (100, 64))),
        Trajectory(
            SAMPLES, Axis(0.1, 3.0, 3, 7), ((), (0.2, 0.6, 1.2, 3.0)), 0.6, penalty=0.15,
            pretrained="sampled", sizes=((48, 4), (300, 64)),
        ),
    ),
    "softmax reused": (SOFTMAX,),
}  # fmt: skip


def problem(case: str, changes: Mapping[str, Any] | None = None) -> Problem:
    activation, sequences = case.split()
    asked = problem_of_figure3(activation, sequences, 0.05)
    return asked.replace({TASK_PENALTY: 1.0, **(changes or {})})


def slopes(
    asked: Problem, knobs: tuple[str, ...], labels: Mapping[str, Any], profile: Profile, seed: int
) -> Iterator[dict[str, Any]]:
    """Rows dE'/dlog x and do/dlog x for every knob x; empty where there is no solution."""
    settings = {"nodes": profile.pick(quick=64, full=NODES), "blocks": profile.blocks, "seed": seed}
    prediction = predict(asked, **settings)
    shared = {**labels, **asked.to_flat(), "source": "theory", "seed": seed}
    shared |= {"start": prediction.finetuning.branch, "status": prediction.status.value}
    try:
        found = gradient(asked, knobs, **settings)
    except ProblemError:  # on one of two sets of nodes
        found, shared["status"] = None, "not_converged"
    for knob in knobs:
        scale = asked.to_flat()[knob]
        for name in PAIRED:
            row = {**shared, "knob": knob, "observable": f"{name}_slope"}
            if found is not None:
                observable = f"finetuning.{name}"
                row["value"] = scale * found.slopes[observable][knob]
                row["error"] = scale * found.errors[observable][knob]
            yield row


def map_rows(case: str, profile: Profile) -> Iterator[dict[str, Any]]:
    activation = case.split()[0]
    for knob in profile.pick(quick=(SAMPLES,), full=(SAMPLES, TASK_PENALTY)):
        for high in UPWARDS[activation, knob].values(profile):
            # every λ has nodes of its own: errors of neighbours are independent
            for seed, across in enumerate(ACROSS[activation].values(profile)):
                asked = problem(case, {PENALTY: across, knob: high})
                yield from slopes(asked, (PENALTY, knob), {"part": f"map {knob}"}, profile, seed)


def share_rows(activation: str, profile: Profile) -> Iterator[dict[str, Any]]:
    for (name, noise), shares in SHARES.items():
        if name != activation:
            continue
        for share in profile.pick(quick=shares[0], full=shares[1]):
            case, changes = f"{activation} fresh", {}
            if share:
                case = f"{activation} reused"
                changes = {"finetuning.reused_fraction": share, "finetuning.noise": noise}
            labels = {"part": "share", "share": share, "noise": noise}
            for seed, across in enumerate(ACROSS[activation].values(profile)):
                asked = problem(case, {**changes, PENALTY: across})
                yield from slopes(asked, (PENALTY,), labels, profile, seed)


def theory(case: str, profile: Profile) -> Iterator[dict[str, Any]]:
    nodes = profile.pick(quick=64, full=NODES_ALONG)
    for path in TRAJECTORIES[case]:
        simulated = profile.pick(quick=path.simulated[0], full=path.simulated[1])
        for value in sorted({*path.theory.values(profile), *simulated}):
            asked = path.problem(case, value)
            prediction = predict(asked, nodes=nodes, blocks=profile.blocks)
            yield from predicted_rows(prediction, {"part": f"along {path.knob}"})
    yield from map_rows(case, profile)
    if case.endswith("reused"):
        yield from share_rows(case.split()[0], profile)


def simulation(case: str, profile: Profile, store: Path) -> Iterator[dict[str, Any]]:
    for path in TRAJECTORIES[case]:
        dim, seeds = profile.pick(quick=path.sizes[0], full=path.sizes[1])
        values = profile.pick(quick=path.simulated[0], full=path.simulated[1])
        problems = {value: path.problem(case, value) for value in values}
        runs = paired_rows(
            problems, path.reference, dim, seeds, store / case / path.knob, path.pretrained
        )
        for row in runs:
            yield {"part": f"along {path.knob}", "pretrained": path.pretrained, **row}


def rows_of(source: str, case: str, profile: Profile, store: Path) -> list[dict[str, Any]]:
    """All rows of one source and case."""
    return list(theory(case, profile) if source == "theory" else simulation(case, profile, store))


def compute(profile: Profile, store: Path) -> pd.DataFrame:
    return computed(rows_of, profile.pick(quick=CASES[::2], full=CASES), profile, store)
