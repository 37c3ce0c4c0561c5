"""Polar factors and odd polynomials against decompositions, published numbers and plain numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from lora_theory.lowrank import polar_factor, spectral
from lora_theory.lowrank.polynomials import (
    PRECONDITIONING,
    of_matrix,
    of_numbers,
    polar_polynomials,
    polar_slope,
)

METHODS = ["svd", "newton_schulz", "polar_express"]
TWO_METHODS = ["svd", "polar_express"]  # where the polynomials make no difference


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def exact_polar(W: np.ndarray) -> np.ndarray:
    """W(WᵀW)^{-½}, by the eigenvalues of the smaller Gram matrix."""
    if W.shape[0] < W.shape[1]:
        return exact_polar(W.T).T
    values, vectors = np.linalg.eigh(W.T @ W)
    return W @ (vectors / np.sqrt(values)) @ vectors.T


def cosine(A: np.ndarray, B: np.ndarray) -> float:
    return float(np.sum(A * B) / np.linalg.norm(A) / np.linalg.norm(B))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(20, 20), (30, 12), (1, 7)])
def test_polar_factor_by_every_method(method, shape):
    W = random(*shape)
    with jax.enable_x64(True):
        assert_allclose(polar_factor(jnp.asarray(W), method=method), exact_polar(W), atol=1e-6)


@pytest.mark.parametrize("method", TWO_METHODS)
def test_polar_factor_of_a_wide_matrix_in_single_precision(method):
    W = random(12, 30)
    single = polar_factor(jnp.asarray(W, jnp.float32), method=method)
    assert single.dtype == jnp.float32
    assert_allclose(single, exact_polar(W), atol=2e-5)


@pytest.mark.parametrize("method", TWO_METHODS)
def test_five_newton_schulz_steps_are_no_polar_factor(method):
    """cos(W, polar(W)) = 8/(3π) = .849 for a large square Gaussian W, and .995 after five steps."""
    W = random(128, 128)
    factor = np.asarray(polar_factor(jnp.asarray(W), method=method))
    assert abs(cosine(W, factor) - 8 / (3 * np.pi)) < 0.005
    few = np.asarray(polar_factor(jnp.asarray(W), method="newton_schulz", steps=5))
    assert cosine(W, few) == pytest.approx(0.995, abs=0.001)
    ten = np.asarray(polar_factor(jnp.asarray(W), method="newton_schulz", steps=10))
    assert cosine(W, ten) == pytest.approx(0.893, abs=0.004)
    seven = np.asarray(polar_factor(jnp.asarray(W), method="polar_express", steps=7))
    assert cosine(factor, seven) > 0.999 > 0.98 > cosine(factor, ten)


@pytest.mark.parametrize("method", ["newton_schulz", "polar_express"])
def test_iterations_grow_no_singular_value_beyond_their_slope_and_none_below_zero(method):
    start = np.concatenate([[0.0], np.geomspace(1e-8, 1, 200_001)])
    polynomials, values = polar_polynomials(method, None), start
    for count, polynomial in enumerate(polynomials, 1):
        values = of_numbers(values, polynomial)
        assert np.all(values >= 0)
        assert np.all(values <= polar_slope(polynomials[:count]) * start * (1 + 1e-12))
    assert_allclose(values[start >= 1e-5], 1, atol=1e-6)
    assert values[1] < 0.01


@pytest.mark.parametrize("method", METHODS)
def test_spectral_function_of_the_polar_factor(method):
    W, steps = random(9, 6), None if method == "svd" else 6
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    s[-1] = 1e-3
    expected = spectral.polar(s, method=method, steps=steps)
    with jax.enable_x64(True):
        found = polar_factor(jnp.asarray(U * s @ Vt), method=method, steps=steps)
    assert_allclose(U.T @ np.asarray(found) @ Vt.T, np.diag(expected), atol=1e-12)


def test_spectral_functions_are_traced_and_differentiated():
    s = np.array([2.0, 0.3, 0.7])
    for function in (
        lambda s: spectral.decayed(s, 0.5),
        lambda s: spectral.decayed(s, 0.5, method="polar_express", steps=7),
        lambda s: spectral.preconditioned(s, degree=7, gain=0.8),
        lambda s: spectral.truncated(s, 2),
    ):
        with jax.enable_x64(True):
            traced = jax.jit(lambda s, f=function: (f(s), jax.jacobian(f)(s)))
            values, slopes = traced(jnp.asarray(s))
        assert_allclose(values, function(s), rtol=1e-12)
        changes = [function(s + 1e-6 * e) - function(s - 1e-6 * e) for e in np.eye(3)]
        assert_allclose(slopes.T, np.array(changes) / 2e-6, atol=1e-7)
        assert isinstance(function(s), np.ndarray)


@pytest.mark.parametrize("method", TWO_METHODS)
def test_zeros_stay_zeros(method):
    W = random(8, 3) @ random(3, 5, seed=1)
    with jax.enable_x64(True):
        factor = np.asarray(polar_factor(jnp.asarray(W), method=method))
        assert not np.any(polar_factor(jnp.zeros((3, 4)), method=method))
    assert_allclose(np.linalg.svd(factor)[1], [1, 1, 1, 0, 0], atol=1e-6)


@pytest.mark.parametrize("method", TWO_METHODS)
def test_stacks_scales_jit_and_half_precision(method):
    stack = jnp.asarray(random(2, 3, 6, 4))

    def call(W):
        return polar_factor(W, method=method)

    one_by_one = np.array([[call(W) for W in row] for row in stack])
    assert_allclose(call(stack), one_by_one, atol=1e-5)
    assert_allclose(jax.jit(jax.vmap(call))(stack), one_by_one, atol=1e-5)
    for scale in (1e-30, 1e30):
        assert_allclose(call(scale * stack), one_by_one, atol=2e-5)
    half = call(stack.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert_allclose(half.astype(jnp.float32), one_by_one, atol=0.05)


@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7)])
@pytest.mark.parametrize("degree", [3, 9])
def test_polynomial_of_a_matrix_acts_on_its_singular_values(shape, degree):
    W = random(*shape)
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    coefficients = PRECONDITIONING[degree]
    powers = sum(c * s ** (2 * i + 1) for i, c in enumerate(coefficients))
    with jax.enable_x64(True):
        found = jax.jit(lambda W: of_matrix(W, coefficients))(jnp.asarray(W))
    assert_allclose(found, U * powers @ Vt, rtol=1e-9)
    assert_allclose(of_numbers(s, coefficients), powers, rtol=1e-11)
