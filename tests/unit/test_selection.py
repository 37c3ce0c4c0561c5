"""Sequences chosen from a pool: scores, refusals, the law of what is kept, and what LoRA feels."""

import json
import math

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import chi2

from lora_theory import (
    EffectiveNoise,
    Finetuning,
    Pretraining,
    Problem,
    ProblemError,
    Selection,
    finetune,
    gradient,
    predict,
    simulate,
    thresholds,
)
from lora_theory.attention import attention
from lora_theory.selection import SCORES, kept, scores_of
from lora_theory.simulation.data import run_key
from lora_theory.simulation.fields import centred_fields
from lora_theory.simulation.finetuning import finetuning_data
from lora_theory.simulation.pretraining import pretraining_data
from lora_theory.simulation.sizes import Sizes
from lora_theory.sweeps import kept_simulations
from lora_theory.theory.kept import kept_coordinates
from lora_theory.theory.nodes import Discretisation

SETTINGS = Discretisation(1024, 4, 0, 1e-10)
FEW = {"nodes": 256, "blocks": 4}


def problem(activation="linear", selection=None, tokens=2, **changes):
    asked = Problem(
        tokens=tokens,
        activation=activation,
        teacher_rank=0.5,
        label_noise=0.5,
        pretraining=Pretraining(samples=0.2, penalty=0.05),
        finetuning=Finetuning(samples=3.0, penalty=0.2, selection=selection),
    )
    return asked.replace({name.replace("__", "."): value for name, value in changes.items()})


def logits(count, tokens=3, seed=0):
    half = np.random.default_rng(seed).standard_normal((count, tokens, tokens))
    return half + half.swapaxes(1, 2)


# -- scores ------------------------------------------------------------------------------------


def entropies(h):
    with jax.enable_x64(True):
        weights = np.asarray(attention(h, "softmax"))
    return [-sum(p * math.log(p) for p in row) / 3 for row in weights.reshape(-1, 9)]


def margins(h):
    with jax.enable_x64(True):
        ordered = np.sort(np.asarray(attention(h, "softmax")), axis=2)
    return [np.mean([row[-1] - row[-2] for row in sequence]) for sequence in ordered]


EXPECTED = {
    # z_ab = h_ab/√(1 + δ_ab), a ≤ b
    "low_variance": lambda h: [
        sum(m[a, b] ** 2 / (1 + (a == b)) for a in range(3) for b in range(a, 3)) for m in h
    ],
    "entropy": lambda h: -np.array(entropies(h)),
    "cross_token": lambda h: [-(m[0, 1] + m[0, 2] + m[1, 2]) / 3 for m in h],
    "margin": margins,
}


@pytest.mark.parametrize("score", SCORES)
def test_named_scores(score):
    h = logits(40)
    assert_allclose(scores_of(Selection(pool=9.0, score=score), h), EXPECTED[score](h), rtol=1e-12)


def test_expressions_and_functions_are_scores_too():
    h = logits(40)
    spelled = Selection(pool=9.0, score="function", function="2*diagonal - cross*abs(cross)")
    own = Selection(
        pool=9.0, score=lambda h: 2 * np.trace(h.T) / 3 - scores_of(CROSS, h) * -abs(cross_of(h))
    )
    assert_allclose(scores_of(spelled, h), scores_of(own, h), rtol=1e-12)


CROSS = Selection(pool=9.0, score="cross_token")


def cross_of(h):
    return scores_of(CROSS, h)


def test_the_lowest_are_kept_in_their_order_and_ties_by_it():
    h = logits(20)
    values = scores_of(CROSS, h)
    best = kept(CROSS, h, 7)
    assert list(best) == sorted(best)
    assert values[best].max() < np.delete(values, best).min()
    assert_array_equal(kept(CROSS, np.zeros((9, 3, 3)), 4), range(4))


# -- refusals ----------------------------------------------------------------------------------

BAD = [
    ({"pool": 2.9}, "finetuning.selection.pool = 2.9 is not allowed with finetuning.samples = 3.0"),
    ({"pool": -1}, "finetuning.selection.pool = -1 is not allowed: it must be > 0"),
    ({"pool": 9, "score": "best"}, "finetuning.selection.score = 'best' is not allowed: it must"),
    ({"pool": 9, "score": "function"}, "finetuning.selection.function is missing"),
    ({"pool": 9, "function": "cross"}, "finetuning.selection.function = 'cross' is not allowed"),
    ({"pool": 9, "score": "function", "function": "height"}, "'height' is not allowed in it"),
    ({"pool": 9, "score": "function", "function": "1 + 1"}, "it must depend on the logits"),
    ({"pool": 9, "score": "function", "function": "log(cross)"}, "it is NaN for"),
    ({"score": "entropy"}, "finetuning.selection.pool is missing"),
    ({"pool": 9, "colour": 1}, "finetuning.selection.colour is not a field"),
    (3, "finetuning.selection = 3 must be a table of fields"),
]


@pytest.mark.parametrize(("selection", "words"), BAD)
def test_a_bad_selection_is_refused_by_name(selection, words):
    with pytest.raises(ProblemError) as caught:
        problem().replace({"finetuning.selection": selection})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def nan_for_some(h):
    return np.where(h[:, 0, 0] > 0, np.nan, 0.0)


def of_wrong_shape(h):
    return h[:, 0]


def failing(h):
    return h.missing


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (nan_for_some, "score = nan_for_some is not allowed: it is NaN for"),
        (of_wrong_shape, r"of_wrong_shape .* of shape \(64, 2\), and must return \(64,\)"),
        (failing, "score = failing fails: AttributeError"),
    ],
)
def test_a_function_that_is_no_score_is_refused_by_name(score, words):
    with pytest.raises(ProblemError, match=words):
        problem(selection=Selection(pool=9.0, score=score))


def nan_far_out(h):
    return np.where(np.abs(h).max(axis=(1, 2)) > 6.8, np.nan, h[:, 0, 0])


def test_a_score_that_is_nan_only_later_is_refused_there():
    asked = problem(selection=Selection(pool=300.0, score=nan_far_out))
    for ask in (lambda: predict(asked, **FEW), lambda: simulate(asked, 16, 1)):
        with pytest.raises(ProblemError, match="nan_far_out is not allowed: it is NaN for"):
            ask()


def test_what_else_does_not_go_together():
    pool = Selection(pool=9.0)
    with pytest.raises(ProblemError, match='not allowed with sequences = "reused"'):
        Finetuning(samples=3.0, penalty=0.2, sequences="reused", selection=pool)
    with pytest.raises(ProblemError, match="must be a Selection or None"):
        Finetuning(samples=3.0, penalty=0.2, selection="entropy")
    cross = problem(selection=Selection(pool=9.0, score="cross_token"))
    with pytest.raises(ProblemError, match='must be "uniform" or "low_variance"'):
        gradient(cross, ["finetuning.penalty"])
    with pytest.raises(ProblemError, match="pool = 1e"):
        predict(cross.replace({"finetuning.selection.pool": 1e12}))
    found = thresholds(problem(selection=pool))
    assert found.informed_appears is None
    assert "leave it out" in found.reasons["informed_appears"]


def test_a_function_of_python_cannot_become_text(tmp_path):
    asked = problem(selection=Selection(pool=9.0, score=cross_of))
    assert json.loads(json.dumps(predict(asked, **FEW).to_dict()))["problem"]["finetuning"][
        "selection"
    ] == {"pool": 9.0, "score": "cross_of", "function": None}
    for ask in (
        asked.to_toml,
        lambda: simulate(asked, 16, 1, save=tmp_path / "weights.npz"),
        lambda: kept_simulations(asked, [16], 1, tmp_path / "runs"),
    ):
        with pytest.raises(ProblemError, match="score = cross_of is a function of Python"):
            ask()
    assert not (tmp_path / "weights.npz").exists()


# -- the law of what is kept -------------------------------------------------------------------


def share_of_variance(tokens, share):
    """c_ρ = F_{k+2}(F_k⁻¹(ρ))/ρ."""
    k = tokens * (tokens + 1) // 2
    return chi2.cdf(chi2.ppf(share, k), k + 2) / share


@pytest.mark.parametrize("tokens", [2, 3])
@pytest.mark.parametrize("share", [0.9, 0.2, 0.015])
def test_low_variance_keeps_what_the_chi_squared_law_says(tokens, share):
    stages = [
        Finetuning(samples=share, penalty=1.0, selection=Selection(pool=1.0, **kind))
        for kind in ({}, {"score": "function", "function": "variance"})
    ]
    expected = share_of_variance(tokens, share)
    for stage in stages:  # radii mapped, and the lowest of many
        z = kept_coordinates(stage, np.array([1.3]), tokens, SETTINGS)
        blocks = (z**2).mean(axis=(1, 2))
        error = blocks.std(ddof=1) / math.sqrt(len(blocks))
        assert error < 0.01 * expected
        assert abs(blocks.mean() - expected) < 5 * error + 1e-6
        radii = np.sort((z**2).sum(axis=1).ravel())
        k = z.shape[1]
        levels = chi2.cdf(radii, k) / share
        assert_allclose(levels, (np.arange(radii.size) + 0.5) / radii.size, atol=0.04)  # 1/√1024
        assert_allclose(z.mean(axis=(0, 2)), 0, atol=0.05)


def test_the_mean_of_a_kept_field_is_that_of_a_gaussian_above_a_threshold():
    """cross_token at T = 2 keeps the largest h_12 = z_12: E z = φ(t)/ρ."""
    share = 0.05
    stage = Finetuning(
        samples=share, penalty=1.0, selection=Selection(pool=1.0, score="cross_token")
    )
    settings = Discretisation(4096, 8, 0, 1e-10)
    z = kept_coordinates(stage, np.array([0.7]), 2, settings)
    # the flat direction f ∝ (1/√2, 1, 1/√2) and the two others of the reflection
    flat = np.array([0.5, 1 / math.sqrt(2), 0.5])
    mirror = flat - [1, 0, 0]
    basis = np.eye(3) - 2 * np.outer(mirror, mirror) / (mirror @ mirror)
    means = (basis @ z.mean(axis=2).T).T
    threshold = -(chi2.ppf(1 - 2 * share, 1) ** 0.5)
    expected = math.exp(-(threshold**2) / 2) / math.sqrt(2 * math.pi) / share
    assert_allclose(means[:, 1].mean(), expected, rtol=2e-3)
    assert_allclose(means[:, [0, 2]].mean(axis=0), 0, atol=0.02)


# -- what LoRA feels ---------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["linear", "softmax"])
def test_choosing_any_or_all_changes_nothing(activation):
    plain = predict(problem(activation), **FEW).finetuning
    any_of_many = predict(problem(activation, Selection(pool=60.0, score="uniform")), **FEW)
    assert any_of_many.finetuning == plain
    all_of_them = predict(problem(activation, Selection(pool=3.0)), **FEW)
    for name in ("q", "m", "overlap", "test_error", "train_error"):
        difference = getattr(all_of_them.finetuning, name) - getattr(plain, name)
        errors = [run.quadrature_error[name] for run in (all_of_them.finetuning, plain)]
        assert abs(difference) < 5 * math.hypot(*errors), name
    noise = all_of_them.effective_noise
    assert_allclose(noise.kept_variance, noise.Q, rtol=5e-3)


@pytest.mark.parametrize("tokens", [2, 3])
def test_linear_attention_feels_the_closed_form(tokens):
    asked = problem(selection=Selection(pool=100.0), tokens=tokens)
    found = predict(asked, **FEW)
    noise, c = found.effective_noise, share_of_variance(tokens, 0.03)
    expected = noise.variance + c * (1 - noise.gain) ** 2 * noise.Q
    assert_allclose(noise.delta_eff_training, expected, rtol=1e-5)
    assert noise.variance < expected < noise.delta_eff
    # a Gaussian of that variance is nearly the same
    Q_y, gaussian = noise.label_variance, EffectiveNoise(gain=1.0, variance=expected, Q=0.0)
    gaussian = EffectiveNoise(gain=1.0, variance=expected, Q=Q_y - expected)
    stage = asked.finetuning
    near = finetune(
        gaussian, Finetuning(samples=stage.samples, penalty=stage.penalty),
        tokens=tokens, activation="linear", **FEW,
    )[0]  # fmt: skip
    plain = predict(problem(tokens=tokens), **FEW).finetuning
    gain = found.finetuning.overlap - plain.overlap
    assert abs(found.finetuning.overlap - near.overlap) < 0.5 * abs(gain) + 1e-3


def test_the_gain_vanishes_where_the_weights_are_scaled_well():
    """β = M/Q: nothing is left to choose for linear attention."""
    noise = predict(problem(), **FEW).effective_noise
    best = {"finetuning__rescaling": noise.gain}
    plain, chosen = (
        predict(problem(selection=selection, **best), **FEW)
        for selection in (None, Selection(pool=300.0))
    )
    assert_allclose(plain.effective_noise.delta_eff, noise.variance, rtol=1e-9)
    assert_allclose(chosen.effective_noise.delta_eff_training, noise.variance, rtol=1e-9)
    error = math.hypot(*(p.finetuning.quadrature_error["overlap"] for p in (plain, chosen)))
    assert abs(chosen.finetuning.overlap - plain.finetuning.overlap) < 5 * error


@pytest.mark.parametrize("change", ["finetuning.rescaling", "inverse_temperature"])
def test_scores_see_the_rescaled_and_tempered_logits(change):
    """Entropy, unlike variance, depends on the scale of the logits: τ√Q, Q that of βS."""
    asked = problem(selection=Selection(pool=30.0, score="entropy")).replace({change: 3.0})
    noise, settings = predict(asked, **FEW).effective_noise, Discretisation(256, 4, 0, 1e-10)
    scale = asked.inverse_temperature * math.sqrt(noise.Q)
    shares = [
        (kept_coordinates(asked.finetuning, np.array([one]), 2, settings) ** 2).mean()
        for one in (scale, scale / 3)
    ]
    assert_allclose(noise.kept_variance / noise.Q, shares[0], rtol=1e-10)
    assert abs(shares[1] / shares[0] - 1) > 1e-5


# -- what a run draws --------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_a_run_keeps_the_lowest_of_its_pool(beta):
    asked = problem("softmax", Selection(pool=12.0, score="entropy"), finetuning__rescaling=beta)
    sizes, key = Sizes.of(asked, 24), run_key(3, 0)
    assert (sizes.finetuning_sequences, sizes.pool_sequences) == (72, 288)
    with jax.enable_x64(True):
        first = pretraining_data(key, asked, sizes, np.float64)
        second = finetuning_data(key, asked, sizes, first, first.start)
        whole = asked.replace({"finetuning.selection": None, "finetuning.samples": 12.0})
        pool = finetuning_data(key, whole, Sizes.of(whole, 24), first, first.start)
        h = beta * np.asarray(centred_fields(pool.sequences, first.start))
    assert_array_equal(second.task_vector, pool.task_vector)
    values = scores_of(asked.finetuning.selection, h)
    best = np.sort(np.argsort(values)[:72])
    assert_array_equal(second.sequences, np.asarray(pool.sequences)[best])
    assert_allclose(second.teacher_fields, np.asarray(pool.teacher_fields)[best], rtol=1e-12)
    assert_allclose(second.frozen_fields, np.asarray(pool.frozen_fields)[best], rtol=1e-12)
