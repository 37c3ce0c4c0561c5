"""Spectrum of S0 + δZ for any law ρ of S0: its free convolution μ_δ with a semicircle.

G(x) = G0(w) with x = w + δ²G0(w).  As x runs along the real axis, w runs along the curve in the
closed upper half plane below which ∫ρ(ds)/|w − s|² > 1/δ² (Biane, Indiana Univ. Math. J. 46, 1997):
a bisection finds it, no root has to be chosen.  Tail moments are integrals of G0 from that curve to
the real axis outside of all spectra: no edge, band or density is looked for (docs/theory.md,
section 2.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from lora_theory.laws import Law

__all__ = ["boundary", "free_convolution", "height", "quantile", "tail_moment"]

_HALVINGS = 44
#: η below this part of δ counts as 0: w is on the real axis, outside of the support.
_SMALLEST = 1e-9
#: Panels on a path, narrower towards its start, where G0 may have its singularities nearby.
_ENDS = np.concatenate([[0.0], 0.25 ** np.arange(12, 0, -1), [0.5, 1.0]])
_GAUSS = np.polynomial.legendre.leggauss(16)


def free_convolution(
    x: Float[Array, ""], delta: Float[Array, ""], law: Law
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Real part and density −Im/π of G(x + i0) for μ_δ; scalars (vmap for arrays).

    Example:
        >>> from lora_theory.laws import GOE
        >>> with jax.enable_x64(True):  # two semicircles make a semicircle, here of variance 2
        ...     real, density = free_convolution(0.5, 1.0, GOE())
        ...     bool(abs(density - np.sqrt(8 - 0.25) / (4 * np.pi)) < 1e-9)
        True
    """
    x, delta = jnp.asarray(x, dtype=float), jnp.asarray(delta, dtype=float)
    w = boundary(x, delta, law)
    return (x - w.real) / delta**2, w.imag / (jnp.pi * delta**2)


def boundary(x: Float[Array, ""], delta: Float[Array, ""], law: Law) -> Complex[Array, ""]:
    """w(x), the point of the curve with w + δ²G0(w) = x."""

    def right(w: Array) -> Array:
        return (w + delta**2 * law.stieltjes(w)).real < x

    # |x − Re w| = δ²|Re G| ≤ δ
    return _on_curve(right, x - delta, x + delta, delta, law)


def _on_curve(
    right: Callable[[Array], Array], low: Array, high: Array, delta: Array, law: Law
) -> Array:
    """The point of the curve where ``right`` changes from true to false."""

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        further = right(middle + 1j * height(middle, delta, law))
        return jnp.where(further, middle, low), jnp.where(further, high, middle)

    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (low, high))
    u = (low + high) / 2
    return u + 1j * height(u, delta, law)


def height(u: Float[Array, ""], delta: Float[Array, ""], law: Law) -> Float[Array, ""]:
    """η(u) of the point w = u + iη of the curve, ∫ρ(ds)/|w − s|² = 1/δ²; 0 where it is less."""

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        eta = delta * jnp.exp(middle)
        over = -law.stieltjes(u + 1j * eta).imag * delta**2 < eta
        return jnp.where(over, low, middle), jnp.where(over, middle, high)

    lowest = jnp.log(_SMALLEST)
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (lowest, jnp.zeros_like(lowest)))
    return jnp.where(low == lowest, 0.0, delta * jnp.exp((low + high) / 2))


def tail_moment(
    start: Complex[Array, ""],
    x: Float[Array, ""],
    delta: Float[Array, ""],
    law: Law,
    *,
    order: int,
    left: bool = False,
) -> Float[Array, ""]:
    """∫_x^∞ (t − x)^n μ_δ(dt), n = ``order`` ≤ 2, or ∫_−∞^x (x − t)^n μ_δ(dt) if ``left``.

    Im∫(x(w) − x)^{n+1} G0'(w) dw/((n + 1)π), by parts, from ``start`` = w(x) to the real axis.
    Differentiable in x, δ and the law n times: the integrand vanishes at the start, which is held.

    Example:
        >>> from lora_theory.laws import Wishart
        >>> with jax.enable_x64(True):
        ...     delta, law = jnp.asarray(0.5), Wishart(0.5)
        ...     start = boundary(jnp.asarray(-5.0), delta, law)
        ...     whole = tail_moment(start, jnp.asarray(-5.0), delta, law, order=1)
        ...     bool(abs(whole - (0.5**0.5 + 5)) < 1e-12)  # all of μ lies beyond −5
        True
    """
    side = -1 if left else 1
    outer = law.edges()[0 if left else 1]
    if isinstance(outer, float) and math.isinf(outer):
        mean, second = law.moments()
        whole = (1.0, side * (mean - x), second + delta**2 - 2 * x * mean + x**2)[order]
        other = tail_moment(start, x, delta, law, order=order, left=not left)
        rest: Array = whole - (-1) ** order * other
        return rest
    path, steps = jax.lax.stop_gradient(_path(start, jnp.asarray(outer), side, delta))
    transform, slope = jax.jvp(law.stieltjes, (path,), (jnp.ones_like(path),))
    distance = side * (path + delta**2 * transform - x)
    moment: Array = jnp.sum(distance ** (order + 1) * slope * steps).imag / ((order + 1) * jnp.pi)
    return moment


def _path(
    start: Complex[Array, ""], outer: Float[Array, ""], side: int, delta: Float[Array, ""]
) -> tuple[Complex[Array, " n"], Complex[Array, " n"]]:
    """Points and dw of an arc above the real axis, from ``start`` to beyond the spectra."""
    ahead = side * (outer - start.real)
    # beyond the spectrum of S0 the integrand is real on the axis: straight down cancels least
    down = -ahead > 2 * start.imag
    reach = jnp.where(down, 0.0, 2 * (jnp.maximum(ahead, 0.0) + 2 * delta))
    chord = side * reach - 1j * start.imag
    middle, half = (_ENDS[1:] + _ENDS[:-1]) / 2, (_ENDS[1:] - _ENDS[:-1]) / 2
    t = (middle[:, None] + half[:, None] * _GAUSS[0]).ravel()
    weights = (half[:, None] * _GAUSS[1]).ravel()
    bulge = 2j * reach
    return start + chord * t + bulge * t * (1 - t), weights * (chord + bulge * (1 - 2 * t))


def quantile(
    share: Float[Array, ""], delta: Float[Array, ""], law: Law
) -> tuple[Float[Array, ""], Complex[Array, ""]]:
    """The x beyond which μ_δ has a share, differentiable once, and w(x)."""
    mean, second = law.moments()
    fixed, wanted = jax.lax.stop_gradient(delta), jax.lax.stop_gradient(share)

    def beyond(w: Array, delta: Array) -> Array:
        x = (w + delta**2 * law.stieltjes(w)).real
        return tail_moment(w, jax.lax.stop_gradient(x), delta, law, order=0)

    # by Chebyshev's inequality, and |x − u| ≤ δ
    far = jnp.sqrt((second + fixed**2) / jnp.minimum(wanted, 1 - wanted)) + fixed
    w = _on_curve(
        lambda w: beyond(w, fixed) > wanted, mean - far, mean + far, fixed, law
    )  # fmt: skip
    w = jax.lax.stop_gradient(w)
    density = w.imag / (jnp.pi * fixed**2)
    x = jax.lax.stop_gradient((w + fixed**2 * law.stieltjes(w)).real)
    moved = tail_moment(w, x, delta, law, order=0) - share
    return x + (moved - jax.lax.stop_gradient(moved)) / density, w
