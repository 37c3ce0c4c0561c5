"""Thresholds of a problem: interpolation, and where the branches of LoRA begin, win and end."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.optimize import brentq

from lora_theory.observables import to_plain
from lora_theory.problem import Finetuning, Problem
from lora_theory.theory import finetuning as lora
from lora_theory.theory.averages import Averages
from lora_theory.theory.branches import FinetuningNodes, signal_growth
from lora_theory.theory.compilation import quickly_compiled
from lora_theory.theory.continuation import Curve, Point, follow
from lora_theory.theory.fields import field_count
from lora_theory.theory.nodes import Discretisation
from lora_theory.theory.predict import check_tokens, frozen_weights, solve_pretraining
from lora_theory.theory.pretraining import Constants
from lora_theory.theory.regularizers import Frobenius, NarrowFactor, NuclearNorm, WeightDecay
from lora_theory.theory.roots import Root, refine, solve, standard_error
from lora_theory.theory.units import Units

__all__ = ["Thresholds", "thresholds"]

#: Numbers of samples α' among which thresholds of LoRA are looked for, over the first one tried.
_RANGE, _STEP = 64.0, 1.25
#: Overlaps below which an informed branch is taken to have merged with the uninformed one.
_MERGED = 0.1
#: log α' between the end of a curve that could not be followed further and an instability.
_NEARLY = 0.15
#: Errors by which a difference of potentials is one.
_CLEARLY = 3
_SMALLEST_DELTA, _LARGEST_DELTA = 1e-3, 1e3
_START_S, _START_V = 0.5, 0.05


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Where the solution of a problem changes its nature; None where there is no such value.

    ``interpolation`` is a value of pretraining.samples, the last three of finetuning.samples, all
    other fields held.  ``errors`` has the same keys: half the difference between two independent
    sets of nodes, or the tolerance of a value without nodes.
    """

    problem: Problem
    interpolation: float | None  #: α below which the training error vanishes with the penalty
    ridgeless_Q: float | None  #: Q for λ → 0⁺, if pretraining.samples is below ``interpolation``
    ridgeless_M: float | None  #: M there
    informed_appears: float | None  #: α' from which the informed branch exists
    informed_minimises: float | None  #: α' from which its potential is the lower one
    uninformed_unstable: float | None  #: α' from which m = 0 is unstable to a small m
    errors: dict[str, float | None]

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values."""
        entries = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        plain: dict[str, Any] = to_plain(entries)
        return plain


def thresholds(
    problem: Problem, *, nodes: int | None = None, blocks: int = 8, seed: int = 0
) -> Thresholds:
    """Interpolation threshold, ridgeless limit, and the thresholds in α' of the branches of LoRA.

    Interpolation: α = ∂_δJ/(2δc_T) at ε = 0 with Q0 + Δ/2 = J − (δ/2)∂_δJ; below it Q and M for
    λ → 0⁺ (docs/theory.md, section 2.5).  LoRA: the informed branch is followed down in α' to its
    fold or until it merges; (α'v/q)E ωᵀ(χ*χ*ᵀ/q0 − I)G = 1 where m = 0 loses its stability
    (docs/theory.md, section 3).

    Args:
        problem: without finetuning the last three are None.
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
    """
    check_tokens(problem.tokens)
    several = [
        Discretisation.checked(nodes, blocks, one, 1e-10) for one in (seed, seed + _OTHER_SEED)
    ]
    with jax.enable_x64(True):
        found: dict[str, float | None] = {"interpolation": None}
        found |= dict.fromkeys(("ridgeless_Q", "ridgeless_M"))
        found |= _interpolation(problem)
        errors = {name: None if value is None else 1e-9 for name, value in found.items()}
        pairs = [_finetuning(problem, one) for one in several] if problem.finetuning else [{}, {}]
    for name in ("informed_appears", "informed_minimises", "uninformed_unstable"):
        both = [pair.get(name) for pair in pairs]
        seen = [value for value in both if value is not None]
        found[name] = float(np.mean(seen)) if len(seen) == 2 else None
        errors[name] = abs(seen[0] - seen[1]) / 2 if len(seen) == 2 else None
    return Thresholds(problem=problem, errors=errors, **found)


_OTHER_SEED = 7919


# -- pre-training ------------------------------------------------------------------------------


def _interpolation(problem: Problem) -> dict[str, float | None]:
    visible = 2 * field_count(problem.tokens, problem.activation)  # c_T
    constants, share = Constants.of(problem), problem.pretraining.samples * visible
    label_variance = float(constants.law.moments()[1]) + problem.label_noise / 2
    limit = _threshold(constants, label_variance)
    if limit is None:
        return {}
    found: dict[str, float | None] = {"interpolation": limit / visible}
    solution = _ridgeless(constants, share, label_variance) if share < limit else None
    if solution is not None:
        units = Units.of(problem)
        scale = units.teacher / units.student
        found |= {"ridgeless_Q": scale**2 * solution[0], "ridgeless_M": scale * solution[1]}
    return found


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


# -- LoRA --------------------------------------------------------------------------------------


class _Branches:
    """The branches of LoRA at any number of samples, on one set of nodes."""

    def __init__(self, problem: Problem, discretisation: Discretisation) -> None:
        alone = problem.replace(finetuning=None)
        assert problem.finetuning is not None
        root = solve_pretraining(alone, discretisation)
        self.stage: Finetuning = Units.of(problem).stage(problem.finetuning)
        self._nodes = FinetuningNodes(
            self.stage, frozen_weights(problem, root), problem.tokens, problem.activation,
            discretisation,
        )  # fmt: skip
        self._tolerance = discretisation.tolerance
        self._uninformed: dict[float, Root] = {}

    def family(self, samples: float, like: Averages | None) -> Averages:
        """The equations of the informed branch."""
        averages = self.averages(samples, lora.INFORMED)
        return averages if like is None else averages.like(like)

    def averages(self, samples: float, held: tuple[bool, bool]) -> Averages:
        """The equations of a branch."""
        return self._nodes.under(dataclasses.replace(self.stage, samples=samples)).averages(held)

    def informed(self, samples: float) -> Root:
        """The informed root, wherever it leads: its overlap may be 0."""
        return self._solved(self.averages(samples, lora.INFORMED), 0.1, 0.9)

    def uninformed(self, samples: float) -> Root:
        """The root with m = 0, or with w = 0."""
        if samples not in self._uninformed:
            root = self._solved(self.averages(samples, lora.UNINFORMED), _START_S, 0.0)
            if root.unknowns[0] < math.log(1e-3 * math.sqrt(self.stage.signal)):
                averages = self.averages(samples, lora.ZERO)
                start = np.array([lora.ZERO_SPREAD, 0.0, root.unknowns[2]])
                root = refine(averages, start, tolerance=self._tolerance)
            self._uninformed[samples] = root
        return self._uninformed[samples]

    def _solved(self, averages: Averages, s: float, m: float) -> Root:
        start = [math.log(s * math.sqrt(self.stage.signal)), m, math.log(_START_V)]
        return solve(
            averages, np.array(start), tolerance=self._tolerance,
            coarse=self._nodes.coarse, relaxation=lora.relaxation, thorough=False,
        )  # fmt: skip

    def growth(self, samples: float) -> float:
        """That of a small m at the root with m = 0, less 1."""
        averages = self.averages(samples, lora.UNINFORMED)
        return signal_growth(averages, self.uninformed(samples).unknowns) - 1

    def advantage(self, point: Point) -> tuple[float, float]:
        """φ of the uninformed branch less that of an informed root, and its standard error.

        The potentials are stationary: those of the blocks are taken at the roots of the mean.
        """
        column = lora.OBSERVABLES.index("potential")
        averages = self.averages(point.field, lora.UNINFORMED)
        rows = averages.at(self.uninformed(point.field).unknowns, search=True).observables
        gain = rows[:, column] - point.observables[:, column]
        return float(gain.mean()), float(standard_error(gain))


def _finetuning(problem: Problem, discretisation: Discretisation) -> dict[str, float | None]:
    branches = _Branches(problem, discretisation)
    overlap = lora.OBSERVABLES.index("overlap")
    first = branches.stage.samples

    def merged(point: Point) -> bool:
        return float(point.observables[:, overlap].mean()) < _MERGED

    found: dict[str, float | None] = {"uninformed_unstable": _instability(branches, first)}
    samples = first
    while True:
        root = branches.informed(samples)
        if root.is_good(1e-6) and root.observables[overlap] > 2 * _MERGED:
            break
        samples *= 2
        if samples > _RANGE * first:
            return found
    curve = follow(
        branches.family, samples, root.unknowns,
        towards=samples / 2, within=(samples / _RANGE**2, samples * 1.01),
        tolerance=1e-8, stop=merged,
    )  # fmt: skip
    folds, unstable = curve.folds(), found["uninformed_unstable"]
    if folds:
        found["informed_appears"] = folds[0]
    elif unstable is not None and abs(math.log(curve.points[-1].field / unstable)) < _NEARLY:
        found["informed_appears"] = unstable  # continuously: m vanishes where m = 0 turns unstable
    found["informed_minimises"] = _exchange(branches, curve, found.get("informed_appears"))
    return found


def _instability(branches: _Branches, first: float) -> float | None:
    """α' where the growth of a small m crosses 1, nearest to the first value."""
    at_first = branches.growth(first)
    samples, step = first, _STEP if at_first < 0 else 1 / _STEP
    while first / _RANGE < samples < first * _RANGE:
        last, samples = samples, samples * step
        if branches.growth(samples) * at_first <= 0:
            low, high = sorted((last, samples))
            root = brentq(
                lambda log: branches.growth(math.exp(log)),
                math.log(low), math.log(high), xtol=1e-4,
            )  # fmt: skip
            return math.exp(root)
    return None


def _exchange(branches: _Branches, curve: Curve, appears: float | None) -> float | None:
    """α' where the potentials of both branches are equal, on the curve down to its fold."""
    last: tuple[float, float] | None = None
    for point in curve.points:
        (gain, error), log = branches.advantage(point), math.log(point.field)
        if gain < -_CLEARLY * error:
            if last is None:
                return None  # it loses already where the curve begins
            share = last[1] / (last[1] - gain)
            return math.exp(last[0] + share * (log - last[0]))
        if gain > 0:
            last = log, gain
        if point.direction > 0:
            break
    return appears
