"""Our own simulation of the published pre-training runs, and how far the two may differ.

``python experiments/published_runs.py`` trains at several D (about an hour on one core) and writes
one row per run to tests/reference/published_runs.csv, beside the published averages in
tests/reference/attention_erm_simulations.csv (arXiv 2509.24914).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from tqdm import tqdm

from lora_theory import Pretraining, Problem, simulate
from lora_theory.simulation.data import Draw, draw_normal, draw_sequences, run_key
from lora_theory.simulation.fields import noisy_fields
from lora_theory.simulation.measure import as_matrix, matrix_overlaps, sampled_errors
from lora_theory.simulation.minimise import minimise
from lora_theory.simulation.pretraining import PretrainingData, pretraining_task
from lora_theory.simulation.sizes import Sizes

REFERENCE = Path(__file__).resolve().parent.parent / "tests" / "reference"
PUBLISHED, RUNS = REFERENCE / "attention_erm_simulations.csv", REFERENCE / "published_runs.csv"
#: The D of the published runs, and of ours: {D: seeds}; the teachers of the first PAIRED seeds at
#: D = 100 get a second data set, which tells the scatter of teachers from that of data sets.
DIM, SEEDS, PAIRED = 100, {100: 16, 60: 24, 140: 8}, 8
#: Relative gradient of the stopping rule, with float64: a hundredth of it moves no test error by
#: more than 1e-4 of its value.
TOLERANCE, TEST_SEQUENCES = 1e-3, 20_000
#: {T: published α (to six digits) at which we simulate}
SAMPLES = {
    2: (0.005, 0.012857, 0.036429, 0.083571, 0.146429, 0.217143, 0.303571, 0.405714, 0.5),
    3: (0.00502, 0.013061, 0.027131, 0.051253, 0.079394, 0.099495, 0.131657, 0.161808, 0.2),
}
#: Runs that a published row averages, at most (T = 2) or exactly (T = 3).
AVERAGED = {2: 32, 3: 8}
LABELS = ["tokens", "alpha", "dim"]
PENALTIES = {2: 0.01, 3: 0.001}


def seed(tokens: int, alpha: float, dim: int) -> int:
    """The root seed of a point at one D: no two points share a teacher or data."""
    return 10_000 * dim + 100 * tokens + SAMPLES[tokens].index(alpha)


def problem(tokens: int, alpha: float) -> Problem:
    """The published problem; N = ⌊αD²⌋ there, so that α = 0.012857 means 128 sequences."""
    samples = math.floor(alpha * DIM**2 + 1e-9) / DIM**2
    stage = Pretraining(samples=samples, penalty=PENALTIES[tokens])
    return Problem(
        tokens=tokens, activation="softmax", teacher_rank=0.5, label_noise=0.5, pretraining=stage
    )


def simulated(tokens: int, alpha: float, dim: int, seeds: int) -> list[dict[str, Any]]:
    """One row per run of ``simulate``: every run has its own teacher."""
    result = simulate(
        problem(tokens, alpha),
        dim,
        seeds,
        seed=seed(tokens, alpha, dim),
        gradient_tolerance=TOLERANCE,
        test_sequences=TEST_SEQUENCES,
    )
    found = []
    for run in result.runs:
        numbers = {
            name.removeprefix("pretraining."): value
            for name, value in run.items()
            if name.startswith("pretraining.")
        }
        labels = {"tokens": tokens, "alpha": alpha, "dim": dim, "seed_index": run["seed_index"]}
        found.append({**labels, "data_set": 0, **numbers})
    return found


def second_data_set(tokens: int, alpha: float, dim: int, index: int) -> dict[str, Any]:
    """The run ``index`` of ``simulated`` again: same teacher, other sequences, noise and start."""
    question = problem(tokens, alpha)
    sizes, dtype, root = Sizes.of(question, dim), np.float64, seed(tokens, alpha, dim)
    key = run_key(root + 50, index)
    with jax.enable_x64(True):
        teacher_key = Draw.TEACHER.key(run_key(root, index))
        teacher = draw_normal(teacher_key, (dim, sizes.teacher_rank), dtype)
        start = draw_normal(Draw.PRETRAINING_START.key(key), (dim, sizes.student_rank), dtype)
        sequences, noise = draw_sequences(
            Draw.PRETRAINING_SEQUENCES.key(key), sizes.pretraining_sequences, tokens, dim, dtype
        )
        fields = noisy_fields(sequences, teacher, noise, dtype(question.label_noise))
        data = PretrainingData(teacher, sequences, fields, start)
        task = pretraining_task(data, question)
        minimum = minimise(task, start, TOLERANCE, 20_000, activation="softmax")
        no_task = np.zeros((dim, 1))
        error = sampled_errors(
            key, TEST_SEQUENCES, question, minimum.weights, minimum.weights, teacher, no_task, []
        )[0]
    labels = {"tokens": tokens, "alpha": alpha, "dim": dim, "seed_index": index, "data_set": 1}
    return (
        labels
        | matrix_overlaps(as_matrix(minimum.weights), as_matrix(teacher))
        | error.named("test_error")
        | {
            "train_error": float(minimum.train_error),
            "objective": float(minimum.objective) / dim**2,
            "gradient_norm": float(minimum.relative_gradient),
            "iterations": int(minimum.iterations),
            "converged": bool(minimum.converged),
        }
    )


def published() -> pd.DataFrame:
    """The published averages under our names; ``objective`` is their training loss over D²."""
    names = {"T": "tokens", "test_error_spread": "spread", "train_loss_over_D2": "objective"}
    return pd.read_csv(PUBLISHED).rename(columns=names)


def scatter(runs: pd.DataFrame, observable: str) -> pd.DataFrame:
    """Relative standard deviation of a run at D = 100, by T and α, and its two parts.

    ``total`` is that of runs with their own teachers, ``data`` that of two data sets (sequences,
    noise, start, test sequences) on one teacher, ``teacher`` what is left of the variance, pooled
    over α: the two differ by less than their errors at one α.
    """
    found = []
    for (tokens, alpha), table in runs[runs["dim"] == DIM].groupby(["tokens", "alpha"]):
        own, again = (
            table[table["data_set"] == data_set].set_index("seed_index")[observable]
            for data_set in (0, 1)
        )
        relative = own / own.mean()
        pairs = (relative - again / own.mean()).dropna()
        parts = {"total": relative.std(), "data": math.sqrt((pairs**2).mean() / 2)}
        found.append({"tokens": tokens, "alpha": alpha, **parts})
    result = pd.DataFrame(found)
    rest = (result["total"] ** 2 - result["data"] ** 2).groupby(result["tokens"])
    return result.assign(teacher=np.sqrt(rest.transform("mean").clip(lower=0)))


def finite_dim(runs: pd.DataFrame, observable: str) -> pd.DataFrame:
    """Our mean at D = 100 and its offset from D → ∞, by T and α, with standard errors.

    The offset is the slope of a + b·100/D through the means at all D.  The standard deviation of a
    run, which eight seeds do not settle, is taken as s/D with s pooled over D; ``misfit`` is the
    χ² of the line, with ``freedom`` degrees of freedom.
    """
    found = []
    for (tokens, alpha), table in runs[runs["data_set"] == 0].groupby(["tokens", "alpha"]):
        means = table.groupby("dim")[observable].agg(["mean", "var", "count"])
        inverse, count = DIM / means.index.to_numpy(), means["count"].to_numpy()
        pooled = np.average(means["var"] / inverse**2, weights=count - 1)
        errors = np.sqrt(pooled / count) * inverse
        design = np.stack([np.ones(len(means)), inverse], axis=1)
        weighted = design / errors[:, None]
        covariance = np.linalg.inv(weighted.T @ weighted)
        line = covariance @ weighted.T @ (means["mean"].to_numpy() / errors)
        misfit = (means["mean"].to_numpy() - design @ line) / errors
        found.append(
            {
                "tokens": tokens,
                "alpha": alpha,
                "simulation": means["mean"][DIM],
                "simulation_error": float(errors[inverse == 1][0]),
                "offset": line[1],
                "offset_error": math.sqrt(covariance[1, 1]),
                "misfit": float(np.sum(misfit**2)),
                "freedom": len(means) - 2,
            }
        )
    return pd.DataFrame(found)


def comparison(runs: pd.DataFrame, observable: str) -> pd.DataFrame:
    """Published and own values side by side, by T and α, with what they may differ by.

    ``published_error`` combines the scatter of their single teacher with that of their average
    over runs.  For the test error the former is the pooled ``teacher`` part of our scatter and the
    latter their spread over √runs.  No spread of the training loss is published: there our total
    scatter, an upper bound, stands for both.
    """
    table = finite_dim(runs, observable).merge(scatter(runs, observable), on=["tokens", "alpha"])
    table = table.merge(published()[["tokens", "alpha", "spread", observable]])
    table = table.rename(columns={observable: "published"}).dropna(subset="published")
    averaged = table["tokens"].map(AVERAGED)
    if observable == "test_error":
        variance = (table["teacher"] * table["published"]) ** 2 + table["spread"] ** 2 / averaged
    else:
        variance = (table["total"] * table["published"]) ** 2 * (1 + 1 / averaged)
    return table.assign(published_error=np.sqrt(variance))


def main() -> None:
    stored = pd.read_csv(RUNS) if RUNS.exists() else pd.DataFrame(columns=LABELS)
    for dim, seeds in SEEDS.items():
        # the slowest D at some points only, to see that the offsets fall as 1/D
        chosen = (0, 3, 5, 8) if dim == max(SEEDS) else range(9)
        points = [(tokens, SAMPLES[tokens][place]) for tokens in SAMPLES for place in chosen]
        for tokens, alpha in tqdm(points, desc=f"D = {dim}"):
            # what an interrupted call has stored is kept
            if (tokens, alpha, dim) in set(zip(*(stored[n] for n in LABELS), strict=True)):
                continue
            rows = simulated(tokens, alpha, dim, seeds)
            if dim == DIM:
                rows += [second_data_set(tokens, alpha, dim, i) for i in range(PAIRED)]
            stored = pd.concat([stored, pd.DataFrame(rows)]) if len(stored) else pd.DataFrame(rows)
            stored.to_csv(RUNS, index=False, float_format="%.8g")


if __name__ == "__main__":
    main()
