"""A penalty given by the user: brute force, the named penalties, matrices, differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_theory import Pretraining, Problem, ProblemError, predict, simulate, spectrum
from lora_theory.expression import Expression
from lora_theory.laws import GOE, Eigenvalues, PowerLaw, Wishart
from lora_theory.theory.divergence import spectral_divergence
from lora_theory.theory.regularizers import Frobenius, NuclearNorm, WeightDecay
from lora_theory.theory.separable import (
    Separable,
    scalar_proximal,
    separable_nodes,
    separable_weights,
)
from lora_theory.theory.weights import Constants, kept_at, weights_at

HATS = np.log([0.5, 1.0, 2.0])
SCALE = 0.8
LAWS = [Wishart(0.5), GOE(), PowerLaw(0.25), Eigenvalues(np.array([0.0, 2.0]))]
NAMED = {
    "s if s >= 0 else inf": WeightDecay(0.3),
    "abs(s)": NuclearNorm(0.3),
    "s**2/2": Frobenius(0.3),
}
#: Smooth, with an infinite curvature, two minima, a jump at 0, kinks elsewhere, none at infinity.
OTHERS = [
    "s**4",
    "abs(s)**1.5",
    "(s**2 - 1)**2",
    "sqrt(abs(s))",
    "maximum(abs(s) - 1, 0)",
    "exp(-s)",
]


@pytest.mark.parametrize("function", [*NAMED, *OTHERS])
def test_minimum_is_that_of_a_dense_grid(function):
    z = np.array([-3.0, -0.7, -0.1, 0.0, 0.2, 1.1, 5.0])
    grid = np.linspace(-8, 8, 1_600_001)[:, None]
    for strength in (0.05, 1.0, 6.0):
        with jax.enable_x64(True):
            found = np.asarray(scalar_proximal(function, jnp.asarray(z), strength))

        def cost(s, strength=strength):
            return (s - z) ** 2 + strength * Expression(function)(s)

        assert np.all(cost(found) <= cost(grid).min(axis=0) + 1e-12)
        assert np.all(cost(found) > cost(grid).min(axis=0) - 1e-9)
    assert np.any(np.abs(found - z) > 0.1)


@pytest.mark.parametrize("function", ["s**4", "abs(s)**1.5", "abs(s)", "s if s >= 0 else inf"])
def test_derivative_is_that_of_differences(function):
    step = 1e-6
    with jax.enable_x64(True):
        z = jnp.array([-3.0, -0.7, 0.4, 2.0])
        at = jax.jit(lambda z: scalar_proximal(function, z, 1.0))
        slope = np.asarray(jax.jvp(at, (z,), (jnp.ones_like(z),))[1])
        difference = (at(z + step) - at(z - step)) / (2 * step)
    np.testing.assert_allclose(slope, difference, atol=1e-5)
    assert np.any(slope > 0.05)


@pytest.mark.parametrize(
    ("function", "law"),
    [*(("abs(s)", law) for law in LAWS), ("s if s >= 0 else inf", LAWS[0]), ("s**2/2", LAWS[2])],
)
def test_named_penalties_have_their_closed_forms(function, law):
    with jax.enable_x64(True):
        constants = Constants(1.0, 1.5, law, SCALE, NAMED[function])
        closed = weights_at(HATS, constants)
        kind = Separable(function, 0.3)
        values, slopes = separable_weights(HATS, law, SCALE, kind)
        ours = kept_at(HATS, constants._replace(regularizer=kind))
        kept = kept_at(HATS, constants)
        spread = [
            spectral_divergence(HATS, c) for c in (constants, constants._replace(regularizer=kind))
        ]
    np.testing.assert_allclose(values, closed.values, rtol=1e-8)
    np.testing.assert_allclose(slopes, closed.slopes, rtol=1e-8, atol=1e-8)
    assert ours.rank == pytest.approx(kept.rank, abs=1e-8)
    assert spread[0] == pytest.approx(spread[1], rel=1e-6)


@pytest.mark.parametrize("function", OTHERS)
def test_slopes_are_those_of_differences(function):
    kind, law, step = Separable(function, 0.3, unit=1.2), Wishart(0.5), 1e-4
    with jax.enable_x64(True):
        _, slopes = separable_weights(HATS, law, SCALE, kind)
        for direction, slope in zip(np.eye(3), slopes.T, strict=True):
            ends = [
                separable_weights(HATS + side * step * direction, law, SCALE, kind)[0]
                for side in (1, -1)
            ]
            np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), atol=2e-7)


@pytest.mark.parametrize("function", OTHERS)
def test_order_parameters_are_those_of_matrices(function):
    """Q, M and V = Tr Ŝ Z/(√Q̂ D), by parts, of S minimising V̂S²/4 − YS/2 + λR(S)."""
    rng, dim, rows = np.random.default_rng(3), 400, []
    kind, law = Separable(function, 0.3), Wishart(0.5)
    Q_hat, M_hat, V_hat = np.exp(HATS)
    with jax.enable_x64(True):
        shrink = jax.jit(lambda y: kind.shrink(y, jnp.asarray(V_hat)))
        for _ in range(6):
            Z = rng.standard_normal((dim, dim))
            Z = (Z + Z.T) / np.sqrt(2 * dim)
            S0 = np.diag(law.spectrum(dim, rng))
            levels, vectors = np.linalg.eigh(M_hat * S0 + np.sqrt(Q_hat) * Z)
            S = (vectors * np.asarray(shrink(levels))) @ vectors.T
            rows.append([np.sum(S * S), np.sum(S * S0), np.sum(S * Z) / np.sqrt(Q_hat)])
        predicted = separable_weights(HATS, law, 1.0, kind)[0][:3]
    measured = np.mean(rows, axis=0) / dim
    error = np.std(rows, axis=0, ddof=1) / np.sqrt(len(rows)) / dim
    assert np.all(np.abs(predicted - measured) < 5 * error + 2 / dim)
    assert np.any(np.abs(1.1 * predicted - measured) > 5 * error + 2 / dim)


def test_jumps_are_seen():
    with jax.enable_x64(True):
        jumping = separable_nodes(HATS, GOE(), 1.0, Separable("sqrt(abs(s))", 0.3))
        smooth = separable_nodes(HATS, GOE(), 1.0, Separable("abs(s)**1.5", 0.3))
    # half-threshold: y_c = 3(V̂r²/2)^{1/3}, s = 2y_c/3V̂ above it
    place = 3 * (2.0 * 0.3**2 / 2) ** (1 / 3)
    assert jumping.dead_zone == pytest.approx((-place, place), rel=1e-9)
    below, above = jumping.jumps[-1]
    assert (below, above) == pytest.approx((0.0, 2 * place / 6), abs=1e-6)
    assert jumping.jumps_within
    assert not smooth.jumps_within


def asked(regularizer, function=None, **changes):
    return Problem(
        tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5, inverse_temperature=1.3,
        pretraining=Pretraining(
            samples=0.5, penalty=0.1, regularizer=regularizer, function=function
        ),
    ).replace(changes)  # fmt: skip


@pytest.mark.parametrize(
    ("named", "function"),
    [
        pytest.param("weight_decay", "s if s >= 0 else inf", marks=pytest.mark.exhaustive),
        ("nuclear_norm", "abs(s)"),
        ("frobenius", "s**2/2"),
    ],
)
def test_problems_with_a_named_penalty(named, function):
    """The whole chain: predicted, trained at finite D, and the spectrum."""
    first, second = asked(named), asked("separable", function)
    one, other = predict(first).pretraining, predict(second).pretraining
    for name in ("Q", "M", "V", "test_error", "potential", "learned_rank"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-8)
    assert predict(first).stability["pretraining"].replicon == pytest.approx(
        predict(second).stability["pretraining"].replicon, rel=1e-6
    )
    trained, ours = (simulate(p, dim=20, seeds=2) for p in (first, second))
    assert ours.status.is_solved
    for one_run, other_run in zip(trained.runs, ours.runs, strict=True):
        for column in ("pretraining.Q", "pretraining.M", "pretraining.objective"):
            assert one_run[column] == pytest.approx(other_run[column], rel=1e-4)
    learned, known = spectrum(second, points=60), spectrum(first, points=60)
    np.testing.assert_allclose(learned.bands, known.bands, atol=1e-7)
    assert learned.mass_at_zero == pytest.approx(known.mass_at_zero, abs=1e-7)
    assert learned.moment_gap == pytest.approx(known.moment_gap, abs=1e-8)


def test_a_jump_is_unstable_and_its_spectrum_has_a_gap():
    problem = asked("separable", "sqrt(abs(s))")
    answer = predict(problem)
    assert answer.status.value == "unstable"
    assert answer.stability["pretraining"].replicon == np.inf
    learned = spectrum(problem, points=60)
    assert learned.mass_at_zero > 0.1
    assert 0 < learned.bands[-1][0] < learned.bands[-1][1]


def test_spectrum_without_density_is_refused():
    with pytest.raises(ProblemError, match=r"pretraining.function = .* has no density"):
        spectrum(asked("separable", "abs(s - 1)"), points=60)


@pytest.mark.parametrize(
    ("regularizer", "function", "words"),
    [
        ("separable", None, "pretraining.function is missing"),
        ("frobenius", "s**2", 'not allowed with pretraining.regularizer = "frobenius"'),
        ("separable", "sqrt(s)", "not a number at s = -10"),
        ("separable", "-s**2", "bounded from below"),
        ("separable", "inf", "finite somewhere"),
        ("separable", "open('x')", "is not allowed in it"),
        ("separable", 3, "an expression in s"),
    ],
)
def test_bad_functions(regularizer, function, words):
    with pytest.raises(ProblemError) as caught:
        asked(regularizer, function)
    assert words in str(caught.value)
    assert "pretraining.function" in str(caught.value)
