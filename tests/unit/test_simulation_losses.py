"""The loss on T×T attention matrices and the loss on outputs agree for D → ∞."""

import jax
import numpy as np
import pytest

from lora_theory.attention import attention
from lora_theory.simulation import loss_on_attention, loss_on_outputs
from lora_theory.simulation.fields import centred_fields


def losses(dim: int, activation: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(dim)
    X = rng.normal(size=(4000, 3, dim))
    with jax.enable_x64(True):
        student, teacher = (
            np.asarray(attention(centred_fields(X, rng.normal(size=(dim, dim))), activation))
            for _ in range(2)
        )
    return loss_on_attention(student, teacher), loss_on_outputs(student, teacher, X)


@pytest.mark.parametrize("activation", ["softmax", "linear"])
def test_gap_per_sequence_falls_as_the_square_root_of_the_dimension(activation):
    gaps = []
    for dim in (25, 100, 400):
        on_attention, on_outputs = losses(dim, activation)
        gaps.append(np.median(np.abs(on_outputs - on_attention)) / np.median(on_attention))
    assert gaps[0] > 0.05
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.25)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.25)


def test_means_agree_at_large_dimension():
    on_attention, on_outputs = losses(400, "softmax")
    gap = on_outputs - on_attention
    error = gap.std() / np.sqrt(gap.size)
    assert abs(gap.mean()) < 0.02 * on_attention.mean() + 4 * error
    assert np.abs(gap).max() > 0


def test_losses_of_orthogonal_tokens_are_equal():
    X = np.sqrt(4) * np.eye(4)[None, :3]
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 1, 3, 3))
    np.testing.assert_allclose(
        loss_on_outputs(student, teacher, X), loss_on_attention(student, teacher), rtol=1e-14
    )
