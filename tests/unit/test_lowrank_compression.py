"""Compressed matrices against brute force, published minima, special cases and naive mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.optimize import minimize

from lora_theory.lowrank import (
    Gram,
    aa_svd,
    asvd,
    fwsvd,
    obd,
    obd_spectrum,
    spectral,
    svd,
    svd_llm,
)

M, N, TOKENS = 6, 5, 40


class Layer:
    """A layer with calibration tokens as columns: x, x' in the compressed network, g."""

    def __init__(self, seed, m=M, n=N):
        rng = np.random.default_rng(seed)
        self.W = rng.standard_normal((m, n))
        scales = np.geomspace(1, 0.05, n)
        self.X = rng.standard_normal((n, n)) @ (scales[:, None] * rng.standard_normal((n, TOKENS)))
        change = np.eye(n) + 0.4 * rng.standard_normal((n, n))
        self.X2 = change @ self.X + 0.05 * rng.standard_normal((n, TOKENS))
        self.G = rng.standard_normal((m, m)) @ (
            np.geomspace(1, 0.1, m)[:, None] * rng.standard_normal((m, TOKENS))
        )
        self.C_x, self.C_g = self.X @ self.X.T / TOKENS, self.G @ self.G.T / TOKENS
        self.C_x2, self.cross = self.X2 @ self.X2.T / TOKENS, self.X @ self.X2.T / TOKENS

    def second_order(self, V, C_x=None, C_g=None):
        """½ΔᵀHΔ with the Hessian written out as a Kronecker product."""
        hessian = np.kron(self.C_x if C_x is None else C_x, self.C_g if C_g is None else C_g)
        change = (self.W - V).T.ravel()  # column by column
        return change @ hessian @ change / 2

    def anchored(self, V):
        return sum(
            np.sum((self.W @ x - V @ y) ** 2) for x, y in zip(self.X.T, self.X2.T, strict=True)
        )


LAYERS = [Layer(0), Layer(1, 4, 7)]


def least(objective, shape, rank, starts=12):
    """By a general-purpose optimiser over two factors, from many starts; and the runner-up."""
    m, n = shape
    rng, found = np.random.default_rng(0), []
    with jax.enable_x64(True):
        step = jax.jit(
            jax.value_and_grad(
                lambda z: objective(z[: m * rank].reshape(m, rank) @ z[m * rank :].reshape(rank, n))
            )
        )
        for _ in range(starts):
            start = rng.standard_normal((m + n) * rank)
            ended = minimize(
                lambda z: [np.asarray(part, float) for part in step(z)],
                start,
                jac=True,
                method="BFGS",
                options={"gtol": 1e-9, "maxiter": 2000},
            )
            found.append(ended.fun)
    return min(found)


# -- minima ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_obd_is_the_least_second_order_change_of_the_loss(layer):
    W, C_x, C_g = layer.W, layer.C_x, layer.C_g
    found = obd(W, 2, input_gram=C_x, output_gram=C_g, damping=0.0)
    assert np.linalg.matrix_rank(found) == 2
    s = obd_spectrum(W, input_gram=C_x, output_gram=C_g, damping=0.0)
    value = layer.second_order(found)
    assert_allclose(value, np.sum(s[2:] ** 2) / 2, rtol=1e-9)
    brute = least(
        lambda V: jnp.einsum("ij,jk,lk,li->", W - V, C_x, W - V, C_g) / 2, W.shape, rank=2
    )
    assert_allclose(value, brute, rtol=1e-6)
    # what the others leave of the same objective
    plain, one_sided = svd(W, 2), svd_llm(W, 2, input_gram=C_x)
    assert layer.second_order(plain) > 1.5 * value
    assert layer.second_order(one_sided) > 1.1 * value
    swapped_root = np.linalg.cholesky(C_g).T  # L for Lᵀ
    wrong = np.linalg.solve(swapped_root.T, svd(swapped_root.T @ W, 2))
    assert layer.second_order(wrong) > 1.1 * value


@pytest.mark.parametrize("layer", LAYERS)
def test_aa_svd_is_the_least_anchored_error(layer):
    W = layer.W
    found = aa_svd(W, 2, input_gram=layer.X2 @ layer.X2.T, cross_gram=layer.X @ layer.X2.T)
    value = layer.anchored(found)
    brute = least(lambda V: jnp.sum((W @ layer.X - V @ layer.X2) ** 2), W.shape, rank=2)
    assert_allclose(value, brute, rtol=1e-6)
    # ‖WA‖² − ‖M‖² + Σ_{i>k}σ_i(M)², M by the symmetric root of the Gram matrix
    values, Q = np.linalg.eigh(layer.X2 @ layer.X2.T)
    target = W @ layer.X @ layer.X2.T @ (Q / np.sqrt(values)) @ Q.T
    tail = np.sum(np.linalg.svd(target, compute_uv=False)[2:] ** 2)
    formula = np.sum((W @ layer.X) ** 2) - np.sum(target**2) + tail
    assert_allclose(value, formula, rtol=1e-9)
    others = {
        "input-aware": svd_llm(W, 2, input_gram=layer.C_x),
        "shift-aware": svd_llm(W, 2, input_gram=layer.C_x2),
        "agnostic": svd(W, 2),
        "transposed": aa_svd(W, 2, input_gram=layer.C_x2, cross_gram=layer.cross.T),
    }
    errors = {name: layer.anchored(V) for name, V in others.items()}
    assert min(errors.values()) > 1.3 * value
    assert errors["transposed"] > 10 * errors["agnostic"]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rank", [1, 3])
def test_svd_llm_has_the_least_output_error(layer, rank):
    W, X = layer.W, layer.X
    value = np.sum(((W - svd_llm(W, rank, input_gram=X @ X.T)) @ X) ** 2)
    # the outputs themselves cannot be nearer at that rank, and this reaches them
    s = np.linalg.svd(W @ X, compute_uv=False)
    assert_allclose(value, np.sum(s[rank:] ** 2), rtol=1e-9)
    assert np.sum(((W - svd(W, rank)) @ X) ** 2) > 1.05 * value


def test_fwsvd_and_asvd_minimise_their_weighted_errors():
    W = LAYERS[0].W
    rows, columns = np.array([1.0, 9.0, 0.1, 4.0, 1.0, 25.0]), np.array([4.0, 1.0, 9.0, 0.5, 16.0])
    found = fwsvd(W, 2, row_weights=rows)
    brute = least(lambda V: jnp.sum(rows[:, None] * (W - V) ** 2), W.shape, rank=2)
    assert_allclose(np.sum(rows[:, None] * (W - found) ** 2), brute, rtol=1e-6)
    for alpha in (0.5, 1.0):
        found = asvd(W, 2, input_scale=columns, alpha=alpha)
        weights = columns ** (2 * alpha)
        brute = least(lambda V, w=weights: jnp.sum(w * (W - V) ** 2), W.shape, rank=2, starts=6)
        assert_allclose(np.sum(weights * (W - found) ** 2), brute, rtol=1e-5)
    assert_allclose(asvd(W, 2, input_scale=columns, alpha=0.0), svd(W, 2), atol=1e-12)
    assert np.all(np.isfinite(fwsvd(W, 2, row_weights=[1, 0, 0, 0, 0, 0])))
    assert np.all(np.isfinite(asvd(W, 2, input_scale=[1, 0, 0, 0, 0])))


# -- special cases, invariances ----------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_special_cases(layer):
    W, (m, n) = layer.W, layer.W.shape
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    plain = U * spectral.truncated(s, 3) @ Vt
    assert_allclose(svd(W, 3), plain, atol=1e-12)
    ones = {"input_gram": np.eye(n), "output_gram": np.eye(m)}
    assert_allclose(obd(W, 3, **ones), plain, atol=1e-12)
    assert_allclose(obd_spectrum(W), s, rtol=1e-12)
    one_sided = svd_llm(W, 3, input_gram=layer.C_x)
    ones["input_gram"] = layer.C_x
    assert_allclose(obd(W, 3, damping=0.0, **ones), one_sided, atol=1e-10)
    for damping in (0.0, 0.3):
        anchored = aa_svd(W, 3, input_gram=layer.C_x, cross_gram=layer.C_x, damping=damping)
        one_sided = svd_llm(W, 3, input_gram=layer.C_x, damping=damping)
        assert_allclose(anchored, one_sided, atol=1e-10)
    full = min(m, n)
    for found in (
        svd(W, full),
        svd_llm(W, full, input_gram=layer.C_x),
        obd(W, full, input_gram=layer.C_x, output_gram=layer.C_g),
    ):
        assert_allclose(found, W, atol=1e-9)


def test_any_square_root_and_any_scale_of_the_gram_matrices_give_the_same():
    layer = LAYERS[0]
    W = layer.W
    values, Q = np.linalg.eigh(layer.C_x)
    root = Q * np.sqrt(values) @ np.linalg.qr(np.random.default_rng(4).standard_normal((N, N)))[0]
    values, Q = np.linalg.eigh(layer.C_g)
    left = Q * np.sqrt(values)
    U, s, Vt = np.linalg.svd(left.T @ W @ root)
    expected = np.linalg.inv(left).T @ (U[:, :2] * s[:2] @ Vt[:2]) @ np.linalg.inv(root)
    for scale in (1e-12, 1.0, 1e8):
        grams = {"input_gram": scale * layer.C_x, "output_gram": layer.C_g / scale}
        assert_allclose(obd(W, 2, damping=0.0, **grams), expected, atol=1e-9)
        damped = obd(W, 2, **grams)
        assert_allclose(damped, obd(W, 2, input_gram=layer.C_x, output_gram=layer.C_g), atol=1e-9)
    assert np.abs(damped - expected).max() > 1e-3


def test_damping_is_a_share_of_the_mean_diagonal_of_each():
    layer = LAYERS[0]
    C_x = layer.C_x + 0.1 * np.trace(layer.C_x) / N * np.eye(N)
    C_g = layer.C_g + 0.1 * np.trace(layer.C_g) / M * np.eye(M)
    found = obd(layer.W, 2, input_gram=layer.C_x, output_gram=layer.C_g)
    assert_allclose(found, obd(layer.W, 2, input_gram=C_x, output_gram=C_g, damping=0), atol=1e-10)
    s = obd_spectrum(layer.W, input_gram=layer.C_x, output_gram=layer.C_g)
    assert_allclose(layer.second_order(found, C_x, C_g), np.sum(s[2:] ** 2) / 2, rtol=1e-9)


def test_damping_of_aa_svd_holds_the_weights():
    """It minimises the anchored error plus ε‖W − Ŵ‖², so a singular Gram matrix is no problem."""
    layer, few = Layer(2), 3
    X, X2, W = layer.X[:, :few], layer.X2[:, :few], layer.W
    found = aa_svd(W, 2, input_gram=X2 @ X2.T, cross_gram=X @ X2.T, damping=0.01)
    epsilon = 0.01 * np.sum(X2**2) / N

    def objective(V):
        return jnp.sum((W @ X - V @ X2) ** 2) + epsilon * jnp.sum((W - V) ** 2)

    assert_allclose(objective(found), least(objective, W.shape, rank=2), rtol=1e-5)


def test_nearly_singular_gram_matrices_lose_no_more_than_their_condition():
    layer = LAYERS[0]
    X = layer.X.copy()
    X[-1] *= 1e-5
    found = svd_llm(layer.W, 2, input_gram=X @ X.T)
    s = np.linalg.svd(layer.W @ X, compute_uv=False)
    assert_allclose(np.sum(((layer.W - found) @ X) ** 2), np.sum(s[2:] ** 2), rtol=1e-6)


@pytest.mark.parametrize("of_weights", [1e-200, 1e200])
@pytest.mark.parametrize("of_tokens", [1e-250, 1.0, 1e250])
def test_extreme_scales_change_nothing_but_the_scale(of_weights, of_tokens):
    layer = LAYERS[0]
    for method, names in (
        (svd, ()),
        (svd_llm, ("input_gram",)),
        (obd, ("input_gram", "output_gram")),
        (aa_svd, ("input_gram", "cross_gram")),
    ):
        grams = (layer.C_x, layer.C_g if method is obd else layer.C_x2)
        given = dict(zip(names, grams, strict=False))
        scaled = {name: of_tokens * gram for name, gram in given.items()}
        found = method(of_weights * layer.W, 2, **scaled)
        assert_allclose(found / of_weights, method(layer.W, 2, **given), atol=1e-9)
        left, right = method(of_weights * layer.W, 2, factors=True, **scaled)
        assert_allclose(left @ right, found, rtol=1e-9)


# -- factors, types ----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_factors_are_balanced_and_multiply_to_the_same(layer):
    W, C_x, C_g = layer.W, layer.C_x, 1e-12 * layer.C_g
    for method, given in (
        (svd, {}),
        (fwsvd, {"row_weights": np.diag(C_g)}),
        (asvd, {"input_scale": np.abs(layer.X).mean(axis=1)}),
        (svd_llm, {"input_gram": C_x}),
        (obd, {"input_gram": C_x, "output_gram": C_g}),
        (aa_svd, {"input_gram": layer.C_x2, "cross_gram": layer.cross}),
    ):
        product, (left, right) = method(W, 3, **given), method(W, 3, factors=True, **given)
        assert (left.shape, right.shape) == ((W.shape[0], 3), (3, W.shape[1]))
        assert_allclose(left @ right, product, atol=1e-9)
        assert_allclose(np.linalg.norm(left), np.linalg.norm(right), rtol=1e-12)
    left, right = svd(np.zeros((3, 2)), 1, factors=True)
    assert not np.any(left)
    assert not np.any(right)


def test_jax_arrays_come_back_as_such_and_everything_is_computed_in_double_precision():
    layer = LAYERS[0]
    single = jnp.asarray(layer.W, jnp.float32)
    found = svd_llm(single, 2, input_gram=layer.C_x)
    assert isinstance(found, jax.Array)
    assert found.dtype == jnp.float32
    exact = svd_llm(np.asarray(single, float), 2, input_gram=layer.C_x)
    assert isinstance(exact, np.ndarray)
    assert exact.dtype == np.float64
    assert_allclose(found, exact, rtol=1e-6, atol=1e-7)
    left, right = svd(single.astype(jnp.bfloat16), 2, factors=True)
    assert left.dtype == right.dtype == jnp.bfloat16
    assert isinstance(svd([[1, 0], [0, 2]], 1), np.ndarray)


def test_gram_accumulators_stand_for_their_means():
    layer = LAYERS[0]
    inputs, gradients, cross = Gram.empty(N), Gram.empty(M), Gram.empty(N, N)
    for part in np.array_split(np.arange(TOKENS), 3):
        inputs = inputs.add(layer.X2.T[part])
        gradients = gradients.add(layer.G.T[part])
        cross = cross.add(layer.X.T[part], layer.X2.T[part])
    assert_allclose(
        aa_svd(layer.W, 2, input_gram=inputs, cross_gram=cross),
        aa_svd(layer.W, 2, input_gram=layer.C_x2, cross_gram=layer.cross),
        atol=1e-9,
    )
    assert_allclose(
        obd(layer.W, 2, input_gram=inputs, output_gram=gradients),
        obd(layer.W, 2, input_gram=layer.C_x2, output_gram=layer.C_g),
        atol=1e-9,
    )
