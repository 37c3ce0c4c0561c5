"""The public call of the simulation."""

from __future__ import annotations

import math
import numbers
import os
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from lora_theory.arguments import check_problem, checked_integer
from lora_theory.compilation import double_precision
from lora_theory.problem import Problem, ProblemError
from lora_theory.simulation.data import run_key
from lora_theory.simulation.results import Simulation, summarise
from lora_theory.simulation.run import Effort, run_seeds
from lora_theory.simulation.sampled import check_sampled
from lora_theory.simulation.sizes import Sizes
from lora_theory.simulation.storage import checked_path, save_weights

__all__ = ["PRETRAINED", "checked_effort", "simulate"]

DTYPES: dict[str, type[np.floating[Any]]] = {"float32": np.float32, "float64": np.float64}
#: Where the frozen weights come from.
PRETRAINED = ("trained", "sampled")
#: Relative gradient norms.  Measured shifts of Q, M, q, m against a far lower tolerance: 1e-6
#: (float64), 1e-4 for Q and M and at most 1e-3 for q and m at weak λ' (float32), where the
#: gradient is rounding noise below 3e-4.  Seeds scatter by percents.
GRADIENT_TOLERANCES = {"float32": 1e-3, "float64": 1e-5}


def simulate(
    problem: Problem,
    dim: int,
    seeds: int,
    *,
    seed: int = 0,
    first: int = 0,
    starts: int = 3,
    batch: int = 1,
    pretrained: str = "trained",
    dtype: str = "float64",
    device: str | None = None,
    save: str | os.PathLike[str] | None = None,
    test_sequences: int = 20_000,
    gradient_tolerance: float | None = None,
    max_iterations: int = 20_000,
    start_scale: float = 1.0,
    progress: bool = False,
) -> Simulation:
    """Train and measure ``seeds`` independent systems of embedding dimension ``dim``.

    Every run draws a teacher, N = round(αD²) sequences and their noisy labels, minimises the
    training loss over W ∈ R^{D×P} by full-batch L-BFGS (penalties with kinks by proximal gradients,
    their tolerance relative to the gradient of the loss), then, with W frozen, the fine-tuning loss
    over w ∈ R^D on N' = round(α'D) sequences, once from w* (informed) and from ``starts`` random
    vectors.  The losses compare T×T attention matrices (docs/theory.md, section 1; model of
    arXiv 2606.05899, pre-training stage of arXiv 2509.24914).  Test errors are means over
    ``test_sequences`` fresh sequences, label noise included.

    An iteration costs two products of X (NT × D) with a D × P matrix, and some hundred iterations
    are enough (more as λ → 0); memory is about 6 NTD numbers per run of a batch.

    Args:
        problem: the question.
        dim: embedding dimension D.
        seeds: number of independent runs, the ``count`` of every estimate.
        seed: root of all random numbers, below 2³².  Run i uses ``fold_in(key(seed), i)``: more
            seeds, starts, training or test sequences never change the earlier numbers.
        first: index i of the first run, so that several calls share the runs of one.
        starts: random starts of the fine-tuning, all kept.
        batch: runs that are trained together.  Batches give the same minima within the gradient
            tolerance, not the same bits.  They are meant for a GPU that one run does not fill; on
            the CPU they take 3 to 6 times as long as the same runs one by one.
        pretrained: "trained", or "sampled": Ŝ is then drawn from its asymptotic law given S0
            (:func:`lora_theory.sample_pretrained`), which makes D of many hundreds cheap; its
            train_error and objective are NaN.  For fresh fine-tuning sequences only.
        dtype: "float32" or "float64".  The random numbers are drawn in float32 in both cases, so
            both see the same data.
        device: "cpu", "gpu" or None (JAX's default).
        save: a .npz file for the weights of all seeds along the first axis: W0 (seeds, D, P0), W
            (seeds, D, P), w_star, w and w_random (seeds, D), in float64, with the problem as TOML
            text and the root seed; S0 or S (seeds, D, D) where there is no factor; S_frozen of a
            compression.  Written at the end, whole or not at all.
        test_sequences: fresh sequences per run.
        gradient_tolerance: a descent stops at ‖∇L‖/‖2λW‖ below this; 1e-5 in float64 and 1e-3 in
            float32 by default.
        max_iterations: a descent stops after so many steps; like every descent that stops above
            the tolerance it is counted in ``missed`` and kept.
        start_scale: of the start of pre-training, W with iid N(0, 1) entries, or preconditioned
            weights with singular values up to σ̂/4.  It matters where the penalty is not convex:
            low-rank decay learns less from small starts, preconditioned weights leave the branch of
            the theory from large ones (docs/theory.md, section 2.8).
        progress: show a bar of the seeds on stderr.

    Raises:
        ProblemError: an argument is not allowed, the system is too small for the problem, or
            fewer pre-training sequences exist than are re-used.

    Example:
        >>> from lora_theory import Finetuning, Pretraining
        >>> problem = Problem(
        ...     tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        ...     pretraining=Pretraining(samples=0.5, penalty=0.1),
        ...     finetuning=Finetuning(samples=4.0, penalty=0.2),
        ... )
        >>> simulation = simulate(problem, dim=16, seeds=2, starts=1, test_sequences=500)
        >>> simulation.status.value, simulation.pretraining.Q.count
        ('converged', 2)
        >>> 0 < simulation.finetuning.overlap.mean <= 1
        True
    """
    check_problem(problem, covariance=True)
    sizes = Sizes.of(problem, dim, trained=pretrained != "sampled")
    seeds = checked_integer("seeds", seeds, 1)
    seed = checked_integer("seed", seed, 0, 2**32 - 1)
    first = checked_integer("first", first, 0, 2**32 - seeds)
    effort = checked_effort(
        starts, batch, pretrained, dtype, test_sequences, gradient_tolerance, max_iterations,
        start_scale,
    )  # fmt: skip
    if effort.pretrained == "sampled":
        check_sampled(problem)
    from_zero = problem.pretraining.regularizer in ("frobenius", "separable")
    if effort.start_scale != 1 and (from_zero or effort.pretrained == "sampled"):
        raise ProblemError(
            f"start_scale = {effort.start_scale:g} is not allowed where pre-training does not "
            "start from random weights, as with these settings: leave it out"
        )
    path = None if save is None else checked_path(save)
    if path is not None:
        problem.check_text()  # it is saved with the weights
    target = _device(device)

    records, arrays = [], []
    bar = tqdm(total=seeds, desc=f"seeds at D = {dim}", disable=not progress)
    with double_precision(), jax.default_device(target), bar:
        for done in range(0, seeds, effort.batch):
            indices = range(first + done, first + min(done + effort.batch, seeds))
            keys = [run_key(seed, index) for index in indices]
            for record, weights in run_seeds(problem, sizes, effort, keys):
                records.append(record)
                if path is not None:
                    arrays.append(weights)
                bar.update()
    if path is not None:
        stacked = {name: np.stack([run[name] for run in arrays]) for name in arrays[0]}
        save_weights(path, problem, seed, stacked)
    environment = {
        "seed": seed,
        "dtype": dtype,
        "device": target.device_kind,
        "platform": target.platform,
        "batch": effort.batch,
        "pretrained": effort.pretrained,
        "starts": effort.starts,
        "test_sequences": effort.test_sequences,
        "gradient_tolerance": effort.gradient_tolerance,
        "max_iterations": effort.max_iterations,
        "start_scale": effort.start_scale,
        "jax": jax.__version__,
        "numpy": np.__version__,
    }
    return summarise(problem, sizes.dim, environment, records, first)


def checked_effort(
    starts: int,
    batch: int,
    pretrained: str,
    dtype: str,
    test_sequences: int,
    gradient_tolerance: float | None,
    max_iterations: int,
    start_scale: float = 1.0,
) -> Effort:
    """The arguments of :func:`simulate` that say how much is computed, once they are allowed."""
    if dtype not in DTYPES:
        raise ProblemError(f'dtype = {dtype!r} is not allowed: it must be "float32" or "float64"')
    if pretrained not in PRETRAINED:
        raise ProblemError(
            f'pretrained = {pretrained!r} is not allowed: it must be "trained" or "sampled"'
        )
    return Effort(
        DTYPES[dtype],
        checked_integer("starts", starts, 0),
        checked_integer("batch", batch, 1),
        checked_integer("test_sequences", test_sequences, 2),
        _tolerance(gradient_tolerance, dtype),
        checked_integer("max_iterations", max_iterations, 1),
        pretrained,
        _checked_scale(start_scale),
    )


def _checked_scale(value: Any) -> float:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 < float(value) < math.inf:
        raise ProblemError(f"start_scale = {value!r} is not allowed: it must be > 0 and finite")
    return float(value)


def _tolerance(value: Any, dtype: str) -> float:
    if value is None:
        return GRADIENT_TOLERANCES[dtype]
    if not isinstance(value, numbers.Real) or not 0 < float(value) < 1:
        raise ProblemError(
            f"gradient_tolerance = {value!r} is not allowed: it must be between 0 and 1"
        )
    return float(value)


def _device(name: str | None) -> jax.Device:
    if name not in (None, "cpu", "gpu"):
        raise ProblemError(f'device = {name!r} is not allowed: it must be "cpu", "gpu" or None')
    try:
        return jax.devices(name)[0]
    except RuntimeError as error:
        found = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise ProblemError(
            f"device = {name!r} is not available here: JAX finds only {found}"
        ) from error
