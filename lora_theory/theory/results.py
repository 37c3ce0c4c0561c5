"""What :func:`lora_theory.predict` returns: values, quadrature errors and statuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_theory.observables import to_plain
from lora_theory.problem import Problem
from lora_theory.status import Status

__all__ = [
    "EffectiveNoise", "FinetuningPrediction", "Prediction", "PretrainingPrediction", "Stability",
]  # fmt: skip

# a jump mass is seen from here on, if it is also this many errors from 0
_MATTERING_JUMPS, _CLEARLY = 0.01, 4


@dataclass(frozen=True)
class Stability:
    """Whether a solution is stable against replica symmetry breaking (docs/theory.md, section 6).

    Example:
        >>> Stability(0.4, 0.01, 0.002, 0.001).is_stable, Stability(0.4, 0.01, 0.3, 0.01).is_stable
        (True, False)
    """

    replicon: float  #: smooth part: squared growth of a random perturbation per iteration
    error: float  #: its standard error from independent node sets
    jump_mass: float  #: share of the response due to jumps of the proximal operator
    jump_error: float  #: its standard error

    @property
    def is_stable(self) -> bool:
        """Replicon below 1, and jumps of at most 1 % of the response, or within four errors of 0.

        Strictly any jump is an instability, of an amplitude that vanishes with the jump mass.  At
        .5 % message passing settled on all runs with replicon .30 (D ≤ 1200) and on 6 of 12 with
        .57 (D = 300), at 1.4 % on one run in six (D = 800).
        """
        jumps = abs(self.jump_mass) > max(_MATTERING_JUMPS, _CLEARLY * self.jump_error)
        return self.replicon < 1 and not jumps


@dataclass(frozen=True, kw_only=True)
class PretrainingPrediction:
    """Pre-training in the limit D → ∞ (docs/theory.md, section 2).

    ``quadrature_error`` holds the standard error of each number from independent node sets.
    ``jump_mass`` is the share of V̂ due to jumps of the proximal operator; ``learned_rank`` the
    rank of Ŝ over D.  ``overlap`` is M/√(Q Q0), NaN where the weights are zero.
    """

    status: Status
    residual: float
    quadrature_error: dict[str, float]
    Q: float
    M: float
    V: float
    Q_hat: float
    M_hat: float
    V_hat: float
    potential: float
    test_error: float
    train_error: float
    overlap: float
    jump_mass: float
    learned_rank: float


@dataclass(frozen=True, kw_only=True)
class EffectiveNoise:
    """How the fine-tuning labels look through the frozen weights: z^y | z ~ N(gain·z, variance).

    gain = M/Q, variance = Δ/2 + Q0 − M²/Q (label noise included), Q = Tr S²/D.  Linear attention
    feels one number: delta_eff = Δ/2 + Q0 − 2M + Q on fresh sequences, delta_eff_training on the
    sequences it is trained on, a mean over these where only some are re-used; both None for softmax
    (docs/theory.md, section 4).  ``kept_variance`` is E z² of sequences chosen from a pool, None
    without: Q where the score does not change it.
    """

    gain: float
    variance: float
    Q: float
    delta_eff: float | None = None
    delta_eff_training: float | None = None
    kept_variance: float | None = None
    quadrature_error: dict[str, float] | None = None

    @property
    def label_variance(self) -> float:
        """Q_y = variance + gain²Q, the variance of the label's fields z^y."""
        return self.variance + (self.gain * self.M if self.Q > 0 else 0.0)

    @property
    def M(self) -> float:
        """M = gain·Q."""
        return self.gain * self.Q if self.Q > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class FinetuningPrediction:
    """One branch of rank-one LoRA in the limit D → ∞ (docs/theory.md, section 3).

    ``branch`` is "informed" (m ≠ 0), "uninformed" (m = 0, q > 0) or "zero" (w = 0).
    ``signal_growth`` is that of a small m on a branch without one, (3.5): above 1 it grows; NaN on
    the informed branch.
    """

    status: Status
    residual: float
    quadrature_error: dict[str, float]
    branch: str
    q: float
    m: float
    v: float
    q_hat: float
    m_hat: float
    v_hat: float
    potential: float
    overlap: float
    test_error: float
    train_error: float
    frozen_test_error: float
    jump_mass: float
    signal_growth: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer of the theory; ``finetuning`` is the branch of least potential.

    ``stability`` holds that of "pretraining" and "finetuning" (None without fine-tuning).
    """

    problem: Problem
    status: Status
    stability: dict[str, Stability | None]
    pretraining: PretrainingPrediction
    effective_noise: EffectiveNoise
    finetuning: FinetuningPrediction | None
    branches: tuple[FinetuningPrediction, ...]

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values under the attribute names; what JSON cannot hold is None."""
        return {
            name: to_plain(getattr(self, name))
            for name in (
                "problem", "status", "stability", "pretraining", "effective_noise", "finetuning",
                "branches",
            )
        }  # fmt: skip
