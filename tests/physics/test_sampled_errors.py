"""Test errors against samples of the test law."""

import math

import numpy as np
import pytest
from scipy.special import softmax

from lora_theory import Prediction


def symmetric(tokens: int, coordinates: np.ndarray) -> np.ndarray:
    """h_ab = √(1 + δ_ab) z_ab from the k coordinates, (T, T, draws)."""
    fields = np.zeros((tokens, tokens, coordinates.shape[1]))
    rows, columns = np.triu_indices(tokens)
    fields[rows, columns] = fields[columns, rows] = coordinates
    return fields * np.sqrt(1 + np.eye(tokens))[:, :, None]


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
        return np.sum((softmax(student, axis=1) - softmax(teacher, axis=1)) ** 2, axis=(0, 1))

    return {
        "pretraining": error(h, h_y),
        "test_error": error(h + update - second.q * eye, h_y + target),
        "frozen_test_error": error(h, h_y + target),
        "uncentred": error(h + update, h_y + target),
    }


@pytest.mark.parametrize(
    ("activation", "tokens", "sequences"),
    [
        ("linear", 3, "fresh"),
        pytest.param("softmax", 2, "fresh", marks=pytest.mark.slow),
        pytest.param("softmax", 2, "reused", marks=pytest.mark.slow),
        pytest.param("softmax", 3, "fresh", marks=pytest.mark.slow),
    ],
)
def test_errors_are_those_of_the_sampled_test_law(solution, activation, tokens, sequences):
    changes = {"finetuning.sequences": sequences}
    answer = solution(changes, nodes=512, activation=activation, tokens=tokens)
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
