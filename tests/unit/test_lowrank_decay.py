"""Low-rank decay: the optimality of the proximal step, signs, step sizes, masks, schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from lora_theory.lowrank import low_rank_decay, shrink, spectral

METHODS = ["svd", "newton_schulz", "polar_express"]
TWO_METHODS = ["svd", "polar_express"]  # where the polynomials make no difference
SHAPES = [(8, 8), (12, 5), (5, 12)]


def matrix_with(values, shape, seed=0):
    """A matrix of these singular values, and its singular vectors."""
    rng = np.random.default_rng(seed)
    U = np.linalg.qr(rng.standard_normal((shape[0], len(values))))[0]
    V = np.linalg.qr(rng.standard_normal((shape[1], len(values))))[0]
    return U * values @ V.T, U, V


VALUES = np.array([3.0, 1.0, 0.5, 0.2, 0.05])


# -- one step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_exact_step_satisfies_the_optimality_condition_of_the_nuclear_norm(shape):
    """X minimises ½‖X − W‖² + τ‖X‖_* iff G = (W − X)/τ has ‖G‖₂ ≤ 1 and ⟨G, X⟩ = ‖X‖_*."""
    W = np.random.default_rng(1).standard_normal(shape)
    step = float(np.median(np.linalg.svd(W, compute_uv=False)))
    with jax.enable_x64(True):
        X = np.asarray(shrink(jnp.asarray(W), step))
    gradient = (W - X) / step
    assert np.linalg.norm(gradient, 2) <= 1 + 1e-12
    assert_allclose(np.sum(gradient * X), np.linalg.norm(X, "nuc"), rtol=1e-12)
    smaller = np.linalg.matrix_rank(X)
    assert 0 < smaller < min(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_large_singular_values_fall_by_the_step_and_none_changes_sign(shape, method):
    W, U, V = matrix_with(VALUES, shape)
    for step in (1e-3, 0.05, 0.2, 0.7, 10.0):
        with jax.enable_x64(True):
            after = U.T @ np.asarray(shrink(jnp.asarray(W), step, method=method)) @ V
        left = np.diag(after)
        assert_allclose(after, np.diag(left), atol=1e-10)
        assert np.all(left > -1e-12)
        exact = np.maximum(VALUES - step, 0)
        # the iterations round the corner at σ = step, by less than a quarter of the step
        assert_allclose(left, exact, atol=1e-12 if method == "svd" else 0.25 * step)
        far = np.abs(np.log(VALUES / step * 1.6)) > 1.9  # above 4 steps or below a tenth of one
        assert_allclose(left[far], exact[far], atol=3e-3 * step)
        assert np.all(left <= VALUES * (1 + 1e-12))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("clip", [True, False])
def test_the_spectral_function_is_what_happens_to_the_singular_values(method, clip):
    W, U, V = matrix_with(VALUES, (7, 6))
    steps = None if method == "svd" else 7
    with jax.enable_x64(True):
        after = shrink(jnp.asarray(W), 0.3, method=method, steps=steps, clip=clip)
    expected = spectral.decayed(VALUES, 0.3, method=method, steps=steps, clip=clip)
    assert_allclose(U.T @ np.asarray(after) @ V, np.diag(expected), atol=1e-9)
    assert np.any(expected < 0) == (not clip)


def test_five_steps_of_newton_schulz_mostly_rescale():
    """The published number of steps is nearly weight decay; the polar factor is not."""
    W = np.random.default_rng(0).standard_normal((128, 128))
    few, many = (
        W - np.asarray(shrink(jnp.asarray(W), 0.5, method="newton_schulz", steps=K, clip=False))
        for K in (5, 32)
    )
    cosines = [np.sum(W * d) / np.linalg.norm(W) / np.linalg.norm(d) for d in (few, many)]
    assert_allclose(cosines, [0.995, 0.848], atol=0.002)


@pytest.mark.parametrize("method", TWO_METHODS)
def test_without_a_gradient_weights_end_at_zero_and_unclipped_ones_swing_across_it(method):
    W, U, V = matrix_with(np.array([0.31, 0.17, 0.045]), (6, 4))

    def run(clip):
        def decay(matrix, _):
            after = shrink(matrix, 0.02, method=method, clip=clip)
            return after, jnp.diag(U.T @ after @ V)

        return np.asarray(jax.lax.scan(decay, jnp.asarray(W), length=40)[1])

    with jax.enable_x64(True):
        clipped, swinging = run(True), run(False)
    assert np.all(clipped > -1e-12)
    assert_allclose(clipped[-1], 0, atol=1e-9)
    assert np.all(swinging[-2:].min(axis=0) < -1e-3)
    assert np.all(swinging[-2:].max(axis=0) > 1e-3)


@pytest.mark.parametrize("method", TWO_METHODS)
def test_a_stack_and_half_precision_and_nothing(method):
    stack = jnp.asarray(np.random.default_rng(2).standard_normal((3, 6, 4)))
    sizes = jnp.array([0.1, 0.5, 2.0])
    one_by_one = [shrink(W, float(t), method=method) for W, t in zip(stack, sizes, strict=True)]
    traced = jax.jit(jax.vmap(lambda W, t: shrink(W, t, method=method)))(stack, sizes)
    assert_allclose(traced, one_by_one, atol=1e-5)
    half = shrink(stack.astype(jnp.float16), sizes, method=method)
    assert half.dtype == jnp.float16
    assert_allclose(half, one_by_one, atol=5e-3)
    assert_allclose(shrink(stack[0], 0.0, method=method), stack[0], atol=1e-5)
    assert not np.any(shrink(jnp.zeros((6, 4)), 0.5, method=method))


# -- the transformation ------------------------------------------------------------------------


def singular_values(W):
    return np.linalg.svd(np.asarray(W, float), compute_uv=False)


def trained(optimizer, weights, gradients, count=1):
    state = optimizer.init(weights)
    for _ in range(count):
        updates, state = optimizer.update(gradients, state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights


W, U, V = matrix_with(VALUES, (7, 6))
TREE = {
    "query": jnp.asarray(W, jnp.float32),
    "bias": jnp.ones(3),
    "heads": jnp.asarray(np.stack([W, 2 * W]), jnp.float32),
    "absent": None,
}
FLAT = jax.tree.map(jnp.zeros_like, TREE)
RATIO = np.linalg.norm(W) / np.sqrt(5)


@pytest.mark.parametrize("method", TWO_METHODS)
@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({}, 0.01),
        ({"learning_rate": 0.1}, 0.001),
        ({"learning_rate": 0.1, "adaptive": True}, 0.001 * RATIO),
    ],
)
def test_step_sizes(method, options, step):
    """Only what has two axes decays, by λ, ηλ or ηλ‖W‖_F/√rank."""
    with jax.enable_x64(True):
        tree = {"query": jnp.asarray(W), "bias": jnp.ones(3)}
        zeros = jax.tree.map(jnp.zeros_like, tree)
        # W is of rank 5: its sixth singular value is rounding
        after = trained(low_rank_decay(0.01, method=method, **options), tree, zeros)
        found = np.diag(U.T @ after["query"] @ V)
    assert_allclose(VALUES[:4] - found[:4], step, rtol=1e-3 if method != "svd" else 1e-9)
    assert_array_equal(after["bias"], 1)


def test_it_acts_on_the_weights_after_the_update():
    """The proximal gradient step, and not a sum of two: the order matters by first order."""
    gradient = jnp.asarray(np.random.default_rng(3).standard_normal(W.shape), jnp.float32)
    tree, gradients = {"w": TREE["query"]}, {"w": gradient}
    optimizer = optax.chain(optax.sgd(0.3), low_rank_decay(0.1))
    after = jax.jit(lambda: trained(optimizer, tree, gradients))()["w"]
    moved = np.asarray(tree["w"] - 0.3 * gradient, float)
    left, s, right = np.linalg.svd(moved, full_matrices=False)
    assert_allclose(after, left * np.maximum(s - 0.1, 0) @ right, atol=1e-5)
    before = np.asarray(shrink(tree["w"], 0.1)) - 0.3 * np.asarray(gradient)
    assert np.abs(after - before).max() > 0.01


def test_schedules_are_read_at_the_count_of_steps():
    decay = low_rank_decay(
        lambda count: jnp.where(count < 2, 0.02, 0.0), learning_rate=lambda count: 1.0 + count
    )
    total = 0.02 * 1 + 0.02 * 2
    after = trained(decay, {"w": TREE["query"]}, {"w": FLAT["query"]}, count=5)
    assert_allclose(singular_values(after["w"])[:4], VALUES[:4] - total, atol=1e-5)


def test_the_strength_may_be_a_hyperparameter_of_the_state():
    decay = optax.inject_hyperparams(low_rank_decay)(strength=0.02)
    after = jax.jit(lambda: trained(decay, {"w": TREE["query"]}, {"w": FLAT["query"]}, count=2))()
    assert_allclose(singular_values(after["w"])[:5], VALUES - 0.04, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "decayed"),
    [
        (None, {"query"}),
        ({"query": False, "bias": False, "heads": True, "absent": None}, {"heads"}),
        (lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree), {"query", "heads"}),
    ],
)
def test_masks_and_stacks(mask, decayed):
    after = trained(low_rank_decay(0.1, mask=mask), TREE, FLAT)
    assert after["absent"] is None
    for name in ("query", "bias", "heads"):
        if name not in decayed:
            assert_array_equal(after[name], TREE[name])
    if "heads" in decayed:
        for i, scale in enumerate((1, 2)):
            assert_allclose(
                singular_values(after["heads"][i])[:5],
                np.maximum(scale * VALUES - 0.1, 0),
                atol=1e-5,
            )


def test_decay_finds_the_rank_of_a_teacher_that_weight_decay_does_not():
    """Denoising: min ½‖W − Y‖² with either decay; only one gives zeros."""
    rng = np.random.default_rng(5)
    teacher = matrix_with(np.array([5.0, 4.0]), (20, 15))[0]
    Y = jnp.asarray(teacher + 0.1 * rng.standard_normal((20, 15)), jnp.float32)

    def solve(optimizer):
        def step(carry, _):
            weights, state = carry
            updates, state = optimizer.update(weights - Y, state, weights)
            return (optax.apply_updates(weights, updates), state), None

        return jax.lax.scan(step, (Y, optimizer.init(Y)), length=60)[0][0]

    low = solve(optax.chain(optax.sgd(0.5), low_rank_decay(1.0, learning_rate=0.5)))
    weight = solve(optax.chain(optax.add_decayed_weights(0.2), optax.sgd(0.5)))
    values = singular_values(low)
    assert_allclose(values[:2], singular_values(Y)[:2] - 1, atol=1e-4)
    assert_allclose(values[2:], 0, atol=1e-5)
    assert singular_values(weight)[2] > 0.3
