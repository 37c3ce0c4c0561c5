"""The command line, called inside the test process."""

import contextlib
import io
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from lora_theory import Finetuning, Pretraining, Problem
from lora_theory.cli import main


class Answer(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> Any:
        """The JSON on stdout, strictly read: nothing beside it, no NaN, no Infinity."""

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        return json.loads(self.out, parse_constant=refuse)


Command = Callable[..., Answer]


def flags(problem: Problem) -> list[str]:
    return [word for name, value in problem.to_flat().items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="session")
def command() -> Command:
    def run(*words: object) -> Answer:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(word) for word in words])
        return Answer(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def problem() -> Problem:
    """Both stages with linear attention, the fastest to solve and to train."""
    return Problem(
        tokens=2,
        activation="linear",
        teacher_rank=0.5,
        label_noise=0.5,
        pretraining=Pretraining(samples=0.5, penalty=0.1),
        finetuning=Finetuning(samples=4.0, penalty=0.2),
    )


@pytest.fixture(scope="session")
def words(problem: Problem) -> list[str]:
    """The flags that spell ``problem``."""
    return flags(problem)


@pytest.fixture(scope="session")
def few_nodes() -> list[str]:
    """One choice for all tests, so that the equations are compiled once."""
    return ["--nodes", "64", "--blocks", "2"]
