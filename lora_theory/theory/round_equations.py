"""State evolution of the second of two rounds: its equations on nodes (docs/theory.md, 3.7).

With ω₂ = aχ* + b·first + sζ₂, first = ω₁ on the first batch and χ₁ on the second, the unknowns are
(log s, m₂/q0, b, log v₂, ĉv₂).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_theory.compilation import quickly_compiled
from lora_theory.theory.averages import BlockValues, Equations
from lora_theory.theory.fields import softmax_loss
from lora_theory.theory.pretraining import smooth_response, with_jacobian
from lora_theory.theory.proximal import (
    Proximal,
    linear_lora_proximal,
    softmax_lora_minima,
    softmax_lora_proximal,
    softmax_lora_starts,
)
from lora_theory.theory.roots import log_ratio
from lora_theory.theory.round_fields import RoundFields
from lora_theory.theory.stability import squared_response
from lora_theory.theory.training_fields import LinearFields, Task

__all__ = ["OBSERVABLES", "SecondRoundEquations", "relaxation"]

#: Order of the observables in :class:`~lora_theory.theory.averages.BlockValues`.
OBSERVABLES = (
    "q", "m", "v", "p", "choice", "overlap", "train_error", "replicon", "jumps", "response",
)  # fmt: skip
_STARTS = 4


class _Point(NamedTuple):
    """Where the averages are taken, on one block."""

    q: Array
    m: Array
    p: Array
    v: Array
    s: Array
    b: Array
    choice: Array  # ĉv₂
    center: Array  # ω₂, moved by what the first batch does to the choice of the second


def _point(unknowns: Array, chunk: RoundFields, signal: float) -> _Point:
    s, m, b, v, choice = (
        jnp.exp(unknowns[0]), unknowns[1] * signal, unknowns[2], jnp.exp(unknowns[3]), unknowns[4],
    )  # fmt: skip
    before = chunk.before
    a = (m - b * before.m) / signal
    p = a * before.m + b * before.q
    omega = a * chunk.frozen.signal + b * chunk.first + s * chunk.frozen.noise
    return _Point(a * m + b * p + s**2, m, p, v, s, b, choice, omega + choice * chunk.push)


def _proximal(at: _Point, chunk: RoundFields, minimum: Array | None) -> tuple[Proximal, Array]:
    """The minimiser and ∂_qℓ on every node."""
    fields = chunk.frozen
    if isinstance(fields, LinearFields):
        levels = fields.levels + at.q
        prox = linear_lora_proximal(levels, at.center, at.v)
        slope = 2 / len(levels) ** 2 * (jnp.sum(levels, 0) - jnp.sum(prox.point**2, 0))
        return prox, slope
    assert minimum is not None
    prox = softmax_lora_proximal(fields.training, fields.labels, at.center, at.v, at.q, minimum)
    chi, eye = prox.point, jnp.eye(len(minimum))[:, :, None]
    fitted = softmax_loss(fields.training + chi[:, None] * chi[None] - at.q * eye, fields.labels)
    return prox, -jnp.einsum("aaN->N", fitted.gradient)


def _rows(x: Array, chunk: RoundFields, task: Task, minimum: Array | None) -> Array:
    """Residuals and observables of the block."""
    at, before = _point(x, chunk, task.signal), chunk.before
    prox, slope = _proximal(at, chunk, minimum)
    G, q0 = prox.force, task.signal
    spread = before.q - before.m**2 / q0  # s₁²

    def mean(values: Array) -> Array:
        """α₁E₁ + α₂E₂."""
        return jnp.mean(chunk.frozen.share * values)

    def along(vectors: Array) -> Array:
        return mean(jnp.sum(vectors * G, axis=0))

    response = -along(chunk.frozen.noise) / at.s
    shared = along(chunk.push)  # v₁α₁E₁G₁·G₂
    choice = at.v * (along(chunk.noise) / jnp.sqrt(spread) + at.b * response)
    noise = at.v * (at.v * along(G) + (at.choice - at.b) * shared)
    m = at.v * (along(chunk.frozen.signal) + response * at.m)
    rows = [noise / at.s**2 - 1, (m - at.m) / q0, at.choice + at.v * shared / spread - at.b]
    rows += [1 - at.v * (2 * task.penalty + response + 2 * mean(slope)), choice - at.choice]
    overlap = at.m / jnp.sqrt(at.q * q0)
    train_error = mean(prox.loss) / mean(jnp.ones(()))
    rows += [at.q, at.m, at.v, at.p, at.choice, overlap, train_error]
    rows += [mean(squared_response(prox)), response - mean(smooth_response(prox)) / at.v, response]
    return jnp.stack(rows)[None]


@quickly_compiled()
def _values(
    unknowns: Array, chunk: RoundFields, task: Task, minimum: Array | None
) -> tuple[Array, Array]:
    return with_jacobian(lambda x: _rows(x, chunk, task, minimum), unknowns)


@quickly_compiled()
def _likely(unknowns: Array, chunk: RoundFields, task: Task) -> Array:
    at, fields = _point(unknowns, chunk, task.signal), chunk.frozen
    likely = jnp.stack([fields.signal, fields.guess])  # type: ignore[union-attr]
    arguments = fields.training, fields.labels, at.center, at.v, at.q  # type: ignore[union-attr]
    return softmax_lora_starts(*arguments, likely)[:_STARTS]


@quickly_compiled()
def _minima(unknowns: Array, chunk: RoundFields, task: Task, starts: Array) -> Array:
    at, fields = _point(unknowns, chunk, task.signal), chunk.frozen
    arguments = fields.training, fields.labels, at.center, at.v, at.q  # type: ignore[union-attr]
    return softmax_lora_minima(*arguments, starts).both


def relaxation(residual: Float[np.ndarray, " 5"]) -> Float[np.ndarray, " 5"]:
    """Damped step of the unknowns; s does not outrun its response v₂."""
    noise, gain, share, response, choice = residual
    step = np.array([0.5 * log_ratio(1 + noise), gain, share, -log_ratio(1 - response), choice])
    return np.asarray(0.6 * np.clip(step, -0.5, 0.5))


class SecondRoundEquations(Equations):
    """Residuals of the second round and all observables; every chunk is of one block."""

    def __init__(self, task: Task, *, linear: bool) -> None:
        self._task, self.further = task, 0 if linear else _STARTS

    def likely(self, unknowns: Float[np.ndarray, " 5"], chunk: RoundFields) -> Array:
        """ω₂ and the most promising of ±χ* and ±χ̂."""
        starts: Array = _likely(unknowns, chunk, self._task)
        return starts

    def minima(self, unknowns: Float[np.ndarray, " 5"], chunk: RoundFields, starts: Array) -> Array:
        """The lowest minimum of prox and its rival, (2, T, nodes)."""
        found: Array = _minima(unknowns, chunk, self._task, starts)
        return found

    def values(
        self, unknowns: Float[np.ndarray, " 5"], chunk: RoundFields, minima: Array | None
    ) -> BlockValues:
        """Residuals and observables of the block of a chunk."""
        minimum = None if minima is None else minima[0]
        return BlockValues.of(*_values(unknowns, chunk, self._task, minimum))
