"""Law and outliers of Ŝ = f(Y)/V̂ at given Q̂, M̂ and V̂ (docs/theory.md, section 2.7).

With x = y/M̂ the spectrum of S0 + δZ is known along the curve of its free convolution, and f is
affine wherever it is not 0: the bands of μ_δ, without what f makes 0, are the bands of Ŝ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from lora_theory.laws import Law
from lora_theory.problem import Problem
from lora_theory.theory.bands import curve, detached, real_bands, real_transform
from lora_theory.theory.compilation import quickly_compiled
from lora_theory.theory.convolution import boundary, quantile, tail_moment
from lora_theory.theory.pretraining import Constants, rank_at
from lora_theory.theory.units import Units

__all__ = ["Outlier", "Shrunk", "shrunk_spectrum"]

#: The share of eigenvalues beyond the grid, of a law without an upper end.
_BEYOND = 1e-6
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
def _dead_zone(unknowns: Array, constants: Constants) -> tuple[Array, Array]:
    Q_hat, M_hat, _ = jnp.exp(unknowns)
    return constants.regularizer.dead_zone(Q_hat, constants.teacher_scale * M_hat, constants.law)


@quickly_compiled()
def _boundary(x: Array, delta: Array, law: Law) -> Array:
    return boundary(x, delta, law)


@quickly_compiled()
def _far(delta: Array, law: Law) -> tuple[Array, Array, tuple[Array, ...]]:
    """The x with the share _BEYOND above it, Re w there, and the moments of the rest about it."""
    x, start = quantile(jnp.asarray(_BEYOND), delta, law)
    return x, start.real, tuple(tail_moment(start, x, delta, law, order=n) for n in (0, 1, 2))


def shrunk_spectrum(unknowns: Float[np.ndarray, " 3"], problem: Problem, points: int) -> Shrunk:
    """The spectrum of Ŝ at log(Q̂, M̂, V̂) in canonical units, itself in the units of S."""
    constants, units = Constants.of(problem), Units.of(problem)
    law, kind = constants.law, constants.regularizer
    Q_hat, M_hat, V_hat = np.exp(unknowns)
    signal = float(constants.teacher_scale * M_hat)  # Y = signal·(S0 + δZ)
    delta = math.sqrt(Q_hat) / signal
    low, high = (float(y) / signal for y in _dead_zone(jnp.asarray(unknowns), constants))

    def learned(x: ArrayLike) -> Grid:
        y = jnp.asarray(signal * np.asarray(x, dtype=np.float64))
        return np.asarray(kind.shrink(y, V_hat), dtype=np.float64) / units.student

    bands = real_bands(delta, law)
    pieces = [piece for band in bands for piece in _kept(band, low, high, delta, law)]
    grids, ends, tail = [np.zeros((3, 0))], [], np.zeros(2)
    for left, right in pieces:
        endless = math.isinf(right)
        stop = right
        if endless:
            far, stop, about = _far(jnp.asarray(delta), law)
            tail = _tail_moments(learned(far), learned(far + 1) - learned(far), np.array(about))
        x, density, share = _grid(left, float(stop), delta, law, points, endless)
        s = learned(x)
        length = s[-1] - s[0]
        s[np.abs(s) < _ROUNDING * length] = 0.0
        grids.append(np.stack([s, density * (x[-1] - x[0]) / length, share]))
        ends.append((float(s[0]), math.inf if endless else float(s[-1])))
    s, density, share = np.concatenate(grids, axis=1)
    return Shrunk(
        s, density, share, tuple(ends), rank_at(unknowns, constants),
        float(np.sum(share * s) + tail[0]), float(np.sum(share * s**2) + tail[1]),
        tuple(_outliers(problem, learned, (low, high), delta, law, bands)),
        _visible((low, high), delta, law, bands),
    )  # fmt: skip


def _tail_moments(s: Grid, slope: Grid, about: Grid) -> Grid:
    """∫s and ∫s² beyond the grid, s affine there, from the moments of order 0, 1 and 2 in x."""
    first = s * about[0] + slope * about[1]
    return np.array([first, s * first + slope * (s * about[1] + slope * about[2])])


def _kept(
    band: tuple[float, float], low: float, high: float, delta: float, law: Law
) -> list[tuple[float, float]]:
    """What is left of a band, given by its u, without the x from ``low`` to ``high``."""
    ends = [_x_of(u, delta, law) for u in band]
    if low >= high or high <= ends[0] or low >= ends[1]:
        return [band]

    def u_of(x: float) -> float:
        return float(_boundary(jnp.asarray(x), jnp.asarray(delta), law).real)

    left = [(band[0], u_of(low))] if low > ends[0] else []
    right = [(u_of(high), band[1])] if high < ends[1] else []
    return left + right


def _x_of(u: float, delta: float, law: Law) -> float:
    """The edge H(u)."""
    return u if math.isinf(u) else u + delta**2 * real_transform(u, law)[0]


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
    x, density, rate = (np.asarray(part) for part in found)
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
        w = u
        if dead[0] < dead[1] and side * (cut - _x_of(u, delta, law)) > 0:
            w = float(_boundary(jnp.asarray(cut), jnp.asarray(delta), law).real)
        thresholds.append(1 / real_transform(w, law)[0])
    return thresholds[0], thresholds[1]
