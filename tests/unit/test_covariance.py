"""Tokens with a covariance: the law of Y', the weight side of LoRA, compression, refusals."""

import math

import jax
import numpy as np
import pytest

from lora_theory import (
    Compression,
    Covariance,
    Finetuning,
    Pretraining,
    Problem,
    ProblemError,
    continuation,
    gradient,
    optimize,
    predict,
    random_start_threshold,
    sample_pretrained,
    second_round,
    simulate,
    simulate_second_round,
    spectrum,
    thresholds,
)
from lora_theory.lowrank import Gram, svd_llm
from lora_theory.lowrank.tied import compress_tied
from lora_theory.simulation.message_passing import message_passing
from lora_theory.simulation.tokens import levels_of
from lora_theory.theory.correlated import (
    CorrelatedTokens,
    correlated_divergence,
    correlated_tail,
    correlated_weights,
    threshold_of,
)
from lora_theory.theory.divergence import spectral_divergence
from lora_theory.theory.nodes import Discretisation
from lora_theory.theory.predict import frozen_weights, solve_pretraining
from lora_theory.theory.truncated import truncated_at
from lora_theory.theory.used import compressed_draw, drawn_weights, used_weights
from lora_theory.theory.vector_side import vector_side
from lora_theory.theory.weights import Constants, weights_at

AT = np.log([0.05, 0.6, 0.7])
LEVELS = (0.2, 0.5, 1.0, 2.5)
KIND = CorrelatedTokens(0.1, 0.5, LEVELS)
PLAIN = Problem(
    tokens=2,
    activation="linear",
    teacher_rank=0.5,
    label_noise=0.5,
    pretraining=Pretraining(samples=0.3, penalty=0.1),
    finetuning=Finetuning(samples=4.0, penalty=0.3, signal=1.5),
)
COVARIANT = PLAIN.replace(covariance={"eigenvalues": LEVELS})
SHIFTED = COVARIANT.replace({"covariance.shifted": LEVELS[::-1]})
ALONE = COVARIANT.replace(finetuning=None)


# -- the law of Y' ---------------------------------------------------------------------------------


def sampled(kind, size, seed, *, pull=None):
    """Share, Q, M, V, ∬, by eigenvalues of one matrix; ``pull`` in place of 2λ̃/c."""
    rng = np.random.default_rng(seed)
    Q_hat, M_hat, V_hat = np.exp(AT)
    c = np.repeat(kind.levels, size // len(kind.levels))
    columns = round(kind.rank * size)
    factor = np.sqrt(c)[:, None] * rng.standard_normal((size, columns))
    square = rng.standard_normal((size, size))
    S0, Z = factor @ factor.T / math.sqrt(columns * size), (square + square.T) / math.sqrt(2 * size)
    removed = 2 * kind.scaled_penalty / c if pull is None else np.full(size, pull)
    y, vectors = np.linalg.eigh(M_hat * S0 + math.sqrt(Q_hat) * Z - np.diag(removed))
    s = np.maximum(y, 0) / V_hat
    gap = np.subtract.outer(y, y) + np.eye(size)
    quotient = np.subtract.outer(s, s) / gap + np.diag((y > 0) / V_hat)
    M = np.einsum("ij,ik,kj->j", vectors, S0, vectors, optimize=True) @ s / size
    return np.array([np.mean(y > 0), np.mean(s**2), M, quotient.mean(), (quotient**2).mean()])


def test_the_law_is_that_of_eigenvalues():
    # four matrices: their spread gives the error, of which the offset 1/n is a part
    found = np.array([sampled(KIND, 400, seed) for seed in range(4)])
    tail = correlated_tail(AT, 1.0, KIND)
    theory = np.array([*tail, correlated_divergence(AT, 1.0, KIND)])
    error = np.hypot(found.std(axis=0, ddof=1) / 2, 1 / 400)
    assert np.all(np.abs(found.mean(axis=0) - theory) < 4 * error)
    # controls: the penalty on S̃ itself, and tokens without a covariance
    spectral = np.mean([sampled(KIND, 400, 9, pull=0.2)], axis=0)
    assert np.abs((spectral - theory) / error).max() > 10
    plain = CorrelatedTokens(KIND.scaled_penalty, KIND.rank, (1.0,))
    assert np.abs((np.array(correlated_tail(AT, 1.0, plain)) - theory[:4]) / error[:4]).max() > 10


@pytest.mark.parametrize("penalty", [0.02, 0.4])
def test_without_a_covariance_it_is_the_package(penalty):
    constants = Constants.of(PLAIN.replace({"pretraining.penalty": penalty}))
    kind = CorrelatedTokens(penalty, 0.5, (1.0, 1.0))
    with jax.enable_x64(True):
        wanted = weights_at(AT, constants)
        divergence = spectral_divergence(AT, constants)
        cut = truncated_at(AT, constants, 0.05)
    values, slopes = correlated_weights(AT, 1.0, kind)
    np.testing.assert_allclose(values, wanted.values, rtol=1e-12)
    np.testing.assert_allclose(slopes, wanted.slopes, rtol=1e-10, atol=1e-12)
    assert correlated_divergence(AT, 1.0, kind) == pytest.approx(divergence, rel=1e-9)
    tail = correlated_tail(AT, 1.0, kind, threshold_of(AT, 1.0, kind, 0.05))
    assert cut is not None
    np.testing.assert_allclose(tail, [0.05, *cut[:3]], rtol=1e-7)


@pytest.mark.parametrize(
    ("at", "kind"),
    [
        (AT, KIND),
        (np.log([1e-4, 0.02, 0.03]), CorrelatedTokens(0.01, 0.5, tuple(np.logspace(-2, 1, 12)))),
        (np.log([2.0, 8.0, 9.0]), CorrelatedTokens(1e-5, 2.0, (0.3, 4.0))),  # nothing is cut
        (np.log([0.01, 0.3, 0.5]), CorrelatedTokens(2.0, 0.1, (0.5, 2.0))),  # everything is
    ],
)
def test_slopes_are_differences_of_the_values(at, kind):
    values, slopes = correlated_weights(at, 1.3, kind)
    step = 1e-4
    ends = [
        [correlated_weights(at + sign * step * d, 1.3, kind)[0] for d in np.eye(3)]
        for sign in (1, -1)
    ]
    differences = (np.array(ends[0]) - np.array(ends[1])).T / (2 * step)
    np.testing.assert_allclose(slopes, differences, rtol=1e-5, atol=1e-7)
    # Q = −4∂Ψ/∂V̂, M = 2∂Ψ/∂M̂, V = 4∂Ψ/∂Q̂
    Q_hat, M_hat, V_hat = np.exp(at)
    derived = np.array([-4, 2, 4]) * slopes[3][[2, 1, 0]] / np.array([V_hat, M_hat, Q_hat])
    np.testing.assert_allclose(values[:3], derived, rtol=1e-9, atol=1e-9)
    assert values[0] >= -1e-9


def test_little_noise_and_wide_spectra_are_resolved():
    at, kind = np.array([-12.6, 6.0, 2.3]), CorrelatedTokens(6e-5, 0.03, (0.87, 1.0, 1.22))
    values, slopes = correlated_weights(at, 1.0, kind)
    derived = np.array([-4, 2, 4]) * slopes[3][[2, 1, 0]] / np.exp(at[[2, 1, 0]])
    np.testing.assert_allclose(values[:3], derived, rtol=1e-6)
    # Y' is positive: Ŝ̃ is linear, and its moments are elementary
    kind = CorrelatedTokens(1e-6, 2.0, (0.5, 2.0))
    Q, M, V, _ = correlated_weights(np.log([1e-6, 1.0, 2.0]), 1.0, kind)[0]
    square = 2.0 * np.mean([0.25, 4.0]) + 1.25**2
    assert pytest.approx(square / 4, rel=1e-4) == Q
    assert pytest.approx(square / 2, rel=1e-4) == M
    assert pytest.approx(0.5, rel=1e-4) == V


# -- both stages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "activation", ["linear", pytest.param("softmax", marks=pytest.mark.exhaustive)]
)
def test_equal_levels_reproduce_both_stages(activation):
    first = predict(PLAIN.replace(activation=activation), nodes=64, blocks=2)
    equal = PLAIN.replace(activation=activation, covariance={"eigenvalues": (1.0,) * 4})
    second = predict(equal, nodes=64, blocks=2)
    for stage in ("pretraining", "finetuning"):
        one, other = (getattr(found, stage) for found in (first, second))
        for name, error in one.quadrature_error.items():
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-7, abs=1e-9)
            assert other.quadrature_error[name] == pytest.approx(error, rel=1e-4, abs=1e-8)
        assert second.stability[stage].replicon == pytest.approx(
            first.stability[stage].replicon, rel=1e-7
        )


def test_tokens_of_twice_the_size_are_twice_the_weights():
    # C = 4: S̃ = 4S, w̃ = 2w, so the penalties are divided by 4, and the teacher is 4S0
    scaled = PLAIN.replace(covariance={"eigenvalues": (4.0,) * 4})
    same = PLAIN.replace(
        {
            "pretraining.penalty": 0.1 / 4, "finetuning.penalty": 0.3 / 4,
            "teacher.inverse_temperature": 4.0, "label_noise": 0.5 / 16,
        }
    )  # fmt: skip
    one, other = (predict(asked, nodes=64, blocks=2) for asked in (scaled, same))
    assert pytest.approx(other.pretraining.Q, rel=1e-9) == one.pretraining.Q
    assert one.pretraining.test_error == pytest.approx(other.pretraining.test_error, rel=1e-9)
    assert one.finetuning.q == pytest.approx(other.finetuning.q / 4, rel=1e-7)
    assert one.finetuning.overlap == pytest.approx(other.finetuning.overlap, rel=1e-7)
    assert one.finetuning.test_error == pytest.approx(other.finetuning.test_error, rel=1e-7)


@pytest.mark.parametrize("activation", ["linear", "softmax"])
def test_the_potential_is_the_loss(activation):
    found = predict(COVARIANT.replace(activation=activation), nodes=64, blocks=2).finetuning
    loss = 4.0 * found.train_error + 0.3 * found.q
    assert found.potential == pytest.approx(loss, rel=1e-9)
    # control: with ‖C^{1/2}w‖² in place of ‖w‖² it would not be
    wrong = 4.0 * found.train_error + 0.3 * found.q * np.mean(LEVELS)
    assert abs(wrong / found.potential - 1) > 0.001


def test_the_vector_side_minimises_its_quadratic_problem():
    penalty, v_hat, m_hat, q_hat, signal = 0.3, 1.7, 2.1, 0.4, 1.5
    rng, c = np.random.default_rng(0), np.repeat(LEVELS, 100_000)
    own_star, noise = math.sqrt(signal) * rng.standard_normal(c.size), rng.standard_normal(c.size)
    pulls = m_hat * np.sqrt(c) * own_star + math.sqrt(q_hat) * noise
    # the minimiser of Σ λ'w̃²/c + v̂w̃²/2 − w̃·pull
    w = pulls / (2 * penalty / c + v_hat)
    v = np.mean(1 / (2 * penalty / np.array(LEVELS) + v_hat))
    with jax.enable_x64(True):
        side = vector_side(np.float64(v), penalty, np.array(LEVELS))
        side = type(side)(*map(float, side))
        slope = jax.grad(lambda v: vector_side(v, penalty, np.array(LEVELS)).v_hat)(v)
    assert side.v_hat == pytest.approx(v_hat, rel=1e-12)
    assert 1 / float(slope) == pytest.approx(-side.noise, rel=1e-9)
    seen = signal * np.mean(LEVELS)
    m = m_hat * seen * side.signal
    q = m_hat**2 * seen * (side.bent + side.signal**2) + q_hat * side.noise
    assert np.mean(w * np.sqrt(c) * own_star) == pytest.approx(m, rel=0.01)
    assert np.mean(w**2) == pytest.approx(q, rel=0.01)
    own = w / np.sqrt(c)
    assert np.mean(own * own_star) == pytest.approx(m_hat * signal * v, rel=0.01)
    norm = signal * m_hat**2 * side.noise + q_hat * side.own_noise
    assert np.mean(own**2) == pytest.approx(norm, rel=0.01)
    assert abs(np.mean(own**2) / q - 1) > 0.1  # ‖w‖ is not what the logits see


# -- compression and shift ------------------------------------------------------------------------


def trained(size=240, seed=0):
    return drawn_weights(AT, 1.0, KIND, size, seed)


def off(S, left, c):
    return float(np.sqrt(c) @ ((left - S) ** 2 * np.sqrt(np.outer(c, c))) @ np.sqrt(c))


@pytest.mark.parametrize("calibration", ["pretraining", "finetuning", "anchored"])
@pytest.mark.parametrize("whitening", ["two_sided", "one_sided", "none"])
def test_the_methods_of_the_package_are_what_theory_averages(whitening, calibration):
    if whitening == "none" and calibration != "pretraining":
        with pytest.raises(ProblemError, match="sees no tokens"):
            Compression(rank=0.1, whitening=whitening, calibration=calibration)
        return
    S, _, c = trained()
    after = c[::-1].copy()
    stage = Compression(rank=0.1, whitening=whitening, calibration=calibration)
    left = compress_tied(
        S, 24, whitening=whitening, calibration=calibration,
        covariance=np.diag(c), shifted=np.diag(after),
    )  # fmt: skip
    np.testing.assert_allclose(left, compressed_draw(S, stage, c, after), atol=1e-9)
    rank = np.linalg.matrix_rank(left, tol=1e-9)
    assert rank <= (48 if whitening == "one_sided" else 24)


def test_whitening_the_input_of_the_tied_factor_is_two_sided():
    S, _, c = trained()
    levels, vectors = np.linalg.eigh(S)
    W = vectors * np.sqrt(np.maximum(levels, 0))  # S = WWᵀ; Wᵀ is the layer that sees tokens
    W = W @ np.linalg.qr(np.random.default_rng(1).standard_normal(W.shape))[0]
    factor = svd_llm(W.T, 24, input_gram=np.diag(c)).T
    ways = {
        way: compress_tied(
            S, 24, whitening=way, calibration="pretraining",
            covariance=np.diag(c), shifted=np.diag(c),
        )
        for way in ("two_sided", "one_sided")
    }  # fmt: skip
    np.testing.assert_allclose(factor @ factor.T, ways["two_sided"], atol=1e-8)
    assert np.abs(factor @ factor.T - ways["one_sided"]).max() > 1e-2


def test_two_sided_is_least_distorting():
    S, S0, c = trained()
    one = np.diag(np.ones_like(c))
    lefts = {
        way: compress_tied(
            S, 24, whitening=way, calibration="pretraining", covariance=np.diag(c), shifted=one
        )
        for way in ("two_sided", "one_sided", "none")
    }
    found = {way: off(S, left, c) for way, left in lefts.items()}
    assert found["two_sided"] < 0.97 * found["one_sided"] < 0.9 * found["none"]
    # changes of the factor of rank k only raise it
    root, rng = np.sqrt(c), np.random.default_rng(2)
    levels, vectors = np.linalg.eigh(lefts["two_sided"])
    factor = vectors[:, -24:] * np.sqrt(levels[-24:])
    for _ in range(20):
        moved = factor + 1e-3 * rng.standard_normal(factor.shape)
        assert off(S, moved @ moved.T, c) > found["two_sided"]
    # the antisymmetric part of the one-sided truncation only adds to the distortion
    skew = svd_llm(S, 24, input_gram=np.diag(c))
    assert off(S, skew, c) > found["one_sided"]
    # not the error to the teacher: eigenvectors of S̃ chosen and scaled by it do better
    seen, teacher = (A * np.outer(root, root) for A in (S, S0))
    _, vectors = np.linalg.eigh(seen)
    gains = np.einsum("ij,ik,kj->j", vectors, teacher, vectors)
    best = np.argsort(gains)[-24:]
    oracle = (vectors[:, best] * gains[best]) @ vectors[:, best].T
    kept = lefts["two_sided"] * np.outer(root, root)
    assert np.sum((oracle - teacher) ** 2) < np.sum((kept - teacher) ** 2)


def test_calibration_tokens_stand_in_for_their_covariance():
    S, _, c = trained(120)
    tokens = np.random.default_rng(3).standard_normal((40_000, 120)) * np.sqrt(c)
    measured = Gram.empty(120).add(tokens).mean()
    exact, calibrated = (
        compress_tied(
            S, 12, whitening="two_sided", calibration="pretraining", covariance=C, shifted=C
        )
        for C in (np.diag(c), measured)
    )
    assert off(S, calibrated, c) == pytest.approx(off(S, exact, c), rel=0.01)
    assert off(S, calibrated, c) >= off(S, exact, c)


def test_drawn_weights_reproduce_the_exact_truncation():
    settings = Discretisation.checked(64, 6, 0, 1e-10)
    asked = COVARIANT.replace(compression={"rank": 0.1})
    with jax.enable_x64(True):
        root = solve_pretraining(asked.alone, settings)
        exact = frozen_weights(asked, root, settings)
        # a shift too small to matter takes the sampled route
        near = asked.replace({"covariance.shifted": tuple(c * (1 + 1e-9) for c in LEVELS)})
        drawn = {size: used_weights(near, root.block_unknowns, 6, 0, size) for size in (160, 480)}
    for name in ("Q", "M"):
        for size, found in drawn.items():
            values, wanted = getattr(found, name), getattr(exact, name)[0]
            error = math.hypot(values.std(ddof=1) / math.sqrt(6), 0.5 * wanted / size)
            assert abs(values.mean() - wanted) < 4 * error, (name, size)
    np.testing.assert_allclose(exact.trained.cross, exact.Q)
    assert drawn[480].trained.cross.mean() == pytest.approx(exact.Q[0], rel=0.01)


def test_a_shift_changes_teacher_noise_and_vector():
    settings = Discretisation.checked(64, 4, 0, 1e-10)
    with jax.enable_x64(True):
        root = solve_pretraining(SHIFTED.alone, settings)
        assert SHIFTED.alone == COVARIANT.alone
        found = used_weights(SHIFTED, root.block_unknowns, 4, 0, 400)
    later = np.array(LEVELS[::-1])
    assert found.label_variance == pytest.approx(0.5 * np.mean(later**2) + later.mean() ** 2 + 0.25)
    S, S0, c = drawn_weights(root.unknowns, 1.0, Constants.of(ALONE).correlated, 400, 5)
    after = np.repeat(later, len(c) // 4)
    Q, M = (float(after @ (S * B) @ after) / len(c) for B in (S, S0))
    assert found.Q.mean() == pytest.approx(Q, rel=0.06)
    assert found.M.mean() == pytest.approx(M, rel=0.06)
    assert np.all(np.isnan(found.V))


def test_nothing_learnt_is_nothing_frozen():
    gone = SHIFTED.replace({"pretraining.penalty": 50.0}).replace(
        compression={"rank": 0.1, "whitening": "none"}
    )
    found = predict(gone, nodes=64, blocks=2)
    assert (found.pretraining.status.value, found.effective_noise.Q) == ("collapsed", 0.0)
    later = np.array(LEVELS[::-1])
    variance = 0.25 + 0.5 * np.mean(later**2) + later.mean() ** 2
    assert found.effective_noise.variance == pytest.approx(variance)


# -- the fields -----------------------------------------------------------------------------------


def test_problem_goes_through_text():
    asked = SHIFTED.replace(
        compression={"rank": 0.1, "whitening": "one_sided", "calibration": "anchored"}
    )
    assert Problem.from_dict(asked.to_dict()) == asked
    assert 'calibration = "anchored"' in asked.to_toml()
    assert asked.to_flat()["covariance.shifted"] == LEVELS[::-1]


def test_toml_is_read_back(tmp_path):
    path = tmp_path / "problem.toml"
    SHIFTED.to_toml(path)
    assert Problem.from_toml(path) == SHIFTED


def test_levels_are_shared_out_evenly():
    assert levels_of(COVARIANT, 8).tolist() == [0.2, 0.2, 0.5, 0.5, 1.0, 1.0, 2.5, 2.5]
    assert levels_of(SHIFTED, 4, later=True).tolist() == [2.5, 1.0, 0.5, 0.2]


NOT_HERE = "covariance is not allowed"
REFUSED = {
    "negative": (lambda: Covariance(eigenvalues=(1.0, -1.0)), "must be positive numbers"),
    "none": (lambda: Covariance(eigenvalues=()), "must be positive numbers"),
    "words": (lambda: Covariance(eigenvalues="ab"), "must be positive numbers"),
    "lengths": (lambda: Covariance(eigenvalues=(1.0,), shifted=(1.0, 2.0)), "as many numbers"),
    "law": (
        lambda: COVARIANT.replace({"teacher.law": "goe", "teacher_rank": None}),
        "teacher.law = 'goe' is not allowed with covariance",
    ),
    "spikes": (lambda: COVARIANT.replace({"teacher.spikes": (1.0,)}), "teacher.spikes"),
    "regularizer": (
        lambda: COVARIANT.replace({"pretraining.regularizer": "frobenius"}),
        "pretraining.regularizer = 'frobenius' is not allowed with covariance",
    ),
    "selection": (
        lambda: COVARIANT.replace({"finetuning.selection": {"pool": 9.0}}),
        "finetuning.selection",
    ),
    "shifted re-use": (
        lambda: SHIFTED.replace({"finetuning.sequences": "reused"}),
        "not allowed with covariance.shifted",
    ),
    "whitening": (
        lambda: PLAIN.replace(compression={"rank": 0.1, "whitening": "none"}),
        'compression.whitening = "none" is not allowed without covariance',
    ),
    "calibration": (
        lambda: PLAIN.replace(compression={"rank": 0.1, "calibration": "anchored"}),
        "not allowed without covariance",
    ),
    "re-used, one-sided": (
        lambda: predict(
            COVARIANT.replace({"finetuning.sequences": "reused"}).replace(
                compression={"rank": 0.1, "whitening": "one_sided"}
            ),
            nodes=32, blocks=2,
        ),
        'finetuning.sequences = "reused" is not allowed in the theory',
    ),
    "narrow": (
        lambda: predict(COVARIANT.replace({"pretraining.rank": 0.05}), nodes=32, blocks=2),
        "pretraining.rank = 0.05 is not allowed in the theory with covariance",
    ),
    "gradient": (lambda: gradient(ALONE, ["label_noise"]), NOT_HERE),
    "optimize": (
        lambda: optimize(ALONE, ["label_noise"], "pretraining.test_error"), NOT_HERE,
    ),
    "continuation": (lambda: continuation(ALONE, "label_noise", within=(0.1, 1.0)), NOT_HERE),
    "thresholds": (lambda: thresholds(ALONE), NOT_HERE),
    "spectrum": (lambda: spectrum(ALONE), NOT_HERE),
    "second round": (lambda: second_round(COVARIANT, samples=1.0), NOT_HERE),
    "second round, trained": (
        lambda: simulate_second_round(COVARIANT, 16, 2, samples=1.0), NOT_HERE,
    ),
    "sampled": (lambda: sample_pretrained(ALONE, 20), NOT_HERE),
    "sampled runs": (lambda: simulate(COVARIANT, 16, 2, pretrained="sampled"), NOT_HERE),
    "random start": (lambda: random_start_threshold(COVARIANT, dim=16, seeds=2), NOT_HERE),
    "message passing": (lambda: message_passing(ALONE, 16), NOT_HERE),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(name):
    call, words = REFUSED[name]
    with pytest.raises(ProblemError) as refusal:
        call()
    assert words in str(refusal.value)


def test_truncation_survives_where_divide_and_conquer_fails(monkeypatch):
    S, _, c = trained(80)
    arguments = {"whitening": "two_sided", "calibration": "pretraining"}
    grams = {"covariance": np.diag(c), "shifted": np.diag(c)}
    wanted = compress_tied(S, 8, **arguments, **grams)

    def fails(*args, **kwargs):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(np.linalg, "svd", fails)
    np.testing.assert_allclose(compress_tied(S, 8, **arguments, **grams), wanted, atol=1e-9)


def test_draws_that_learn_nothing_are_no_failure():
    problem = Problem(
        tokens=2, activation="linear", teacher_rank=1.0, label_noise=0.5,
        covariance=Covariance(eigenvalues=(0.5, 1.5), shifted=(1.5, 0.5)),
        pretraining=Pretraining(samples=0.1, penalty=2.5118864315095824),
    )  # fmt: skip
    seen = predict(problem).effective_noise
    assert 0 <= seen.Q < 1e-3
