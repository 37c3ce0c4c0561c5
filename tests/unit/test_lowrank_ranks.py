"""Ranks against published numbers and enumeration; Gram matrices summed batch by batch."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from lora_theory.lowrank import Gram, allocate_ranks, obd, obd_spectrum, rank_of_ratio


@pytest.mark.parametrize(
    ("m", "n", "ranks"),
    [(128, 128, [51, 38, 25]), (512, 128, [81, 61, 40]), (128, 512, [81, 61, 40])],
)
def test_the_uniform_rule(m, n, ranks):
    assert [rank_of_ratio(m, n, ratio) for ratio in (0.8, 0.6, 0.4)] == ranks


def test_the_uniform_rule_keeps_to_the_share_and_is_not_spoiled_by_rounding():
    for percent in range(2, 101):
        rank = rank_of_ratio(100, 100, percent / 100)
        assert rank == percent // 2  # 29/100 is a little below it as a double
    assert rank_of_ratio(4096, 4096, 0.25) == 512


SPECTRA = [np.sort(np.random.default_rng(i).exponential(size=4))[::-1] for i in range(3)]


@pytest.mark.parametrize("shapes", [[(4, 4)] * 3, [(4, 6), (9, 4), (4, 4)]])
@pytest.mark.parametrize("parameters", [36, 50, 61, 77, 200])
def test_no_allocation_with_as_many_parameters_loses_less(shapes, parameters):
    costs = [m + n for m, n in shapes]

    def used(ranks):
        return sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))

    def lost(ranks):
        return sum(np.sum(s[rank:] ** 2) for s, rank in zip(SPECTRA, ranks, strict=True))

    found = allocate_ranks(SPECTRA, shapes, parameters)
    others = [r for r in itertools.product(range(1, 5), repeat=3) if used(r) <= used(found)]
    assert tuple(found) in others
    assert lost(found) <= min(map(lost, others)) + 1e-12
    assert used(found) <= parameters
    assert found == [4, 4, 4] or used(found) > parameters - max(costs)


def test_loss_per_parameter_decides_between_sizes():
    """Equal singular values: those of the larger matrix are dropped first."""
    assert allocate_ranks([[1.0, 1.0], [1.0, 1.0]], [(2, 2), (2, 20)], 50) == [2, 1]


def test_every_matrix_keeps_rank_one():
    assert allocate_ranks([[0.1], [2.0, 1.0]], [(1, 3), (2, 2)], 8) == [1, 1]


def test_allocation_over_layers_loses_less_than_the_uniform_rule():
    rng = np.random.default_rng(0)
    layers = []
    for scale in (0.05, 1.0, 3.0):
        W, X, G = (rng.standard_normal(s) for s in [(16, 12), (60, 12), (60, 16)])
        layers.append((W, X.T @ X / 60, scale**2 * G.T @ G / 60))
    spectra = [obd_spectrum(W, input_gram=C, output_gram=D, damping=0) for W, C, D in layers]
    uniform = [rank_of_ratio(16, 12, 0.6)] * 3
    ranks = allocate_ranks(spectra, [(16, 12)] * 3, sum(uniform) * 28)

    def loss(ranks):
        total = 0.0
        for (W, C, D), rank in zip(layers, ranks, strict=True):
            change = W - obd(W, rank, input_gram=C, output_gram=D, damping=0)
            total += np.trace(D @ change @ C @ change.T) / 2
        return total

    assert sum(ranks) == sum(uniform)
    assert ranks[0] < ranks[2]
    assert loss(ranks) < 0.8 * loss(uniform)


# -- Gram matrices -----------------------------------------------------------------------------


def test_gram_matrices_in_batches_are_those_of_all_tokens():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((4, 25, 6)), rng.standard_normal((4, 25, 3))
    gram, cross = Gram.empty(6), Gram.empty(6, 3)
    for a, b in zip(x, y, strict=True):
        gram, cross = gram.add(a), cross.add(a, b)
    assert gram.tokens == cross.tokens == Gram.empty(6).add(x).tokens == 100
    assert_allclose(gram.mean(), np.einsum("bti,btj->ij", x, x) / 100, rtol=1e-12)
    assert_allclose(cross.mean(), np.einsum("bti,btj->ij", x, y) / 100, rtol=1e-12)
    assert not np.any(Gram.empty(6).total)


def test_sums_are_kept_in_double_precision():
    """In float32 ten thousand small tokens after a large one would be lost."""
    gram = Gram.empty(1).add(jnp.array([[4096.0]]))
    small = jnp.full((100, 1), 0.5)
    for _ in range(100):
        gram = gram.add(small)
    assert gram.total[0, 0] == 4096.0**2 + 2500.0
    assert np.float32(4096.0**2) + np.float32(0.25) == np.float32(4096.0**2)
