"""What the paper reads from the committed tables, and how it prints a number with its error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd


class MissingError(Exception):
    """A table, or a row of it, that the paper needs is not there."""


class Number(NamedTuple):
    """A value with its error, 0 where it is exact."""

    value: float
    error: float

    def __sub__(self, other: Number) -> Number:  # type: ignore[override]
        return Number(self.value - other.value, math.hypot(self.error, other.error))

    def __truediv__(self, other: Number) -> Number:
        ratio = self.value / other.value
        relative = math.hypot(self.error / self.value, other.error / other.value)
        return Number(ratio, abs(ratio) * relative)

    def log(self) -> Number:
        return Number(math.log(self.value), self.error / abs(self.value))

    def times(self, factor: float) -> Number:
        return Number(factor * self.value, abs(factor) * self.error)


def printed(number: Number, digits: int = 4) -> str:
    """value(error): the error in units of the last digit, with two digits where it begins with 1.

    An exact number is printed with so many significant ``digits``.
    """
    value, error = (float(part) for part in number)
    if not (math.isfinite(value) and math.isfinite(error)) or error < 0:
        raise MissingError(f"{value}({error}) is no number with an error")
    if error == 0:
        decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0) if value else 0
        return math_mode(f"{value:.{decimals}f}")
    begins_with_one = f"{error:.1e}" < "2"
    power = int(f"{error:.{int(begins_with_one)}e}".split("e")[1])
    decimals = max(int(begins_with_one) - power, 0)
    units = f"{error:.{decimals}f}" if error >= 1 else f"{round(error * 10**decimals)}"
    return math_mode(f"{value:.{decimals}f}({units})")


def in_digits(number: Number, digits: int = 3) -> str:
    """The same, but no more than so many digits: where the error is below them, without it."""
    lowest = 10.0 ** (math.floor(math.log10(abs(number.value))) - digits + 1)
    return printed(Number(number.value, 0.0) if number.error < lowest / 2 else number, digits)


def math_mode(text: str) -> str:
    return rf"\ensuremath{{{text}}}"


def count(number: float) -> str:
    """A whole number, thousands apart."""
    return math_mode(f"{int(number):,}".replace(",", "{,}"))


_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def in_words(number: int) -> str:
    """As within a sentence."""
    return _WORDS[number] if number < len(_WORDS) else count(number)


def listed(texts: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


@dataclass(frozen=True)
class Tables:
    """The tables below a root folder, by their path from it."""

    root: Path
    _read: dict[str, pd.DataFrame] = field(default_factory=dict)

    def all(self, name: str) -> pd.DataFrame:
        """A whole table."""
        path = self.root / name
        if name not in self._read:
            if not path.is_file():
                raise MissingError(f"{name} is not there: the paper takes numbers from it")
            self._read[name] = pd.read_csv(path)
        return self._read[name]

    def rows(self, name: str, chosen: Mapping[str, Any]) -> pd.DataFrame:
        """The rows with these values, one at least; numbers are compared to rounding."""
        return self.among(self.all(name), name, chosen)

    @staticmethod
    def among(table: pd.DataFrame, name: str, chosen: Mapping[str, Any]) -> pd.DataFrame:
        """The same of rows that are there."""
        for column, value in chosen.items():
            if column not in table:
                raise MissingError(f"{name} has no column {column!r}")
            numeric = isinstance(value, int | float) and not isinstance(value, bool)
            if numeric:
                table = table[np.isclose(table[column].astype(float), value)]
            else:
                table = table[table[column] == value]
        if table.empty:
            asked = ", ".join(f"{column} = {value}" for column, value in chosen.items())
            raise MissingError(f"{name} has no row with {asked}")
        return table

    def number(self, name: str, chosen: Mapping[str, Any], column: str = "value") -> Number:
        """The one row with these values, as value and error."""
        found = self.rows(name, chosen)
        if len(found) != 1:
            asked = ", ".join(f"{key} = {value}" for key, value in chosen.items())
            raise MissingError(f"{name} has {len(found)} rows with {asked}, not one")
        error = found["error"].iloc[0] if column == "value" else 0.0
        return Number(float(found[column].iloc[0]), float(error))


SYMBOLS = {
    "tokens": "T",
    "teacher_rank": r"\kappa_0",
    "label_noise": r"\Delta",
    "pretraining.rank": r"\kappa",
    "pretraining.samples": r"\alpha",
    "pretraining.penalty": r"\lambda",
    "finetuning.samples": r"\alpha'",
    "finetuning.penalty": r"\lambda'",
    "finetuning.signal": "q_0",
    "dim": "D",
}


def one_value(name: str, rows: pd.DataFrame, column: str) -> Any:
    """What all rows share in a column."""
    values = rows[column].dropna().unique()
    if len(values) != 1:
        raise MissingError(f"{name} has {len(values)} values of {column}, not one")
    return values[0]


#: What the results share unless their parameters say otherwise.
COMMON = {
    "tokens": 2,
    "teacher_rank": 0.5,
    "label_noise": 0.5,
    "pretraining.rank": 1,
    "finetuning.signal": 1,
}


def shown(values: Mapping[str, float]) -> str:
    return ", ".join(math_mode(f"{SYMBOLS[name]}={value:g}") for name, value in values.items())


def parameters(name: str, rows: pd.DataFrame, others: Sequence[str]) -> str:
    """Fields that all rows share: those that are not COMMON, and others."""
    both_stages = "finetuning.samples" in rows
    asked = [column for column in COMMON if both_stages or not column.startswith("finetuning")]
    common = {column: one_value(name, rows, column) for column in asked}
    unusual = {column: value for column, value in common.items() if value != COMMON[column]}
    return shown(unusual | {column: one_value(name, rows, column) for column in others})
