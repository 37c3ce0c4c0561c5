"""Closed forms of linear attention against quadrature, the solver, simulation and iteration."""

import itertools
import math

import numpy as np
import pytest
import sympy as sp
from scipy.optimize import minimize_scalar

from lora_theory import Pretraining, Problem, predict
from lora_theory.symbolic import compiled, linear, wishart_moment
from lora_theory.symbolic import notation as n
from lora_theory.symbolic.moments import gaussian_mean
from lora_theory.symbolic.ridge import (
    best_penalty,
    replicon,
    ridge_solution,
    ridgeless_noise,
    saddle_point,
)

NUMBERS = {n.label_variance: 1.75, n.Q: 1.1, n.M: 0.9, n.V: 0.6, n.signal: 1.3, n.q: 0.8, n.m: 0.7}


def number(expression: sp.Expr, **more: float) -> float:
    values = {**NUMBERS, n.delta_eff: 1.75 - 1.8 + 1.1}
    return float(expression.subs(values | {getattr(n, key): entry for key, entry in more.items()}))


def mean_over_gaussians(function, count: int) -> float:
    """Three Gauss–Hermite points per standard normal: exact up to the fifth power of each."""
    points, weights = np.polynomial.hermite_e.hermegauss(3)
    grid = np.array(list(itertools.product(points, repeat=count))).T
    weight = np.prod(np.array(list(itertools.product(weights, repeat=count))), axis=1)
    return float(function(grid) @ weight / (2 * math.pi) ** (count / 2))


def frozen_pair(g1, g2):
    label = math.sqrt(1.75) * g1
    return label, 0.9 / 1.75 * label + math.sqrt(1.1 - 0.9**2 / 1.75) * g2


def symmetric(entries: np.ndarray, tokens: int) -> np.ndarray:
    """√(1 + δ_ab) z_ab as matrices, (T, T, nodes)."""
    matrix = np.zeros((tokens, tokens, entries.shape[1]))
    pairs = itertools.combinations_with_replacement(range(tokens), 2)
    for z, (a, b) in zip(entries, pairs, strict=True):
        matrix[a, b] = matrix[b, a] = math.sqrt(1 + (a == b)) * z
    return matrix


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_pretraining_averages_against_quadrature(tokens):
    """One field at a time: ‖A‖²_F = Σ_{a≤b}2z_ab² is a sum."""
    V, fields = 0.6, tokens * (tokens + 1) / 2

    def average(function):
        return fields * mean_over_gaussians(lambda g: function(*frozen_pair(*g)), 2)

    def loss(label, u):
        return np.sum(symmetric((label - u)[None], 1) ** 2, axis=(0, 1)) / tokens**2

    def u(label, z):
        return (tokens**2 * z + 4 * V * label) / (tokens**2 + 4 * V)

    assert number(linear.pretraining_error(), tokens=tokens) == pytest.approx(average(loss))
    trained = average(lambda y, z: loss(y, u(y, z)))
    assert number(linear.training_error(), tokens=tokens) == pytest.approx(trained)
    least = average(lambda y, z: (u(y, z) - z) ** 2 / (2 * V) + loss(y, u(y, z)))
    assert number(linear.moreau_average(), tokens=tokens) == pytest.approx(least)
    # no other u lies lower
    for other in (-0.01, 0.01):
        moved = average(
            lambda y, z, other=other: (
                (u(y, z) + other - z) ** 2 / (2 * V) + loss(y, u(y, z) + other)
            )
        )
        assert moved > least
    noise = number(linear.training_noise(), tokens=tokens)
    assert trained == pytest.approx((tokens + 1) / tokens * noise)


@pytest.mark.parametrize("tokens", [1, 2])
def test_error_after_finetuning_against_quadrature(tokens):
    fields = tokens * (tokens + 1) // 2

    def error(g: np.ndarray) -> np.ndarray:
        noise = math.sqrt(1.05) * g[:fields]
        star = math.sqrt(1.3) * g[fields : fields + tokens]
        chi = 0.7 / 1.3 * star + math.sqrt(0.8 - 0.7**2 / 1.3) * g[fields + tokens :]
        eye = np.eye(tokens)[:, :, None]
        gap = symmetric(noise, tokens) + star[:, None] * star - chi[:, None] * chi
        return np.sum((gap - (1.3 - 0.8) * eye) ** 2, axis=(0, 1)) / tokens**2

    expected = mean_over_gaussians(error, fields + 2 * tokens)
    assert number(linear.lora_error(), tokens=tokens) == pytest.approx(expected)


def test_gaussian_mean_against_quadrature():
    x, y = sp.symbols("x y")
    polynomial = x**4 + 3 * x**2 * y**2 - x * y + 2 * x**3 * y + x * y**2 + 5
    law = {(x, x): sp.Rational(1, 2), (y, x): sp.Rational(1, 3), (y, y): sp.Integer(1)}

    def values(g: np.ndarray) -> np.ndarray:
        a = math.sqrt(0.5) * g[0]
        b = 2 / 3 * a + math.sqrt(1 - 2 / 9) * g[1]
        return sp.lambdify([x, y], polynomial)(a, b)

    assert float(gaussian_mean(polynomial, law)) == pytest.approx(mean_over_gaussians(values, 2))


def test_best_rescaling_is_the_least_noise():
    best, least = (number(part) for part in linear.best_rescaling())
    noise = linear.rescaled_noise()
    found = minimize_scalar(lambda beta: number(noise, rescaling=beta), (0, 1), tol=1e-12)
    assert (best, least) == pytest.approx((found.x, found.fun), rel=1e-7)


def test_parametric_curve_against_the_solver():
    curve = linear.parametric_curve().explicit()
    at = compiled(
        curve,
        (n.delta, n.epsilon, n.label_variance, n.tokens),
        moment=wishart_moment(0.5),
    )
    for delta, epsilon, tokens in ((0.6, 0.4, 2), (1.2, 1.1, 3)):
        Q, M, samples, stiffness, V, penalty = (
            float(value) for value in at(delta, epsilon, 1.75, tokens)
        )
        problem = Problem(
            tokens=tokens,
            activation="linear",
            teacher_rank=0.5,
            label_noise=0.5,
            pretraining=Pretraining(samples=samples, penalty=penalty),
        )
        stage = predict(problem).pretraining
        expected = (stage.Q, stage.M, stage.V, stage.V_hat)
        assert (Q, M, V, stiffness) == pytest.approx(expected, rel=1e-8)


def test_mismatch_slope_against_differences():
    """At the penalty that minimises Δ_eff,0 along the solver's curve."""

    def noises(penalty: float) -> tuple[float, float, float]:
        problem = Problem(
            tokens=2,
            activation="linear",
            teacher_rank=0.5,
            label_noise=0.5,
            pretraining=Pretraining(samples=0.2, penalty=penalty),
        )
        answer = predict(problem)
        V, noise = answer.pretraining.V, answer.effective_noise.delta_eff
        return noise, noise / (1 + V) ** 2, V

    best = minimize_scalar(lambda x: noises(x)[0], (0.05, 0.1, 0.2), tol=1e-7).x
    above, below = (np.array(noises(best + step)) for step in (1e-4, -1e-4))
    slope, response_slope = ((above - below) / 2e-4)[1:]
    noise, _, V = noises(best)
    values = {"tokens": 2, "V": V, "delta_eff": noise, "response_slope": response_slope}
    assert slope > 0
    assert number(linear.mismatch_slope(), **values) == pytest.approx(slope, rel=1e-4)


# -- Frobenius penalty -----------------------------------------------------------------------------

RIDGE = (n.alpha, n.penalty, n.teacher_norm, n.label_noise, n.tokens, n.visible)
POINTS = [(0.05, 0.3, 1.5, 0.5, 2, 6), (0.4, 0.02, 1.2, 0.3, 3, 12), (3.0, 1.0, 2.0, 0.0, 2, 6)]
explicit = compiled(ridge_solution().explicit(), RIDGE)


def iterated(*parameters: float) -> np.ndarray:
    """(V, M, Δ_eff, Q) by damped iteration of the six equations."""
    equations = saddle_point()
    order, hats = (n.Q, n.M, n.V), (n.Q_hat, n.M_hat, n.V_hat)
    to_hats = compiled([equations[symbol] for symbol in hats], (*order, *RIDGE))
    to_order = compiled([equations[symbol] for symbol in order], (*hats, *RIDGE))
    at = np.array([1.0, 0.5, 1.0])
    for _ in range(4000):
        at = 0.5 * at + 0.5 * np.array(to_order(*to_hats(*at, *parameters), *parameters))
    Q, M, V = at
    return np.array([V, M, parameters[2] + parameters[3] / 2 - 2 * M + Q, Q])


@pytest.mark.parametrize("parameters", POINTS)
def test_ridge_solution_is_where_iteration_ends(parameters):
    assert explicit(*parameters) == pytest.approx(iterated(*parameters), rel=1e-9)


def ridge_regression(samples: float, penalty: float, dim: int, seed: int) -> tuple[float, float]:
    """(Q, M) of one minimiser: linear least squares in the D(D+1)/2 entries of S, T = 2."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((dim, dim // 2))
    S0 = W @ W.T / math.sqrt(dim * dim // 2)
    count = round(samples * dim**2)
    X = rng.standard_normal((count, 2, dim))
    i, j = np.triu_indices(dim)
    copies = np.where(i == j, 1.0, 2.0)
    rows, labels = [], []
    for a, b in ((0, 0), (0, 1), (1, 1)):
        outer = X[:, a, i] * X[:, b, j] + X[:, b, i] * X[:, a, j]
        features = (outer * copies / 2 - (a == b) * (i == j)) / math.sqrt(dim)
        noise = math.sqrt(0.5 if a == b else 0.25) * rng.standard_normal(count)
        weight = math.sqrt((1 if a == b else 2) / 4)  # entries of ‖·‖²_F, 1/T²
        rows.append(weight * features)
        labels.append(weight * (features @ S0[i, j] + noise))
    A, y = np.concatenate(rows), np.concatenate(labels)
    entries = np.linalg.solve(A.T @ A + penalty * dim / 2 * np.diag(copies), A.T @ y)
    scale = 1.5 / (np.sum(copies * S0[i, j] ** 2) / dim)  # the draw of the teacher
    return (
        scale * float(np.sum(copies * entries**2)) / dim,
        scale * float(np.sum(copies * entries * S0[i, j])) / dim,
    )


def test_ridge_solution_against_regression():
    samples, penalty = 0.12, 0.15
    small, large = (
        np.array([ridge_regression(samples, penalty, dim, seed) for seed in range(40)])
        for dim in (16, 32)
    )
    limit = 2 * large - small  # offsets are of order 1/D
    mean, error = limit.mean(axis=0), limit.std(axis=0) / math.sqrt(len(limit))

    def z(factor: float) -> float:
        _, M, _, Q = explicit(samples, factor * penalty, 1.5, 0.5, 2, 6)
        return float(np.max(np.abs(mean - [Q, M]) / error))

    assert z(1) < 4
    assert z(2) > 8


def test_best_ridge_penalty_is_the_least_noise():
    for samples, _, norm, noise, tokens, visible in POINTS[:2]:

        def error(logarithm, fixed=(samples, norm, noise, tokens, visible)):
            return explicit(fixed[0], math.exp(logarithm), *fixed[1:])[2]

        found = minimize_scalar(error, (-4.0, -1.0), tol=1e-10)
        values = {n.teacher_norm: norm, n.label_noise: noise, n.tokens: tokens}
        assert float(best_penalty().subs(values)) == pytest.approx(math.exp(found.x), rel=1e-5)


def test_ridgeless_limits():
    below, above = (compiled([part], RIDGE) for part in ridgeless_noise())
    for samples, limit in ((0.1, below), (0.3, above)):
        parameters = (samples, 1e-9, 1.5, 0.5, 2, 6)
        assert explicit(*parameters)[2] == pytest.approx(limit(*parameters)[0], rel=1e-6)


def test_ridge_replicon_is_the_growth_of_the_noise():
    """dQ_new/dQ at fixed M and V: for a spectral map without threshold the same as the replicon."""
    equations = saddle_point()
    growth = equations[n.Q].diff(n.Q_hat) * equations[n.Q_hat].diff(n.Q)
    at_root = compiled([growth.subs(n.V_hat, 1 / n.V - 2 * n.penalty), replicon()], (n.V, *RIDGE))
    for parameters in POINTS:
        V = explicit(*parameters)[0]
        slope, value = at_root(V, *parameters)
        assert value == pytest.approx(slope, rel=1e-9)
        assert 0 < value < 1
