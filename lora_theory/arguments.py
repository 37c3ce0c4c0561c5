"""Arguments that several public functions take: refused in one sentence if not allowed."""

from __future__ import annotations

import math
import numbers
from typing import Any

from lora_theory.problem import Problem, ProblemError

__all__ = ["check_problem", "checked_integer", "is_integer"]


def check_problem(problem: Any, *, covariance: bool = False) -> None:
    """Refuse what is no :class:`~lora_theory.problem.Problem`; a covariance unless it is known."""
    if not isinstance(problem, Problem):
        raise ProblemError(f"problem = {problem!r} must be a Problem")
    if problem.covariance is not None and not covariance:
        raise ProblemError(
            "covariance is not allowed here: leave it out, or ask predict, simulate, compare or "
            "sweep"
        )


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an integer of any library, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def checked_integer(name: str, value: Any, smallest: int, largest: float = math.inf) -> int:
    """``value`` as an int, or a :class:`ProblemError` that says what is allowed."""
    if not is_integer(value) or not smallest <= value <= largest:
        allowed = f"≥ {smallest}" if largest == math.inf else f"from {smallest} to {largest}"
        raise ProblemError(f"{name} = {value!r} is not allowed: it must be an integer {allowed}")
    return int(value)
