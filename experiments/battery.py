"""Ten thousand random problems over the documented box: are they solved, and rightly?

``python experiments/battery.py`` draws problem i from (seed, i), solves it on 1,024 nodes, finds
its residuals again on the same nodes and on fresh ones, and appends a row to the working file; run
again, it goes on where it stopped.  The rows so far are packed into tests/reference/battery.csv.gz
and summed up in tests/reference/battery.md.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from tqdm import tqdm

from lora_theory import Finetuning, Prediction, Pretraining, Problem, predict
from lora_theory.theory import finetuning as lora
from lora_theory.theory.averages import Averages
from lora_theory.theory.branches import FinetuningNodes, FrozenWeights
from lora_theory.theory.nodes import Discretisation
from lora_theory.theory.predict import frozen_weights, pretraining_averages, solve_pretraining
from lora_theory.theory.results import FinetuningPrediction
from lora_theory.theory.roots import standard_error

REFERENCE = Path(__file__).resolve().parent.parent / "tests" / "reference"
SEED, PROBLEMS = 20260, 10_000
NODES, BLOCKS = 64, 8  # points per block, each with its mirror image: 1,024 nodes
STAGES = ("pretraining", "finetuning")
TOLERANCE, FRESH_SEED = 1e-10, 1000
#: Of a difference of nearly equal numbers, relative to them.
ROUNDING = 1e-12
#: Searches for minima that a check may take; hard problems want a few.
SEARCHES = 8
COLUMNS = [
    "index", "branch", "constraints", "seconds",
    *(f"{s}.{c}" for s in STAGES for c in ("status", "residual", "z", "jumps")),
]  # fmt: skip
#: Errors by which a residual on fresh nodes may differ from zero.
LARGEST_Z = 6.0
#: Share of the response that jumps of the minimiser carry, above which they decide the problem.
JUMPS = 0.05
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
            found["pretraining"] = settled(averages, x)
        if best.branch != "zero":
            q0 = asked.finetuning.signal
            x = np.array([np.log(spread(best, q0)), best.m / q0, np.log(best.v)])
            nodes = FinetuningNodes(
                asked.finetuning, weights, asked.tokens, asked.activation, discretisation
            )
            found["finetuning"] = settled(nodes.averages(HELD[best.branch]), x)
    return found


def spread(found: FinetuningPrediction, signal: float) -> float:
    """s = √(q − m²/q0), or √q̂v where the two agree within rounding of q: this keeps its digits."""
    difference, square = found.q - found.m**2 / signal, found.q_hat * found.v**2
    same = abs(difference - square) < ROUNDING * found.q
    return max(square if same else difference, 1e-300) ** 0.5


def settled(averages: Averages, x: np.ndarray) -> np.ndarray:
    """Residuals by block at ``x``, once a further search changes nothing, or after SEARCHES."""
    residual = averages.at(x, search=True).residual
    for _ in range(SEARCHES):
        last, residual = residual, averages.at(x, search=True, elsewhere=True).residual
        if np.abs(residual - last).max() < TOLERANCE:
            break
    return residual


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
    if not best.status.is_solved:
        masses = [branch.jump_mass for branch in answer.branches]
        line["finetuning.jumps"] = max(masses, key=abs)
    line["seconds"] = seconds
    return line


def rows(indices: list[int]) -> list[dict[str, Any]]:
    """Some rows."""
    return [row(index) for index in indices]


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


def outcomes(table: pd.DataFrame) -> pd.Series:
    """What became of every problem.

    "solved": both residuals below the tolerance on the solution's own nodes, constraints held, and
    below LARGEST_Z errors on fresh ones; "false success": the last fails; "jumps": not solved to
    the tolerance where jumps of the minimiser carry more than JUMPS of a response, or the status
    says so; "not solved".
    """
    both = [table[[f"{stage}.{name}" for stage in STAGES]] for name in ("residual", "z", "jumps")]
    residual, z, jumps = (part.to_numpy(dtype=float) for part in both)
    statuses = table[[f"{stage}.status" for stage in STAGES]]
    claimed = ~(statuses == "not_converged").any(axis=1) & table["constraints"].eq(True)
    tight = claimed & (residual < TOLERANCE).all(axis=1)
    result = pd.Series("not solved", index=table.index)
    seen = (np.abs(jumps) > JUMPS).any(axis=1) | statuses.isin(("jumps", "unstable")).any(axis=1)
    result[seen & table["constraints"].eq(True)] = "jumps"
    result[tight] = "solved"
    result[claimed & ~(z <= LARGEST_Z).all(axis=1)] = "false success"
    return result


def summary(table: pd.DataFrame) -> str:
    """The table as text: outcomes by kind of problem, statuses, fresh residuals, times."""
    kinds = pd.DataFrame([problem(index).to_flat() for index in table["index"]])
    kind = kinds["activation"] + ", T = " + kinds["tokens"].astype(str)
    counts = pd.crosstab(kind.to_numpy(), outcomes(table).to_numpy())
    counts = counts.reindex(
        columns=["solved", "jumps", "not solved", "false success"], fill_value=0
    )
    counts.loc["all"] = counts.sum()
    rows = ["| problems | " + " | ".join(counts.columns) + " | solved, jumps apart |"]
    rows.append("|---" * (len(counts.columns) + 2) + "|")
    for name, row in counts.iterrows():
        share = row["solved"] / (row.sum() - row["jumps"])
        rows.append(f"| {name} | " + " | ".join(f"{n:,}" for n in row) + f" | {share:.3%} |")
    became = outcomes(table)
    solved, jumps = table[became == "solved"], table[became == "jumps"]
    few = (jumps[[f"{stage}.jumps" for stage in STAGES]].abs() <= JUMPS).all(axis=1).sum()
    z = np.concatenate([solved[f"{stage}.z"] for stage in STAGES])
    seconds = table["seconds"].dropna()
    return (
        f"# Battery: {len(table):,} random problems\n\n"
        "`python experiments/battery.py`: problems drawn over T 2–5, both activations, fresh and "
        "re-used sequences, κ0 .2–5, κ 1–2, Δ 0–2 (one in ten 0), α .02–5, λ 10⁻³–10, α' .2–20, "
        "λ' .01–5, q0 .25–4, on 1,024 nodes. *Solved*: relative residual of both stages below "
        "10⁻¹⁰, found again from the reported numbers, constraints held. *Jumps*: where not, jumps "
        f"of the minimiser carry more than {JUMPS:.0%} of a response, or the residual ends at what "
        f"single nodes on a jump leave ({few} by the residual alone). *False success*: residuals "
        f"on fresh nodes above {LARGEST_Z:g} errors.\n\n"
        + "\n".join(rows)
        + "\n\nSolved problems: largest residual of a stage on fresh nodes, in its errors, median "
        f"{np.median(z):.2f}, 99.9 % below {np.quantile(z, 0.999):.2f}, largest {z.max():.2f}. "
        f"Seconds per problem, while others run beside it, compilation included: median "
        f"{seconds.median():.2f}, mean {seconds.mean():.2f}.\n"
    )


def pack(working: Path) -> None:
    """The rows so far, ordered, into tests/reference."""
    table = pd.read_csv(working).sort_values("index", ignore_index=True)
    numbers = table.select_dtypes("float").columns
    table[numbers] = table[numbers].map(lambda x: float(f"{x:.3g}"))
    table.to_csv(
        REFERENCE / "battery.csv.gz", index=False, compression={"method": "gzip", "mtime": 0}
    )
    (REFERENCE / "battery.md").write_text(summary(table), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problems", type=int, default=PROBLEMS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--working", type=Path, default=Path("battery.csv"), help="rows so far")
    parser.add_argument("--pack", action="store_true", help="the rows so far, computing nothing")
    options = parser.parse_args()
    if not options.pack:
        compute(options.working, options.problems, options.workers)
    pack(options.working)


def compute(working: Path, problems: int, workers: int) -> None:
    """Append the missing rows to the working file, in any order; NPROC threads per worker, or 1."""
    os.environ.setdefault("NPROC", "1")
    todo = missing(working, problems)
    groups = [todo[i : i + 8] for i in range(0, len(todo), 8)]
    with (
        working.open("a", newline="", encoding="utf-8") as file,
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        tqdm(total=problems, initial=problems - len(todo), unit="problem") as progress,
    ):
        table = csv.DictWriter(file, COLUMNS)
        try:
            for done in as_completed([pool.submit(rows, group) for group in groups]):
                table.writerows(done.result())
                file.flush()
                progress.update(len(done.result()))
        finally:
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: the rows so far are kept; run again to go on", file=sys.stderr)
        sys.exit(130)
