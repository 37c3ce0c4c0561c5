"""Gram matrices of calibration tokens, summed batch by batch in double precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from lora_theory.arguments import checked_integer
from lora_theory.lowrank.checks import Matrix, checked_matrix
from lora_theory.problem import ProblemError

__all__ = ["Gram", "gram_array"]


@dataclass(frozen=True, eq=False)
class Gram:
    """Σ_t a_t b_tᵀ over tokens t, with their count; ``add`` returns a new one.

    Which sums the compressions of this package take (docs/lowrank.md, section 3):

    - ``input_gram``, Σ x xᵀ of the inputs of a layer: ``gram.add(x)``; of AA-SVD, those of the
      compressed network, Σ x' x'ᵀ
    - ``output_gram``, Σ g gᵀ of the gradients of the loss with respect to its outputs: ``add(g)``
    - ``cross_gram``, Σ x x'ᵀ of original and compressed inputs of the same tokens, in that order:
      ``gram.add(x, x')``

    Example:
        >>> import numpy as np
        >>> gram = Gram.empty(2)
        >>> for batch in np.arange(12.0).reshape(2, 3, 2):  # two batches of three tokens
        ...     gram = gram.add(batch)
        >>> gram.tokens, gram.mean().round(3).tolist()
        (6, [[36.667, 41.667], [41.667, 47.667]])
    """

    total: Matrix
    tokens: int

    @classmethod
    def empty(cls, size: int, other: int | None = None) -> Self:
        """Of no tokens yet: size × size, or size × other for products of different vectors."""
        rows = checked_integer("size", size, 1)
        columns = rows if other is None else checked_integer("other", other, 1)
        return cls(np.zeros((rows, columns)), 0)

    def add(self, tokens: Any, others: Any = None) -> Self:
        """With the tokens of a batch (…, size), and if given their partners (…, other).

        Raises:
            ProblemError: vectors of another length, not finite, or not as many of both.
        """
        rows, columns = self.total.shape
        first = _vectors("tokens", tokens, rows)
        if others is None and rows != columns:
            raise ProblemError(f"others is missing: this Gram matrix is {rows} × {columns}")
        second = first if others is None else _vectors("others", others, columns)
        if len(first) != len(second):
            raise ProblemError(
                f"others has {len(second)} vectors and tokens {len(first)}: there must be as many"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            total = self.total + first.T @ second
        if not np.all(np.isfinite(total)):
            raise ProblemError("tokens are too large: their squares must be finite")
        return type(self)(total, self.tokens + len(first))

    def mean(self, *, at_least: int | None = None) -> Matrix:
        """The mean per token.

        Args:
            at_least: how many tokens are asked for; the larger side if left out, below which the
                matrix is singular.  Reliable ones need many times more.

        Raises:
            ProblemError: fewer tokens.
        """
        size = max(self.total.shape)
        wanted = size if at_least is None else checked_integer("at_least", at_least, 1)
        if self.tokens < wanted:
            raise ProblemError(
                f"tokens = {self.tokens} are too few for a Gram matrix of size {size}: calibrate "
                f"on at least {wanted}"
            )
        return np.asarray(self.total / self.tokens)


def gram_array(value: Any) -> Any:
    """The matrix that an argument stands for: the mean of a :class:`Gram`, or itself."""
    return value.mean() if isinstance(value, Gram) else value


def _vectors(name: str, value: Any, size: int) -> Matrix:
    shape = np.shape(value)
    if len(shape) < 1 or shape[-1] != size or 0 in shape:
        raise ProblemError(f"{name} of shape {shape} are not allowed: they must be (…, {size})")
    return checked_matrix(name, np.reshape(value, (-1, size)))
