"""A problem that the tests of limits vary, and its solutions."""

import functools
from collections.abc import Callable

import pytest

from lora_theory import Finetuning, Prediction, Pretraining, Problem, predict


@pytest.fixture(scope="session")
def problem() -> Problem:
    """Linear attention at few samples and little penalty."""
    return Problem(
        tokens=2,
        activation="linear",
        teacher_rank=0.5,
        label_noise=0.5,
        pretraining=Pretraining(samples=0.2, penalty=0.02),
        finetuning=Finetuning(samples=3.0, penalty=0.2),
    )


@pytest.fixture(scope="session")
def solution(problem: Problem) -> Callable[..., Prediction]:
    """The prediction for a problem, by default that one, with changes; solved once."""
    standard = problem

    @functools.cache
    def solved(problem: Problem, nodes: int) -> Prediction:
        return predict(problem, nodes=nodes)

    def solution(changes=None, nodes=128, *, problem=standard, **named) -> Prediction:
        answer = solved(problem.replace(changes, **named), nodes)
        assert answer.status.is_solved
        return answer

    return solution
