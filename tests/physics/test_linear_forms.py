"""Fine-tuning of linear attention in closed form."""

import math

import numpy as np
import pytest

from lora_theory import Prediction


@pytest.mark.parametrize("tokens", [2, 3])
@pytest.mark.parametrize("sequences", ["fresh", "reused"])
def test_linear_errors_are_those_of_the_order_parameters(solution, tokens, sequences):
    answer = solution({"finetuning.sequences": sequences}, tokens=tokens)
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
def test_one_token_against_its_scalar_problem(solution, sequences):
    answer = solution(
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
