"""State evolution of rank-one LoRA on frozen weights: order parameters q, m, v.

One function per equation of docs/theory.md, section 3.  With ω = (m/q0)χ* + sζ, s² = q − m²/q0, the
equations on fixed nodes (χ*, ζ, fields) are the exact stationarity conditions of the potential φ on
the same nodes, jumps of the proximal operator included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.special import gammaincinv, ndtr

from lora_theory.attention import attention
from lora_theory.compilation import quickly_compiled
from lora_theory.theory.averages import AWAY, BlockValues, Equations
from lora_theory.theory.fields import field_basis, field_count, softmax_loss, to_fields
from lora_theory.theory.pretraining import (
    SMALLEST_VARIANCE,
    block_means,
    frozen_coordinates,
    paired,
    smooth_response,
    with_jacobian,
)
from lora_theory.theory.proximal import (
    Proximal,
    linear_lora_proximal,
    rank_one_part,
    softmax_field_minima,
    softmax_lora_minima,
    softmax_lora_proximal,
    softmax_lora_starts,
    with_others,
)
from lora_theory.theory.roots import log_ratio

__all__ = [
    "FRESH",
    "INFORMED",
    "OBSERVABLES",
    "UNINFORMED",
    "ZERO",
    "ZERO_SPREAD",
    "LinearFields",
    "LinearFinetuning",
    "Reuse",
    "SoftmaxFields",
    "SoftmaxFinetuning",
    "Task",
    "linear_fields",
    "node_dimension",
    "relaxation",
    "softmax_fields",
]

#: Order of the observables in :class:`~lora_theory.theory.averages.BlockValues`.
OBSERVABLES = (
    "q", "m", "v", "q_hat", "m_hat", "v_hat",
    "potential", "overlap", "train_error", "jumps", "response", "growth",
)  # fmt: skip

# of a search for the minima of LoRA: ω and the most promising of ±χ* and ±χ̂, or of other nodes
_STARTS = 4
# for the fields of re-used sequences: minima of other nodes per search, and searches
_OTHERS, _SEARCHES = 2, 24
#: log s that stands for s = 0 on the branch w = 0, where only the limit ω = sζ → 0 matters.
ZERO_SPREAD = float(np.log(1e-5))
INFORMED, UNINFORMED, ZERO = (False, False), (False, True), (True, True)


Share = Float[np.ndarray, "#nodes"]
_ALL: Share = np.ones(1)


class Task(NamedTuple):
    """The numbers of the fine-tuning task that its equations contain."""

    samples: float  # α'
    penalty: float  # λ'
    signal: float  # q0
    label_variance: float  # Q_y = Q0 + Δ/2, variance of z^y


class Reuse(NamedTuple):
    """How the fine-tuning sequences are related to those of pre-training."""

    share: float  # r, of re-used sequences: 0 for fresh ones
    new_noise: float | None = None  # Δ/2 if their label noise is drawn anew

    def by_kind(
        self, nodes: Float[np.ndarray, "n nodes"]
    ) -> tuple[Float[np.ndarray, "n kinds*nodes"], Bool[np.ndarray, " kinds*nodes"], Share]:
        """Every node as one of a re-used and as one of a fresh sequence, and their weights."""
        count = nodes.shape[1]
        if self.share in (0, 1):
            return nodes, np.full(count, self.share == 1), _ALL
        reused = np.tile([True, False], count)
        weights = np.where(reused, 2 * self.share, 2 * (1 - self.share))
        return np.repeat(nodes, 2, axis=1), reused, weights


FRESH = Reuse(0.0)


class LinearFields(NamedTuple):
    """Residual fields of linear attention on nodes, in the eigenbasis of R + χ*χ*ᵀ − q0 I."""

    levels: Float[Array, "T nodes"]
    signal: Float[Array, "T nodes"]  # χ*
    noise: Float[Array, "T nodes"]  # ζ
    share: Float[Array, "#nodes"]  # weights of the nodes, of mean 1


class SoftmaxFields(NamedTuple):
    """What the frozen weights and the task fix on the nodes of softmax attention."""

    training: Float[Array, "T T nodes"]  # h of the training sequences
    labels: Float[Array, "T T nodes"]  # y'
    signal: Float[Array, "T nodes"]  # χ*
    noise: Float[Array, "T nodes"]  # ζ
    guess: Float[Array, "T nodes"]  # χ that would fit the labels best if σ were linear
    share: Float[Array, "#nodes"]  # weights of the nodes, of mean 1


def node_dimension(tokens: int, activation: str, *, new_noise: bool = False) -> int:
    """Gaussian numbers per node: 2n + 2T for softmax, n more with new noise, 3T for linear."""
    if activation == "linear":
        return 3 * tokens
    return (3 if new_noise else 2) * field_count(tokens, "softmax") + 2 * tokens


@quickly_compiled("tokens")
def _eigenbasis(
    nodes: Array, chi: Array, training_noise: Array, signal: Array, tokens: int
) -> tuple[Array, ...]:
    diagonal = jnp.sqrt(2 * training_noise) * nodes[:tokens]
    length = jnp.sqrt(signal) * chi[0]
    eye = jnp.eye(tokens)[:, :, None]
    matrix = eye * (diagonal.at[0].add(length**2) - signal)[:, None]
    for a in range(tokens - 1):
        off = jnp.sqrt(training_noise) * chi[1 + a]
        matrix = matrix.at[a, a + 1].set(off).at[a + 1, a].set(off)
    levels, vectors = jnp.linalg.eigh(jnp.moveaxis(matrix, -1, 0))
    both = jnp.concatenate([levels.T, length * vectors[:, 0].T], axis=0)
    both, noise = paired(both, nodes[tokens:])
    return both[:tokens], both[tokens:], noise


def linear_fields(
    nodes: Float[np.ndarray, "3T nodes"],
    training_noise: float | Float[np.ndarray, " nodes"],
    signal: float,
    *,
    tokens: int,
    share: Share = _ALL,
) -> LinearFields:
    """Eigenvalues of R + χ*χ*ᵀ − q0 I, with χ* and ζ in its eigenbasis, for linear attention.

    R = h^y − h is a Gaussian orthogonal matrix of off-diagonal variance Δ_eff; its law does not
    depend on the basis: χ* may be laid along the first axis and R reduced to a tridiagonal matrix
    of T Gaussians and T − 1 χ variables (docs/theory.md, section 5).  ζ is Gaussian in any basis.
    """
    degrees = np.concatenate([[tokens], np.arange(tokens - 1, 0, -1)])[:, None]
    chi = np.sqrt(2 * gammaincinv(degrees / 2, ndtr(nodes[2 * tokens :])))
    levels, star, noise = _eigenbasis(
        jnp.asarray(nodes[: 2 * tokens]),
        jnp.asarray(chi),
        jnp.asarray(training_noise, dtype=float),
        jnp.asarray(signal, dtype=float),
        tokens,
    )
    return LinearFields(levels, star, noise, _mirrored(share))


def _mirrored(share: Share) -> Array:
    """The weights of the nodes and of their mirror images."""
    return jnp.asarray(share if len(share) == 1 else np.tile(share, 2))


@quickly_compiled("tokens")
def _frozen_fields(
    nodes: Array, Q: Array, M: Array, label_variance: Array, tokens: int
) -> tuple[Array, Array]:
    n = field_count(tokens, "softmax")
    return frozen_coordinates(nodes[:n], nodes[n : 2 * n], Q, M, label_variance)[:2]


@quickly_compiled("tokens")
def _reused_minima(label: Array, z: Array, V: Array, starts: Array, tokens: int) -> Array:
    fields = to_fields(field_basis(tokens, "softmax"), label)
    labels = attention(fields, "softmax", row_axis=0)
    found = softmax_field_minima(labels, z, jnp.maximum(V, SMALLEST_VARIANCE), starts)
    return found.both


def _reused_fields(label: Array, z: Array, V: Array, tokens: int) -> Array:
    """Prox_V(z; y): minima from z, z^y and those of other nodes, until a search lowers none."""
    minima = jnp.stack([z, label])
    for search in range(_SEARCHES):
        starts = with_others(minima, AWAY * (search + 1) % 1.0, _OTHERS)
        last, minima = minima, _reused_minima(label, z, V, starts, tokens)
        if search and jnp.max(jnp.abs(minima[0] - last[0])) < 1e-3:
            break
    return minima[0]


@quickly_compiled("tokens")
def _with_new_noise(
    nodes: Array, label: Array, Q: Array, M: Array, label_variance: Array, noise: Array, tokens: int
) -> Array:
    n = field_count(tokens, "softmax")
    g_2, g_3 = nodes[n : 2 * n], nodes[2 * n + 2 * tokens :]
    spread = frozen_coordinates(label, g_2, Q, M, label_variance)[2]
    clean = (label_variance - noise) / label_variance
    shared = M * noise / (label_variance * spread)
    own = jnp.maximum(noise + clean * noise - shared**2, noise)
    return clean * label + shared * g_2 + jnp.sqrt(own) * g_3


@quickly_compiled("tokens")
def _softmax_fields(
    nodes: Array, label: Array, training: Array, share: Array, signal: Array, tokens: int
) -> SoftmaxFields:
    n, T = field_count(tokens, "softmax"), tokens
    basis, eye = field_basis(tokens, "softmax"), jnp.eye(T)[:, :, None]
    label_fields = to_fields(basis, label)
    star = jnp.sqrt(signal) * nodes[2 * n : 2 * n + T]
    lift = star[:, None] * star[None] - signal * eye
    task_labels = attention(label_fields + lift, "softmax", row_axis=0)
    guess = rank_one_part(label_fields - to_fields(basis, training) + star[:, None] * star[None])
    # the fields do not depend on ζ: computed once per mirror pair
    doubled = [
        jnp.concatenate([part, part], axis=-1)
        for part in (to_fields(basis, training), task_labels, guess)
    ]
    star, noise = paired(star, nodes[2 * n + T : 2 * n + 2 * T])
    return SoftmaxFields(doubled[0], doubled[1], star, noise, doubled[2], share)


def softmax_fields(
    nodes: Float[np.ndarray, "dimension nodes"],
    Q: Float[np.ndarray, " nodes"],
    M: Float[np.ndarray, " nodes"],
    V: Float[np.ndarray, " nodes"],
    task: Task,
    *,
    tokens: int,
    reuse: Reuse = FRESH,
    rescaling: float = 1.0,
) -> SoftmaxFields:
    """The fields that (Q, M, V), here one value per node, leave to fine-tuning.

    Re-used training sequences carry Prox_V(z; y) with their pre-training label in place of z, and
    that label or one with new noise (docs/theory.md, section 3).  The fields of the frozen weights
    are multiplied by ``rescaling``.
    """
    at, *parts = (jnp.asarray(entry, dtype=float) for entry in (nodes, Q, M, V))
    label, training = _frozen_fields(at, *parts[:2], task.label_variance, tokens)
    all_nodes, reused, share = reuse.by_kind(nodes)
    if reuse.share > 0:
        own = _reused_fields(label, training, parts[2], tokens)
        own_label = label
        if reuse.new_noise is not None:
            variances = task.label_variance, reuse.new_noise
            own_label = _with_new_noise(at, label, *parts[:2], *variances, tokens)
        kinds = len(reused) // nodes.shape[1]
        later, earlier = (
            jnp.repeat(jnp.stack(pair), kinds, axis=2)
            for pair in ((own_label, own), (label, training))
        )
        label, training = jnp.where(reused, later, earlier)
    fields: SoftmaxFields = _softmax_fields(
        jnp.asarray(all_nodes), label, rescaling * training, _mirrored(share), task.signal, tokens
    )
    return fields


class _Output(NamedTuple):
    """Node averages at given (q, m, v), one entry per block."""

    force_square: Array  # E|G|²
    force_noise: Array  # E G·ζ
    force_signal: Array  # E G·χ*
    norm_slope: Array  # E ∂_qℓ
    stein: Array  # E tr(I − ∂prox/∂ω)
    train_error: Array


_Point = tuple[Array, Array, Array, Array]


def _point(unknowns: Array, signal: float) -> _Point:
    """(q, m, v, s) from (log s, m/q0, log v)."""
    s, m, v = jnp.exp(unknowns[0]), unknowns[1] * signal, jnp.exp(unknowns[2])
    return s**2 + m**2 / signal, m, v, s


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
    point = q, m, v, s = _point(x, q0)
    out = output(point)
    q_hat = alpha * out.force_square
    response = -alpha / s * out.force_noise
    v_hat = response + 2 * alpha * out.norm_slope
    m_hat = alpha / q0 * out.force_signal + m / q0 * response
    R = 2 * task.penalty + v_hat
    growth = q_hat * v**2 / s**2 - 1
    rows = [jnp.where(held[0], ZERO_SPREAD - x[0], growth)]
    rows += [jnp.where(held[1], -x[1], m_hat * v - m / q0), 1 - v * R]
    # φ with the conjugates eliminated, linear in the node averages
    potential = alpha * (0.5 * v * out.force_square + out.train_error)
    potential += task.penalty * q - s**2 / (2 * v)
    overlap = jnp.abs(m) / jnp.sqrt(q * q0)
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
    point = q, _, v, _ = _point(unknowns, task.signal)
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
    point = q, _, v, _ = _point(unknowns, task.signal)
    omega = _center(point, fields, task)
    prox = linear_lora_proximal(fields.levels + q, omega, v)
    return _growth(point, omega, prox.force, fields, task, blocks)


@quickly_compiled("blocks")
def _softmax_growth(
    unknowns: Array, fields: SoftmaxFields, task: Task, minima: Array, blocks: int
) -> Array:
    point = _point(unknowns, task.signal)
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
