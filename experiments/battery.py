"""Ten thousand random problems over the documented box: are they solved, and rightly?

``python experiments/battery.py`` draws problem i from (seed, i), solves it on 2,048 nodes, checks
the solution again on the same nodes and on fresh ones, and appends one row to
tests/reference/battery.csv.gz's working file; run it again to go on where it stopped.  At the end
the table is packed and summed up in tests/reference/battery.md.
"""

from __future__ import annotations

import argparse
import csv
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from lora_theory import Finetuning, Prediction, Pretraining, Problem, predict
from lora_theory.theory import finetuning as lora
from lora_theory.theory.branches import FinetuningNodes, FrozenWeights
from lora_theory.theory.nodes import Discretisation
from lora_theory.theory.predict import frozen_weights, pretraining_averages, solve_pretraining
from lora_theory.theory.roots import standard_error

REFERENCE = Path(__file__).resolve().parent.parent / "tests" / "reference"
SEED, PROBLEMS = 20260, 10_000
NODES, BLOCKS = 128, 8  # points per block, each with its mirror image: 2,048 nodes
STAGES = ("pretraining", "finetuning")
TOLERANCE, FRESH_SEED = 1e-10, 1000
COLUMNS = [
    "index", "branch", "constraints", "seconds",
    *(f"{s}.{c}" for s in STAGES for c in ("status", "residual", "z", "jumps")),
]  # fmt: skip
#: Field: (lowest, highest), drawn uniformly in the logarithm.
LOGARITHMIC = {
    "teacher_rank": (0.2, 5.0),
    "pretraining.samples": (0.02, 5.0),
    "pretraining.penalty": (1e-3, 10.0),
    "finetuning.samples": (0.2, 20.0),
    "finetuning.penalty": (0.01, 5.0),
    "finetuning.signal": (0.25, 4.0),
}
HELD = {"informed": lora.INFORMED, "uninformed": lora.UNINFORMED, "zero": lora.ZERO}


def problem(index: int) -> Problem:
    """Problem ``index`` of the box; one in ten has no label noise."""
    rng = np.random.default_rng([SEED, index])
    fields = {
        name: float(f"{np.exp(rng.uniform(*np.log(ends))):.6g}")
        for name, ends in LOGARITHMIC.items()
    }
    noise = 0.0 if rng.random() < 0.1 else round(rng.uniform(0, 2), 6)
    first = Pretraining(
        samples=fields["pretraining.samples"],
        penalty=fields["pretraining.penalty"],
        rank=round(rng.uniform(1, 2), 6),
    )
    second = Finetuning(
        samples=fields["finetuning.samples"],
        penalty=fields["finetuning.penalty"],
        signal=fields["finetuning.signal"],
        sequences=str(rng.choice(["fresh", "reused"])),
    )
    return Problem(
        tokens=int(rng.integers(2, 6)),
        activation=str(rng.choice(["softmax", "linear"])),
        teacher_rank=fields["teacher_rank"],
        label_noise=noise,
        pretraining=first,
        finetuning=second,
    )


def residuals(answer: Prediction, seed: int) -> dict[str, np.ndarray]:
    """Residuals of the stages by block, at the reported numbers, on the nodes of ``seed``.

    Only the reported numbers and the equations enter: not what the solver says of them.  On the
    solution's own nodes stage two inherits the scatter of stage one, as it did when solved.
    """
    asked, stage, best = answer.problem, answer.pretraining, answer.finetuning
    assert asked.finetuning is not None
    assert best is not None
    discretisation = Discretisation(NODES, BLOCKS, seed, TOLERANCE)
    found: dict[str, np.ndarray] = {}
    with jax.enable_x64(True):
        if seed == 0:
            alone = asked.replace(finetuning=None)
            weights = frozen_weights(alone, solve_pretraining(alone, discretisation))
        else:
            Q, M, V = (np.full(BLOCKS, value) for value in (stage.Q, stage.M, stage.V))
            weights = FrozenWeights(Q, M, V, 1 + asked.teacher_rank + asked.label_noise / 2)
        if stage.Q > 0:
            x = np.log([stage.Q_hat, stage.M_hat, stage.V_hat])
            averages, _ = pretraining_averages(asked, discretisation)
            found["pretraining"] = averages.at(x, search=True).residual
        if best.branch != "zero":
            q0 = asked.finetuning.signal
            s = np.sqrt(max(best.q - best.m**2 / q0, 1e-300))
            x = np.array([np.log(s), best.m / q0, np.log(best.v)])
            nodes = FinetuningNodes(
                asked.finetuning, weights, asked.tokens, asked.activation, discretisation
            )
            found["finetuning"] = nodes.averages(HELD[best.branch]).at(x, search=True).residual
    return found


def row(index: int) -> dict[str, Any]:
    """One line of the table: statuses, residuals found again, deviation on fresh nodes."""
    asked = problem(index)
    start = time.perf_counter()
    answer = predict(asked, nodes=NODES, blocks=BLOCKS, tolerance=TOLERANCE)
    seconds = time.perf_counter() - start
    stage, best = answer.pretraining, answer.finetuning
    own, fresh = residuals(answer, 0), residuals(answer, FRESH_SEED)
    Q0, q0 = 1 + asked.teacher_rank, asked.finetuning.signal
    slack = 1 + 1e-9
    held = stage.Q >= 0 and stage.Q * Q0 * slack >= stage.M**2 and stage.V >= 0
    held = held and best.m**2 <= best.q * q0 * slack and best.v > 0
    line: dict[str, Any] = {"index": index, "branch": best.branch, "constraints": held}
    for name, part in (("pretraining", stage), ("finetuning", best)):
        line[f"{name}.status"] = part.status.value
        line[f"{name}.residual"], line[f"{name}.z"] = 0.0, 0.0
        if name in own:
            mean = own[name].mean(axis=0)
            error = np.hypot(standard_error(own[name]), standard_error(fresh[name]))
            line[f"{name}.residual"] = float(np.abs(mean).max())
            off = np.abs(fresh[name].mean(axis=0))
            line[f"{name}.z"] = float(np.max(off / np.maximum(error, TOLERANCE)))
        line[f"{name}.jumps"] = part.jump_mass
    line["seconds"] = seconds
    return line


def rows(indices: list[int]) -> list[dict[str, Any]]:
    """Some rows; what raises is kept as a status."""
    found = []
    for index in indices:
        try:
            found.append(row(index))
        except Exception as error:
            found.append({"index": index, "pretraining.status": f"{type(error).__name__}: {error}"})
    return found


def missing(working: Path, count: int) -> list[int]:
    """Indices not in the working file; an unfinished last line is cut off."""
    if not working.exists():
        working.parent.mkdir(parents=True, exist_ok=True)
        working.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    text = working.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        working.write_text(whole, encoding="utf-8")
    done = {int(line.split(",")[0]) for line in whole.splitlines()[1:]}
    return [index for index in range(count) if index not in done]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=PROBLEMS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--working", type=Path, default=Path("battery.csv"), help="rows so far")
    options = parser.parse_args()
    todo = missing(options.working, options.problems)
    groups = [todo[i : i + 8] for i in range(0, len(todo), 8)]
    with (
        options.working.open("a", newline="", encoding="utf-8") as file,
        ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool,
    ):
        table = csv.DictWriter(file, COLUMNS)
        for found in tqdm(pool.map(rows, groups), total=len(groups), unit_scale=8):
            table.writerows(found)
            file.flush()


if __name__ == "__main__":
    main()
