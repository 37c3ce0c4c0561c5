"""Truncation of the trained weights: order parameters, re-used sequences, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from lora_theory import (
    Compression,
    Finetuning,
    Pretraining,
    Problem,
    ProblemError,
    Teacher,
    optimize,
    predict,
    simulate,
    spectrum,
)
from lora_theory.simulation.compression import compressed
from lora_theory.simulation.fields import Symmetric
from lora_theory.simulation.sizes import Sizes
from lora_theory.theory.branches import FrozenWeights
from lora_theory.theory.fields import field_count
from lora_theory.theory.nodes import Discretisation, gaussian_blocks
from lora_theory.theory.predict import frozen_weights, solve_pretraining
from lora_theory.theory.training_fields import (
    FRESH,
    Reuse,
    Task,
    Trained,
    _truncated_fields,
    _with_new_noise,
    node_dimension,
    softmax_fields,
)
from lora_theory.theory.truncated import truncated_at
from lora_theory.theory.weights import Constants, kept_at, weights_at

SETTINGS = Discretisation(None, 8, 0, 1e-10)
KINDS = {
    "weight_decay": {},
    "narrow": {"rank": 0.3},
    "nuclear_norm": {"regularizer": "nuclear_norm"},
    "frobenius": {"regularizer": "frobenius"},
    "low_rank_decay": {"regularizer": "low_rank_decay"},
    "separable": {"regularizer": "separable", "function": "abs(s)**1.5 + exp(s)"},
}


def asked(kind, **changes):
    return Problem(
        tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        pretraining=Pretraining(samples=0.4, penalty=0.05, **KINDS[kind]),
    ).replace(changes)  # fmt: skip


def solved(problem):
    """log(Q̂, M̂, V̂), the constants and what is kept; in the 64-bit scope."""
    unknowns = solve_pretraining(problem, SETTINGS).unknowns
    constants = Constants.of(problem)
    return unknowns, constants, kept_at(unknowns, constants)


@pytest.mark.parametrize("kind", KINDS)
def test_to_the_learned_rank_nothing_is_lost(kind):
    with jax.enable_x64(True):
        unknowns, constants, kept = solved(asked(kind))
        assert truncated_at(unknowns, constants, kept.rank) is None
        nearly = truncated_at(unknowns, constants, kept.rank * (1 - 1e-8))
        whole = np.asarray(weights_at(unknowns, constants).values[:3])
    # what is cut jumps by less than 3
    assert_allclose(nearly[:3], whole, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_of_either_sign_the_largest_are_kept(kind):
    """dQ'/dρ is the square of the smallest eigenvalue that is kept; both ends have it."""
    share, step = 0.2, 1e-4
    with jax.enable_x64(True):
        unknowns, constants, kept = solved(asked(kind))
        share = share * kept.rank
        found = truncated_at(unknowns, constants, share)
        ends = [y for y in found.kept.dead_zone if np.isfinite(y)]
        V_hat = jnp.exp(unknowns[2])
        sizes = np.abs(constants.regularizer.shrink(jnp.asarray(ends), V_hat))
        more, less = (truncated_at(unknowns, constants, share * (1 + h)) for h in (step, -step))
    assert found.kept.rank == share
    slope = (more.Q - less.Q) / (2 * share * step)
    assert_allclose(sizes, np.sqrt(slope), rtol=1e-5)


@pytest.mark.parametrize("kind", ["weight_decay", "frobenius"])
def test_order_parameters_are_those_of_matrices(kind):
    """Y drawn at D = 500; V' is the mean of the difference quotients of s_t."""
    dim, share, rng = 500, 0.15, np.random.default_rng(1)
    problem = asked(kind)
    with jax.enable_x64(True):
        unknowns, constants, _ = solved(problem)
        found = truncated_at(unknowns, constants, share)
        Q_hat, M_hat, V_hat = np.exp(unknowns)
        draws = []
        for _ in range(4):
            W0 = rng.standard_normal((dim, dim // 2))
            S0 = W0 @ W0.T / np.sqrt(dim * dim / 2)
            Z = rng.standard_normal((dim, dim))
            y, u = np.linalg.eigh(M_hat * S0 + np.sqrt(Q_hat / dim / 2) * (Z + Z.T))
            s = np.array(constants.regularizer.shrink(jnp.asarray(y), V_hat))
            s[np.argsort(-np.abs(s))[round(share * dim) :]] = 0.0
            gaps, rises = y[:, None] - y[None], s[:, None] - s[None]
            V = (rises[gaps != 0] / gaps[gaps != 0]).mean()
            draws.append([(s**2).mean(), np.einsum("ij,j,ij->", u, s, S0 @ u) / dim, V])
    mean, error = np.mean(draws, axis=0), np.std(draws, axis=0, ddof=1) / 2
    # the jump makes quotients of the nearest pairs fluctuate: Q' and M' to O(1/D), V' more
    assert np.all(np.abs(mean - found[:3]) < 6 * error + np.array([4, 4, 20]) / dim)
    with jax.enable_x64(True):
        whole = np.asarray(weights_at(unknowns, constants).values[:3])
    assert np.all(np.abs(mean - whole) > 0.1)


# -- re-used sequences -----------------------------------------------------------------------------

Q0, NOISE, BEFORE = 1.5, 0.25, Trained(Q=1.3, M=1.2, V=0.4, cross=0.8)
Q, M, V = 0.8, 0.85, 0.25  # of the truncated matrix
COVARIANCE = np.array([[Q0 + NOISE, BEFORE.M, M], [BEFORE.M, BEFORE.Q, BEFORE.cross],
                       [M, BEFORE.cross, Q]])  # fmt: skip


@pytest.mark.parametrize("redrawn", [False, True])
def test_effective_noise_of_reused_sequences_is_that_of_sampled_fields(redrawn):
    """Their field is β(z' + V'G) with G = (z^y − z)/(V + T²/4) of the trained matrix."""
    T, beta = 2, 0.9
    clean_covariance = COVARIANCE - np.diag([NOISE, 0, 0])
    weights = FrozenWeights(
        np.array([Q]), np.array([M]), np.array([V]), Q0 + NOISE, beta, NOISE,
        Trained(*(np.array([value]) for value in BEFORE)),
    )  # fmt: skip
    rng = np.random.default_rng(3)
    clean, z, left = rng.multivariate_normal(np.zeros(3), clean_covariance, 10**6).T
    noise, other = np.sqrt(NOISE) * rng.standard_normal((2, 10**6))
    force = (clean + noise - z) / (BEFORE.V + T**2 / 4)
    gap = clean + (other if redrawn else noise) - beta * (left + V * force)
    found = weights.training_noise(T, redrawn=redrawn)[0]
    assert found == pytest.approx(gap.var(), rel=4 * np.sqrt(2 / gap.size))
    wrong = weights._replace(before=None).training_noise(T, redrawn=redrawn)[0]
    assert abs(wrong / gap.var() - 1) > 0.05


def test_fields_of_both_matrices_have_their_covariances():
    """z^y, z and z', and the label with other noise."""
    tokens, n = 3, field_count(3, "softmax")
    dimension = node_dimension(tokens, "softmax", new_noise=True, compressed=True)
    nodes = np.concatenate(gaussian_blocks(dimension, 2**14, 4, 1), axis=1)
    label = np.sqrt(Q0 + NOISE) * nodes[:n]
    with jax.enable_x64(True):
        left, *along = _truncated_fields(nodes, label, Q, M, BEFORE, Q0 + NOISE, tokens)
        new = _with_new_noise(
            nodes, label, BEFORE.Q, BEFORE.M, Q0 + NOISE, NOISE, tokens, (M, *along)
        )
    z = BEFORE.M / (Q0 + NOISE) * label
    z = z + np.sqrt(BEFORE.Q - BEFORE.M**2 / (Q0 + NOISE)) * nodes[n : 2 * n]
    both = np.concatenate([new, label, z, left])
    expected = np.zeros((4, 4))
    expected[1:, 1:] = COVARIANCE
    expected[0], expected[:, 0] = [Q0 + NOISE, Q0, BEFORE.M, M], [Q0 + NOISE, Q0, BEFORE.M, M]
    expected = np.kron(expected, np.eye(n))
    assert_allclose(both @ both.T / both.shape[1], expected, atol=6e-3)


def test_weights_that_lost_nothing_have_the_fields_of_trained_ones():
    """With S' = Ŝ, re-used sequences carry the proximal field."""
    tokens, task = 2, Task(3.0, 0.2, 1.0, Q0 + NOISE)
    nodes = gaussian_blocks(node_dimension(tokens, "softmax", compressed=True), 64, 1, 1)[0]
    parts = [np.full(64, value) for value in BEFORE]
    own = nodes[: node_dimension(tokens, "softmax")]
    with jax.enable_x64(True):
        for reuse in (Reuse(1.0), Reuse(0.4), FRESH):
            trained = softmax_fields(own, *parts[:3], task, tokens=tokens, reuse=reuse)
            before = Trained(*parts[:3], parts[0])
            same = softmax_fields(
                nodes, *parts[:3], task, tokens=tokens, reuse=reuse, before=before
            )
            assert_allclose(same.training, trained.training, atol=1e-4)
            assert_allclose(same.labels, trained.labels, atol=1e-12)


# -- the whole -------------------------------------------------------------------------------------


def test_a_share_that_is_not_learnt_changes_nothing():
    problem = asked("weight_decay", finetuning=Finetuning(samples=3.0, penalty=0.2))
    plain = predict(problem, nodes=64)
    cut = predict(problem.replace({"compression.rank": 0.9}), nodes=64)
    for name in ("q", "overlap", "test_error"):
        assert getattr(cut.finetuning, name) == getattr(plain.finetuning, name)
    assert cut.effective_noise == plain.effective_noise
    less = predict(problem.replace({"compression.rank": 0.1}), nodes=64)
    assert less.pretraining == plain.pretraining
    assert less.finetuning.test_error > 1.2 * plain.finetuning.test_error


def test_the_spectrum_is_that_of_what_is_left():
    problem = asked("frobenius", teacher=Teacher(spikes=4.0), compression=Compression(rank=0.2))
    found = spectrum(problem)
    assert found.rank == pytest.approx(0.2)
    assert abs(found.moment_gap) < 1e-9
    assert found.shares.sum() == pytest.approx(0.2)
    assert found.distribution(0.0) == pytest.approx(0.8)


def test_the_simulation_keeps_what_is_largest():
    problem = asked("frobenius", compression=Compression(rank=0.25))
    S = np.random.default_rng(0).standard_normal((16, 16))
    S = S + S.T
    with jax.enable_x64(True):
        left = np.linalg.eigvalsh(
            compressed(Symmetric(jnp.asarray(S)), problem, Sizes.of(problem, 16)).matrix
        )
    levels = np.linalg.eigvalsh(S)
    assert_allclose(np.sort(np.abs(left))[-4:], np.sort(np.abs(levels))[-4:])
    assert np.abs(left[np.argsort(np.abs(left))[:12]]).max() < 1e-12


def test_saved_weights_hold_both_matrices(tmp_path):
    path = tmp_path / "weights.npz"
    problem = asked("weight_decay", compression=Compression(rank=0.25))
    simulate(problem, dim=8, seeds=2, test_sequences=2, save=path)
    with np.load(path) as saved:
        assert saved["S_frozen"].shape == (2, 8, 8)
        assert np.linalg.matrix_rank(saved["S_frozen"][0], tol=1e-9) == 2


def test_the_share_may_be_optimised_where_it_matters():
    problem = asked("weight_decay", compression=Compression(rank=0.2))
    with pytest.raises(ProblemError, match=r"compression\.rank.*which it does not change"):
        optimize(problem, ["compression.rank"], "pretraining.test_error")
    best = optimize(problem, ["compression.rank"], "effective_noise")
    assert 0.2 < best.optimum["compression.rank"] <= 1
    assert best.objective < predict(problem).effective_noise.delta_eff


@pytest.mark.parametrize("rank", [0, -0.1, 1.5, np.nan, "half", True])
def test_ranks_out_of_range_are_refused(rank):
    with pytest.raises(
        ProblemError, match=r"compression\.rank = .* is not allowed: .* > 0 and ≤ 1"
    ):
        Compression(rank=rank)


def test_what_is_no_compression_is_refused():
    with pytest.raises(ProblemError, match=r"compression = 0\.5 must be a Compression or None"):
        dataclasses.replace(asked("weight_decay"), compression=0.5)
    with pytest.raises(ProblemError, match=r"compression\.rank = 0\.01"):
        Sizes.of(asked("weight_decay", compression=Compression(rank=0.01)), 8)


def test_text_holds_it():
    problem = asked("weight_decay", compression=Compression(rank=0.25))
    assert "[compression]\nrank = 0.25" in problem.to_toml()
    assert problem.replace(compression=None) == asked("weight_decay") == problem.alone


def test_weights_are_frozen_after_the_cut():
    problem = asked("weight_decay", compression=Compression(rank=0.2))
    with jax.enable_x64(True):
        weights = frozen_weights(problem, solve_pretraining(problem.alone, SETTINGS))
    assert weights.before is not None
    assert_allclose(weights.trained.cross, weights.Q)
    assert weights.trained.Q > weights.Q
