"""What a field of a problem may hold: written beside its definition, checked in one place."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable
from dataclasses import MISSING, field
from typing import Any, NamedTuple

__all__ = ["FieldSpec", "ProblemError", "refuse_misplaced", "spec", "validate"]


class ProblemError(ValueError):
    """A field of the problem has a value that is not allowed; the message is one sentence."""


def spec(
    symbol: str,
    meaning: str,
    allowed: str,
    *,
    default: Any = MISSING,
    choices: tuple[str, ...] = (),
    expression: Callable[[str], str | None] | None = None,
    function: bool = False,
) -> Any:
    """A field: its row of the notation table, and what it allows.

    Args:
        expression: for text that spells one: why it is not allowed, or None; or a ValueError.
        function: whether it may also be a Python function.
    """
    metadata = {
        "symbol": symbol, "meaning": meaning, "allowed": allowed, "choices": choices,
        "expression": expression, "function": function,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


def validate(part: Any, prefix: str) -> None:
    """Check and normalise the plain fields of one part against its specs."""
    for entry in dataclasses.fields(part):
        if not entry.metadata:
            continue
        name, value, allowed = entry.name, getattr(part, entry.name), entry.metadata["allowed"]
        complaint = ProblemError(f"{prefix}{name} = {value!r} is not allowed: it must be {allowed}")
        if value is None and entry.default is None:
            continue
        if entry.metadata["function"] and callable(value):
            continue
        if entry.metadata["choices"]:
            if not isinstance(value, str) or value not in entry.metadata["choices"]:
                raise complaint
        elif entry.metadata["expression"]:
            _check_expression(value, entry.metadata["expression"], complaint)
        elif prefix + name in _LISTS:
            allows = _LISTS[prefix + name]
            object.__setattr__(part, name, _numbers(value, allows, complaint))
        elif isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise complaint
        elif name in _INTEGERS:
            if not isinstance(value, numbers.Integral) or not _INTEGERS[name](int(value)):
                raise complaint
            object.__setattr__(part, name, int(value))
        else:
            try:
                number = float(value)
            except OverflowError:
                raise ProblemError(f"{prefix}{name} is too large: it must be finite") from None
            in_range = number >= 0 if allowed == "≥ 0" else number > 0
            in_range &= not (allowed.endswith("< 0.5") and number >= 0.5)
            in_range &= not (allowed.endswith("≤ 1") and number > 1)
            if not (math.isfinite(number) and in_range):
                raise ProblemError(f"{complaint.args[0]} and finite")
            object.__setattr__(part, name, number)


def _positive(entries: Iterable[float]) -> bool:
    return all(entry > 0 for entry in entries)


#: Fields that hold several numbers, and whether these are allowed.
_LISTS: dict[str, Callable[[Iterable[float]], bool]] = {
    "teacher.eigenvalues": any, "teacher.spikes": all,
    "covariance.eigenvalues": _positive, "covariance.shifted": _positive,
}  # fmt: skip


#: Fields that hold an integer, and which of them they allow.
_INTEGERS: dict[str, Callable[[int], bool]] = {
    "tokens": lambda value: value >= 1,
    "degree": lambda value: value in (1, 3, 5, 7, 9),
}


def _numbers(
    value: Any, allows: Callable[[Iterable[float]], bool], complaint: ProblemError
) -> tuple[float, ...]:
    """One or more finite numbers."""
    entries = [value] if isinstance(value, numbers.Real) else value
    try:
        found = tuple(float(entry) for entry in entries)
    except (TypeError, ValueError, OverflowError):
        raise complaint from None
    finite = len(found) > 0 and all(map(math.isfinite, found))
    if isinstance(value, str) or not finite or not allows(found):
        raise complaint
    return found


def _check_expression(
    text: Any, fault_of: Callable[[str], str | None], complaint: ProblemError
) -> None:
    if not isinstance(text, str):
        raise complaint
    try:
        fault = fault_of(text)
    except ValueError as error:
        raise ProblemError(f"{complaint.args[0]}; {error}") from None
    if fault is not None:
        raise ProblemError(f"{complaint.args[0].partition(':')[0]}: {fault}")


def refuse_misplaced(
    part: Any, prefix: str, name: str, switch: str, chosen: Any, wanted: str
) -> None:
    """A field that one value of another field needs, and no other value allows."""
    value, metadata = getattr(part, name), part.__dataclass_fields__[name].metadata
    if chosen == wanted and value is None:
        raise ProblemError(
            f"{prefix}{name} is missing: {metadata['meaning']}, {metadata['allowed']}"
        )
    if chosen != wanted and value is not None:
        raise ProblemError(
            f'{prefix}{name} = {value!r} is not allowed with {switch} = "{chosen}": leave it out'
        )


class FieldSpec(NamedTuple):
    """What one field is: the row of the notation table, the help of the flag."""

    name: str
    symbol: str
    meaning: str
    allowed: str
    default: Any  # dataclasses.MISSING if the field must be given
    choices: tuple[str, ...]
    text: bool  # whether values are text, not numbers
