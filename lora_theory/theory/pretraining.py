"""State evolution of pre-training: order parameters Q, M, V and their conjugates.

One function per equation of docs/theory.md, section 2.  The equations on fixed nodes are exactly
the stationarity conditions of the potential Φ on the same nodes, jumps of the proximal operator
included.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_theory.attention import attention
from lora_theory.problem import Problem
from lora_theory.theory.compilation import quickly_compiled
from lora_theory.theory.fields import field_basis, field_count, to_fields
from lora_theory.theory.newton import solve_positive_definite
from lora_theory.theory.proximal import Proximal, softmax_field_proximal
from lora_theory.theory.roots import BlockValues, log_ratio
from lora_theory.theory.spectrum import truncated_second_moment

__all__ = [
    "OBSERVABLES",
    "SMALLEST_VARIANCE",
    "Constants",
    "frozen_coordinates",
    "linear_effective_noise",
    "paired",
    "pretraining_values",
    "relaxation",
    "stein_trace",
    "weight_potential",
    "weight_side",
]

#: Order of the observables in :class:`~lora_theory.theory.roots.Blocks`.
OBSERVABLES = (
    "Q", "M", "V", "Q_hat", "M_hat", "V_hat",
    "potential", "test_error", "train_error", "overlap", "jump_mass",
)  # fmt: skip

# floors that keep the equations finite where the weights vanish: S² and V
_SMALLEST_SPREAD, SMALLEST_VARIANCE = 1e-12, 1e-9


class Constants(NamedTuple):
    """The numbers of a problem that the equations of pre-training contain."""

    samples: float  # α
    scaled_penalty: float  # λ̃ = √κ λ
    teacher_rank: float  # κ0
    label_variance: float  # Q0 + Δ/2, variance of z^y

    @classmethod
    def of(cls, problem: Problem) -> Constants:
        """The constants of ``problem``."""
        stage = problem.pretraining
        return cls(
            stage.samples,
            math.sqrt(stage.rank) * stage.penalty,
            problem.teacher_rank,
            1 + problem.teacher_rank + problem.label_noise / 2,
        )


def weight_potential(
    Q_hat: Float[Array, ""],
    M_hat: Float[Array, ""],
    V_hat: Float[Array, ""],
    constants: Constants,
) -> Float[Array, ""]:
    """Ψ = (M̂²/4V̂) J(√Q̂/M̂, 2λ̃/M̂), the weight part of Φ (docs/theory.md, section 2)."""
    delta, epsilon = jnp.sqrt(Q_hat) / M_hat, 2 * constants.scaled_penalty / M_hat
    J = truncated_second_moment(delta, epsilon, jnp.asarray(constants.teacher_rank, dtype=float))
    return M_hat**2 / (4 * V_hat) * J


def weight_side(
    Q_hat: Float[Array, ""],
    M_hat: Float[Array, ""],
    V_hat: Float[Array, ""],
    constants: Constants,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Q = −4∂Ψ/∂V̂, M = 2∂Ψ/∂M̂, V = 4∂Ψ/∂Q̂ (docs/theory.md, section 2)."""
    slopes = jax.grad(weight_potential, argnums=(0, 1, 2))(Q_hat, M_hat, V_hat, constants)
    return -4 * slopes[2], 2 * slopes[1], 4 * slopes[0]


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


def linear_effective_noise(
    Q: Float[Array, ""], M: Float[Array, ""], label_variance: float | Float[Array, ""]
) -> Float[Array, ""]:
    """Δ_eff = Q0 + Δ/2 − 2M + Q (docs/theory.md, section 4)."""
    return label_variance - 2 * M + Q


def _linear_output(
    Q: Array, M: Array, V: Array, constants: Constants, tokens: int
) -> tuple[Array, ...]:
    """Conjugates, mean Moreau envelope, E, train error, jump mass: closed for σ(A) = A/T."""
    T = tokens
    noise = linear_effective_noise(Q, M, constants.label_variance)
    stiff = V + T**2 / 4
    V_hat = constants.samples * T * (T + 1) / stiff
    test = (T + 1) / T * noise
    train = test * (T**2 / 4 / stiff) ** 2
    envelope = test * (T**2 / 4) / stiff
    return V_hat * noise / stiff, V_hat, V_hat, envelope, test, train, jnp.zeros_like(Q)


def _softmax_output(
    Q: Array, M: Array, V: Array, nodes: Array, constants: Constants, tokens: int
) -> tuple[Array, ...]:
    """The same for softmax on nodes."""
    count = field_count(tokens, "softmax")
    basis = field_basis(tokens, "softmax")
    g1, g2 = paired(nodes[:count], nodes[count:])
    label, frozen, spread = frozen_coordinates(g1, g2, Q, M, constants.label_variance)
    V = jnp.maximum(V, SMALLEST_VARIANCE)
    labels = attention(to_fields(basis, label), "softmax", row_axis=0)
    prox = softmax_field_proximal(basis, labels, label, frozen, V)
    alpha, G = constants.samples, prox.force
    Q_hat = 2 * alpha * jnp.mean(jnp.sum(G**2, 0))
    V_hat = -2 * alpha / spread * jnp.mean(jnp.sum(G * g2, 0))
    M_hat = (2 * alpha * jnp.mean(jnp.sum(G * label, 0)) + M * V_hat) / constants.label_variance
    students = attention(to_fields(basis, frozen), "softmax", row_axis=0)
    test = jnp.mean(jnp.sum((labels - students) ** 2, (0, 1)))
    train = jnp.mean(prox.loss)
    jump_mass = 1 - 2 * alpha * jnp.mean(stein_trace(prox)) / V / V_hat
    return Q_hat, M_hat, V_hat, V * Q_hat / (4 * alpha) + train, test, train, jump_mass


def stein_trace(prox: Proximal) -> Float[Array, " nodes"]:
    """tr(I − ∂u/∂ω): its mean over v is the Stein form of the response, blind to jumps."""
    count, nodes = prox.point.shape
    eye = jnp.broadcast_to(jnp.eye(count)[:, :, None], (count, count, nodes))
    return count - jnp.einsum("iiN->N", solve_positive_definite(prox.hessian, eye)[0])


@quickly_compiled("activation", "tokens")
def _evaluate(
    unknowns: Array, nodes: Array, constants: Constants, activation: str, tokens: int
) -> tuple[Array, Array, Array]:
    def stacked(unknowns: Array) -> tuple[Array, Array]:
        Q_hat, M_hat, V_hat = jnp.exp(unknowns)
        Q, M, V = weight_side(Q_hat, M_hat, V_hat, constants)
        if activation == "linear":
            output = _linear_output(Q, M, V, constants, tokens)
        else:
            output = _softmax_output(Q, M, V, nodes, constants, tokens)
        new_Q, new_M, new_V, envelope, test, train, jumps = output
        potential = (
            (Q_hat * V + 2 * M_hat * M - V_hat * Q) / 4
            + constants.samples * envelope
            - weight_potential(Q_hat, M_hat, V_hat, constants)
        )
        overlap = M / jnp.sqrt(jnp.maximum(Q * (1 + constants.teacher_rank), 1e-300))
        residual = [new_Q / Q_hat - 1, new_M / M_hat - 1, new_V / V_hat - 1]
        observables = [Q, M, V, Q_hat, M_hat, V_hat, potential, test, train, overlap, jumps]
        both = jnp.stack(residual + observables)
        return both, both

    jacobian, both = jax.jacfwd(stacked, has_aux=True)(unknowns)
    return both[: unknowns.size], both[unknowns.size :], jacobian


def relaxation(residual: Float[np.ndarray, " 3"]) -> Float[np.ndarray, " 3"]:
    """Damped step of log(Q̂, M̂, V̂) from the residuals new/old − 1."""
    return np.asarray(0.6 * np.clip(log_ratio(1 + residual), -2.0, 2.0))


def pretraining_values(
    unknowns: Float[np.ndarray, " 3"],
    nodes: Float[Array, "2n nodes"],
    constants: Constants,
    *,
    activation: str,
    tokens: int,
) -> BlockValues:
    """Relative residuals of (Q̂, M̂, V̂) and all observables at log(Q̂, M̂, V̂) on one block of nodes."""
    out = _evaluate(jnp.asarray(unknowns), nodes, constants, activation, tokens)
    return BlockValues(*(np.asarray(part) for part in out))
