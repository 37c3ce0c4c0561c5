"""Limits, closed forms and invariances of the theory with known answers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize
from scipy.special import ndtri
from scipy.stats import qmc

from lora_theory import Finetuning, Prediction, Pretraining, Problem, ProblemError, Status, predict
from lora_theory.theory.spectrum import stieltjes, truncated_second_moment

LINEAR = Problem(
    tokens=2,
    activation="linear",
    teacher_rank=0.5,
    label_noise=0.5,
    pretraining=Pretraining(samples=0.2, penalty=0.02),
    finetuning=Finetuning(samples=3.0, penalty=0.2),
)
SOFTMAX = LINEAR.replace(activation="softmax")
REUSED = {"finetuning.sequences": "reused"}


@functools.cache
def solved(problem: Problem, nodes: int = 128) -> Prediction:
    return predict(problem, nodes=nodes)


def solution(problem: Problem, changes=None, nodes: int = 128, **named) -> Prediction:
    answer = solved(problem.replace(changes, **named), nodes)
    assert answer.status.is_solved
    return answer


def spectrum(delta: float, epsilon: float, teacher_rank: float) -> tuple[float, float, float]:
    """J, ∂_δJ and ∂_εJ."""
    with jax.enable_x64(True):
        arguments = (jnp.asarray(x) for x in (delta, epsilon, teacher_rank))
        J, slopes = _value_and_slopes(*arguments)
        return float(J), *map(float, slopes)


_value_and_slopes = jax.jit(jax.value_and_grad(truncated_second_moment, argnums=(0, 1)))


def softmax(scores: np.ndarray) -> np.ndarray:
    """Rows of (T, T, draws)."""
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def symmetric(tokens: int, coordinates: np.ndarray) -> np.ndarray:
    """h_ab = √(1 + δ_ab) z_ab from the k coordinates, (T, T, draws)."""
    fields = np.zeros((tokens, tokens, coordinates.shape[1]))
    rows, columns = np.triu_indices(tokens)
    fields[rows, columns] = fields[columns, rows] = coordinates
    return fields * np.sqrt(1 + np.eye(tokens))[:, :, None]


def sobol_normals(dimension: int, log_count: int) -> np.ndarray:
    points = qmc.Sobol(dimension, rng=np.random.default_rng(0)).random_base2(log_count)
    return ndtri(points).T


# -- linear attention in closed form ---------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
@pytest.mark.parametrize(("delta", "epsilon"), [(0.2, 0.1), (0.6, 0.4), (1.1, 0.9)])
def test_linear_pretraining_follows_its_explicit_curve(tokens, delta, epsilon):
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
    problem = LINEAR.replace(
        {"pretraining.samples": samples, "pretraining.rank": rank},
        tokens=tokens,
        label_noise=label_noise,
        finetuning=None,
    ).replace({"pretraining.penalty": epsilon * M_hat / 2 / math.sqrt(rank)})
    stage = solution(problem).pretraining
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


@pytest.mark.parametrize("tokens", [2, 3])
@pytest.mark.parametrize("sequences", ["fresh", "reused"])
def test_linear_errors_are_those_of_the_order_parameters(tokens, sequences):
    answer = solution(LINEAR, {"finetuning.sequences": sequences}, tokens=tokens)
    noise, stage = answer.effective_noise, answer.finetuning
    V, Q, M = answer.pretraining.V, answer.pretraining.Q, answer.pretraining.M
    shape, delta_eff = (tokens + 1) / tokens, 1.75 - 2 * M + Q
    assert noise.delta_eff == pytest.approx(delta_eff, rel=1e-12)
    shrink = (1 + 4 * V / tokens**2) ** 2 if sequences == "reused" else 1
    assert noise.delta_eff_training == pytest.approx(delta_eff / shrink, rel=1e-12)
    assert noise.gain == pytest.approx(M / Q, rel=1e-12)
    assert noise.variance == pytest.approx(1.75 - M**2 / Q, rel=1e-12)
    gap = 1 + stage.q**2 - 2 * stage.m**2
    assert stage.test_error == pytest.approx(shape * (delta_eff + gap), rel=1e-12)
    assert stage.frozen_test_error == pytest.approx(shape * (delta_eff + 1), rel=1e-12)


def one_token_hats(answer: Prediction, diagonal: float = 2.0, pairs: int = 200_000) -> np.ndarray:
    """(q̂, m̂, v̂) of T = 1 per pair ±ζ of draws, from the cubic for χ; Var h = ``diagonal`` Q."""
    stage, task = answer.finetuning, answer.problem.finetuning
    q, m, v, q0 = stage.q, stage.m, stage.v, task.signal
    rng = np.random.default_rng(1)
    noise = math.sqrt(diagonal * answer.effective_noise.delta_eff_training)
    star = np.tile(math.sqrt(q0) * rng.standard_normal(pairs), 2)
    zeta = rng.standard_normal(pairs)
    omega = m / q0 * star + math.sqrt(q - m**2 / q0) * np.concatenate([zeta, -zeta])
    B = noise * np.tile(rng.standard_normal(pairs), 2) + star**2 - q0 + q
    companion = np.zeros((2 * pairs, 3, 3))
    companion[:, 1, 0] = companion[:, 2, 1] = 1
    companion[:, 0, 1], companion[:, 0, 2] = (4 * B - 1 / v) / 4, omega / (4 * v)
    roots = np.linalg.eigvals(companion)
    value = (roots.real - omega[:, None]) ** 2 / (2 * v) + (B[:, None] - roots.real**2) ** 2
    value = np.where(np.abs(roots.imag) < 1e-6, value, np.inf)
    chi = np.take_along_axis(roots.real, value.argmin(axis=1)[:, None], axis=1)[:, 0]
    G, determinant = (chi - omega) / v, q0 * q - m**2
    response = -G * (q0 * omega - m * star) / determinant
    centring = 2 * 2 * (B - chi**2)
    m_hat = G * (q * star - m * omega) / determinant
    hats = task.samples * np.array([G**2, m_hat, response + centring])
    return hats.reshape(3, 2, pairs).mean(axis=1)


@pytest.mark.parametrize("sequences", ["fresh", "reused"])
def test_one_token_against_its_scalar_problem(sequences):
    answer = solution(
        LINEAR,
        {"finetuning.samples": 12.0, "finetuning.sequences": sequences},
        nodes=1024,
        tokens=1,
    )
    stage = answer.finetuning
    assert stage.branch == "informed"

    def z(draws: np.ndarray) -> np.ndarray:
        errors = np.array([stage.quadrature_error[name] for name in ("q_hat", "m_hat", "v_hat")])
        total = np.hypot(draws.std(axis=1) / math.sqrt(draws.shape[1]), 2 * errors)
        return np.abs(draws.mean(axis=1) - [stage.q_hat, stage.m_hat, stage.v_hat]) / total

    assert z(one_token_hats(answer)).max() < 4.5
    assert z(one_token_hats(answer, diagonal=1.5)).max() > 8
    R = 2 * 0.2 + stage.v_hat
    assert (stage.m, stage.v) == pytest.approx((stage.m_hat / R, 1 / R), rel=1e-8)
    assert stage.q == pytest.approx((stage.m_hat**2 + stage.q_hat) / R**2, rel=1e-8)


# -- penalties to zero and to infinity -------------------------------------------------------------


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
def test_small_penalties_approach_the_ridgeless_limit(activation, visible, samples):
    Q, M, delta, epsilon = ridgeless(samples, visible)
    distances, products = [], []
    for penalty in (1e-3, 1e-4, 1e-5):
        stage = solution(
            SOFTMAX,
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


def test_above_the_threshold_the_response_stays_finite():
    changes = {"pretraining.samples": 0.3}
    stages = [
        solution(LINEAR, {**changes, "pretraining.penalty": penalty}, finetuning=None).pretraining
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
    y, step = softmax(symmetric(2, z)), 1e-5

    def loss(i: int, sign: int) -> np.ndarray:
        u = np.zeros_like(z)
        u[i] = sign * step
        return np.sum((y - softmax(symmetric(2, u))) ** 2, axis=(0, 1))

    G = np.array([(loss(i, -1) - loss(i, 1)) / (2 * step) for i in range(3)])
    M_hat = 2 * samples / 1.75 * np.mean(np.sum(G * z, axis=0))
    Q_hat = 2 * samples * np.mean(np.sum(G**2, axis=0))
    return float(M_hat * upper_edge(math.sqrt(Q_hat) / M_hat) / 2)


@pytest.mark.parametrize(
    ("activation", "critical"), [("linear", linear_collapse), ("softmax", softmax_collapse)]
)
def test_strong_penalties_collapse_pretraining_at_the_predicted_strength(activation, critical):
    penalty = critical(0.2)
    below, above = (
        solution(
            SOFTMAX,
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
    assert above.test_error == pytest.approx(above.train_error, rel=1e-6)
    if activation == "linear":
        assert above.test_error == pytest.approx(1.5 * 1.75, rel=1e-9)


@pytest.mark.parametrize("problem", [LINEAR, pytest.param(SOFTMAX, marks=pytest.mark.slow)])
def test_a_strong_lora_penalty_leaves_the_frozen_error(problem):
    answer = solution(problem, {"finetuning.penalty": 100.0})
    stage = answer.finetuning
    assert stage.branch == "zero"
    assert stage.status is answer.status is Status.COLLAPSED
    assert (stage.q, stage.m) == (0, 0)
    assert math.isnan(stage.overlap)
    assert stage.test_error == stage.frozen_test_error
    assert stage.v == pytest.approx(1 / (200 + stage.v_hat), rel=1e-8)
    norms = [
        solution(problem, {"finetuning.penalty": x}).finetuning.q for x in (0.1, 0.4, 1.0, 100.0)
    ]
    assert norms == sorted(norms, reverse=True)
    assert norms[0] > 0.5


# -- many samples, little noise, little signal -----------------------------------------------------


def test_many_samples_reveal_the_teacher_to_linear_attention():
    distances = []
    for samples in (20.0, 200.0, 2000.0):
        stage = solution(LINEAR, {"pretraining.samples": samples}, finetuning=None).pretraining
        distances.append([stage.Q - 1.5, 1.5 - stage.M, stage.test_error - 1.5 * 0.25])
    falls = np.array(distances[:-1]) / distances[1:]
    assert np.all(np.array(distances) > 0)
    np.testing.assert_allclose(falls, 10, rtol=0.1)


def best_softmax_scale(label_noise: float) -> tuple[float, float]:
    """argmin and min over c of E‖σ(h⁰ + noise) − σ(c h⁰)‖²: no S does better than c S0."""
    normals = sobol_normals(6, 15)
    teacher = symmetric(2, math.sqrt(1.5) * normals[:3])
    y = softmax(teacher + symmetric(2, math.sqrt(label_noise / 2) * normals[3:]))

    def error(c: float) -> float:
        return float(np.mean(np.sum((y - softmax(c * teacher)) ** 2, axis=(0, 1))))

    found = optimize.minimize_scalar(error, bounds=(0.3, 1.5), method="bounded")
    return found.x, found.fun


@pytest.mark.slow
@pytest.mark.parametrize("label_noise", [0.0, 0.5])
def test_many_samples_reveal_the_best_softmax_to_softmax_attention(label_noise):
    """Noise inside the softmax flattens its mean: the student shrinks S0, Q → c²Q0, M → cQ0."""
    scale, floor = best_softmax_scale(label_noise)
    stage = solution(
        SOFTMAX,
        {"pretraining.samples": 1000.0, "pretraining.penalty": 1e-3},
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
def test_noise_to_zero_is_a_limit(activation):
    changes = {"pretraining.samples": 1.0, "pretraining.penalty": 0.05}
    errors = [
        solution(
            SOFTMAX, changes, activation=activation, label_noise=noise, finetuning=None
        ).pretraining.test_error
        for noise in (0.0, 1e-4, 1e-3)
    ]
    assert 0 < errors[0] < errors[1] < errors[2]
    slope = (errors[2] - errors[0]) / (errors[1] - errors[0])
    assert slope == pytest.approx(10, rel=0.05)


def test_without_noise_the_error_vanishes_with_the_penalty():
    errors = [
        solution(
            LINEAR,
            {"pretraining.samples": 1.0, "pretraining.penalty": penalty},
            label_noise=0.0,
            finetuning=None,
        ).pretraining.test_error
        for penalty in (0.1, 0.03)
    ]
    assert errors[0] / errors[1] == pytest.approx((0.1 / 0.03) ** 2, rel=0.1)


@pytest.mark.parametrize("problem", [LINEAR, pytest.param(SOFTMAX, marks=pytest.mark.slow)])
def test_many_finetuning_samples_align_fully(problem):
    stages = [
        solution(problem, {"finetuning.samples": samples}).finetuning
        for samples in (10.0, 100.0, 1000.0)
    ]
    misaligned = np.array([1 - stage.overlap for stage in stages])
    np.testing.assert_allclose(misaligned[:-1] / misaligned[1:], 10, rtol=0.3)
    assert misaligned[-1] < 5e-4
    if problem.activation == "linear":
        assert stages[-1].q == pytest.approx(1, abs=0.01)
        limit = solution(problem, {"finetuning.samples": 1000.0}).pretraining.test_error
        assert stages[-1].test_error == pytest.approx(limit, rel=2e-3)


@pytest.mark.parametrize(
    "problem",
    [
        LINEAR,
        pytest.param(SOFTMAX, marks=pytest.mark.slow),
        pytest.param(SOFTMAX.replace(REUSED), marks=pytest.mark.slow),
    ],
)
def test_weak_signal_is_not_found(problem):
    weak = solution(problem, {"finetuning.signal": 0.01}).finetuning
    assert weak.branch in ("uninformed", "zero")
    assert not weak.overlap > 0
    assert weak.test_error >= weak.frozen_test_error
    strong = solution(problem, {"finetuning.signal": 3.0}).finetuning
    assert strong.branch == "informed"
    assert strong.overlap > 0.9
    assert strong.test_error < strong.frozen_test_error


@pytest.mark.parametrize("problem", [LINEAR, pytest.param(SOFTMAX, marks=pytest.mark.slow)])
def test_reused_sequences_are_fresh_ones_where_pretraining_did_not_fit_them(problem):
    """V → 0 with many samples; at α = .2 the two differ."""
    for samples, same in ((300.0, True), (0.2, False)):
        pair = [
            solution(problem, {"pretraining.samples": samples, "finetuning.sequences": kind})
            for kind in ("fresh", "reused")
        ]
        V = pair[0].pretraining.V
        assert (V < 0.01) == same
        for name in ("q", "m", "v", "overlap", "test_error", "train_error", "potential"):
            first, second = (getattr(answer.finetuning, name) for answer in pair)
            assert (abs(first / second - 1) < 3 * V) == same or not same, name
        gap = pair[1].finetuning.overlap - pair[0].finetuning.overlap
        assert (gap > 0.01) != same


# -- what the stages do to each other --------------------------------------------------------------


@pytest.mark.parametrize("problem", [LINEAR, pytest.param(SOFTMAX, marks=pytest.mark.slow)])
def test_only_penalty_times_root_of_the_rank_matters(problem):
    answers = [
        solution(problem, {"pretraining.rank": rank, "pretraining.penalty": 0.02 / math.sqrt(rank)})
        for rank in (1.0, 4.0, 0.7)
    ]
    other = solution(problem, {"pretraining.rank": 4.0})
    for stage in ("pretraining", "finetuning"):
        for name in getattr(answers[0], stage).quadrature_error:
            values = [getattr(getattr(answer, stage), name) for answer in answers]
            np.testing.assert_allclose(values[1:], values[0], rtol=1e-8, atol=1e-9, err_msg=name)
        first, second = (getattr(answer, stage).test_error for answer in (answers[0], other))
        assert abs(first / second - 1) > 1e-3


def test_a_rank_below_the_learned_one_is_refused():
    learned = solution(LINEAR).pretraining.learned_rank
    assert 0.3 < learned < 0.7
    for factor in (1.001, 0.999):
        rank = factor * learned
        changes = {"pretraining.rank": rank, "pretraining.penalty": 0.02 / math.sqrt(rank)}
        if factor > 1:
            solution(LINEAR, changes)
        else:
            with pytest.raises(ProblemError, match=r"pretraining\.rank = .* at least 0\.\d+"):
                predict(LINEAR.replace(changes), nodes=128)


@pytest.mark.parametrize("samples", [0.1, 1.0, 3.0, 10.0])
def test_the_branch_of_least_potential_is_reported(samples):
    answer = solution(LINEAR, {"finetuning.samples": samples})
    potentials = [branch.potential for branch in answer.branches]
    assert potentials == sorted(potentials)
    assert answer.finetuning is answer.branches[0]
    names = [branch.branch for branch in answer.branches]
    assert names == (["uninformed"] if samples == 0.1 else ["informed", "uninformed"])


# -- test errors from the test law -----------------------------------------------------------------


def sampled_errors(answer: Prediction, draws: int = 200_000) -> dict[str, np.ndarray]:
    """E, E′, the frozen E′ and (as a control) E′ without −qI, per draw of the test law."""
    problem, first, second = answer.problem, answer.pretraining, answer.finetuning
    T, q0, rng = problem.tokens, problem.finetuning.signal, np.random.default_rng(6)
    k, Q_y = T * (T + 1) // 2, 1 + problem.teacher_rank + problem.label_noise / 2
    label = math.sqrt(Q_y) * rng.standard_normal((k, draws))
    z = first.M / Q_y * label
    z = z + math.sqrt(first.Q - first.M**2 / Q_y) * rng.standard_normal((k, draws))
    star, noise = rng.standard_normal((2, T, draws))
    star = math.sqrt(q0) * star
    chi = second.m / q0 * star + math.sqrt(second.q - second.m**2 / q0) * noise
    eye = np.eye(T)[:, :, None]
    h_y, h = symmetric(T, label), symmetric(T, z)
    target, update = star[:, None] * star - q0 * eye, chi[:, None] * chi

    def error(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
        if problem.activation == "linear":
            return np.sum((student - teacher) ** 2, axis=(0, 1)) / T**2
        return np.sum((softmax(student) - softmax(teacher)) ** 2, axis=(0, 1))

    return {
        "pretraining": error(h, h_y),
        "test_error": error(h + update - second.q * eye, h_y + target),
        "frozen_test_error": error(h, h_y + target),
        "uncentred": error(h + update, h_y + target),
    }


@pytest.mark.parametrize(
    "problem",
    [
        LINEAR.replace(tokens=3),
        pytest.param(SOFTMAX, marks=pytest.mark.slow),
        pytest.param(SOFTMAX.replace(REUSED), marks=pytest.mark.slow),
        pytest.param(SOFTMAX.replace(tokens=3), marks=pytest.mark.slow),
    ],
)
def test_errors_are_those_of_the_sampled_test_law(problem):
    answer = solution(problem, nodes=512)
    stages = {"pretraining": answer.pretraining, "finetuning": answer.finetuning}
    draws = sampled_errors(answer)

    def z(draws: np.ndarray, stage: str, name: str) -> float:
        error = math.hypot(
            draws.std() / math.sqrt(draws.size), 2 * stages[stage].quadrature_error[name]
        )
        return abs(draws.mean() - getattr(stages[stage], name)) / error

    assert z(draws["pretraining"], "pretraining", "test_error") < 4.5
    assert z(draws["test_error"], "finetuning", "test_error") < 4.5
    assert z(draws["frozen_test_error"], "finetuning", "frozen_test_error") < 4.5
    assert z(draws["uncentred"], "finetuning", "test_error") > 10
