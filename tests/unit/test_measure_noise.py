"""The second stage alone: from (gain, variance, Q), and from the user's own weights."""

import numpy as np
import pytest

from lora_theory import (
    EffectiveNoise,
    Finetuning,
    Pretraining,
    Problem,
    ProblemError,
    finetune,
    measure_noise,
    predict,
)

PROBLEM = Problem(
    tokens=2,
    activation="linear",
    teacher_rank=0.5,
    label_noise=0.5,
    pretraining=Pretraining(samples=0.2, penalty=0.02),
    finetuning=Finetuning(samples=3.0, penalty=0.2),
)


@pytest.mark.parametrize("activation", ["linear", pytest.param("softmax", marks=pytest.mark.slow)])
def test_the_second_stage_alone_is_that_of_the_whole(activation):
    whole = predict(PROBLEM.replace(activation=activation), nodes=64)
    alone = finetune(
        whole.effective_noise, PROBLEM.finetuning, tokens=2, activation=activation, nodes=64
    )
    assert [branch.branch for branch in alone] == [branch.branch for branch in whole.branches]
    for name in ("q", "m", "v", "test_error", "overlap", "frozen_test_error", "potential"):
        expected = getattr(whole.finetuning, name)
        # softmax: the error of stage one scatters over the blocks of the whole, at second order
        slack = 0.2 * whole.finetuning.quadrature_error[name] * (activation == "softmax")
        difference = abs(getattr(alone[0], name) - expected)
        assert difference <= slack + 1e-8 * abs(expected), name


def factor(dim, rank, seed):
    return np.random.default_rng(seed).standard_normal((dim, rank))


def test_noise_is_measured_from_weights_or_their_matrix():
    W0, W = factor(40, 20, 0), factor(40, 30, 1)
    S0, S = W0 @ W0.T / np.sqrt(40 * 20), W @ W.T / np.sqrt(40 * 30)
    Q, M, Q0 = np.trace(S @ S) / 40, np.trace(S @ S0) / 40, np.trace(S0 @ S0) / 40
    for given in ({"weights": W}, {"matrix": S}):
        noise = measure_noise(teacher=S0, label_noise=0.5, linear=True, **given)
        assert pytest.approx(Q) == noise.Q
        assert noise.gain == pytest.approx(M / Q)
        assert noise.variance == pytest.approx(0.25 + Q0 - M**2 / Q)
        assert noise.delta_eff == pytest.approx(0.25 + np.trace((S0 - S) @ (S0 - S)) / 40)


def test_weights_equal_to_the_teacher_leave_the_label_noise_only():
    W0 = factor(60, 30, 2)
    S0 = W0 @ W0.T / np.sqrt(60 * 30)
    noise = measure_noise(teacher=S0, weights=W0, label_noise=0.6)
    assert (noise.gain, noise.variance) == pytest.approx((1.0, 0.3))
    best = finetune(noise, PROBLEM.finetuning, tokens=2, activation="linear", nodes=64)[0]
    noisy = EffectiveNoise(gain=1.0, variance=0.9, Q=noise.Q)
    worse = finetune(noisy, PROBLEM.finetuning, tokens=2, activation="linear", nodes=64)[0]
    assert best.overlap > worse.overlap + 0.005


I5 = np.eye(5)
BAD = [
    ({"teacher": I5}, "exactly one of weights and matrix"),
    ({"teacher": I5, "weights": I5, "matrix": I5}, "exactly one of weights and matrix"),
    ({"teacher": np.ones((2, 3)), "matrix": I5}, r"teacher of shape \(2, 3\)"),
    ({"teacher": I5, "matrix": np.eye(4)}, r"matrix of shape \(4, 4\) .* \(5, 5\)"),
    ({"teacher": I5, "weights": np.ones((4, 2))}, r"weights of shape \(4, 2\)"),
    ({"teacher": I5, "matrix": np.triu(np.ones((5, 5)))}, "not symmetric"),
    ({"teacher": I5 * np.nan, "matrix": I5}, "not finite"),
    ({"teacher": I5, "matrix": 0 * I5}, "zero"),
    ({"teacher": I5, "matrix": I5, "label_noise": -1.0}, "label_noise = -1.0"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_bad_arrays_are_refused_in_one_sentence(given, message):
    with pytest.raises(ProblemError, match=message):
        measure_noise(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": EffectiveNoise(gain=np.nan, variance=1.0, Q=1.0)}, "noise.gain = nan"),
        ({"noise": EffectiveNoise(gain=1.0, variance=-1.0, Q=1.0)}, "noise.variance = -1.0"),
        ({"tokens": 1, "activation": "softmax"}, "tokens = 1"),
        ({"activation": "relu"}, "activation = 'relu'"),
        ({"tokens": 99}, "tokens = 99"),
        ({"nodes": 100}, "nodes = 100"),
        ({"blocks": 1}, "blocks = 1"),
        ({"finetuning": Finetuning(samples=1, penalty=1, sequences="reused")}, "sequences"),
    ],
)
def test_bad_arguments_of_finetune_are_refused(changes, message):
    right = {
        "noise": EffectiveNoise(gain=1.0, variance=0.3, Q=1.0),
        "finetuning": PROBLEM.finetuning,
        "tokens": 2,
        "activation": "linear",
    }
    with pytest.raises(ProblemError, match=message):
        finetune(**{**right, **changes})
