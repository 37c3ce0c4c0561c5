"""Problems on which theory and simulation are compared, and the runs of the simulation.

``python experiments/validation.py`` trains every problem at three D (about half an hour on two
cores) and writes one row per run to tests/reference/validation_runs.csv; the test
tests/montecarlo/test_validation.py extrapolates those to D → ∞ and compares with the theory.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from lora_theory import Finetuning, Pretraining, Problem
from lora_theory.sweeps import kept_simulations

RUNS = Path(__file__).resolve().parent.parent / "tests" / "reference" / "validation_runs.csv"
DIMS, SEEDS, SEED = (50, 80, 130), 16, 2026
#: Keeps every run until all are done: an interrupted call goes on.
STORE = Path("validation-runs")


def _problem(
    activation: str,
    tokens: int,
    teacher: tuple[float, float],
    pretraining: tuple[float, ...],
    finetuning: tuple[float, float, str] | None,
    signal: float = 1.0,
) -> Problem:
    stage = None
    if finetuning is not None:
        samples, penalty, sequences = finetuning
        stage = Finetuning(samples=samples, penalty=penalty, sequences=sequences, signal=signal)
    return Problem(
        activation=activation,
        tokens=tokens,
        teacher_rank=teacher[0],
        label_noise=teacher[1],
        pretraining=Pretraining(
            samples=pretraining[0], penalty=pretraining[1], rank=(*pretraining, 1.0)[2]
        ),
        finetuning=stage,
    )


#: name: problem; both activations, T = 1 … 4, fresh and re-used, with and without noise.
PROBLEMS = {
    "softmax-2-fresh": _problem("softmax", 2, (0.5, 0.5), (0.5, 0.05), (4.0, 0.2, "fresh")),
    "softmax-2-reused": _problem("softmax", 2, (0.5, 0.5), (0.2, 0.02), (3.0, 0.2, "reused")),
    "softmax-2-clean": _problem("softmax", 2, (0.5, 0.0), (1.0, 0.1), (6.0, 0.3, "fresh"), 2.0),
    "softmax-3-fresh": _problem("softmax", 3, (1.0, 0.5), (0.1, 0.1), (3.0, 0.5, "fresh")),
    "softmax-3-reused": _problem("softmax", 3, (1.0, 0.5), (0.2, 0.05), (3.0, 0.2, "reused")),
    "softmax-4-fresh": _problem("softmax", 4, (0.5, 1.0), (0.1, 0.05), (3.0, 0.3, "fresh")),
    "linear-1-fresh": _problem("linear", 1, (0.5, 0.2), (3.0, 0.1), (12.0, 0.2, "fresh")),
    "linear-2-fresh": _problem("linear", 2, (0.5, 0.5), (0.2, 0.02), (3.0, 0.2, "fresh")),
    "linear-2-reused": _problem("linear", 2, (0.5, 0.5), (0.2, 0.2), (3.0, 0.2, "reused")),
    "linear-2-narrow": _problem("linear", 2, (0.3, 0.5), (0.3, 0.4, 0.6), (5.0, 1.0, "fresh"), 0.5),
    "linear-3-reused": _problem("linear", 3, (1.0, 0.5), (0.1, 0.1), (3.0, 0.5, "reused")),
    "linear-4-fresh": _problem("linear", 4, (2.0, 1.0), (0.1, 0.1), (2.0, 0.5, "fresh")),
    "softmax-2-pretraining": _problem("softmax", 2, (0.5, 0.5), (0.5, 0.01), None),
}

#: name: (the problem above that it is, with which fields changed); everything else a problem may
#: have: penalties, teachers, temperatures, truncation, covariance, selection, partial re-use.
VARIED: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax-2-nuclear": (
        "softmax-2-fresh",
        {"pretraining.regularizer": "nuclear_norm", "teacher.law": "goe", "teacher_rank": None},
    ),
    "softmax-2-frobenius": ("softmax-2-reused", {"pretraining.regularizer": "frobenius"}),
    "softmax-2-low-rank-decay": (
        "softmax-2-fresh",
        {"pretraining.regularizer": "low_rank_decay", "pretraining.penalty": 0.1},
    ),
    "softmax-2-temperatures": (
        "softmax-2-fresh",
        {"inverse_temperature": 1.5, "teacher.inverse_temperature": 0.8},
    ),
    "softmax-2-truncated": ("softmax-2-reused", {"compression.rank": 0.3}),
    "softmax-2-half-reused": ("softmax-2-reused", {"finetuning.reused_fraction": 0.5}),
    "softmax-2-selected": (
        "softmax-2-fresh",
        {"finetuning.selection.pool": 20.0, "finetuning.selection.score": "cross_token"},
    ),
    "softmax-2-rescaled": ("softmax-2-fresh", {"finetuning.rescaling": 1.3}),
    "softmax-2-covariance": (
        "softmax-2-fresh",
        {"covariance.eigenvalues": [0.5, 1.5], "pretraining.penalty": 0.1},
    ),
    "softmax-3-selected": (
        "softmax-3-fresh",
        {"finetuning.selection.pool": 30.0, "finetuning.selection.score": "low_variance"},
    ),
    "linear-2-frobenius": ("linear-2-reused", {"pretraining.regularizer": "frobenius"}),
    "linear-2-separable": (
        "linear-2-fresh",
        {
            "pretraining.regularizer": "separable",
            "pretraining.function": "abs(s)**1.5",
            "pretraining.penalty": 0.2,
            "teacher.law": "power_law",
            "teacher.exponent": 0.3,
            "teacher_rank": None,
        },
    ),
    "linear-2-low-rank-decay": (
        "linear-2-fresh",
        {"pretraining.regularizer": "low_rank_decay", "pretraining.penalty": 0.2},
    ),
    "linear-2-preconditioned": (
        "linear-2-fresh",
        {
            "pretraining.regularizer": "preconditioned",
            "pretraining.degree": 3,
            "pretraining.scale": 2.0,
            "pretraining.penalty": 0.1,
        },
    ),
    "linear-2-truncated": ("linear-2-fresh", {"compression.rank": 0.3}),
    "linear-2-redrawn": ("linear-2-reused", {"finetuning.noise": "redrawn"}),
    "linear-2-shifted": (
        "linear-2-fresh",
        {
            "covariance.eigenvalues": [0.5, 1.5],
            "covariance.shifted": [1.5, 0.5],
            "pretraining.penalty": 0.2,
        },
    ),
    "linear-3-selected": (
        "linear-4-fresh",
        {
            "tokens": 3,
            "finetuning.selection.pool": 20.0,
            "finetuning.selection.score": "low_variance",
        },
    ),
}
PROBLEMS |= {name: PROBLEMS[base].replace(fields) for name, (base, fields) in VARIED.items()}


def main() -> None:
    tables = []
    for name, problem in tqdm(PROBLEMS.items()):
        starts = 0 if problem.finetuning is None else 1
        for dim in DIMS:
            effort = {"seed": SEED, "starts": starts, "dtype": "float32"}
            (result,) = kept_simulations(problem, [dim], SEEDS, STORE, **effort)
            table = pd.DataFrame(result.runs)
            keep = [c for c in table if c.startswith(("pretraining.", "finetuning."))]
            table = table[["seed_index", "dim", "seed", "dtype", *keep]]
            table.insert(0, "problem", name)
            tables.append(table)
            RUNS.parent.mkdir(parents=True, exist_ok=True)
            pd.concat(tables).to_csv(RUNS, index=False, float_format="%.8g")
    shutil.rmtree(STORE)


if __name__ == "__main__":
    main()
