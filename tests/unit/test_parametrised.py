"""Low-rank decay and preconditioned weights: minimisers, order parameters, training, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from lora_theory import Pretraining, Problem, ProblemError, predict, simulate, thresholds
from lora_theory.lowrank.spectral import preconditioned
from lora_theory.simulation.message_passing import message_passing
from lora_theory.simulation.minimise import Form, student
from lora_theory.simulation.proximal_descent import nuclear_proximal
from lora_theory.theory.parametrised import LowRankDecay, Preconditioned
from lora_theory.theory.weights import Constants, kept_at, weights_at

V_HAT, Y = 1.7, np.linspace(-2.0, 6.0, 161)
DEGREES = (1, 5, 9)


def asked(activation="linear", **stage):
    return Problem(
        tokens=2, activation=activation, teacher_rank=0.5, label_noise=0.5,
        pretraining=Pretraining(**{"samples": 0.4, "penalty": 0.1} | stage),
    )  # fmt: skip


def decayed(penalty=0.1, **stage):
    return asked(penalty=penalty, regularizer="low_rank_decay", **stage)


def conditioned(degree, scale, penalty=0.1, **stage):
    return asked(penalty=penalty, regularizer="preconditioned", degree=degree, scale=scale, **stage)


# -- the minimisers --------------------------------------------------------------------------------


def test_low_rank_decay_minimises_its_cost():
    kind = LowRankDecay(0.4)
    u = np.linspace(0, 3, 30001)
    cost = V_HAT * u**4 / 4 - Y[:, None] * u**2 / 2 + 0.4 * u
    with jax.enable_x64(True):
        s = kind.shrink(jnp.asarray(Y), V_HAT)
        lowest = kind.lowest(jnp.asarray(Y), s, V_HAT)
    assert np.all(np.asarray(lowest) <= cost.min(axis=1) + 1e-12)
    assert_allclose(s, u[cost.argmin(axis=1)] ** 2, atol=1e-3)
    threshold = 3 * np.cbrt(V_HAT * 0.4**2 / 2)
    with jax.enable_x64(True):
        ends = kind.shrink(threshold * jnp.array([1 - 1e-9, 1 + 1e-9]), V_HAT)
        below, above = np.asarray(ends)
    assert below == 0
    assert above == pytest.approx(2 * threshold / (3 * V_HAT))


def test_metastable_eigenvalues_last_while_they_have_a_minimum():
    kind, end = LowRankDecay(0.4, metastable=True), 3 * np.cbrt(V_HAT * 0.4**2 / 4)
    y = jnp.array([0.999 * end, 1.001 * end, 2.0])
    with jax.enable_x64(True):
        s = np.asarray(kind.shrink(y, V_HAT))
    assert s[0] == 0
    assert_allclose(V_HAT * s[1:] ** 1.5 - y[1:] * s[1:] ** 0.5 + 0.4, 0, atol=1e-6)
    assert np.all(3 * V_HAT * s[1:] > y[1:])  # a minimum in √s


@pytest.mark.parametrize("degree", DEGREES)
def test_preconditioned_weights_minimise_their_cost(degree):
    """Over the singular values on which the polynomial grows."""
    kind = Preconditioned(degree, 0.3, 2.0)
    t = np.linspace(0, 2.5 if degree == 1 else 1, 50001)
    rising = np.cumprod(np.diff(preconditioned(t, degree=degree, scale=1.0), prepend=-1) > 0) > 0
    t = t[rising]
    s = 2.0 * preconditioned(t, degree=degree, scale=1.0) ** 2
    cost = V_HAT * s**2 / 4 - Y[:, None] * s / 2 + 0.3 * t**2
    with jax.enable_x64(True):
        found = kind.shrink(jnp.asarray(Y), V_HAT)
        lowest = kind.lowest(jnp.asarray(Y), found, V_HAT)
    assert np.all(np.asarray(lowest) <= cost.min(axis=1) + 1e-12)
    assert_allclose(found, s[cost.argmin(axis=1)], atol=2e-3)
    assert np.asarray(found).max() <= s.max()
    slope = s[1] / 2.0 / t[1] ** 2  # squared, of g at 0
    zero = 2.0 * slope * Y <= 2 * 0.3
    assert_allclose(np.asarray(found)[zero], 0, atol=1e-12)


# -- order parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "problem",
    [decayed(), decayed(rank=2.0), conditioned(3, 2.0), conditioned(9, 3.0)],
    ids=["decay", "wide", "degree 3", "degree 9"],
)
def test_slopes_are_those_of_the_values(problem):
    constants, step = Constants.of(problem), 1e-4
    with jax.enable_x64(True):
        x = np.log([0.4, 1.6, 1.6])
        at = weights_at(x, constants)
        ends = [
            [np.asarray(weights_at(x + side * step * e, constants).values) for side in (1, -1)]
            for e in np.eye(3)
        ]
    slopes = np.stack([(up - down) / (2 * step) for up, down in ends], axis=1)
    assert_allclose(at.slopes, slopes, atol=1e-6)


def test_degree_one_is_weight_decay():
    plain, found = (predict(problem).pretraining for problem in (asked(), conditioned(1, 3.0)))
    for name in ("Q", "M", "V", "test_error", "learned_rank", "potential"):
        assert getattr(found, name) == pytest.approx(getattr(plain, name), rel=1e-8)


def test_low_rank_decay_is_the_separable_penalty_of_its_root():
    root = asked(regularizer="separable", function="sqrt(s) if s >= 0 else inf")
    spelled, found = predict(root), predict(decayed())
    for name in ("Q", "M", "V", "test_error", "learned_rank", "potential"):
        value = getattr(spelled.pretraining, name)
        assert getattr(found.pretraining, name) == pytest.approx(value, rel=1e-8)
    for one in (spelled, found):
        assert one.stability["pretraining"].replicon == np.inf
        assert one.status.value == "unstable"


def test_far_below_its_scale_a_polynomial_weakens_the_penalty():
    """λ/c_0², what is left of R near 0."""
    weak = predict(asked(penalty=0.1 / 3.625**2)).pretraining
    found = predict(conditioned(9, 1e6)).pretraining
    assert found.test_error == pytest.approx(weak.test_error, rel=1e-5)


def test_temperatures_and_widths_are_units():
    """S' = τS: R has the strength κ^{1/4}λ/√τ, or √κ λ/τ at the scale τŝ."""
    hot = {"inverse_temperature": 2.0, "pretraining.rank": 1.5}
    pairs = [
        (decayed(0.1).replace(hot), decayed(0.1 * 1.5**0.25 / 2**0.5)),
        (conditioned(5, 2.0).replace(hot), conditioned(5, 4.0, penalty=0.1 * 1.5**0.5 / 2)),
    ]
    for left, right in pairs:
        one, other = predict(left).pretraining, predict(right).pretraining
        assert pytest.approx(other.Q / 4, rel=1e-8) == one.Q
        assert one.test_error == pytest.approx(other.test_error, rel=1e-8)


def test_nothing_exceeds_the_scale():
    problem = conditioned(9, 1.5)
    with jax.enable_x64(True):
        kept = kept_at(np.log([0.4, 1.6, 1.6]), Constants.of(problem))
        top = float(Constants.of(problem).regularizer.shrink(jnp.array([50.0]), 1.6)[0])
    assert not kept.jumps
    assert 1.5 < top < 1.5 * 1.022**2


# -- training --------------------------------------------------------------------------------------


def test_the_nuclear_proximal_minimises():
    rng = np.random.default_rng(0)
    W, c, step = rng.standard_normal((6, 4)), 0.7, 0.9

    def cost(candidate):
        return np.sum((candidate - W) ** 2) / (2 * step) + c * np.linalg.norm(candidate, "nuc")

    with jax.enable_x64(True):
        found, penalty = map(np.asarray, nuclear_proximal(c)(jnp.asarray(W), jnp.asarray(step)))
    assert penalty == pytest.approx(c * np.linalg.norm(found, "nuc"))
    nearby = [found + 1e-3 * rng.standard_normal(W.shape) for _ in range(200)]
    assert cost(found) < min(map(cost, nearby))


def test_the_student_is_the_polynomial_of_its_weights():
    form = Form("preconditioned", degree=7, scale=2.0)
    W = 0.3 * np.random.default_rng(0).standard_normal((12, 8))
    top = np.sqrt(2.0) * W.size**0.25
    with jax.enable_x64(True):
        effective = np.asarray(student(jnp.asarray(W), form))
    sigma = np.linalg.svd(W, compute_uv=False)
    expected = preconditioned(sigma, degree=7, scale=top)
    assert_allclose(
        np.linalg.svd(effective, compute_uv=False), np.sort(np.abs(expected))[::-1], rtol=1e-9
    )
    # σ̂ as an eigenvalue of S
    assert top**2 / np.sqrt(W.size) == pytest.approx(2.0)


@pytest.mark.parametrize("problem", [decayed(0.3), conditioned(9, 2.0)], ids=["decay", "PC"])
def test_training_ends_at_a_minimum(problem):
    found = simulate(problem, dim=12, seeds=2, test_sequences=2, dtype="float64")
    assert found.pretraining.missed == 0
    objective = found.pretraining.objective.mean
    worse = simulate(problem, dim=12, seeds=2, test_sequences=2, max_iterations=5)
    assert objective < worse.pretraining.objective.mean


def test_the_start_decides_what_low_rank_decay_learns():
    ranks = {
        scale: simulate(
            decayed(0.3), dim=24, seeds=3, test_sequences=2, start_scale=scale
        ).pretraining.learned_rank
        for scale in (1.0, 0.05)
    }
    assert ranks[1.0].mean > ranks[0.05].mean + 0.1


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"regularizer": "preconditioned", "scale": 1.0}, "pretraining.degree is missing"),
        ({"regularizer": "preconditioned", "degree": 3}, "pretraining.scale is missing"),
        (
            {"regularizer": "preconditioned", "degree": 4, "scale": 1.0},
            "pretraining.degree = 4 is not allowed: it must be 1, 3, 5, 7 or 9",
        ),
        (
            {"regularizer": "preconditioned", "degree": 3, "scale": 0.0},
            "pretraining.scale = 0.0 is not allowed: it must be > 0 and finite",
        ),
        ({"degree": 3}, 'pretraining.degree = 3 is not allowed with pretraining.regularizer = "we'),
        ({"regularizer": "low_rank_decay", "scale": 1.0}, "pretraining.scale = 1.0 is not allowed"),
    ],
)
def test_fields_are_refused_in_words(fields, words):
    with pytest.raises(ProblemError) as refused:
        asked(**fields)
    assert words in str(refused.value)


def test_a_narrow_factor_is_refused_in_the_theory():
    with pytest.raises(
        ProblemError, match=r"pretraining\.rank = 0\.5 is not allowed in the theory"
    ):
        predict(decayed(rank=0.5))


def test_limits_without_penalty_are_not_claimed():
    found = thresholds(decayed())
    assert "low_rank_decay" in found.reasons["interpolation"]


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, "1", True])
def test_starts_out_of_range_are_refused(scale):
    with pytest.raises(ProblemError, match=r"start_scale = .* > 0 and finite"):
        simulate(decayed(), dim=8, seeds=1, start_scale=scale)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ({"regularizer": "frobenius"}, {}),
        ({"regularizer": "weight_decay"}, {"pretrained": "sampled"}),
    ],
)
def test_a_start_that_is_not_used_is_refused(stage, settings):
    with pytest.raises(ProblemError, match=r"start_scale = 2 is not allowed where"):
        simulate(asked(**stage), dim=8, seeds=1, start_scale=2.0, **settings)


def test_least_minima_of_low_rank_decay_are_not_sampled():
    with pytest.raises(ProblemError, match="training does not reach the minimum"):
        simulate(decayed(), dim=8, seeds=1, pretrained="sampled")


def test_message_passing_has_the_penalty_of_the_descent():
    """κD is rounded in both."""
    problem = conditioned(9, 2.0, penalty=0.3, rank=1.03)
    passed = message_passing(problem, 16, damping=0.2).pretraining
    descended = simulate(problem, 16, 1, test_sequences=2, gradient_tolerance=1e-8)
    assert passed.settled
    assert passed.trace["Q"][-1] == pytest.approx(descended.pretraining.Q.mean, rel=1e-6)
