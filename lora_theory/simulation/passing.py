"""One iteration of message passing in each stage, and its derivative (docs/theory.md, section 6).

Sequences are the nodes of the proximal operators and come last.  The fields of pre-training have
the coordinates of :func:`~lora_theory.theory.fields.field_basis`, h = Σ_i z_i E_i.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from lora_theory.attention import attention
from lora_theory.compilation import quickly_compiled
from lora_theory.theory.fields import (
    field_basis,
    softmax_field_hessian,
    softmax_loss,
    to_fields,
)
from lora_theory.theory.newton import Expansion, minimise, solve_positive_definite
from lora_theory.theory.proximal import (
    Proximal,
    linear_lora_proximal,
    rank_one_part,
    softmax_lora_minima,
    softmax_lora_proximal,
    softmax_lora_starts,
)
from lora_theory.theory.regularizers import Regularizer
from lora_theory.theory.separable import Numerical

__all__ = [
    "FinetuningSystem",
    "PretrainingSystem",
    "Response",
    "State",
    "finetuning_growth",
    "finetuning_step",
    "pretraining_growth",
    "pretraining_step",
]

# 1/v is at least this share of 2λ', below which the first iterates may bring it
_SMALLEST_STIFFNESS = 0.1
_TOLERANCE, _MAX_STEPS = 1e-7, 200


class PretrainingSystem(NamedTuple):
    """The data of stage one."""

    sequences: Float[Array, "N T D"]
    labels: Float[Array, "n N"]  # z^y
    spreads: Float[Array, "n n N"]  # covariance of z given X at Tr S²/D = 1, with mean I
    teacher: Float[Array, "D D"]  # S0
    label_variance: Float[Array, ""]  # Q_y
    regularizer: Regularizer | Numerical  # which makes f(Y)/V̂ of Y …
    columns: Integer[Array, ""]  # … and keeps so many of the largest eigenvalues

    @classmethod
    def of(
        cls,
        sequences: Float[Array, "N T D"],
        logits: Float[Array, "N T T"],
        teacher: Float[Array, "D D"],
        label_noise: float,
        regularizer: Regularizer | Numerical,
        columns: int,
        activation: str,
    ) -> PretrainingSystem:
        """From sequences and logits h^y of their labels.

        z_i = ½ Σ_ab E_i,ab h_ab.  Given X, S random, z has covariance ½Tr(E_iGE_jG) Tr S²/D,
        G = XXᵀ/D, up to O(1/D).
        """
        dim = sequences.shape[2]
        E = jnp.asarray(field_basis(sequences.shape[1], activation))
        G = jnp.einsum("Nad,Nbd->Nab", sequences, sequences) / dim
        left = jnp.einsum("abi,Nbc->Niac", E, G)
        return cls(
            sequences,
            jnp.einsum("abi,Nab->iN", E / 2, logits),
            jnp.einsum("Niac,Njca->ijN", left, left) / 2,
            teacher,
            jnp.sum(teacher**2) / dim + label_noise / 2,
            regularizer,
            jnp.asarray(columns),
        )


class FinetuningSystem(NamedTuple):
    """The data of stage two."""

    sequences: Float[Array, "N T D"]
    frozen: Float[Array, "T T N"]  # h
    logits: Float[Array, "T T N"]  # h^y + χ*χ*ᵀ − q0 I
    task_vector: Float[Array, " D"]
    signal: Float[Array, ""]  # q0
    penalty: Float[Array, ""]  # λ'


class State(NamedTuple):
    """What an iteration hands to the next."""

    weights: Float[Array, "..."]  # S, (D, D), or w, (D,)
    force: Float[Array, "n N"]  # g
    variance: Float[Array, ""]  # V, or v
    minimum: Float[Array, "n N"]  # of the proximal operators: a start of the next search


class Response(NamedTuple):
    """The derivatives of one iteration, its averages held."""

    slope: Float[Array, "n n N"]  # ∂g/∂ω
    variance: Float[Array, ""]  # V, or v, in ω
    stiffness: Float[Array, ""]  # V̂, or Λ
    quotients: Float[Array, "..."]  # of f(Y)/V̂ in the eigenbasis of Y, (D, D); or the new v
    vectors: Float[Array, "..."]  # that eigenbasis, (D, D); or w and w*, (2, D)
    replicon: Float[Array, ""]  # growth of random perturbations for D → ∞


def _matrix_fields(system: PretrainingSystem, matrix: Array, activation: str) -> Array:
    """z of h_ab = (x_aᵀSx_b − δ_ab Tr S)/√D."""
    X = system.sequences
    count, tokens, dim = X.shape
    flat = jnp.matmul(X.reshape(-1, dim), matrix)
    products = jnp.einsum("Nad,Nbd->abN", flat.reshape(count, tokens, dim), X)
    centred = products - jnp.trace(matrix) * jnp.eye(tokens)[:, :, None]
    basis = jnp.asarray(field_basis(tokens, activation))
    found: Array = jnp.einsum("abn,abN->nN", basis, centred) / (2 * dim**0.5)
    return found


def _matrix_pull(system: PretrainingSystem, force: Array, activation: str) -> Array:
    """(2/D) Σ_μ Σ_i g_i Φ_i, Σ_i g_i Φ_i = (XᵀFX − Tr F I)/(2√D) with F = Σ_i g_i E_i."""
    X = system.sequences
    _, tokens, dim = X.shape
    F = jnp.einsum("abn,nN->Nab", jnp.asarray(field_basis(tokens, activation)), force)
    products = jnp.matmul(X.reshape(-1, dim).T, jnp.matmul(F, X).reshape(-1, dim))
    pull: Array = (products - jnp.einsum("Naa->", F) * jnp.eye(dim)) / dim**1.5
    return pull


def _field_loss(u: Array, label: Array, tokens: int, activation: str) -> Expansion:
    """ℓ(u; y) with its derivatives, y the attention of the logits Σ_i z^y_i E_i."""
    if activation == "linear":
        steep = 4 / tokens**2
        hessian = jnp.broadcast_to(steep * jnp.eye(len(u))[:, :, None], (len(u), *u.shape))
        return Expansion(steep / 2 * jnp.sum((u - label) ** 2, 0), steep * (u - label), hessian)
    basis = field_basis(tokens, activation)
    target = attention(to_fields(basis, label), activation, row_axis=0)
    loss = softmax_loss(to_fields(basis, u), target)
    gradient = jnp.einsum("abn,abN->nN", jnp.asarray(basis), loss.gradient)
    return Expansion(loss.value, gradient, softmax_field_hessian(loss.hessian))


def _inverse(matrices: Float[Array, "n n N"]) -> Float[Array, "n n N"]:
    return jnp.moveaxis(jnp.linalg.inv(jnp.moveaxis(matrices, -1, 0)), 0, -1)


def _field_proximal(
    system: PretrainingSystem, omega: Array, state: State, activation: str
) -> tuple[Array, Array, Array]:
    """argmin_u (u − ω)ᵀ(VΓ)⁻¹(u − ω)/2 + ℓ(u; y), Γ the spreads; the force; its slope."""
    tokens = system.sequences.shape[1]
    loss = functools.partial(_field_loss, tokens=tokens, activation=activation)

    def objective(u: Array, label: Array, omega: Array, stiff: Array) -> Expansion:
        pull = jnp.einsum("ijN,jN->iN", stiff, u - omega)
        fit = loss(u, label)
        value = fit.value + 0.5 * jnp.sum(pull * (u - omega), 0)
        return Expansion(value, pull + fit.gradient, stiff + fit.hessian)

    stiff = _inverse(system.spreads) / state.variance
    data = system.labels, omega, stiff
    wanted = jnp.ones(omega.shape[1], dtype=bool)

    def descend(start: Array) -> tuple[Array, Array]:
        return minimise(
            objective, start, data, 1 / state.variance,
            wanted=wanted, tolerance=_TOLERANCE, max_steps=_MAX_STEPS,
        )  # fmt: skip

    points, values = jax.lax.map(descend, jnp.stack([state.minimum, omega, system.labels]))
    point = jnp.take_along_axis(points, jnp.argmin(values, axis=0)[None, None], axis=0)[0]
    last = objective(point, *data)
    point = point - solve_positive_definite(last.hessian, last.gradient)
    response = _inverse(objective(point, *data).hessian)
    slope = jnp.einsum("ijN,jkN,klN->ilN", stiff, response, stiff) - stiff
    return point, -loss(point, system.labels).gradient, slope


@quickly_compiled("activation")
def pretraining_step(
    system: PretrainingSystem, state: State, activation: str
) -> tuple[State, Float[Array, " 6"], Response]:
    """The next state; Q, M, V that enter it, Q̂, M̂, V̂ that result; the derivatives.

    ω = z(S) − VΓg,  Y = V̂S + (2/D)Σ g_iΦ_i,  V̂ = −(2/D²)Σ tr Γ∂_ωg,  S = f(Y)/V̂, and V the mean
    of the difference quotients of f/V̂.  Γ → I for D → ∞; at D = 100 its entries scatter by
    .2, and without it the iteration need not settle.
    """
    S, V, dim = state.weights, state.variance, system.sequences.shape[2]
    spread = jnp.einsum("ijN,jN->iN", system.spreads, state.force)
    omega = _matrix_fields(system, S, activation) - V * spread
    point, force, slope = _field_proximal(system, omega, state, activation)
    answer = jnp.einsum("ijN,jkN->ikN", system.spreads, slope)
    V_hat = -2 / dim**2 * jnp.einsum("iiN->", answer)
    levels, vectors = jnp.linalg.eigh(V_hat * S + _matrix_pull(system, force, activation))
    values, slopes = jax.jvp(
        lambda y: system.regularizer.shrink(y, V_hat), (levels,), (jnp.ones_like(levels),)
    )
    kept = jnp.arange(dim) >= dim - system.columns
    values, slopes = jnp.where(kept, values, 0.0), jnp.where(kept, slopes, 0.0)
    quotients = _quotients(levels, values, slopes)
    Q, M = jnp.sum(S**2) / dim, jnp.sum(S * system.teacher) / dim
    signal = 2 / dim**2 * jnp.sum(force * system.labels)
    row = [Q, M, V, 2 / dim**2 * jnp.sum(force**2)]
    row += [(signal + M * V_hat) / system.label_variance, V_hat]
    replicon = 2 / dim**2 * jnp.einsum("ijN,jiN->", answer, answer) * jnp.mean(quotients**2)
    return (
        State((vectors * values) @ vectors.T, force, jnp.mean(quotients), point),
        jnp.stack(row),
        Response(slope, V, V_hat, quotients, vectors, replicon),
    )


def _quotients(points: Array, values: Array, slopes: Array) -> Array:
    """(f(x) − f(y))/(x − y) of all pairs, f' on the diagonal."""
    gap, rise = points[:, None] - points[None], values[:, None] - values[None]
    tangent = 0.5 * (slopes[:, None] + slopes[None])
    return jnp.where(gap == 0, tangent, rise / jnp.where(gap == 0, 1.0, gap))


@quickly_compiled("activation")
def pretraining_growth(
    system: PretrainingSystem,
    weights: Float[Array, "D D"],
    force: Float[Array, "n N"],
    response: Response,
    activation: str,
) -> tuple[Float[Array, "D D"], Float[Array, "n N"]]:
    """What one iteration makes of small changes of S and g."""
    spread = jnp.einsum("ijN,jN->iN", system.spreads, force)
    omega = _matrix_fields(system, weights, activation) - response.variance * spread
    force = jnp.einsum("ijN,jN->iN", response.slope, omega)
    change = response.stiffness * weights + _matrix_pull(system, force, activation)
    moved = response.vectors.T @ change @ response.vectors
    return response.vectors @ (response.quotients * moved) @ response.vectors.T, force


def _lora_proximal(
    system: FinetuningSystem, omega: Array, state: State, q: Array, activation: str
) -> tuple[Proximal, Array]:
    """prox(ω) and Σ_μ ∂_qℓ there."""
    v, tokens = state.variance, len(omega)
    residual = system.logits - system.frozen
    if activation == "linear":
        levels, vectors = jnp.linalg.eigh(jnp.moveaxis(residual, -1, 0))
        levels = levels.T + q
        prox = linear_lora_proximal(levels, jnp.einsum("Nab,aN->bN", vectors, omega), v)
        slope = 2 / tokens**2 * (jnp.sum(levels) - jnp.sum(prox.point**2))
        point, force = (jnp.einsum("Nab,bN->aN", vectors, part) for part in prox[:2])
        hessian = jnp.einsum("Nac,cdN,Nbd->abN", vectors, prox.hessian, vectors)
        return Proximal(point, force, prox.loss, hessian), slope
    eye = jnp.eye(tokens)[:, :, None]
    labels = attention(system.logits, activation, row_axis=0)
    star = _vector_fields(system, system.task_vector)
    likely = jnp.stack([star, rank_one_part(residual + system.signal * eye)])
    parts = system.frozen, labels, omega, v, q
    starts = softmax_lora_starts(*parts, likely)
    found = softmax_lora_minima(*parts, jnp.concatenate([state.minimum[None], starts]))
    prox = softmax_lora_proximal(*parts, found.point)
    chi = prox.point
    fitted = softmax_loss(system.frozen + chi[:, None] * chi[None] - q * eye, labels)
    return prox, -jnp.einsum("aaN->", fitted.gradient)


def _vector_fields(system: FinetuningSystem, vector: Array) -> Array:
    """χ = Xw/√D."""
    X = system.sequences
    fields: Array = jnp.einsum("NaD,D->aN", X, vector) / X.shape[2] ** 0.5
    return fields


def _vector_pull(system: FinetuningSystem, force: Array) -> Array:
    """Xᵀg/√D."""
    X = system.sequences
    pull: Array = jnp.einsum("NaD,aN->D", X, force) / X.shape[2] ** 0.5
    return pull


@quickly_compiled("activation")
def finetuning_step(
    system: FinetuningSystem, state: State, activation: str
) -> tuple[State, Float[Array, " 6"], Response]:
    """The next state; q, m, v that enter it, q̂, m̂, v̂ that result; the derivatives.

    ω = Xw/√D − v g,  Λ = −(1/D)Σ tr ∂_ωg,  v̂ = Λ + (2/D)Σ ∂_qℓ,  v = 1/(2λ' + v̂),
    w = v(Λw + Xᵀg/√D).
    """
    w, v, star = state.weights, state.variance, system.task_vector
    dim = w.size
    q, m = w @ w / dim, w @ star / dim
    omega = _vector_fields(system, w) - v * state.force
    prox, norm_slope = _lora_proximal(system, omega, state, q, activation)
    units = jnp.broadcast_to(jnp.eye(len(omega))[:, :, None], prox.hessian.shape)
    inverse = jnp.stack([solve_positive_definite(prox.hessian, unit) for unit in units])
    slope = (inverse - units) / v
    stiffness = -jnp.einsum("iiN->", slope) / dim
    v_hat = stiffness + 2 / dim * norm_slope
    floor = _SMALLEST_STIFFNESS * 2 * system.penalty
    new_v = 1 / jnp.maximum(2 * system.penalty + v_hat, floor)
    pull = _vector_pull(system, prox.force)
    m_hat = (pull @ star / dim + m * stiffness) / system.signal
    return (
        State(new_v * (stiffness * w + pull), prox.force, new_v, prox.point),
        jnp.stack([q, m, v, jnp.sum(prox.force**2) / dim, m_hat, v_hat]),
        Response(
            slope, v, stiffness, new_v, jnp.stack([w, star]), new_v**2 * jnp.sum(slope**2) / dim
        ),
    )


@quickly_compiled()
def finetuning_growth(
    system: FinetuningSystem,
    weights: Float[Array, " D"],
    force: Float[Array, "T N"],
    response: Response,
) -> tuple[Float[Array, " D"], Float[Array, "T N"]]:
    """What one iteration makes of small changes of w and g, orthogonal to w and w*.

    Along these two the changes are those of q and m, of the equations and no replicon.
    """
    omega = _vector_fields(system, weights) - response.variance * force
    force = jnp.einsum("ijN,jN->iN", response.slope, omega)
    change = response.stiffness * weights + _vector_pull(system, force)
    away = jnp.linalg.qr(response.vectors.T)[0]
    return response.quotients * (change - away @ (away.T @ change)), force
