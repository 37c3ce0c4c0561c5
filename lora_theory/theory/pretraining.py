"""State evolution of pre-training: order parameters Q, M, V and their conjugates.

One function per equation of docs/theory.md, section 2.  The equations on fixed nodes are exactly
the stationarity conditions of the potential Φ on the same nodes, jumps of the proximal operator
included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_theory.attention import attention
from lora_theory.compilation import quickly_compiled
from lora_theory.theory.averages import BlockValues, Equations
from lora_theory.theory.errors import effective_noise
from lora_theory.theory.fields import field_basis, to_fields
from lora_theory.theory.newton import inverse_trace
from lora_theory.theory.proximal import (
    Proximal,
    softmax_field_minima,
    softmax_field_proximal,
)
from lora_theory.theory.roots import log_ratio
from lora_theory.theory.weights import Channel, Constants, LastWeights, Weights

__all__ = [
    "OBSERVABLES",
    "SMALLEST_SPREAD",
    "SMALLEST_VARIANCE",
    "Labels",
    "LinearPretraining",
    "SoftmaxPretraining",
    "block_means",
    "frozen_coordinates",
    "paired",
    "relaxation",
    "smooth_response",
    "with_jacobian",
]

#: Order of the observables in :class:`~lora_theory.theory.averages.BlockValues`.
OBSERVABLES = (
    "Q", "M", "V", "Q_hat", "M_hat", "V_hat",
    "potential", "train_error", "overlap", "jump_mass",
)  # fmt: skip

# floors that keep the equations finite where the weights vanish: S² and V
SMALLEST_SPREAD, SMALLEST_VARIANCE = 1e-12, 1e-9
_EPSILON = float(np.finfo(float).eps)


def paired(
    kept: Float[Array, "k nodes"], mirrored: Float[Array, "n nodes"]
) -> tuple[Float[Array, "k 2*nodes"], Float[Array, "n 2*nodes"]]:
    """Each node twice, the second time with the mirrored part negated."""
    return jnp.concatenate([kept, kept], axis=1), jnp.concatenate([mirrored, -mirrored], axis=1)


def frozen_coordinates(
    label_noise: Float[Array, "n nodes"],
    frozen_noise: Float[Array, "n nodes"],
    Q: Float[Array, ""],
    M: Float[Array, ""],
    label_variance: float | Float[Array, ""],
) -> tuple[Float[Array, "n nodes"], Float[Array, "n nodes"], Float[Array, ""]]:
    """z^y = √Q_y g1, z = (M/Q_y) z^y + S g2 and S, S² = Q − M²/Q_y (docs/theory.md, section 5)."""
    spread = jnp.sqrt(jnp.maximum(Q - M**2 / label_variance, SMALLEST_SPREAD))
    label = jnp.sqrt(jnp.asarray(label_variance)) * label_noise
    return label, M / label_variance * label + spread * frozen_noise, spread


class Labels(NamedTuple):
    """Pre-training nodes of softmax attention, each of them once: the mirror image is implied."""

    label_noise: Float[Array, "n nodes"]  # g1
    frozen_noise: Float[Array, "n nodes"]  # g2, the part that is mirrored


def block_means(values: Float[Array, " 2*nodes"], blocks: int) -> Float[Array, " blocks"]:
    """Means over each of the blocks that lie one after another in both halves of the nodes."""
    return jnp.mean(values.reshape(2, blocks, -1), axis=(0, 2))


def with_jacobian(
    rows: Callable[[Array], Array], unknowns: Array
) -> tuple[Float[Array, "blocks n+K"], Float[Array, "n+K n"]]:
    """Rows of residuals and observables by block, and the Jacobian of their mean."""

    def mean_and_all(x: Array) -> tuple[Array, Array]:
        found = rows(x)
        return jnp.mean(found, axis=0), found

    jacobian, found = jax.jacfwd(mean_and_all, has_aux=True)(unknowns)
    return found, jacobian


def smooth_response(prox: Proximal) -> Float[Array, " nodes"]:
    """tr(I − ∂u/∂ω), not differentiated: its mean over v is the Stein form, blind to jumps."""
    return prox.point.shape[0] - inverse_trace(jax.lax.stop_gradient(prox.hessian))


class _Output(NamedTuple):
    """New conjugates and averages at given (Q, M, V), one entry per block."""

    Q_hat: Array
    M_hat: Array
    V_hat: Array
    train_error: Array
    training_loss: Array  # α times it
    stein: Array  # the Stein form of V̂
    rounding: Array  # a difference of Q̂ this small is none


def _linear_output(Q: Array, M: Array, V: Array, channel: Channel, tokens: int) -> _Output:
    """Closed for σ(A) = A/T; one block."""
    T = tokens
    noise = effective_noise(Q, M, channel.label_variance)
    stiff = V + T**2 / 4
    V_hat = channel.samples * T * (T + 1) / stiff
    train = (T + 1) / T * noise * (T**2 / 4 / stiff) ** 2
    # without label noise Q0 − 2M + Q may cancel to what rounding leaves of Q0
    rounding = 4 * _EPSILON * V_hat * channel.label_variance / stiff
    loss = channel.samples * train
    parts = V_hat * noise / stiff, V_hat, V_hat, train, loss, V_hat, rounding
    return _Output(*(part[None] for part in parts))


def _softmax_output(
    Q: Array,
    M: Array,
    V: Array,
    nodes: Labels,
    minimum: Array,
    channel: Channel,
    tokens: int,
    blocks: int,
) -> _Output:
    """The same for softmax on nodes."""
    V = jnp.maximum(V, SMALLEST_VARIANCE)
    labels, label, frozen, spread = _softmax_fields(Q, M, nodes, channel, tokens)
    prox = softmax_field_proximal(labels, frozen, V, minimum)
    alpha, G = channel.samples, prox.force
    noise = jnp.concatenate([nodes.frozen_noise, -nodes.frozen_noise], axis=1)
    Q_hat = 2 * alpha * block_means(jnp.sum(G**2, 0), blocks)
    V_hat = -2 * alpha / spread * block_means(jnp.sum(G * noise, 0), blocks)
    signal = 2 * alpha * block_means(jnp.sum(G * label, 0), blocks)
    M_hat = (signal + M * V_hat) / channel.label_variance
    stein = 2 * alpha / V * block_means(smooth_response(prox), blocks)
    train = block_means(prox.loss, blocks)
    return _Output(Q_hat, M_hat, V_hat, train, alpha * train, stein, jnp.zeros_like(Q_hat))


def _softmax_fields(
    Q: Array, M: Array, nodes: Labels, channel: Channel, tokens: int
) -> tuple[Array, Array, Array, Array]:
    """y, z^y, z and S on the nodes and their mirror images."""
    label, frozen, spread = frozen_coordinates(
        *paired(nodes.label_noise, nodes.frozen_noise), Q, M, channel.label_variance
    )
    basis = field_basis(tokens, "softmax")
    return attention(to_fields(basis, label), "softmax", row_axis=0), label, frozen, spread


def _rows(
    unknowns: Array, weights: Weights, output: Callable[[Array, Array, Array], _Output], Q0: Array
) -> Array:
    """Residuals and observables by block, from the output side at given (Q, M, V)."""
    Q_hat, M_hat, V_hat = jnp.exp(unknowns)
    Q, M, V, weight_potential = weights.near(unknowns)
    new = output(Q, M, V)
    potential = (
        (Q_hat * V + 2 * M_hat * M - V_hat * Q) / 4
        + V * new.Q_hat / 4
        + new.training_loss
        - weight_potential
    )
    overlap = M / jnp.sqrt(jnp.maximum(Q * Q0, 1e-300))
    off = new.Q_hat - Q_hat
    rounding = jnp.where(jnp.abs(off) < new.rounding, off, 0.0)
    rows = [(off - jax.lax.stop_gradient(rounding)) / Q_hat]
    rows += [new.M_hat / M_hat - 1, new.V_hat / V_hat - 1]
    rows += [Q, M, V, Q_hat, M_hat, V_hat, potential, new.train_error, overlap]
    rows += [(new.V_hat - new.stein) / V_hat]
    return jnp.stack([jnp.broadcast_to(row, new.Q_hat.shape) for row in rows], axis=1)


@quickly_compiled("tokens")
def _linear_values(weights: Weights, channel: Channel, tokens: int) -> tuple[Array, Array]:
    output = functools.partial(_linear_output, channel=channel, tokens=tokens)
    rows = functools.partial(
        _rows, weights=weights, output=output, Q0=jnp.asarray(channel.teacher_square)
    )
    return with_jacobian(rows, weights.unknowns)


@quickly_compiled("tokens")
def _minima(weights: Weights, nodes: Labels, channel: Channel, starts: Array, tokens: int) -> Array:
    Q, M, V, _ = weights.values
    labels, _, frozen, _ = _softmax_fields(Q, M, nodes, channel, tokens)
    found = softmax_field_minima(labels, frozen, jnp.maximum(V, SMALLEST_VARIANCE), starts)
    return found.both


@quickly_compiled("tokens")
def _likely(weights: Weights, nodes: Labels, channel: Channel, tokens: int) -> Array:
    Q, M, _, _ = weights.values
    _, label, frozen, _ = _softmax_fields(Q, M, nodes, channel, tokens)
    return jnp.stack([frozen, label])


@quickly_compiled("tokens", "blocks")
def _softmax_values(
    weights: Weights, nodes: Labels, channel: Channel, minima: Array, tokens: int, blocks: int
) -> tuple[Array, Array]:
    output = functools.partial(
        _softmax_output, nodes=nodes, minimum=minima[0], channel=channel, tokens=tokens,
        blocks=blocks,
    )  # fmt: skip
    rows = functools.partial(
        _rows, weights=weights, output=output, Q0=jnp.asarray(channel.teacher_square)
    )
    return with_jacobian(rows, weights.unknowns)


class LinearPretraining(Equations):
    """Relative residuals of (Q̂, M̂, V̂) and all observables at log(Q̂, M̂, V̂): closed."""

    def __init__(self, constants: Constants, *, tokens: int) -> None:
        self._weights, self._channel = LastWeights(constants), constants.channel
        self._tokens = tokens

    def values(self, unknowns: Float[np.ndarray, " 3"], chunk: None, minima: None) -> BlockValues:
        """Residuals and observables, exact: one block."""
        weights = self._weights.at(unknowns)
        return BlockValues.of(*_linear_values(weights, self._channel, self._tokens))


class SoftmaxPretraining(Equations):
    """The same averaged over nodes; ``blocks`` is the number of blocks in a chunk."""

    further = 2

    def __init__(self, constants: Constants, *, tokens: int, blocks: int) -> None:
        self._weights, self._channel = LastWeights(constants), constants.channel
        self._tokens, self._blocks = tokens, blocks

    def likely(self, unknowns: Float[np.ndarray, " 3"], chunk: Labels) -> Array:
        """z and z^y."""
        starts: Array = _likely(self._weights.at(unknowns), chunk, self._channel, self._tokens)
        return starts

    def minima(self, unknowns: Float[np.ndarray, " 3"], chunk: Labels, starts: Array) -> Array:
        """The lowest minimum of Prox_V and its rival, (2, n, nodes)."""
        weights = self._weights.at(unknowns)
        found: Array = _minima(weights, chunk, self._channel, starts, self._tokens)
        return found

    def values(
        self, unknowns: Float[np.ndarray, " 3"], chunk: Labels, minima: Array
    ) -> BlockValues:
        """Residuals and observables of the blocks of a chunk."""
        weights = self._weights.at(unknowns)
        out = _softmax_values(weights, chunk, self._channel, minima, self._tokens, self._blocks)
        return BlockValues.of(*out)


def relaxation(residual: Float[np.ndarray, " 3"]) -> Float[np.ndarray, " 3"]:
    """Damped step of log(Q̂, M̂, V̂) from the residuals new/old − 1."""
    return np.asarray(0.6 * np.clip(log_ratio(1 + residual), -2.0, 2.0))
