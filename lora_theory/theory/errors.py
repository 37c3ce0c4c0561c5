"""Test errors of both stages at given order parameters: averages that need no proximal operator.

The rows of σ are alike, so one row does: for softmax its T − 1 differences of logits.  These smooth
averages of few dimensions have nodes of their own, many more than the equations can afford
(docs/theory.md, section 5).
"""

from __future__ import annotations

from typing import NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_theory.compilation import quickly_compiled
from lora_theory.theory.nodes import gaussian_blocks

__all__ = ["Errors", "OrderParameters", "effective_noise"]

_POINTS, _SEED = 16384, 2
_Numbers = TypeVar("_Numbers", Array, np.ndarray)


def effective_noise(Q: _Numbers, M: _Numbers, label_variance: float) -> _Numbers:
    """Δ_eff = Q0 + Δ/2 − 2M + Q of linear attention (docs/theory.md, section 4)."""
    noise: _Numbers = label_variance - 2 * M + Q
    return noise


class OrderParameters(NamedTuple):
    """Where the errors are wanted, one value per block of nodes; q = m = 0 without fine-tuning."""

    Q: Float[np.ndarray, " R"]
    M: Float[np.ndarray, " R"]
    q: Float[np.ndarray, " R"]
    m: Float[np.ndarray, " R"]

    @classmethod
    def same(cls, Q: float, M: float, q: float, m: float, blocks: int) -> Self:
        """One point for all blocks."""
        return cls(*(np.full(blocks, float(value)) for value in (Q, M, q, m)))


@quickly_compiled("tokens")
def _softmax_error(
    nodes: Float[Array, "R d points"],
    at: OrderParameters,
    label_variance: Array,
    signal: Array,
    tokens: int,
) -> Float[Array, " R"]:
    # differences h_1b − h_11, b > 1, have covariance 1 + 1 from h_11 twice: δ_bc + 2
    factor = jnp.asarray(np.linalg.cholesky(np.eye(tokens - 1) + 2))

    def one(nodes: Array, Q: Array, M: Array, q: Array, m: Array) -> Array:
        k = tokens - 1
        label = jnp.sqrt(label_variance) * (factor @ nodes[:k])
        spread = jnp.sqrt(jnp.maximum(Q - M**2 / label_variance, 0.0))
        student = M / label_variance * label + spread * (factor @ nodes[k : 2 * k])
        star = jnp.sqrt(signal) * nodes[2 * k : 2 * k + tokens]
        safe = jnp.where(signal > 0, signal, 1.0)
        spread = jnp.sqrt(jnp.maximum(q - m**2 / safe, 0.0))
        chi = m / safe * star + spread * nodes[2 * k + tokens :]

        def row(differences: Array, chi: Array, norm: Array) -> Array:
            lifted = differences + chi[:1] * chi[1:] - chi[:1] ** 2 + norm
            return jax.nn.softmax(jnp.pad(lifted, ((1, 0), (0, 0))), axis=0)

        gap = row(label, star, signal) - row(student, chi, q)
        return tokens * jnp.mean(jnp.sum(gap**2, axis=0))

    arrays = (jnp.asarray(part) for part in at)
    return jax.vmap(one)(nodes, *arrays)


class Errors:
    """Test errors, label noise included, for one value of the order parameters per block.

    Args:
        label_variance: Q_y = Q0 + Δ/2. blocks, seed: of the nodes, as in the equations.
    """

    def __init__(
        self, activation: str, tokens: int, label_variance: float, *, blocks: int, seed: int
    ) -> None:
        self._tokens, self._label_variance = tokens, label_variance
        self._nodes = None
        if activation == "softmax":
            self._nodes = gaussian_blocks(4 * tokens - 2, _POINTS, blocks, seed + _SEED)

    def at(self, point: OrderParameters, signal: float) -> Float[np.ndarray, " R"]:
        """E' of a task of strength q0 = ``signal``; with q0 = q = m = 0 this is E.

        Linear: ((T+1)/T)(Δ_eff + q0² + q² − 2m²), exact (docs/theory.md, section 4).
        """
        if self._nodes is None:
            noise = effective_noise(point.Q, point.M, self._label_variance)
            value = noise + signal**2 + point.q**2 - 2 * point.m**2
            return np.asarray((self._tokens + 1) / self._tokens * value)
        return np.asarray(
            _softmax_error(self._nodes, point, self._label_variance, signal, self._tokens)
        )
