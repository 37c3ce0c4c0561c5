"""What pre-training and the task fix on the nodes of stage two: the fields of its sequences.

Fresh sequences, re-used ones, and those chosen from a pool (docs/theory.md, sections 3.2 and 3.6).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.special import gammaincinv, ndtr

from lora_theory.attention import attention
from lora_theory.compilation import quickly_compiled
from lora_theory.theory.averages import AWAY
from lora_theory.theory.fields import (
    field_basis,
    field_count,
    field_pairs,
    full_basis,
    to_fields,
)
from lora_theory.theory.pretraining import (
    SMALLEST_SPREAD,
    SMALLEST_VARIANCE,
    frozen_coordinates,
    paired,
)
from lora_theory.theory.proximal import rank_one_part, softmax_field_minima, with_others

__all__ = [
    "FRESH", "LinearFields", "Reuse", "SoftmaxFields", "Task", "eigenbasis", "given_frozen",
    "kept_linear_fields", "linear_fields", "node_dimension", "softmax_fields",
]  # fmt: skip

# for the fields of re-used sequences: minima of other nodes per search, and searches
_OTHERS, _SEARCHES = 2, 24

Share = Float[np.ndarray, "#nodes"]
_ALL: Share = np.ones(1)


class Task(NamedTuple):
    """The numbers of the fine-tuning task that its equations contain."""

    samples: float  # α'
    penalty: float  # λ'
    signal: float  # q0, with a covariance that of w̃*
    label_variance: float  # Q_y = Q0 + Δ/2, variance of z^y
    levels: Float[np.ndarray, " n"] | None = None  # c', of tokens with a covariance


class Trained(NamedTuple):
    """Order parameters of the trained Ŝ where the frozen S' is another, by block or by node."""

    Q: Float[np.ndarray, " R"]
    M: Float[np.ndarray, " R"]
    V: Float[np.ndarray, " R"]
    cross: Float[np.ndarray, " R"]  # Tr ŜS'/D


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


def node_dimension(
    tokens: int, activation: str, *, new_noise: bool = False, compressed: bool = False
) -> int:
    """Gaussian numbers per node: 3T for linear, 2n + 2T for softmax.

    n more each with new noise and where re-used sequences meet weights that were compressed.
    """
    if activation == "linear":
        return 3 * tokens
    return (2 + new_noise + compressed) * field_count(tokens, "softmax") + 2 * tokens


@quickly_compiled("tokens")
def _tridiagonal(
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
    levels, star, noise = _tridiagonal(
        jnp.asarray(nodes[: 2 * tokens]),
        jnp.asarray(chi),
        jnp.asarray(training_noise, dtype=float),
        jnp.asarray(signal, dtype=float),
        tokens,
    )
    return LinearFields(levels, star, noise, _mirrored(share))


@quickly_compiled("tokens")
def eigenbasis(
    residual: Float[Array, "k nodes"],
    star: Float[Array, "T nodes"],
    other: Float[Array, "T nodes"],
    signal: Array,
    tokens: int,
) -> Float[Array, "3T nodes"]:
    """Eigenvalues of R + χ*χ*ᵀ − q0 I, and χ* and another vector in its eigenbasis.

    R in the coordinates of :func:`full_basis`.
    """
    matrix = to_fields(full_basis(tokens), residual) + star[:, None] * star[None]
    matrix = matrix - signal * jnp.eye(tokens)[:, :, None]
    levels, vectors = jnp.linalg.eigh(jnp.moveaxis(matrix, -1, 0))
    turned = (jnp.einsum("Nai,aN->iN", vectors, part) for part in (star, other))
    return jnp.concatenate([levels.T, *turned])


def kept_linear_fields(
    nodes: Float[np.ndarray, "2k+2T nodes"],
    Q: Float[np.ndarray, " nodes"],
    M: Float[np.ndarray, " nodes"],
    task: Task,
    *,
    tokens: int,
    rescaling: float,
) -> LinearFields:
    """The same for sequences chosen by their z: R = (M/Q − β)z + N(0, Q_y − M²/Q) in the pairs.

    Nodes are z/√Q in the basis of :func:`full_basis`, k other numbers, χ* and ζ.
    """
    k = len(field_pairs(tokens))
    gain, spread = given_frozen(Q, M, task.label_variance)
    residual = (gain - rescaling * np.sqrt(Q)) * nodes[:k] + spread * nodes[k : 2 * k]
    star = np.sqrt(task.signal) * nodes[2 * k : 2 * k + tokens]
    arrays = (residual, star, nodes[2 * k + tokens :], task.signal)
    turned = eigenbasis(*map(jnp.asarray, arrays), tokens)
    both, noise = paired(turned[: 2 * tokens], turned[2 * tokens :])
    return LinearFields(both[:tokens], both[tokens:], noise, jnp.ones(1))


def given_frozen(
    Q: Float[np.ndarray, " nodes"], M: Float[np.ndarray, " nodes"], label_variance: float
) -> tuple[Float[np.ndarray, " nodes"], Float[np.ndarray, " nodes"]]:
    """z^y = (M/√Q)(z/√Q) + S g: M/√Q and S, S² = Q_y − M²/Q."""
    gain = np.divide(M, np.sqrt(Q), out=np.zeros_like(M), where=Q > 0)
    return gain, np.sqrt(np.maximum(label_variance - gain**2, 0.0))


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
def _truncated_fields(
    nodes: Array, label: Array, Q: Array, M: Array, before: tuple[Array, ...],
    label_variance: Array, tokens: int,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """z' = (M'/Q_y) z^y + a g_2 + b g_4 of a truncated S', g_2 as in z of the trained one; a, b."""
    n = field_count(tokens, "softmax")
    g_2, g_4 = nodes[n : 2 * n], nodes[-n:]
    spread = frozen_coordinates(label, g_2, before[0], before[1], label_variance)[2]
    shared = (before[3] - M * before[1] / label_variance) / spread
    own = jnp.sqrt(jnp.maximum(Q - M**2 / label_variance - shared**2, SMALLEST_SPREAD))
    return M / label_variance * label + shared * g_2 + own * g_4, shared, own


@quickly_compiled("tokens")
def _with_new_noise(
    nodes: Array,
    label: Array,
    Q: Array,
    M: Array,
    label_variance: Array,
    noise: Array,
    tokens: int,
    truncated: tuple[Array, Array, Array] | None = None,
) -> Array:
    """The label with other noise, given z^y and z of the trained matrix, and of a truncated one.

    ``truncated``: M', a and b of the latter.
    """
    n = field_count(tokens, "softmax")
    g_2, g_3 = nodes[n : 2 * n], nodes[2 * n + 2 * tokens : 3 * n + 2 * tokens]
    spread = frozen_coordinates(label, g_2, Q, M, label_variance)[2]
    clean = (label_variance - noise) / label_variance
    shared = M * noise / (label_variance * spread)
    known, explained = clean * label + shared * g_2, shared**2
    if truncated is not None:
        M_left, along, own = truncated
        further = (M_left * noise / label_variance - along * shared) / own
        known, explained = known + further * nodes[-n:], explained + further**2
    return known + jnp.sqrt(jnp.maximum(noise + clean * noise - explained, noise)) * g_3


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
    kept: bool = False,
    before: Trained | None = None,
) -> SoftmaxFields:
    """The fields that (Q, M, V), here one value per node, leave to fine-tuning.

    Re-used training sequences carry Prox_V(z; y) with their pre-training label in place of z, and
    that label or one with new noise (docs/theory.md, section 3).  The fields of the frozen weights
    are multiplied by ``rescaling``.  Where the first numbers of the nodes are z/√Q of ``kept``
    sequences instead of z^y/√Q_y, the labels are drawn given these.  Where the frozen weights were
    truncated, Q, M and V of the trained ones and Tr ŜS'/D are those ``before``; then re-used
    sequences carry z' + V'(Prox_V(z; y) − z)/V.
    """
    at, *parts = (jnp.asarray(entry, dtype=float) for entry in (nodes, Q, M, V))
    if kept:
        n = field_count(tokens, "softmax")
        gain, spread = given_frozen(Q, M, task.label_variance)
        training = jnp.asarray(np.sqrt(Q) * nodes[:n])
        label = jnp.asarray(gain * nodes[:n] + spread * nodes[n : 2 * n])
    else:
        label, training = _frozen_fields(at, *parts[:2], task.label_variance, tokens)
    all_nodes, reused, share = reuse.by_kind(nodes)
    if reuse.share > 0:
        trained, truncated = tuple(parts), None
        if before is None:
            own = _reused_fields(label, training, parts[2], tokens)
        else:
            trained = tuple(jnp.asarray(part, dtype=float) for part in before)
            z = _frozen_fields(at, *trained[:2], task.label_variance, tokens)[1]
            training, *along = _truncated_fields(
                at, label, *parts[:2], trained, task.label_variance, tokens
            )
            truncated = parts[1], *along
            pull = _reused_fields(label, z, trained[2], tokens) - z
            own = training + parts[2] / jnp.maximum(trained[2], SMALLEST_VARIANCE) * pull
        own_label = label
        if reuse.new_noise is not None:
            variances = task.label_variance, reuse.new_noise
            own_label = _with_new_noise(at, label, *trained[:2], *variances, tokens, truncated)
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
