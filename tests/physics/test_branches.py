"""Branches of LoRA, and what the rank of the weights changes."""

import math

import numpy as np
import pytest

from lora_theory import Status, predict

#: Softmax attention takes longer.
ACTIVATIONS = ["linear", pytest.param("softmax", marks=pytest.mark.slow)]


@pytest.mark.parametrize("samples", [0.1, 1.0, 3.0, 10.0])
def test_the_branch_of_least_potential_is_reported(solution, samples):
    answer = solution({"finetuning.samples": samples})
    potentials = [branch.potential for branch in answer.branches]
    assert potentials == sorted(potentials)
    assert answer.finetuning is answer.branches[0]
    names = [branch.branch for branch in answer.branches]
    assert names == (["uninformed"] if samples == 0.1 else ["informed", "uninformed"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_only_penalty_times_root_of_the_rank_matters(solution, activation):
    answers = [
        solution(
            {"pretraining.rank": rank, "pretraining.penalty": 0.02 / math.sqrt(rank)},
            activation=activation,
        )
        for rank in (1.0, 4.0, 0.7)
    ]
    other = solution({"pretraining.rank": 4.0}, activation=activation)
    for stage in ("pretraining", "finetuning"):
        for name in getattr(answers[0], stage).quadrature_error:
            values = [getattr(getattr(answer, stage), name) for answer in answers]
            np.testing.assert_allclose(values[1:], values[0], rtol=1e-8, atol=1e-9, err_msg=name)
        first, second = (getattr(answer, stage).test_error for answer in (answers[0], other))
        assert abs(first / second - 1) > 1e-3


def test_a_rank_below_the_learned_one_cuts(solution):
    """Continuously: just above it nothing changes, just below it very little, far below a lot."""
    learned = solution().pretraining.learned_rank
    assert 0.3 < learned < 0.7
    errors = {}
    for factor in (1.001, 0.999, 0.6):
        rank = factor * learned
        cut = solution({"pretraining.rank": rank, "pretraining.penalty": 0.02 / math.sqrt(rank)})
        assert cut.pretraining.learned_rank == pytest.approx(min(rank, learned), rel=1e-6)
        errors[factor] = cut.pretraining.test_error / solution().pretraining.test_error - 1
    assert abs(errors[1.001]) < 1e-9
    assert 1e-9 < abs(errors[0.999]) < 1e-4
    assert abs(errors[0.6]) > 1e-3


def test_a_narrow_informed_branch_is_found(problem):
    """LoRA that learns w* nearly exactly: far from the start, absent at much larger penalties."""
    changes = {
        "tokens": 3, "teacher_rank": 1.67422, "label_noise": 0.0,
        "pretraining.samples": 1.81827, "pretraining.penalty": 0.02095,
        "finetuning.samples": 13.4775, "finetuning.penalty": 1.41008,
        "finetuning.signal": 1.07057, "finetuning.sequences": "reused",
    }  # fmt: skip
    best, other = predict(problem.replace(changes), nodes=64).branches
    assert best.branch == "informed"
    assert best.overlap > 0.999
    assert best.potential < 0.1 * other.potential


@pytest.mark.parametrize(("samples", "penalty", "stable"), [(3.0, 0.3, True), (1.2, 0.1, False)])
def test_an_unstable_solution_is_flagged(problem, samples, penalty, stable):
    """Softmax, few samples and a weak penalty: jumps carry most of the response."""
    asked = problem.replace(
        {"finetuning.samples": samples, "finetuning.penalty": penalty, "pretraining.penalty": 0.1},
        activation="linear" if stable else "softmax",
    )
    answer = predict(asked, nodes=512)
    second = answer.stability["finetuning"]
    assert second.is_stable is stable
    assert (answer.status is Status.UNSTABLE) is (answer.finetuning.status is Status.UNSTABLE)
    assert (answer.status is Status.UNSTABLE) is not stable
    assert answer.status.is_solved
    assert answer.to_dict()["stability"]["finetuning"]["replicon"] == second.replicon
