"""The weight side of pre-training: (Q, M, V) and the potential Ψ at given conjugates.

It knows the teacher's law and the penalty, nothing of tokens and activations (docs/theory.md,
section 2); the output side is :mod:`lora_theory.theory.pretraining`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_theory.compilation import quickly_compiled
from lora_theory.laws import Law, law_of
from lora_theory.problem import Problem, ProblemError
from lora_theory.theory.correlated import (
    CorrelatedTokens,
    correlated_tail,
    correlated_weights,
    teacher_square,
)
from lora_theory.theory.parametrised import LowRankDecay, Preconditioned
from lora_theory.theory.regularizers import (
    Frobenius,
    NarrowFactor,
    NuclearNorm,
    Regularizer,
    WeightDecay,
)
from lora_theory.theory.separable import Numerical, Separable, separable_nodes, separable_weights
from lora_theory.theory.units import Units

__all__ = [
    "Channel",
    "Constants",
    "Kept",
    "LastWeights",
    "Weights",
    "kept_at",
    "weight_potential",
    "weight_side",
    "weights_at",
]


#: Penalties of a factor whose width does not cut the rank.
_FACTORISED = ("low_rank_decay", "preconditioned")


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
    regularizer: Regularizer | Numerical
    correlated: CorrelatedTokens | None = None  # in place of both, of tokens with a covariance

    @classmethod
    def of(cls, problem: Problem) -> Constants:
        """The constants of ``problem``."""
        stage, units, law = problem.pretraining, Units.of(problem), law_of(problem)
        kind: Regularizer | Numerical
        if stage.regularizer in _FACTORISED and stage.rank < 1:
            raise ProblemError(
                f"pretraining.rank = {stage.rank:g} is not allowed in the theory of "
                f'pretraining.regularizer = "{stage.regularizer}": it must be at least 1'
            )
        if stage.regularizer == "weight_decay":
            kind = WeightDecay(math.sqrt(stage.rank) * stage.penalty / units.student)
            if stage.rank < 1:
                kind = NarrowFactor(kind, stage.rank)
        elif stage.regularizer == "frobenius":
            kind = Frobenius(stage.penalty / units.student**2)
        elif stage.regularizer == "nuclear_norm":
            kind = NuclearNorm(stage.penalty / units.student)
        elif stage.regularizer == "low_rank_decay":
            kind = LowRankDecay(stage.rank**0.25 * stage.penalty / math.sqrt(units.student))
        elif stage.regularizer == "preconditioned":
            assert stage.degree is not None
            assert stage.scale is not None
            scaled = math.sqrt(stage.rank) * stage.penalty * stage.scale
            kind = Preconditioned(stage.degree, scaled, units.student * stage.scale)
        else:
            assert stage.function is not None
            kind = Separable(stage.function, stage.penalty, units.student)
        square, correlated = float(law.moments()[1]), None
        if problem.covariance is not None:
            assert problem.teacher_rank is not None
            rank, levels = problem.teacher_rank, problem.covariance.eigenvalues
            penalty = math.sqrt(stage.rank) * stage.penalty / units.student
            correlated = CorrelatedTokens(penalty, rank, levels)
            square = teacher_square(rank, levels)
        variance = units.teacher**2 * (square + problem.label_noise / 2)
        return cls(stage.samples, variance, law, units.teacher, kind, correlated)

    @property
    def channel(self) -> Channel:
        """What the output side needs of them."""
        Q0 = self.teacher_scale**2 * self.law.moments()[1]
        if self.correlated is not None:
            Q0 = self.teacher_scale**2 * teacher_square(*self.correlated[1:])
        return Channel(self.samples, self.label_variance, Q0)


def weight_potential(
    Q_hat: Float[Array, ""],
    M_hat: Float[Array, ""],
    V_hat: Float[Array, ""],
    constants: Constants,
) -> Float[Array, ""]:
    """Ψ, the weight part of Φ; (M̂²/4V̂) J for weight decay (docs/theory.md, section 2)."""
    # the others are not traced: weights_at
    assert not isinstance(constants.regularizer, Numerical)
    assert constants.correlated is None
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
    if isinstance(kind, Numerical):
        found = separable_weights(unknowns, constants.law, constants.teacher_scale, kind)
        return Weights(at, *map(jnp.asarray, found))
    if constants.correlated is not None:
        found = correlated_weights(unknowns, constants.teacher_scale, constants.correlated)
        return Weights(at, *map(jnp.asarray, found))
    solved: Weights = _weights_at(at, constants)
    return solved


class LastWeights:
    """The weights at the last unknowns: all chunks of nodes ask for the same."""

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self._last: tuple[bytes, Weights] | None = None

    def at(self, unknowns: Float[np.ndarray, " 3"]) -> Weights:
        """(Q, M, V, Ψ) at log(Q̂, M̂, V̂)."""
        name, last = np.asarray(unknowns).tobytes(), self._last
        if last is None or last[0] != name:
            last = self._last = name, weights_at(unknowns, self._constants)
        return last[1]


@quickly_compiled()
def _kept_at(unknowns: Array, constants: Constants) -> tuple[Array, Array, Array]:
    kind = constants.regularizer
    assert not isinstance(kind, Numerical)
    assert constants.correlated is None
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
    if isinstance(kind, Numerical):
        nodes = separable_nodes(unknowns, constants.law, constants.teacher_scale, kind)
        return Kept(nodes.rank, nodes.dead_zone, tuple(nodes.corners.tolist()), nodes.jumps_within)
    if constants.correlated is not None:  # y of Y', which contains the penalty
        share = correlated_tail(unknowns, constants.teacher_scale, constants.correlated).share
        return Kept(share, (-math.inf, 0.0), (0.0,), False)
    rank, low, high = map(float, _kept_at(jnp.asarray(unknowns), constants))
    corners = tuple(y for y in (low, high) if math.isfinite(y) and low < high)
    cut = isinstance(kind, NarrowFactor) and high > 2 * float(kind.decay.scaled_penalty)
    return Kept(rank, (low, high), corners, cut)
