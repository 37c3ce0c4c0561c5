"""The reduced fields of linear attention have the law of R + χ*χ*ᵀ − q0 I and its projections."""

import jax
import numpy as np
import pytest
from scipy.stats import ks_2samp

from lora_theory.theory.nodes import gaussian_blocks
from lora_theory.theory.training_fields import linear_fields, node_dimension

TRAINING_NOISE, SIGNAL = 0.6, 1.3
DRAWS = 100_000


def reduced(tokens: int) -> tuple[np.ndarray, ...]:
    """Levels, projections of χ* and of ζ from the package, (blocks, T, nodes) each."""
    nodes = gaussian_blocks(node_dimension(tokens, "linear"), 4096, 8, seed=1)
    with jax.enable_x64(True):
        fields = [linear_fields(block, TRAINING_NOISE, SIGNAL, tokens=tokens) for block in nodes]
    return tuple(
        np.stack([getattr(f, name) for f in fields]) for name in ("levels", "signal", "noise")
    )


def direct(tokens: int, diagonal: float = 2.0) -> tuple[np.ndarray, ...]:
    """The same from the definition: R symmetric, variance Δ off and 2Δ on the diagonal."""
    rng = np.random.default_rng(2)
    A = np.sqrt(TRAINING_NOISE) * rng.standard_normal((DRAWS, tokens, tokens))
    upper = np.triu(A, 1)
    R = upper + upper.swapaxes(1, 2)
    R += np.sqrt(diagonal) * A * np.eye(tokens)
    star = np.sqrt(SIGNAL) * rng.standard_normal((DRAWS, tokens))
    noise = rng.standard_normal((DRAWS, tokens))
    B = R + star[:, :, None] * star[:, None] - SIGNAL * np.eye(tokens)
    levels, vectors = np.linalg.eigh(B)
    rotated = ((vectors.swapaxes(1, 2) @ x[..., None])[..., 0] for x in (star, noise))
    return tuple(x.T[None] for x in (levels, *rotated))


def moments(levels: np.ndarray, star: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Even statistics (the sign of an eigenvector is free), (statistics, blocks, nodes)."""
    tokens = levels.shape[1]
    rows = []
    for i in range(tokens):
        rows += [levels[:, i], levels[:, i] ** 2, np.tanh(levels[:, i]), star[:, i] ** 2]
        rows += [noise[:, i] ** 2, levels[:, i] * star[:, i] ** 2, np.cos(star[:, i])]
        rows += [levels[:, i] * noise[:, i] ** 2, np.abs(star[:, i] * noise[:, i])]
        rows += [star[:, i] * noise[:, i]]
        for j in range(i):
            rows += [levels[:, i] * levels[:, j], (star[:, i] * star[:, j]) ** 2]
            rows += [levels[:, i] * star[:, j] ** 2]
            rows += [star[:, i] * star[:, j] * noise[:, i] * noise[:, j]]
    return np.stack(rows)


def z_scores(tokens: int, diagonal: float = 2.0) -> np.ndarray:
    package, sampled = moments(*reduced(tokens)), moments(*direct(tokens, diagonal))[:, 0]
    blocks = package.mean(axis=-1)
    error = np.hypot(
        blocks.std(axis=1, ddof=1) / np.sqrt(blocks.shape[1]),
        sampled.std(axis=1) / np.sqrt(sampled.shape[1]),
    )
    return (blocks.mean(axis=1) - sampled.mean(axis=1)) / error


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_moments_are_those_of_direct_sampling(tokens):
    assert np.abs(z_scores(tokens)).max() < 4.5


def test_a_wrong_diagonal_variance_is_seen():
    for tokens in (1, 2, 4):
        assert np.abs(z_scores(tokens, diagonal=1.0)).max() > 8


@pytest.mark.parametrize("tokens", [2, 3])
def test_distributions_are_those_of_direct_sampling(tokens):
    """Kolmogorov–Smirnov on the levels and the squared projections."""
    package = [x.transpose(1, 0, 2).reshape(tokens, -1) for x in reduced(tokens)]
    sampled = [x[0] for x in direct(tokens)]
    wrong = direct(tokens, diagonal=1.6)[0][0]
    size = DRAWS * package[0].shape[1] / (DRAWS + package[0].shape[1])
    bound = 1.95 / np.sqrt(size)  # one in a thousand
    for i in range(tokens):
        assert ks_2samp(package[0][i], sampled[0][i]).statistic < bound
        assert ks_2samp(package[1][i] ** 2, sampled[1][i] ** 2).statistic < bound
    assert max(ks_2samp(package[0][i], wrong[i]).statistic for i in range(tokens)) > bound


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_nodes_come_in_mirror_pairs(tokens):
    levels, star, noise = reduced(tokens)
    half = levels.shape[-1] // 2
    np.testing.assert_array_equal(levels[..., :half], levels[..., half:])
    np.testing.assert_array_equal(star[..., :half], star[..., half:])
    np.testing.assert_array_equal(noise[..., :half], -noise[..., half:])
    assert np.all(np.diff(levels, axis=1) >= 0)


def test_without_noise_only_the_signal_is_left():
    nodes = gaussian_blocks(9, 64, 1, seed=0)[0]
    with jax.enable_x64(True):
        fields = linear_fields(nodes, 0.0, SIGNAL, tokens=3)
    levels, star = np.asarray(fields.levels), np.asarray(fields.signal)
    np.testing.assert_allclose(levels[:2], -SIGNAL, atol=1e-12)
    np.testing.assert_allclose(levels[2], (star**2).sum(0) - SIGNAL, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(star[:2], 0, atol=1e-12)
