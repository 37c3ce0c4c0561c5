"""What the penalty of pre-training makes of the spectrum of Y = M̂S0 + √Q̂Z.

A penalty D Σ_i R(s_i) on the eigenvalues of S gives f(y)/V̂ = argmin_s V̂s²/4 − ys/2 + R(s), and the
weight part of the potential Ψ = −∫ min_s{V̂s²/4 − ys/2 + R(s)} μ_Y(dy), whose derivatives are
Q = −4∂Ψ/∂V̂, M = 2∂Ψ/∂M̂ and V = 4∂Ψ/∂Q̂ (docs/theory.md, section 2).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_theory.laws import Law, Wishart
from lora_theory.theory.convolution import boundary, quantile, tail_moment
from lora_theory.theory.spectrum import learned_rank, truncated_second_moment

__all__ = ["Frobenius", "NarrowFactor", "NuclearNorm", "Regularizer", "WeightDecay"]

Scalar = Float[Array, ""]


class Regularizer(Protocol):
    """A penalty, as its spectral function; a NamedTuple of numbers, for JAX to trace."""

    def potential(self, Q_hat: Scalar, M_hat: Scalar, V_hat: Scalar, law: Law) -> Scalar:
        """Ψ(Q̂, M̂, V̂), differentiable twice."""

    def learned_rank(self, Q_hat: Scalar, M_hat: Scalar, law: Law) -> Scalar:
        """Rank of Ŝ over D."""

    def shrink(self, y: Float[Array, "..."], V_hat: Scalar) -> Float[Array, "..."]:
        """f(y)/V̂, whatever the share of eigenvalues that a cut of the rank keeps."""

    def dead_zone(self, Q_hat: Scalar, M_hat: Scalar, law: Law) -> tuple[Scalar, Scalar]:
        """The ends of the y that become 0, a cut of the rank included; equal where none does."""


class WeightDecay(NamedTuple):
    """λ‖W‖²_F on the factor: R(s) = λ̃s for s ≥ 0 with λ̃ = √κ λ, so f(y) = (y − 2λ̃)₊."""

    scaled_penalty: float | Array  # λ̃

    def potential(self, Q_hat: Scalar, M_hat: Scalar, V_hat: Scalar, law: Law) -> Scalar:
        """(M̂²/4V̂) J(√Q̂/M̂, 2λ̃/M̂)."""
        J = _second_moment(*self.threshold(Q_hat, M_hat), law)
        return M_hat**2 / (4 * V_hat) * J

    def learned_rank(self, Q_hat: Scalar, M_hat: Scalar, law: Law) -> Scalar:
        """The share of μ_δ beyond ε."""
        return _share(*self.threshold(Q_hat, M_hat), law)

    def shrink(self, y: Float[Array, "..."], V_hat: Scalar) -> Float[Array, "..."]:
        """(y − 2λ̃)₊/V̂."""
        return jnp.maximum(y - 2 * self.scaled_penalty, 0.0) / V_hat

    def dead_zone(self, Q_hat: Scalar, M_hat: Scalar, law: Law) -> tuple[Scalar, Scalar]:
        """Up to 2λ̃."""
        return jnp.full_like(Q_hat, -jnp.inf), jnp.asarray(2 * self.scaled_penalty)

    def threshold(self, Q_hat: Scalar, M_hat: Scalar) -> tuple[Scalar, Scalar]:
        """δ and ε."""
        return jnp.sqrt(Q_hat) / M_hat, 2 * self.scaled_penalty / M_hat


class NarrowFactor(NamedTuple):
    """The same with κ < 1: where the rank that is learnt exceeds κ, f keeps the κD largest."""

    decay: WeightDecay
    rank: float | Array  # κ

    def potential(self, Q_hat: Scalar, M_hat: Scalar, V_hat: Scalar, law: Law) -> Scalar:
        """(M̂²/4V̂) times the second moment of what is kept."""
        delta, epsilon = self.decay.threshold(Q_hat, M_hat)
        J = jax.lax.cond(
            self.rank < jax.lax.stop_gradient(_share(delta, epsilon, law)),
            lambda: _second_moment_of_largest(delta, epsilon, law, jnp.asarray(self.rank)),
            lambda: _second_moment(delta, epsilon, law),
        )
        weights: Array = M_hat**2 / (4 * V_hat) * J
        return weights

    def learned_rank(self, Q_hat: Scalar, M_hat: Scalar, law: Law) -> Scalar:
        """At most κ."""
        return jnp.minimum(self.decay.learned_rank(Q_hat, M_hat, law), self.rank)

    def shrink(self, y: Float[Array, "..."], V_hat: Scalar) -> Float[Array, "..."]:
        """That of weight decay, for the y that are kept."""
        return self.decay.shrink(y, V_hat)

    def dead_zone(self, Q_hat: Scalar, M_hat: Scalar, law: Law) -> tuple[Scalar, Scalar]:
        """Up to 2λ̃, or as far as leaves the share κ."""
        delta, epsilon = self.decay.threshold(Q_hat, M_hat)
        share = jnp.asarray(self.rank)
        end = jnp.maximum(epsilon, quantile(share, delta, law)[0])
        return jnp.full_like(Q_hat, -jnp.inf), M_hat * end


class NuclearNorm(NamedTuple):
    """λD Σ|s_i| on an unfactorised symmetric S: f is the soft threshold of |y| at 2λ."""

    penalty: float | Array  # λ

    def potential(self, Q_hat: Scalar, M_hat: Scalar, V_hat: Scalar, law: Law) -> Scalar:
        """(M̂²/4V̂) times the second moments beyond both thresholds."""
        delta, epsilon = jnp.sqrt(Q_hat) / M_hat, 2 * self.penalty / M_hat
        both = _second_moment(delta, epsilon, law)
        both += _tail(delta, -epsilon, law, order=2, left=True)
        return M_hat**2 / (4 * V_hat) * both

    def learned_rank(self, Q_hat: Scalar, M_hat: Scalar, law: Law) -> Scalar:
        """The share of μ_δ beyond both thresholds."""
        delta, epsilon = jnp.sqrt(Q_hat) / M_hat, 2 * self.penalty / M_hat
        return _share(delta, epsilon, law) + _tail(delta, -epsilon, law, order=0, left=True)

    def shrink(self, y: Float[Array, "..."], V_hat: Scalar) -> Float[Array, "..."]:
        """The soft threshold of y at ±2λ, over V̂."""
        return jnp.sign(y) * jnp.maximum(jnp.abs(y) - 2 * self.penalty, 0.0) / V_hat

    def dead_zone(self, Q_hat: Scalar, M_hat: Scalar, law: Law) -> tuple[Scalar, Scalar]:
        """From −2λ to 2λ."""
        return jnp.asarray(-2 * self.penalty), jnp.asarray(2 * self.penalty)


class Frobenius(NamedTuple):
    """(λD/2)‖S‖²_F on an unfactorised symmetric S: Ŝ = Y/(V̂ + 2λ)."""

    penalty: float | Array  # λ

    def potential(self, Q_hat: Scalar, M_hat: Scalar, V_hat: Scalar, law: Law) -> Scalar:
        """(M̂²Q0 + Q̂)/4(V̂ + 2λ)."""
        return (M_hat**2 * law.moments()[1] + Q_hat) / (4 * (V_hat + 2 * self.penalty))

    def learned_rank(self, Q_hat: Scalar, M_hat: Scalar, law: Law) -> Scalar:
        """Full."""
        return jnp.ones_like(Q_hat)

    def shrink(self, y: Float[Array, "..."], V_hat: Scalar) -> Float[Array, "..."]:
        """y/(V̂ + 2λ)."""
        return y / (V_hat + 2 * self.penalty)

    def dead_zone(self, Q_hat: Scalar, M_hat: Scalar, law: Law) -> tuple[Scalar, Scalar]:
        """None."""
        return jnp.zeros_like(Q_hat), jnp.zeros_like(Q_hat)


def _tail(delta: Scalar, x: Scalar, law: Law, *, order: int, left: bool = False) -> Scalar:
    start = boundary(*jax.lax.stop_gradient((x, delta, law)))
    return tail_moment(start, x, delta, law, order=order, left=left)


def _second_moment(delta: Scalar, epsilon: Scalar, law: Law) -> Scalar:
    """J(δ, ε), for the Wishart law in closed form."""
    if isinstance(law, Wishart):
        return truncated_second_moment(delta, epsilon, jnp.asarray(law.rank, dtype=float))
    return _tail(delta, epsilon, law, order=2)


def _share(delta: Scalar, epsilon: Scalar, law: Law) -> Scalar:
    if isinstance(law, Wishart):
        return learned_rank(delta, epsilon, jnp.asarray(law.rank, dtype=float))
    return _tail(delta, epsilon, law, order=0)


def _second_moment_of_largest(delta: Scalar, epsilon: Scalar, law: Law, share: Scalar) -> Scalar:
    """∫(x − ε)²μ_δ over the largest x, which have this share.

    Its derivative at fixed share is that of the integrand alone, as if the x where the share begins
    were held; it is not, for second derivatives.
    """
    x, start = quantile(share, delta, law)
    second, first = (tail_moment(start, x, delta, law, order=order) for order in (2, 1))
    return second + 2 * (x - epsilon) * first + (x - epsilon) ** 2 * share
