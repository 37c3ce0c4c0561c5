"""Thresholds of a problem: interpolation, the branches of LoRA, and what descent finds of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.optimize import brentq

from lora_theory.compilation import double_precision, quickly_compiled
from lora_theory.observables import plain_fields
from lora_theory.problem import Problem, ProblemError
from lora_theory.theory.coexistence import NAMES, Coexistence, coexistence
from lora_theory.theory.fields import field_count
from lora_theory.theory.nodes import Discretisation
from lora_theory.theory.predict import check_predictable
from lora_theory.theory.regularizers import Frobenius, NarrowFactor, NuclearNorm, WeightDecay
from lora_theory.theory.roots import standard_error
from lora_theory.theory.separable import Numerical
from lora_theory.theory.units import Units
from lora_theory.theory.weights import Constants

__all__ = ["Thresholds", "thresholds"]

_SMALLEST_DELTA, _LARGEST_DELTA = 1e-3, 1e3
#: Of a value without nodes.
_TOLERANCE = 1e-9
_PRETRAINING = ("interpolation", "ridgeless_Q", "ridgeless_M")
_NO_FINETUNING = "there is no fine-tuning: give finetuning.samples and finetuning.penalty"
_A_POOL = (
    "finetuning.selection: thresholds move finetuning.samples, and with it the share that is kept "
    "of a pool; leave it out"
)
_OTHER_SEED = 7919


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Where the solution of a problem changes its nature; None where there is no such value.

    ``interpolation`` is a value of pretraining.samples, those after ``ridgeless_M`` are of
    finetuning.samples, all other fields held.  ``errors`` has the same keys: the spread of two
    independent sets of nodes or their own quadrature error, whichever is larger; the tolerance of a
    value without nodes; the standard error of a fit to simulated runs.  ``reasons`` says of every
    value that is None which condition fails, and what to change.
    """

    problem: Problem
    interpolation: float | None  #: α below which the training error vanishes with the penalty
    ridgeless_Q: float | None  #: Q for λ → 0⁺, if pretraining.samples is below ``interpolation``
    ridgeless_M: float | None  #: M there
    informed_appears: float | None  #: α' from which the informed branch exists
    informed_stable: float | None  #: α' from which it is stable, as in ``prediction.stability``
    informed_minimises: float | None  #: α' from which its potential is the lower one
    uninformed_unstable: float | None  #: α' from which m = 0 is unstable to a small m
    random_start: float | None  #: α' from which half of the descents find the informed minimum
    errors: dict[str, float | None]
    reasons: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values."""
        return plain_fields(self)


class _Found(NamedTuple):
    """Values with their errors, and the reasons of those that are None."""

    values: dict[str, tuple[float, float]]
    reasons: dict[str, str]


def thresholds(
    problem: Problem,
    *,
    dim: int | None = None,
    seeds: int | None = None,
    nodes: int | None = None,
    blocks: int = 8,
    seed: int = 0,
) -> Thresholds:
    """Interpolation threshold, ridgeless limit, and the thresholds in α' of the branches of LoRA.

    Interpolation: α = ∂_δJ/(2δc_T) at ε = 0 with Q0 + Δ/2 = J − (δ/2)∂_δJ; below it Q and M for
    λ → 0⁺ (docs/theory.md, section 2.5).  LoRA: the informed branch is followed from strong to weak
    overlap, to its fold or until it merges; (α'v/q)E ωᵀ(χ*χ*ᵀ/q0 − I)G = 1 where m = 0 loses its
    stability (docs/theory.md, sections 3.3 and 5).  Below ``informed_stable`` replica symmetry is
    broken, and the branch an approximation.

    Args:
        problem: without finetuning its thresholds are None.
        dim, seeds: embedding dimension and runs per α' of
            :func:`lora_theory.random_start_threshold`, which measures ``random_start``; without
            both it is None.
        nodes, blocks, seed: as in :func:`lora_theory.predict`.

    Raises:
        ProblemError: a setting is not allowed.

    Example:
        >>> from lora_theory import Pretraining, Problem, thresholds
        >>> found = thresholds(Problem(
        ...     tokens=2, activation="softmax", teacher_rank=0.5, label_noise=0.5,
        ...     pretraining=Pretraining(samples=0.1, penalty=0.01),
        ... ))
        >>> round(found.interpolation, 5), round(found.ridgeless_Q, 3), found.informed_appears
        (0.15348, 1.465, None)
        >>> found.reasons["informed_appears"]
        'there is no fine-tuning: give finetuning.samples and finetuning.penalty'
    """
    check_predictable(problem)
    if (dim is None) != (seeds is None):
        given, missing = ("dim", "seeds") if seeds is None else ("seeds", "dim")
        raise ProblemError(
            f"{missing} = None is not allowed with {given} = {dim or seeds!r}: give both or neither"
        )
    several = [
        Discretisation.checked(nodes, blocks, one, 1e-10) for one in (seed, seed + _OTHER_SEED)
    ]
    parts = [_random_start(problem, dim, seeds, seed)]  # first: it refuses its own arguments
    with double_precision():
        parts += [_interpolation(problem), _finetuning(problem, several)]
    values = {name: both for part in parts for name, both in part.values.items()}
    reasons = {name: reason for part in parts for name, reason in part.reasons.items()}
    names = [*_PRETRAINING, *NAMES, "random_start"]
    found = {name: values[name][0] if name in values else None for name in names}
    errors = {name: values[name][1] if name in values else None for name in names}
    return Thresholds(problem=problem, errors=errors, reasons=reasons, **found)


def _finetuning(problem: Problem, several: Sequence[Discretisation]) -> _Found:
    """The mean of independent sets of nodes; a reason where one of them finds no value."""
    if problem.finetuning is None:
        return _Found({}, dict.fromkeys(NAMES, _NO_FINETUNING))
    if problem.finetuning.chosen:
        return _Found({}, dict.fromkeys(NAMES, _A_POOL))
    sets: list[Coexistence] = [coexistence(problem, one) for one in several]
    found = _Found({}, {})
    for name in NAMES:
        parts = [one[name] for one in sets]
        known = [(p.value, p.error or 0.0) for p in parts if p.value is not None]
        if len(known) == len(parts):
            values, errors = np.array(known).T
            own = math.hypot(*errors) / len(parts)
            found.values[name] = float(values.mean()), max(float(standard_error(values)), own)
        else:
            found.reasons[name] = next(part.reason for part in parts if part.value is None)
    return found


def _random_start(problem: Problem, dim: int | None, seeds: int | None, seed: int) -> _Found:
    if problem.finetuning is None:
        return _Found({}, {"random_start": _NO_FINETUNING})
    if dim is None or seeds is None:
        return _Found({}, {"random_start": "give dim and seeds to measure it"})
    # the simulation imports the theory
    from lora_theory.simulation.random_start import random_start_threshold

    measured = random_start_threshold(problem, dim=dim, seeds=seeds, seed=seed)
    if measured.value is None or measured.error is None:
        return _Found({}, {"random_start": measured.reason})
    return _Found({"random_start": (measured.value, measured.error)}, {})


# -- pre-training ------------------------------------------------------------------------------


def _interpolation(problem: Problem) -> _Found:
    visible = 2 * field_count(problem.tokens, problem.activation)  # c_T
    constants, share = Constants.of(problem), problem.pretraining.samples * visible
    if isinstance(constants.regularizer, Numerical):
        why = (
            f'pretraining.regularizer = "{problem.pretraining.regularizer}": its limit λ → 0⁺ is '
            "not known; change it to weight_decay, frobenius or nuclear_norm"
        )
        return _Found({}, dict.fromkeys(_PRETRAINING, why))
    label_variance = float(constants.law.moments()[1]) + problem.label_noise / 2
    exact = problem.label_noise == 0 and _is_within_reach(constants)
    limit = math.inf if exact else _threshold(constants, label_variance)
    if limit is None:
        why = (
            f"no pretraining.samples was found to which pretraining.rank = "
            f"{problem.pretraining.rank:g} can fit the data: raise it"
        )
        return _Found({}, dict.fromkeys(_PRETRAINING, why))
    values, reasons = {"interpolation": (limit / visible, _TOLERANCE)}, dict[str, str]()
    if exact:
        values, reasons["interpolation"] = {}, (
            "label_noise = 0: the training error vanishes with the penalty at all "
            "pretraining.samples, for the student can equal its teacher; give label_noise > 0"
        )  # fmt: skip
    solution = _ridgeless(constants, share, label_variance) if share < limit else None
    if solution is None:
        why = "the equations of the limit λ → 0⁺ were not solved: change pretraining.samples"
        if share >= limit:
            why = (
                f"pretraining.samples = {problem.pretraining.samples:g} is not below the "
                f"interpolation threshold {limit / visible:.4g}: lower it"
            )
        elif exact:
            why = "label_noise = 0, and samples enough for λ → 0⁺ to recover the teacher itself"
        return _Found(values, reasons | dict.fromkeys(_PRETRAINING[1:], why))
    units = Units.of(problem)
    scale = units.teacher / units.student
    values["ridgeless_Q"] = scale**2 * solution[0], _TOLERANCE
    values["ridgeless_M"] = scale * solution[1], _TOLERANCE
    return _Found(values, reasons)


def _is_within_reach(constants: Constants) -> bool:
    """Whether the form of the student, penalty apart, allows S = S0."""
    if isinstance(constants.regularizer, Frobenius | NuclearNorm):
        return True
    Q0 = float(constants.law.moments()[1])
    return _moments(_SMALLEST_DELTA, 0.0, constants)[0] > (1 - 10 * _SMALLEST_DELTA**2) * Q0


def _threshold(constants: Constants, label_variance: float) -> float | None:
    """αc_T = ∂_δJ/2δ at ε = 0, with Q0 + Δ/2 = J − (δ/2)∂_δJ."""
    if isinstance(constants.regularizer, Frobenius | NuclearNorm):
        return 1.0  # δ̄ = ∞

    def gap(log: float) -> float:
        J, by_delta, _ = _moments(math.exp(log), 0.0, constants)
        return J - math.exp(log) / 2 * by_delta - label_variance

    log = _crossing(gap, math.log(_SMALLEST_DELTA), math.log(_LARGEST_DELTA))
    if log is not None:
        return _moments(math.exp(log), 0.0, constants)[1] / (2 * math.exp(log))
    # a teacher without mean, δ̄ = ∞: S ⪰ 0 leaves half of the directions
    return 0.5 if isinstance(constants.regularizer, WeightDecay) else None


def _ridgeless(
    constants: Constants, share: float, label_variance: float
) -> tuple[float, float] | None:
    """Q and M for λ → 0⁺ from ∂_δJ/2δ = αc_T and δ²αc_T = Q0 + Δ/2 − 2M + Q."""
    if isinstance(constants.regularizer, Frobenius):
        Q0 = float(constants.law.moments()[1])
        return share * (label_variance - share * Q0) / (1 - share), share * Q0

    def at(log_delta: float) -> tuple[float, float, float] | None:
        delta = math.exp(log_delta)

        def response(epsilon: float) -> float:
            return _moments(delta, epsilon, constants)[1] / (2 * delta) - share

        epsilon = _crossing(response, -50.0 - 4 * delta, 50.0 + 4 * delta)
        if epsilon is None:
            return None
        J, by_delta, by_epsilon = _moments(delta, epsilon, constants)
        M = J - delta / 2 * by_delta - epsilon / 2 * by_epsilon
        return J, M, delta**2 * share - (label_variance - 2 * M + J)

    def residual(log_delta: float) -> float:
        found = at(log_delta)
        return math.nan if found is None else found[2]

    logs = np.linspace(math.log(_SMALLEST_DELTA), math.log(_LARGEST_DELTA), 40)
    for low, high in itertools.pairwise(logs):
        if (log := _crossing(residual, low, high)) is not None:
            found = at(log)
            return None if found is None else found[:2]
    return None


def _moments(delta: float, epsilon: float, constants: Constants) -> tuple[float, float, float]:
    """J and its derivatives in δ and ε for the spectral function of the problem's penalty."""
    kind = constants.regularizer
    rank = kind.rank if isinstance(kind, NarrowFactor) else None
    form = "nuclear" if isinstance(kind, NuclearNorm) else "decay"
    values = _moment_slopes(jnp.asarray(delta), jnp.asarray(epsilon), constants.law, rank, form)
    J, by_delta, by_epsilon = (float(value) for value in values)
    return J, by_delta, by_epsilon


@quickly_compiled("form")
def _moment_slopes(delta: Array, epsilon: Array, law: Any, rank: Any, form: str) -> Any:
    def J(delta: Array, epsilon: Array) -> Array:
        decay = WeightDecay(epsilon / 2)
        kind: Any = NuclearNorm(epsilon / 2) if form == "nuclear" else decay
        if rank is not None:
            kind = NarrowFactor(decay, rank)
        one = jnp.ones_like(delta)
        fourfold: Array = 4 * kind.potential(delta**2, one, one, law)
        return fourfold

    value, slopes = jax.value_and_grad(J, argnums=(0, 1))(delta, epsilon)
    return value, *slopes


def _crossing(function: Callable[[float], float], low: float, high: float) -> float | None:
    """A root between the ends; None where the function has one sign."""
    ends = function(low), function(high)
    if not all(map(math.isfinite, ends)) or ends[0] * ends[1] > 0:
        return None
    return float(brentq(function, low, high, xtol=1e-13, rtol=1e-13))
