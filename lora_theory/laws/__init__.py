"""Laws of the eigenvalues of the teacher's matrix S0, one file each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lora_theory.laws.base import Law
from lora_theory.laws.eigenvalues import Eigenvalues
from lora_theory.laws.goe import GOE
from lora_theory.laws.power_law import PowerLaw
from lora_theory.laws.wishart import Wishart
from lora_theory.problem import Problem

__all__ = ["GOE", "LAWS", "Eigenvalues", "Law", "PowerLaw", "Wishart", "law_of"]

#: The choices of the field ``teacher.law``.
LAWS: dict[str, Callable[[Problem], Law]] = {
    "wishart": lambda problem: Wishart(problem.teacher_rank),  # type: ignore[arg-type]
    "goe": lambda problem: GOE(),
    "power_law": lambda problem: PowerLaw(problem.teacher.exponent),  # type: ignore[arg-type]
    "eigenvalues": lambda problem: Eigenvalues(np.array(problem.teacher.eigenvalues)),
}


def law_of(problem: Problem) -> Law:
    """The law of the eigenvalues of S0, spikes left out.

    Example:
        >>> from lora_theory import Pretraining
        >>> law_of(Problem(tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        ...                pretraining=Pretraining(samples=0.2, penalty=0.02)))
        Wishart(rank=0.5)
    """
    return LAWS[problem.teacher.law](problem)
