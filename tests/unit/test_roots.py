"""Roots of averaged equations with known answers; the quadrature error covers what it should."""

from collections.abc import Callable, Iterable

import numpy as np
import pytest
from scipy.special import ndtri
from scipy.stats import binom, t

from lora_theory.theory.averages import Averages, BlockValues, Equations
from lora_theory.theory.nodes import gaussian_blocks
from lora_theory.theory.roots import Root, first_good, refine, solve, with_jumps

BLOCKS = 8
#: x0 = .32 + p, x1 = √(2 x0); observables x0 + x1 E g² and x1 E exp(g/2), at p = 0.
EXACT = np.array([0.32 + 0.8, 0.8 * np.exp(1 / 8)])


class Explicit(Equations):
    """Equations without minima: residuals, observables and Jacobian of a chunk by one function."""

    def __init__(self, evaluate: Callable) -> None:
        self.evaluate = evaluate

    def values(self, unknowns, chunk, minima):
        residual, observables, jacobian = map(np.asarray, self.evaluate(unknowns, chunk))
        return BlockValues(residual[None], observables[None], jacobian)


def explicit(evaluate: Callable, blocks: Iterable) -> Averages:
    """Averages of ``evaluate(unknowns, block)``, one chunk per block."""
    chunks = list(blocks)
    return Averages(Explicit(evaluate), chunks, len(chunks))


def known_problem(nodes: np.ndarray, parameters: np.ndarray | float = 0.0) -> Averages:
    """E exp(.8 g1 + p) = exp(x0) and E cos(x1 g2) = exp(−x0), with exact derivatives."""

    def evaluate(x, block):
        (g1, g2), parameter = block
        level = np.exp(0.8 * g1 + parameter - x[0]).mean()
        wave = np.cos(x[1] * g2).mean() * np.exp(x[0])
        bend = (-g2 * np.sin(x[1] * g2)).mean() * np.exp(x[0])
        square, growth = (g1**2).mean(), np.exp(g2 / 2).mean()
        return (
            [level - 1, wave - 1],
            [x[0] + square * x[1], growth * x[1]],
            [[-level, 0], [wave, bend], [1, square], [0, growth]],
        )

    return explicit(evaluate, zip(nodes, np.broadcast_to(parameters, len(nodes)), strict=True))


def solved(seed: int, parameter_error: float = 0.0, scattered: bool = True) -> Root:
    """With a parameter that is wrong by chance in every block, or by their mean in all of them."""
    nodes = gaussian_blocks(2, 64, BLOCKS, seed)
    parameters = parameter_error * np.random.default_rng(seed).standard_normal(BLOCKS)
    problem = known_problem(nodes, parameters if scattered else parameters.mean())
    return solve(problem, np.array([0.0, 0.5]), tolerance=1e-12)


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


def test_errors_cover_parameters_that_scatter_over_the_blocks():
    """As the roots of stage one do in stage two; one wrong value for all blocks is not seen."""
    for z in scores(200, parameter_error=0.05):
        for level in (0.5, 0.9):
            assert coverage_is_right(z, level)
    for z in scores(200, parameter_error=0.05, scattered=False):
        assert not coverage_is_right(z, 0.5)


def test_block_values_are_the_roots_of_the_single_blocks():
    """One Newton step per block: exact up to second order in the distance of the roots."""
    distances: dict[str, list] = {"observables": [], "unknowns": []}
    for count in (64, 1024):
        nodes = gaussian_blocks(2, count, 4, seed=1)
        union = solve(known_problem(nodes), np.array([0.0, 0.5]), tolerance=1e-12)
        for block in range(4):
            alone = solve(known_problem(nodes[[block]]), np.array([0.0, 0.5]), tolerance=1e-12)
            for name, rows in distances.items():
                own, joint = getattr(alone, name), getattr(union, name)
                gap = np.abs(own - getattr(union, f"block_{name}")[block]).max()
                rows.append((gap, np.abs(own - joint).max()))
            np.testing.assert_array_equal(alone.quadrature_error, 0)
    for name, factor in (("observables", 2), ("unknowns", 5)):
        gaps, sizes = np.array(distances[name]).T
        assert np.all(gaps < factor * sizes**2 + 1e-10), name


@pytest.mark.parametrize("coarse", [1, 2])
@pytest.mark.parametrize("start", [[0.0, 0.5], [5.0, 0.1], [1.0, 1.5], [20.0, 1.0]])
def test_far_starts_end_at_the_same_root(start, coarse):
    nodes = gaussian_blocks(2, 256, 2, seed=2)
    root = solve(known_problem(nodes), np.array(start), tolerance=1e-12, coarse=coarse)
    np.testing.assert_allclose(root.unknowns, [0.32, 0.8], atol=0.02)
    assert root.residual < 1e-12


def test_a_discontinuous_equation_ends_below_its_noise():
    """P(g < x) = .7 on nodes: a staircase; derivatives are zero everywhere."""
    nodes = gaussian_blocks(1, 128, BLOCKS, seed=3)[:, 0]

    def evaluate(x, block):
        return [0.7 - np.mean(block < x[0])], x, [[-0.35], [1.0]]

    root = solve(explicit(evaluate, nodes), np.array([-1.0]), tolerance=1e-12)
    assert 0 <= root.residual <= 1.5 / nodes.size
    assert root.residual < root.residual_noise
    assert abs(root.unknowns[0] - ndtri(0.7)) < 5 * root.quadrature_error[0] + 1 / 128


def ending(residual, noise=0.0):
    """A root of which only the residual and its noise matter."""
    return Root(np.zeros(1), np.zeros((1, 1)), residual, noise, np.ones(1), np.ones((1, 1)))


@pytest.mark.parametrize(("residuals", "taken", "tried"), [
    ([1e-12, 1e-13], 1e-12, 1), ([0.3, 1e-12, 0.1], 1e-12, 2), ([0.3, 0.2, 0.5], 0.2, 3),
])  # fmt: skip
def test_ways_to_a_root_are_tried_until_one_is_good(residuals, taken, tried):
    asked = []

    def ways():
        for residual in residuals:
            asked.append(residual)
            yield ending(residual)

    assert first_good(ways(), 1e-10).residual == taken
    assert len(asked) == tried


def test_a_root_that_ends_at_jumps_is_taken_though_another_point_has_less_residual():
    smooth, at_jumps = ending(0.015, 0.010), ending(0.018, 0.019)
    assert first_good([smooth, at_jumps], 1e-10) is at_jumps


def test_a_curved_valley_is_left():
    """s² = c + (1 − m)², m = .996: from a point in the valley every part of a step climbs."""
    c, start = 1e-6, np.array([np.log(0.012), 0.988])

    def evaluate(x, block):
        square, off = np.exp(2 * x[0]), 1 - x[1]
        growth = (c + off**2) / square
        return [growth - 1, 0.996 - x[1]], x, [
            [-2 * growth, -2 * off / square], [0, -1], [1, 0], [0, 1],
        ]  # fmt: skip

    root = refine(explicit(evaluate, range(2)), start, tolerance=1e-10)
    np.testing.assert_allclose(root.unknowns, [0.5 * np.log(c + 0.004**2), 0.996], rtol=1e-9)


def test_an_equation_without_root_says_so():
    def evaluate(x, block):
        return [1 + x[0] ** 2], x, [[2 * x[0]], [1.0]]

    root = solve(explicit(evaluate, range(2)), np.array([0.3]), tolerance=1e-10)
    assert root.residual >= 1
    assert root.residual > root.residual_noise


def test_values_that_are_not_finite_are_stepped_over():
    """log x = 1 from a start where a full step leads to negative x."""

    def evaluate(x, block):
        with np.errstate(invalid="ignore", divide="ignore"):
            value, slope = np.log(x[0]) - 1, 1 / x[0]
        return [-value], x, [[-slope], [1.0]]

    root = solve(explicit(evaluate, range(2)), np.array([12.0]), tolerance=1e-12)
    assert root.unknowns[0] == pytest.approx(np.e, rel=1e-10)

    def nowhere(x, block):
        return [np.nan], x, [[np.nan], [np.nan]]

    nothing = solve(explicit(nowhere, range(2)), np.array([1.0]), tolerance=1e-12)
    assert nothing.residual == np.inf


def test_a_root_that_repels_the_iteration_is_found_by_a_change_of_sign():
    """−x³/3 + x − 2 and y = x²: the damped steps run away, and Newton's to a maximum below zero."""

    def evaluate(x, block):
        first, second = -(x[0] ** 3) / 3 + x[0] - 2, x[1] - x[0] ** 2
        return [first, second], x, [[1 - x[0] ** 2, 0], [-2 * x[0], 1], [1, 0], [0, 1]]

    problem, start = explicit(evaluate, range(2)), np.array([3.0, 1.0])

    def upwards(residual):
        return np.array([0.5, -0.5]) * np.clip(residual, -1, 1) + np.array([0.5, 0.0])

    lost = solve(problem, start, tolerance=1e-12, relaxation=upwards)
    assert lost.residual > 0.1
    grid = np.arange(-6.0, 5.0)
    root = solve(problem, start, tolerance=1e-12, relaxation=upwards, grid=grid)
    assert root.residual < 1e-12
    exact = np.roots([-1 / 3, 0, 1, -2]).real.min()
    np.testing.assert_allclose(root.unknowns, [exact, exact**2], rtol=1e-10)


def test_errors_know_of_jumps_that_the_jacobian_does_not_see():
    """x = 2(P(g < x) − 1/2) at x = 0: on nodes its slope is 1, of the mean 1 − 2/√(2π) = .2."""

    def evaluate(x, block):
        return [x[0] - 2 * ((block < x[0]).mean() - 0.5)], x, [[1.0], [1.0]]

    found, plain, stated = [], [], []
    for seed in range(30):
        nodes = np.random.default_rng(seed).standard_normal((BLOCKS, 2000))
        averages = explicit(evaluate, nodes)
        root = solve(averages, np.array([0.3]), tolerance=1e-10)
        found.append(root.unknowns[0])
        plain.append(root.quadrature_error[0])
        stated.append(with_jumps(averages, root).quadrature_error[0])
    scatter = np.std(found, ddof=1)
    assert 0.5 < np.mean(stated) / scatter < 2
    assert np.mean(plain) / scatter < 0.4
