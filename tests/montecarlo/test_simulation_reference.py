"""Simulated errors against exact finite-D identities and the reference table (theory.md, 10)."""

import math

import numpy as np
import pytest

from lora_theory import Finetuning, Pretraining, Problem
from lora_theory.observables import Estimate
from lora_theory.simulation import Simulation, simulate

LINEAR = Problem(
    tokens=3,
    activation="linear",
    teacher_rank=0.5,
    label_noise=0.4,
    pretraining=Pretraining(samples=0.4, penalty=0.5),
    finetuning=Finetuning(samples=2.0, penalty=0.3, signal=1.5),
)


@pytest.mark.parametrize("sequences", ["fresh", "reused"])
def test_sampled_errors_are_the_exact_ones_of_linear_attention(tmp_path, sequences):
    dim, path = 20, tmp_path / "weights.npz"
    simulation = simulate(
        LINEAR.replace({"finetuning.sequences": sequences}),
        dim,
        2,
        starts=0,
        test_sequences=50_000,
        save=path,
    )
    factor = (3 + 1) / 3
    with np.load(path) as saved:
        for index, row in enumerate(simulation.runs):
            W, W0 = saved["W"][index], saved["W0"][index]
            w, w_star = saved["w"][index], saved["w_star"][index]
            K = W0 @ W0.T / np.sqrt(dim * W0.shape[1]) - W @ W.T / np.sqrt(dim * W.shape[1])

            def exact(update: np.ndarray, K: np.ndarray = K) -> float:
                return factor * (0.4 / 2 + np.sum((K + update / np.sqrt(dim)) ** 2) / dim)

            task = np.outer(w_star, w_star)
            expected = {
                "pretraining.test_error": exact(np.zeros((dim, dim))),
                "finetuning.frozen_test_error": exact(task),
                "finetuning.test_error": exact(task - np.outer(w, w)),
            }
            for name, entry in expected.items():
                assert abs(row[name] - entry) < 4 * row[f"{name}_sampling"], name
            # The asymptotic forms are off by the cross terms alone, and visibly so at this D.
            q, m = (row[f"finetuning.{name}"] for name in ("q", "m"))
            for error, cross, gap in (
                ("frozen_test_error", "frozen_cross_term", 1.5**2),
                ("test_error", "cross_term", 1.5**2 + q**2 - 2 * m**2),
            ):
                limit = expected["pretraining.test_error"] + factor * gap
                shift = 2 * factor * row[f"finetuning.{cross}"]
                assert expected[f"finetuning.{error}"] == pytest.approx(limit + shift, rel=1e-10)
            visible = 2 * factor * abs(row["finetuning.frozen_cross_term"])
            assert visible > 5 * row["finetuning.frozen_test_error_sampling"]


#: Two stages of linear attention, T=2, κ0=.5, κ=1, Δ=.5, α=.2, α'=3, λ'=.2, D=100: docs/theory.md,
#: section 7, means of the 4 seeds simulated there.
TABLE = {
    (0.02, "fresh"): {"overlap": 0.9785, "test_error": 0.9244},
    (0.02, "reused"): {"overlap": 0.9962, "test_error": 0.8402},
    (0.2, "fresh"): {"overlap": 0.9799, "test_error": 0.8695},
    (0.2, "reused"): {"overlap": 0.9927, "test_error": 0.8025},
}
#: The asymptotic order parameters of the pre-training at the same points.
ORDER = {0.02: {"Q": 1.7088, "M": 1.4634}, 0.2: {"Q": 1.0476, "M": 1.1511}}


@pytest.fixture(scope="module")
def simulations() -> dict[tuple[float, str], Simulation]:
    return {
        (penalty, sequences): simulate(
            Problem(
                tokens=2,
                activation="linear",
                teacher_rank=0.5,
                label_noise=0.5,
                pretraining=Pretraining(samples=0.2, penalty=penalty),
                finetuning=Finetuning(samples=3.0, penalty=0.2, sequences=sequences),
            ),
            dim=100,
            seeds=16,
            starts=0,
            dtype="float32",
        )
        for penalty, sequences in TABLE
    }


def z_score(estimate: Estimate, mean: float, count: float = math.inf) -> float:
    """Difference over its standard error, the spread per seed taken from our larger sample.

    The spread of 4 seeds is a poor guide: the overlap of (0.2, "reused") is skewed, with .0013 per
    seed over 40 seeds, where the table's 4 seeds gave .0002 √4 = .0004.
    """
    return (estimate.mean - mean) / (estimate.error * math.sqrt(1 + estimate.count / count))


@pytest.mark.slow
@pytest.mark.parametrize("case", list(TABLE), ids=str)
def test_two_stages_agree_with_the_reference_simulation(simulations, case):
    stage = simulations[case].finetuning
    for name, mean in TABLE[case].items():
        assert abs(z_score(getattr(stage, name), mean, count=4)) < 3, name


@pytest.mark.slow
@pytest.mark.parametrize("penalty", list(ORDER))
def test_pretraining_agrees_with_the_asymptotic_order_parameters(simulations, penalty):
    stage = simulations[penalty, "fresh"].pretraining
    for name, mean in ORDER[penalty].items():
        assert abs(z_score(getattr(stage, name), mean)) < 3, name


@pytest.mark.slow
def test_the_comparison_can_fail(simulations):
    """Numbers of another penalty, or of the other use of sequences, are told apart."""
    stage = simulations[0.02, "fresh"]
    assert abs(z_score(stage.pretraining.M, ORDER[0.2]["M"])) > 5
    assert abs(z_score(stage.finetuning.overlap, TABLE[0.02, "reused"]["overlap"], count=4)) > 5
