"""Law and outliers of Ŝ = f(Y)/V̂ at given Q̂, M̂ and V̂ (docs/theory.md, section 2.7).

With x = y/M̂ the spectrum of S0 + δZ is known along the curve of its free convolution, and f
increases wherever it is not 0: the bands of μ_δ, without what f makes 0, are the bands of Ŝ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from lora_theory.compilation import quickly_compiled
from lora_theory.laws import Law
from lora_theory.problem import Problem, ProblemError
from lora_theory.theory.bands import curve, detached, edge, point_below, real_bands, real_transform
from lora_theory.theory.convolution import quantile, tail_moment
from lora_theory.theory.truncated import truncated_at
from lora_theory.theory.units import Units
from lora_theory.theory.weights import Constants, kept_at

__all__ = ["Outlier", "Shrunk", "shrunk_spectrum"]

#: The share of eigenvalues beyond the grid, of a law without an upper end.
_BEYOND = 1e-6
#: Slopes at ends, and s beside a jump, are taken this part of the piece inside; pieces this near to
#: each other are one.
_INSIDE, _TOUCHING = 1e-9, 1e-6
#: A piece this narrow, in units of s, is one eigenvalue.
_FLAT = 1e-9
#: An end this small, next to the length of its band, is 0.
_ROUNDING = 1e-12

Grid = Float[np.ndarray, "..."]


@dataclass(frozen=True)
class Outlier:
    """An eigenvalue of Ŝ outside of its bands, from the spike θvvᵀ of the teacher."""

    spike: float  #: θ
    eigenvalue: float
    squared_overlap: float  #: (uᵀv)² of its eigenvector u


class Shrunk(NamedTuple):
    """What the spectrum is at given Q̂, M̂ and V̂."""

    eigenvalues: Grid
    density: Grid
    shares: Grid
    bands: tuple[tuple[float, float], ...]
    rank: float
    mean: float
    second: float
    outliers: tuple[Outlier, ...]
    visible: tuple[float | None, float | None]

    @property
    def effective_rank(self) -> float:
        """(Tr Ŝ)²/(D Tr Ŝ²) over D."""
        return self.mean**2 / self.second if self.second > 0 else 0.0

    @property
    def summary(self) -> dict[str, list[float]]:
        """The numbers that have a quadrature error, by the name that it has in a result."""
        return {
            "rank": [self.rank],
            "mass_at_zero": [self.rank],
            "effective_rank": [self.effective_rank],
            "mean": [self.mean],
            "second_moment": [self.second],
            "bands": [end for band in self.bands for end in band],
            "outliers": [outlier.eigenvalue for outlier in self.outliers],
        }


@quickly_compiled()
def _far(delta: Array, law: Law) -> tuple[Array, Array, tuple[Array, ...]]:
    """The x with the share _BEYOND above it, Re w there, and the moments of the rest about it."""
    x, start = quantile(jnp.asarray(_BEYOND), delta, law)
    return x, start.real, tuple(tail_moment(start, x, delta, law, order=n) for n in (0, 1, 2))


def shrunk_spectrum(unknowns: Float[np.ndarray, " 3"], problem: Problem, points: int) -> Shrunk:
    """The spectrum of Ŝ at log(Q̂, M̂, V̂) in canonical units, itself in the units of S.

    After the compression, if there is one.
    """
    constants, units = Constants.of(problem), Units.of(problem)
    law, kind = constants.law, constants.regularizer
    Q_hat, M_hat, V_hat = np.exp(unknowns)
    signal = float(constants.teacher_scale * M_hat)  # Y = signal·(S0 + δZ)
    delta = math.sqrt(Q_hat) / signal
    stage = problem.compression
    cut = truncated_at(unknowns, constants, stage.rank) if stage is not None else None
    kept = kept_at(unknowns, constants) if cut is None else cut.kept
    low, high = (y / signal for y in kept.dead_zone)

    def learned(x: ArrayLike) -> Grid:
        y = jnp.asarray(signal * np.asarray(x, dtype=np.float64))
        return np.asarray(kind.shrink(y, V_hat), dtype=np.float64) / units.student

    def slope(x: Grid) -> Grid:
        """ds/dx, at an end that of the inside."""
        y = jnp.asarray(signal * _inside(x))
        by_y = jax.jvp(lambda y: kind.shrink(y, V_hat), (y,), (jnp.ones_like(y),))[1]
        return signal * np.asarray(by_y) / units.student

    bands = real_bands(delta, law)
    corners = [point_below(y / signal, delta, law) for y in kept.corners]
    pieces = [
        piece
        for band in bands
        for part in _kept(band, low, high, delta, law)
        for piece in pairwise([part[0], *(u for u in corners if part[0] < u < part[1]), part[1]])
    ]
    grids, tail = [np.zeros((3, 0))], np.zeros(2)
    ends: list[tuple[float, float]] = []
    for left, right in pieces:
        endless = math.isinf(right)
        stop = right
        if endless:
            far, stop, about = _far(jnp.asarray(delta), law)
            tail = _tail_moments(learned(far), learned(far + 1) - learned(far), np.array(about))
        x, density, share = _grid(left, float(stop), delta, law, points, endless)
        s = learned(_inside(x) if kept.jumps else x)
        length = s[-1] - s[0]
        if length < _FLAT * np.abs(s).max():
            raise ProblemError(
                f"pretraining.function = {problem.pretraining.function!r} has no density: it holds "
                f"a share {share.sum():.3g} of the eigenvalues at s = {s.mean():.6g}, where it has "
                "a kink; for its spectrum it must be smooth except at 0"
            )
        s[np.abs(s) < _ROUNDING * length] = 0.0
        with np.errstate(divide="ignore"):
            grids.append(np.stack([s, density / slope(x), share]))
        end = math.inf if endless else float(s[-1])
        if ends and s[0] - ends[-1][1] < _TOUCHING * length:
            ends[-1] = ends[-1][0], end
        else:
            ends.append((float(s[0]), end))
    s, density, share = np.concatenate(grids, axis=1)
    return Shrunk(
        s, density, share, tuple(ends), kept.rank,
        float(np.sum(share * s) + tail[0]), float(np.sum(share * s**2) + tail[1]),
        tuple(_outliers(problem, learned, (low, high), delta, law, bands)),
        _visible((low, high), delta, law, bands),
    )  # fmt: skip


def _inside(x: Grid) -> Grid:
    """The same without its ends."""
    edge = _INSIDE * (x[-1] - x[0])
    return np.asarray(np.clip(x, x[0] + edge, x[-1] - edge))


def _tail_moments(s: Grid, slope: Grid, about: Grid) -> Grid:
    """∫s and ∫s² beyond the grid, s affine there, from the moments of order 0, 1 and 2 in x."""
    first = s * about[0] + slope * about[1]
    return np.array([first, s * first + slope * (s * about[1] + slope * about[2])])


def _kept(
    band: tuple[float, float], low: float, high: float, delta: float, law: Law
) -> list[tuple[float, float]]:
    """What is left of a band, given by its u, without the x from ``low`` to ``high``."""
    ends = [edge(u, delta, law) for u in band]
    if low >= high or high <= ends[0] or low >= ends[1]:
        return [band]
    left = [(band[0], point_below(low, delta, law))] if low > ends[0] else []
    right = [(point_below(high, delta, law), band[1])] if high < ends[1] else []
    return left + right


def _grid(
    left: float, right: float, delta: float, law: Law, points: int, heavy: bool
) -> tuple[Grid, Grid, Grid]:
    """x, density and shares at points between two u, by Gauss's rule in an angle, ends added.

    u is a cosine of it, so that square roots at the edges cost no accuracy; on a tail, the
    exponential of one.
    """
    angle, weights = _angles(points)
    t, slope = (1 - np.cos(angle)) / 2, np.sin(angle) / 2
    stretch = math.log1p((right - left) / delta) if heavy else 0.0
    if stretch > 0:
        slope = slope * stretch * np.exp(stretch * t) / math.expm1(stretch)
        t = np.expm1(stretch * t) / math.expm1(stretch)
    found = curve(jnp.asarray(left + (right - left) * t), jnp.asarray(delta), law)
    x, density, rate, _ = (np.asarray(part) for part in found)
    share = np.zeros(points)
    inside = (weights > 0) & (density > 0)
    share[inside] = density[inside] * rate[inside] * (right - left) * (slope * weights)[inside]
    return x, density, share


@functools.lru_cache(maxsize=8)
def _angles(points: int) -> tuple[Grid, Grid]:
    """Gauss–Legendre from 0 to π, and the ends with weight 0."""
    nodes, weights = np.polynomial.legendre.leggauss(points - 2)
    inner = np.pi / 2 * (1 + nodes)
    return np.concatenate([[0.0], inner, [np.pi]]), np.pi / 2 * np.pad(weights, 1)


def _outliers(
    problem: Problem,
    learned: Callable[[ArrayLike], Grid],
    dead: tuple[float, float],
    delta: float,
    law: Law,
    bands: list[tuple[float, float]],
) -> list[Outlier]:
    """Those that the penalty leaves, from the smallest."""
    found = [
        Outlier(spike, float(learned(x)), overlap)
        for spike in problem.teacher.spikes or ()
        for x, overlap in detached(spike, delta, law, bands)
        if not dead[0] <= x <= dead[1] or dead[0] >= dead[1]
    ]
    return sorted(found, key=lambda outlier: outlier.eigenvalue)


def _visible(
    dead: tuple[float, float], delta: float, law: Law, bands: list[tuple[float, float]]
) -> tuple[float | None, float | None]:
    """The θ = 1/G(x) at the outermost x, below and above, where outliers appear."""
    thresholds: list[float | None] = []
    for side, u, cut in ((-1, bands[0][0], dead[0]), (1, bands[-1][1], dead[1])):
        if math.isinf(u) or (dead[0] < dead[1] and math.isinf(cut)):
            thresholds.append(None)
            continue
        beyond = dead[0] < dead[1] and side * (cut - edge(u, delta, law)) > 0
        w = point_below(cut, delta, law) if beyond else u
        thresholds.append(1 / real_transform(w, law)[0])
    return thresholds[0], thresholds[1]
