"""The integers of one simulated problem: how many sequences and columns at a given dimension D."""

from __future__ import annotations

from typing import NamedTuple

from lora_theory.arguments import checked_integer
from lora_theory.problem import Problem, ProblemError

__all__ = ["SMALLEST_DIM", "Sizes"]

#: Smallest embedding dimension that is simulated.
SMALLEST_DIM = 4
#: Bytes beyond which a simulation is refused: about six float64 copies of the training sequences.
LARGEST_MEMORY = 2**38


class Sizes(NamedTuple):
    """Numbers of rows, columns and sequences (docs/theory.md, section 1), rounded to integers."""

    dim: int
    tokens: int
    teacher_rank: int  # P0 = round(kappa0 D), D for other laws
    student_rank: int  # P = round(kappa D)
    pretraining_sequences: int  # N = round(alpha D^2)
    finetuning_sequences: int  # N' = round(alpha' D), 0 without fine-tuning
    reused_sequences: int  # of these: the first ones of the pre-training
    pool_sequences: int = 0  # from which they are chosen; 0 where any are taken
    kept_rank: int | None = None  # round(ρᵣD) eigenvalues that a compression keeps

    @classmethod
    def of(cls, problem: Problem, dim: int, *, trained: bool = True) -> Sizes:
        """The sizes of ``problem`` at embedding dimension ``dim``.

        Pre-training sequences that are not ``trained`` on take no memory.

        Raises:
            ProblemError: ``dim`` is too small, or fewer pre-training sequences exist than the
                fine-tuning re-uses; the message names the fields and ``dim``.

        Example:
            >>> from lora_theory import Pretraining
            >>> problem = Problem(tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
            ...                   pretraining=Pretraining(samples=0.2, penalty=0.02))
            >>> Sizes.of(problem, 100).pretraining_sequences
            2000
        """
        dim = checked_integer("dim", dim, SMALLEST_DIM)
        pretraining, finetuning = problem.pretraining, problem.finetuning
        count = _rounded("finetuning.samples", finetuning.samples, dim, dim) if finetuning else 0
        chosen = finetuning.chosen if finetuning else None
        pool = _rounded("finetuning.selection.pool", chosen.pool, dim, dim) if chosen else 0
        sizes = cls(
            dim=dim,
            tokens=problem.tokens,
            teacher_rank=(
                _rounded("teacher_rank", problem.teacher_rank, dim, dim)
                if problem.teacher_rank is not None
                else dim
            ),
            student_rank=_rounded("pretraining.rank", pretraining.rank, dim, dim),
            pretraining_sequences=_rounded(
                "pretraining.samples", pretraining.samples, dim * dim, dim
            ),
            finetuning_sequences=count,
            reused_sequences=round(finetuning.reused * count) if finetuning else 0,
            pool_sequences=pool,
            kept_rank=(
                _rounded("compression.rank", problem.compression.rank, dim, dim)
                if problem.compression is not None
                else None
            ),
        )
        first = sizes.pretraining_sequences if trained else dim
        memory = 48 * max(first, sizes.finetuning_sequences, pool) * sizes.tokens * dim
        if memory > LARGEST_MEMORY:
            raise ProblemError(
                f"dim = {dim} is too large for this problem: the run would need about "
                f"{memory / 2**30:.0f} GiB, and at most {LARGEST_MEMORY / 2**30:.0f} are allowed"
            )
        if finetuning is not None and sizes.reused_sequences > sizes.pretraining_sequences:
            raise ProblemError(
                'finetuning.sequences = "reused" is not allowed here: at dim = '
                f"{dim} the {sizes.reused_sequences} re-used sequences (finetuning.samples "
                f"= {finetuning.samples:g}) exceed the {sizes.pretraining_sequences} pre-training "
                f"sequences (pretraining.samples = {pretraining.samples:g})"
            )
        return sizes


def _rounded(name: str, ratio: float, unit: int, dim: int) -> int:
    count = round(ratio * unit)
    if count < 1:
        raise ProblemError(
            f"dim = {dim} is too small for {name} = {ratio:g}: "
            "it must be large enough to leave at least 1 after rounding"
        )
    return count
