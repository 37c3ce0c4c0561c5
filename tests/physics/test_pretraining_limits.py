"""Limits and closed forms of pre-training with known answers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize
from scipy.special import ndtri, softmax
from scipy.stats import qmc

from lora_theory import Status
from lora_theory.theory.spectrum import stieltjes, truncated_second_moment


def spectrum(delta: float, epsilon: float, teacher_rank: float) -> tuple[float, float, float]:
    """J, ∂_δJ and ∂_εJ."""
    with jax.enable_x64(True):
        arguments = (jnp.asarray(x) for x in (delta, epsilon, teacher_rank))
        J, slopes = _value_and_slopes(*arguments)
        return float(J), *map(float, slopes)


_value_and_slopes = jax.jit(jax.value_and_grad(truncated_second_moment, argnums=(0, 1)))


def attended(z: np.ndarray) -> np.ndarray:
    """Row softmax of the symmetric 2 × 2 fields h_ab = √(1 + δ_ab) z_ab, (2, 2, draws)."""
    a, b, c = z
    return softmax(np.array([[2**0.5 * a, b], [b, 2**0.5 * c]]), axis=1)


def sobol_normals(dimension: int, log_count: int) -> np.ndarray:
    points = qmc.Sobol(dimension, rng=np.random.default_rng(0)).random_base2(log_count)
    return ndtri(points).T


@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
@pytest.mark.parametrize(("delta", "epsilon"), [(0.2, 0.1), (0.6, 0.4), (1.1, 0.9)])
def test_linear_pretraining_follows_its_explicit_curve(solution, tokens, delta, epsilon, problem):
    """docs/theory.md, section 4.2: everything is an explicit function of (δ, ε)."""
    k, teacher_rank, label_noise = tokens * (tokens + 1), 0.5, 0.6
    J, by_delta, by_epsilon = spectrum(delta, epsilon, teacher_rank)
    Q, M = J, J - delta / 2 * by_delta - epsilon / 2 * by_epsilon
    noise = 1 + teacher_rank + label_noise / 2 - 2 * M + Q
    samples = noise / (k * delta**2)
    M_hat = 4 / tokens**2 * (samples * k - by_delta / (2 * delta))
    V = by_delta / (2 * delta * M_hat)
    assert M_hat > 0
    rank = 1.5
    problem = problem.replace(
        {"pretraining.samples": samples, "pretraining.rank": rank},
        tokens=tokens,
        label_noise=label_noise,
        finetuning=None,
    ).replace({"pretraining.penalty": epsilon * M_hat / 2 / math.sqrt(rank)})
    stage = solution(problem=problem).pretraining
    shape = (tokens + 1) / tokens
    expected = {
        "Q": Q,
        "M": M,
        "V": V,
        "Q_hat": delta**2 * M_hat**2,
        "M_hat": M_hat,
        "V_hat": M_hat,
        "test_error": shape * noise,
        "train_error": shape * noise / (1 + 4 * V / tokens**2) ** 2,
        "overlap": M / math.sqrt(Q * 1.5),
    }
    for name, value in expected.items():
        assert getattr(stage, name) == pytest.approx(value, rel=1e-8), name
    assert max(stage.quadrature_error.values()) == 0


def ridgeless(samples: float, visible: int) -> tuple[float, float, float, float]:
    """Q, M, δ and ε for λ → 0⁺ below interpolation (docs/theory.md, 2.5); c_T = ``visible``."""

    def moments(x: np.ndarray) -> tuple[float, float, float]:
        J, by_delta, by_epsilon = spectrum(x[0], x[1], 0.5)
        return J, J - x[0] / 2 * by_delta - x[1] / 2 * by_epsilon, by_delta

    def equations(x: np.ndarray) -> list[float]:
        Q, M, by_delta = moments(x)
        count = samples * visible
        return [by_delta / (2 * x[0]) - count, x[0] ** 2 * count - (1.75 - 2 * M + Q)]

    found = optimize.root(equations, np.array([1.5, 1.0]), tol=1e-12)
    assert np.abs(equations(found.x)).max() < 1e-9
    return *moments(found.x)[:2], *found.x


def threshold(visible: int) -> float:
    def balance(delta: float) -> float:
        J, by_delta, _ = spectrum(delta, 0.0, 0.5)
        return J - delta / 2 * by_delta - 1.75

    delta = optimize.brentq(balance, 0.3, 5.0, xtol=1e-13)
    return spectrum(delta, 0.0, 0.5)[1] / (2 * delta * visible)


def test_interpolation_thresholds_and_the_ridgeless_limit():
    assert threshold(4) == pytest.approx(0.15348, abs=1e-5)
    assert threshold(6) == pytest.approx(0.10232, abs=1e-5)
    expected = (1.46520, 1.03738, 1.68852, 1.10021)
    assert ridgeless(0.1, 4) == pytest.approx(expected, abs=2e-5)
    assert 0 < ridgeless(0.1533, 4)[3] < 0.05, "ε → 0 at the threshold"


@pytest.mark.parametrize(
    ("activation", "visible", "samples"),
    [("linear", 6, 0.07), pytest.param("softmax", 4, 0.1, marks=pytest.mark.slow)],
)
def test_small_penalties_approach_the_ridgeless_limit(solution, activation, visible, samples):
    Q, M, delta, epsilon = ridgeless(samples, visible)
    distances, products = [], []
    for penalty in (1e-3, 1e-4, 1e-5):
        stage = solution(
            {"pretraining.penalty": penalty, "pretraining.samples": samples},
            activation=activation,
            finetuning=None,
        ).pretraining
        reached = (stage.Q, stage.M, 2 * penalty / stage.M_hat)
        distances.append(np.abs(np.array(reached) / [Q, M, epsilon] - 1))
        products.append(penalty * stage.V)
    first, second, third = distances
    assert np.all(second < 0.6 * first)
    assert np.all(third < 0.6 * second)
    assert third.max() < 0.06
    assert math.sqrt(stage.Q_hat) / stage.M_hat == pytest.approx(delta, rel=0.01)
    assert products[2] == pytest.approx(products[1], rel=0.05), "V diverges as 1/λ"


def test_above_the_threshold_the_response_stays_finite(solution):
    changes = {"pretraining.samples": 0.3}
    stages = [
        solution({**changes, "pretraining.penalty": penalty}, finetuning=None).pretraining
        for penalty in (1e-3, 1e-4)
    ]
    assert pytest.approx(stages[1].V, rel=0.02) == stages[0].V
    assert stages[0].test_error == pytest.approx(stages[1].test_error, rel=0.01)


def upper_edge(delta: float) -> float:
    """The largest point at which μ_δ has a density."""
    inverse = jax.jit(lambda x: stieltjes(x, jnp.asarray(delta), jnp.asarray(0.5))[1])
    with jax.enable_x64(True):
        low, high = 0.0, 40.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if float(inverse(middle)) > 0 else (low, middle)
    return low


def linear_collapse(samples: float) -> float:
    T, Q_y = 2, 1.75
    M_hat, Q_hat = 4 * samples * (T + 1) / T, 16 * samples * (T + 1) * Q_y / T**3
    return M_hat * upper_edge(math.sqrt(Q_hat) / M_hat) / 2


def softmax_collapse(samples: float) -> float:
    """From the force −∇ℓ at W = 0, by differences."""
    z = math.sqrt(1.75) * sobol_normals(3, 15)
    y, step = attended(z), 1e-5

    def loss(i: int, sign: int) -> np.ndarray:
        u = np.zeros_like(z)
        u[i] = sign * step
        return np.sum((y - attended(u)) ** 2, axis=(0, 1))

    G = np.array([(loss(i, -1) - loss(i, 1)) / (2 * step) for i in range(3)])
    M_hat = 2 * samples / 1.75 * np.mean(np.sum(G * z, axis=0))
    Q_hat = 2 * samples * np.mean(np.sum(G**2, axis=0))
    return float(M_hat * upper_edge(math.sqrt(Q_hat) / M_hat) / 2)


@pytest.mark.parametrize(
    ("activation", "critical"), [("linear", linear_collapse), ("softmax", softmax_collapse)]
)
def test_strong_penalties_collapse_pretraining_at_the_predicted_strength(
    solution, activation, critical
):
    penalty = critical(0.2)
    below, above = (
        solution(
            {"pretraining.penalty": factor * penalty},
            activation=activation,
            finetuning=None,
        ).pretraining
        for factor in (0.93, 1.04)
    )
    assert below.status is Status.CONVERGED
    assert 0 < below.Q < 0.02
    assert below.overlap > 0.1
    assert above.status is Status.COLLAPSED
    assert (above.Q, above.M, above.V, above.learned_rank) == (0, 0, 0, 0)
    assert math.isnan(above.overlap)
    noise = math.hypot(*(above.quadrature_error[f"{n}_error"] for n in ("test", "train")))
    assert above.test_error == pytest.approx(above.train_error, rel=1e-6, abs=4 * noise + 1e-9)
    if activation == "linear":
        assert above.test_error == pytest.approx(1.5 * 1.75, rel=1e-9)


def test_many_samples_reveal_the_teacher_to_linear_attention(solution):
    distances = []
    for samples in (20.0, 200.0, 2000.0):
        stage = solution({"pretraining.samples": samples}, finetuning=None).pretraining
        distances.append([stage.Q - 1.5, 1.5 - stage.M, stage.test_error - 1.5 * 0.25])
    falls = np.array(distances[:-1]) / distances[1:]
    assert np.all(np.array(distances) > 0)
    np.testing.assert_allclose(falls, 10, rtol=0.1)


def best_softmax_scale(label_noise: float) -> tuple[float, float]:
    """argmin and min over c of E‖σ(h⁰ + noise) − σ(c h⁰)‖²: no S does better than c S0."""
    normals = sobol_normals(6, 15)
    teacher = math.sqrt(1.5) * normals[:3]
    y = attended(teacher + math.sqrt(label_noise / 2) * normals[3:])

    def error(c: float) -> float:
        return float(np.mean(np.sum((y - attended(c * teacher)) ** 2, axis=(0, 1))))

    found = optimize.minimize_scalar(error, bounds=(0.3, 1.5), method="bounded")
    return found.x, found.fun


@pytest.mark.slow
@pytest.mark.parametrize("label_noise", [0.0, 0.5])
def test_many_samples_reveal_the_best_softmax_to_softmax_attention(solution, label_noise):
    """Noise inside the softmax flattens its mean: the student shrinks S0, Q → c²Q0, M → cQ0."""
    scale, floor = best_softmax_scale(label_noise)
    stage = solution(
        {"pretraining.samples": 1000.0, "pretraining.penalty": 1e-3},
        activation="softmax",
        label_noise=label_noise,
        finetuning=None,
    ).pretraining
    error = stage.quadrature_error
    assert abs(stage.Q - scale**2 * 1.5) < 4 * error["Q"] + 3e-3
    assert abs(stage.M - scale * 1.5) < 4 * error["M"] + 2e-3
    assert abs(stage.test_error - floor) < 4 * error["test_error"] + 1e-3
    assert stage.overlap == pytest.approx(1, abs=1e-4)
    assert (abs(scale - 1) < 1e-3) == (label_noise == 0)


@pytest.mark.parametrize("activation", ["linear", "softmax"])
def test_noise_to_zero_is_a_limit(solution, activation):
    changes = {"pretraining.samples": 1.0, "pretraining.penalty": 0.05}
    errors = [
        solution(
            changes, activation=activation, label_noise=noise, finetuning=None
        ).pretraining.test_error
        for noise in (0.0, 1e-4, 1e-3)
    ]
    assert 0 < errors[0] < errors[1] < errors[2]
    slope = (errors[2] - errors[0]) / (errors[1] - errors[0])
    assert slope == pytest.approx(10, rel=0.05)


def test_without_noise_the_error_vanishes_with_the_penalty(solution):
    """Down to where Q0 − 2M + Q, a difference of numbers of order one, is rounding."""
    penalties = 0.1 * 0.6 ** np.arange(20)
    errors = [
        solution(
            {"pretraining.samples": 1.0, "pretraining.penalty": penalty},
            label_noise=0.0,
            finetuning=None,
        ).pretraining.test_error
        for penalty in penalties
    ]
    ratios = np.divide(errors[:-1], errors[1:])
    assert ratios[:3] == pytest.approx(0.6**-2, rel=0.1)
    assert ratios[3:] == pytest.approx(0.6**-2, rel=0.01)
