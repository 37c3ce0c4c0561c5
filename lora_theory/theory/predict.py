"""predict: both stages solved, branches compared, every number with its quadrature error."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lora_theory.arguments import check_problem
from lora_theory.compilation import double_precision
from lora_theory.problem import Finetuning, Pretraining, Problem, ProblemError
from lora_theory.status import Status
from lora_theory.theory import pretraining as pre
from lora_theory.theory.averages import Averages, in_parallel
from lora_theory.theory.branches import FrozenWeights, solve_branches
from lora_theory.theory.errors import Errors, OrderParameters
from lora_theory.theory.fields import field_count
from lora_theory.theory.kept import kept_coordinates
from lora_theory.theory.nodes import Discretisation, coarse_chunks
from lora_theory.theory.results import (
    EffectiveNoise,
    FinetuningPrediction,
    Prediction,
    PretrainingPrediction,
    Stability,
)
from lora_theory.theory.roots import Root, first_good, solve, standard_error, with_jumps
from lora_theory.theory.stability import pretraining_stability
from lora_theory.theory.training_fields import Trained
from lora_theory.theory.truncated import truncated_at
from lora_theory.theory.units import Units
from lora_theory.theory.used import COLLAPSED, used_weights
from lora_theory.theory.weights import Constants, kept_at, weights_at

__all__ = [
    "check_predictable",
    "check_tokens",
    "effective_noise",
    "finetune",
    "frozen_weights",
    "predict",
    "predict_many",
    "pretraining_averages",
    "solve_pretraining",
    "worst",
]

_MOST_TOKENS, _EASY_PENALTY = 8, 1.0
_SEVERITY = [
    Status.CONVERGED, Status.JUMPS, Status.TIE, Status.UNSTABLE, Status.COLLAPSED,
    Status.NOT_CONVERGED,
]  # fmt: skip


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
        ProblemError: ``problem`` is none or has more than 8 tokens, or a setting is not allowed.

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
    discretisation = Discretisation.checked(nodes, blocks, seed, tolerance)
    check_predictable(problem, covariance=True)
    with double_precision():
        root = solve_pretraining(problem.alone, discretisation)
        weights, units = frozen_weights(problem, root, discretisation), Units.of(problem)
        pretraining = pretraining_prediction(problem, root, weights, discretisation)
        noise = effective_noise(problem, weights, discretisation)
        first = _pretraining_stability(problem.alone, discretisation)
        pretraining = flagged(pretraining, first)
        branches: tuple[FinetuningPrediction, ...] = ()
        second: Stability | None = None
        if problem.finetuning is not None:
            stage = units.stage(problem.finetuning)
            found, second = solve_branches(
                stage, weights, problem.tokens, problem.activation, discretisation
            )
            found = (flagged(found[0], second), *found[1:])
            branches = tuple(units.finetuning(branch) for branch in found)
    chosen = branches[0] if branches else None
    status = worst([pretraining.status] + ([chosen.status] if chosen else []))
    return Prediction(
        problem=problem,
        status=status,
        stability={"pretraining": first, "finetuning": second},
        pretraining=units.pretraining(pretraining),
        effective_noise=units.effective_noise(noise),
        finetuning=chosen,
        branches=branches,
    )


def predict_many(
    problems: Iterable[Problem],
    *,
    nodes: int | None = None,
    blocks: int = 8,
    seed: int = 0,
    tolerance: float = 1e-10,
) -> list[Prediction]:
    """:func:`predict` for many problems, several at a time; equal pre-trainings are solved once.

    Raises:
        ProblemError: as :func:`predict`, for the first problem that is refused.

    Example:
        >>> from lora_theory import Pretraining, Problem, predict_many
        >>> base = Problem(
        ...     tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        ...     pretraining=Pretraining(samples=0.2, penalty=0.02),
        ... )
        >>> weak, strong = predict_many(
        ...     base.replace({"pretraining.penalty": penalty}) for penalty in (0.02, 0.2)
        ... )
        >>> weak.pretraining.test_error > strong.pretraining.test_error
        True
    """
    if isinstance(problems, Problem | str) or not isinstance(problems, Iterable):
        raise ProblemError(f"problems = {problems!r} is not allowed: it must be several Problems")
    one = functools.partial(predict, nodes=nodes, blocks=blocks, seed=seed, tolerance=tolerance)
    return in_parallel(one, problems)


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

    For fresh sequences of tokens with covariance 1 only: re-used ones depend on the pre-training
    that made the weights (docs/theory.md, sections 3 and 4), and a covariance enters LoRA itself
    (section 3.8).  :func:`lora_theory.measure_noise` makes ``noise`` from the user's own weights.

    Raises:
        ProblemError: ``finetuning.sequences`` is "reused", ``finetuning.rescaling`` is not 1, the
            labels have no variance, or another argument is not allowed.

    Example:
        >>> from lora_theory import EffectiveNoise, Finetuning, finetune
        >>> noise = EffectiveNoise(gain=1.0, variance=0.3, Q=1.2)
        >>> task = Finetuning(samples=3.0, penalty=0.2)
        >>> best = finetune(noise, task, tokens=2, activation="linear")[0]
        >>> best.branch, best.overlap > 0.98
        ('informed', True)
    """
    discretisation = Discretisation.checked(nodes, blocks, seed, tolerance)
    if not isinstance(finetuning, Finetuning):
        raise ProblemError(f"finetuning = {finetuning!r} must be a Finetuning")
    stand_in = Pretraining(samples=1.0, penalty=1.0)  # tokens and activation are checked by Problem
    Problem(
        tokens=tokens, activation=activation, teacher_rank=1.0, label_noise=0.0,
        pretraining=stand_in, finetuning=finetuning,
    )  # fmt: skip
    check_tokens(tokens)
    if finetuning.sequences != "fresh":
        raise ProblemError(
            f'finetuning.sequences = "{finetuning.sequences}" is not allowed without the '
            'pre-training that made the weights: it must be "fresh"'
        )
    if finetuning.rescaling != 1:
        raise ProblemError(
            f"finetuning.rescaling = {finetuning.rescaling!r} is not allowed here, where noise is "
            "that of the weights as they are used: it must be 1, with the weights rescaled before "
            "their noise is measured"
        )
    _check_noise(noise)
    Q, M, V = (np.full(blocks, value) for value in (noise.Q, noise.M, 0.0))
    weights = FrozenWeights(Q, M, V, noise.label_variance)
    with double_precision():
        found, stability = solve_branches(finetuning, weights, tokens, activation, discretisation)
    return (flagged(found[0], stability), *found[1:])


def _check_noise(noise: EffectiveNoise) -> None:
    if not isinstance(noise, EffectiveNoise):
        raise ProblemError(f"noise = {noise!r} must be an EffectiveNoise")
    for name, smallest in (("gain", -math.inf), ("variance", 0.0), ("Q", 0.0)):
        value = getattr(noise, name)
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not (math.isfinite(value) and value >= smallest):
            # weights that vanish have a gain of 0/0
            if name == "gain" and noise.Q == 0 and number:
                continue
            allowed = "finite" if name == "gain" else "≥ 0 and finite"
            raise ProblemError(f"noise.{name} = {value!r} is not allowed: it must be {allowed}")
    if not 0 < noise.label_variance < math.inf:
        raise ProblemError(
            f"noise.variance = {noise.variance!r} with noise.gain = {noise.gain!r} and noise.Q = "
            f"{noise.Q!r} is not allowed: variance + gain²·Q, the variance of the labels' fields, "
            "must be > 0 and finite"
        )


def check_predictable(problem: Problem, *, covariance: bool = False) -> None:
    """Refuse what is no problem, or one with too many tokens."""
    check_problem(problem, covariance=covariance)
    check_tokens(problem.tokens)


def check_tokens(tokens: int) -> None:
    """The equations are written out over tokens, which is compiled in reasonable time up to 8."""
    if tokens > _MOST_TOKENS:
        raise ProblemError(
            f"tokens = {tokens} is not allowed in the theory: it must be at most {_MOST_TOKENS}"
        )


def pretraining_averages(problem: Problem, discretisation: Discretisation) -> tuple[Averages, int]:
    """The equations of stage one on nodes, and the number of chunks to look for a root on."""
    constants, tokens = Constants.of(problem), problem.tokens
    if problem.activation == "linear":
        return Averages(pre.LinearPretraining(constants, tokens=tokens), [None], 1), 1
    n = field_count(tokens, problem.activation)
    nodes, together = discretisation.chunks(2 * n, tokens, discretisation.seed)
    equations = pre.SoftmaxPretraining(constants, tokens=tokens, blocks=together)
    labels = [pre.Labels(jnp.asarray(part[:n]), jnp.asarray(part[n:])) for part in nodes]
    return Averages(equations, labels, discretisation.blocks), coarse_chunks(nodes, tokens)


@functools.lru_cache(maxsize=256)  # problems that share their pre-training solve it once
def solve_pretraining(problem: Problem, discretisation: Discretisation) -> Root:
    """The root of stage one; ``problem`` alone."""
    averages, coarse = pretraining_averages(problem, discretisation)

    solve_from = functools.partial(
        solve,
        averages,
        coarse=coarse,
        tolerance=discretisation.tolerance,
        relaxation=pre.relaxation,
    )

    alpha, penalty = problem.pretraining.samples, problem.pretraining.penalty
    start = np.log([0.3 * alpha, alpha, alpha])

    def roots() -> Iterator[Root]:
        yield solve_from(start, thorough=False)
        if penalty <= _EASY_PENALTY:
            # V grows without bound as λ → 0 below interpolation: come from a larger penalty
            easier = problem.replace({"pretraining.penalty": 3 * penalty})
            near = solve_pretraining(easier, discretisation).unknowns
            yield solve_from(near, thorough=False)
        yield solve_from(start)

    root = first_good(roots(), discretisation.tolerance)
    jumps = root.status(*_jump_mass(root), discretisation.tolerance) is Status.JUMPS
    return with_jumps(averages, root) if jumps else root


@functools.lru_cache(maxsize=256)
def _pretraining_stability(problem: Problem, discretisation: Discretisation) -> Stability:
    """That of the root of stage one; ``problem`` alone."""
    root, constants = solve_pretraining(problem, discretisation), Constants.of(problem)
    if root.observables[pre.OBSERVABLES.index("Q")] < COLLAPSED:
        return Stability(0.0, 0.0, 0.0, 0.0)  # nothing is learnt, and nothing answers
    averages, _ = pretraining_averages(problem, discretisation)
    return pretraining_stability(averages, root, constants, problem.tokens)


_Stage = TypeVar("_Stage", PretrainingPrediction, FinetuningPrediction)


def flagged(stage: _Stage, stability: Stability) -> _Stage:
    """With the error of the jump mass, which the blocks' own roots do not show, and the status."""
    errors = stage.quadrature_error | {"jump_mass": stability.jump_error}
    stage = dataclasses.replace(stage, quadrature_error=errors)
    if stability.is_stable or stage.status in (Status.NOT_CONVERGED, Status.COLLAPSED):
        return stage
    return dataclasses.replace(stage, status=Status.UNSTABLE)


def _jump_mass(root: Root) -> tuple[float, float]:
    column = pre.OBSERVABLES.index("jump_mass")
    return float(root.observables[column]), float(root.quadrature_error[column])


def pretraining_prediction(
    problem: Problem, root: Root, weights: FrozenWeights, discretisation: Discretisation
) -> PretrainingPrediction:
    values = dict(zip(pre.OBSERVABLES, root.observables.tolist(), strict=True))
    errors = dict(zip(pre.OBSERVABLES, root.quadrature_error.tolist(), strict=True))
    rank = 0.0
    collapsed = values["Q"] < COLLAPSED
    status = root.status(*_jump_mass(root), discretisation.tolerance)
    nothing = np.zeros_like(weights.Q)
    Q, M = (np.broadcast_to(part, nothing.shape) for part in weights.trained[:2])
    at = OrderParameters(Q, M, nothing, nothing)
    law = Errors(
        problem.activation, problem.tokens, Constants.of(problem).label_variance,
        blocks=len(nothing), seed=discretisation.seed,
    )  # fmt: skip
    center = OrderParameters.same(values["Q"], values["M"], 0.0, 0.0, len(nothing))
    values["test_error"] = float(law.at(center, 0.0).mean())
    errors["test_error"] = float(standard_error(law.at(at, 0.0)))
    if collapsed:
        values |= {"Q": 0.0, "M": 0.0, "V": 0.0, "overlap": math.nan}
        status = Status.COLLAPSED if status.is_solved else status
    else:
        rank = kept_at(root.unknowns, Constants.of(problem)).rank
    return PretrainingPrediction(
        status=status,
        residual=root.residual,
        quadrature_error=errors,
        learned_rank=rank,
        **values,
    )


def frozen_weights(
    problem: Problem, root: Root, discretisation: Discretisation | None = None
) -> FrozenWeights:
    """Q, M and V at the roots of the single blocks, after the compression if there is one.

    ``discretisation`` says how many matrices are drawn where tokens have a covariance.
    """
    if problem.covariance is not None:
        assert discretisation is not None
        _check_rank(problem, root)
        return used_weights(
            problem, root.block_unknowns, discretisation.blocks, discretisation.seed
        )
    constants, stage, before = Constants.of(problem), problem.compression, None
    if root.observables[pre.OBSERVABLES.index("Q")] < COLLAPSED:
        Q, M, V = np.zeros((3, len(root.block_unknowns)))
    else:
        at = root.block_unknowns
        Q, M, V = np.array([weights_at(x, constants).values[:3] for x in at]).T
        if stage is not None:
            left = np.array([_truncated(x, constants, stage.rank) for x in at]).T
            before = Trained(Q, M, V, cross=left[0])
            Q, M, V = left
    noise_variance = Units.of(problem).teacher ** 2 * problem.label_noise / 2
    return FrozenWeights(
        Q, M, V, constants.label_variance, problem.rescaling, noise_variance, before
    )


def _check_rank(problem: Problem, root: Root) -> None:
    """A factor too narrow for what is learnt is understood without a covariance only."""
    rank, constants = problem.pretraining.rank, Constants.of(problem)
    if rank < 1 and (learnt := kept_at(root.unknowns, constants).rank) > rank:
        raise ProblemError(
            f"pretraining.rank = {rank:g} is not allowed in the theory with covariance where the "
            f"rank learnt is {learnt:.3g}: it must be at least that"
        )


def _truncated(
    unknowns: Float[np.ndarray, " 3"], constants: Constants, share: float
) -> Float[np.ndarray, " 3"]:
    """Q, M and V of what truncation leaves."""
    found = truncated_at(unknowns, constants, share)
    if found is None:
        return np.asarray(weights_at(unknowns, constants).values[:3])
    return np.array(found[:3])


def effective_noise(
    problem: Problem, weights: FrozenWeights, discretisation: Discretisation
) -> EffectiveNoise:
    """What the fine-tuning of ``problem`` sees of the weights."""
    stage, (Q, M) = problem.finetuning, weights.rescaled
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = M / Q
        variance = weights.label_variance - np.where(Q > 0, M * gain, 0.0)
    blocks = {"gain": gain, "variance": variance}
    if stage is not None and stage.chosen:
        z = kept_coordinates(stage, np.sqrt(Q), problem.tokens, discretisation)
        blocks["kept_variance"] = Q * (z**2).mean(axis=(1, 2))
    if problem.activation == "linear":
        fresh = blocks["delta_eff"] = blocks["delta_eff_training"] = weights.effective_noise()
        if stage is not None and stage.reused:
            reused = weights.training_noise(problem.tokens, redrawn=stage.redraws_noise)
            blocks["delta_eff_training"] = stage.reused * reused + (1 - stage.reused) * fresh
        if "kept_variance" in blocks:
            mismatch = np.where(Q > 0, 1 - gain, 0.0) ** 2
            blocks["delta_eff_training"] = variance + mismatch * blocks["kept_variance"]
    return EffectiveNoise(
        Q=float(Q.mean()),
        quadrature_error={name: float(standard_error(part)) for name, part in blocks.items()},
        **{name: float(part.mean()) for name, part in blocks.items()},
    )


def worst(statuses: list[Status]) -> Status:
    """The one that says most against the numbers."""
    return max(statuses, key=_SEVERITY.index)
