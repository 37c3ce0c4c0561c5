"""Where the branches of LoRA begin, are stable, exchange and merge, in the number of samples α'."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq

from lora_theory.problem import Problem
from lora_theory.theory.informed import (
    RANGE,
    Branches,
    InformedCurve,
    InformedPoint,
    follow_informed,
    informed_between,
    informed_start,
)
from lora_theory.theory.nodes import Discretisation

__all__ = ["NAMES", "Coexistence", "Threshold", "coexistence"]

#: What is looked for, all values of finetuning.samples.
NAMES = ("informed_appears", "informed_stable", "informed_minimises", "uninformed_unstable")

_STEP = 1.25
_SECANTS = 6
#: Errors by which a difference is one, and the height in log α' of a parabola at a fold.
_CLEARLY, _NEAR_FOLD = 3, 0.05
#: Distance in log α' of the weakest points from where (3.5) = 1, for α' is even in o, and their o.
_NEARLY = 0.2
_WEAK = 0.35


class Threshold(NamedTuple):
    """A value of α' with its standard error, or None and the reason."""

    value: float | None
    error: float | None = None
    reason: str = ""


#: Thresholds by name.
Coexistence = dict[str, Threshold]


def coexistence(problem: Problem, discretisation: Discretisation) -> Coexistence:
    """The thresholds of :data:`NAMES` on one set of nodes.  Call it in the 64-bit scope."""
    branches = Branches(problem, discretisation)
    unstable = _instability(branches)
    start = informed_start(branches)
    if isinstance(start, str):
        missing = dict.fromkeys(NAMES[:3], Threshold(None, reason=start))
        return {**missing, "uninformed_unstable": unstable}
    curve = follow_informed(branches, *start)
    appears = _appears(curve, unstable)
    return {
        "informed_appears": appears,
        "informed_stable": _stable(branches, curve),
        "informed_minimises": _exchange(branches, curve, appears),
        "uninformed_unstable": unstable,
    }


def _instability(branches: Branches) -> Threshold:
    """α' where the growth of a small m crosses 1, nearest to the first value."""

    def growth(log: float) -> float:
        return branches.growth(math.exp(log))[0]

    first = branches.stage.samples
    at_first = growth(math.log(first))
    samples, step = first, _STEP if at_first < 0 else 1 / _STEP
    while first / RANGE < samples * step < first * RANGE:
        last, samples = samples, samples * step
        here = growth(math.log(samples))
        if math.isnan(at_first + here):
            missing = f"no solution with m = 0 was found at α' = {samples:g}: raise nodes"
            return Threshold(None, reason=missing)
        if here * at_first <= 0:
            low, high = sorted((math.log(last), math.log(samples)))
            slope = (growth(high) - growth(low)) / (high - low)
            log = float(brentq(growth, low, high, xtol=1e-4))
            value = math.exp(log)
            return Threshold(value, value * branches.growth(value)[1] / abs(slope))
    low, high = sorted((first, samples))
    state = "stable" if at_first < 0 else "unstable"
    return Threshold(None, reason=f"m = 0 is {state} for all α' from {low:.3g} to {high:.3g}")


def _appears(curve: InformedCurve, unstable: Threshold) -> Threshold:
    """α' at the fold of least α', or where the branch merges with m = 0."""
    points = curve.points
    if not points:
        return Threshold(None, reason="the informed branch could not be followed: raise nodes")
    lowest = min(range(len(points)), key=lambda place: points[place].samples)
    value, error = _least(points, lowest)
    margin = math.inf
    if unstable.value is not None and unstable.error is not None:
        margin = math.log(unstable.value / value)
        margin /= math.hypot(unstable.error / unstable.value, error / value)
    if points[-1].samples > value * math.exp(_CLEARLY * error / value) and margin > _CLEARLY:
        return Threshold(value, error)
    end = points[-1]
    at_end = f"α' = {end.samples:.3g} (overlap {end.overlap:.2f})"
    if curve.lost and end.overlap > _WEAK:
        return Threshold(
            None,
            reason=f"the informed branch could not be followed below {at_end}, as residuals stay "
            "above their quadrature error: raise nodes",
        )
    if unstable.value is None:
        return Threshold(
            None, reason=f"the informed branch still weakens at {at_end}, and {unstable.reason}"
        )
    weak = [point.samples for point in points if point.overlap < _WEAK] or [end.samples]
    rest = abs(math.log(float(np.median(weak)) / unstable.value))
    if rest > max(_NEARLY, _CLEARLY * end.error):
        return Threshold(
            None,
            reason=f"the informed branch weakens down to {at_end}, away from α' = "
            f"{unstable.value:.3g} where m = 0 turns unstable: raise nodes",
        )
    if not curve.lost:
        return unstable
    return Threshold(unstable.value, max(unstable.error or 0.0, rest * unstable.value))


def _least(points: list[InformedPoint], lowest: int) -> tuple[float, float]:
    """The least α' near a point, by a parabola in artanh o, and its error."""
    logs = np.log([point.samples for point in points])
    near = logs - logs[lowest] < _NEAR_FOLD
    first = lowest - int(np.argmin(np.append(near[lowest::-1], False))) + 1
    last = lowest + int(np.argmin(np.append(near[lowest:], False)))
    places = np.arctanh([point.overlap for point in points[first:last]])
    error = points[lowest].error
    if len(places) > 3:
        curve = np.polyfit(places, logs[first:last], 2)
        if curve[0] > 0 and places[-1] < -curve[1] / (2 * curve[0]) < places[0]:
            value = math.exp(np.polyval(curve, -curve[1] / (2 * curve[0])))
            return value, value * error
    return points[lowest].samples, points[lowest].samples * error


def _stable(branches: Branches, curve: InformedCurve) -> Threshold:
    """α' down to which the informed branch is stable against replica symmetry breaking."""
    last: InformedPoint | None = None
    for point in curve.points:
        stability = branches.stability(point)
        if not stability.is_stable:
            why = (
                f"replicon {stability.replicon:.2g}, jumps carry {abs(stability.jump_mass):.0%} of "
                "the response"
            )
            if last is None:
                return Threshold(
                    None, reason=f"the informed branch is unstable at α' = {point.samples:.3g} "
                    f"({why}): raise finetuning.samples or finetuning.penalty",
                )  # fmt: skip
            value = math.sqrt(last.samples * point.samples)
            return Threshold(value, abs(last.samples - point.samples) / 2)
        last = point
    if last is None:
        return Threshold(None, reason="the informed branch could not be followed: raise nodes")
    return Threshold(
        None, reason=f"the informed branch is stable as far as it was followed, down to α' = "
        f"{last.samples:.3g}",
    )  # fmt: skip


def _exchange(branches: Branches, curve: InformedCurve, appears: Threshold) -> Threshold:
    """α' where the potentials of both branches are equal, on the curve down to its least α'."""
    lowest = min((point.samples for point in curve.points), default=math.nan)
    upper = list(itertools.takewhile(lambda point: point.samples > lowest, curve.points))
    wins: tuple[InformedPoint, float] | None = None
    for point in upper:
        gain, error = branches.advantage(point)
        if gain < -_CLEARLY * error:
            if wins is not None:
                return _balance(branches, wins, (point, gain), error)
            return Threshold(
                None, reason="the informed branch has the larger potential at all α' tried, up to "
                f"{point.samples:.3g}: raise finetuning.samples",
            )  # fmt: skip
        if gain > 0:
            wins = point, gain
    return appears


def _balance(
    branches: Branches,
    wins: tuple[InformedPoint, float],
    loses: tuple[InformedPoint, float],
    error: float,
) -> Threshold:
    """Where a gain vanishes between two points, by secants until it is below its error."""
    for _ in range(_SECANTS):
        log, slope = _secant(wins, loses)
        point = informed_between(branches, wins[0], loses[0], math.exp(log))
        if point is None:
            break
        gain, error = branches.advantage(point)
        wins, loses = ((point, gain), loses) if gain > 0 else (wins, (point, gain))
        if abs(gain) < error / 4:
            break
    log, slope = _secant(wins, loses)
    return Threshold(math.exp(log), math.exp(log) * abs(error / slope))


def _secant(
    first: tuple[InformedPoint, float], second: tuple[InformedPoint, float]
) -> tuple[float, float]:
    """The zero in log α' of the line through two gains, and its slope."""
    logs = [math.log(point.samples) for point, _ in (first, second)]
    slope = (second[1] - first[1]) / (logs[1] - logs[0])
    return logs[0] - first[1] / slope, slope
