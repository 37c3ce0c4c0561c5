"""The descent of the simulation (L-BFGS of optax) against that of optimistix, on one loss.

Same loss, data and start, stopped at ‖∇L‖ ≤ 1e-5 ‖2λW‖; warm times, ratios within one run.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optimistix

from lora_theory import Pretraining, Problem
from lora_theory.simulation.data import run_key
from lora_theory.simulation.minimise import minimise, training_loss
from lora_theory.simulation.pretraining import pretraining_data, pretraining_task
from lora_theory.simulation.sizes import Sizes

TOLERANCE, MAX_ITERATIONS = 1e-5, 5000


def own(task, activation):
    def run(start):
        end = minimise(task, start, TOLERANCE, MAX_ITERATIONS, activation=activation)
        return end.weights, end.iterations

    return run


def with_optimistix(task, activation):
    def loss(weights, _):
        return training_loss(task, weights, activation)

    # it stops by its own rule on steps and values, here so tight that it ends below the tolerance
    solver = optimistix.LBFGS(rtol=1e-8, atol=1e-8)

    @jax.jit
    def run(start):
        solution = optimistix.minimise(loss, solver, start, max_steps=MAX_ITERATIONS, throw=False)
        return solution.value, solution.stats["num_steps"]

    return run


SOLVERS = {"lora_theory": own, "optimistix": with_optimistix}


def measure(dim: int, penalty: float) -> list[dict]:
    problem = Problem(
        tokens=2, activation="softmax", teacher_rank=0.5, label_noise=0.5,
        pretraining=Pretraining(samples=0.2, penalty=penalty),
    )  # fmt: skip
    rows = []
    data = pretraining_data(run_key(0, 0), Sizes.of(problem, dim), 0.5, np.float64)
    task = pretraining_task(data, jnp.float64(penalty), activation="softmax")
    gradient_of = jax.jit(jax.grad(lambda weights: training_loss(task, weights, "softmax")))
    for name, solver in SOLVERS.items():
        run = solver(task, "softmax")
        jax.block_until_ready(run(data.start))
        began = time.perf_counter()
        weights, iterations = jax.block_until_ready(run(data.start))
        seconds = time.perf_counter() - began
        gradient = jnp.linalg.norm(gradient_of(weights)) / (2 * penalty * jnp.linalg.norm(weights))
        loss = float(training_loss(task, weights, "softmax")) / dim**2
        rows.append(
            {"dim": dim, "penalty": penalty, "solver": name, "seconds": seconds,
             "iterations": int(iterations), "relative_gradient": float(gradient), "loss": loss}
        )  # fmt: skip
    for row in rows:
        row["ratio"] = row["seconds"] / rows[0]["seconds"]
        print(
            f"D={row['dim']} λ={row['penalty']:g} {row['solver']:12s} {row['seconds']:7.2f} s "
            f"×{row['ratio']:5.2f}  {row['iterations']:5d} iterations  "
            f"gradient {row['relative_gradient']:.1e}  loss/D² {row['loss']:.10f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--dims", type=int, nargs="+", default=[50, 100])
    options = parser.parse_args()
    rows = []
    with jax.enable_x64(True):
        for dim in options.dims:
            for penalty in (0.1, 0.02):
                rows += measure(dim, penalty)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
