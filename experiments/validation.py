"""Problems on which theory and simulation are compared, and the runs of the simulation.

``python experiments/validation.py`` trains every problem at three D (about half an hour on two
cores) and writes one row per run to tests/reference/validation_runs.csv; the test
tests/montecarlo/test_validation.py extrapolates those to D → ∞ and compares with the theory.
"""

from __future__ import annotations

import shutil
from pathlib import Path

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
