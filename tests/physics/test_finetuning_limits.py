"""Limits of LoRA with known answers."""

import math

import numpy as np
import pytest

from lora_theory import Status

#: Softmax attention takes longer.
ACTIVATIONS = ["linear", pytest.param("softmax", marks=pytest.mark.slow)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_strong_lora_penalty_leaves_the_frozen_error(solution, activation):
    answer = solution({"finetuning.penalty": 100.0}, activation=activation)
    stage = answer.finetuning
    assert stage.branch == "zero"
    assert stage.status is answer.status is Status.COLLAPSED
    assert (stage.q, stage.m) == (0, 0)
    assert math.isnan(stage.overlap)
    assert stage.test_error == stage.frozen_test_error
    assert stage.v == pytest.approx(1 / (200 + stage.v_hat), rel=1e-8)
    norms = [
        solution({"finetuning.penalty": x}, activation=activation).finetuning.q
        for x in (0.1, 0.4, 1.0, 100.0)
    ]
    assert norms == sorted(norms, reverse=True)
    assert norms[0] > 0.5


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_many_finetuning_samples_align_fully(solution, activation):
    stages = [
        solution({"finetuning.samples": samples}, activation=activation).finetuning
        for samples in (10.0, 100.0, 1000.0)
    ]
    misaligned = np.array([1 - stage.overlap for stage in stages])
    np.testing.assert_allclose(misaligned[:-1] / misaligned[1:], 10, rtol=0.3)
    assert misaligned[-1] < 5e-4
    if activation == "linear":
        assert stages[-1].q == pytest.approx(1, abs=0.01)
        limit = solution(
            {"finetuning.samples": 1000.0}, activation=activation
        ).pretraining.test_error
        assert stages[-1].test_error == pytest.approx(limit, rel=2e-3)


@pytest.mark.parametrize(
    ("activation", "sequences"),
    [
        ("linear", "fresh"),
        pytest.param("softmax", "fresh", marks=pytest.mark.slow),
        pytest.param("softmax", "reused", marks=pytest.mark.slow),
    ],
)
def test_weak_signal_is_not_found(solution, activation, sequences):
    kind = {"finetuning.sequences": sequences}
    weak = solution({"finetuning.signal": 0.01, **kind}, activation=activation).finetuning
    assert weak.branch in ("uninformed", "zero")
    assert not weak.overlap > 0
    assert weak.test_error >= weak.frozen_test_error
    strong = solution({"finetuning.signal": 3.0, **kind}, activation=activation).finetuning
    assert strong.branch == "informed"
    assert strong.overlap > 0.9
    assert strong.test_error < strong.frozen_test_error


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reused_sequences_are_fresh_ones_where_pretraining_did_not_fit_them(solution, activation):
    """V → 0 with many samples; at α = .2 the two differ."""
    for samples, same in ((300.0, True), (0.2, False)):
        pair = [
            solution(
                {"pretraining.samples": samples, "finetuning.sequences": kind},
                activation=activation,
            )
            for kind in ("fresh", "reused")
        ]
        V = pair[0].pretraining.V
        assert (V < 0.01) == same
        for name in ("q", "m", "v", "overlap", "test_error", "train_error", "potential"):
            first, second = (getattr(answer.finetuning, name) for answer in pair)
            assert (abs(first / second - 1) < 3 * V) == same or not same, name
        gap = pair[1].finetuning.overlap - pair[0].finetuning.overlap
        assert (gap > 0.01) != same
