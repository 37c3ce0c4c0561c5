"""Batched linear algebra and minimisation against NumPy and known minima."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_theory.compilation import quickly_compiled
from lora_theory.theory.newton import (
    Expansion,
    inverse_trace,
    minimise,
    solve_positive_definite,
)


def positive_definite(size: int, count: int = 40) -> np.ndarray:
    """Random matrices, (count, size, size)."""
    factor = np.random.default_rng(size).standard_normal((count, size, size))
    return factor @ factor.swapaxes(1, 2) + 0.1 * np.eye(size)


def nodes_last(array: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(array, 0, -1))


@pytest.mark.parametrize("size", [1, 2, 5, 14])
def test_linear_systems(size):
    matrix = positive_definite(size)
    right = np.random.default_rng(size + 100).standard_normal((40, size))
    indefinite = matrix - 1.01 * np.linalg.eigvalsh(matrix)[:, :1, None] * np.eye(size)
    with jax.enable_x64(True):
        solver = quickly_compiled()(partial(solve_positive_definite, instead=np.nan))
        solution = solver(nodes_last(matrix), nodes_last(right))
        none = solver(nodes_last(indefinite), nodes_last(right))
    expected = np.linalg.solve(matrix, right[..., None])[..., 0]
    np.testing.assert_allclose(np.moveaxis(np.asarray(solution), -1, 0), expected, rtol=1e-8)
    assert np.all(np.isnan(none[0])), "not positive definite"


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_trace_of_the_inverse(size):
    matrix = positive_definite(size)
    with jax.enable_x64(True):
        trace = np.asarray(quickly_compiled()(inverse_trace)(nodes_last(matrix)))
    np.testing.assert_allclose(trace, np.trace(np.linalg.inv(matrix), axis1=1, axis2=2), rtol=1e-9)
    if size > 1:
        diagonal = np.sum(1 / np.diagonal(matrix, axis1=1, axis2=2), axis=1)
        assert np.all(trace > diagonal * (1 + 1e-6)), "the off-diagonal entries matter"


def valley(x: jax.Array, height: jax.Array) -> Expansion:
    """Rosenbrock's."""
    a, b = x[1] - x[0] ** 2, 1 - x[0]
    gradient = jnp.stack([-4 * height * a * x[0] - 2 * b, 2 * height * a])
    cross = -4 * height * x[0]
    corner = -4 * height * a + 8 * height * x[0] ** 2 + 2
    hessian = jnp.stack([jnp.stack([corner, cross]), jnp.stack([cross, 2 * height])])
    return Expansion(height * a**2 + b**2, gradient, hessian)


def well(x: jax.Array, tilt: jax.Array) -> Expansion:
    """A double well per coordinate of a single one."""
    value = jnp.sum((x**2 - 1) ** 2 + tilt * x, 0)
    return Expansion(value, 4 * x * (x**2 - 1) + tilt, (12 * x**2 - 4)[None])


def test_minimise_descends_to_known_minima():
    """A valley on 300 nodes at once, from starts near and far; and a double well."""
    starts = 3 * np.random.default_rng(5).standard_normal((2, 300))
    with jax.enable_x64(True):
        run = partial(minimise, curvature=jnp.asarray(1.0), tolerance=1e-9, max_steps=200)
        everywhere = jnp.ones(300, bool)
        points, values = run(valley, jnp.asarray(starts), (jnp.full(300, 10.0),), wanted=everywhere)
        np.testing.assert_allclose(points, 1.0, rtol=1e-9)
        np.testing.assert_allclose(values, 0.0, atol=1e-15)
        sides, tilt = jnp.asarray([[-0.9, -2.0, 0.9, 2.0]]), jnp.full((1, 4), 0.2)
        points, values = run(well, sides, (tilt,), wanted=everywhere[:4])
        np.testing.assert_array_equal(np.sign(points), np.sign(sides))
        np.testing.assert_allclose(4 * points * (points**2 - 1) + 0.2, 0, atol=1e-12)
        np.testing.assert_allclose(values, well(points, tilt).value, rtol=1e-14)
        assert np.all(np.asarray(values)[:2] < np.asarray(values)[2:] - 0.1)


def test_slow_nodes_are_finished_in_groups():
    """1,200 nodes of which any share is slow, or wanted: these arrive, the others stay."""
    rng = np.random.default_rng(6)
    with jax.enable_x64(True):

        @jax.jit
        def run(starts, wanted):
            data, curvature, ends = (jnp.full(1200, 10.0),), jnp.asarray(1.0), (1e-9, 3000)
            return minimise(
                valley, starts, data, curvature,
                wanted=wanted, tolerance=ends[0], max_steps=ends[1],
            )  # fmt: skip

        for share in (0.0, 0.01, 0.5, 1.0):
            far = rng.random(1200) < share
            starts = 1.01 + far * 30 * rng.standard_normal((2, 1200))
            wanted = rng.random(1200) < rng.choice([0.03, 0.5, 1.1])
            points, values = map(np.asarray, run(jnp.asarray(starts), jnp.asarray(wanted)))
            np.testing.assert_allclose(points[:, wanted], 1.0, rtol=1e-9)
            np.testing.assert_array_equal(points[:, ~wanted], starts[:, ~wanted])
            np.testing.assert_allclose(values[wanted], 0.0, atol=1e-15)
            assert np.all(values[~wanted] == np.inf)
