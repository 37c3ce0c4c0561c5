"""The informed branch of LoRA, followed from strong to weak overlap.

At given (q, m, v) the averages in the equations do not contain α', which multiplies them.  The
branch is therefore followed in its overlap o = m/√(q q0): at each o, three equations give q, v and
α'.  Neither a fold in α' nor the end of the branch at o → 0, where α' is that of (3.5) = 1, is
special there (docs/theory.md, section 5).
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lora_theory.problem import Finetuning, Problem
from lora_theory.theory import finetuning as lora
from lora_theory.theory.averages import Averages
from lora_theory.theory.branches import FinetuningNodes, growth_by_block
from lora_theory.theory.nodes import Discretisation
from lora_theory.theory.predict import frozen_weights, solve_pretraining
from lora_theory.theory.results import Stability
from lora_theory.theory.roots import Root, first_good, refine, root_at, solve, standard_error
from lora_theory.theory.stability import finetuning_stability
from lora_theory.theory.units import Units

__all__ = [
    "RANGE",
    "Branches",
    "InformedCurve",
    "InformedPoint",
    "follow_informed",
    "informed_start",
]

#: Values of α' that are tried, over the first one.
RANGE = 64.0
#: Least overlap of a first root, and the least one followed: below it α' has noise of ∝ 1/√o.
_FIRST_OVERLAP, _LAST_OVERLAP = 0.2, 0.15
#: Steps in artanh o, as a line in artanh o.
_STEP_AT_0, _STEP_SLOPE = 0.04, 0.06
#: Half the width of the differences: wide enough to average over the jumps of many nodes.
_DIFFERENCE = 0.02
_CORRECTIONS, _LONGEST_STEP = 25, 0.3
#: Parts of its own quadrature error: a residual aimed at, and one that is still a root.
_AIM, _ENOUGH = 0.02, 0.2
#: Overlaps in a row without a root after which the branch counts as lost.
_LOST = 3
_START_S, _START_V = 0.5, 0.05
_Q_HAT, _M_HAT, _V_HAT, _OVERLAP, _POTENTIAL = map(
    lora.OBSERVABLES.index, ("q_hat", "m_hat", "v_hat", "overlap", "potential")
)


class InformedPoint(NamedTuple):
    """The informed branch at an overlap."""

    overlap: float
    samples: float
    error: float  # of log α'
    unknowns: Float[np.ndarray, " 3"]  # log s, m/q0, log v


class InformedCurve(NamedTuple):
    """From strong to weak overlap, and why it ends."""

    points: list[InformedPoint]
    lost: bool


class Branches:
    """The branches of LoRA at any number of samples, on one set of nodes.

    Attributes:
        stage: the fine-tuning, in the units of the equations.
        weights: frozen by the pre-training.
        nodes: the equations at the samples of the problem.
    """

    def __init__(self, problem: Problem, discretisation: Discretisation) -> None:
        assert problem.finetuning is not None
        root = solve_pretraining(problem.alone, discretisation)
        self.stage: Finetuning = Units.of(problem).stage(problem.finetuning)
        self.weights = frozen_weights(problem, root)
        self.nodes = FinetuningNodes(
            self.stage, self.weights, problem.tokens, problem.activation, discretisation
        )
        self.tolerance = discretisation.tolerance
        self._uninformed: dict[float, Root] = {}

    def averages(self, samples: float, held: tuple[bool, bool]) -> Averages:
        """The equations of a branch."""
        return self._under(samples).averages(held)

    def _under(self, samples: float) -> FinetuningNodes:
        return self.nodes.under(dataclasses.replace(self.stage, samples=samples))

    def informed(self, samples: float) -> Root:
        """The informed root, wherever it leads: its overlap may be 0."""
        return self._solved(self.averages(samples, lora.INFORMED), 0.1, 0.9)

    def uninformed(self, samples: float) -> Root:
        """The root with m = 0, or with w = 0."""
        if samples not in self._uninformed:
            averages = self.averages(samples, lora.UNINFORMED)
            root = self._solved(averages, _START_S, 0.0)
            if not root.is_good(self.tolerance) and self._uninformed:
                near = min(self._uninformed, key=lambda other: abs(math.log(other / samples)))
                start = self._uninformed[near].unknowns
                root = first_good(
                    [root, refine(averages, start, tolerance=self.tolerance)], self.tolerance
                )
            if root.unknowns[0] < math.log(1e-3 * math.sqrt(self.stage.signal)):
                averages = self.averages(samples, lora.ZERO)
                start = np.array([lora.ZERO_SPREAD, 0.0, root.unknowns[2]])
                root = refine(averages, start, tolerance=self.tolerance)
            self._uninformed[samples] = root
        return self._uninformed[samples]

    def _solved(self, averages: Averages, s: float, m: float) -> Root:
        start = [math.log(s * math.sqrt(self.stage.signal)), m, math.log(_START_V)]
        return solve(
            averages, np.array(start), tolerance=self.tolerance,
            coarse=self.nodes.coarse, relaxation=lora.relaxation, thorough=False,
        )  # fmt: skip

    def growth(self, samples: float) -> tuple[float, float]:
        """That of a small m at the root with m = 0, less 1, and its error; NaN without a root."""
        root = self.uninformed(samples)
        if not root.is_good(self.tolerance):
            return math.nan, math.nan
        rows = growth_by_block(self.averages(samples, lora.UNINFORMED), root.unknowns)
        return float(rows.mean()) - 1, float(standard_error(rows))

    def advantage(self, point: InformedPoint) -> tuple[float, float]:
        """φ of the uninformed branch less that of the informed one, and its standard error.

        The potentials are stationary: those of the blocks are taken at the roots of the mean.
        """
        rows = []
        uninformed = self.uninformed(point.samples).unknowns
        for held, x in ((lora.UNINFORMED, uninformed), (lora.INFORMED, point.unknowns)):
            values = self.averages(point.samples, held).at(x, search=True)
            rows.append(values.observables[:, _POTENTIAL])
        gain = rows[0] - rows[1]
        return float(gain.mean()), float(standard_error(gain))

    def stability(self, point: InformedPoint) -> Stability:
        """Of the informed branch."""
        averages = self.averages(point.samples, lora.INFORMED)
        root = root_at(point.unknowns, averages.at(point.unknowns, search=True))
        return finetuning_stability(averages, root, self._under(point.samples).task)


def informed_start(branches: Branches) -> tuple[Root, float] | str:
    """An informed root: at the first α', doubled until the root is stable and the potential lower.

    If that never happens, at the largest α' that has one; or why there is none.
    """
    found: tuple[Root, float] | None = None
    first = samples = branches.stage.samples
    while samples <= RANGE * first:
        root = branches.informed(samples)
        if root.is_good(1e-6) and root.observables[_OVERLAP] > _FIRST_OVERLAP:
            found = root, samples
            point = InformedPoint(float(root.observables[_OVERLAP]), samples, 0.0, root.unknowns)
            if branches.advantage(point)[0] > 0 and branches.stability(point).is_stable:
                break
        samples *= 2
    if found is None:
        return (
            f"no informed branch of overlap above {_FIRST_OVERLAP} was found from α' = {first:g} "
            f"to {samples / 2:g}: raise finetuning.samples or lower finetuning.penalty"
        )
    return found


class _AtOverlap:
    """Residuals of (log √q, log v, log α') at a given overlap, by block."""

    def __init__(self, branches: Branches) -> None:
        self._averages = branches.averages(1.0, lora.INFORMED)
        self._signal, self._penalty = branches.stage.signal, branches.stage.penalty

    def unknowns(self, x: Float[np.ndarray, " 3"], overlap: float) -> Float[np.ndarray, " 3"]:
        """(log s, m/q0, log v)."""
        m = overlap * math.exp(x[0]) / math.sqrt(self._signal)
        return np.array([x[0] + 0.5 * math.log1p(-(overlap**2)), m, x[1]])

    def residual(
        self, x: Float[np.ndarray, " 3"], overlap: float, *, search: bool = True
    ) -> Float[np.ndarray, "R 3"]:
        """Relative: q̂v²/s² − 1, m̂v q0/m − 1, 1 − v(2λ' + v̂)."""
        at = self.unknowns(x, overlap)
        s, m, v, samples = math.exp(at[0]), at[1], math.exp(at[2]), math.exp(x[2])
        values = self._averages.at(at, search=search, elsewhere=search, remember=search)
        hats = samples * values.observables[:, [_Q_HAT, _M_HAT, _V_HAT]]
        signal = hats[:, 1] * v / m - 1
        response = 1 - v * (2 * self._penalty + hats[:, 2])
        return np.stack([hats[:, 0] * (v / s) ** 2 - 1, signal, response], axis=1)

    def slopes(
        self, x: Float[np.ndarray, " 3"], overlap: float, mean: Float[np.ndarray, " 3"]
    ) -> Float[np.ndarray, "3 3"]:
        """Of the mean residual: wide differences, exact in log α'."""
        columns = []
        for step in _DIFFERENCE * np.eye(3)[:2]:
            ends = (self.residual(x + part, overlap, search=False) for part in (step, -step))
            up, down = (end.mean(axis=0) for end in ends)
            columns.append((up - down) / (2 * _DIFFERENCE))
        penalty = 2 * self._penalty * math.exp(x[1])
        return np.column_stack([*columns, mean + np.array([1.0, 1.0, penalty - 1.0])])

    def solved(
        self, x: Float[np.ndarray, " 3"], overlap: float, tolerance: float
    ) -> tuple[Float[np.ndarray, " 3"], float] | None:
        """The root near ``x`` and the error of log α'; None where none is found.

        Newton's method with slopes by wide differences, corrected by Broyden's update while the
        residual falls.  A residual well below its own quadrature error is what single nodes leave.
        """
        best: tuple[float, Float[np.ndarray, " 3"], Float[np.ndarray, "R 3"]] | None = None
        slopes, last = np.zeros((3, 3)), (x, np.zeros(3), math.inf)
        for _ in range(_CORRECTIONS):
            rows = self.residual(x, overlap)
            mean, noise = rows.mean(axis=0), float(standard_error(rows).max())
            size = float(np.abs(mean).max())
            if not math.isfinite(size):
                break
            if best is None or size < best[0]:
                best = size, x, rows
            if size < max(tolerance, _AIM * noise):
                break
            if size > 0.5 * last[2]:
                slopes = self.slopes(x, overlap, mean)
            elif last[2] < math.inf:
                step = x - last[0]
                slopes = slopes + np.outer(mean - last[1] - slopes @ step, step) / (step @ step)
            else:
                slopes = self.slopes(x, overlap, mean)
            last = x, mean, size
            step = np.linalg.lstsq(slopes, -mean, rcond=None)[0]
            x = x + step * min(1.0, _LONGEST_STEP / float(np.abs(step).max()))
        if best is None:
            return None
        size, x, rows = best
        if size > max(tolerance, _ENOUGH * float(standard_error(rows).max())):
            return None
        slopes = self.slopes(x, overlap, rows.mean(axis=0))
        moves = np.linalg.lstsq(slopes, -rows.T, rcond=None)[0].T
        return x, float(standard_error(moves)[2])


def follow_informed(branches: Branches, root: Root, samples: float) -> InformedCurve:
    """The informed branch from a root down to the last overlap, or until it is lost."""
    equations, points, misses = _AtOverlap(branches), list[InformedPoint](), 0
    first = float(root.observables[_OVERLAP])
    q = root.observables[lora.OBSERVABLES.index("q")]
    x = np.array([0.5 * math.log(q), root.unknowns[2], math.log(samples)])
    for overlap in _overlaps(first):
        found = equations.solved(x, overlap, branches.tolerance)
        misses = 0 if found else misses + 1
        if misses == _LOST:
            return InformedCurve(points, lost=True)
        if found:
            x, error = found
            at = equations.unknowns(x, overlap)
            points.append(InformedPoint(overlap, math.exp(x[2]), error, at))
    return InformedCurve(points, lost=misses > 0)


def informed_between(
    branches: Branches, first: InformedPoint, second: InformedPoint, samples: float
) -> InformedPoint | None:
    """The branch at the overlap that a line between two of its points has at ``samples``."""
    logs = [math.log(point.samples) for point in (first, second)]
    share = (math.log(samples) - logs[0]) / (logs[1] - logs[0])
    overlap = first.overlap + share * (second.overlap - first.overlap)
    equations, places = _AtOverlap(branches), []
    for point in (first, second):
        q = point.unknowns[1] ** 2 * branches.stage.signal / point.overlap**2
        places.append(np.array([0.5 * math.log(q), point.unknowns[2], math.log(point.samples)]))
    found = equations.solved(
        places[0] + share * (places[1] - places[0]), overlap, branches.tolerance
    )
    if found is None:
        return None
    x, error = found
    return InformedPoint(overlap, math.exp(x[2]), error, equations.unknowns(x, overlap))


def _overlaps(first: float) -> list[float]:
    found, z = [first], math.atanh(first)
    while math.tanh(z) > _LAST_OVERLAP:
        z -= _STEP_AT_0 + _STEP_SLOPE * z
        found.append(max(math.tanh(z), _LAST_OVERLAP))
    return found
