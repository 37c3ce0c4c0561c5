"""Theory against simulation on some thirty problems, with wrong theories that must be rejected.

The cells of figures/validation.csv are observables of runs at three D, extrapolated to D → ∞
(docs/theory.md, section 7), beside the theory, which ``reproduce.py --check`` computes again.
"""

import numpy as np
import pandas as pd
import pytest
import validation
from mutants import mutant

from lora_theory import Estimate, predict, simulate
from lora_theory.compare import agreements, extrapolate

RUNS = pd.read_csv(validation.RUNS)
CELLS = pd.read_csv(validation.RUNS.with_name("validation.csv"))

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


def z_scores(prediction, name):
    """Of the informed branch, against the runs, which started at w*."""
    runs = validation.runs_of(RUNS, name)
    parts = {dim: runs[runs["dim"] == dim] for dim in sorted(runs["dim"].unique())}
    assert prediction.finetuning.branch == "informed"
    return np.array([cell.z for cell in agreements(prediction, parts) if cell.z is not None])


def test_the_cells_are_those_of_the_problems():
    assert len(CELLS) >= 300
    assert set(CELLS["problem"]) == set(RUNS["problem"]) == set(validation.PROBLEMS)
    kinds = {(p.activation, p.tokens) for p in validation.PROBLEMS.values()}
    assert kinds >= {("softmax", 2), ("softmax", 3), ("softmax", 4), ("linear", 1), ("linear", 4)}
    penalties = {p.pretraining.regularizer for p in validation.PROBLEMS.values()}
    assert len(penalties) == 6
    for name, cells in CELLS.groupby("problem"):
        assert len(cells) == (11 if validation.PROBLEMS[name].finetuning else 5)


def test_the_cells_follow_from_the_runs():
    name = "linear-2-fresh"
    again = {(c["stage"], c["observable"]): c for c in validation.predicted(name)}
    for cell in CELLS[CELLS["problem"] == name].to_dict("records"):
        found = again[cell["stage"], cell["observable"]]
        for column in ("theory", "simulation", "error"):
            assert found[column] == pytest.approx(cell[column], rel=1e-5), column


def test_theory_and_simulation_agree_on_every_problem():
    worst = CELLS.loc[CELLS["z"].abs().idxmax()]
    assert abs(worst["z"]) < 4, worst[["problem", "stage", "observable", "z"]].to_dict()


def test_the_differences_are_as_large_as_their_errors_say():
    found = validation.summary(CELLS)
    assert abs(found["chi2"] - 1) < 3 * found["chi2_error"]
    assert found["within"] > 0.9


def test_the_teacher_of_a_power_law_is_extrapolated_in_its_own_power():
    exponent = validation.PROBLEMS["linear-2-separable"].teacher.exponent
    powers = CELLS[CELLS["problem"] == "linear-2-separable"]["power"]
    assert set(powers) == {1 - 2 * exponent}
    name = "pretraining.M"
    runs = validation.runs_of(RUNS, "linear-2-separable").groupby("dim")[name].agg(["mean", "sem"])
    estimates = [Estimate(row["mean"], row["sem"], 16) for _, row in runs.iterrows()]
    theory = CELLS.query(
        "problem == 'linear-2-separable' and observable == 'M' and stage == 'pretraining'"
    )["theory"].iloc[0]
    z = {}
    for power in (1 - 2 * exponent, 1.0):
        limit = extrapolate(estimates, list(runs.index), power)
        z[power] = abs(limit.mean - theory) / limit.error
    assert z[1 - 2 * exponent] < 3
    assert z[1.0] > 5


def test_low_rank_decay_is_not_at_its_least_minimum():
    name = "linear-2-low-rank-decay"
    assert np.abs(z_scores(predict(validation.PROBLEMS[name]), name)).max() > 8


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_theory_is_rejected(wrong, tmp_path):
    name, *replacement = WRONG[wrong]
    prediction = mutant(tmp_path, *replacement).predict(validation.PROBLEMS[name])
    solved = prediction.status.is_solved and prediction.finetuning.branch == "informed"
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
    name, dim = "linear-2-fresh", validation.SIZES["full"][0][0]
    again = simulate(
        validation.PROBLEMS[name], dim, 2, seed=validation.seed_of(name), starts=0, dtype="float32"
    )
    stored = validation.runs_of(RUNS, name)
    stored = stored[stored["dim"] == dim]
    for run in again.runs:
        row = stored[stored["seed_index"] == run["seed_index"]].iloc[0]
        for observable in ("pretraining.Q", "pretraining.test_error", "finetuning.overlap"):
            assert run[observable] == pytest.approx(row[observable], rel=2e-3), observable


@pytest.mark.parametrize(("powers", "biased"), [((0.5,), True), ((0.5, 1.0), False)])
def test_the_frozen_error_of_softmax_shows_a_second_power(powers, biased):
    scores = []
    chosen = CELLS["activation"].eq("softmax") & CELLS["observable"].eq("frozen_test_error")
    for cell in CELLS[chosen].to_dict("records"):
        runs = validation.runs_of(RUNS, cell["problem"])
        means = runs.groupby("dim")["finetuning.frozen_test_error"].agg(["mean", "sem"])
        dims = means.index.to_numpy(dtype=float)
        design = np.stack([np.ones(3), *(dims**-power for power in powers)], axis=1)
        inverse = np.linalg.pinv(design / means[["sem"]].to_numpy())
        limit = inverse[0] @ (means["mean"] / means["sem"]).to_numpy()
        scores.append((limit - cell["theory"]) / np.linalg.norm(inverse[0]))
    assert len(scores) == 15
    assert (abs(np.mean(scores)) > 3 / len(scores) ** 0.5) == biased
