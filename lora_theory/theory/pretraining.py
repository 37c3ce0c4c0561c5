"""State evolution of pre-training: order parameters Q, M, V and their conjugates.

One function per equation of docs/theory.md, section 2.  The equations on fixed nodes are exactly
the stationarity conditions of the potential Φ on the same nodes, jumps of the proximal operator
included.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_theory.attention import attention
from lora_theory.compilation import quickly_compiled
from lora_theory.laws import Law, law_of
from lora_theory.problem import Problem
from lora_theory.theory.averages import BlockValues, Equations
from lora_theory.theory.errors import effective_noise
from lora_theory.theory.fields import field_basis, to_fields
from lora_theory.theory.newton import inverse_trace
from lora_theory.theory.proximal import (
    Proximal,
    softmax_field_minima,
    softmax_field_proximal,
)
from lora_theory.theory.regularizers import (
    Frobenius,
    NarrowFactor,
    NuclearNorm,
    Regularizer,
    WeightDecay,
)
from lora_theory.theory.roots import log_ratio
from lora_theory.theory.separable import Separable, separable_nodes, separable_weights
from lora_theory.theory.units import Units

__all__ = [
    "OBSERVABLES",
    "SMALLEST_VARIANCE",
    "Constants",
    "Labels",
    "LinearPretraining",
    "SoftmaxPretraining",
    "block_means",
    "frozen_coordinates",
    "kept_at",
    "paired",
    "relaxation",
    "smooth_response",
    "weight_potential",
    "weight_side",
    "weights_at",
    "with_jacobian",
]

#: Order of the observables in :class:`~lora_theory.theory.averages.BlockValues`.
OBSERVABLES = (
    "Q", "M", "V", "Q_hat", "M_hat", "V_hat",
    "potential", "train_error", "overlap", "jump_mass",
)  # fmt: skip

# floors that keep the equations finite where the weights vanish: S² and V
_SMALLEST_SPREAD, SMALLEST_VARIANCE = 1e-12, 1e-9
_EPSILON = float(np.finfo(float).eps)


class Channel(NamedTuple):
    """What the output side of the equations contains of a problem."""

    samples: float  # α
    label_variance: float  # Q0 + Δ/2, variance of z^y
    teacher_square: float | Array  # Q0


class Constants(NamedTuple):
    """What the equations of pre-training contain of a problem, without temperatures (Units)."""

    samples: float  # α
    label_variance: float  # Q0 + Δ/2, variance of z^y
    law: Law  # of S0 …
    teacher_scale: float  # … which is multiplied by τ0
    regularizer: Regularizer | Separable

    @classmethod
    def of(cls, problem: Problem) -> Constants:
        """The constants of ``problem``."""
        stage, units, law = problem.pretraining, Units.of(problem), law_of(problem)
        kind: Regularizer | Separable
        if stage.regularizer == "weight_decay":
            kind = WeightDecay(math.sqrt(stage.rank) * stage.penalty / units.student)
            if stage.rank < 1:
                kind = NarrowFactor(kind, stage.rank)
        elif stage.regularizer == "frobenius":
            kind = Frobenius(stage.penalty / units.student**2)
        elif stage.regularizer == "nuclear_norm":
            kind = NuclearNorm(stage.penalty / units.student)
        else:
            assert stage.function is not None
            kind = Separable(stage.function, stage.penalty, units.student)
        variance = float(law.moments()[1]) + problem.label_noise / 2
        return cls(stage.samples, units.teacher**2 * variance, law, units.teacher, kind)

    @property
    def channel(self) -> Channel:
        """What the output side needs of them."""
        Q0 = self.teacher_scale**2 * self.law.moments()[1]
        return Channel(self.samples, self.label_variance, Q0)


def weight_potential(
    Q_hat: Float[Array, ""],
    M_hat: Float[Array, ""],
    V_hat: Float[Array, ""],
    constants: Constants,
) -> Float[Array, ""]:
    """Ψ, the weight part of Φ; (M̂²/4V̂) J for weight decay (docs/theory.md, section 2)."""
    assert not isinstance(constants.regularizer, Separable)  # which is not traced: weights_at
    scale, law = constants.teacher_scale, constants.law
    return constants.regularizer.potential(Q_hat, scale * M_hat, V_hat, law)


def weight_side(
    Q_hat: Float[Array, ""],
    M_hat: Float[Array, ""],
    V_hat: Float[Array, ""],
    constants: Constants,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Q = −4∂Ψ/∂V̂, M = 2∂Ψ/∂M̂, V = 4∂Ψ/∂Q̂ (docs/theory.md, section 2)."""
    slopes = jax.grad(weight_potential, argnums=(0, 1, 2))(Q_hat, M_hat, V_hat, constants)
    return -4 * slopes[2], 2 * slopes[1], 4 * slopes[0]


class Weights(NamedTuple):
    """(Q, M, V, Ψ) at log(Q̂, M̂, V̂), and their slopes there."""

    unknowns: Float[Array, " 3"]
    values: Float[Array, " 4"]
    slopes: Float[Array, "4 3"]

    def near(self, unknowns: Float[Array, " 3"]) -> Float[Array, " 4"]:
        """The same to first order."""
        return self.values + self.slopes @ (unknowns - self.unknowns)


@quickly_compiled()
def _weights_at(unknowns: Array, constants: Constants) -> Weights:
    def values(unknowns: Array) -> tuple[Array, Array]:
        Q_hat, M_hat, V_hat = jnp.exp(unknowns)
        order = weight_side(Q_hat, M_hat, V_hat, constants)
        found = jnp.stack([*order, weight_potential(Q_hat, M_hat, V_hat, constants)])
        return found, found

    slopes, found = jax.jacfwd(values, has_aux=True)(unknowns)
    return Weights(unknowns, found, slopes)


def weights_at(unknowns: Float[np.ndarray, " 3"], constants: Constants) -> Weights:
    """(Q, M, V, Ψ) at log(Q̂, M̂, V̂)."""
    at, kind = jnp.asarray(unknowns), constants.regularizer
    if isinstance(kind, Separable):
        found = separable_weights(unknowns, constants.law, constants.teacher_scale, kind)
        return Weights(at, *map(jnp.asarray, found))
    solved: Weights = _weights_at(at, constants)
    return solved


class _LastWeights:
    """The weights at the last unknowns: all chunks of nodes ask for the same."""

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self._last: tuple[bytes, Weights] | None = None

    def at(self, unknowns: Float[np.ndarray, " 3"]) -> Weights:
        name, last = np.asarray(unknowns).tobytes(), self._last
        if last is None or last[0] != name:
            last = self._last = name, weights_at(unknowns, self._constants)
        return last[1]


@quickly_compiled()
def _kept_at(unknowns: Array, constants: Constants) -> tuple[Array, Array, Array]:
    kind = constants.regularizer
    assert not isinstance(kind, Separable)
    Q_hat, M_hat, _ = jnp.exp(unknowns)
    at = Q_hat, constants.teacher_scale * M_hat, constants.law
    return kind.learned_rank(*at), *kind.dead_zone(*at)


class Kept(NamedTuple):
    """Which eigenvalues y of Y the penalty leaves, s(y) ≠ 0, and where s(y) is not smooth."""

    rank: float  # share of those that are left
    dead_zone: tuple[float, float]  # the y that become 0; equal ends where none do
    corners: tuple[float, ...]  # ends of the dead zone and other places
    jumps: bool  # whether s jumps where there are eigenvalues


def kept_at(unknowns: Float[np.ndarray, " 3"], constants: Constants) -> Kept:
    """What is kept at log(Q̂, M̂, V̂)."""
    kind = constants.regularizer
    if isinstance(kind, Separable):
        nodes = separable_nodes(unknowns, constants.law, constants.teacher_scale, kind)
        return Kept(nodes.rank, nodes.dead_zone, tuple(nodes.corners.tolist()), nodes.jumps_within)
    rank, low, high = map(float, _kept_at(jnp.asarray(unknowns), constants))
    corners = tuple(y for y in (low, high) if math.isfinite(y) and low < high)
    cut = isinstance(kind, NarrowFactor) and high > 2 * float(kind.decay.scaled_penalty)
    return Kept(rank, (low, high), corners, cut)


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
    spread = jnp.sqrt(jnp.maximum(Q - M**2 / label_variance, _SMALLEST_SPREAD))
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
        self._weights, self._channel = _LastWeights(constants), constants.channel
        self._tokens = tokens

    def values(self, unknowns: Float[np.ndarray, " 3"], chunk: None, minima: None) -> BlockValues:
        """Residuals and observables, exact: one block."""
        weights = self._weights.at(unknowns)
        return BlockValues.of(*_linear_values(weights, self._channel, self._tokens))


class SoftmaxPretraining(Equations):
    """The same averaged over nodes; ``blocks`` is the number of blocks in a chunk."""

    further = 2

    def __init__(self, constants: Constants, *, tokens: int, blocks: int) -> None:
        self._weights, self._channel = _LastWeights(constants), constants.channel
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
