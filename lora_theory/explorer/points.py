"""What the views share: points along a field, rows of their tables, words for their captions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure

from lora_theory.explorer.answers import Precision
from lora_theory.problem import Problem, ProblemError
from lora_theory.status import Status
from lora_theory.theory import Prediction

__all__ = [
    "OBSERVABLES", "REFUSED", "View", "checked_field", "every_second", "geometric", "grid",
    "named", "observed", "own_value", "pending", "precision_text", "row_of", "status_text", "timed",
]  # fmt: skip

#: What a curve or a map may show: symbol and words.
OBSERVABLES = {
    "finetuning.test_error": ("E'", "test error after LoRA"),
    "finetuning.overlap": ("o", "overlap of LoRA and task"),
    "finetuning.frozen_test_error": ("E' at w = 0", "test error without LoRA"),
    "pretraining.test_error": ("E", "test error of pre-training"),
    "pretraining.overlap": ("M/√(QQ₀)", "overlap of pre-training"),
    "effective_noise.variance": ("Δ/2 + Q₀ − M²/Q", "noise variance of the frozen weights"),
    "gain": ("E' at w = 0 minus E'", "gain of LoRA"),
}
#: How the status of a point begins that has no answer, and that of one that has none yet.
REFUSED, _PENDING = "refused: ", "not computed yet"
_INTEGERS = {"tokens": range(1, 9), "pretraining.degree": (1, 3, 5, 7, 9)}
_PARTS = {
    "pretraining": "of pre-training", "finetuning": "of fine-tuning", "teacher": "of the teacher",
    "compression": "kept by the truncation", "finetuning.selection": "to choose from",
}  # fmt: skip
_WORDS = {
    "finetuning.rescaling": "rescaling of the frozen weights",
    "finetuning.signal": "strength of the task",
    "finetuning.reused_fraction": "share of re-used sequences",
    "pretraining.rank": "width of the trained factor",
    "inverse_temperature": "inverse temperature of the student",
}
#: Largest to smallest value from which on values are spaced geometrically.
_WIDE = 10.0
#: Seconds of work until the first view, and between two views.
FIRST_PATIENCE, PATIENCE = 1.4, 0.7
#: Work that takes less was done before, and so are its refinements.
_KNOWN = 0.2


@dataclass(frozen=True)
class View:
    """What a figure is drawn from, what it says, and how much of the work is done."""

    table: pd.DataFrame
    caption: str
    done: float
    draw: Callable[[], Figure]


def geometric(low: float, high: float) -> bool:
    """Whether values from ``low`` to ``high`` are spaced geometrically.

    Example:
        >>> geometric(0.1, 1.0), geometric(0.0, 1.0), geometric(1.0, 5.0)
        (True, False, False)
    """
    return low > 0 and high / low >= _WIDE


def grid(field: str, within: Sequence[float], points: int) -> list[Any]:
    """Values of a field from end to end.

    Example:
        >>> grid("tokens", (2, 4), 9), grid("label_noise", (0.0, 1.0), 3)
        ([2, 3, 4], [0.0, 0.5, 1.0])
    """
    low, high = map(float, within)
    if not (math.isfinite(high) and -math.inf < low < high):
        raise ProblemError(f"within = {within!r} is not allowed: it must be two numbers that rise")
    if points < 2:
        raise ProblemError(f"points = {points!r} is not allowed: it must be at least 2")
    if field in _INTEGERS:
        if values := [value for value in _INTEGERS[field] if low <= value <= high]:
            return values
        raise ProblemError(f"within = {within!r} is not allowed: {field} has no value there")
    inside = np.geomspace if geometric(low, high) else np.linspace
    return [low, *inside(low, high, points)[1:-1].tolist(), high]


def checked_field(problem: Problem, field: str) -> None:
    """Refuse what holds no single number."""
    names = {spec.name for spec in problem.specs() if not spec.text}
    own = problem.to_flat().get(field, 0.0)
    if field not in names or not isinstance(own, int | float):
        raise ProblemError(f"{field!r} is not allowed as an axis: it must be a field of one number")


def own_value(problem: Problem, field: str) -> float | None:
    """The value of a field in the problem, None where it has none."""
    value = problem.to_flat().get(field)
    return value if isinstance(value, int | float) else None


def named(field: str) -> str:
    """Words and symbol of a field, as on an axis.

    Example:
        >>> named("pretraining.penalty"), named("label_noise"), named("pretraining.degree")
        ('penalty of pre-training λ', 'label noise Δ', 'degree of pre-training d')
    """
    (symbol,) = (spec.symbol for spec in Problem.specs() if spec.name == field)
    group, _, name = field.rpartition(".")
    words = _WORDS.get(field) or f"{name.replace('_', ' ')} {_PARTS.get(group, '')}".strip()
    return f"{words} {symbol}"


def every_second(items: Sequence[Any]) -> list[Any]:
    """The first, third, … and last of some items.

    Example:
        >>> every_second([0, 1, 2, 3])
        [0, 2, 3]
    """
    return [item for i, item in enumerate(items) if i % 2 == 0 or i == len(items) - 1]


def timed(parts: Iterable[Any], first: int) -> Iterator[list[Any]]:
    """What came in, gathered over the time between two views; cut behind the ``first`` of them."""
    gathered, start, patience = [], time.monotonic(), FIRST_PATIENCE
    for count, part in enumerate(parts, 1):
        gathered.append(part)
        elapsed = time.monotonic() - start
        if (count == first and elapsed > _KNOWN) or elapsed > patience:
            yield gathered
            gathered, start, patience = [], time.monotonic(), PATIENCE
    if gathered:
        yield gathered


def observed(found: Prediction, name: str) -> tuple[float, float, str]:
    """An observable of a prediction, its quadrature error, and the status of its stage."""
    stage, status = found.finetuning, found.status
    if name == "gain":
        assert stage is not None
        errors = stage.quadrature_error
        error = math.hypot(errors["test_error"], errors["frozen_test_error"])
        return stage.frozen_test_error - stage.test_error, error, status.value
    part, attribute = name.split(".")
    result: Any = getattr(found, part)
    if part != "finetuning" or attribute == "frozen_test_error":
        status = found.pretraining.status
    return getattr(result, attribute), result.quadrature_error[attribute], status.value


def row_of(
    problem: Problem | None,
    found: Prediction | ProblemError | None,
    name: str,
    precision: Precision,
    **labels: Any,
) -> dict[str, Any]:
    """One row of a table: the fields, and the observable, or why there is none."""
    row: dict[str, Any] = {**labels, "source": "theory", "observable": name}
    if isinstance(found, Prediction):
        value, error, status = observed(found, name)
        tokens = found.problem.tokens
        used = {"nodes": precision.points(tokens), "blocks": precision.blocks}
        row |= {"value": value, "error": error, "status": status, **used}
        row["precision"] = precision.name
    else:
        status = _PENDING if found is None else f"{REFUSED}{found}"
        row |= {"value": math.nan, "error": math.nan, "status": status}
        row |= {"nodes": None, "blocks": None, "precision": precision.name}
    flat = {} if problem is None else problem.to_flat()
    return row | {name: value for name, value in flat.items() if name not in row}


def pending(table: pd.DataFrame) -> pd.Series:
    """Which rows have no answer yet."""
    return table["status"] == _PENDING


def status_text(
    statuses: pd.Series, marks: Sequence[str] = ("shaded", "marked ×"), noun: str = "points"
) -> str:
    """How many points are not plainly solved, and what to do; one status per point.

    Args:
        marks: how those are drawn that are unstable, and those not converged.
    """
    parts = []
    shown = dict(zip((Status.UNSTABLE, Status.NOT_CONVERGED), marks, strict=True))
    for status in (Status.UNSTABLE, Status.NOT_CONVERGED, Status.TIE, Status.COLLAPSED):
        if count := int((statuses == status.value).sum()):
            words = status.value.replace("_", " ").capitalize()
            words += f", {shown[status]}" if status in shown else ""
            parts.append(f"{words}: {count} of {len(statuses)} {noun}. ")
            parts.append(f"{status.remedy} ")
    refused = statuses[statuses.astype(str).str.startswith(REFUSED)]
    if len(refused):
        reason = str(refused.iloc[0]).removeprefix(REFUSED)
        word = noun if len(refused) > 1 else noun.removesuffix("s")
        parts.append(f"Outside of the theory, left out: {len(refused)} {word} ({reason}). ")
    return "".join(parts).strip()


def precision_text(table: pd.DataFrame) -> str:
    """Nodes × blocks, and the largest quadrature error of what is solved."""
    solved = table[table["nodes"].notna() & (table["status"] != Status.NOT_CONVERGED.value)]
    if solved.empty:
        return ""
    used = solved[["nodes", "blocks"]].drop_duplicates().astype(int)
    sizes = " and ".join(f"{nodes} × {blocks}" for nodes, blocks in used.itertuples(index=False))
    largest = float(np.nanmax(_finite(solved["error"])))
    error = f"largest quadrature error {largest:.1g}" if largest else "no quadrature error"
    return f"Nodes × blocks: {sizes}; {error}."


def _finite(values: pd.Series) -> Float[np.ndarray, " n"]:
    array = values.to_numpy(dtype=float)
    kept = array[np.isfinite(array)]
    return kept if kept.size else np.zeros(1)
