"""Teachers, fields, noise: against their definitions written out with D×D matrices."""

import jax
import numpy as np
import pytest

from lora_theory import Finetuning, Pretraining, Problem
from lora_theory.simulation.data import (
    Draw,
    draw_normal,
    draw_sequences,
    draw_task_vector,
    run_key,
)
from lora_theory.simulation.fields import centred_fields, noisy_fields
from lora_theory.simulation.finetuning import finetuning_data
from lora_theory.simulation.pretraining import pretraining_data
from lora_theory.simulation.sizes import Sizes

SIZES = Sizes(8, 3, 4, 6, 30, 20, 0)


def test_fields_are_the_centred_bilinear_form_of_S():
    rng = np.random.default_rng(0)
    X, W = rng.normal(size=(5, 3, 8)), rng.normal(size=(8, 6))
    S = W @ W.T / np.sqrt(6 * 8)
    expected = (X @ S @ X.swapaxes(1, 2) - np.trace(S) * np.eye(3)) / np.sqrt(8)
    with jax.enable_x64(True):
        np.testing.assert_allclose(centred_fields(X, W), expected, rtol=1e-12, atol=1e-13)


def test_fields_of_one_column_are_those_of_the_lora_vector():
    rng = np.random.default_rng(1)
    X, w = rng.normal(size=(5, 3, 8)), rng.normal(size=8)
    chi = X @ w / np.sqrt(8)
    expected = chi[:, :, None] * chi[:, None, :] - np.eye(3) * (w @ w) / 8
    with jax.enable_x64(True):
        np.testing.assert_allclose(centred_fields(X, w[:, None]), expected, rtol=1e-12, atol=1e-13)


def test_noise_is_symmetric_with_half_the_variance_off_the_diagonal():
    with jax.enable_x64(True):
        _, noise = draw_sequences(run_key(0, 0), 20_000, 3, 4, np.float64)
    noise = np.asarray(noise)
    np.testing.assert_array_equal(noise, noise.swapaxes(1, 2))
    variance = noise.var(axis=0)
    # The standard error of a variance v over n draws is v √(2/n) = 0.01 v.
    np.testing.assert_allclose(variance, 0.5 + 0.5 * np.eye(3), rtol=0.04)


def test_label_noise_enters_the_teacher_fields_with_its_square_root():
    rng = np.random.default_rng(2)
    X, W0, noise = rng.normal(size=(5, 3, 8)), rng.normal(size=(8, 4)), rng.normal(size=(5, 3, 3))
    with jax.enable_x64(True):
        difference = noisy_fields(X, W0, noise, 0.49) - centred_fields(X, W0)
    np.testing.assert_allclose(difference, 0.7 * noise, rtol=1e-12)


def test_more_sequences_do_not_change_the_earlier_ones():
    few, many = (draw_sequences(run_key(3, 0), count, 2, 5, np.float32) for count in (700, 2300))
    for short, long in zip(few, many, strict=True):
        np.testing.assert_array_equal(short, long[:700])
    assert len(np.unique(np.asarray(many[0])[:, 0, 0])) == 2300


def test_runs_and_purposes_have_their_own_randomness():
    keys = [purpose.key(run_key(0, index)) for index in (0, 1) for purpose in Draw]
    draws = {float(draw_normal(key, (), np.float32)) for key in keys}
    assert len(draws) == 2 * len(Draw)


@pytest.mark.parametrize("signal", [1.0, 2.5])
def test_task_vector_has_its_norm_exactly(signal):
    with jax.enable_x64(True):
        w = np.asarray(draw_task_vector(run_key(0, 0), 50, signal, np.float64))
    assert np.sum(w**2) / 50 == pytest.approx(signal, rel=1e-14)


@pytest.mark.parametrize("sequences", ["reused", "fresh"])
def test_reuse_means_the_same_sequences_with_the_same_noise(sequences):
    problem = Problem(
        tokens=3,
        activation="softmax",
        teacher_rank=0.5,
        label_noise=0.5,
        pretraining=Pretraining(samples=30 / 64, penalty=0.1, rank=0.75),
        finetuning=Finetuning(samples=2.5, penalty=0.1, sequences=sequences),
    )
    sizes = SIZES._replace(reused_sequences=20 if sequences == "reused" else 0)
    assert Sizes.of(problem, 8) == sizes
    with jax.enable_x64(True):
        key = run_key(0, 0)
        first = pretraining_data(key, problem, sizes, np.float64)
        second = finetuning_data(key, problem, sizes, first, first.start)
        same = [
            np.array_equal(second.sequences, first.sequences[:20]),
            np.array_equal(second.teacher_fields, first.teacher_fields[:20]),
        ]
        assert same == [sequences == "reused"] * 2
        np.testing.assert_array_equal(
            second.frozen_fields, centred_fields(second.sequences, first.start)
        )
