"""simulate by D and precision: cold, warm, peak memory."""

from __future__ import annotations

import resource
import sys

from common import Column, Part, Row, figure1_problem, fresh, problem, timed

NOTES = """
One seed, both stages, three random starts of w beside the informed one, 20,000 test sequences;
the set of Figure 1 at λ = .1, λ' = .5.  Cold: first call of a fresh process, imports and
compilation included; warm: the next seed.  Memory: peak of the process above its peak once the
package is imported; at D = 10 nearly all of it is the compiler.  Data: the training sequences of
stage one.  Ratios: cold over warm, and warm time over that of float32 at the same D.
"""
COLUMNS = (
    Column("case", "case"),
    Column("dim", "D"),
    Column("dtype", "precision"),
    Column("cold_s", "cold s", ".1f"),
    Column("warm_s", "warm s", ".2f"),
    Column("cold_over_warm", "cold/warm", ".1f"),
    Column("over_float32", "over float32", ".2f"),
    Column("peak_mb", "peak MB", ".0f"),
    Column("data_mb", "data MB", ".1f"),
    Column("pretraining_iterations", "iterations W"),
    Column("finetuning_iterations", "w"),
    Column("missed", "missed"),
)


def run(dim: int, dtype: str, toy: bool) -> Row:
    """To be called in a fresh process."""

    def imports():
        from lora_theory import simulate

        return simulate

    import_s, simulate = timed(imports)
    asked = problem(2, "linear") if toy else figure1_problem()
    before = _peak_mb()
    first_s, first = timed(lambda: simulate(asked, dim, 1, dtype=dtype))
    peak = _peak_mb() - before
    warm_s, second = timed(lambda: simulate(asked, dim, 1, seed=1, dtype=dtype))
    sequences = round(asked.pretraining.samples * dim**2)
    return {
        "case": "toy" if toy else "Figure 1",
        "dim": dim,
        "dtype": dtype,
        "cold_s": import_s + first_s,
        "warm_s": warm_s,
        "cold_over_warm": (import_s + first_s) / warm_s,
        "peak_mb": peak,
        "data_mb": sequences * asked.tokens * dim * int(dtype[-2:]) / 8 / 1e6,
        "pretraining_iterations": second.runs[0]["pretraining.iterations"],
        "finetuning_iterations": second.runs[0]["finetuning.iterations"],
        "missed": sum(
            part.missed
            for answer in (first, second)
            for part in (answer.pretraining, answer.finetuning, answer.finetuning_random.start_mean)
        ),
    }


def _peak_mb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure(toy: bool = False) -> Part:
    dims, dtypes = ((8,), ("float64",)) if toy else ((10, 50, 100, 150), ("float32", "float64"))
    rows = [fresh("simulation.run", dim=d, dtype=dtype, toy=toy) for d in dims for dtype in dtypes]
    for row in rows:
        single = next((r for r in rows if r["dim"] == row["dim"] and r["dtype"] == "float32"), None)
        if single:
            row["over_float32"] = row["warm_s"] / single["warm_s"]
    return Part(NOTES, COLUMNS, rows)
