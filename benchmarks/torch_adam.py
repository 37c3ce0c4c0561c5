"""Plain PyTorch with Adam against the descent of the simulation: time to the same loss gap.

Data, targets and starts are those of the simulation, handed over in a file; each side runs in its
own process, one after the other, on as many threads.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import tempfile
import time
from pathlib import Path

from common import Column, Part, Row, figure1_problem, fresh, threads, timed

NOTES = """
Set of Figure 1 at λ = .1, λ' = .5, one seed.  Gap: (L − L_best)/L_best, L_best from the
simulation's descent in float64 run to a relative gradient of {tight:g}.  W from the start of the
simulation, w from w* on the same frozen W.  Both sides in float32, {threads} threads.

L-BFGS: warm time of the simulation's descent stopped at the first iteration below the gap;
compilation, once per shape, is given beside it.  Adam: full batch, learning rates {rates}, each
with cosine decay to 0 over {steps} steps and constant over the longest; for every gap the fastest
of all, the search for it not counted.  Ratio: Adam over L-BFGS; ≥: no schedule arrived, the
longest run is taken.
"""
COLUMNS = (
    Column("case", "case"),
    Column("dim", "D"),
    Column("gap", "gap", ".0e"),
    Column("lbfgs_s", "L-BFGS s", ".3f"),
    Column("lbfgs_iterations", "iterations"),
    Column("compile_s", "compile s", ".1f"),
    Column("adam_s", "Adam s", ".3f"),
    Column("adam_steps", "steps"),
    Column("schedule", "schedule"),
    Column("ratio_text", "ratio"),
)
GAPS = (1e-2, 1e-3, 1e-4, 1e-5)
TIGHT, CAP = 1e-7, 2000  # the descent that gives L_best
RATES, STEPS = (0.03, 0.1, 0.3, 1.0, 3.0), (100, 300, 1000)
STAGES = {"pretraining": "W", "finetuning": "w"}


def descents(dim: int, gaps: list[float], folder: str) -> list[Row]:
    """Time of L-BFGS to each gap in both stages; leaves what Adam needs in ``folder``."""
    import jax
    import numpy as np

    from lora_theory.simulation.data import run_key
    from lora_theory.simulation.finetuning import finetuning_data, finetuning_task
    from lora_theory.simulation.minimise import minimise
    from lora_theory.simulation.pretraining import pretraining_data, pretraining_task
    from lora_theory.simulation.sizes import Sizes

    asked, key = figure1_problem(), run_key(0, 0)
    sizes, activation = Sizes.of(asked, dim), asked.activation
    rows = []
    with jax.enable_x64(True):
        data = pretraining_data(key, asked, sizes, np.float64)
        task = pretraining_task(data, asked)
        best = minimise(task, data.start, TIGHT, CAP, activation=activation)
        rows += _to_gaps("pretraining", task, data.start, float(best.objective), gaps, folder)
        tuning = finetuning_data(key, asked, sizes, data, best.weights)
        task = finetuning_task(tuning, asked)
        start = tuning.task_vector
        best = minimise(task, start, TIGHT, CAP, activation=activation)
        rows += _to_gaps("finetuning", task, start, float(best.objective), gaps, folder)
    return [row | {"dim": dim} for row in rows]


def _to_gaps(stage: str, task, start, lowest: float, gaps: list[float], folder: str) -> list[Row]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lora_theory.simulation.minimise import minimise, training_loss

    single = jax.tree.map(lambda entry: jnp.asarray(entry, jnp.float32), task)
    first = start.astype(jnp.float32)
    np.savez(Path(folder) / f"{stage}.npz", start=first, lowest=lowest, **single._asdict())
    exact_loss = jax.jit(lambda weights: training_loss(task, weights, "softmax"))

    def descend(iterations: int):
        return minimise(single, first, 0.0, iterations, activation="softmax")

    def seconds(iterations: int) -> float:
        return timed(lambda: descend(iterations).weights.block_until_ready())[0]

    def gap_after(iterations: int) -> float:
        weights = descend(iterations).weights.astype(jnp.float64)
        return float(exact_loss(weights)) / lowest - 1

    compile_s, warm = seconds(1), seconds(1)
    rows = []
    for gap in gaps:
        reached, below = 0, 1  # double, then halve: L-BFGS never goes up
        while gap_after(below) > gap and below < CAP:
            reached, below = below, 2 * below
        row = {"case": STAGES[stage], "stage": stage, "gap": gap, "compile_s": compile_s - warm}
        rows.append(row)
        if gap_after(below) > gap:  # rounding in float32 stands above it
            continue
        while below - reached > 1:
            middle = (reached + below) // 2
            reached, below = (reached, middle) if gap_after(middle) <= gap else (middle, below)
        row["lbfgs_iterations"] = below
        row["lbfgs_s"] = statistics.median(seconds(below) for _ in range(5))
    return rows


def adam(stage: str, gaps: list[float], folder: str, steps: list[int], workers: int) -> list[Row]:
    """The fastest schedule to each gap; to be called in a process without JAX."""
    import numpy as np
    import torch

    torch.set_num_threads(workers)
    with np.load(Path(folder) / f"{stage}.npz") as held:
        arrays = {name: torch.from_numpy(held[name]) for name in held.files}
    sequences, frozen, targets = (arrays[name] for name in ("sequences", "frozen", "targets"))
    count, tokens, dim = sequences.shape
    flat, eye = sequences.reshape(-1, dim), torch.eye(tokens)
    penalty, lowest = float(arrays["penalty"]), float(arrays["lowest"])

    def loss(weights):
        projections = (flat @ weights).reshape(count, tokens, -1)
        products = projections @ projections.transpose(1, 2)
        norm = (weights**2).sum()
        fields = (products - norm * eye) / (dim * weights.shape[1] ** 0.5)
        student = torch.softmax(frozen + fields, dim=-1)
        return ((targets - student) ** 2).sum() + penalty * norm

    def run(rate: float, total: int, decay: bool) -> dict[float, tuple[float, int]]:
        """Seconds and steps to the gaps that were reached."""
        weights = arrays["start"].clone().requires_grad_()
        optimiser = torch.optim.Adam([weights], lr=rate)
        reached: dict[float, tuple[float, int]] = {}
        began = time.perf_counter()
        for step in range(total):
            if decay:
                optimiser.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / total)) / 2
            optimiser.zero_grad()
            value = loss(weights)
            gap = value.item() / lowest - 1
            now = time.perf_counter() - began
            reached |= {g: (now, step) for g in gaps if gap <= g and g not in reached}
            if len(reached) == len(gaps):
                break
            value.backward()
            optimiser.step()
        reached[math.inf] = (time.perf_counter() - began, total)
        return reached

    run(RATES[0], 3, False)
    runs = {
        (rate, total, decay): run(rate, total, decay)
        for rate in RATES
        for total in steps
        for decay in ((True, False) if total == max(steps) else (True,))
    }
    rows = []
    for gap in gaps:
        arrived = {schedule: times[gap] for schedule, times in runs.items() if gap in times}
        if arrived:
            (rate, total, decay), (seconds, taken) = min(arrived.items(), key=lambda kv: kv[1])
            shape = f"cosine {total}" if decay else "constant"
            rows.append({"adam_s": seconds, "adam_steps": taken, "schedule": f"{rate:g}, {shape}"})
        else:
            longest = max(times[math.inf][0] for times in runs.values())
            rows.append({"adam_s": longest, "adam_steps": max(steps), "schedule": "none arrived"})
    return rows


def measure(toy: bool = False) -> Part:
    if importlib.util.find_spec("torch") is None:
        reason = "torch is not installed; it comes with the extra: pip install '.[benchmarks]'"
        return Part("", COLUMNS, [], reason)
    dims, gaps, steps = ((8,), (1e-2,), (20,)) if toy else ((50, 100, 150), GAPS, STEPS)
    rows = []
    for dim in dims:
        with tempfile.TemporaryDirectory() as folder:
            found = fresh("torch_adam.descents", dim=dim, gaps=gaps, folder=folder)
            for stage in STAGES:
                rivals = fresh("torch_adam.adam", stage=stage, gaps=gaps, folder=folder,
                               steps=steps, workers=threads())  # fmt: skip
                own = [row for row in found if row["stage"] == stage]
                rows += [row | rival for row, rival in zip(own, rivals, strict=True)]
    for row in rows:
        if "lbfgs_s" not in row:
            continue
        row["ratio"] = row["adam_s"] / row["lbfgs_s"]
        missed = row["schedule"] == "none arrived"
        row["ratio_text"] = ("≥ " if missed else "") + f"{row['ratio']:.1f}"
    notes = NOTES.format(
        tight=TIGHT, threads=threads(), steps=", ".join(map(str, steps)),
        rates=", ".join(f"{rate:g}" for rate in RATES),
    )  # fmt: skip
    return Part(notes, COLUMNS, rows)
