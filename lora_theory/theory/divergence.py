"""How a spectral map s(Y) of Y = M̂S0 + √Q̂Z spreads a random change of Y: ∬((s(x)−s(y))/(x−y))².

In the eigenbasis of Y a map of its eigenvalues has the derivative δS_ij = δY_ij (s_i − s_j)/(y_i −
y_j).  For a GOE change, free of Y, Tr δS²/D is Tr δY²/D times the mean square of these quotients
over the law μ of Y (docs/theory.md, section 6); the mean of the quotients themselves is V.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_theory.compilation import quickly_compiled
from lora_theory.theory.correlated import correlated_divergence
from lora_theory.theory.law_nodes import law_nodes
from lora_theory.theory.weights import Constants, kept_at

__all__ = ["spectral_divergence", "squared_divergence"]

#: Pairs of nodes that are held at a time.
_PAIRS = 2**20

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
    total, step = 0.0, max(1, _PAIRS // len(points))
    for first in range(0, len(points), step):
        some = slice(first, first + step)
        gap, rise = points[some, None] - points[None], values[some, None] - values[None]
        tangent = 0.5 * (slopes[some, None] + slopes[None])
        quotient = np.where(gap == 0, tangent, rise / np.where(gap == 0, 1.0, gap))
        total += float(weights[some] @ quotient**2 @ weights)
    return total


@quickly_compiled()
def _shrunk(y: Array, unknowns: Array, constants: Constants) -> tuple[Array, Array]:
    """s and s' at y."""
    V_hat = jnp.exp(unknowns[2])
    return jax.jvp(lambda y: constants.regularizer.shrink(y, V_hat), (y,), (jnp.ones_like(y),))


def spectral_divergence(unknowns: Float[np.ndarray, " 3"], constants: Constants) -> float:
    """The double integral for s = f/V̂ of the penalty and the law of the teacher.

    For weight decay: (kept share)²/V̂² and, from both orders of a kept x and a dropped y, twice the
    mean of ((x − ε)/(x − y))²/V̂², a square that has no limit at x = y = ε.  Infinite where s jumps,
    as where a narrow factor cuts the rank.  Call it in the 64-bit scope.

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
    if constants.correlated is not None:
        return correlated_divergence(unknowns, constants.teacher_scale, constants.correlated)
    Q_hat, M_hat, _ = np.exp(unknowns)
    signal = float(constants.teacher_scale * M_hat)  # Y = signal·(S0 + δZ)
    kept = kept_at(unknowns, constants)
    if kept.jumps:
        return math.inf
    corners = [y / signal for y in kept.corners]
    x, weights, _ = law_nodes(math.sqrt(Q_hat) / signal, constants.law, corners)
    y = signal * x
    values, slopes = map(np.asarray, _shrunk(jnp.asarray(y), jnp.asarray(unknowns), constants))
    return squared_divergence(y, weights, values, slopes)
