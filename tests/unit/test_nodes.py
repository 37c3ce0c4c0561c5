"""Scrambled Sobol nodes: Gaussian moments, independent and reproducible blocks."""

import numpy as np
import pytest

from lora_theory.problem import ProblemError
from lora_theory.theory.nodes import Discretisation, coarse_chunks, gaussian_blocks


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


def discretisation(nodes: int | None, blocks: int) -> Discretisation:
    return Discretisation.checked(nodes, blocks, seed=0, tolerance=1e-10)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
@pytest.mark.parametrize("blocks", [2, 3, 8])
@pytest.mark.parametrize("nodes", [16, 64, 512, 4096, None])
def test_chunks_are_the_blocks_in_order(nodes, blocks, tokens):
    """Parts of a block, or several whole ones; every point once, blocks one after another."""
    settings = discretisation(nodes, blocks)
    chunks, together = settings.chunks(3, tokens, seed=7)
    points = settings.points(tokens)
    assert points == (nodes or {1: 4096, 2: 2048, 3: 2048}.get(tokens, 512))
    (size,) = {chunk.shape[1] for chunk in chunks}
    assert {chunk.shape[0] for chunk in chunks} == {3}
    assert size <= {1: 1024, 2: 512, 3: 256}.get(tokens, 128)
    assert (points % size == 0 and together == 1) or size == together * points
    assert blocks % together == 0
    expected = np.concatenate(gaussian_blocks(3, points, blocks, seed=7), axis=1)
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), expected)


def test_small_blocks_are_computed_together():
    for points, blocks, together in [(16, 8, 8), (128, 8, 4), (128, 6, 3), (512, 8, 1)]:
        chunks, found = discretisation(points, blocks).chunks(2, 2, seed=0)
        assert (len(chunks), found) == (blocks // together, together)
    chunks, found = discretisation(2048, 8).chunks(2, 2, seed=0)
    assert (len(chunks), found) == (32, 1)


@pytest.mark.parametrize(("size", "count"), [(64, 4), (128, 2), (256, 1), (1024, 1)])
def test_a_root_is_first_looked_for_on_a_few_hundred_points(size, count):
    for tokens in (2, 3):
        assert coarse_chunks([np.zeros((2, size))] * 8, tokens) == count
        assert coarse_chunks([np.zeros((2, size))] * 2, tokens) == min(count, 2)
    assert coarse_chunks([np.zeros((2, size))] * 8, 4) == max(1, count // 2)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("nodes", (48, 8, 0, 1e-10)),
        ("nodes", (8, 8, 0, 1e-10)),
        ("blocks", (64, 1, 0, 1e-10)),
        ("seed", (64, 8, -1, 1e-10)),
        ("tolerance", (64, 8, 0, 0.0)),
        ("tolerance", (64, 8, 0, 1.0)),
    ],
)
def test_settings_that_are_not_allowed_are_named(name, settings):
    with pytest.raises(ProblemError, match=f"{name} = "):
        Discretisation.checked(*settings)
