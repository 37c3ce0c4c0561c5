"""Partly re-used sequences and redrawn noise: laws on the nodes, mixtures, what a run draws."""

import dataclasses

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from lora_theory import Finetuning, Pretraining, Problem, ProblemError, predict, simulate
from lora_theory.simulation.data import run_key
from lora_theory.simulation.finetuning import finetuning_data
from lora_theory.simulation.pretraining import pretraining_data
from lora_theory.simulation.sizes import Sizes
from lora_theory.theory import finetuning as lora
from lora_theory.theory import training_fields as training
from lora_theory.theory.branches import FinetuningNodes, FrozenWeights
from lora_theory.theory.fields import field_count
from lora_theory.theory.nodes import Discretisation, gaussian_blocks

Q, M, Q0, NOISE, V = 1.3, 1.1, 1.5, 0.25, 0.7
WEIGHTS = FrozenWeights(
    *(np.full(4, x) for x in (Q, M, V)), Q0 + NOISE, rescaling=0.8, noise_variance=NOISE
)
REUSED = Finetuning(samples=3.0, penalty=0.2, sequences="reused")
SETTINGS = Discretisation(64, 4, 0, 1e-10)
LINEAR = Problem(
    tokens=2,
    activation="linear",
    teacher_rank=0.5,
    label_noise=0.5,
    pretraining=Pretraining(samples=0.5, penalty=0.05),
    finetuning=REUSED,
)


def test_relabelled_fields_have_their_covariances():
    tokens, n = 3, field_count(3, "softmax")
    dimension = training.node_dimension(tokens, "softmax", new_noise=True)
    nodes = np.concatenate(gaussian_blocks(dimension, 2**14, 4, 1), axis=1)
    with jax.enable_x64(True):
        label, z = training._frozen_fields(nodes, Q, M, Q0 + NOISE, tokens)
        new = training._with_new_noise(nodes, label, Q, M, Q0 + NOISE, NOISE, tokens)
    both = np.concatenate([new, label, z])
    expected = np.kron([[Q0 + NOISE, Q0, M], [Q0, Q0 + NOISE, M], [M, M, Q]], np.eye(n))
    assert_allclose(both @ both.T / both.shape[1], expected, atol=5e-3)


@pytest.mark.parametrize("redrawn", [False, True])
def test_effective_noise_of_reused_sequences_is_that_of_sampled_fields(redrawn):
    """Their field is β Prox_V(z; y) with Prox_V = ((T²/4)z + Vz^y)/(T²/4 + V)."""
    T, beta = 2, WEIGHTS.rescaling
    covariance = [[Q0, M, 0, 0], [M, Q, 0, 0], [0, 0, NOISE, 0], [0, 0, 0, NOISE]]
    samples = np.random.default_rng(3).multivariate_normal(np.zeros(4), covariance, 10**6).T
    clean, z, noise, other = samples
    prox = (T**2 / 4 * z + V * (clean + noise)) / (T**2 / 4 + V)
    gap = clean + (other if redrawn else noise) - beta * prox
    found = WEIGHTS.training_noise(T, redrawn=redrawn)[0]
    assert found == pytest.approx(gap.var(), rel=4 * np.sqrt(2 / gap.size))
    assert abs(found / WEIGHTS.training_noise(T, redrawn=not redrawn)[0] - 1) > 0.1


@pytest.mark.parametrize("activation", ["linear", "softmax"])
def test_averages_are_mixtures(activation):
    """Linear in the share at given (q, m, v): on the same nodes, to rounding."""
    point, rows = np.array([np.log(0.3), 0.9, np.log(0.15)]), {}
    with jax.enable_x64(True):
        for stage in (dataclasses.replace(REUSED, reused_fraction=0.3), REUSED,
                      Finetuning(samples=3.0, penalty=0.2)):  # fmt: skip
            nodes = FinetuningNodes(stage, WEIGHTS, 2, activation, SETTINGS)
            values = nodes.averages(lora.INFORMED).at(point, search=True)
            rows[stage.reused] = np.concatenate([values.residual, values.observables], axis=1)
    assert_allclose(rows[0.3], 0.3 * rows[1] + 0.7 * rows[0], rtol=1e-9, atol=1e-11)
    assert np.abs(rows[1] - rows[0]).max() > 0.05


def test_all_re_used_is_the_fraction_1():
    whole, named = (
        predict(LINEAR.replace(changes), nodes=64)
        for changes in ({}, {"finetuning.reused_fraction": 1.0, "finetuning.noise": "shared"})
    )
    assert named.finetuning == whole.finetuning
    assert named.effective_noise == whole.effective_noise


def test_noise_that_is_none_can_be_redrawn():
    shared, redrawn = (
        predict(LINEAR.replace({"label_noise": 0.0, "finetuning.noise": name}), nodes=64)
        for name in ("shared", "redrawn")
    )
    assert redrawn.finetuning == shared.finetuning


def test_more_re_use_aligns_better_and_new_noise_worse():
    overlaps = [
        predict(LINEAR.replace(changes), nodes=256).finetuning.overlap
        for changes in (
            {"finetuning.sequences": "fresh"},
            {"finetuning.noise": "redrawn"},
            {"finetuning.reused_fraction": 0.5},
            {},
        )
    ]
    fresh, redrawn, half, whole = overlaps
    assert fresh < half < whole
    assert redrawn < whole


def test_effective_noise_is_the_mean_over_the_sequences():
    fresh, half, whole = (
        predict(LINEAR.replace({"finetuning.reused_fraction": share}), nodes=64).effective_noise
        if share else predict(LINEAR.replace({"finetuning.sequences": "fresh"})).effective_noise
        for share in (None, 0.5, 1.0)
    )  # fmt: skip
    mean = (fresh.delta_eff_training + whole.delta_eff_training) / 2
    assert half.delta_eff_training == pytest.approx(mean, rel=1e-9)
    assert whole.delta_eff_training < 0.9 * fresh.delta_eff_training == fresh.delta_eff * 0.9


@pytest.mark.parametrize("noise", ["shared", "redrawn"])
def test_a_run_re_uses_the_first_sequences(noise):
    problem = LINEAR.replace({"finetuning.reused_fraction": 0.4, "finetuning.noise": noise})
    sizes, key = Sizes.of(problem, 20), run_key(0, 0)
    assert (sizes.finetuning_sequences, sizes.reused_sequences) == (60, 24)
    with jax.enable_x64(True):
        first = pretraining_data(key, problem, sizes, np.float64)
        second = finetuning_data(key, problem, sizes, first, first.teacher)
        clean = problem.replace(label_noise=0.0)
        same = finetuning_data(
            key, clean, sizes, pretraining_data(key, clean, sizes, np.float64), first.teacher
        )
    assert second.sequences.shape == (60, 2, 20)
    assert_array_equal(second.sequences[:24], first.sequences[:24])
    fresh = np.asarray(second.sequences[24:, None] == first.sequences[None])
    assert not fresh.all(axis=(2, 3)).any()
    shared = second.teacher_fields[:24] == first.teacher_fields[:24]
    assert shared.all() if noise == "shared" else not shared.any()
    errors = np.asarray(second.teacher_fields - same.teacher_fields)
    assert errors[:, 0, 0].var() == pytest.approx(0.5, rel=0.6)  # Δ on the diagonal
    assert abs(np.corrcoef(errors[:24, 0, 0], first.teacher_fields[:24, 0, 1])[0, 1]) < 0.6


def test_re_used_sequences_must_have_been_there():
    few = LINEAR.replace({"pretraining.samples": 0.1, "finetuning.samples": 3.0})
    with pytest.raises(ProblemError, match=r"the 30 re-used sequences .* exceed the 10 pre-train"):
        simulate(few, 10, 1)
    assert Sizes.of(few.replace({"finetuning.reused_fraction": 0.3}), 10).reused_sequences == 9
