"""The answer: named observables, held alike by a prediction and by a simulation.

Theory and simulation use the same attribute names (docs/theory.md, section 1), so a comparison is
a loop over names.  Theory holds floats with a quadrature error beside them, simulation holds
:class:`Estimate` objects.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["FINETUNING", "PRETRAINING", "Estimate", "plain_fields", "to_plain"]

#: Observables of the pre-training stage, measured in both worlds.
PRETRAINING = ("Q", "M", "overlap", "test_error", "train_error")
#: Observables of the fine-tuning stage, measured in both worlds.
FINETUNING = ("q", "m", "overlap", "test_error", "train_error", "frozen_test_error")


@dataclass(frozen=True)
class Estimate:
    """A measured mean with its standard error over ``count`` independent runs.

    ``error`` is None when ``count`` is 1: one run has no spread to measure.

    Example:
        >>> print(Estimate.of([1.0, 1.2, 1.1, 1.1]))
        1.100 ± 0.041
    """

    mean: float
    error: float | None
    count: int

    @classmethod
    def of(cls, values: ArrayLike) -> Estimate:
        """Mean, standard error (sample deviation over √count) and count of independent values."""
        sample = np.asarray(values, dtype=np.float64).ravel()
        count = sample.size
        error = float(sample.std(ddof=1) / math.sqrt(count)) if count > 1 else None
        return cls(float(sample.mean()), error, count)

    def __str__(self) -> str:
        if self.error is None or not math.isfinite(self.error) or self.error <= 0:
            return f"{self.mean:.6g}"
        digits = max(0, 1 - math.floor(math.log10(self.error)))
        if digits > 12:  # the error is rounding
            return f"{self.mean:.6g}"
        return f"{self.mean:.{digits}f} ± {self.error:.{digits}f}"


def to_plain(value: Any) -> Any:
    """Nested plain values (for JSON) of a result; attribute names become keys, NaN becomes None."""
    if hasattr(value, "to_dict"):
        return to_plain(value.to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain_fields(value)
    if hasattr(value, "_asdict"):
        return to_plain(value._asdict())
    if isinstance(value, dict):
        return {key: to_plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return to_plain(value.tolist())
    if isinstance(value, list | tuple):
        return [to_plain(entry) for entry in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    if callable(value):
        return getattr(value, "__name__", repr(value))
    return value


def plain_fields(result: Any) -> dict[str, Any]:
    """The plain values of a dataclass's fields by their names, its ``to_dict`` unless it adds."""
    return {f.name: to_plain(getattr(result, f.name)) for f in dataclasses.fields(result)}
