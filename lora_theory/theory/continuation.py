"""Branches followed along a field of the problem, around folds (pseudo-arclength continuation).

A branch is a curve of roots F(x, p) = 0 in the unknowns x and p = log of a field.  Each step goes
along the tangent and comes back at right angles to it, so that a fold, where ∂F/∂x is singular and
the branch turns back in p, is no obstacle (Keller 1977; docs/theory.md, section 5).  Slopes are
differences wide enough to average over the jumps of many nodes, which derivatives do not see.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lora_theory.theory.averages import Averages, BlockValues
from lora_theory.theory.roots import standard_error

__all__ = ["Curve", "Point", "follow"]

_FIRST, _LONGEST, _SHORTEST = 0.05, 0.15, 1e-4
_CORRECTIONS, _EASY = 8, 4
#: Half the width of the differences.
_DIFFERENCE = 0.02
#: Part of its own quadrature error below which a residual is what single nodes on a jump leave.
_JUMPS = 0.2
#: A turn of the field by less, in its logarithm, may be noise.
_TURNED = 0.01
#: Distance to the first leg, over that to the turn, below which a curve has only turned round.
_TURNED_ROUND = 0.7
#: A correction further away than this part of the step has met another branch.
_ASTRAY = 0.5


class Point(NamedTuple):
    """A root on the curve."""

    field: float
    unknowns: Float[np.ndarray, " n"]
    residual: float
    observables: Float[np.ndarray, "R K"]  # by block of nodes
    direction: float  # dp per unit of arclength: its sign changes at a fold


class Curve(NamedTuple):
    """The roots in their order, and why the curve ends."""

    points: tuple[Point, ...]
    end: str  # "range", "steps", "stalled" or "left"

    def folds(self) -> list[float]:
        """Values of the field where the curve turns back, for good: by 1 % at least."""
        logs = np.log([point.field for point in self.points])
        found: list[float] = []
        since, sign = 0, math.copysign(1.0, self.points[0].direction)
        for place in range(1, len(logs)):
            extreme = since + int(np.argmax(sign * logs[since : place + 1]))
            if sign * (logs[extreme] - logs[place]) > _TURNED:
                if _is_old(self.points, extreme, place):
                    return found
                found.append(_extremum(self.points, extreme))
                since, sign = extreme, -sign
        return found


def _is_old(points: tuple[Point, ...], extreme: int, place: int) -> bool:
    """Whether the curve has only turned round: it is where it was before the extremum."""
    here = points[place]
    before = [point.unknowns for point in points[:extreme]]
    nearest = min((float(np.linalg.norm(x - here.unknowns)) for x in before), default=np.inf)
    return nearest < _TURNED_ROUND * float(np.linalg.norm(points[extreme].unknowns - here.unknowns))


def _extremum(points: tuple[Point, ...], place: int) -> float:
    """Of the field, by a parabola in the arclength through a point and its neighbours."""
    near = points[max(place - 1, 0) : place + 2]
    places = np.array([[*point.unknowns, math.log(point.field)] for point in near])
    if len(near) < 3:
        return points[place].field
    lengths = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(places, axis=0), axis=1))])
    curve = np.polyfit(lengths, places[:, -1], 2)
    return math.exp(np.polyval(curve, -curve[1] / (2 * curve[0])))


#: The equations at a value of the field; the remembered minima of the second argument are reused.
Family = Callable[[float, Averages | None], Averages]


def follow(
    family: Family,
    field: float,
    unknowns: Float[np.ndarray, " n"],
    *,
    towards: float,
    within: tuple[float, float],
    tolerance: float,
    stop: Callable[[Point], bool] = lambda point: False,
    steps: int = 200,
) -> Curve:
    """The branch through a root at ``field``, first in the direction of ``towards``.

    It ends where the field leaves ``within``, ``stop`` holds, no step succeeds, or after ``steps``.
    """
    averages = family(field, None)
    values = averages.at(unknowns, search=True)
    x = np.append(unknowns, math.log(field))
    slopes = _slopes(family, averages, x)
    tangent = _tangent(slopes)
    tangent *= math.copysign(1.0, tangent[-1] * (math.log(towards) - x[-1]))
    points, length = [_point(x, values, tangent)], _FIRST
    while len(points) < steps:
        found = _corrected(family, averages, x, slopes, tangent, length, tolerance)
        if found is None:
            length /= 2
            if length < _SHORTEST:
                return Curve(tuple(points), "stalled")
            continue
        x, averages, values, corrections = found
        slopes = _slopes(family, averages, x)
        new = _tangent(slopes)
        tangent = new * math.copysign(1.0, float(new @ tangent))
        points.append(_point(x, values, tangent))
        if not within[0] <= points[-1].field <= within[1]:
            return Curve(tuple(points), "range")
        if stop(points[-1]):
            return Curve(tuple(points), "left")
        length = min(_LONGEST, length * (1.5 if corrections <= _EASY else 0.7))
    return Curve(tuple(points), "steps")


def _point(x: Float[np.ndarray, " n+1"], values: BlockValues, tangent: np.ndarray) -> Point:
    seen = values.size, values.observables, float(tangent[-1])
    return Point(math.exp(x[-1]), x[:-1].copy(), *seen)


def _slopes(
    family: Family, averages: Averages, x: Float[np.ndarray, " n+1"]
) -> Float[np.ndarray, "n n+1"]:
    """∂F/∂(x, p)."""

    def residual(at: Float[np.ndarray, " n+1"]) -> Float[np.ndarray, " n"]:
        there = averages if at[-1] == x[-1] else family(math.exp(at[-1]), averages)
        return there.at(at[:-1], search=False, remember=False).mean

    steps = _DIFFERENCE * np.eye(x.size)
    columns = [(residual(x + step) - residual(x - step)) / (2 * _DIFFERENCE) for step in steps]
    return np.column_stack(columns)


def _tangent(slopes: Float[np.ndarray, "n n+1"]) -> Float[np.ndarray, " n+1"]:
    """The unit vector that F does not change along."""
    return np.asarray(np.linalg.svd(slopes)[2][-1])


def _corrected(
    family: Family,
    averages: Averages,
    x: Float[np.ndarray, " n+1"],
    slopes: Float[np.ndarray, "n n+1"],
    tangent: Float[np.ndarray, " n+1"],
    length: float,
    tolerance: float,
) -> tuple[Float[np.ndarray, " n+1"], Averages, BlockValues, int] | None:
    """Newton's method at right angles to the tangent from a step along it; None where it fails."""
    start = x + length * tangent
    at, last = start.copy(), np.inf
    system = np.vstack([slopes, tangent])
    for correction in range(_CORRECTIONS):
        there = family(math.exp(at[-1]), averages)
        values = there.at(at[:-1], search=False)
        if not np.isfinite(values.size):
            return None
        if _is_root(values, tolerance):
            values = there.at(at[:-1], search=True, elsewhere=True)
            if _is_root(values, tolerance):
                return at, there, values, correction
        if values.size > 0.5 * last:  # the slopes are those of the last point
            system = np.vstack([_slopes(family, there, at), tangent])
        last, averages = values.size, there
        right = np.append(values.mean, tangent @ (at - start))
        at = at - np.linalg.lstsq(system, right, rcond=None)[0]
        if np.linalg.norm(at - start) > _ASTRAY * max(length, 10 * _SHORTEST):
            return None
    return None


def _is_root(values: BlockValues, tolerance: float) -> bool:
    return values.size < max(tolerance, _JUMPS * float(standard_error(values.residual).max()))
