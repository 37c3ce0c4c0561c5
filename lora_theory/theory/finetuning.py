"""State evolution of rank-one LoRA on frozen weights: order parameters q, m, v.

One function per equation of docs/theory.md, section 3.  With ω = (m/q0)χ* + sζ, s² = q − m²/q0, the
equations on fixed nodes (χ*, ζ, fields) are the exact stationarity conditions of the potential φ on
the same nodes, jumps of the proximal operator included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_theory.compilation import quickly_compiled
from lora_theory.theory.averages import BlockValues, Equations
from lora_theory.theory.fields import softmax_loss
from lora_theory.theory.pretraining import block_means, smooth_response, with_jacobian
from lora_theory.theory.proximal import (
    Proximal,
    linear_lora_proximal,
    softmax_lora_minima,
    softmax_lora_proximal,
    softmax_lora_starts,
)
from lora_theory.theory.roots import log_ratio
from lora_theory.theory.training_fields import LinearFields, SoftmaxFields, Task
from lora_theory.theory.vector_side import vector_side

__all__ = [
    "INFORMED", "OBSERVABLES", "UNINFORMED", "ZERO", "ZERO_SPREAD", "LinearFinetuning",
    "SoftmaxFinetuning", "point_of", "relaxation", "seen_overlaps", "squared_spread",
]  # fmt: skip

#: Order of the observables in :class:`~lora_theory.theory.averages.BlockValues`.
OBSERVABLES = (
    "q", "m", "v", "q_hat", "m_hat", "v_hat",
    "potential", "overlap", "train_error", "jumps", "response", "growth",
)  # fmt: skip

# of a search for the minima of LoRA: ω and the most promising of ±χ* and ±χ̂, or of other nodes
_STARTS = 4
#: log s that stands for s = 0 on the branch w = 0, where only the limit ω = sζ → 0 matters.
ZERO_SPREAD = float(np.log(1e-5))
INFORMED, UNINFORMED, ZERO = (False, False), (False, True), (True, True)


class _Output(NamedTuple):
    """Node averages at given (q, m, v), one entry per block."""

    force_square: Array  # E|G|²
    force_noise: Array  # E G·ζ
    force_signal: Array  # E G·χ*
    norm_slope: Array  # E ∂_qℓ
    stein: Array  # E tr(I − ∂prox/∂ω)
    train_error: Array


_Point = tuple[Array, Array, Array, Array]


def point_of(unknowns: Array, task: Task) -> _Point:
    """(q, m, v, s) from (log s, m/q0, log v); with a covariance s² is the part q̂∫R⁻² of s²."""
    s, m, v = jnp.exp(unknowns[0]), unknowns[1] * task.signal, jnp.exp(unknowns[2])
    if task.levels is not None:
        side = vector_side(v, task.penalty, jnp.asarray(task.levels))
        s = jnp.sqrt(s**2 + (unknowns[1] / side.signal) ** 2 * task.signal * side.bent)
    return s**2 + m**2 / task.signal, m, v, s


@quickly_compiled()
def seen_overlaps(unknowns: Float[Array, "n 3"], task: Task) -> tuple[Array, Array]:
    """q and m of what the logits see, w, or w̃ of tokens with a covariance."""
    points = jax.vmap(lambda x: point_of(x, task))(unknowns)
    return points[0], points[1]


def squared_spread(unknowns: Array, task: Task) -> Array:
    """∫R⁻² over v²: 1 without a covariance."""
    if task.levels is None:
        return jnp.ones(())
    v = jnp.exp(unknowns[2])
    return vector_side(v, task.penalty, jnp.asarray(task.levels)).noise / v**2


def _center(point: _Point, fields: LinearFields | SoftmaxFields, task: Task) -> Array:
    """ω = (m/q0)χ* + sζ."""
    _, m, _, s = point
    return m / task.signal * fields.signal + s * fields.noise


def _linear_output(point: _Point, fields: LinearFields, task: Task, blocks: int) -> _Output:
    q, _, v, _ = point
    tokens = fields.levels.shape[0]
    levels = fields.levels + q
    prox = linear_lora_proximal(levels, _center(point, fields, task), v)
    slope = 2 / tokens**2 * (jnp.sum(levels, 0) - jnp.sum(prox.point**2, 0))
    return _collect(prox, fields, slope, blocks)


def _collect(
    prox: Proximal,
    fields: LinearFields | SoftmaxFields,
    slope: Array,
    blocks: int,
) -> _Output:
    G = prox.force
    stein = smooth_response(prox)
    parts = [jnp.sum(G**2, 0), jnp.sum(G * fields.noise, 0), jnp.sum(G * fields.signal, 0)]
    parts += [slope, stein, prox.loss]
    return _Output(*(block_means(fields.share * part, blocks) for part in parts))


def _softmax_output(
    point: _Point, fields: SoftmaxFields, minimum: Array, task: Task, blocks: int
) -> _Output:
    q, _, v, _ = point
    eye = jnp.eye(minimum.shape[0])[:, :, None]
    omega = _center(point, fields, task)
    prox = softmax_lora_proximal(fields.training, fields.labels, omega, v, q, minimum)
    chi = prox.point
    fitted = softmax_loss(fields.training + chi[:, None] * chi[None] - q * eye, fields.labels)
    slope = -jnp.einsum("aaN->N", fitted.gradient)
    return _collect(prox, fields, slope, blocks)


def _rows(x: Array, output: Callable[[_Point], _Output], task: Task, held: Array) -> Array:
    """Residuals and observables by block, from the node averages at given (q, m, v, s)."""
    q0, alpha = task.signal, task.samples
    point = q, m, v, s = point_of(x, task)
    out = output(point)
    q_hat = alpha * out.force_square
    response = -alpha / s * out.force_noise
    v_hat = response + 2 * alpha * out.norm_slope
    m_hat = alpha / q0 * out.force_signal + m / q0 * response
    R = 2 * task.penalty + v_hat
    growth = q_hat * v**2 / s**2 - 1
    gain, stiffness = m_hat * v - m / q0, 1 - v * R
    # φ with the conjugates eliminated, linear in the node averages
    potential = alpha * (0.5 * v * out.force_square + out.train_error)
    strength: float | Array = q0
    if task.levels is None:
        potential += task.penalty * q - s**2 / (2 * v)
    else:
        side = vector_side(v, task.penalty, jnp.asarray(task.levels))
        own_noise, m_own = jnp.exp(2 * x[0]) / side.noise, x[1] / side.signal  # q̂ and m̂
        growth = q_hat * side.noise / jnp.exp(2 * x[0]) - 1
        gain, stiffness = m_hat * side.signal - m / q0, v * (side.v_hat - v_hat)
        potential += m_own * m / 2 - side.v_hat * q / 2
        # of w instead of w̃
        strength = q0 / side.mean
        q = strength * m_own**2 * side.noise + own_noise * side.own_noise
        m = m_own * strength * v
    rows = [jnp.where(held[0], ZERO_SPREAD - x[0], growth)]
    rows += [jnp.where(held[1], -x[1], gain), stiffness]
    overlap = jnp.abs(m) / jnp.sqrt(q * strength)
    rows += [q, m, v, q_hat, m_hat, v_hat, potential, overlap]
    rows += [out.train_error, response - alpha / v * out.stein, response, growth]
    return jnp.stack([jnp.broadcast_to(row, growth.shape) for row in rows], axis=1)


@quickly_compiled("blocks")
def _linear_values(
    unknowns: Array, fields: LinearFields, task: Task, held: Array, blocks: int
) -> tuple[Array, Array]:
    def output(point: _Point) -> _Output:
        return _linear_output(point, fields, task, blocks)

    return with_jacobian(lambda x: _rows(x, output, task, held), unknowns)


_Arguments = tuple[Array, Array, Array, Array, Array]


def _arguments(unknowns: Array, fields: SoftmaxFields, task: Task) -> _Arguments:
    """What the proximal operator depends on: h, y', ω, v, q."""
    point = q, _, v, _ = point_of(unknowns, task)
    return fields.training, fields.labels, _center(point, fields, task), v, q


@quickly_compiled()
def _likely(unknowns: Array, fields: SoftmaxFields, task: Task) -> Array:
    likely = jnp.stack([fields.signal, fields.guess])
    return softmax_lora_starts(*_arguments(unknowns, fields, task), likely)[:_STARTS]


@quickly_compiled()
def _minima(unknowns: Array, fields: SoftmaxFields, task: Task, starts: Array) -> Array:
    found = softmax_lora_minima(*_arguments(unknowns, fields, task), starts)
    return found.both


@quickly_compiled("blocks")
def _softmax_values(
    unknowns: Array, fields: SoftmaxFields, task: Task, held: Array, minima: Array, blocks: int
) -> tuple[Array, Array]:
    def output(point: _Point) -> _Output:
        return _softmax_output(point, fields, minima[0], task, blocks)

    return with_jacobian(lambda x: _rows(x, output, task, held), unknowns)


@quickly_compiled("blocks")
def _linear_growth(unknowns: Array, fields: LinearFields, task: Task, blocks: int) -> Array:
    point = q, _, v, _ = point_of(unknowns, task)
    omega = _center(point, fields, task)
    prox = linear_lora_proximal(fields.levels + q, omega, v)
    return _growth(point, omega, prox.force, fields, task, blocks)


@quickly_compiled("blocks")
def _softmax_growth(
    unknowns: Array, fields: SoftmaxFields, task: Task, minima: Array, blocks: int
) -> Array:
    point = point_of(unknowns, task)
    arguments = _arguments(unknowns, fields, task)
    prox = softmax_lora_proximal(*arguments, minima[0])
    return _growth(point, arguments[2], prox.force, fields, task, blocks)


def _growth(
    point: _Point,
    omega: Array,
    force: Array,
    fields: LinearFields | SoftmaxFields,
    task: Task,
    blocks: int,
) -> Array:
    q, _, v, _ = point
    along = jnp.sum(omega * fields.signal, 0) * jnp.sum(fields.signal * force, 0) / task.signal
    term = fields.share * (along - jnp.sum(omega * force, 0))
    if task.levels is not None:
        v = vector_side(v, task.penalty, jnp.asarray(task.levels)).signal
    return task.samples * v / q * block_means(term, blocks)[:, None]


def relaxation(residual: Float[np.ndarray, " 3"]) -> Float[np.ndarray, " 3"]:
    """Damped step of (log s, m/q0, log v); s, bounded, does not outrun its response v."""
    growth, gain, response = residual
    step = np.array([0.5 * log_ratio(1 + growth), gain, -log_ratio(1 - response)])
    return np.asarray(0.6 * np.clip(step, (-0.7, -0.7, -2.0), (0.7, 0.7, 2.0)))


class LinearFinetuning(Equations):
    """Relative residuals of the LoRA equations and all observables at (log s, m/q0, log v).

    Args:
        held: which unknowns are held instead of solved for: :data:`INFORMED` none,
            :data:`UNINFORMED` m = 0, :data:`ZERO` also s at exp(ZERO_SPREAD), which stands for 0.
        blocks: number of blocks in a chunk.
    """

    def __init__(self, task: Task, held: tuple[bool, bool], *, blocks: int) -> None:
        self._task, self._held, self._blocks = task, np.asarray(held), blocks

    def values(
        self, unknowns: Float[np.ndarray, " 3"], chunk: LinearFields, minima: None
    ) -> BlockValues:
        """Residuals and observables of the blocks of a chunk."""
        out = _linear_values(unknowns, chunk, self._task, self._held, self._blocks)
        return BlockValues.of(*out)

    def signal_growth(
        self, unknowns: Float[np.ndarray, " 3"], chunk: LinearFields, minima: None
    ) -> Float[Array, "blocks 1"]:
        """(α'v/q) E ωᵀ(χ*χ*ᵀ/q0 − I)G: the root with m = 0 is unstable to m where it exceeds 1."""
        growth: Array = _linear_growth(unknowns, chunk, self._task, self._blocks)
        return growth


class SoftmaxFinetuning(Equations):
    """The same for softmax attention."""

    further = _STARTS

    def __init__(self, task: Task, held: tuple[bool, bool], *, blocks: int) -> None:
        self._task, self._held, self._blocks = task, np.asarray(held), blocks

    def likely(self, unknowns: Float[np.ndarray, " 3"], chunk: SoftmaxFields) -> Array:
        """ω and the most promising of ±χ* and ±χ̂."""
        starts: Array = _likely(unknowns, chunk, self._task)
        return starts

    def minima(
        self, unknowns: Float[np.ndarray, " 3"], chunk: SoftmaxFields, starts: Array
    ) -> Array:
        """The lowest minimum of prox and its rival, (2, T, nodes)."""
        found: Array = _minima(unknowns, chunk, self._task, starts)
        return found

    def values(
        self, unknowns: Float[np.ndarray, " 3"], chunk: SoftmaxFields, minima: Array
    ) -> BlockValues:
        """Residuals and observables of the blocks of a chunk."""
        out = _softmax_values(unknowns, chunk, self._task, self._held, minima, self._blocks)
        return BlockValues.of(*out)

    def signal_growth(
        self, unknowns: Float[np.ndarray, " 3"], chunk: SoftmaxFields, minima: Array
    ) -> Float[Array, "blocks 1"]:
        """As for linear attention."""
        growth: Array = _softmax_growth(unknowns, chunk, self._task, minima, self._blocks)
        return growth
