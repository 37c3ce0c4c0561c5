"""Approximate message passing at finite D, for the minimisers of both stages.

An iteration is one product with the data and one proximal operator per sequence.  Its fixed points
are stationary points of the training losses, and its order parameters follow the equations of the
theory step by step (docs/theory.md, section 6).  The data are those of
:func:`lora_theory.simulate`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from lora_theory.arguments import check_problem, checked_integer
from lora_theory.compilation import double_precision
from lora_theory.observables import Estimate
from lora_theory.problem import Problem, ProblemError
from lora_theory.simulation.api import PRETRAINED
from lora_theory.simulation.compression import compressed
from lora_theory.simulation.data import run_key
from lora_theory.simulation.fields import Symmetric, Weights, centred_fields
from lora_theory.simulation.finetuning import FinetuningData, finetuning_data, random_start
from lora_theory.simulation.measure import as_matrix
from lora_theory.simulation.minimise import Form, minimise, student
from lora_theory.simulation.passing import (
    FinetuningSystem,
    PretrainingSystem,
    Response,
    State,
    finetuning_growth,
    finetuning_step,
    pretraining_growth,
    pretraining_step,
)
from lora_theory.simulation.pretraining import PretrainingData, pretraining_data, pretraining_task
from lora_theory.simulation.sampled import check_sampled, sampled_minimum, teacher_alone
from lora_theory.simulation.sizes import Sizes
from lora_theory.theory.regularizers import NarrowFactor
from lora_theory.theory.units import Units
from lora_theory.theory.weights import Constants

__all__ = ["MessagePassing", "StagePassing", "message_passing"]

_STAGES, _STARTS = ("both", "pretraining", "finetuning"), ("informed", "random")
# V and v of the first iteration: small, so that few proximal operators have two minima
_FIRST_VARIANCE = 0.1
# the descent that freezes the weights where stage one is not done by message passing
_DESCENT_TOLERANCE, _DESCENT_STEPS = 1e-8, 20_000
# purpose of the key of the perturbations, beyond those of the data
_PURPOSE = 1000
# weights of this root mean square have vanished
_SMALLEST_SIZE = 1e-3
# random perturbations, and the iterations through which they run: few, for then the single
# directions that grow faster (those of the order parameters) do not show
_PROBES, _GROWTH_STEPS = 16, 5


@dataclass(frozen=True, kw_only=True)
class StagePassing:
    """Message passing in one stage (docs/theory.md, section 6).

    ``trace`` holds, per iteration, the order parameters that enter it and the conjugates that come
    of them, measured on the data: Q, M, V, Q_hat, M_hat, V_hat, or q, m, v, q_hat, m_hat, v_hat.
    """

    settled: bool  #: whether the last change is below the tolerance
    weights: Float[np.ndarray, "..."]  #: S, (D, D), or w, (D,), after the last iteration
    trace: dict[str, Float[np.ndarray, " iterations"]]
    change: Float[np.ndarray, " iterations"]  #: relative length of each step, before damping
    growth: Estimate  #: squared growth of random perturbations at the end, per undamped iteration
    replicon: float  #: the same for D → ∞, from the forces and the spectrum at the end

    @property
    def iterations(self) -> int:
        """How many were made."""
        return int(self.change.size)


@dataclass(frozen=True, kw_only=True)
class MessagePassing:
    """What :func:`message_passing` found; None for a stage that was not asked for."""

    problem: Problem
    dim: int
    seed: int
    index: int
    pretraining: StagePassing | None
    finetuning: StagePassing | None


def message_passing(
    problem: Problem,
    dim: int,
    *,
    seed: int = 0,
    index: int = 0,
    stage: str = "both",
    start: str = "informed",
    pretrained: str = "trained",
    iterations: int = 200,
    damping: float = 0.0,
    tolerance: float = 1e-9,
) -> MessagePassing:
    """Approximate message passing for the minimisers of both stages, on the data of ``simulate``.

    Pre-training: ω = z(S) − V g, g = (Prox_V(ω) − ω)/V, S = f(V̂S + (2/D)Σ g_ab Φ_ab)/V̂.  LoRA:
    ω = Xw/√D − v g, g = (prox(ω) − ω)/v, w = v(Λw + Xᵀg/√D).  The responses V, V̂, v, Λ are those of
    docs/theory.md, section 6.  Where the solution is stable (replicon below 1, no jumps) it settles
    at the minimum of the training loss; below interpolation this may take damping.  The proximal
    operators are global minima; in LoRA with softmax the search for them also starts at ±χ*.

    Args:
        problem: the question.
        dim: embedding dimension D.
        seed, index: the data are those of run ``index`` of ``simulate(problem, dim, seed=seed)``.
        stage: "pretraining"; "finetuning", the frozen weights by the descent of ``simulate``; or
            "both", the frozen weights by message passing.
        start: LoRA starts at w*, "informed", or at the first "random" start of ``simulate``.
        pretrained: "trained", or "sampled" as in ``simulate``, for ``stage`` "finetuning" on fresh
            sequences: the frozen weights cost no training.
        iterations: at most so many per stage.
        damping: share of the last iterate in the next, at least 0 and below 1.
        tolerance: settled is where an iteration moves the weights by less, relative to their size.

    Raises:
        ProblemError: an argument is not allowed, ``stage`` is "finetuning" for a problem without,
            ``pretrained`` is "sampled" for another stage, or as :func:`lora_theory.simulate`.

    Example:
        >>> from lora_theory import Pretraining
        >>> problem = Problem(
        ...     tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        ...     pretraining=Pretraining(samples=0.5, penalty=0.1),
        ... )
        >>> found = message_passing(problem, dim=16).pretraining
        >>> found.settled, found.growth.mean < 1
        (True, True)
    """
    check_problem(problem)
    seed, index = (
        checked_integer("seed", seed, 0, 2**32 - 1),
        checked_integer("index", index, 0, 2**32 - 1),
    )
    choices_of = {"stage": (stage, _STAGES), "start": (start, _STARTS)}
    choices_of["pretrained"] = pretrained, PRETRAINED
    for name, (value, allowed) in choices_of.items():
        if value not in allowed:
            choices = " or ".join(f'"{choice}"' for choice in allowed)
            raise ProblemError(f"{name} = {value!r} is not allowed: it must be {choices}")
    if stage == "finetuning" and problem.finetuning is None:
        raise ProblemError(
            'stage = "finetuning" is not allowed: the problem has no finetuning; give it '
            'finetuning fields, or take stage = "pretraining"'
        )
    sampled = pretrained == "sampled"
    if sampled and stage != "finetuning":
        raise ProblemError(
            f'stage = "{stage}" is not allowed with pretrained = "sampled", which trains no '
            'weights: it must be "finetuning"'
        )
    if sampled:
        check_sampled(problem)
    sizes = Sizes.of(problem, dim, trained=not sampled)
    limits = _Limits(
        checked_integer("iterations", iterations, 1),
        _checked_share("damping", damping, ">= 0 and < 1"),
        _checked_share("tolerance", tolerance, "> 0 and < 1"),
    )
    with double_precision():
        key = run_key(seed, index)
        pretraining = finetuning = None
        weights: Weights
        draw = teacher_alone if sampled else pretraining_data
        data = draw(key, problem, sizes, np.float64)
        if sampled:
            _, weights = sampled_minimum(key, problem, sizes, data)
        elif stage == "finetuning":
            weights = _descended(problem, data)
        else:
            pretraining = _pretrain(problem, sizes, data, limits, key)
            weights = Symmetric(jnp.asarray(pretraining.weights))
        if problem.finetuning is not None and stage != "pretraining":
            frozen = compressed(weights, problem, sizes)
            second = finetuning_data(key, problem, sizes, data, frozen)
            w = second.task_vector
            if start == "random":
                w = random_start(key, 0, w, problem.finetuning.signal)
            finetuning = _finetune(problem, second, w[:, 0], limits, key)
    return MessagePassing(
        problem=problem, dim=sizes.dim, seed=seed, index=index,
        pretraining=pretraining, finetuning=finetuning,
    )  # fmt: skip


def _checked_share(name: str, value: Any, allowed: str) -> float:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not (0 < value < 1 or (value == 0 and ">=" in allowed)):
        raise ProblemError(f"{name} = {value!r} is not allowed: it must be {allowed}")
    return float(value)


class _Limits(NamedTuple):
    iterations: int
    damping: float
    tolerance: float


def _descended(problem: Problem, data: PretrainingData) -> Weights:
    """The weights of the descent of ``simulate``, closer to the minimum."""
    form, limits = Form.of(problem.pretraining), (_DESCENT_TOLERANCE, _DESCENT_STEPS)
    kind: Any = {"activation": problem.activation, "form": form}
    return student(
        minimise(pretraining_task(data, problem), data.start, *limits, **kind).weights, form
    )


def _pretrain(
    problem: Problem, sizes: Sizes, data: PretrainingData, limits: _Limits, key: Key[Array, ""]
) -> StagePassing:
    dim, activation, units = sizes.dim, problem.activation, Units.of(problem)
    columns, regularizer = dim, Constants.of(problem).regularizer
    if Form.of(problem.pretraining).is_factor:
        columns = sizes.student_rank  # rounded, as is κ = P/D in the strength of the penalty
        rounded = problem.replace({"pretraining.rank": columns / dim})
        regularizer = Constants.of(rounded).regularizer
        if isinstance(regularizer, NarrowFactor):  # the cut to P columns is made below
            regularizer = regularizer.decay
    system = PretrainingSystem.of(
        data.sequences,
        units.teacher * data.teacher_fields,
        units.teacher * jnp.asarray(as_matrix(data.teacher)),
        units.teacher**2 * problem.label_noise,
        regularizer,
        columns,
        activation,
    )
    nothing = jnp.zeros_like(system.labels)

    def direction(key: Key[Array, ""]) -> Array:
        square = jax.random.normal(key, (dim, dim))
        return square + square.T

    square, both = units.student**2, units.student * units.teacher
    found = _iterated(
        lambda state: pretraining_step(system, state, activation),
        lambda S, g, response: pretraining_growth(system, S, g, response, activation),
        direction,
        _first(jnp.zeros((dim, dim)), nothing),
        {"Q": square, "M": both, "V": square},
        limits,
        key,
    )
    return dataclasses.replace(found, weights=found.weights / units.student)


def _finetune(
    problem: Problem,
    data: FinetuningData,
    start: Float[Array, " D"],
    limits: _Limits,
    key: Key[Array, ""],
) -> StagePassing:
    units, activation = Units.of(problem), problem.activation
    assert problem.finetuning is not None
    stage = units.stage(problem.finetuning)
    logits = data.teacher_fields + centred_fields(data.sequences, data.task_vector)
    system = FinetuningSystem(
        data.sequences,
        units.student * jnp.moveaxis(data.frozen_fields, 0, -1),
        units.teacher * jnp.moveaxis(logits, 0, -1),
        math.sqrt(units.teacher) * data.task_vector[:, 0],
        jnp.asarray(stage.signal, dtype=float),
        jnp.asarray(stage.penalty, dtype=float),
    )
    scale = math.sqrt(units.student)
    found = _iterated(
        lambda state: finetuning_step(system, state, activation),
        lambda w, g, response: finetuning_growth(system, w, g, response),
        lambda key: jax.random.normal(key, start.shape),
        _first(scale * start, jnp.zeros(data.sequences.shape[1::-1])),
        {"q": scale**2, "m": scale * math.sqrt(units.teacher), "v": scale**2},
        limits,
        key,
    )
    return dataclasses.replace(found, weights=found.weights / scale)


def _first(weights: Array, nothing: Array) -> State:
    return State(weights, nothing, jnp.asarray(_FIRST_VARIANCE, dtype=float), nothing)


def _iterated(
    step: Callable[[State], tuple[State, Array, Response]],
    grow: Callable[[Array, Array, Response], tuple[Array, Array]],
    direction: Callable[[Key[Array, ""]], Array],
    state: State,
    factors: Mapping[str, float],
    limits: _Limits,
    key: Key[Array, ""],
) -> StagePassing:
    """Iterations until one moves the weights by less than the tolerance; perturbations there.

    The order parameters are divided by ``factors``, their conjugates multiplied.
    """

    def damped(old: Array, new: Array) -> Array:
        return limits.damping * old + (1 - limits.damping) * new

    rows, changes = [], []
    while True:
        new, row, response = step(state)
        smallest = _SMALLEST_SIZE * math.sqrt(len(new.weights))
        size = max(float(jnp.linalg.norm(new.weights)), smallest)
        rows.append(row)
        changes.append(float(jnp.linalg.norm(new.weights - state.weights)) / size)
        settled = changes[-1] < limits.tolerance
        state = jax.tree.map(damped, state, new)._replace(minimum=new.minimum)
        if settled or len(rows) == limits.iterations or not math.isfinite(changes[-1]):
            break
    growths = []
    for probe in jax.random.split(jax.random.fold_in(key, _PURPOSE), _PROBES):
        weights, force = direction(probe), jnp.zeros_like(state.force)
        before = float(jnp.linalg.norm(weights))
        for _ in range(_GROWTH_STEPS):
            weights, force = grow(weights, force, response)
        growths.append((float(jnp.linalg.norm(weights)) / before) ** (2 / _GROWTH_STEPS))
    names = [*factors, *(f"{name}_hat" for name in factors)]
    scales = [*factors.values(), *(1 / factor for factor in factors.values())]
    return StagePassing(
        settled=settled,
        weights=np.asarray(state.weights),
        trace=dict(zip(names, (np.array(rows) / scales).T, strict=True)),
        change=np.array(changes),
        growth=Estimate.of(growths),
        replicon=float(response.replicon),
    )
