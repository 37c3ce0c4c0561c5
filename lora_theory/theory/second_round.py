"""Two rounds of active fine-tuning: fit w₁, choose the next sequences by it, fit w₂ to all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from lora_theory.arguments import check_problem
from lora_theory.compilation import double_precision
from lora_theory.problem import Finetuning, Problem, ProblemError, Selection
from lora_theory.status import Status
from lora_theory.theory import finetuning as lora
from lora_theory.theory.averages import Averages
from lora_theory.theory.branches import BranchErrors, FinetuningNodes, FrozenWeights
from lora_theory.theory.nodes import Discretisation
from lora_theory.theory.predict import frozen_weights, predict, solve_pretraining, worst
from lora_theory.theory.results import FinetuningPrediction, Prediction, Stability
from lora_theory.theory.roots import Root, first_good, refine, solve, with_jumps
from lora_theory.theory.round_equations import OBSERVABLES, SecondRoundEquations, relaxation
from lora_theory.theory.round_fields import round_fields
from lora_theory.theory.units import Units

__all__ = ["CHOSEN_BY", "SecondRound", "checked_second", "second_round"]

#: What a choice is made by: logits with the LoRA vector merged in, or those of the frozen weights.
CHOSEN_BY = ("current", "frozen")
# ω₂ before the first step: how much of ω₁ is in it, and of the spread of one round is its own
_START_SHARE, _START_SPREAD = 0.5, 0.7


@dataclass(frozen=True, kw_only=True)
class SecondRound:
    """LoRA after two rounds in the limit D → ∞ (docs/theory.md, section 3.7).

    ``first`` is the first round alone.  ``p`` is w₁·w₂/D; ``choice`` is ĉv₂, how much w₂ follows a
    small change of w₁ because the second batch is chosen by it.
    """

    status: Status
    residual: float
    quadrature_error: dict[str, float]
    stability: Stability
    first: Prediction
    q: float
    m: float
    v: float
    p: float
    choice: float
    overlap: float
    test_error: float
    train_error: float
    frozen_test_error: float
    jump_mass: float


def second_round(
    problem: Problem,
    *,
    samples: float,
    selection: Selection | None = None,
    by: str = "current",
    nodes: int | None = None,
    blocks: int = 8,
    seed: int = 0,
    tolerance: float = 1e-10,
) -> SecondRound:
    """A second round after the fine-tuning of ``problem``, in the high-dimensional limit.

    The first round fits w₁ to the sequences of ``problem.finetuning``.  Then ``samples``·D more are
    labelled, those of lowest score in a new pool, where the score sees the logits of the layer with
    w₁ merged in, τ(βh + χ₁χ₁ᵀ − q₁I); and w₂ is fitted anew, with the same penalty, to both
    batches.  Equations: docs/theory.md, section 3.7.

    Args:
        problem: with fine-tuning on fresh sequences, which may be chosen from a pool themselves.
        samples: α₂, sequences of the second batch over D.
        selection: how they are chosen; None or "uniform": any are taken.
        by: "current", or "frozen": the scores see τβh alone.
        nodes, blocks, seed, tolerance: as for :func:`lora_theory.predict`.

    Raises:
        ProblemError: an argument is not allowed, or the first round has not found the task.

    Example:
        >>> from lora_theory import Pretraining
        >>> problem = Problem(
        ...     tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        ...     pretraining=Pretraining(samples=0.2, penalty=0.05),
        ...     finetuning=Finetuning(samples=1.5, penalty=0.2),
        ... )
        >>> any_taken = second_round(problem, samples=1.5, nodes=256)
        >>> at_once = predict(problem.replace({"finetuning.samples": 3.0}), nodes=256).finetuning
        >>> abs(any_taken.overlap - at_once.overlap) < 0.005
        True
    """
    discretisation = Discretisation.checked(nodes, blocks, seed, tolerance)
    second = checked_second(problem, samples, selection, by)
    before = predict(problem, nodes=nodes, blocks=blocks, seed=seed, tolerance=tolerance)
    first = problem.finetuning
    assert first is not None
    assert before.finetuning is not None
    if before.finetuning.branch != "informed" or not before.finetuning.status.is_solved:
        raise ProblemError(
            f"finetuning.samples = {first.samples:g} is not allowed in the first of two rounds: "
            f"its branch is {before.finetuning.branch} with the status {before.finetuning.status}, "
            "and must be informed and solved; more samples may be enough"
        )
    changes = {"finetuning.samples": first.samples + second.samples, "finetuning.selection": None}
    at_once = predict(
        problem.replace(changes), nodes=nodes, blocks=blocks, seed=seed, tolerance=tolerance
    ).finetuning
    assert at_once is not None
    with double_precision():
        root = solve_pretraining(problem.alone, discretisation)
        weights = frozen_weights(problem, root)
        averages = _averages(problem, second, by, before.finetuning, weights, discretisation)
        log_s, gain, log_v = _unknowns(at_once, problem)
        start = np.array([log_s + math.log(_START_SPREAD), gain, _START_SHARE, log_v, 0.0])
        attempts = (
            solve(averages, start, tolerance=tolerance, relaxation=relaxation, thorough=thorough)
            for thorough in (False, True)
        )
        found = _with_jumps(averages, first_good(attempts, tolerance), OBSERVABLES, tolerance)
        return _result(problem, found, before, weights, discretisation)


def checked_second(
    problem: Problem, samples: float, selection: Selection | None, by: str
) -> Finetuning:
    """The second batch as a stage of its own, once it is allowed."""
    check_problem(problem)
    if problem.finetuning is None or problem.finetuning.sequences != "fresh":
        raise ProblemError(
            "a second round is not allowed for this problem: it must have a first one, finetuning, "
            'with sequences = "fresh"'
        )
    if by not in CHOSEN_BY:
        raise ProblemError(f'by = {by!r} is not allowed: it must be "current" or "frozen"')
    try:
        changed = problem.replace(
            {"finetuning.samples": samples, "finetuning.selection": selection}
        )
    except ProblemError as error:
        raise ProblemError(f"of the second round, {error}") from error
    assert changed.finetuning is not None
    return changed.finetuning


def _unknowns(found: FinetuningPrediction, problem: Problem) -> Float[np.ndarray, " 3"]:
    """(log s, m/q0, log v) of a branch, without temperatures."""
    units = Units.of(problem)
    assert problem.finetuning is not None
    signal = units.stage(problem.finetuning).signal
    q, v = units.student * found.q, units.student * found.v
    m = math.sqrt(units.student * units.teacher) * found.m
    return np.array([0.5 * math.log(q - m**2 / signal), m / signal, math.log(v)])


def _averages(
    problem: Problem,
    second: Finetuning,
    by: str,
    before: FinetuningPrediction,
    weights: FrozenWeights,
    discretisation: Discretisation,
) -> Averages:
    """The equations of the second round, on nodes that hold the first one at its root."""
    tokens, activation = problem.tokens, problem.activation
    assert problem.finetuning is not None
    stage = Units.of(problem).stage(problem.finetuning)
    nodes = FinetuningNodes(stage, weights, tokens, activation, discretisation)
    averages, tolerance = nodes.averages(lora.INFORMED), discretisation.tolerance
    root = refine(averages, _unknowns(before, problem), tolerance=tolerance)
    chunks = round_fields(
        averages, _with_jumps(averages, root, lora.OBSERVABLES, tolerance), nodes.task, second,
        weights, by_current=by == "current", tokens=tokens, discretisation=discretisation,
    )  # fmt: skip
    equations = SecondRoundEquations(nodes.task, linear=activation == "linear")
    return Averages(equations, chunks, discretisation.blocks)


def _jump_mass(root: Root, names: Sequence[str]) -> tuple[float, float]:
    """Share of the response that jumps of the proximal operator carry, and its error."""
    jumps, response = map(names.index, ("jumps", "response"))
    size = abs(root.observables[response])
    return float(root.observables[jumps] / size), float(root.quadrature_error[jumps] / size)


def _with_jumps(averages: Averages, root: Root, names: Sequence[str], tolerance: float) -> Root:
    jumps = root.status(*_jump_mass(root, names), tolerance) is Status.JUMPS
    return with_jumps(averages, root) if jumps else root


def _result(
    problem: Problem,
    root: Root,
    before: Prediction,
    weights: FrozenWeights,
    discretisation: Discretisation,
) -> SecondRound:
    units, tolerance = Units.of(problem), discretisation.tolerance
    assert problem.finetuning is not None
    assert before.finetuning is not None
    signal = units.stage(problem.finetuning).signal
    values = dict(zip(OBSERVABLES, root.observables.tolist(), strict=True))
    errors = dict(zip(OBSERVABLES, root.quadrature_error.tolist(), strict=True))
    columns = dict(zip(OBSERVABLES, root.block_observables.T, strict=True))
    test = BranchErrors(weights, signal, problem.tokens, problem.activation, discretisation)
    values["test_error"], errors["test_error"] = test.estimate(
        columns["q"], columns["m"], values["q"], values["m"]
    )
    values["frozen_test_error"], errors["frozen_test_error"] = test.frozen
    jumps = values["jump_mass"], errors["jump_mass"] = _jump_mass(root, OBSERVABLES)
    stability = Stability(values.pop("replicon"), errors.pop("replicon"), *jumps)
    status = root.status(*jumps, tolerance)
    if status.is_solved and not stability.is_stable:
        status = Status.UNSTABLE
    factors = dict.fromkeys(("q", "v", "p"), units.student)
    factors["m"] = math.sqrt(units.student * units.teacher)
    fields = {field.name for field in dataclasses.fields(SecondRound)}
    return SecondRound(
        status=worst([before.status, status]),
        residual=root.residual,
        quadrature_error={k: e / factors.get(k, 1.0) for k, e in errors.items() if k in fields},
        stability=stability,
        first=before,
        **{k: value / factors.get(k, 1.0) for k, value in values.items() if k in fields},
    )
