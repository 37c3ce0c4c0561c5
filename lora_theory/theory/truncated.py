"""Truncation of the trained matrix: Ŝ = s(Y), of which a share of the eigenvalues is kept.

Y has the law of M̂(S0 + δZ).  Of s_t, which is s where the largest |s| are and 0 elsewhere,

    Q' = ∫s_t²,  M' = ∫s_t(y − 2Q̂ Re G)/M̂,  V' = 2∫s_t Re G = ∬(s_t(x) − s_t(y))/(x − y)

(docs/theory.md, section 2.8).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_theory.compilation import quickly_compiled
from lora_theory.laws import Law
from lora_theory.theory.convolution import quantile
from lora_theory.theory.law_nodes import law_nodes
from lora_theory.theory.weights import Constants, Kept, kept_at

__all__ = ["Truncated", "truncated_at"]

#: Of the share that is kept above; a part of it this small is rounding.
_HALVINGS, _NONE = 44, 1e-10


class Truncated(NamedTuple):
    """Order parameters of the matrix that is left, and what is left of the spectrum."""

    Q: float
    M: float
    V: float
    kept: Kept


@quickly_compiled()
def _thresholds(
    share: Array, signal: Array, V_hat: Array, delta: Array, law: Law, constants: Constants
) -> tuple[Array, Array]:
    """The y below and above which eigenvalues are kept, of equal |s|; s(y) does not decrease."""

    def ends(above: Array) -> tuple[Array, Array]:
        """The y with this share above, and the rest of ``share`` below."""
        inside = jnp.clip(jnp.stack([above, 1 - (share - above)]), 1e-15, 1 - 1e-15)
        x = jax.lax.map(lambda part: quantile(part, delta, law)[0], inside)
        return signal * x[1], signal * x[0]

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = (low + high) / 2
        sizes = constants.regularizer.shrink(jnp.stack(ends(middle)), V_hat)
        more = sizes[0] + sizes[1] > 0  # what is kept above is the larger one
        return jnp.where(more, middle, low), jnp.where(more, high, middle)

    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (jnp.zeros_like(share), share))
    alone = low < share * _NONE, high > share * (1 - _NONE)  # of one sign only
    above = jnp.where(alone[0], 0.0, jnp.where(alone[1], share, low))
    below, beyond = ends(above)
    return jnp.where(alone[1], -jnp.inf, below), jnp.where(alone[0], jnp.inf, beyond)


@quickly_compiled()
def _shrunk(y: Array, V_hat: Array, constants: Constants) -> Array:
    return constants.regularizer.shrink(y, V_hat)


def truncated_at(
    unknowns: Float[np.ndarray, " 3"], constants: Constants, share: float
) -> Truncated | None:
    """What truncation to a share of the eigenvalues leaves at log(Q̂, M̂, V̂).

    None where no more than that share is learnt.  Call it in the 64-bit scope.

    Args:
        unknowns: log(Q̂, M̂, V̂). constants: of the problem. share: ρᵣ, of D.

    Example:
        >>> from lora_theory import Pretraining, Problem
        >>> constants = Constants.of(Problem(
        ...     tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        ...     pretraining=Pretraining(samples=0.2, penalty=1.0, regularizer="frobenius"),
        ... ))
        >>> with jax.enable_x64(True):
        ...     half = truncated_at(np.zeros(3), constants, 0.5)
        >>> low, high = half.kept.dead_zone
        >>> abs(low + high) < 1e-9  # of either sign, by size
        True
    """
    kept = kept_at(unknowns, constants)
    if share >= kept.rank:
        return None
    Q_hat, M_hat, V_hat = np.exp(unknowns)
    signal = float(constants.teacher_scale * M_hat)
    delta, law = math.sqrt(Q_hat) / signal, constants.law
    numbers = (jnp.asarray(part) for part in (share, signal, V_hat, delta))
    low, high = map(float, _thresholds(*numbers, law, constants))
    corners = [y / signal for y in {*kept.corners, low, high} if math.isfinite(y)]
    x, weights, transform = law_nodes(delta, law, corners)
    # nodes do not lie on the corners themselves
    left = (signal * x <= low) | (signal * x >= high)
    s = np.where(
        left, np.asarray(_shrunk(jnp.asarray(signal * x), jnp.asarray(V_hat), constants)), 0
    )
    Q = float(weights @ s**2)
    M = constants.teacher_scale * float(weights @ (s * (x - 2 * delta**2 * transform.real)))
    V = 2 * float(weights @ (s * transform.real)) / signal
    bends = tuple(y for y in kept.corners if not low < y < high)
    ends = tuple(y for y in (low, high) if math.isfinite(y))
    return Truncated(Q, M, V, Kept(share, (low, high), bends + ends, True))
