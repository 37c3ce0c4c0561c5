"""The coordinates of the pre-activations and the derivatives of the softmax loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_theory.attention import attention
from lora_theory.theory.fields import (
    field_basis,
    field_count,
    softmax_field_hessian,
    softmax_loss,
    to_fields,
)

TOKENS = [1, 2, 3, 4, 5]


def in_pairs(fields: np.ndarray) -> np.ndarray:
    """z_ab = h_ab/√(1 + δ_ab) for a ≤ b, pairs first."""
    tokens = fields.shape[0]
    return np.array(
        [fields[a, b] / np.sqrt(1 + (a == b)) for a in range(tokens) for b in range(a, tokens)]
    )


def cases(*, tokens=TOKENS):
    return [(T, s) for T in tokens for s in ("linear", "softmax") if T > 1 or s == "linear"]


@pytest.mark.parametrize(("tokens", "activation"), cases())
def test_basis_is_orthonormal_in_the_scaled_fields(tokens, activation):
    basis = field_basis(tokens, activation)
    count = {1: 1, 2: 3, 3: 6, 4: 10, 5: 15}[tokens] - (activation == "softmax")
    assert basis.shape == (tokens, tokens, count)
    assert field_count(tokens, activation) == count
    np.testing.assert_array_equal(basis, basis.swapaxes(0, 1))
    scaled = in_pairs(basis)
    np.testing.assert_allclose(scaled.T @ scaled, np.eye(count), atol=1e-14)


@pytest.mark.parametrize("tokens", TOKENS[1:])
def test_softmax_leaves_out_what_it_cannot_see(tokens):
    flat = in_pairs(np.ones((tokens, tokens)))
    np.testing.assert_allclose(flat @ in_pairs(field_basis(tokens, "softmax")), 0, atol=1e-14)
    assert np.abs(flat @ in_pairs(field_basis(tokens, "linear"))).min() > 0.5
    # Fields of all k coordinates have the softmax of their projection: nothing else is left out.
    rng = np.random.default_rng(0)
    fields = rng.standard_normal((tokens, tokens, 50))
    fields = fields + fields.swapaxes(0, 1)
    basis = field_basis(tokens, "softmax")
    with jax.enable_x64(True):
        kept = to_fields(basis, jnp.asarray(in_pairs(basis).T @ in_pairs(fields)))
        np.testing.assert_allclose(
            attention(kept, "softmax", row_axis=0),
            attention(jnp.asarray(fields), "softmax", row_axis=0),
            rtol=1e-12,
        )
        assert np.abs(np.asarray(kept) - fields).max() > 0.1


@pytest.mark.parametrize(("tokens", "activation"), cases(tokens=[2, 3]))
def test_variances_of_the_fields(tokens, activation):
    """Var h_ab = 1 + δ_ab for coordinates of variance 1, less the flat share 2/T² for softmax."""
    basis = field_basis(tokens, activation)
    coordinates = np.random.default_rng(1).standard_normal((basis.shape[-1], 40_000))
    with jax.enable_x64(True):
        fields = np.asarray(to_fields(basis, jnp.asarray(coordinates)))
    expected = np.ones((tokens, tokens)) + np.eye(tokens)
    if activation == "softmax":
        expected = expected - 2 / tokens**2
    error = expected * np.sqrt(2 / 40_000)
    assert np.all(np.abs(fields.var(axis=-1) - expected) < 4.5 * error)
    assert np.any(np.abs(fields.var(axis=-1) - 1) > 10 * error)
    off = fields[0, 0] * fields[0, 1]
    correlation = -2 / tokens**2 if activation == "softmax" else 0.0
    assert abs(off.mean() - correlation) < 4.5 * off.std() / 200


@pytest.mark.parametrize("tokens", [2, 3, 5])
@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
def test_softmax_loss_has_the_derivatives_of_its_value(tokens, scale):
    rng = np.random.default_rng(tokens)
    fields = scale * rng.standard_normal((tokens, tokens, 6))
    labels = rng.dirichlet(np.ones(tokens), size=(tokens, 6)).transpose(0, 2, 1)

    def row_loss(row: jax.Array, label: jax.Array) -> jax.Array:
        return jnp.sum((label - jnp.exp(row - jax.nn.logsumexp(row))) ** 2)

    def over_rows_and_nodes(function):
        return jax.jit(jax.vmap(jax.vmap(function, in_axes=-1, out_axes=-1)))

    with jax.enable_x64(True):
        arguments = jnp.asarray(fields), jnp.asarray(labels)
        expansion = softmax_loss(*arguments)
        value = over_rows_and_nodes(row_loss)(*arguments).sum(axis=0)
        gradient = over_rows_and_nodes(jax.grad(row_loss))(*arguments)
        hessian = over_rows_and_nodes(jax.hessian(row_loss))(*arguments)
    np.testing.assert_allclose(expansion.value, value, rtol=1e-12)
    np.testing.assert_allclose(expansion.gradient, gradient, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(expansion.hessian, hessian, rtol=1e-9, atol=1e-13)
    assert expansion.hessian.shape == (tokens, tokens, tokens, 6)


@pytest.mark.parametrize("tokens", TOKENS[1:])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_softmax_hessian_in_the_coordinates(tokens, scale):
    rng = np.random.default_rng(tokens)
    basis = field_basis(tokens, "softmax")
    points = scale * rng.standard_normal((basis.shape[-1], 5))
    labels = rng.dirichlet(np.ones(tokens), size=(tokens, 5)).transpose(0, 2, 1)

    def loss(point: jax.Array, label: jax.Array) -> jax.Array:
        return jnp.sum((label - jax.nn.softmax(basis @ point, axis=1)) ** 2)

    with jax.enable_x64(True):
        arguments = jnp.asarray(points), jnp.asarray(labels)
        rows = softmax_loss(to_fields(basis, arguments[0]), arguments[1]).hessian
        hessian = jax.jit(softmax_field_hessian)(rows)
        over_nodes = jax.vmap(jax.hessian(loss), in_axes=-1, out_axes=-1)
        expected = np.asarray(jax.jit(over_nodes)(*arguments))
    np.testing.assert_allclose(hessian, expected, rtol=1e-9, atol=1e-12)
    assert np.abs(expected).max() > 1e-3
    assert hessian.shape == (basis.shape[-1], basis.shape[-1], 5)


def test_linear_attention_divides_by_the_tokens():
    scores = np.arange(9.0).reshape(3, 3)
    np.testing.assert_allclose(attention(jnp.asarray(scores), "linear"), scores / 3, rtol=1e-6)
