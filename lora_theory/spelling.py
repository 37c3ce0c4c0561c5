"""Fields of a problem spelled as text: in flags, in the address and controls of the explorer."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from lora_theory.problem import Problem, assign

__all__ = ["number", "problem_of_texts", "texts_of"]


def number(text: str) -> int | float | str:
    """The integer or float that a text spells, or the text itself.

    Example:
        >>> number("2"), number("2.0"), number("-1e-3"), number("two")
        (2, 2.0, -0.001, 'two')
    """
    with contextlib.suppress(ValueError):
        whole = int(text)
        if abs(whole) < 10**300:  # what no float can hold becomes infinite below
            return whole
    with contextlib.suppress(ValueError):
        return float(text)
    return text


def problem_of_texts(
    texts: Mapping[str, str | None], raw: Mapping[str, Any] | None = None
) -> Problem:
    """The problem whose fields are spelled by dotted names; those of nested values ``raw`` besides.

    Several numbers are parted by commas; None leaves a field out.

    Raises:
        ProblemError: a name or a value is not allowed, or a field is missing.

    Example:
        >>> texts = {"tokens": "2", "activation": "linear", "label_noise": "0.5",
        ...          "teacher.law": "eigenvalues", "teacher.eigenvalues": "1,-1",
        ...          "pretraining.samples": "0.2", "pretraining.penalty": "1e-2"}
        >>> problem_of_texts(texts).teacher.eigenvalues
        (1.0, -1.0)
        >>> problem_of_texts(texts_of(problem_of_texts(texts))) == problem_of_texts(texts)
        True
    """
    nested: dict[str, Any] = dict(raw or {})
    as_they_are = {spec.name for spec in Problem.specs() if spec.text}
    for name, text in texts.items():
        if text is None:
            continue
        values = [number(part) for part in text.split(",")]
        value = text if name in as_they_are else values if len(values) > 1 else values[0]
        assign(nested, name, value)
    return Problem.from_dict(nested)


def texts_of(problem: Problem) -> dict[str, str]:
    """The given fields of a problem, spelled so that the same numbers are read again.

    Raises:
        ProblemError: a score is a Python function.
    """
    problem.check_text()
    return {name: _text(value) for name, value in problem.to_flat().items()}


def _text(value: Any) -> str:
    return ",".join(map(repr, value)) if isinstance(value, tuple) else f"{value}"
