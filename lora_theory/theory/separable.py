"""Penalties on the eigenvalues of S whose weight side is integrated numerically.

s(y) = argmin_s V̂s²/4 − ys/2 + λR(s), the global minimum, is integrated over the law of
Y = M̂S0 + √Q̂Z between the places where it has a corner or jumps:

    Q = ∫s²,  V = 2∫s Re G,  M = (∫ys − Q̂V)/M̂,  Ψ = −∫min_s{V̂s²/4 − ys/2 + λR(s)}

(docs/theory.md, section 2.6).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from lora_theory.compilation import quickly_compiled
from lora_theory.expression import Expression
from lora_theory.laws import Law
from lora_theory.theory.bands import edge, real_bands
from lora_theory.theory.law_nodes import law_nodes

__all__ = [
    "Numerical", "Separable", "SeparableNodes", "scalar_proximal", "separable_nodes",
    "separable_weights",
]  # fmt: skip

Grid = Float[np.ndarray, " n"]

#: Points among which the minima of one scalar problem are looked for, and how many are followed.
_POINTS, _CANDIDATES = 129, 3
#: Rounds that narrow a minimum to 2/(_FINE − 1) of its interval each, and Newton's steps after.
_ROUNDS, _FINE, _NEWTON = 12, 33, 3
#: These begin at this part of the first interval on either side of the minimum.
_BESIDE = 1e-6
#: At a stationary point the slope is this small, relative to its terms; at a kink it is not.
_STATIONARY = 1e-9
#: Costs that differ by this many roundings are equal.
_ROUNDING = 16
#: Places where s(y) may not be smooth, the points among which they are looked for, and the rounds
#: that narrow each down to 2/_PARTS of its interval.
_MOST_CORNERS, _BRACKETS, _NARROWINGS, _PARTS = 8, 401, 14, 16
#: s on both sides of a corner is taken at this part of the width of the spectrum away from it; a
#: jump is a rise by more than this part of the largest s, a kink of more than that of the slopes.
_APART, _JUMP = 1e-9, 1e-4
#: Bends this small, next to the largest s, are none.
_STRAIGHT = 1e-7
#: Corners that are neither are left out where they are this near to an edge, which they would blur.
_BLURRED = 0.01
#: In units of the standard deviation of Y: further out no corner of s is looked for.
_FAR = 20.0
#: An s this small is 0; y in an interval this narrow, of all, do not count.
_ZERO, _NARROW = 1e-12, 1e-5


class Numerical:
    """A penalty by its minimiser s(y), which may jump."""

    def shrink(self, y: Float[Array, "..."], V_hat: Float[Array, ""]) -> Float[Array, "..."]:
        """s(y) = argmin_s V̂s²/4 − ys/2 + λR(s); differentiable, but blind to its jumps."""
        raise NotImplementedError

    def lowest(
        self, y: Float[Array, "..."], s: Float[Array, "..."], V_hat: Float[Array, ""]
    ) -> Float[Array, "..."]:
        """V̂s²/4 − ys/2 + λR(s) at s = s(y)."""
        raise NotImplementedError


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["penalty", "unit"], meta_fields=["function"]
)
@dataclass(frozen=True)
class Separable(Numerical):
    """λD Σ R(s_i/u) on a symmetric S, R an :class:`~lora_theory.expression.Expression`.

    u is the unit of s.
    """

    function: str
    penalty: float | Array
    unit: float | Array = 1.0

    def shrink(self, y: Float[Array, "..."], V_hat: Float[Array, ""]) -> Float[Array, "..."]:
        """s(y)."""
        found = scalar_proximal(
            self.function,
            jnp.ravel(y) / (V_hat * self.unit),
            4 * self.penalty / (V_hat * self.unit**2),
        )
        return self.unit * found.reshape(jnp.shape(y))

    def lowest(
        self, y: Float[Array, "..."], s: Float[Array, "..."], V_hat: Float[Array, ""]
    ) -> Float[Array, "..."]:
        """V̂s²/4 − ys/2 + λR(s/u)."""
        values: Array = self.penalty * Expression(self.function)(s / self.unit, jnp)
        return V_hat * s**2 / 4 - y * s / 2 + values


@functools.lru_cache(maxsize=256)
def _lowest(function: str) -> tuple[float, float]:
    """Where R is lowest, and its value there; to the accuracy of a search over all magnitudes."""
    R = Expression(function)
    sizes = np.concatenate([np.geomspace(1e-8, 1e8, 801), np.linspace(0, 10, 2001)])
    s = np.unique(np.concatenate([-sizes, sizes]))
    s = s[np.argsort(np.abs(s), kind="stable")]  # of equal values the smallest |s|
    best = int(np.nanargmin(R(s)))
    return float(s[best]), float(R(s)[best])


def scalar_proximal(
    function: str, center: Float[Array, " n"], strength: Float[Array, ""] | float
) -> Float[Array, " n"]:
    """argmin_s (s − z)² + cR(s) for every z, the global minimum.

    The minimum lies within |s − z|² ≤ min(cR(z) − cR_min, (r − z)²), R lowest at r.  There the
    lowest minima on a grid, and r, are narrowed down, and polished by Newton's method where R is
    smooth.  R must not vary on less than 1/64 of that distance.  The derivative is that of the
    implicit equation 2(s − z) + cR'(s) = 0, and 0 at a kink of R.

    Args:
        function: R as an expression of s.
        center: z. strength: c ≥ 0.

    Example:
        >>> with jax.enable_x64(True):
        ...     scalar_proximal("abs(s)", jnp.array([-2.0, 0.1, 3.0]), 1.0).round(9).tolist()
        [-1.5, 0.0, 2.5]
    """
    R = functools.partial(Expression(function), xp=jnp)
    lowest, least = _lowest(function)
    z, c = jax.lax.stop_gradient((jnp.asarray(center), jnp.asarray(strength)))

    def cost(s: Array) -> Array:
        value = (s - z) ** 2 + c * R(s)
        return jnp.where(jnp.isnan(value), jnp.inf, value)

    here = c * (R(z) - least)
    bound = jnp.where(jnp.isfinite(here), jnp.maximum(here, 0.0), jnp.inf)
    reach = jnp.sqrt(jnp.minimum(bound, (z - lowest) ** 2))
    grid = z + reach * jnp.linspace(-1, 1, _POINTS, dtype=z.dtype)[:, None]
    costs = cost(grid)
    inner = jnp.pad(costs, ((1, 1), (0, 0)), constant_values=jnp.inf)
    minima = jnp.where((costs <= inner[:-2]) & (costs <= inner[2:]), costs, jnp.inf)
    places = jax.lax.top_k(-minima.T, _CANDIDATES)[1].T
    candidates = jnp.take_along_axis(grid, places, axis=0)
    clipped = jnp.clip(lowest, z - reach, z + reach)
    candidates = jnp.concatenate([candidates, clipped[None]])
    fine = jnp.linspace(-1, 1, _FINE, dtype=z.dtype)[:, None]

    def narrow(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        s, width = state
        near = s[:, None] + width * fine  # the middle one is s itself
        best = jnp.argmin(jax.vmap(cost)(near), axis=1)
        return jnp.take_along_axis(near, best[:, None], axis=1)[:, 0], width * (2 / (_FINE - 1))

    width = 2 * reach / (_POINTS - 1)
    s, _ = jax.lax.fori_loop(0, _ROUNDS, narrow, (candidates, width))
    costs = cost(s)
    s = jnp.take_along_axis(s, jnp.argmin(costs, axis=0)[None], axis=0)[0]
    rounding = _ROUNDING * np.finfo(z.dtype).eps * jnp.abs(costs[-1])
    s = jnp.where(cost(clipped) <= jnp.min(costs, axis=0) + rounding, clipped, s)
    slope_of = jax.grad(lambda s: jnp.sum(R(s)))

    def newton(s: Array, z: Array, c: Array) -> tuple[Array, Array]:
        """A step, and whether s is stationary already."""
        slope, curvature = jax.jvp(slope_of, (s,), (jnp.ones_like(s),))
        force, stiffness = 2 * (s - z) + c * slope, 2 + c * curvature
        large = 2 * (jnp.abs(s) + jnp.abs(z)) + c * jnp.abs(slope)
        step = jnp.where(stiffness > 0, -force / stiffness, jnp.nan)
        return step, (jnp.abs(force) <= _STATIONARY * large) & jnp.isfinite(step)

    # from either side: at a kink of R both lead back to it, or across
    for side in (1, -1):
        beside = near = s + side * _BESIDE * reach
        for _ in range(_NEWTON):
            near = near + newton(near, z, c)[0]
        beyond = side * (near - s) > 0
        taken = beyond & (jnp.abs(near - beside) <= jnp.abs(beside - s)) & jnp.isfinite(cost(near))
        s = jnp.where(taken, near, s)
    s = jax.lax.stop_gradient(s)
    smooth = newton(s, z, c)[1]
    step, _ = newton(s, jnp.where(smooth, center, z), jnp.where(smooth, strength, c))
    return s + jnp.where(smooth, step - jax.lax.stop_gradient(step), 0.0)


@quickly_compiled()
def _shrunk(y: Array, V_hat: Array, kind: Numerical) -> tuple[Array, Array, Array]:
    """s(y), its slope, and min_s V̂s²/4 − ys/2 + λR(s)."""
    s, slope = jax.jvp(lambda y: kind.shrink(y, V_hat), (y,), (jnp.ones_like(y),))
    return s, slope, kind.lowest(y, s, V_hat)


class SeparableNodes(NamedTuple):
    """The law of Y on nodes, and s there; the last nodes, of weight 0, are the corners of s."""

    y: Grid
    weights: Grid
    transform: Complex[np.ndarray, " n"]  # G of the law of Y
    s: Grid
    slope: Grid
    lowest: Grid  # min_s{…}
    jumps: Float[np.ndarray, "corners 2"]  # s on both sides of the corners

    @property
    def corners(self) -> Grid:
        """The y where s may not be smooth."""
        return self.y[self.y.size - len(self.jumps) :]

    @property
    def dead_zone(self) -> tuple[float, float]:
        """The ends of the y that become 0, infinite where all beyond do; equal where none do."""
        zero = self.y[(self.weights > 0) & (np.abs(self.s) < _ZERO)]
        width = math.sqrt(self.weights @ self.y**2)
        if not zero.size or np.ptp(zero) < _NARROW * width:
            return 0.0, 0.0
        below = [float(y) for y in self.corners if y <= zero.min() + _APART * width]
        above = [float(y) for y in self.corners if y >= zero.max() - _APART * width]
        return max(below, default=-math.inf), min(above, default=math.inf)

    @property
    def rank(self) -> float:
        """The share of s that are not 0."""
        low, high = self.dead_zone
        return 1 - float(self.weights[(low < self.y) & (self.y < high)].sum())

    @property
    def jumps_within(self) -> bool:
        """Whether s jumps where there are eigenvalues."""
        density = -self.transform.imag[self.y.size - len(self.jumps) :]
        return bool(np.any((density > 0) & (self.jumps[:, 0] != self.jumps[:, 1])))


def separable_nodes(
    unknowns: Float[np.ndarray, " 3"], law: Law, teacher_scale: float, kind: Numerical
) -> SeparableNodes:
    """Nodes of the law of Y, fine towards the corners of s, at log(Q̂, M̂, V̂)."""
    Q_hat, M_hat, V_hat = np.exp(unknowns)
    signal = teacher_scale * M_hat
    delta = math.sqrt(Q_hat) / signal
    mean, second = (float(moment) for moment in law.moments())
    reach = _FAR * math.sqrt(second + delta**2)
    bands = real_bands(delta, law)
    ends = [max(bands[0][0], mean - reach), min(bands[-1][1], mean + reach)]
    edges = [edge(u, delta, law) for band in bands for u in band if math.isfinite(u)]
    low, high = (edge(u, delta, law) if u in bands[0] + bands[-1] else u for u in ends)
    corners, jumps = _corners(signal * low, signal * high, V_hat, kind, signal * np.array(edges))
    x, weights, transform = law_nodes(delta, law, (corners / signal).tolist())
    y = signal * x
    found = _shrunk(jnp.asarray(y), jnp.asarray(V_hat), kind)
    s, slope, lowest = map(np.asarray, found)
    return SeparableNodes(y, weights, transform / signal, s, slope, lowest, jumps)


def _corners(
    low: float, high: float, V_hat: float, kind: Numerical, edges: Grid
) -> tuple[Grid, Float[np.ndarray, "corners 2"]]:
    """Where s(y) bends most, kinks and jumps among these places, and s on both sides of them."""

    def s(y: Grid) -> tuple[Grid, Grid]:
        values, slopes, _ = _shrunk(jnp.asarray(y), jnp.asarray(V_hat), kind)
        return np.asarray(values), np.asarray(slopes)

    y = np.linspace(low, high, _BRACKETS)
    values, slopes = s(y)
    bends = np.abs(np.diff(values, 2))
    around = np.pad(bends, 1)
    peaks = np.flatnonzero(
        (bends >= around[:-2]) & (bends >= around[2:]) & (bends > _STRAIGHT * np.abs(values).max())
    )
    peaks = peaks[np.argsort(-bends[peaks], kind="stable")][:_MOST_CORNERS]
    if not peaks.size:
        return np.zeros(0), np.zeros((0, 2))
    # always as many, so that one program serves all
    left, right = (np.resize(y[peaks + side], _MOST_CORNERS) for side in (0, 2))
    for _ in range(_NARROWINGS):
        inside = left + (right - left) * np.linspace(0, 1, _PARTS + 1)[:, None]
        sharpest = np.argmax(np.abs(np.diff(s(inside)[0], 2, axis=0)), axis=0)[None]
        left, right = (np.take_along_axis(inside, sharpest + side, axis=0)[0] for side in (0, 2))
    apart = _APART * (high - low)
    (below, above), sides = s(np.stack([left - apart, right + apart]))
    jump = above - below > _JUMP * np.abs(values).max()
    kink = np.abs(sides[1] - sides[0]) > _JUMP * np.abs(slopes).max()
    corners, middle = (left + right) / 2, (below + above) / 2
    distance = np.abs(corners[:, None] - edges).min(axis=1, initial=np.inf)
    far = distance > _BLURRED * (high - low)
    jumps = np.stack([np.where(jump, below, middle), np.where(jump, above, middle)], axis=1)
    found, first = np.unique(corners, return_index=True)
    kept = (jump | kink | far)[first]
    return found[kept], jumps[first][kept]


def separable_weights(
    unknowns: Float[np.ndarray, " 3"], law: Law, teacher_scale: float, kind: Numerical
) -> tuple[Float[np.ndarray, " 4"], Float[np.ndarray, "4 3"]]:
    """(Q, M, V, Ψ) at log(Q̂, M̂, V̂), and their slopes.

    Slopes along Y → cY are those of the integrands; along Q̂, by ∂G/∂Q̂ = −G∂G/∂y, ∫gμ has the slope
    ∫g' Re G μ, and ∫s Re G μ has ∫s'(Re G² − π²μ²/3)μ; those along V̂ follow as Ψ has symmetric
    second derivatives and ∂s/∂V̂ = −s ∂s/∂y.  A jump of s is a delta function in s'.

    Where y is large s grows as ky, k constant: what has the law's second moment is split off, for
    the tail of a law without an edge is longer than any nodes.
    """
    Q_hat, M_hat, V_hat = np.exp(unknowns)
    nodes = separable_nodes(unknowns, law, teacher_scale, kind)
    y, weights, s, slope = nodes.y, nodes.weights, nodes.s, nodes.slope
    real, density = nodes.transform.real, -nodes.transform.imag / np.pi
    square = (teacher_scale * M_hat) ** 2 * float(law.moments()[1]) + Q_hat
    far = int(np.argmax(np.where(weights > 0, np.abs(y), 0.0)))
    k = s[far] / y[far]

    def mean(values: Grid, growth: float = 0.0) -> float:
        return float(weights @ (values - growth * y**2) + growth * square)

    below, above = nodes.jumps.T
    rise, rise_of_square = above - below, above**2 - below**2
    at = slice(y.size - len(rise), None)  # the corners

    def jumps(values: Grid, rises: Grid) -> float:
        return float((values * density)[at] @ rises)

    Q, V = mean(s**2, k**2), 2 * mean(s * real)
    M = (mean(y * s, k) - Q_hat * V) / M_hat
    lowest = mean(nodes.lowest, nodes.lowest[far] / y[far] ** 2)
    # along Y → cY
    Q_scaled = mean(2 * y * s * slope, 2 * k**2) + jumps(y, rise_of_square)
    V_scaled = 2 * (mean(y * slope * real) + jumps(y * real, rise)) - V
    moment_scaled = mean(y * s + y**2 * slope, 2 * k) + jumps(y**2, rise)
    M_scaled = (moment_scaled - 2 * Q_hat * V - Q_hat * V_scaled) / M_hat - M
    # along log Q̂, log M̂ and log V̂
    speed = real**2 - (np.pi * density) ** 2 / 3
    Q_by_Q = Q_hat * (mean(2 * s * slope * real) + jumps(real, rise_of_square))
    V_by_Q = Q_hat * 2 * (mean(slope * speed) + jumps(speed, rise))
    V_by_M = V_scaled - 2 * V_by_Q
    M_by_Q = Q_hat * V_by_M / (2 * M_hat)
    Q_by_M, M_by_M = Q_scaled - 2 * Q_by_Q, M_scaled - 2 * M_by_Q
    middle = (above + below) / 2
    Q_by_V = mean(-2 * s**2 * slope, -2 * k**3) - jumps(np.ones_like(y), rise_of_square * middle)
    slopes = [
        [Q_by_Q, Q_by_M, V_hat * Q_by_V],
        [M_by_Q, M_by_M, -V_hat * Q_by_M / (2 * M_hat)],
        [V_by_Q, V_by_M, -V_hat * Q_by_Q / Q_hat],
        [Q_hat * V / 4, M_hat * M / 2, -V_hat * Q / 4],
    ]
    return np.array([Q, M, V, -lowest]), np.array(slopes)
