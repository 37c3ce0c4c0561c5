"""Where the best alignment is, and where the least error."""

import functools

import pytest

from lora_theory import Finetuning, Prediction, Pretraining, Problem, predict

LINEAR = Problem(
    tokens=2,
    activation="linear",
    teacher_rank=0.5,
    label_noise=0.5,
    pretraining=Pretraining(samples=0.2, penalty=0.02),
    finetuning=Finetuning(samples=3.0, penalty=0.2),
)
REUSED = {"finetuning.sequences": "reused"}


@functools.cache
def solved(problem: Problem, nodes: int = 128) -> Prediction:
    return predict(problem, nodes=nodes)


def solution(problem: Problem, changes=None, nodes: int = 128, **named) -> Prediction:
    answer = solved(problem.replace(changes, **named), nodes)
    assert answer.status.is_solved
    return answer


def test_best_alignment_and_least_error_part_for_reused_sequences():
    """docs/theory.md, section 4.3, with its numbers; the best λ for Δ_eff,0 is about .104."""
    answers = {
        penalty: solution(LINEAR, {"pretraining.penalty": penalty, **REUSED}, nodes=1024)
        for penalty in (0.02, 0.07, 0.104, 0.15, 0.2)
    }
    noises = {penalty: answer.effective_noise for penalty, answer in answers.items()}
    found = {0.02: (0.532, 0.092), 0.104: (0.467, 0.124)}
    for penalty, (test, training) in found.items():
        noise = noises[penalty]
        assert (noise.delta_eff, noise.delta_eff_training) == pytest.approx(
            (test, training), abs=6e-4
        )
    assert min(noises, key=lambda penalty: noises[penalty].delta_eff) == 0.104
    little, much = answers[0.02].finetuning, answers[0.2].finetuning
    assert (little.overlap, little.test_error) == pytest.approx((0.99623, 0.82129), abs=3e-4)
    assert (much.overlap, much.test_error) == pytest.approx((0.99294, 0.78508), abs=3e-4)
    assert little.overlap > much.overlap
    assert little.test_error > much.test_error
