"""Penalties on other forms of the factor: its nuclear norm, and the weights under a polynomial.

Both are functions of the eigenvalues of S, neither is convex (docs/theory.md, section 2.8).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_theory.lowrank.polynomials import PRECONDITIONING, of_numbers
from lora_theory.theory.separable import Numerical

__all__ = ["LowRankDecay", "Preconditioned"]

#: 4, less what keeps the slope of a vanishing minimum finite.
_LAST = 4 - 1e-9
#: A bound of t² where y ≤ 0.
_SMALLEST = 1e-12
#: Grid of t, minima that are followed, rounds that narrow each, points per round, Newton's steps.
_POINTS, _CANDIDATES, _ROUNDS, _FINE, _NEWTON = 257, 3, 8, 17, 3


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["strength"], meta_fields=["metastable"]
)
@dataclass(frozen=True)
class LowRankDecay(Numerical):
    """λ√D‖W‖_* on the factor: R(s) = r√s for s ≥ 0, r = κ^{1/4}λ, a Schatten-½ penalty on S.

    s jumps from 0 to 2y_c/(3V̂) at y_c = 3(V̂r²/2)^{1/3}; above, √s is the largest root of
    V̂u³ − yu + r = 0.  This root is a local minimum down to y = 3(V̂r²/4)^{1/3}: ``metastable``
    eigenvalues, which come from larger ones, vanish only there.
    """

    strength: float | Array  # r
    metastable: bool = False

    def shrink(self, y: Float[Array, "..."], V_hat: Float[Array, ""]) -> Float[Array, "..."]:
        """s(y)."""
        threshold = 3 * jnp.cbrt(V_hat * self.strength**2 / (_LAST if self.metastable else 2))
        kept = y > jax.lax.stop_gradient(threshold)
        third = jnp.where(kept, y, jax.lax.stop_gradient(threshold)) / (3 * V_hat)
        cosine = -self.strength / (2 * V_hat) * third**-1.5
        root = 2 * jnp.sqrt(third) * jnp.cos(jnp.arccos(cosine) / 3)
        return jnp.where(kept, root**2, 0.0)

    def lowest(
        self, y: Float[Array, "..."], s: Float[Array, "..."], V_hat: Float[Array, ""]
    ) -> Float[Array, "..."]:
        """V̂s²/4 − ys/2 + r√s."""
        return V_hat * s**2 / 4 - y * s / 2 + self.strength * jnp.sqrt(s)


def _first_maximum(coefficients: tuple[float, ...]) -> float:
    """The t > 0 up to which Σ c_i t^{2i+1} grows."""
    slope = np.polynomial.Polynomial([(2 * i + 1) * c for i, c in enumerate(coefficients)])
    squares = np.asarray(slope.roots())
    return float(np.sqrt(squares.real[(squares.imag == 0) & (squares.real > 0)].min()))


class _Preimage(NamedTuple):
    t: Float[Array, " n"]
    cost: Float[Array, " n"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["penalty", "scale"], meta_fields=["degree"]
)
@dataclass(frozen=True)
class Preconditioned(Numerical):
    """λ‖W̃‖²_F, where W = σ̂ g_d(W̃/σ̂) with a fixed σ̂: R(s) = √κ λ ŝ t², ŝ g_d(t)² = s.

    t = σ̃/σ̂ stays below the first maximum of g_d, which a descent from small W̃ does not cross: no
    s exceeds ŝ max g_d², about ŝ.  Larger t, where g_d grows again, may cost less.
    """

    degree: int
    penalty: float | Array  # √κ λ ŝ
    scale: float | Array  # ŝ

    def shrink(self, y: Float[Array, "..."], V_hat: Float[Array, ""]) -> Float[Array, "..."]:
        """s(y)."""
        t = self._preimage(jnp.ravel(y), V_hat).t
        s: Array = self.scale * of_numbers(t, PRECONDITIONING[self.degree]) ** 2
        return s.reshape(jnp.shape(y))

    def lowest(
        self, y: Float[Array, "..."], s: Float[Array, "..."], V_hat: Float[Array, ""]
    ) -> Float[Array, "..."]:
        """V̂s²/4 − ys/2 + √κ λ ŝ t²."""
        return self._preimage(jnp.ravel(y), V_hat).cost.reshape(y.shape)

    def _preimage(self, y: Float[Array, " n"], V_hat: Float[Array, ""]) -> _Preimage:
        """The t ≥ 0 of least cost: of a grid the lowest minima, narrowed down and polished."""
        c = PRECONDITIONING[self.degree]

        def cost(t: Array, y: Array, V_hat: Array) -> Array:
            s: Array = self.scale * of_numbers(t, c) ** 2
            return V_hat * s**2 / 4 - y * s / 2 + self.penalty * t**2

        held, stiff = jax.lax.stop_gradient((y, V_hat))
        if self.degree == 1:  # the cost is negative at most up to s = 2y/V̂
            bound = 2 * jnp.maximum(held, 0.0) / (stiff * jax.lax.stop_gradient(self.scale))
            reach = jnp.sqrt(jnp.maximum(bound, _SMALLEST))
        else:
            reach = jnp.full_like(held, _first_maximum(c))
        grid = reach * jnp.linspace(0, 1, _POINTS, dtype=held.dtype)[:, None]
        costs = cost(grid, held, stiff)
        inner = jnp.pad(costs, ((1, 1), (0, 0)), constant_values=jnp.inf)
        minima = jnp.where((costs <= inner[:-2]) & (costs <= inner[2:]), costs, jnp.inf)
        places = jax.lax.top_k(-minima.T, _CANDIDATES)[1].T
        fine = jnp.linspace(-1, 1, _FINE, dtype=held.dtype)[:, None]

        def narrow(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
            t, width = state
            near = jnp.clip(t[:, None] + width * fine, 0.0, reach)
            best = jnp.argmin(cost(near, held, stiff), axis=1)
            return jnp.take_along_axis(near, best[:, None], axis=1)[:, 0], width * 2 / (_FINE - 1)

        begin = jnp.take_along_axis(grid, places, axis=0), reach / (_POINTS - 1)
        t, _ = jax.lax.fori_loop(0, _ROUNDS, narrow, begin)
        best = jnp.argmin(cost(t, held, stiff), axis=0)
        t = jnp.take_along_axis(t, best[None], axis=0)[0]
        slope = jax.vmap(jax.grad(cost), in_axes=(0, 0, None))
        bend = jax.vmap(jax.grad(jax.grad(cost)), in_axes=(0, 0, None))

        def newton(t: Array, y: Array, V_hat: Array) -> Array:
            curvature = jax.lax.stop_gradient(bend(t, y, V_hat))
            usable = curvature > 0
            step = slope(t, y, V_hat) / jnp.where(usable, curvature, 1.0)
            return t - jnp.where(usable, step, 0.0)

        for _ in range(_NEWTON):
            t = newton(t, held, stiff)
        # below this y the minimum is at 0
        t = jnp.where(held * self.scale * c[0] ** 2 > 2 * self.penalty, t, 0.0)
        t = jax.lax.stop_gradient(t)
        return _Preimage(newton(t, y, V_hat), cost(t, y, V_hat))
