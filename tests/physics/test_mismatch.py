"""Where E' is least and where o is best: docs/theory.md, section 4.3; experiments/figure3.py."""

import functools

import numpy as np
import pytest

from lora_theory import Finetuning, Prediction, Pretraining, Problem, predict

#: Around the best λ of linear attention, equally spaced in log λ, and far from it.
AROUND = (0.085, 0.104, 0.104**2 / 0.085)
PENALTIES = (0.001, 0.005, 0.02, 0.05, *AROUND, 0.2, 0.4)


@functools.cache
def solved(
    activation: str, sequences: str, penalty: float, nodes: int = 512, seed: int = 0
) -> Prediction:
    problem = Problem(
        tokens=2,
        activation=activation,
        teacher_rank=0.5,
        label_noise=0.5,
        pretraining=Pretraining(samples=0.2, penalty=penalty),
        finetuning=Finetuning(samples=3.0, penalty=0.2, sequences=sequences),
    )
    answer = predict(problem, nodes=nodes, seed=seed)
    assert answer.status.is_solved
    assert answer.finetuning.branch == "informed"
    return answer


def error(answer: Prediction) -> float:
    return answer.finetuning.test_error


def misalignment(answer: Prediction) -> float:
    return 1 - answer.finetuning.overlap


def noise(answer: Prediction) -> float:
    return answer.effective_noise.delta_eff


def values(objective, sequences: str, penalties=PENALTIES) -> list[float]:
    return [objective(solved("linear", sequences, penalty)) for penalty in penalties]


def log_vertex(penalties, ordinates) -> float:
    """log λ where the parabola through three points is least."""
    square, slope, _ = np.polyfit(np.log(penalties), ordinates, 2)
    assert square > 0
    return float(-slope / (2 * square))


def test_linear_numbers_of_the_mismatch():
    """Those of docs/theory.md; the best λ for Δ_eff,0 is about .104."""
    for penalty, found in {0.02: (0.532, 0.092), 0.104: (0.467, 0.124)}.items():
        noises = solved("linear", "reused", penalty).effective_noise
        assert (noises.delta_eff, noises.delta_eff_training) == pytest.approx(found, abs=6e-4)
    assert PENALTIES[int(np.argmin(values(noise, "reused")))] == 0.104
    little, much = (solved("linear", "reused", penalty).finetuning for penalty in (0.02, 0.2))
    assert (little.overlap, little.test_error) == pytest.approx((0.99623, 0.82129), abs=3e-4)
    assert (much.overlap, much.test_error) == pytest.approx((0.99294, 0.78508), abs=3e-4)
    assert little.overlap > much.overlap
    assert little.test_error > much.test_error


def test_linear_error_and_alignment_share_their_best_penalty_for_fresh_sequences_only():
    """Fresh: both are functions of Δ_eff,0 alone.  Re-used: the same comparison fails."""
    for sequences in ("fresh", "reused"):
        order = np.argsort(values(noise, sequences))
        ranked = [np.asarray(values(f, sequences))[order] for f in (error, misalignment)]
        functions = [bool(np.all(np.diff(ordinates) > 0)) for ordinates in ranked]
        assert functions[1] == (sequences == "fresh")
        if sequences == "fresh":
            assert functions[0]
            found = [log_vertex(AROUND, values(f, "fresh", AROUND)) for f in (error, misalignment)]
            assert found[0] == pytest.approx(found[1], abs=0.01)


def test_linear_alignment_improves_down_to_no_penalty_for_reused_sequences():
    """The training error at a penalised minimum falls with λ, and o is a function of it."""
    training = [solved("linear", "reused", p).pretraining.train_error for p in PENALTIES]
    assert np.all(np.diff(training) > 0)
    assert np.all(np.diff(values(misalignment, "reused")) > 0)
    assert not np.all(np.diff(values(misalignment, "fresh")) > 0)
    lowest = int(np.argmin(values(error, "reused")))
    assert 0 < lowest < len(PENALTIES) - 1  # while E' has its least value inside


def test_the_gain_in_alignment_lowers_the_penalty_of_least_error():
    """At first order at the λ of least Δ_eff,0; fresh sequences are the control."""
    least = {s: log_vertex(AROUND, values(error, s, AROUND)) for s in ("fresh", "reused")}
    least_noise = log_vertex(AROUND, values(noise, "fresh", AROUND))
    assert least["fresh"] == pytest.approx(least_noise, abs=0.01)
    assert least["reused"] < least_noise - 0.05


@pytest.mark.exhaustive
def test_softmax_optima_part_for_fresh_sequences_and_further_for_reused_ones():
    """Fresh: gain and variance count differently; re-used: o is better far below λ*_E'."""
    three, low = (0.025, 0.04, 0.064), (0.005, 0.02)
    shifts, gains = [], {"fresh": [], "reused": []}
    for seed in (0, 1, 2):
        answers = [solved("softmax", "fresh", p, nodes=512, seed=seed) for p in three]
        vertices = [log_vertex(three, [f(a) for a in answers]) for f in (error, misalignment)]
        shifts.append(vertices[1] - vertices[0])
        for sequences, found in gains.items():
            little, more = (solved("softmax", sequences, p, nodes=512, seed=seed) for p in low)
            assert error(little) > error(more)
            found.append(misalignment(more) - misalignment(little))
    for sample in (shifts, gains["reused"], np.negative(gains["fresh"])):
        assert np.mean(sample) > 4 * np.std(sample, ddof=1) / np.sqrt(len(sample)), sample
