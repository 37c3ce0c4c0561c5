"""Shared by all parts: fresh processes, problems, timing, the machine, tables.

Only the standard library is imported at the top, here and in the parts: the process that starts
the measurements stays small (its peak memory is handed down to its children), and a cold timing
counts the imports of its own child.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lora_theory import Problem

#: The numbers that a prediction is judged by, as (stage, attribute).
JUDGED = (
    ("pretraining", "test_error"), ("pretraining", "Q"), ("pretraining", "M"),
    ("finetuning", "test_error"), ("finetuning", "frozen_test_error"), ("finetuning", "overlap"),
    ("finetuning", "q"), ("finetuning", "m"),
)  # fmt: skip
#: Relative error wanted of all of them, and the seconds a warm prediction may take, by tokens.
TARGET_ERROR, TARGET_SECONDS = 2e-3, {2: 0.5, 3: 1.5}

Row = dict[str, Any]


class Column(NamedTuple):
    """A column of a table: the key in the row, the heading with its unit, the format."""

    key: str
    heading: str
    form: str = ""

    def text(self, row: Row) -> str:
        """The entry of a row; a dash where there is none."""
        value = row.get(self.key)
        if value is None:
            return "—"
        return format(value, self.form if not isinstance(value, str) else "")


class Part(NamedTuple):
    """What one part measured."""

    notes: str  # what the numbers mean
    columns: Sequence[Column]
    rows: list[Row]
    skipped: str | None = None  # why nothing was measured


def problem(
    tokens: int,
    activation: str = "softmax",
    sequences: str = "fresh",
    penalty: float = 0.05,
    finetuning_penalty: float = 0.2,
) -> Problem:
    """κ0 = .5, κ = 1, Δ = .5, α = .2, α' = 3; different penalties make different problems."""
    from lora_theory import Finetuning, Pretraining, Problem

    return Problem(
        tokens=tokens,
        activation=activation,
        teacher_rank=0.5,
        label_noise=0.5,
        pretraining=Pretraining(samples=0.2, penalty=penalty),
        finetuning=Finetuning(samples=3.0, penalty=finetuning_penalty, sequences=sequences),
    )


def figure1_problem(penalty: float = 0.1, tokens: int = 3) -> Problem:
    """The set of Figure 1: e = 0, α = .1, α' = 3, κ0 = κ = 1, Δ = .5, λ' = .5, softmax."""
    from lora_theory import Finetuning, Pretraining, Problem

    return Problem(
        tokens=tokens,
        activation="softmax",
        teacher_rank=1.0,
        label_noise=0.5,
        pretraining=Pretraining(samples=0.1, penalty=penalty),
        finetuning=Finetuning(samples=3.0, penalty=0.5),
    )


def fresh(function: str, **arguments: Any) -> Any:
    """The value of ``module.function(**arguments)`` from a new process, through JSON."""
    command = [sys.executable, __file__, function, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{function}({arguments}) failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds of one call, and what it returned."""
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def warm_seconds(call: Callable[[], Any], least: float = 0.2) -> float:
    """Median wall seconds of a call: after one that is not counted, until ``least`` has passed."""
    call()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < least:
        seconds.append(timed(call)[0])
    return statistics.median(seconds)


def relative_errors(answer: Any) -> dict[str, float]:
    """Quadrature errors over the values of a prediction, for the numbers it is judged by."""
    errors = {}
    for stage, name in JUDGED:
        held = getattr(answer, stage)
        errors[f"{stage}.{name}"] = held.quadrature_error[name] / abs(getattr(held, name))
    return errors


def threads() -> int:
    """How many threads XLA, and for its sake every rival, may use: NPROC, or all cores."""
    return int(os.environ.get("NPROC", 0)) or cores()


def cores() -> int:
    """The processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """The machine and the versions."""
    names = ("jax", "jaxlib", "numpy", "scipy", "optax", "torch")
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": threads(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: found for name in names if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Aligned plain text: the first column to the left, the others to the right."""
    lines = [[column.heading for column in columns]]
    lines += [[column.text(row) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]

    def aligned(line: list[str]) -> str:
        rest = [entry.rjust(width) for entry, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *rest])

    return "\n".join(aligned(line) for line in lines)


def _child() -> None:
    module, _, name = sys.argv[1].partition(".")
    function = getattr(importlib.import_module(module), name)
    json.dump(function(**json.loads(sys.argv[2])), sys.stdout)


if __name__ == "__main__":
    _child()
