"""Preconditioned weights: the published table, gradients, power iteration, merging."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from lora_theory.lowrank import (
    Preconditioned,
    gmcn,
    merged,
    precondition,
    refreshed,
    spectral,
    trainable,
)

RNG = np.random.default_rng(0)
TALL, WIDE = (RNG.standard_normal(shape) for shape in [(9, 6), (6, 9)])


def polynomial(x, degree):
    return spectral.preconditioned(np.asarray(x, float), degree=degree, scale=1.0)


# -- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degree", "slope", "nine_tenths", "highest", "gains"),
    [
        (3, 1.507, 0.73, 1.000, (1.20, 1.26)),
        (5, 2.083, 0.55, 1.010, (1.35, 1.46)),
        (7, 2.909, 0.40, 1.019, (1.45, 1.62)),
        (9, 3.625, 0.32, 1.021, (1.46, 1.70)),
    ],
)
def test_the_polynomials_have_the_published_ranges(degree, slope, nine_tenths, highest, gains):
    x = np.linspace(0, 1, 100_001)
    values = polynomial(x, degree)
    assert_allclose(values[1] / x[1], slope, rtol=1e-6)
    assert_allclose(polynomial([1.0], degree), 1, atol=1e-12)
    assert_allclose(x[np.argmax(values >= 0.9)], nine_tenths, atol=0.006)
    assert_allclose(values.max(), highest, atol=6e-4)
    assert np.all(values >= x - 1e-12)  # no singular value is lowered
    for rows in (128, 512):  # of Gaussian matrices, the norm grows
        s = np.linalg.svd(np.random.default_rng(1).standard_normal((rows, 128)), compute_uv=False)
        gain = np.linalg.norm(spectral.preconditioned(s, degree=degree)) / np.linalg.norm(s)
        assert gains[0] < gain < gains[1]


def test_beyond_the_estimated_norm_the_polynomials_explode():
    assert_allclose(
        [*polynomial([1.05, 1.2, 1.5], 9), *polynomial([1.5], 7)],
        [0.996, 1.25, 15.5, -2.7],
        rtol=0.03,
    )


# -- what acts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "degree"), [(TALL, 9), (WIDE, 5)])
def test_effective_weights_and_merging(weight, degree):
    U, s, Vt = np.linalg.svd(weight, full_matrices=False)
    gain, inputs = 0.7, np.random.default_rng(2).standard_normal((4, weight.shape[1]))
    with jax.enable_x64(True):
        module = precondition(jnp.asarray(weight), degree=degree, gain=gain, rounds=2000)
        outputs, plain = module(jnp.asarray(inputs)), module.merge()
    coefficients = {5: [2.083, -1.643, 0.560], 9: [3.625, -9.261, 14.097, -10.351, 2.890]}
    x = s / s[0]
    lifted = gain * s[0] * sum(c * x ** (2 * i + 1) for i, c in enumerate(coefficients[degree]))
    assert_allclose(plain, U * lifted @ Vt, atol=1e-6)
    assert_allclose(outputs, inputs @ np.asarray(plain).T, atol=1e-12)


def loss(module, target):
    return jnp.sum(target * jnp.tanh(module.effective))


@pytest.mark.parametrize(("weight", "degree"), [(TALL, 9), (WIDE, 7), (WIDE, 1)])
def test_gradients_are_those_of_differences_with_the_outer_norm_held(weight, degree):
    """σ̂ = uᵀWv follows W inside the polynomial, and neither outside nor through u and v."""
    target = np.random.default_rng(3).standard_normal(weight.shape)
    with jax.enable_x64(True):
        module = precondition(jnp.asarray(weight), degree=degree, gain=1.3)
        found = jax.grad(loss)(module, jnp.asarray(target))
        u, v = np.asarray(module.left), np.asarray(module.right)
        outside = float(module.scale)

    def by_decomposition(W, gain=1.3, outer=outside):
        U, s, Vt = np.linalg.svd(W / (u @ W @ v + 1e-7), full_matrices=False)
        return np.sum(target * np.tanh(gain * outer * U * polynomial(s, degree) @ Vt))

    step, differences = 1e-6, np.zeros_like(weight)
    for i, j in np.ndindex(weight.shape):
        change = np.zeros_like(weight)
        change[i, j] = step
        differences[i, j] = by_decomposition(weight + change) - by_decomposition(weight - change)
    assert_allclose(found.weight, differences / (2 * step), atol=1e-7)
    gains = by_decomposition(weight, 1.3 + step) - by_decomposition(weight, 1.3 - step)
    assert_allclose(found.gain, gains / (2 * step), rtol=1e-7)
    assert not np.any(found.left)
    assert not np.any(found.right)

    def radial(gradient):
        return np.sum(weight * gradient) / np.linalg.norm(weight) / np.linalg.norm(gradient)

    assert abs(radial(np.asarray(found.weight))) < 1e-6
    # had the outer norm been differentiated too, the gradient would move the norm
    outer = by_decomposition(weight, outer=outside + step) - by_decomposition(
        weight, outer=outside - step
    )
    other = np.asarray(found.weight) + np.outer(u, v) * outer / (2 * step)
    assert abs(radial(other)) > 1e-3


# -- power iteration ---------------------------------------------------------------------------


def test_ten_rounds_from_random_vectors_and_more():
    W = np.random.default_rng(4).standard_normal((128, 128))
    largest = np.linalg.svd(W, compute_uv=False)[0]
    module = precondition(jnp.asarray(W, jnp.float32))
    assert 0.93 < float(module.scale) / largest < 0.995
    assert float(refreshed(module, 1000).scale) / largest == pytest.approx(1, abs=1e-5)
    assert_allclose(np.linalg.norm(module.left), 1, atol=1e-6)
    assert_allclose(np.linalg.norm(module.right), 1, atol=1e-6)


def test_a_warm_start_follows_weights_that_move_and_forgotten_updates_explode():
    rng = np.random.default_rng(5)
    W, drift = (jnp.asarray(rng.standard_normal((9, 6)), jnp.float32) for _ in range(2))
    forgotten = followed = precondition(W, rounds=50)
    step = jax.jit(lambda module, W: refreshed(eqx.tree_at(lambda m: m.weight, module, W), 2))
    for i in range(60):
        moved = W + 0.05 * (i + 1) * drift
        followed = step(followed, moved)
    forgotten = eqx.tree_at(lambda m: m.weight, forgotten, moved)
    largest = np.linalg.svd(moved, compute_uv=False)[0]
    assert float(followed.scale) / largest > 0.97
    assert np.linalg.norm(followed.effective, 2) < 1.1 * largest
    assert float(forgotten.scale) / largest < 0.7
    assert np.linalg.norm(forgotten.effective, 2) > 10 * largest


def test_zero_weights_have_zero_effect_and_recover():
    module = precondition(jnp.zeros((9, 6)))
    assert not np.any(module.effective)
    grown = refreshed(eqx.tree_at(lambda m: m.weight, module, jnp.ones((9, 6))))
    assert_allclose(grown.effective, 1, rtol=1e-5)


def test_a_stack_half_precision_and_types():
    stack = jnp.asarray(np.random.default_rng(6).standard_normal((3, 9, 6)), jnp.float32)
    modules = eqx.filter_vmap(lambda W: precondition(W, rounds=30))(stack)
    together = eqx.filter_vmap(lambda module: module.effective)(modules)
    assert_allclose(together[1], precondition(stack[1], rounds=30).effective, rtol=1e-5, atol=1e-6)
    half = precondition(stack[1].astype(jnp.bfloat16))
    assert half.effective.dtype == half.weight.dtype == jnp.bfloat16
    assert half.left.dtype == half.gain.dtype == jnp.float32


# -- in a model --------------------------------------------------------------------------------


def test_a_model_is_trained_and_merged_with_the_same_outputs():
    """Regression on a teacher with a weak direction; AdamW's decay leaves u and v alone."""
    rng = np.random.default_rng(7)
    teacher = jnp.asarray(rng.standard_normal((6, 9)), jnp.float32)
    inputs = jnp.asarray(rng.standard_normal((64, 9)), jnp.float32)
    targets = inputs @ teacher.T
    start = jnp.asarray(rng.standard_normal((6, 9)), jnp.float32)
    model = {"head": precondition(start, degree=5), "shift": jnp.zeros(6)}

    def error(model):
        return jnp.mean((model["head"](inputs) + model["shift"] - targets) ** 2)

    optimizer = optax.adamw(0.05, weight_decay=0.1, mask=trainable)
    optimizer = optax.masked(optimizer, trainable(model))

    @jax.jit
    def step(model, state):
        updates, state = optimizer.update(jax.grad(error)(model), state, model)
        return refreshed(optax.apply_updates(model, updates)), state, updates["head"]

    state, first = optimizer.init(model), float(error(model))
    for _ in range(200):
        model, state, updates = step(model, state)
    assert np.any(updates.weight)
    assert not np.any(updates.left)
    assert not np.any(updates.right)
    assert float(error(model)) < 0.1 * first
    plain = merged(model)
    assert isinstance(model["head"], Preconditioned)
    assert isinstance(plain["head"], jax.Array)
    assert_allclose(
        inputs @ plain["head"].T, model["head"](inputs), atol=1e-6 * np.abs(targets).max()
    )
    assert_array_equal(plain["shift"], model["shift"])


def test_condition_metric():
    first, second = np.diag([8.0, 2.0]), np.diag(np.arange(30.0, 0, -1))
    assert gmcn([first]) == pytest.approx(4)
    assert gmcn([second]) == pytest.approx(30 / 2)  # of 3, 2, 1
    assert gmcn([second], fraction=0.5) == pytest.approx(30 / 8)
    assert gmcn([first, second]) == pytest.approx(np.sqrt(60))
    assert gmcn([np.ones((2, 2))]) > 1e15
    weight = np.random.default_rng(8).standard_normal((128, 128))
    module = precondition(jnp.asarray(weight, jnp.float32), rounds=300)
    # the smallest singular values, where g is nearly linear, gain by its slope and no more
    assert 0.95 * 3.625 < gmcn([weight]) / gmcn([module]) < 3.625
