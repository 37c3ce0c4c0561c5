"""Gaussian averages on the nodes against adaptive quadrature: moments, test errors, hats.

The averages are those of the public solution: at its order parameters the same expectations are
taken by SciPy's adaptive rules in as few dimensions as the law allows.
"""

import functools

import numpy as np
import pytest
from scipy import integrate
from scipy.special import erf

from lora_theory import Finetuning, Prediction, Pretraining, Problem, predict
from lora_theory.theory.nodes import gaussian_blocks

SOFTMAX = Problem(
    tokens=2,
    activation="softmax",
    teacher_rank=0.5,
    label_noise=0.5,
    pretraining=Pretraining(samples=0.2, penalty=0.02),
    finetuning=Finetuning(samples=3.0, penalty=0.2),
)
NODES = 256


@functools.cache
def solved(problem: Problem, nodes: int = NODES) -> Prediction:
    answer = predict(problem, nodes=nodes)
    assert answer.status.is_solved
    return answer


def density(g):
    return np.exp(-(g**2) / 2) / np.sqrt(2 * np.pi)


# -- the nodes ---------------------------------------------------------------------------------


def estimate(function, dimension: int) -> tuple[float, float]:
    """Mean over independent blocks and its standard error."""
    nodes = gaussian_blocks(dimension, 1024, 16, seed=5)
    blocks = np.array([function(block).mean() for block in nodes])
    return float(blocks.mean()), float(blocks.std(ddof=1) / np.sqrt(len(blocks)))


MOMENTS = {
    "sixth power": (3, lambda g: g[1] ** 6, 15.0),
    "product of squares": (4, lambda g: np.prod(g**2, axis=0), 1.0),
    "exponential": (6, lambda g: np.exp(g.sum(axis=0) / np.sqrt(6)), np.exp(0.5)),
    "square of a sum": (12, lambda g: g.sum(axis=0) ** 2, 12.0),
    "oscillation": (2, lambda g: np.cos(3 * g[0]) * np.cos(g[1]), np.exp(-5)),
    "kink": (2, lambda g: np.maximum(g[0] + g[1] - 1, 0), None),
    "jump": (2, lambda g: (g[0] > 1.3) * 1.0, None),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_lie_within_the_spread_of_the_blocks(name):
    dimension, function, exact = MOMENTS[name]
    if name == "kink":
        exact = integrate.quad(lambda g: (2**0.5 * g - 1) * density(g), 0.5**0.5, 40)[0]
    if name == "jump":
        exact = 0.5 * (1 - erf(1.3 / 2**0.5))
    mean, error = estimate(function, dimension)
    assert abs(mean - exact) < 4.5 * error
    assert error < 0.03 * max(1, abs(exact))
    wider = estimate(lambda g: function(1.2 * g), dimension)[0]
    assert abs(wider - exact) > 4.5 * error


# -- softmax, T = 2: σ of a row depends on one difference of logits ----------------------------


def one_row(covariance: np.ndarray) -> float:
    """E‖σ(h^y_a·) − σ(h_a·)‖² = ½E[tanh(d^y/2) − tanh(d/2)]² for Gaussian differences d."""
    root = np.linalg.cholesky(covariance)

    def integrand(b, a):
        label, student = root[0, 0] * a, root[1, 0] * a + root[1, 1] * b
        return 0.5 * (np.tanh(label / 2) - np.tanh(student / 2)) ** 2 * density(a) * density(b)

    return integrate.dblquad(integrand, -9, 9, -9, 9, epsabs=1e-9, epsrel=1e-9)[0]


def label_variance(problem: Problem) -> float:
    return 1 + problem.teacher_rank + problem.label_noise / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{}, {"label_noise": 4.0, "teacher_rank": 3.0}],
)
def test_softmax_test_error_is_a_plane_integral(change):
    """h_aa − h_ab has variance 2Q + Q."""
    problem = SOFTMAX.replace({**change, "pretraining.rank": 1.5}).replace(finetuning=None)
    stage, Q_y = solved(problem).pretraining, label_variance(problem)
    error = stage.quadrature_error["test_error"]

    def expected(Q: float) -> float:
        return 2 * one_row(3 * np.array([[Q_y, stage.M], [stage.M, Q]]))

    # the error at given (Q, M) on given nodes, beside that of the solution itself
    assert abs(expected(stage.Q) - stage.test_error) < 4.5 * error + 2e-4
    assert abs(expected(0.9 * stage.Q) - stage.test_error) > 4.5 * error + 2e-4


def tilted(label_shift, student_shift, covariance: np.ndarray) -> np.ndarray:
    """½E[tanh((d^y + s^y)/2) − tanh((d + s)/2)]² by products of Gauss–Legendre panels."""
    points, weights = np.polynomial.legendre.leggauss(80)
    g, w = 7.5 * points, 7.5 * weights * density(7.5 * points)
    root = np.linalg.cholesky(covariance)
    label = np.tanh((root[0, 0] * g + label_shift[..., None]) / 2)
    student = root[1, 0] * g[:, None] + root[1, 1] * g
    student = np.tanh((student + student_shift[..., None, None]) / 2)
    return 0.5 * np.einsum("i,j,...ij->...", w, w, (label[..., None] - student) ** 2)


def lora_errors(problem: Problem, answer: Prediction, centred: bool = True) -> tuple[float, float]:
    """E′ and the frozen E′: the plane integral given (χ*, χ), averaged over these four numbers.

    Row a has the shift χ_a² − χ_aχ_b − q; by symmetry both rows count the same.  For the frozen
    error two numbers are left.
    """
    first, second, q0 = answer.pretraining, answer.finetuning, problem.finetuning.signal
    covariance = 3 * np.array([[label_variance(problem), first.M], [first.M, first.Q]])
    x, w = np.polynomial.hermite_e.hermegauss(12)
    w = w / w.sum()
    star = np.sqrt(q0) * np.stack(np.meshgrid(x, x, indexing="ij"))
    task = star[0] ** 2 - star[0] * star[1] - q0 * centred
    frozen = np.einsum("i,j,ij->", w, w, tilted(task, np.zeros_like(task), covariance))
    s = np.sqrt(second.q - second.m**2 / q0)
    y, u = np.polynomial.hermite_e.hermegauss(6)
    u = u / u.sum()
    chi = [
        second.m / q0 * star[0][..., None, None] + s * y[:, None],
        second.m / q0 * star[1][..., None, None] + s * y,
    ]
    learnt = chi[0] ** 2 - chi[0] * chi[1] - second.q * centred
    shifts = np.broadcast_to(task[..., None, None], learnt.shape).ravel(), learnt.ravel()
    rows = np.concatenate(
        [
            tilted(a, b, covariance)
            for a, b in zip(*(np.array_split(shift, 40) for shift in shifts), strict=True)
        ]
    )
    weight = np.einsum("i,j,k,l->ijkl", w, w, u, u).ravel()
    return 2 * float(weight @ rows), 2 * float(frozen)


@pytest.mark.slow
def test_softmax_errors_after_fine_tuning_are_plane_integrals_averaged_over_the_task():
    answer = solved(SOFTMAX)
    stage = answer.finetuning

    def distances(values: tuple[float, float]) -> np.ndarray:
        names = ("test_error", "frozen_test_error")
        pairs = zip(names, values, strict=True)
        return np.array(
            [abs(getattr(stage, n) - value) / stage.quadrature_error[n] for n, value in pairs]
        )

    assert distances(lora_errors(SOFTMAX, answer)).max() < 4.5
    assert distances(lora_errors(SOFTMAX, answer, centred=False)).max() > 4.5


def test_the_rules_of_the_averaged_integrals_are_fine_enough():
    covariance = 3 * np.array([[1.75, 0.9], [0.9, 0.8]])
    zero = np.zeros(1)
    assert tilted(zero, zero, covariance)[0] == pytest.approx(one_row(covariance), abs=1e-7)


# -- linear attention: hats of pre-training from the proximal operator -------------------------


@pytest.mark.parametrize("tokens", [1, 3])
def test_linear_hats_are_gaussian_integrals_of_the_proximal_operator(tokens):
    """(2.5) for one of k equal coordinates, ℓ = (2/T²)(z^y − u)²; exact means, no spread."""
    problem = SOFTMAX.replace(activation="linear", tokens=tokens, finetuning=None)
    stage, Q_y = solved(problem).pretraining, label_variance(problem)
    spread, curvature = np.sqrt(stage.Q - stage.M**2 / Q_y), 4 / tokens**2

    def mean(weight) -> float:
        def integrand(g, y):
            label = np.sqrt(Q_y) * y
            z = stage.M / Q_y * label + spread * g
            u = (z / stage.V + curvature * label) / (1 / stage.V + curvature)
            return weight((u - z) / stage.V, label, g) * density(g) * density(y)

        return integrate.dblquad(integrand, -9, 9, -9, 9, epsabs=1e-8, epsrel=1e-8)[0]

    count = problem.pretraining.samples * tokens * (tokens + 1)  # 2α times k coordinates
    Q_hat = count * mean(lambda G, label, g: G**2)
    V_hat = -count / spread * mean(lambda G, label, g: G * g)
    M_hat = count / Q_y * mean(lambda G, label, g: G * label) + stage.M / Q_y * V_hat
    expected = np.array([Q_hat, M_hat, V_hat])
    found = np.array([stage.Q_hat, stage.M_hat, stage.V_hat])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    wrong = np.array([Q_hat, M_hat - stage.M / Q_y * V_hat, V_hat / 2])
    assert np.all(np.abs(found[1:] / wrong[1:] - 1) > 0.1)


# -- linear attention of one token: a scalar proximal operator ---------------------------------


def panels(edges: list[float], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss–Legendre points and weights on every interval between ``edges``."""
    points, weights = np.polynomial.legendre.leggauss(count)
    low, high = np.array(edges[:-1])[:, None], np.array(edges[1:])[:, None]
    half = (high - low) / 2
    return (low + half * (1 + points)).ravel(), (half * weights).ravel()


def scalar_proximal(omega, B, v):
    """argmin (χ − ω)²/2v + (B − χ²)²: the outermost root on the side of ω, from outside."""
    chi = np.sqrt(np.maximum(B, 0)) + np.abs(omega) + 1.0
    for _ in range(60):
        value = (chi - np.abs(omega)) / v + 4 * (chi**2 - B) * chi
        chi = chi - value / (1 / v + 4 * (3 * chi**2 - B))
    return np.sign(omega) * chi


def one_token_hats(answer: Prediction, diagonal: float = 2.0) -> np.ndarray:
    """(q̂, m̂, v̂) of (3.4), Var h = ``diagonal`` Q; panels in ω end at 0, where χ jumps."""
    stage, task = answer.finetuning, answer.problem.finetuning
    q, m, v, q0 = stage.q, stage.m, stage.v, task.signal
    s = np.sqrt(q - m**2 / q0)
    reach = 8 * np.sqrt(q)
    graded = [0.0, *(reach * 4.0 ** np.arange(-9, 1))]
    omega, omega_weight = panels([-x for x in graded[::-1]] + graded[1:], 8)
    star, star_weight = panels(list(np.linspace(-8, 8, 17)), 6)
    noise, noise_weight = panels(list(np.linspace(-8, 8, 9)), 8)
    omega, star, noise = (
        omega[:, None, None],
        np.sqrt(q0) * star[:, None],
        np.sqrt(diagonal * answer.effective_noise.delta_eff_training) * noise,
    )
    zeta = (omega - m / q0 * star) / s
    weight = omega_weight[:, None, None] * density(zeta) / s
    weight = weight * (star_weight * density(star[:, 0] / np.sqrt(q0)))[:, None]
    scaled = noise / np.sqrt(diagonal * answer.effective_noise.delta_eff_training)
    weight = weight * noise_weight * density(scaled)
    assert weight.sum() == pytest.approx(1, abs=1e-5)
    B = noise + star**2 - q0 + q
    chi = scalar_proximal(omega, B, v)
    G = (chi - omega) / v
    response = -np.sum(weight * G * zeta) / s
    slope = 2 * np.sum(weight * (B - chi**2))
    m_hat = np.sum(weight * G * star) / q0 + m / q0 * response
    hats = [np.sum(weight * G**2), m_hat, response + 2 * slope]
    return task.samples * np.array(hats)


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [0.2, 1.0])
def test_one_token_hats_are_integrals_of_a_scalar_operator(penalty):
    problem = SOFTMAX.replace(
        {"finetuning.samples": 12.0, "finetuning.penalty": penalty}, activation="linear", tokens=1
    )
    answer = solved(problem, nodes=1024)
    stage = answer.finetuning
    assert stage.branch == "informed"
    names = ("q_hat", "m_hat", "v_hat")
    found = np.array([getattr(stage, name) for name in names])
    error = np.array([stage.quadrature_error[name] for name in names])
    assert np.all(np.abs(found - one_token_hats(answer)) < 4.5 * error)
    assert np.all(error < 0.05 * np.abs(found))
    assert np.max(np.abs(found - one_token_hats(answer, diagonal=1.0)) / error) > 8
