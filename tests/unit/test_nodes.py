"""Scrambled Sobol nodes: Gaussian moments, independent and reproducible blocks."""

import numpy as np
import pytest

from lora_theory.theory.nodes import gaussian_blocks


@pytest.mark.parametrize("dimension", [1, 4, 16])
def test_moments_are_gaussian(dimension):
    nodes = gaussian_blocks(dimension, 1024, 8, seed=3)
    assert nodes.shape == (8, dimension, 1024)
    assert np.all(np.isfinite(nodes))
    flat = nodes.transpose(1, 0, 2).reshape(dimension, -1)
    np.testing.assert_allclose(flat.mean(axis=1), 0, atol=2e-3)
    np.testing.assert_allclose((flat**2).mean(axis=1), 1, atol=6e-3)
    np.testing.assert_allclose((flat**4).mean(axis=1), 3, atol=0.1)
    covariance = flat @ flat.T / flat.shape[1]
    np.testing.assert_allclose(covariance, np.eye(dimension), atol=1.5e-2)


def estimates(count: int, seeds: int) -> np.ndarray:
    """Errors of E cos(g1 + g2/2) = exp(−5/8) on two blocks of every seed; (seeds, 2)."""
    rows = []
    for seed in range(seeds):
        nodes = gaussian_blocks(2, count, 2, seed)
        rows.append(np.cos(nodes[:, 0] + nodes[:, 1] / 2).mean(axis=1))
    return np.array(rows) - np.exp(-5 / 8)


def test_blocks_are_unbiased_and_independent():
    values = estimates(16, 300)
    error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    assert np.all(np.abs(values.mean(axis=0)) < 4 * error)
    bound = 4 / np.sqrt(len(values))
    assert abs(np.corrcoef(values.T)[0, 1]) < bound
    # Control: two estimates that share half of their nodes.
    shared = np.stack([values.mean(axis=1), values[:, 1]])
    assert abs(np.corrcoef(shared)[0, 1]) > bound


def test_error_falls_faster_than_for_random_points():
    rough, fine = (estimates(count, 60).std() for count in (16, 256))
    assert rough / fine > 8, "independent points would give √16 = 4"


def test_blocks_differ_and_repeat():
    first, again = (gaussian_blocks(3, 64, 4, seed=7) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[:2], gaussian_blocks(3, 64, 2, seed=7))
    assert not np.allclose(first, gaussian_blocks(3, 64, 4, seed=8))
    for other in range(1, 4):
        assert not np.allclose(first[0], first[other])
