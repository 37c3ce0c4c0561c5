"""Thresholds and expansions against numerical solutions: remainders fall with the right power."""

import math

import jax
import numpy as np
import pytest
import sympy as sp
from scipy.optimize import brentq

from lora_theory import Pretraining, Problem, Status, predict
from lora_theory.symbolic import SecondMoment, compiled, wishart_moment
from lora_theory.symbolic import notation as n
from lora_theory.symbolic.expansions import (
    full_rank_solution,
    interpolating_few_samples,
    ridge_few_samples,
    ridge_many_samples,
    weight_decay_many_samples,
)
from lora_theory.symbolic.linear import moreau_average
from lora_theory.symbolic.ridge import ridge_solution
from lora_theory.symbolic.series import implicit, raised
from lora_theory.symbolic.thresholds import (
    collapse,
    collapse_at_few_samples,
    fitting_average,
    interpolating_limit,
    interpolation_threshold,
    visible_directions,
)
from lora_theory.symbolic.wishart import (
    moment_with_full_rank,
    small_noise_moment,
    stieltjes_cubic,
    upper_edge,
)
from lora_theory.theory.spectrum import truncated_second_moment

LABEL_VARIANCE = 1.75


@pytest.fixture(scope="module")
def moment():
    """J of the package and its automatic derivatives, κ0 = .5."""
    both = jax.jit(jax.value_and_grad(truncated_second_moment, argnums=(0, 1)))

    def part(index: int):
        def at(delta, epsilon):
            with jax.enable_x64(True):
                value, slopes = both(float(delta), float(epsilon), 0.5)
                return float((value, *slopes)[index])

        return at

    return SecondMoment(*map(part, range(3)))


def solved(samples, penalty, *, teacher_rank=0.5, label_noise=0.5, tokens=2):
    return predict(
        Problem(
            tokens=tokens,
            activation="linear",
            teacher_rank=teacher_rank,
            label_noise=label_noise,
            pretraining=Pretraining(samples=samples, penalty=penalty),
        )
    )


def exponents(samples, remainders) -> np.ndarray:
    """Powers of α with which remainders change from each entry to the next."""
    return np.diff(np.log(np.abs(remainders)), axis=0) / np.diff(np.log(samples))[:, None]


# -- thresholds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "tokens", "expected"), [("softmax", 2, 0.15348), ("linear", 2, 0.10232)]
)
def test_interpolation_threshold(moment, activation, tokens, expected):
    threshold = compiled(interpolation_threshold(), (n.delta, n.visible), moment=moment)
    visible = float(visible_directions(activation).subs(n.tokens, tokens))
    delta = brentq(lambda delta: threshold(delta, visible)[1] - LABEL_VARIANCE, 0.1, 3.0)
    assert threshold(delta, visible)[0] == pytest.approx(expected, abs=6e-6)


def test_interpolating_limit_at_the_reference_point(moment):
    """docs/theory.md, section 8: softmax, T = 2, α = .1."""
    limit = interpolating_limit()
    arguments = (n.delta, n.epsilon, n.alpha, n.visible)
    Q, M, response = compiled([limit.Q, limit.M, limit.response], arguments, moment=moment)(
        1.68852, 1.10021, 0.1, 4
    )
    assert pytest.approx((1.46520, 1.03738), abs=2e-5) == (Q, M)
    noise = float(
        limit.noise.subs(
            {n.delta: 1.68852, n.alpha: 0.1, n.visible: 4, n.label_variance: 1.75, n.Q: Q, n.M: M}
        )
    )
    assert (response, noise) == pytest.approx((0, 0), abs=2e-5)


def test_fitting_average_is_the_limit_of_the_linear_one():
    values = {n.Q: 1.1, n.M: 0.9, n.label_variance: 1.75, n.V: 1e9, n.tokens: 3}
    fitted = fitting_average().subs(n.visible, visible_directions("linear"))
    ratio = moreau_average().subs(values) / fitted.subs(values)
    assert float(ratio) == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("g", [0.15, 0.3])
def test_collapse_line_against_the_solver(g):
    values = {n.transform: g, n.teacher_rank: 0.5, n.tokens: 2, n.label_variance: LABEL_VARIANCE}
    squared, edge = (float(part.subs(values)) for part in _edge(g))
    values |= {n.delta: math.sqrt(squared), n.edge: edge}
    samples, penalty = (float(part.subs(values)) for part in collapse())
    assert solved(samples, penalty * 1.001).status is Status.COLLAPSED
    below = solved(samples, penalty * 0.98)
    assert below.status.is_solved
    assert below.pretraining.Q > 0


def _edge(g):
    squared, edge = upper_edge()
    delta = math.sqrt(float(squared.subs({n.transform: g, n.teacher_rank: 0.5})))
    return squared, edge.subs(n.delta, delta)


def test_upper_edge_against_the_spectrum_of_a_matrix():
    """And x(g) is there a double root of the cubic."""
    values = {n.transform: 0.25, n.teacher_rank: 0.5}
    squared, edge = (float(part.subs(values)) for part in upper_edge())
    rng, dim = np.random.default_rng(0), 1000
    W, Z = rng.standard_normal((dim, dim // 2)), rng.standard_normal((dim, dim))
    Y = W @ W.T / math.sqrt(dim * dim // 2) + math.sqrt(squared / (2 * dim)) * (Z + Z.T)
    assert np.linalg.eigvalsh(Y)[-1] == pytest.approx(edge, rel=0.02)
    numbers = {n.delta: math.sqrt(squared), n.point: edge, n.teacher_rank: 0.5}
    roots = np.roots([float(entry.subs(numbers)) for entry in stieltjes_cubic()])
    assert np.sort(np.abs(roots - 0.25))[:2] == pytest.approx([0, 0], abs=1e-6)


def test_collapse_at_few_samples_has_the_right_remainder():
    series = collapse_at_few_samples()
    g = np.array([0.01, 0.02, 0.04])
    squared, edge = upper_edge()
    at = compiled([squared], (n.transform, n.teacher_rank))
    delta = np.sqrt(at(g, 0.5)[0])
    edges = compiled([edge], (n.transform, n.delta, n.teacher_rank))(g, delta, 0.5)[0]
    line = compiled(collapse(), (n.delta, n.edge, n.label_variance, n.tokens))
    samples, penalty = line(delta, edges, LABEL_VARIANCE, 2)
    values = {n.label_variance: LABEL_VARIANCE, n.teacher_rank: 0.5, n.tokens: 2}
    (sums,) = compiled([series.expression.subs(values)], [n.alpha])(samples)
    powers = exponents(samples, (sums - penalty)[:, None])
    assert powers == pytest.approx(float(series.remainder), abs=0.15)


# -- the second moment -----------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.3, 2.0])
def test_moment_at_little_noise(eta):
    delta = np.array([0.03, 0.06, 0.12])
    expansion = compiled([small_noise_moment().subs(n.teacher_rank, 0.5)], [n.delta, n.eta])
    exact = wishart_moment(0.5).value(delta, eta * delta**2)
    powers = np.diff(np.log(np.abs(expansion(delta, eta)[0] - exact))) / math.log(2)
    assert powers == pytest.approx(7, abs=0.1)


def test_moment_of_a_full_rank_spectrum(moment):
    """ε below the spectrum: second moment of sampled matrices is 1 + κ0 + δ² about its mean √κ0."""
    whole = compiled([moment_with_full_rank()], [n.delta, n.epsilon, n.teacher_rank])
    assert whole(0.7, -4.0, 0.5)[0] == pytest.approx(moment.value(0.7, -4.0), rel=1e-12)


@pytest.mark.parametrize("exponent", [sp.Integer(-2), sp.Rational(1, 2), -sp.Rational(2, 5)])
def test_series_against_those_of_sympy(exponent):
    x, y = sp.symbols("x y", positive=True)
    part = 2 * x - x**2 / 3 + x**4
    expected = sp.series((1 + part) ** exponent, x, 0, 6).removeO()
    assert sp.expand(raised(part, exponent, x, 6) - expected) == 0
    cubic = y**3 + y * (1 + x) - 2 - x
    root = implicit(cubic, y, x, 6, start=sp.Integer(1))
    assert cubic.subs(y, root).series(x, 0, 6).removeO() == 0


# -- expansions ------------------------------------------------------------------------------------

RIDGE = {n.penalty: 0.2, n.teacher_norm: 1.5, n.label_noise: 0.5, n.tokens: 2, n.visible: 6}


def remainders(series, samples, exact, values) -> np.ndarray:
    expressions = [entry.expression.subs(values) for entry in series.values()]
    sums = compiled(expressions, [n.alpha])(samples)
    return np.array([sums[i] - exact[i] for i in range(len(sums))]).T


@pytest.mark.parametrize(
    ("expansion", "samples", "orders"),
    [
        (ridge_many_samples, 2.0 ** np.arange(5, 8), (2, 3)),
        (ridge_few_samples, 2.0 ** -np.arange(12, 9, -1), (2, 3)),
    ],
)
def test_ridge_expansions(expansion, samples, orders):
    exact = compiled([part.subs(RIDGE) for part in ridge_solution().explicit()], [n.alpha])(samples)
    for order in orders:
        series = expansion(order)
        powers = exponents(samples, remainders(series, samples, exact, RIDGE))
        for entry in series.values():
            assert entry.remainder in (order, -order)
        assert powers == pytest.approx(float(entry.remainder), abs=0.15)


@pytest.mark.parametrize(("order", "first"), [(3, 6), (5, 4), (7, 2)])
def test_weight_decay_at_many_samples(order, first):
    """The more is left out, the more samples until the leading remainder shows."""
    samples = 4.0 ** np.arange(first, first + 3)
    answers = [solved(alpha, 0.1) for alpha in samples]
    exact = [
        np.array([answer.pretraining.V for answer in answers]),
        np.array([answer.pretraining.M for answer in answers]),
        np.array([answer.effective_noise.delta_eff for answer in answers]),
        np.array([answer.pretraining.Q for answer in answers]),
    ]
    values = {
        n.scaled_penalty: 0.1, n.teacher_rank: 0.5, n.label_noise: 0.5, n.tokens: 2, n.visible: 6
    }  # fmt: skip
    series = weight_decay_many_samples(order)
    powers = exponents(samples, remainders(series, samples, exact, values))
    assert powers == pytest.approx(-order / 2, abs=0.1)


def test_weight_decay_of_a_full_rank_teacher():
    samples, penalty = 1.5, 0.15
    answer = solved(samples, penalty, teacher_rank=3.0)
    stage, expected = answer.pretraining, full_rank_solution()
    values = {n.alpha: samples, n.scaled_penalty: penalty, n.teacher_rank: 3.0}
    values |= {n.label_noise: 0.5, n.tokens: 2}
    found = {}
    for symbol in (n.V, n.delta_eff, n.M, n.Q):
        found[symbol] = float(expected[symbol].subs(values | found))
    numbers = (stage.V, answer.effective_noise.delta_eff, stage.M, stage.Q)
    assert tuple(found.values()) == pytest.approx(numbers, rel=1e-9)


def test_interpolation_at_few_samples(moment):
    """The conditions of the limit solved for ε and α at given δ."""
    limit = interpolating_limit()
    at = compiled(
        [limit.response, limit.Q, limit.M], (n.delta, n.epsilon, n.alpha, n.visible), moment=moment
    )

    def state(delta, epsilon):
        product = at(delta, epsilon, 0.0, 1.0)[0]  # ∂_δJ/2δ = αc_T
        return product, *at(delta, epsilon, 0.0, 1.0)[1:]

    def noise(epsilon, delta):
        product, Q, M = state(delta, epsilon)
        return delta**2 * product - (LABEL_VARIANCE - 2 * M + Q)

    deltas = (1e4, 1e5, 1e6)
    states = []
    for delta in deltas:
        top = 2 * delta + math.sqrt(0.5)
        ends = 0.9 * top, top - 1e-6 * delta
        epsilon = brentq(noise, *ends, args=(delta,), xtol=1e-12, rtol=1e-14)
        states.append(state(delta, epsilon))
    product, Q, M = np.array(states).T
    values = {n.visible: 4, n.label_variance: LABEL_VARIANCE, n.teacher_rank: 0.5}
    series = interpolating_few_samples()
    left = remainders(series, product / 4, [Q, M], values)
    assert exponents(product, left)[-1] == pytest.approx([0.9, 1.0], abs=0.02)
    assert [entry.remainder for entry in series.values()] == [sp.Rational(9, 10), 1]
    # what is left of Q comes from −2M in Q = r/(1 − r)(Q_y − 2M), r = Q/Q_y to leading order
    assert -left[-1, 0] * LABEL_VARIANCE / (2 * M * Q)[-1] == pytest.approx(-1, abs=0.02)
