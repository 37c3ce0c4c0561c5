"""The frozen weights where tokens have a covariance: compressed, and met by other tokens.

What fine-tuning sees of S' is S̃' = C'^{1/2}S'C'^{1/2} (docs/theory.md, section 2.9).  A truncation
of S̃ under the C of pre-training is spectral, and exact; whatever is not is measured on matrices
drawn from the asymptotic law of (Ŝ̃, S̃0), one draw per block, so that quadrature errors contain it.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lora_theory.parts import Compression
from lora_theory.problem import Problem, ProblemError
from lora_theory.theory.branches import FrozenWeights
from lora_theory.theory.correlated import (
    CorrelatedTokens,
    correlated_tail,
    teacher_square,
    threshold_of,
)
from lora_theory.theory.training_fields import Trained
from lora_theory.theory.units import Units
from lora_theory.theory.weights import Constants, weights_at

__all__ = ["COLLAPSED", "DRAWN_SIZE", "compressed_draw", "drawn_weights", "used_weights"]

#: Of the matrices that are drawn, about: their order parameters are those of D → ∞ up to 1/n.
DRAWN_SIZE = 640
#: Q of weights that have vanished.
COLLAPSED = 1e-10


class Drawn(NamedTuple):
    """A draw of the trained weights and their teacher, in the coordinates of the tokens x."""

    S: Float[np.ndarray, "n n"]
    S0: Float[np.ndarray, "n n"]
    levels: Float[np.ndarray, " n"]  # c


def drawn_weights(
    unknowns: Float[np.ndarray, " 3"], scale: float, kind: CorrelatedTokens, size: int, seed: int
) -> Drawn:
    """Ŝ and S0 of about this size from their asymptotic law: Ŝ̃ = Y'₊/V̂.

    Args:
        unknowns: log(Q̂, M̂, V̂). scale: of the teacher. kind: λ̃, κ0 and the levels of C.

    Example:
        >>> kind = CorrelatedTokens(0.1, 0.5, (0.5, 1.5))
        >>> drawn = drawn_weights(np.zeros(3), 1.0, kind, 200, 0)
        >>> c = drawn.levels
        >>> Q = np.sum(drawn.S**2 * np.outer(c, c)) / len(c)  # Tr (CS)²/n
        >>> from lora_theory.theory.correlated import correlated_weights
        >>> bool(abs(Q / correlated_weights(np.zeros(3), 1.0, kind)[0][0] - 1) < 0.1)
        True
    """
    Q_hat, M_hat, V_hat = np.exp(unknowns)
    given = np.array(kind.levels)
    size = max(1, round(size / len(given))) * len(given)
    rng, columns = np.random.default_rng(seed), max(1, round(kind.rank * size))
    c = np.repeat(given, size // len(given))
    factor, square = rng.standard_normal((size, columns)), rng.standard_normal((size, size))
    S0 = scale * factor @ factor.T / math.sqrt(columns * size)
    root = np.sqrt(c)
    Y = M_hat * S0 * np.outer(root, root)
    Y += math.sqrt(Q_hat / (2 * size)) * (square + square.T)
    Y -= np.diag(2 * kind.scaled_penalty / c)
    levels, vectors = np.linalg.eigh(Y)
    seen = (vectors * np.maximum(levels, 0) / V_hat) @ vectors.T
    return Drawn(seen / np.outer(root, root), S0, c)


@functools.lru_cache(maxsize=16)
def _kept_draw(
    unknowns: tuple[float, ...], scale: float, kind: CorrelatedTokens, size: int, seed: int
) -> Drawn:
    return drawn_weights(np.array(unknowns), scale, kind, size, seed)


def used_weights(
    problem: Problem, at: Float[np.ndarray, "R 3"], blocks: int, seed: int, size: int = DRAWN_SIZE
) -> FrozenWeights:
    """Order parameters of what fine-tuning meets, from the roots of the blocks.

    Args:
        problem: with a covariance. at: log(Q̂, M̂, V̂) of every block, or the one of all.
        blocks, seed: as many draws as blocks where the weights are drawn. size: of the draws.

    Raises:
        ProblemError: re-used sequences with a compression whose response is not known.
    """
    constants, covariance, stage = Constants.of(problem), problem.covariance, problem.compression
    kind = constants.correlated
    assert covariance is not None
    assert kind is not None
    scale = constants.teacher_scale
    Q, M, V = np.array([weights_at(x, constants).values[:3] for x in at]).T
    noise = Units.of(problem).teacher ** 2 * problem.label_noise / 2
    variance = scale**2 * teacher_square(kind.rank, covariance.later) + noise
    before: Trained | None = None
    spectral = stage is None or stage.whitening == "two_sided"
    if Q.max() < COLLAPSED:
        Q, M, V = np.zeros((3, len(at)))
    elif not covariance.shifts and spectral:
        if stage is not None:
            left = np.array([_truncated(x, scale, kind, stage.rank) for x in at]).T
            before = Trained(Q, M, V, cross=left[0])
            Q, M, V = left
    else:
        if problem.finetuning is not None and problem.finetuning.reused:
            raise ProblemError(
                f'finetuning.sequences = "reused" is not allowed in the theory of compression.'
                f'whitening = "{stage.whitening if stage else ""}" with covariance: it must be '
                '"fresh", or the whitening "two_sided"'
            )
        points = np.broadcast_to(at, (blocks, 3))
        draws = [
            _kept_draw(tuple(x), scale, kind, size, 1000 * seed + block)
            for block, x in enumerate(points.tolist())
        ]
        ratios = np.array([_ratios(drawn, stage, covariance.later) for drawn in draws]).T
        before = Trained(Q, M, V, cross=Q * ratios[2])
        Q, M, V = Q * ratios[0], M * ratios[1], np.full(blocks, math.nan)
    return FrozenWeights(
        Q, M, V, variance, problem.rescaling, noise, before, np.array(covariance.later)
    )


def _truncated(
    unknowns: Float[np.ndarray, " 3"], scale: float, kind: CorrelatedTokens, share: float
) -> tuple[float, float, float]:
    """Q, M and V of S̃ cut to a share of its eigenvalues."""
    start = threshold_of(unknowns, scale, kind, share)
    found = correlated_tail(unknowns, scale, kind, start)
    return found.Q, found.M, found.V


def compressed_draw(
    S: Float[np.ndarray, "n n"],
    stage: Compression,
    c: Float[np.ndarray, " n"],
    after: Float[np.ndarray, " n"],
) -> Float[np.ndarray, "n n"]:
    """S', by eigenvectors: those of a positive matrix are its singular vectors."""
    rank = max(1, round(stage.rank * len(c)))
    gram = after if stage.calibration == "finetuning" else c
    root = np.ones_like(c) if stage.whitening == "none" else np.sqrt(gram)
    back = np.sqrt(after) if stage.calibration == "anchored" else root
    if stage.whitening == "one_sided":
        images = S * root
        top = np.linalg.eigh(images @ images.T)[1][:, -rank:]
        left = top @ (top.T @ images) / back
        return np.asarray((left + left.T) / 2)
    levels, vectors = np.linalg.eigh(S * np.outer(root, root))
    kept = (vectors[:, -rank:] * levels[-rank:]) @ vectors[:, -rank:].T
    return np.asarray(kept / np.outer(back, back))


def _ratios(
    drawn: Drawn, stage: Compression | None, later: tuple[float, ...]
) -> tuple[float, float, float]:
    """Q', M' and Tr S̃'S̃/D over Q, M and Q of the same draw, whose offsets so nearly cancel.

    The first two under C', the last one under C.
    """
    S, S0, c = drawn
    after = np.repeat(np.array(later), len(c) // len(later))
    left = S if stage is None else compressed_draw(S, stage, c, after)

    def overlap(A: np.ndarray, B: np.ndarray, weights: np.ndarray) -> float:
        return float(weights @ (A * B) @ weights)

    Q, M = overlap(S, S, c), overlap(S, S0, c)
    if not (Q > 0 and M > 0):
        return 1.0, 1.0, 1.0  # nothing is learnt in this draw, and next to nothing by its law
    return overlap(left, left, after) / Q, overlap(left, S0, after) / M, overlap(left, S, c) / Q
