"""The spectrum of the pre-trained matrix Ŝ: bulk, mass at zero, outliers, and the merged LoRA's.

Ŝ = f(Y)/V̂ with Y = M̂(S0 + δZ) (docs/theory.md, sections 2.2 and 2.7).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from lora_theory.arguments import checked_integer
from lora_theory.compilation import double_precision
from lora_theory.observables import plain_fields
from lora_theory.problem import Problem, ProblemError
from lora_theory.status import Status
from lora_theory.theory.merged import MergedOutlier, merged_outlier
from lora_theory.theory.nodes import Discretisation
from lora_theory.theory.predict import check_predictable, predict, solve_pretraining
from lora_theory.theory.results import FinetuningPrediction
from lora_theory.theory.roots import standard_error
from lora_theory.theory.shrunk import Outlier, Shrunk, shrunk_spectrum

__all__ = ["LearnedSpectrum", "Outlier", "spectrum"]

_FEWEST_POINTS = 8


@dataclass(frozen=True, kw_only=True)
class LearnedSpectrum:
    """The eigenvalues of Ŝ for D → ∞: a share ``mass_at_zero`` of them, the rest in ``bands``.

    ``density`` integrates to ``rank``; ``shares`` are the weights of the quadrature over the grid
    of ``eigenvalues``: the mean of g over the bands is Σ shares·g(eigenvalues).
    ``quadrature_error`` holds standard errors from independent node sets ("bands" and "outliers"
    the largest of theirs; NaN where the node sets differ in the number of them).
    """

    problem: Problem
    status: Status  #: that of the pre-training
    eigenvalues: Float[np.ndarray, " n"]
    density: Float[np.ndarray, " n"]
    shares: Float[np.ndarray, " n"]
    bands: tuple[tuple[float, float], ...]
    mass_at_zero: float
    rank: float  #: over D
    effective_rank: float  #: (Tr Ŝ)²/(D Tr Ŝ²), over D as well
    mean: float  #: Tr Ŝ/D
    second_moment: float  #: Tr Ŝ²/D, from the density
    moment_gap: float  #: second_moment/Q − 1
    outliers: tuple[Outlier, ...]
    visible_spikes: tuple[float | None, float | None]  #: θ below and above which there are outliers
    merged: MergedOutlier | None
    quadrature_error: dict[str, float]

    def distribution(self, eigenvalue: ArrayLike) -> Float[np.ndarray, "..."]:
        """The share of eigenvalues up to the given ones, outliers left out."""
        s = np.asarray(eigenvalue, dtype=np.float64)
        order = np.argsort(self.eigenvalues, kind="stable")
        at, share = self.eigenvalues[order], self.shares[order]
        sums = np.cumsum(share) - share / 2
        below = np.interp(s, at, sums, left=0.0, right=float(np.sum(share))) if at.size else 0 * s
        return np.asarray(below + self.mass_at_zero * (s >= 0))

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values under the attribute names; what JSON cannot hold is None."""
        return plain_fields(self)


def spectrum(
    problem: Problem,
    *,
    points: int = 400,
    dim: int | None = None,
    nodes: int | None = None,
    blocks: int = 8,
    seed: int = 0,
    tolerance: float = 1e-10,
) -> LearnedSpectrum:
    """Density, mass at zero and outliers of the pre-trained Ŝ in the high-dimensional limit.

    Where the problem has a compression, of what that leaves.

    The density of Ŝ = f(Y)/V̂ on a grid that is dense at its edges, from the free convolution of
    law(S0) with a semicircle; eigenvalues that spikes of the teacher pull out of it; with ``dim``
    and a second stage also the one of S + wwᵀ/√D (docs/theory.md, section 2.7).

    Args:
        problem: what is asked.
        points: of the grid, per interval of the continuous part.
        dim: the D at which the LoRA vector is merged; its eigenvalue has no limit, as q√D grows.
        nodes, blocks, seed, tolerance: as in :func:`lora_theory.predict`.

    Raises:
        ProblemError: an argument is not allowed, or ``dim`` is given without a second stage.

    Example:
        >>> from lora_theory.problem import Pretraining, Teacher
        >>> problem = Problem(
        ...     tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        ...     teacher=Teacher(spikes=4.0), pretraining=Pretraining(samples=0.5, penalty=0.1),
        ... )
        >>> learned = spectrum(problem)
        >>> bool(abs(learned.shares.sum() - learned.rank) < 1e-9), abs(learned.moment_gap) < 1e-9
        (True, True)
        >>> (outlier,) = learned.outliers
        >>> outlier.eigenvalue > learned.bands[-1][1], 0 < outlier.squared_overlap < 1
        (True, True)
    """
    check_predictable(problem)
    points = checked_integer("points", points, _FEWEST_POINTS)
    if dim is not None:
        dim = checked_integer("dim", dim, 1)
        if problem.finetuning is None:
            raise ProblemError(
                f"dim = {dim} is not allowed for a problem without finetuning, which has no LoRA "
                "vector to merge: leave it out, or give the problem finetuning fields"
            )
    alone = problem.replace(finetuning=None)
    prediction = predict(
        alone if dim is None else problem, nodes=nodes, blocks=blocks, seed=seed,
        tolerance=tolerance,
    )  # fmt: skip
    with double_precision():
        settings = Discretisation.checked(nodes, blocks, seed, tolerance)
        root = solve_pretraining(problem.alone, settings)
        found = shrunk_spectrum(root.unknowns, problem, points)
        others = [shrunk_spectrum(unknowns, problem, points) for unknowns in root.block_unknowns]
    summaries = {name: [part.summary[name] for part in others] for name in found.summary}
    errors = {name: _largest_error(parts) for name, parts in summaries.items()}
    merged = None
    if dim is not None:
        assert prediction.finetuning is not None
        merged, errors["merged"] = _merged(problem, prediction.finetuning, dim, found, others)
    Q = prediction.effective_noise.Q / prediction.problem.rescaling**2
    return LearnedSpectrum(
        problem=problem,
        status=prediction.pretraining.status,
        eigenvalues=found.eigenvalues,
        density=found.density,
        shares=found.shares,
        bands=found.bands,
        mass_at_zero=1 - found.rank,
        rank=found.rank,
        effective_rank=found.effective_rank,
        mean=found.mean,
        second_moment=found.second,
        moment_gap=found.second / Q - 1 if Q > 0 else math.nan,
        outliers=found.outliers,
        visible_spikes=found.visible,
        merged=merged,
        quadrature_error=errors,
    )


def _merged(
    problem: Problem, stage: FinetuningPrediction, dim: int, found: Shrunk, others: Sequence[Shrunk]
) -> tuple[MergedOutlier, float]:
    """The outlier of S + wwᵀ/√D, and the quadrature error of its eigenvalue."""
    assert problem.finetuning is not None
    beta, root_dim = problem.finetuning.rescaling, math.sqrt(dim)

    def at(part: Shrunk) -> MergedOutlier:
        top = max([end for _, end in part.bands] + ([0.0] if part.rank < 1 else []))
        return merged_outlier(
            beta * part.eigenvalues, part.shares, 1 - part.rank, beta * top,
            q=stage.q, overlap=stage.overlap, dim=dim,
        )  # fmt: skip

    merged = at(found)
    if merged.eigenvalue is None or merged.squared_overlap is None:
        return merged, math.nan
    # ∂x/∂(q√D) = −1/((q√D)²G') is the squared overlap
    by_q = merged.squared_overlap * root_dim * stage.quadrature_error["q"]
    by_S = _largest_error([[at(part).eigenvalue or math.nan] for part in others])
    return merged, math.hypot(by_q, by_S)


def _largest_error(blocks: list[list[float]]) -> float:
    """The largest standard error of some numbers over blocks, NaN where their count differs."""
    if len({len(block) for block in blocks}) > 1:
        return math.nan
    values = np.array(blocks)
    values = values[:, np.isfinite(values).all(axis=0)]
    return float(np.max(standard_error(values), initial=0.0))
