"""Inverse temperatures as a change of units.

σ(τ(h + χχᵀ − qI)) of the student and σ(τ0(h^y + χ*χ*ᵀ − q0 I)) of the teacher are the model without
temperatures for S' = τS, w' = √τ w, S0' = τ0 S0, Δ' = τ0²Δ, q0' = τ0 q0, with the penalties
rewritten for S' and w' (docs/theory.md, section 2.6).  The equations are solved in those units.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple, Self, TypeVar

from lora_theory.problem import Finetuning, Problem

__all__ = ["Units"]

_Result = TypeVar("_Result")


class Units(NamedTuple):
    """What the inverse temperatures make of every number."""

    student: float  # τ
    teacher: float  # τ0

    @classmethod
    def of(cls, problem: Problem) -> Self:
        """Those of a problem."""
        return cls(problem.inverse_temperature, problem.teacher.inverse_temperature)

    def stage(self, finetuning: Finetuning) -> Finetuning:
        """The second stage without temperatures."""
        return dataclasses.replace(
            finetuning,
            penalty=finetuning.penalty / self.student,
            signal=finetuning.signal * self.teacher,
        )

    def pretraining(self, result: _Result) -> _Result:
        """Q, M, V and their conjugates in the units of S."""
        square, both = self.student**2, self.student * self.teacher
        return self._divided(result, {"Q": square, "M": both, "V": square})

    def effective_noise(self, result: _Result) -> _Result:
        """Gain, variance and Q in the units of S and S0; delta_eff is that of τ0 z^y − τz."""
        factors = {
            "gain": self.teacher / self.student,
            "variance": self.teacher**2,
            "Q": self.student**2,
            "kept_variance": self.student**2,
        }
        return self._divided(result, factors)

    def finetuning(self, result: _Result) -> _Result:
        """q, m, v and their conjugates in the units of w."""
        both = math.sqrt(self.student * self.teacher)
        return self._divided(result, {"q": self.student, "m": both, "v": self.student})

    def _divided(self, result: _Result, factors: dict[str, float]) -> _Result:
        if self == (1.0, 1.0):
            return result
        factors = factors | {f"{name}_hat": 1 / factor for name, factor in factors.items()}
        errors: dict[str, float] = result.quadrature_error  # type: ignore[attr-defined]
        return dataclasses.replace(  # type: ignore[type-var]
            result,
            quadrature_error={
                name: error / factors.get(name, 1.0) for name, error in errors.items()
            },
            **{
                name: value / factor
                for name, factor in factors.items()
                if (value := getattr(result, name, None)) is not None
            },
        )
