"""Timings of theory and simulation: a table on stdout, JSON in the file given by --json.

Cold: first call in a fresh process, import and compilation included.  Warm: the same compiled
functions on another problem of the same shape.  Ratios are within one run on one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import jax

from lora_theory import Finetuning, Pretraining, Problem, predict, simulate

CASES = [
    (activation, tokens, sequences)
    for activation in ("linear", "softmax")
    for tokens in (2, 3)
    for sequences in ("fresh", "reused")
]


def problem(activation: str, tokens: int, sequences: str, penalty: float = 0.05) -> Problem:
    return Problem(
        activation=activation,
        tokens=tokens,
        teacher_rank=0.5,
        label_noise=0.5,
        pretraining=Pretraining(samples=0.2, penalty=penalty),
        finetuning=Finetuning(samples=3.0, penalty=0.2, sequences=sequences),
    )


def seconds(call, *args, **kwargs) -> tuple[float, object]:
    start = time.perf_counter()
    result = call(*args, **kwargs)
    return time.perf_counter() - start, result


def theory_case(activation: str, tokens: int, sequences: str) -> dict:
    """In this process, which must be fresh: cold, then warm on two other penalties."""
    cold, _ = seconds(predict, problem(activation, tokens, sequences))
    warm, answers = zip(
        *(seconds(predict, problem(activation, tokens, sequences, p)) for p in (0.06, 0.07)),
        strict=True,
    )
    stage = answers[-1].finetuning
    errors = {
        name: stage.quadrature_error[name] / abs(getattr(stage, name))
        for name in ("q", "m", "overlap", "test_error", "frozen_test_error")
    }
    return {
        "case": f"predict {activation} T={tokens} {sequences}",
        "cold_s": cold,
        "warm_s": min(warm),
        "relative_error": max(errors.values()),
    }


def simulation_case(dim: int, dtype: str) -> dict:
    asked = problem("softmax", 2, "fresh")
    cold, _ = seconds(simulate, asked, dim, 1, dtype=dtype)
    warm, result = seconds(simulate, asked, dim, 2, seed=1, dtype=dtype)
    return {
        "case": f"simulate softmax T=2 D={dim} {dtype}",
        "cold_s": cold,
        "warm_s": warm / 2,
        "missed": result.pretraining.missed + result.finetuning.missed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        activation, tokens, sequences = options.case
        print(json.dumps(theory_case(activation, int(tokens), sequences)))
        return
    rows = []
    for case in CASES:
        command = [sys.executable, __file__, "--case", *map(str, case)]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout)
        row["process_s"] = time.perf_counter() - start
        rows.append(row)
    rows += [simulation_case(dim, dtype) for dim in (50, 100) for dtype in ("float32", "float64")]
    reference = next(row["warm_s"] for row in rows if "softmax T=2 fresh" in row["case"])
    for row in rows:
        row["warm_ratio"] = row["warm_s"] / reference
        error = f"{row['relative_error']:.1e}" if "relative_error" in row else "—"
        print(
            f"{row['case']:36s} cold {row['cold_s']:6.1f} s   warm {row['warm_s']:7.3f} s"
            f"   ×{row['warm_ratio']:6.3f}   largest relative error {error}"
        )
    if options.json:
        machine = {"cores": os.cpu_count(), "machine": platform.machine(), "jax": jax.__version__}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
