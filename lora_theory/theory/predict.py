"""predict: both stages solved, branches compared, every number with its quadrature error."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lora_theory.problem import Finetuning, Problem, ProblemError
from lora_theory.status import Status
from lora_theory.theory import finetuning as lora
from lora_theory.theory import pretraining as pre
from lora_theory.theory.fields import field_count
from lora_theory.theory.nodes import gaussian_blocks
from lora_theory.theory.results import (
    EffectiveNoise,
    FinetuningPrediction,
    Prediction,
    PretrainingPrediction,
)
from lora_theory.theory.roots import Root, solve
from lora_theory.theory.spectrum import learned_rank

__all__ = ["DEFAULT_NODES", "finetune", "predict"]

#: Sobol points per block (each is used with its mirror image), by number of tokens.
DEFAULT_NODES = {1: 4096, 2: 2048, 3: 1024}
_FEWEST_NODES = 512
_MATTERING_JUMPS, _LARGEST_JUMP_RESIDUAL = 0.05, 0.02
_COLLAPSED = 1e-10
# (log s, m/q0, log v) at q0 = 1: the uninformed root repels the damped iteration at large α'
_UNINFORMED_STARTS = np.array(
    [
        [math.log(s), 0.0, math.log(v)]
        for s in (0.15, 0.3, 0.45, 0.7)
        for v in (0.02, 0.06, 0.2, 0.6)
    ]
)
# an informed branch this weak is the uninformed one, moved by the discreteness of the nodes
_MERGED_OVERLAP = 0.05
_SEVERITY = [Status.CONVERGED, Status.JUMPS, Status.TIE, Status.COLLAPSED, Status.NOT_CONVERGED]


def predict(
    problem: Problem,
    *,
    nodes: int | None = None,
    blocks: int = 8,
    seed: int = 0,
    tolerance: float = 1e-10,
) -> Prediction:
    """Test errors and alignments of both stages in the high-dimensional limit.

    Solves the state evolution of pre-training (Q, M, V) and, through the noise that the frozen
    weights leave, of the rank-one LoRA (q, m, v); reports the LoRA branch of least potential and
    keeps the others.  Equations: docs/theory.md, sections 2 and 3; model: arXiv 2606.05899.

    Args:
        problem: what is asked.
        nodes: Sobol points per block (default by ``tokens``); the quadrature error falls about as
            1/nodes.  Linear pre-training is exact.
        blocks: independent scramblings, ≥ 2; their spread is the quadrature error.
        seed: of the scramblings.
        tolerance: largest relative residual that counts as converged.

    Raises:
        ProblemError: ``pretraining.rank`` is below the rank the weights want to learn.

    Example:
        >>> from lora_theory import Finetuning, Pretraining, Problem, predict
        >>> answer = predict(Problem(
        ...     tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        ...     pretraining=Pretraining(samples=0.2, penalty=0.02),
        ...     finetuning=Finetuning(samples=3.0, penalty=0.2),
        ... ))
        >>> answer.status.value, round(answer.pretraining.test_error, 4)
        ('converged', 0.7981)
        >>> abs(answer.finetuning.overlap - 0.9785) < 0.002
        True
    """
    _check_settings(nodes, blocks, tolerance)
    with jax.enable_x64(True):
        alone = problem.replace(finetuning=None)
        root = _solve_pretraining(alone, nodes, blocks, seed, tolerance)
        pretraining = _pretraining_prediction(problem, root, tolerance)
        noise = _effective_noise(problem, root)
        branches: tuple[FinetuningPrediction, ...] = ()
        if problem.finetuning is not None:
            order = [pre.OBSERVABLES.index(name) for name in ("Q", "M", "V")]
            branches = _solve_branches(
                problem.finetuning,
                (pretraining.Q, pretraining.M, pretraining.V),
                root.block_observables[:, order] - root.observables[order],
                1 + problem.teacher_rank + problem.label_noise / 2,
                problem.tokens,
                problem.activation,
                (nodes, blocks, seed, tolerance),
            )
    chosen = branches[0] if branches else None
    status = _worst([pretraining.status] + ([chosen.status] if chosen else []))
    return Prediction(
        problem=problem,
        status=status,
        pretraining=pretraining,
        effective_noise=noise,
        finetuning=chosen,
        branches=branches,
    )


def finetune(
    noise: EffectiveNoise,
    finetuning: Finetuning,
    *,
    tokens: int,
    activation: str,
    nodes: int | None = None,
    blocks: int = 8,
    seed: int = 0,
    tolerance: float = 1e-10,
) -> tuple[FinetuningPrediction, ...]:
    """The second stage alone, from (gain, variance, Q): its branches, least potential first.

    For fresh sequences only: re-used ones depend on the pre-training that made the weights
    (docs/theory.md, sections 3 and 4).  :func:`lora_theory.measure_noise` makes ``noise`` from the
    user's own weights.

    Raises:
        ProblemError: ``finetuning.sequences`` is "reused", or a number of ``noise`` is not allowed.

    Example:
        >>> from lora_theory import EffectiveNoise, Finetuning, finetune
        >>> noise = EffectiveNoise(gain=1.0, variance=0.3, Q=1.2)
        >>> task = Finetuning(samples=3.0, penalty=0.2)
        >>> best = finetune(noise, task, tokens=2, activation="linear")[0]
        >>> best.branch, best.overlap > 0.98
        ('informed', True)
    """
    _check_settings(nodes, blocks, tolerance)
    if finetuning.sequences != "fresh":
        raise ProblemError(
            f'finetuning.sequences = "{finetuning.sequences}" is not allowed without the '
            'pre-training that made the weights: it must be "fresh"'
        )
    for name in ("gain", "variance", "Q"):
        value = getattr(noise, name)
        if not (math.isfinite(value) and (value >= 0 or name == "gain")):
            raise ProblemError(
                f"noise.{name} = {value!r} is not allowed: it must be finite and ≥ 0"
            )
    with jax.enable_x64(True):
        return _solve_branches(
            finetuning,
            (noise.Q, noise.M, 0.0),
            None,
            noise.label_variance,
            tokens,
            activation,
            (nodes, blocks, seed, tolerance),
        )


def _check_settings(nodes: int | None, blocks: int, tolerance: float) -> None:
    if nodes is not None and (nodes < 16 or nodes & (nodes - 1)):
        raise ProblemError(f"nodes = {nodes!r} is not allowed: it must be a power of two ≥ 16")
    if blocks < 2:
        raise ProblemError(f"blocks = {blocks!r} is not allowed: it must be an integer ≥ 2")
    if not 0 < tolerance < 1:
        raise ProblemError(f"tolerance = {tolerance!r} is not allowed: it must be in (0, 1)")


def _node_count(nodes: int | None, tokens: int) -> int:
    return nodes or DEFAULT_NODES.get(tokens, _FEWEST_NODES)


@functools.lru_cache(maxsize=256)  # problems that share their pre-training solve it once
def _solve_pretraining(
    problem: Problem, nodes: int | None, blocks: int, seed: int, tolerance: float
) -> Root:
    constants = pre.Constants.of(problem)
    dimension, count = 2 * field_count(problem.tokens, problem.activation), blocks
    if problem.activation == "linear":
        dimension, count = 1, 1  # closed forms: the nodes are not used
    support = jnp.asarray(
        gaussian_blocks(dimension, _node_count(nodes, problem.tokens), count, seed)
    )

    def values(x: Float[np.ndarray, " 3"], block: int) -> Any:
        return pre.pretraining_values(
            x, support[block], constants, activation=problem.activation, tokens=problem.tokens
        )

    alpha = constants.samples
    start = np.log([0.3 * alpha, alpha, alpha])
    return solve(values, start, blocks=count, tolerance=tolerance)


def _pretraining_prediction(
    problem: Problem, root: Root, tolerance: float
) -> PretrainingPrediction:
    values = dict(zip(pre.OBSERVABLES, root.observables.tolist(), strict=True))
    errors = dict(zip(pre.OBSERVABLES, root.quadrature_error.tolist(), strict=True))
    rank = 0.0
    collapsed = values["Q"] < _COLLAPSED
    status = _stage_status(root, values["jump_mass"], errors["jump_mass"], tolerance)
    if collapsed:
        values |= {"Q": 0.0, "M": 0.0, "V": 0.0, "overlap": math.nan}
        status = Status.COLLAPSED if status.is_solved else status
    else:
        delta = math.sqrt(values["Q_hat"]) / values["M_hat"]
        epsilon = 2 * math.sqrt(problem.pretraining.rank) * problem.pretraining.penalty
        arguments = delta, epsilon / values["M_hat"], problem.teacher_rank
        rank = float(learned_rank(*(jnp.asarray(value) for value in arguments)))
    if status.is_solved and problem.pretraining.rank < rank:
        raise ProblemError(
            f"pretraining.rank = {problem.pretraining.rank:g} is not allowed: it must be at least "
            f"{rank:.4g}, the rank over D that the weights learn at this penalty"
        )
    return PretrainingPrediction(
        status=status,
        residual=root.residual,
        quadrature_error=errors,
        learned_rank=rank,
        **values,
    )


def _effective_noise(problem: Problem, root: Root) -> EffectiveNoise:
    order = [pre.OBSERVABLES.index(name) for name in ("Q", "M", "V")]
    label_variance = 1 + problem.teacher_rank + problem.label_noise / 2
    reused = problem.finetuning is not None and problem.finetuning.sequences == "reused"

    def numbers(Q: float, M: float, V: float) -> list[float]:
        delta = label_variance - 2 * M + Q
        shrink = (1 + 4 * V / problem.tokens**2) ** 2 if reused else 1.0
        if Q < _COLLAPSED:
            return [math.nan, label_variance, delta, delta / shrink]
        return [M / Q, label_variance - M**2 / Q, delta, delta / shrink]

    center = numbers(*root.observables[order])
    spread = np.array([numbers(*row) for row in root.block_observables[:, order]])
    error = spread.std(axis=0, ddof=1) / math.sqrt(len(spread)) if len(spread) > 1 else np.zeros(4)
    names = ("gain", "variance", "delta_eff", "delta_eff_training")
    kept = names if problem.activation == "linear" else names[:2]
    values = {name: value for name, value in zip(names, center, strict=True) if name in kept}
    errors = {n: float(e) for n, e in zip(names, error, strict=True) if n in kept}
    Q = float(root.observables[order[0]])
    return EffectiveNoise(Q=max(Q, 0.0), quadrature_error=errors, **values)


def _solve_branches(
    stage: Finetuning,
    frozen: tuple[float, float, float],
    shift: Float[np.ndarray, "R 3"] | None,
    label_variance: float,
    tokens: int,
    activation: str,
    settings: tuple[int | None, int, int, float],
) -> tuple[FinetuningPrediction, ...]:
    """All branches found, the one of least potential first."""
    nodes, blocks, seed, tolerance = settings
    task = lora.Task(stage.samples, stage.penalty, stage.signal, label_variance)
    reused = stage.sequences == "reused"
    gaussian = gaussian_blocks(
        lora.node_dimension(tokens, activation), _node_count(nodes, tokens), blocks, seed + 1
    )
    support: list[Any]
    if activation == "linear":
        Q, M, V = frozen
        noise = label_variance - 2 * M + Q
        felt = noise / (1 + 4 * V / tokens**2) ** 2 if reused else noise
        support = [
            lora.linear_fields(g, felt, noise, stage.signal, tokens=tokens) for g in gaussian
        ]
        parameters, shift = np.zeros(0), None
    else:
        support = [jnp.asarray(g) for g in gaussian]
        parameters = np.array(frozen)

    scale = 0.5 * math.log(stage.signal)

    def branch(held: tuple[bool, bool, bool], spread: float, m: float) -> Root:
        def values(x: Float[np.ndarray, " 3"], block: int) -> Any:
            return lora.finetuning_values(
                x, parameters, support[block], task, held,
                activation=activation, tokens=tokens, reused=reused,
            )  # fmt: skip

        start = np.array([spread, m, math.log(0.05)])
        shifted = _UNINFORMED_STARTS + np.array([scale, 0.0, 0.0])
        others = list(shifted) if held == lora.UNINFORMED else []
        return solve(
            values, start, blocks=blocks, tolerance=tolerance, parameter_shift=shift, others=others
        )

    vanishing = scale + math.log(1e-3)
    found: dict[str, Root] = {}
    informed = branch(lora.INFORMED, scale + math.log(0.1), 0.9)
    learned = abs(informed.unknowns[1]) > 1e-3 or informed.unknowns[0] > vanishing
    if learned and informed.observables[lora.OBSERVABLES.index("overlap")] > _MERGED_OVERLAP:
        found["informed"] = informed
    uninformed = branch(lora.UNINFORMED, scale + math.log(0.5), 0.0)
    if uninformed.unknowns[0] > vanishing:
        found["uninformed"] = uninformed
    else:
        zero = branch(lora.ZERO, lora.ZERO_SPREAD, 0.0)
        growth = zero.observables[lora.OBSERVABLES.index("growth")]
        found["zero" if growth < 0 else "uninformed"] = zero if growth < 0 else uninformed
    predictions = [_finetuning_prediction(n, root, tolerance) for n, root in found.items()]
    return _by_potential(predictions)


def _finetuning_prediction(name: str, root: Root, tolerance: float) -> FinetuningPrediction:
    values = dict(zip(lora.OBSERVABLES, root.observables.tolist(), strict=True))
    errors = dict(zip(lora.OBSERVABLES, root.quadrature_error.tolist(), strict=True))
    status = _stage_status(root, values["jump_mass"], errors["jump_mass"], tolerance)
    if name == "zero":
        values |= {"q": 0.0, "m": 0.0, "q_hat": 0.0, "m_hat": 0.0, "overlap": math.nan}
        values["test_error"] = values["frozen_test_error"]
        status = Status.COLLAPSED if status.is_solved else status
    if name == "uninformed":
        values |= {"m": 0.0, "m_hat": 0.0, "overlap": 0.0}
        errors |= {"m": 0.0, "m_hat": 0.0, "overlap": 0.0}
    if values["m"] < 0:  # the mirror image w → −w
        values |= {"m": -values["m"], "m_hat": -values["m_hat"]}
    del values["growth"], errors["growth"]
    return FinetuningPrediction(
        status=status, residual=root.residual, quadrature_error=errors, branch=name, **values
    )


def _by_potential(
    predictions: Iterable[FinetuningPrediction],
) -> tuple[FinetuningPrediction, ...]:
    # an unsolved branch has no potential to compare: an informed one is shown first, as such
    def order(prediction: FinetuningPrediction) -> tuple[int, float]:
        if prediction.status.is_solved:
            return 1, prediction.potential
        return (0 if prediction.branch == "informed" else 2), prediction.potential

    ordered = sorted(predictions, key=order)
    if len(ordered) > 1:
        first, second = ordered[:2]
        error = math.hypot(
            first.quadrature_error["potential"], second.quadrature_error["potential"]
        )
        solved = first.status.is_solved and second.status.is_solved
        if solved and second.potential - first.potential < error:
            ordered[0] = replace(first, status=Status.TIE)
    return tuple(ordered)


def _stage_status(root: Root, jump_mass: float, jump_error: float, tolerance: float) -> Status:
    if not np.all(np.isfinite(root.observables[:-1])):
        return Status.NOT_CONVERGED
    jumps = abs(jump_mass) > max(_MATTERING_JUMPS, 4 * jump_error)
    if root.residual < tolerance:
        return Status.JUMPS if jumps else Status.CONVERGED
    within = root.residual < min(root.residual_noise, _LARGEST_JUMP_RESIDUAL)
    return Status.JUMPS if within else Status.NOT_CONVERGED


def _worst(statuses: list[Status]) -> Status:
    return max(statuses, key=_SEVERITY.index)
