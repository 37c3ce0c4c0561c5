"""Nodes of the spectral law of S0 + δZ, for integrals of functions that are not analytic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Complex, Float

from lora_theory.laws import Law
from lora_theory.theory.bands import curve, point_below, real_bands

__all__ = ["LawNodes", "law_nodes"]

# double-exponential rule: its parameter ends where nodes are within 1e-12 of the ends
_LONGEST, _POINTS = 3.2, 128
# where the band of an unbounded law is cut, in units of δ
_TAIL = 2.0 ** np.arange(-1, 5)
# a part of |G| below which Im G is rounding
_ROUNDING = 1e-15
Grid = Float[np.ndarray, " n"]


class LawNodes(NamedTuple):
    """Nodes of μ_δ: ∫g(x)μ_δ(dx) is the sum of g over them with the weights.

    The last nodes are the corners that were given, in their order, with weight 0.
    """

    x: Grid
    weights: Grid
    transform: Complex[np.ndarray, " n"]  # G(x), whose imaginary part is −π times the density


def law_nodes(delta: float, law: Law, corners: Sequence[float] = ()) -> LawNodes:
    """Nodes of μ_δ = law(S0) ⊞ semicircle(δ²), fine towards its edges and the ``corners``.

    A double-exponential rule on every band of the curve of the free convolution, between the
    corners on it: it converges exponentially whatever happens at the ends.  Call it in the
    64-bit scope.

    Args:
        delta: δ. law: of S0. corners: x at which the integrand is not smooth.

    Example:
        >>> import jax
        >>> from lora_theory.laws import Wishart
        >>> with jax.enable_x64(True):
        ...     nodes = law_nodes(0.1, Wishart(0.25))  # a band around 0 and one above
        >>> below = nodes.weights[nodes.x < 0.3].sum()
        >>> bool(abs(nodes.weights.sum() - 1) < 1e-9), bool(abs(below - 0.75) < 1e-9)
        (True, True)
    """
    at_corners = [point_below(x, delta, law) for x in corners]
    # where ρ itself is not smooth, μ_δ bends sharply
    own = law.bands()
    sharp = [end for band in own for end in band if math.isfinite(end)]
    sharp += [(left + right) / 2 for (_, left), (right, _) in pairwise(own)]
    cuts = [*at_corners, *sharp]
    parts = []
    bands = real_bands(delta, law)
    for left, right in bands:
        ends = [u for u in set(cuts) if left < u < right]
        if math.isinf(right):  # a bulk, a knee and a tail
            ends += [left + delta * part for part in _TAIL]
        inner = sorted(ends)
        parts += [_rule(a, b, delta) for a, b in pairwise([left, *inner, right])]
    parts.append(np.stack([np.array(at_corners), np.zeros(len(corners))]))
    u, steps = np.concatenate(parts, axis=1)
    x, density, rate, G = map(np.asarray, curve(jnp.asarray(u), jnp.asarray(delta), law))
    if math.isinf(max(map(abs, bands[0] + bands[-1]))):  # η is too small to be found far out
        seen = -G.imag > _ROUNDING * np.abs(G)
        density = np.where((density == 0) & seen, -G.imag / np.pi, density)
    weights = np.where((density > 0) & np.isfinite(rate), steps * density * rate, 0.0)
    return LawNodes(x, weights, G.real - 1j * np.pi * density)


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
