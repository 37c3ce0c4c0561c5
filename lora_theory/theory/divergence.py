"""How a spectral map s(Y) of Y = M̂S0 + √Q̂Z spreads a random change of Y: ∬((s(x)−s(y))/(x−y))².

In the eigenbasis of Y a map of its eigenvalues has the derivative δS_ij = δY_ij (s_i − s_j)/(y_i −
y_j).  For a GOE change, free of Y, Tr δS²/D is Tr δY²/D times the mean square of these quotients
over the law μ of Y (docs/theory.md, section 6); the mean of the quotients themselves is V.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_theory.laws import Law
from lora_theory.theory.bands import curve, real_bands
from lora_theory.theory.compilation import quickly_compiled
from lora_theory.theory.convolution import boundary
from lora_theory.theory.pretraining import Constants
from lora_theory.theory.regularizers import NarrowFactor

__all__ = ["law_nodes", "spectral_divergence", "squared_divergence"]

# double-exponential rule: its parameter ends where nodes are within 1e-12 of the ends
_LONGEST, _POINTS = 2.9, 64
# where the band of an unbounded law is cut, in units of δ
_TAIL = 2.0 ** np.arange(-1, 5)
Grid = Float[np.ndarray, " n"]


def squared_divergence(points: Grid, weights: Grid, values: Grid, slopes: Grid) -> float:
    """∬((s(x) − s(y))/(x − y))² μ(dx)μ(dy) on nodes of μ (docs/theory.md, section 6).

    Finite for Lipschitz s.  Where s jumps it is infinite, as the logarithm of the distance between
    nodes, and the value has no meaning.

    Args:
        points: nodes x. weights: of μ at them. values: s(x). slopes: s'(x), for x = y.

    Example:
        >>> x = np.array([1.0, 3.0])
        >>> squared_divergence(x, np.array([0.5, 0.5]), 2 * x, np.array([2.0, 2.0]))
        4.0
    """
    gap, rise = points[:, None] - points[None], values[:, None] - values[None]
    tangent = 0.5 * (slopes[:, None] + slopes[None])
    quotient = np.where(gap == 0, tangent, rise / np.where(gap == 0, 1.0, gap))
    return float(weights @ quotient**2 @ weights)


def law_nodes(delta: float, law: Law, corners: Sequence[float] = ()) -> tuple[Grid, Grid]:
    """Nodes and weights of μ_δ = law(S0) ⊞ semicircle(δ²), fine towards edges and ``corners``.

    A double-exponential rule on every band of the curve of the free convolution, between the
    corners of s on it: it converges exponentially whatever happens at the ends.  Call it in the
    64-bit scope.

    Args:
        delta: δ. law: of S0. corners: x at which s is not smooth.

    Example:
        >>> from lora_theory.laws import Wishart
        >>> with jax.enable_x64(True):
        ...     x, weights = law_nodes(0.1, Wishart(0.25))  # a band around 0 and one above
        >>> bool(abs(weights.sum() - 1) < 1e-9), bool(abs(weights[x < 0.3].sum() - 0.75) < 1e-9)
        (True, True)
    """
    cuts = [float(_boundary(jnp.asarray(x), jnp.asarray(delta), law)) for x in corners]
    parts = []
    for left, right in real_bands(delta, law):
        ends = [u for u in cuts if left < u < right]
        if math.isinf(right):  # a bulk, a knee and a tail
            ends += [left + delta * part for part in _TAIL]
        inner = sorted(ends)
        parts += [_rule(a, b, delta) for a, b in pairwise([left, *inner, right])]
    u, steps = np.concatenate(parts, axis=1)
    x, density, rate = map(np.asarray, curve(jnp.asarray(u), jnp.asarray(delta), law))
    inside = (density > 0) & np.isfinite(rate)
    return x[inside], (steps * density * rate)[inside]


def _rule(left: float, right: float, scale: float) -> Float[np.ndarray, "2 points"]:
    """Double-exponential nodes and weights from ``left`` to ``right``, either of them infinite."""
    if math.isinf(left):
        mirrored = _rule(-right, math.inf, scale)
        return np.stack([-mirrored[0], mirrored[1]])
    t = np.linspace(-_LONGEST, _LONGEST, _POINTS)
    inner, slope = np.pi / 2 * np.sinh(t), np.pi / 2 * np.cosh(t) * (t[1] - t[0])
    if math.isinf(right):
        return np.stack([left + scale * np.exp(inner), scale * np.exp(inner) * slope])
    half = (right - left) / 2
    return np.stack([left + half * (1 + np.tanh(inner)), half * slope / np.cosh(inner) ** 2])


@quickly_compiled()
def _boundary(x: Array, delta: Array, law: Law) -> Array:
    return boundary(x, delta, law).real


@quickly_compiled()
def _shrunk(y: Array, unknowns: Array, constants: Constants) -> tuple[Array, Array]:
    """s and s' at y."""
    V_hat = jnp.exp(unknowns[2])
    return jax.jvp(lambda y: constants.regularizer.shrink(y, V_hat), (y,), (jnp.ones_like(y),))


@quickly_compiled()
def _dead_zone(unknowns: Array, constants: Constants) -> tuple[Array, Array]:
    Q_hat, M_hat, _ = jnp.exp(unknowns)
    return constants.regularizer.dead_zone(Q_hat, constants.teacher_scale * M_hat, constants.law)


def spectral_divergence(unknowns: Float[np.ndarray, " 3"], constants: Constants) -> float:
    """The double integral for s = f/V̂ of the penalty and the law of the teacher.

    For weight decay: (kept share)²/V̂² and, from both orders of a kept x and a dropped y, twice the
    mean of ((x − ε)/(x − y))²/V̂², a square that has no limit at x = y = ε.  Infinite where a narrow
    factor cuts the rank: f jumps there.  Call it in the 64-bit scope.

    Args:
        unknowns: log(Q̂, M̂, V̂). constants: of the problem.

    Example:
        >>> from lora_theory import Pretraining, Problem
        >>> constants = Constants.of(Problem(
        ...     tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        ...     pretraining=Pretraining(samples=0.2, penalty=2.0, regularizer="frobenius"),
        ... ))
        >>> with jax.enable_x64(True):  # S = Y/(V̂ + 2λ), every quotient is 1/5
        ...     round(spectral_divergence(np.zeros(3), constants), 6)
        0.04
    """
    Q_hat, M_hat, _ = np.exp(unknowns)
    signal = float(constants.teacher_scale * M_hat)  # Y = signal·(S0 + δZ)
    kind = constants.regularizer
    dead = [float(end) for end in _dead_zone(jnp.asarray(unknowns), constants)]
    if isinstance(kind, NarrowFactor) and dead[1] > 2 * float(kind.decay.scaled_penalty):
        return math.inf
    corners = [y / signal for y in dead if math.isfinite(y) and dead[0] < dead[1]]
    x, weights = law_nodes(math.sqrt(Q_hat) / signal, constants.law, corners)
    y = signal * x
    values, slopes = map(np.asarray, _shrunk(jnp.asarray(y), jnp.asarray(unknowns), constants))
    return squared_divergence(y, weights, values, slopes)
