"""What choosing sequences from a pool is worth: the tables of figure 4 and of selection.

Sign and size of the simulated differences against the theory of the same problems; controls: the
theory of any sequences, that of another score, and weights that leave nothing to choose.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lora_theory import Finetuning, Pretraining, Problem, Selection, predict

FIGURES = Path(__file__).resolve().parents[2] / "figures"
SCORE, SAMPLES = "finetuning.selection.score", "finetuning.samples"
BETTER = ("low_variance", "entropy", "margin")


@pytest.fixture(scope="module")
def published() -> pd.DataFrame:
    return pd.read_csv(FIGURES / "figure4.csv")


@pytest.fixture(scope="module")
def beyond() -> pd.DataFrame:
    return pd.read_csv(FIGURES / "selection.csv")


def theory(table: pd.DataFrame, activation: str, score: str, name: str) -> pd.DataFrame:
    here = (table["source"] == "theory") & (table["activation"] == activation)
    here &= (table[SCORE] == score) & (table["observable"] == name) & (table["start"] == "informed")
    return table[here].set_index(SAMPLES)


def differences(table: pd.DataFrame, activation: str, name: str) -> pd.DataFrame:
    """The simulated differences from any sequences, with the theory of all scores beside them."""
    here = (table["source"] == "simulation") & (table["activation"] == activation)
    rows = table[here & (table["observable"] == f"{name}_difference")].copy()
    for score in (*BETTER, "cross_token"):
        expected = theory(table, activation, score, name)["value"]
        plain = theory(table, activation, "uniform", name)["value"]
        rows[score] = rows[SAMPLES].map(expected - plain)
    return rows


def chi_squared(rows: pd.DataFrame, score: str | None) -> float:
    """Mean square of (measured − theory)/error; the theory of a score, None for any sequences."""
    expected = 0.0 if score is None else rows[score]
    return float((((rows["value"] - expected) / rows["error"]) ** 2).mean())


@pytest.mark.parametrize("name", ["test_error", "overlap"])
@pytest.mark.parametrize("activation", ["softmax", "linear"])
def test_scores_that_keep_small_logits_are_better_by_what_theory_says(published, activation, name):
    rows = differences(published, activation, name)
    sign = -1 if name == "test_error" else 1
    for score in BETTER:
        here = rows[rows[SCORE] == score]
        assert np.all(here[score] * sign > 0)
        assert np.mean(here["value"] * sign) > 0
    good = rows[rows[SCORE].isin(BETTER)]
    z = (good["value"] / good["error"]).to_numpy() * sign
    # test errors of linear attention scatter most, and differ least
    assert z.sum() / np.sqrt(z.size) > (2 if (activation, name) == ("linear", "test_error") else 5)
    # offsets of finite D are larger where LoRA is weak
    by_score = [chi_squared(rows[rows[SCORE] == score], score) for score in BETTER]
    assert max(by_score) < 6, by_score
    if activation == "softmax":
        for score in BETTER:  # controls: no gain, and that of another score
            assert chi_squared(rows[rows[SCORE] == score], None) > 20
            assert chi_squared(rows[rows[SCORE] == score], "cross_token") > 8


def test_cross_token_logits_help_softmax_and_harm_linear_attention(published):
    for activation, sign in (("softmax", 1), ("linear", -1)):
        rows = differences(published, activation, "overlap")
        rows = rows[rows[SCORE] == "cross_token"]
        assert np.all(rows["cross_token"] * sign > 0)
        z = (rows["value"] / rows["error"]).to_numpy() * sign
        assert z.sum() / np.sqrt(z.size) > 2
        assert chi_squared(rows, "cross_token") < 4
        assert chi_squared(rows, "entropy") > 4 * chi_squared(rows, "cross_token")


def test_linear_attention_gains_nothing_where_the_gain_is_one(beyond):
    """The noise that choosing takes away is (1 − M/Q)²Q; the control is weights of another gain."""
    linear = beyond[(beyond["activation"] == "linear") & (beyond["panel"] == "gain")]
    ratio = linear[(linear["observable"] == "test_error_ratio") & (linear["source"] == "theory")]
    ratio = ratio.sort_values("at")
    near = (ratio["at"] - 1).abs().idxmin()
    assert abs(ratio["value"][near] - 1) < 3 * ratio["error"][near] + 2e-3
    for end in (ratio.index[0], ratio.index[-1]):
        assert 1 - ratio["value"][end] > 5 * ratio["error"][end]
    assert np.all(np.diff(ratio["value"][ratio["at"] < 0.97]) > 0)


def test_the_best_target_beats_the_named_scores(beyond):
    softmax = beyond[(beyond["activation"] == "softmax") & (beyond["observable"] == "test_error")]
    theory_rows = softmax[softmax["source"] == "theory"]
    family = theory_rows[theory_rows["panel"] == "family"]
    best = family.loc[family["value"].idxmin()]
    levels = theory_rows[theory_rows["panel"] == "level"].set_index(SCORE)
    for score in ("low_variance", "cross_token", "uniform"):
        error = np.hypot(best["error"], levels["error"][score])
        assert levels["value"][score] - best["value"] > 3 * error, score
    c = beyond[beyond["observable"] == "best_c"].iloc[0]
    assert 5 * c["error"] < c["value"] < 2
    # the other direction is worse than any sequences
    wrong = family.loc[family["at"].idxmin()]
    assert wrong["value"] > levels["value"]["uniform"]


def test_simulated_ratios_are_those_of_theory(beyond):
    ratios = beyond[(beyond["source"] == "simulation")]
    ratios = ratios[ratios["observable"] == "test_error_ratio"]
    softmax = beyond[beyond["activation"] == "softmax"]
    level = softmax[(softmax["panel"] == "level") & (softmax["observable"] == "test_error")]
    plain = level[(level["source"] == "theory") & (level[SCORE] == "uniform")]["value"].item()
    scores = []
    for _, row in ratios.iterrows():
        same = (beyond["panel"] == row["panel"]) & (beyond["activation"] == row["activation"])
        same &= (beyond["source"] == "theory") & (beyond[SCORE] == row[SCORE])
        near = beyond[same]
        if row["panel"] == "gain":
            near = near[near["observable"] == "test_error_ratio"]
        else:
            near = near[near["observable"] == "test_error"].assign(
                value=lambda rows: rows["value"] / plain, error=lambda rows: rows["error"] / plain
            )
        if row["panel"] != "level":
            near = near.loc[[(near["at"] - row["at"]).abs().idxmin()]]
        (expected,), (quadrature,) = near["value"], near["error"]
        scores.append((row["value"] - expected) / np.hypot(row["error"], quadrature))
    assert len(scores) >= 10
    assert np.mean(np.square(scores)) < 4, scores


def test_the_table_holds_what_the_theory_gives(published):
    row = theory(published, "linear", "cross_token", "overlap").loc[2.0]
    found = predict(
        Problem(
            tokens=3, activation="linear", teacher_rank=1.0, label_noise=0.0,
            pretraining=Pretraining(samples=0.1, penalty=0.1),
            finetuning=Finetuning(
                samples=2.0, penalty=0.5, selection=Selection(pool=100.0, score="cross_token")
            ),
        ),
        nodes=1024, seed=5,
    ).finetuning  # fmt: skip
    error = np.hypot(found.quadrature_error["overlap"], row["error"])
    assert abs(found.overlap - row["value"]) < 5 * error
    other = theory(published, "linear", "uniform", "overlap").loc[2.0]
    assert abs(found.overlap - other["value"]) > 5 * error
