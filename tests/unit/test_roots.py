"""Roots of averaged equations with known answers; the quadrature error covers what it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtri
from scipy.stats import binom, t

from lora_theory.theory.nodes import gaussian_blocks
from lora_theory.theory.roots import BlockValues, Root, solve

BLOCKS = 8
#: x0 = .32 + p, x1 = √(2 x0); observables x0 + x1 E g² and x1 E exp(g/2), at p = 0.
EXACT = np.array([0.32 + 0.8, 0.8 * np.exp(1 / 8)])


def known_problem(nodes: np.ndarray, parameter: float = 0.0):
    """E exp(.8 g1 + p) = exp(x0) and E cos(x1 g2) = exp(−x0), with exact derivatives."""

    def evaluate(x: np.ndarray, block: int) -> BlockValues:
        g1, g2 = nodes[block]
        level = np.exp(0.8 * g1 + parameter - x[0]).mean()
        wave = np.cos(x[1] * g2).mean() * np.exp(x[0])
        bend = (-g2 * np.sin(x[1] * g2)).mean() * np.exp(x[0])
        square, growth = (g1**2).mean(), np.exp(g2 / 2).mean()
        return BlockValues(
            np.array([level - 1, wave - 1]),
            np.array([x[0] + square * x[1], growth * x[1]]),
            np.array([[-level, 0, level], [wave, bend, 0], [1, square, 0], [0, growth, 0]]),
        )

    return evaluate


def solved(seed: int, parameter_error: float = 0.0, hand_on: bool = True) -> Root:
    nodes = gaussian_blocks(2, 64, BLOCKS, seed)
    parameters = parameter_error * np.random.default_rng(seed).standard_normal(BLOCKS)
    center = parameters.mean()
    shift = (parameters - center)[:, None] if hand_on else None
    return solve(
        known_problem(nodes, center),
        np.array([0.0, 0.5]),
        blocks=BLOCKS,
        tolerance=1e-12,
        parameter_shift=shift,
    )


def coverage_is_right(scores: np.ndarray, level: float) -> bool:
    """Whether the share of |z| below the t-quantile is binomial with that probability (4 σ)."""
    bound = t(BLOCKS - 1).ppf(0.5 + level / 2)
    hits = int(np.sum(np.abs(scores) < bound))
    low, high = binom(scores.size, level).ppf([3e-5, 1 - 3e-5])
    return low <= hits <= high


def scores(seeds: int, **settings) -> np.ndarray:
    rows = []
    for seed in range(seeds):
        root = solved(seed, **settings)
        assert root.residual < 1e-12
        rows.append((root.observables - EXACT) / root.quadrature_error)
    return np.array(rows).T


def test_stated_errors_cover_the_exact_answer():
    for z in scores(300):
        for level in (0.5, 0.9):
            assert coverage_is_right(z, level)
            assert not coverage_is_right(2 * z, level), "half the error must fail"
            assert not coverage_is_right(z / 2, level), "twice the error must fail"


def test_error_of_the_previous_stage_is_handed_on():
    for z in scores(200, parameter_error=0.05):
        assert coverage_is_right(z, 0.5)
    for z in scores(200, parameter_error=0.05, hand_on=False):
        assert not coverage_is_right(z, 0.5)


def test_block_values_are_the_roots_of_the_single_blocks():
    """One Newton step per block: exact up to second order in the distance of the roots."""
    distances = []
    for count in (64, 1024):
        nodes = gaussian_blocks(2, count, 4, seed=1)
        union = solve(known_problem(nodes), np.array([0.0, 0.5]), blocks=4, tolerance=1e-12)
        for block in range(4):
            alone = solve(
                known_problem(nodes[[block]]), np.array([0.0, 0.5]), blocks=1, tolerance=1e-12
            )
            gap = np.abs(alone.observables - union.block_observables[block]).max()
            size = np.abs(alone.observables - union.observables).max()
            distances.append((gap, size))
            np.testing.assert_array_equal(alone.quadrature_error, 0)
    gaps, sizes = np.array(distances).T
    assert np.all(gaps < 2 * sizes**2 + 1e-10)


@pytest.mark.parametrize("start", [[0.0, 0.5], [5.0, 0.1], [1.0, 1.5], [20.0, 1.0]])
def test_far_starts_end_at_the_same_root(start):
    nodes = gaussian_blocks(2, 256, 2, seed=2)
    root = solve(known_problem(nodes), np.array(start), blocks=2, tolerance=1e-12)
    np.testing.assert_allclose(root.unknowns, [0.32, 0.8], atol=0.02)
    assert root.residual < 1e-12


def test_a_discontinuous_equation_ends_below_its_noise():
    """P(g < x) = .7 on nodes: a staircase; derivatives are zero everywhere."""
    nodes = gaussian_blocks(1, 128, BLOCKS, seed=3)[:, 0]

    def evaluate(x, block):
        share = np.mean(nodes[block] < x[0])
        return BlockValues(np.array([0.7 - share]), x.copy(), np.array([[-0.35], [1.0]]))

    root = solve(evaluate, np.array([-1.0]), blocks=BLOCKS, tolerance=1e-12)
    assert 0 <= root.residual <= 1.5 / nodes.size
    assert root.residual < root.residual_noise
    assert abs(root.unknowns[0] - ndtri(0.7)) < 5 * root.quadrature_error[0] + 1 / 128


def test_an_equation_without_root_says_so():
    def evaluate(x, block):
        return BlockValues(np.array([1 + x[0] ** 2]), x.copy(), np.array([[2 * x[0]], [1.0]]))

    root = solve(evaluate, np.array([0.3]), blocks=2, tolerance=1e-10)
    assert root.residual >= 1
    assert root.residual > root.residual_noise


def test_values_that_are_not_finite_are_stepped_over():
    """log x = 1 from a start where a full step leads to negative x."""

    def evaluate(x, block):
        with np.errstate(invalid="ignore", divide="ignore"):
            value, slope = np.log(x[0]) - 1, 1 / x[0]
        return BlockValues(np.array([-value]), x.copy(), np.array([[-slope], [1.0]]))

    root = solve(evaluate, np.array([12.0]), blocks=2, tolerance=1e-12)
    assert root.unknowns[0] == pytest.approx(np.e, rel=1e-10)

    def nowhere(x, block):
        return BlockValues(np.full(1, np.nan), x.copy(), np.full((2, 1), np.nan))

    assert solve(nowhere, np.array([1.0]), blocks=2, tolerance=1e-12).residual == np.inf


def test_every_thread_computes_in_64_bits():
    seen = set()

    def evaluate(x, block):
        seen.add((block, jnp.zeros(()).dtype.name))
        return BlockValues(1 - x, x.copy(), np.array([[-1.0], [1.0]]))

    with jax.enable_x64(True):
        solve(evaluate, np.array([0.5]), blocks=4, tolerance=1e-12)
    assert seen == {(block, "float64") for block in range(4)}
