"""Theory against simulation on a dozen problems, with wrong theories that must be rejected.

The runs in tests/reference/validation_runs.csv were trained by experiments/validation.py at three
D; ``agreements`` extrapolates them to D → ∞ (docs/theory.md, section 7).
"""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import validation
from mutants import mutant

from lora_theory import predict, simulate
from lora_theory.compare import agreements

RUNS = pd.read_csv(validation.RUNS)

#: the mistake: (problem that shows it, file, right, wrong).  On the informed branch of linear
#: attention E ∂_qℓ is small, so that mistake is looked for in softmax.
WRONG = {
    "factor 2 in the pre-training response": (
        "linear-2-fresh",
        "pretraining.py",
        "V_hat = channel.samples * T * (T + 1) / stiff",
        "V_hat = 2 * channel.samples * T * (T + 1) / stiff",
    ),
    "factor 2 in the fine-tuning force": (
        "linear-2-fresh",
        "finetuning.py",
        "q_hat = alpha * out.force_square",
        "q_hat = 2 * alpha * out.force_square",
    ),
    "dropped ∂_qℓ": (
        "softmax-2-reused",
        "finetuning.py",
        "v_hat = response + 2 * alpha * out.norm_slope",
        "v_hat = response",
    ),
    "wrong sign of the response (Onsager) term": (
        "linear-2-fresh",
        "finetuning.py",
        "response = -alpha / s * out.force_noise",
        "response = alpha / s * out.force_noise",
    ),
}


def runs_of(name):
    table = RUNS[RUNS["problem"] == name]
    return {dim: table[table["dim"] == dim] for dim in sorted(table["dim"].unique())}


def z_scores(prediction, name):
    """Against the runs that started at w*, whichever branch is predicted."""
    if prediction.finetuning is not None:
        informed = dataclasses.replace(prediction.finetuning, branch="informed")
        prediction = dataclasses.replace(prediction, finetuning=informed)
    return np.array([a.z for a in agreements(prediction, runs_of(name)) if a.z is not None])


@pytest.fixture(scope="module")
def scores():
    found = {}
    for name, problem in validation.PROBLEMS.items():
        prediction = predict(problem)
        assert prediction.status.is_solved, name
        found[name] = z_scores(prediction, name)
        assert len(found[name]) == (5 if problem.finetuning is None else 11)
    return found


@pytest.mark.slow
def test_theory_and_simulation_agree_on_every_problem(scores):
    for name, z in scores.items():
        assert np.abs(z).max() < 4, f"{name}: {np.round(z, 1)}"


@pytest.mark.slow
def test_the_differences_are_as_large_as_their_errors_say(scores):
    z = np.concatenate(list(scores.values()))
    assert 0.5 < np.mean(z**2) < 1.6
    assert np.mean(np.abs(z) < 2) > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_theory_is_rejected(wrong, tmp_path):
    name, *replacement = WRONG[wrong]
    prediction = mutant(tmp_path, *replacement).predict(validation.PROBLEMS[name])
    solved = prediction.status.is_solved
    assert not solved or np.abs(z_scores(prediction, name)).max() > 5


@pytest.mark.slow
def test_an_unchanged_copy_of_the_theory_is_not_rejected(tmp_path):
    same = "q_hat = alpha * out.force_square"
    theory = mutant(tmp_path, "finetuning.py", same, same)
    name = "linear-2-fresh"
    prediction = theory.predict(validation.PROBLEMS[name], nodes=512)
    assert prediction.status.is_solved
    assert np.abs(z_scores(prediction, name)).max() < 4


@pytest.mark.slow
def test_the_stored_runs_are_those_of_the_simulation():
    name, dim = "linear-2-fresh", validation.DIMS[0]
    again = simulate(
        validation.PROBLEMS[name], dim, 2, seed=validation.SEED, starts=0, dtype="float32"
    )
    stored = runs_of(name)[dim]
    for run in again.runs:
        row = stored[stored["seed_index"] == run["seed_index"]].iloc[0]
        for observable in ("pretraining.Q", "pretraining.test_error", "finetuning.overlap"):
            assert run[observable] == pytest.approx(row[observable], rel=2e-3), observable
