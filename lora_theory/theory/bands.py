"""μ_δ = law(S0) ⊞ semicircle(δ²) on the real axis: its bands, its gaps and what sticks out of them.

Outside of the law's support w is real, and H(w) = w + δ²G0(w) is increasing exactly where
v(w) = ∫ρ(ds)/(w − s)² < 1/δ²: there x = H(w) is outside of the spectrum of S0 + δZ, the rest of the
w-axis lies below its bands (docs/theory.md, section 2.7; Biane 1997 for the convolution,
Benaych-Georges and Nadakuditi, Adv. Math. 227, 2011, for what a matrix of rank one makes of it).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float
from scipy.optimize import brentq, minimize_scalar

from lora_theory.compilation import quickly_compiled
from lora_theory.laws import Law
from lora_theory.theory.convolution import boundary, height

__all__ = [
    "CurvePoints",
    "Detached",
    "curve",
    "detached",
    "edge",
    "point_below",
    "real_bands",
    "real_transform",
]

_NUDGE = 1e-10


class Detached(NamedTuple):
    """An eigenvalue of S0 + θvvᵀ + δZ outside of the bands."""

    x: float
    squared_overlap: float  # (uᵀv)² of its eigenvector u, ‖u‖ = ‖v‖ = 1


class CurvePoints(NamedTuple):
    """Points of the real axis under Biane's curve."""

    x: Float[Array, " n"]
    density: Float[Array, " n"]  # of μ_δ
    rate: Float[Array, " n"]  # dx/du
    transform: Complex[Array, " n"]  # G0(w), which is G(x)


@quickly_compiled()
def _transform(w: Complex[Array, ""], law: Law) -> tuple[Array, Array]:
    return jax.jvp(law.stieltjes, (w,), (jnp.ones_like(w),))


def real_transform(w: float, law: Law) -> tuple[float, float]:
    """G0 and G0' at a real w outside of the support."""
    value, slope = _transform(jnp.asarray(complex(w)), law)
    return float(value.real), float(slope.real)


def edge(u: float, delta: float, law: Law) -> float:
    """H(u) at the real end u of a band, infinite or not."""
    return u if math.isinf(u) else u + delta**2 * real_transform(u, law)[0]


@quickly_compiled()
def _below(x: Float[Array, ""], delta: Float[Array, ""], law: Law) -> Float[Array, ""]:
    return boundary(x, delta, law).real


def point_below(x: float, delta: float, law: Law) -> float:
    """The u of Biane's curve below x."""
    return float(_below(jnp.asarray(x), jnp.asarray(delta), law))


@quickly_compiled()
def curve(u: Float[Array, " n"], delta: Float[Array, ""], law: Law) -> CurvePoints:
    """What μ_δ is at the points w = u + iη(u) of Biane's curve.

    x = Re H(w), density η/(πδ²) and, as H is real along the curve, dx/du = 1/Re(1/H'(w)), which is
    finite at the edges, where H' vanishes, but is 0/0 there in floating point.
    """

    def at(u: Array) -> CurvePoints:
        eta = height(u, delta, law)
        w = u + 1j * eta
        value, slope = jax.jvp(law.stieltjes, (w,), (jnp.ones_like(w),))
        x = (w + delta**2 * value).real
        rate = 1 / (1 / (1 + delta**2 * slope)).real
        return CurvePoints(x, eta / (jnp.pi * delta**2), rate, value)

    found: CurvePoints = jax.vmap(at)(u)
    return found


def real_bands(delta: float, law: Law) -> list[tuple[float, float]]:
    """The u below the bands of μ_δ, from left to right; their ends H maps to the edges.

    Every band of ρ is below one; in a gap of ρ, v is convex, and where its minimum is above 1/δ²
    the noise closes the gap.

    Example:
        >>> from lora_theory.laws import Eigenvalues
        >>> law = Eigenvalues(jnp.array([0.0, 2.0]))
        >>> with jax.enable_x64(True):
        ...     [len(real_bands(delta, law)) for delta in (0.9, 1.1)]  # the gap closes at δ = 1
        [2, 1]
    """
    room = functools.partial(_room, delta=delta, law=law)
    bands = law.bands()
    (first, _), (_, last) = bands[0], bands[-1]
    ends = [first if math.isinf(first) else _crossing(room, first, first - delta)]
    for (_, left), (right, _) in itertools.pairwise(bands):
        widest = minimize_scalar(
            lambda u: -room(u), bounds=(left, right), method="bounded",
            options={"xatol": 1e-10 * (right - left)},
        ).x  # fmt: skip
        if room(widest) > 0:
            ends += [_crossing(room, left, widest), _crossing(room, right, widest)]
    ends.append(last if math.isinf(last) else _crossing(room, last, last + delta))
    return list(zip(ends[::2], ends[1::2], strict=True))


def _room(u: float, delta: float, law: Law) -> float:
    """v^(-1/2) − δ: positive outside of the bands."""
    v = -real_transform(u, law)[1]
    return (v**-0.5 if 0 < v < math.inf else 0.0) - delta


def _crossing(room: Callable[[float], float], inside: float, outside: float) -> float:
    """Where the room vanishes; ``outside`` is at the distance that v ≤ 1/distance² allows."""
    inside += _NUDGE * (outside - inside)  # on the edge itself v is infinite, or rounding decides
    if room(outside) <= 0 or room(inside) >= 0:  # equal within rounding
        return outside if room(outside) <= 0 else inside
    return float(brentq(room, inside, outside, xtol=1e-15, rtol=1e-14))


def detached(
    spike: float, delta: float, law: Law, bands: list[tuple[float, float]]
) -> list[Detached]:
    """Where θvvᵀ pulls an eigenvalue out of the bands: at most one per gap, from left to right.

    G0(w) = 1/θ with w in a gap; x = w + δ²/θ and (uᵀv)² = −1/(θ²G'(x)), G' = G0'/(1 + δ²G0').

    Example:
        >>> from lora_theory.laws import GOE
        >>> with jax.enable_x64(True):  # a semicircle of variance σ²: x = θ + σ²/θ, 1 − σ²/θ²
        ...     law, delta = GOE(), 1.0
        ...     (found,) = detached(2.0, delta, law, real_bands(delta, law))
        >>> round(found.x, 9), round(found.squared_overlap, 9)
        (3.0, 0.5)
    """

    def excess(w: float) -> float:
        return real_transform(w, law)[0] - 1 / spike

    found = []
    ends = [-math.inf, *(end for band in bands for end in band), math.inf]
    for left, right in zip(ends[::2], ends[1::2], strict=True):
        if left == right:
            continue
        reach = 1.0
        low, high = (left, right)
        if math.isinf(left):  # G0 tends to 0 there
            while excess(low := right - reach) < 0 < -spike:
                reach *= 2
        if math.isinf(right):
            while excess(high := left + reach) > 0 < spike:
                reach *= 2
        if excess(low) > 0 > excess(high):
            w = float(brentq(excess, low, high, xtol=1e-15, rtol=1e-14))
            slope = real_transform(w, law)[1]
            overlap = -(1 + delta**2 * slope) / (spike**2 * slope)
            found.append(Detached(float(w + delta**2 / spike), float(overlap)))
    return found
