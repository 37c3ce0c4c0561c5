"""State evolution of rank-one LoRA on frozen weights: order parameters q, m, v.

One function per equation of docs/theory.md, section 3.  With ω = (m/q0)χ* + sζ, s² = q − m²/q0, the
equations on fixed nodes (χ*, ζ, fields) are the exact stationarity conditions of the potential φ on
the same nodes, jumps of the proximal operator included.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import gammaincinv, ndtr

from lora_theory.attention import attention
from lora_theory.theory.compilation import quickly_compiled
from lora_theory.theory.fields import field_basis, field_count, softmax_loss, to_fields
from lora_theory.theory.pretraining import (
    SMALLEST_VARIANCE,
    frozen_coordinates,
    paired,
    stein_trace,
)
from lora_theory.theory.proximal import (
    Proximal,
    linear_lora_proximal,
    softmax_field_proximal,
    softmax_lora_proximal,
)
from lora_theory.theory.roots import BlockValues, log_ratio

__all__ = [
    "INFORMED",
    "OBSERVABLES",
    "UNINFORMED",
    "ZERO",
    "ZERO_SPREAD",
    "Fields",
    "Task",
    "finetuning_values",
    "linear_fields",
    "node_dimension",
    "relaxation",
]

#: Order of the observables in :class:`~lora_theory.theory.roots.Blocks`.
OBSERVABLES = (
    "q", "m", "v", "q_hat", "m_hat", "v_hat",
    "potential", "overlap", "test_error", "train_error", "frozen_test_error", "jump_mass", "growth",
)  # fmt: skip

#: log s that stands for s = 0 on the branch w = 0, where only the limit ω = sζ → 0 matters.
ZERO_SPREAD = float(np.log(1e-5))
INFORMED, UNINFORMED, ZERO = (False, False, False), (False, True, False), (True, True, False)


class Task(NamedTuple):
    """The numbers of the fine-tuning task that its equations contain."""

    samples: float  # α'
    penalty: float  # λ'
    signal: float  # q0
    label_variance: float  # Q_y = Q0 + Δ/2, variance of z^y


class Fields(NamedTuple):
    """Residual fields of linear attention on nodes, in the eigenbasis of R + χ*χ*ᵀ − q0 I."""

    levels: Float[Array, "T nodes"]
    signal: Float[Array, "T nodes"]  # χ*
    noise: Float[Array, "T nodes"]  # ζ
    effective_noise: Float[Array, ""]  # Δ_eff,0, of the test law


def node_dimension(tokens: int, activation: str) -> int:
    """Gaussian numbers per node: 2n + 2T for softmax, 3T for linear."""
    if activation == "linear":
        return 3 * tokens
    return 2 * field_count(tokens, "softmax") + 2 * tokens


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
    training_noise: float,
    test_noise: float,
    signal: float,
    *,
    tokens: int,
) -> Fields:
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
    return Fields(levels, star, noise, jnp.asarray(test_noise, dtype=float))


class _Output(NamedTuple):
    """Node averages at given (q, m, v)."""

    force_square: Array  # E|G|²
    force_noise: Array  # E G·ζ
    force_signal: Array  # E G·χ*
    norm_slope: Array  # E ∂_qℓ
    stein: Array  # E tr(I − ∂prox/∂ω)
    train_error: Array
    test_error: Array
    frozen_test_error: Array


def _collect(
    prox: Proximal, signal: Array, noise: Array, slope: Array, errors: tuple[Array, Array]
) -> _Output:
    G = prox.force
    return _Output(
        jnp.mean(jnp.sum(G**2, 0)),
        jnp.mean(jnp.sum(G * noise, 0)),
        jnp.mean(jnp.sum(G * signal, 0)),
        jnp.mean(slope),
        jnp.mean(stein_trace(prox)),
        jnp.mean(prox.loss),
        *errors,
    )


def _linear_output(point: tuple[Array, ...], fields: Fields, task: Task, tokens: int) -> _Output:
    q, m, v, s = point
    levels = fields.levels + q
    omega = m / task.signal * fields.signal + s * fields.noise
    prox = linear_lora_proximal(levels, omega, v)
    slope = 2 / tokens**2 * (jnp.sum(levels, 0) - jnp.sum(prox.point**2, 0))
    shape = (tokens + 1) / tokens
    test = shape * (fields.effective_noise + task.signal**2 + q**2 - 2 * m**2)
    frozen = shape * (fields.effective_noise + task.signal**2)
    return _collect(prox, fields.signal, fields.noise, slope, (test, frozen))


def _softmax_output(
    point: tuple[Array, ...],
    frozen: Array,
    nodes: Array,
    task: Task,
    tokens: int,
    reused: bool,
) -> _Output:
    q, m, v, s = point
    Q, M, V = frozen
    n, T, q0 = field_count(tokens, "softmax"), tokens, task.signal
    basis, eye = field_basis(tokens, "softmax"), jnp.eye(T)[:, :, None]
    # the frozen fields do not depend on ζ: computed once per mirror pair, then doubled
    label, test_z, _ = frozen_coordinates(nodes[:n], nodes[n : 2 * n], Q, M, task.label_variance)
    label_fields, test_fields = to_fields(basis, label), to_fields(basis, test_z)
    training_fields = test_fields
    if reused:
        labels = attention(label_fields, "softmax", row_axis=0)
        V = jnp.maximum(V, SMALLEST_VARIANCE)
        training_z = softmax_field_proximal(basis, labels, label, test_z, V).point
        training_fields = to_fields(basis, training_z)
    label_fields, test_fields, training_fields = (
        jnp.concatenate([fields, fields], axis=-1)
        for fields in (label_fields, test_fields, training_fields)
    )
    signal, noise = paired(jnp.sqrt(q0) * nodes[2 * n : 2 * n + T], nodes[2 * n + T :])
    omega = m / q0 * signal + s * noise
    lift = signal[:, None] * signal[None] - q0 * eye
    task_labels = attention(label_fields + lift, "softmax", row_axis=0)
    prox = softmax_lora_proximal(training_fields, task_labels, signal, omega, v, q)
    chi = prox.point
    fitted = softmax_loss(training_fields + chi[:, None] * chi[None] - q * eye, task_labels)
    slope = -jnp.einsum("aaN->N", fitted.gradient)

    def error(student: Array) -> Array:
        gap = task_labels - attention(student, "softmax", row_axis=0)
        return jnp.mean(jnp.sum(gap**2, (0, 1)))

    errors = error(test_fields + omega[:, None] * omega[None] - q * eye), error(test_fields)
    return _collect(prox, signal, noise, slope, errors)


@quickly_compiled("activation", "tokens", "reused")
def _evaluate(
    unknowns: Array,
    frozen: Array,
    support: Array | Fields,
    task: Task,
    held: Array,
    activation: str,
    tokens: int,
    reused: bool,
) -> tuple[Array, Array, Array]:
    q0, alpha = task.signal, task.samples

    def stacked(everything: Array) -> tuple[Array, Array]:
        x = everything[:3]
        s, m, v = jnp.exp(x[0]), x[1] * q0, jnp.exp(x[2])
        q = s**2 + m**2 / q0
        point = (q, m, v, s)
        if isinstance(support, Fields):
            out = _linear_output(point, support, task, tokens)
        else:
            out = _softmax_output(point, everything[3:], support, task, tokens, reused)
        q_hat = alpha * out.force_square
        response = -alpha / s * out.force_noise
        v_hat = response + 2 * alpha * out.norm_slope
        m_hat = alpha / q0 * out.force_signal + m / q0 * response
        R = 2 * task.penalty + v_hat
        growth = q_hat * v**2 / s**2 - 1
        free = jnp.stack([growth, m_hat * v - m / q0, 1 - v * R])
        fixed = jnp.stack([ZERO_SPREAD - x[0], -x[1], 0.0])
        residual = jnp.where(held, fixed, free)
        # φ with the conjugates eliminated, linear in the node averages
        potential = alpha * (0.5 * v * out.force_square + out.train_error)
        potential += task.penalty * q - s**2 / (2 * v)
        overlap = jnp.abs(m) / jnp.sqrt(q * q0)
        jumps = 1 - alpha / v * out.stein / response
        observables = [q, m, v, q_hat, m_hat, v_hat, potential, overlap]
        observables += [out.test_error, out.train_error, out.frozen_test_error, jumps, growth]
        both = jnp.concatenate([residual, jnp.stack(observables)])
        return both, both

    jacobian, both = jax.jacfwd(stacked, has_aux=True)(jnp.concatenate([unknowns, frozen]))
    return both[:3], both[3:], jacobian


def relaxation(residual: Float[np.ndarray, " 3"]) -> Float[np.ndarray, " 3"]:
    """Damped step of (log s, m/q0, log v); s, bounded, does not outrun its response v."""
    growth, gain, response = residual
    step = np.array([0.5 * log_ratio(1 + growth), gain, -log_ratio(1 - response)])
    return np.asarray(0.6 * np.clip(step, (-0.7, -0.7, -2.0), (0.7, 0.7, 2.0)))


def finetuning_values(
    unknowns: Float[np.ndarray, " 3"],
    frozen: Float[np.ndarray, " p"],
    support: Float[Array, "2n+2T nodes"] | Fields,
    task: Task,
    held: tuple[bool, bool, bool],
    *,
    activation: str,
    tokens: int,
    reused: bool,
) -> BlockValues:
    """Relative residuals of the LoRA equations and all observables on one block of nodes.

    Args:
        unknowns: (log s, m/q0, log v).
        frozen: (Q, M, V) of the frozen weights for softmax, empty for linear.
        support: nodes for softmax; :func:`linear_fields` for linear.
        held: which unknowns are held instead of solved for: :data:`INFORMED` none,
            :data:`UNINFORMED` m = 0, :data:`ZERO` also s at exp(ZERO_SPREAD), which stands for 0.
    """
    out = _evaluate(
        jnp.asarray(unknowns), jnp.asarray(frozen), support, task, jnp.asarray(held),
        activation, tokens, reused,
    )  # fmt: skip
    return BlockValues(*(np.asarray(part) for part in out))
