"""Root of a few equations averaged over nodes, with the quadrature error of everything read off it.

The nodes come in R independent blocks.  A root is approached on some of the nodes and taken on
the mean over all blocks; the spread of the R roots that one Newton step gives for the single
blocks is the quadrature error (docs/theory.md, section 5).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import root

from lora_theory.status import Status
from lora_theory.theory.averages import Averages, BlockValues

__all__ = [
    "ROUGH", "Root", "first_good", "log_ratio", "refine", "root_at", "solve", "standard_error",
    "with_jumps",
]  # fmt: skip

_SEARCHES, _NEWTON_STEPS, _LONGEST_STEP = 8, 12, 0.5
# of a Newton step, what is tried until the residual falls; whole steps that may be taken regardless
_PARTS, _LEAPS = (1, 1 / 4, 1 / 16, 1 / 64), 3
# Newton's method stalls where it leaves this part of a residual, for jumps: how often it may
_STALLED, _STALLS = 0.1, 3
# residuals good enough: on a few nodes to go on with all, before a search, in a curved valley
ROUGH, _LOOSE, _VALLEY = 0.03, 1e-2, 1e-8
_BASIN_ROUNDS, _BASIN_STEPS, _BASIN_RESIDUAL = 4, 12, 0.2
# of the damped steps, those whose minima are searched for; the others follow them
_SEARCH_EVERY = 4
_BLOCK_EVALUATIONS, _FULL_EVALUATIONS, _SECANT_EVALUATIONS = 40, 10, 30
# relative step of the secant: wide enough to average over the jumps of many nodes
_SECANT_STEP, _JUMP_STEP = 0.02, 0.05
_MATTERING_JUMPS, _LARGEST_JUMP_RESIDUAL = 0.05, 0.02
# a residual this small is no jump: more is asked for than rounding allows
_ROUNDING = 1e-12


class Root(NamedTuple):
    """A root, the observables there and the observables of the single blocks."""

    unknowns: Float[np.ndarray, " n"]
    block_unknowns: Float[np.ndarray, "R n"]  # the roots of the single blocks, within 1
    residual: float  # largest relative residual of the mean equations
    residual_noise: float  # its standard error over the blocks
    observables: Float[np.ndarray, " K"]
    block_observables: Float[np.ndarray, "R K"]
    jumps: bool = False  # whether the errors know of jumps of the minima, for these matter

    @property
    def quadrature_error(self) -> Float[np.ndarray, " K"]:
        """Standard error of the observables from the spread of the blocks; 0 for exact averages."""
        return standard_error(self.block_observables)

    def status(self, jump_mass: float, jump_error: float, tolerance: float) -> Status:
        """How good the root is: converged, or jumps of the proximal operator are seen in it."""
        if not np.all(np.isfinite(self.observables)):
            return Status.NOT_CONVERGED
        if self.residual < tolerance:
            seen = abs(jump_mass) > max(_MATTERING_JUMPS, 4 * jump_error)
            return Status.JUMPS if seen or self.jumps else Status.CONVERGED
        return Status.JUMPS if self.ends_at_jumps else Status.NOT_CONVERGED

    def is_good(self, tolerance: float) -> bool:
        """Whether no further search is worth it: below ``tolerance``, or it ends at jumps."""
        return self.residual < tolerance or self.ends_at_jumps

    @property
    def ends_at_jumps(self) -> bool:
        """Whether the residual is what single nodes on a jump leave: below its own error."""
        return _ROUNDING < self.residual < min(self.residual_noise, _LARGEST_JUMP_RESIDUAL)


def standard_error(blocks: Float[np.ndarray, "R ..."]) -> Float[np.ndarray, "..."]:
    """Standard error of the mean over independent blocks; 0 for the single block of exact means."""
    if len(blocks) == 1:
        return np.zeros(blocks.shape[1:])
    return np.asarray(blocks.std(axis=0, ddof=1) / np.sqrt(len(blocks)))


#: Residuals to a damped step.
Relaxation = Callable[[Float[np.ndarray, " n"]], Float[np.ndarray, " n"]]


def solve(
    averages: Averages,
    start: Float[np.ndarray, " n"],
    *,
    tolerance: float,
    coarse: int = 1,
    relaxation: Relaxation | None = None,
    grid: Sequence[float] = (),
    thorough: bool = True,
) -> Root:
    """Damped steps into the basin on a few nodes, Newton's method on all.

    Args:
        averages: the equations; their residuals are linear in the node averages.
        start: first unknowns.
        tolerance: relative residual that is asked for.
        coarse: number of chunks on which the basin is looked for.
        relaxation: the damped step at given residuals; by default half of them, bounded.  The
            last unknown relaxes first.
        grid: ascending values of the first unknown, among which the first equation is looked for
            to change sign where the damped iteration fails.
        thorough: whether that and Levenberg–Marquardt are tried, which may take ten times longer.

    Returns:
        A good root or, where none is met, the point of least residual.
    """
    basin = functools.partial(
        _basin,
        averages.first(coarse),
        np.array(start, dtype=np.float64),
        relaxation=relaxation or _halved,
        grid=grid,
        thorough=thorough,
    )
    x, values = _near(averages, basin(tolerance=max(tolerance, ROUGH)), tolerance)
    found = root_at(x, values)
    if found.is_good(tolerance) or not thorough:
        return found
    x, _ = _polish(averages, basin(tolerance=tolerance), tolerance, _FULL_EVALUATIONS)
    slower = root_at(x, averages.at(x, search=True, elsewhere=True))
    return first_good([slower, found], tolerance)


def first_good(roots: Iterable[Root], tolerance: float) -> Root:
    """The first root that is good; if none is, the one of least residual."""
    tried = []
    for found in roots:
        if found.is_good(tolerance):
            return found
        tried.append(found)
    return min(tried, key=lambda root: root.residual)


def refine(averages: Averages, x: Float[np.ndarray, " n"], *, tolerance: float) -> Root:
    """The root near ``x``, by Newton's method alone."""
    return root_at(*_near(averages, x, tolerance))


def with_jumps(averages: Averages, root: Root) -> Root:
    """The same root, its errors with the part of the Jacobian that jumps of the minima carry.

    By differences wide enough to average over the jumps of many nodes, from the lowest minimum to
    its rival: on nodes the derivative does not see them, and near the end of a branch they make it
    much more sensitive.
    """
    x = root.unknowns
    values = averages.at(x, search=True)
    jacobian = values.jacobian
    for index, direction in enumerate(np.eye(x.size)):
        if np.array_equal(jacobian[index], -direction):
            continue  # an unknown that is held
        ends = [
            averages.at(x + step * direction, search=False, remember=False)
            for step in (_JUMP_STEP, -_JUMP_STEP)
        ]
        up, down = (np.append(end.mean, end.observables.mean(axis=0)) for end in ends)
        jacobian[:, index] = (up - down) / (2 * _JUMP_STEP)
    found = root_at(x, values._replace(jacobian=jacobian))
    return found._replace(jumps=True)


def _near(
    averages: Averages, x: Float[np.ndarray, " n"], tolerance: float
) -> tuple[Float[np.ndarray, " n"], BlockValues]:
    """The root from a point near it: the best point met and the values there.

    Newton's method follows the minima of the proximal operators; they are searched anew where it
    has converged, until the residual is below the tolerance there, or no minimum is lowered and the
    residual no longer halves, or Newton's method has stalled too often.  Only searches elsewhere
    are believed; a rough root needs none.
    """
    rough = tolerance >= ROUGH
    x, _ = _newton(averages, x, averages.at(x, search=False), max(tolerance, _LOOSE))
    values = averages.at(x, search=True)
    if rough and values.size < tolerance:
        return x, values
    best, least, leaps, stalls = x, np.inf, 0, 0
    for _ in range(_SEARCHES):
        x, size = _newton(averages, x, values, tolerance, leaps=leaps)
        stalls += size > max(tolerance, _STALLED * values.size)
        last, values = values.size, averages.at(x, search=True, elsewhere=True)
        if values.size < least:
            best, least = x, values.size
        if least < tolerance:
            break
        falling = abs(values.size - size) > tolerance or values.size < 0.5 * last
        if falling and stalls < _STALLS:
            continue  # minima were lowered, or the residual is still falling
        if rough or leaps or x.size == 1:
            break
        # back onto the other equations, along whose curved valley the first is solved
        leaps = _LEAPS
        x, _ = _newton(averages, best, averages.at(best, search=False), _VALLEY, held=1)
        values = averages.at(x, search=True)
    return best, values if best is x else averages.at(best, search=True, elsewhere=True)


def _newton(
    averages: Averages,
    x: Float[np.ndarray, " n"],
    values: BlockValues,
    tolerance: float,
    *,
    held: int = 0,
    leaps: int = 0,
) -> tuple[Float[np.ndarray, " n"], float]:
    """Newton steps, bounded, shortened where the residual grows; the best point met.

    The first ``held`` equations are left out, their unknowns stay.  ``leaps`` steps are taken whole
    where no part of them lowers the residual.
    """

    def size(values: BlockValues) -> float:
        mean = values.mean[held:]
        return float(np.abs(mean).max()) if np.all(np.isfinite(mean)) else np.inf

    best, least = x, size(values)
    for _ in range(_NEWTON_STEPS):
        jacobian = values.jacobian[held : x.size, held:]
        if not size(values) > 0.1 * tolerance or not np.all(np.isfinite(jacobian)):
            break
        step = np.zeros_like(x)
        residual = values.mean[held:]
        step[held:] = np.linalg.lstsq(jacobian, -residual, rcond=None)[0]
        step *= min(1.0, _LONGEST_STEP / max(float(np.abs(step).max()), 1e-300))
        tries = []
        for part in _PARTS:
            tries.append((x + part * step, averages.at(x + part * step, search=False)))
            if size(tries[-1][1]) < size(values):
                x, values = tries[-1]
                break
        else:
            if not leaps or not np.isfinite(size(tries[0][1])):
                break
            leaps -= 1
            x, values = tries[0]
        if size(values) < least:
            best, least = x, size(values)
    return best, least


def _scan(
    averages: Averages, x: Float[np.ndarray, " n"], grid: Sequence[float]
) -> Iterator[Float[np.ndarray, " n"]]:
    """Points where the first residual changes sign along ``grid`` of the first unknown.

    The other unknowns follow their own equations.
    """
    last, before = x, math.nan
    for value in grid:
        x = np.concatenate([[value], last[1:]])
        x, _ = _newton(averages, x, averages.at(x, search=False), _LOOSE, held=1)
        values = averages.at(x, search=True)
        first, *others = values.mean
        if not np.all(np.abs(others) < ROUGH):
            continue
        if first <= 0 < before:
            yield last + before / (before - first) * (x - last)
        last, before = x, first


def _basin(
    averages: Averages,
    x: Float[np.ndarray, " n"],
    *,
    tolerance: float,
    relaxation: Relaxation,
    grid: Sequence[float],
    thorough: bool,
) -> Float[np.ndarray, " n"]:
    """Damped iteration until Newton's method succeeds from where it has come."""

    for count in range(4):
        step = np.zeros_like(x)
        residual = averages.at(x, search=count % _SEARCH_EVERY == 0).mean
        step[-1] = np.nan_to_num(relaxation(residual))[-1]
        x = x + step
    start, best, least = x, x, np.inf

    def succeeds(x: Float[np.ndarray, " n"], polish: bool = False) -> bool:
        nonlocal best, least
        found, values = _near(averages, x, tolerance)
        if polish and values.size > tolerance:
            found, values = _polish(averages, found, tolerance, _BLOCK_EVALUATIONS)
        if values.size < least:
            best, least = found, values.size
        return least < tolerance

    for _ in range(_BASIN_ROUNDS):
        tried = x
        for count in range(_BASIN_STEPS):
            residual = averages.at(x, search=count % _SEARCH_EVERY == 0).mean
            if np.max(np.abs(residual)) < _BASIN_RESIDUAL:
                break
            x = x + np.nan_to_num(relaxation(residual))
        if x is tried and least < np.inf:
            break
        if succeeds(x):
            return best
    if thorough and not any(succeeds(point) for point in _scan(averages, start, grid)):
        succeeds(best, polish=True)
    return best


def log_ratio(ratio: Float[np.ndarray, "..."] | float) -> Float[np.ndarray, "..."]:
    """log x, continued linearly below ½: for ratios of new to old that may have any sign."""
    return np.where(ratio > 0.5, np.log(np.maximum(ratio, 0.5)), 2 * ratio - 1 - math.log(2.0))


def _halved(residual: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return np.asarray(0.5 * np.clip(residual, -1.0, 1.0))


def _polish(
    averages: Averages, x: Float[np.ndarray, " n"], tolerance: float, evaluations: int
) -> tuple[Float[np.ndarray, " n"], BlockValues]:
    """Root of the mean residual: the best point met and the values there.

    Levenberg–Marquardt (MINPACK) with the exact Jacobian; where jumps make the residual
    discontinuous that Jacobian misses their share, and Powell's hybrid method with wide differences
    goes on.
    """
    met: dict[bytes, BlockValues] = {}

    def at(x: Float[np.ndarray, " n"]) -> BlockValues:
        key = np.asarray(x).tobytes()
        if key not in met:
            met[key] = averages.at(np.array(x), search=True)
        return met[key]

    def residual(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        # what is not finite is far from any root
        mean = at(x).mean
        return np.asarray(np.nan_to_num(mean, nan=1e6, posinf=1e6, neginf=-1e6))

    def jacobian(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n n"]:
        rows = at(x).jacobian[: x.size]
        return np.asarray(np.nan_to_num(rows, nan=0.0, posinf=0.0, neginf=0.0))

    def best() -> tuple[bytes, BlockValues]:
        return min(met.items(), key=lambda entry: entry[1].size)

    options = {"xtol": 1e-13, "ftol": 1e-14, "factor": 0.5, "maxiter": evaluations}
    root(residual, x, jac=jacobian, method="lm", options=options)
    if best()[1].size > tolerance:
        options = {"eps": _SECANT_STEP**2, "factor": 0.1, "maxfev": _SECANT_EVALUATIONS}
        root(residual, np.frombuffer(best()[0]), method="hybr", options=options)
    point, values = best()
    return np.frombuffer(point).copy(), values


def root_at(x: Float[np.ndarray, " n"], values: BlockValues) -> Root:
    """The root that a point is, with those of the single blocks one Newton step away."""
    jacobian = np.nan_to_num(values.jacobian, nan=0.0, posinf=0.0, neginf=0.0)
    moves = np.linalg.lstsq(jacobian[: x.size], -values.residual.T, rcond=None)[0].T
    return Root(
        x,
        x + np.clip(moves, -1.0, 1.0),
        values.size,
        float(standard_error(values.residual).max()),
        values.observables.mean(axis=0),
        values.observables + moves @ jacobian[x.size :].T,
    )
