"""Predictions that are kept: coarse ones at once, fine ones that are those of ``predict``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from lora_theory.problem import Problem, ProblemError
from lora_theory.theory import Prediction, predict
from lora_theory.theory.nodes import Discretisation

__all__ = ["COARSE", "FINE", "Precision", "answer", "asked", "tried"]


@dataclass(frozen=True)
class Precision:
    """How finely the averages are taken: as in :func:`lora_theory.predict`."""

    nodes: int | None
    blocks: int

    def points(self, tokens: int) -> int:
        """Nodes per block.

        Example:
            >>> FINE.points(tokens=2), COARSE.points(tokens=2)
            (2048, 128)
        """
        settings = Discretisation(self.nodes, self.blocks, seed=0, tolerance=1e-10)
        return settings.points(tokens)

    @property
    def name(self) -> str:
        """ "fine" if this is what ``predict`` does by default."""
        return "fine" if self == FINE else "coarse"


COARSE, FINE = Precision(128, 2), Precision(None, 8)


@functools.lru_cache(maxsize=4096)
def _kept(problem: Problem, precision: Precision) -> Prediction:
    return predict(problem, nodes=precision.nodes, blocks=precision.blocks)


def answer(problem: Problem, precision: Precision = FINE) -> Prediction:
    """The prediction, computed once per problem and precision.

    Raises:
        ProblemError: as :func:`lora_theory.predict`.

    Example:
        >>> from lora_theory import Pretraining, predict
        >>> problem = Problem(
        ...     tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        ...     pretraining=Pretraining(samples=0.2, penalty=0.02),
        ... )
        >>> answer(problem) == predict(problem), answer(problem) is answer(problem)
        (True, True)
    """
    return _kept(problem, precision)


def asked(problem: Callable[[], Problem]) -> Problem | ProblemError:
    """A problem, or why there is none with such values."""
    try:
        return problem()
    except ProblemError as refusal:
        return refusal


def tried(problem: Problem | ProblemError, precision: Precision) -> Prediction | ProblemError:
    """:func:`answer` at a point that may be refused: the refusal stands in its place."""
    if isinstance(problem, ProblemError):
        return problem
    try:
        return answer(problem, precision)
    except ProblemError as refusal:
        return refusal
