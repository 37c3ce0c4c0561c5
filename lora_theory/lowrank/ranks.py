"""Which rank each matrix gets: the same share of parameters, or the same price of loss."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_theory.arguments import checked_integer
from lora_theory.lowrank.checks import checked_array, checked_number
from lora_theory.problem import ProblemError

__all__ = ["allocate_ranks", "rank_of_ratio"]


def rank_of_ratio(m: int, n: int, ratio: float) -> int:
    """k = ⌊ρmn/(m + n)⌋, at which two factors have the share ρ of the parameters of m×n.

    The uniform rule of SVD-LLM, ASVD and AA-SVD; ρ is the share that is kept.

    Raises:
        ProblemError: sizes that are no positive integers, a ratio not in (0, 1], or so small that
            no rank is left.

    Example:
        >>> [rank_of_ratio(512, 128, ratio) for ratio in (0.8, 0.6, 0.4)]
        [81, 61, 40]
    """
    m, n = checked_integer("m", m, 1), checked_integer("n", n, 1)
    share = checked_number("ratio", ratio, positive=True, largest=1.0)
    rank = math.floor(share * m * n / (m + n) + 1e-9)  # 0.29·100 is a little below 29
    if rank < 1:
        raise ProblemError(
            f"ratio = {ratio!r} leaves no rank to a matrix of {m} × {n}: it must be "
            f"≥ {(m + n) / (m * n):.3g}"
        )
    return rank


def allocate_ranks(
    spectra: Sequence[Any], shapes: Sequence[tuple[int, int]], parameters: int
) -> list[int]:
    """Ranks of several matrices within one number of parameters, at the least total loss.

    From full ranks on, the singular value of least loss per parameter σ²/(m + n) is dropped first,
    until Σ k(m + n) is within the budget; every matrix keeps at least rank 1.  Of all allocations
    with as many parameters as the result none has a smaller sum of the dropped σ².

    Args:
        spectra: singular values of each matrix in common units of loss, such as those of
            :func:`~lora_theory.lowrank.obd_spectrum`: min(m, n) each, the largest first.
        shapes: (m, n) of each.
        parameters: of all factors together.

    Raises:
        ProblemError: spectra and shapes that do not fit each other, are not finite and descending;
            fewer parameters than rank 1 everywhere takes.

    Example:
        >>> allocate_ranks([[5.0, 4.0], [3.0, 0.1]], [(2, 2), (2, 2)], parameters=12)
        [2, 1]
    """
    sizes = [_shape(f"shapes[{i}]", shape) for i, shape in enumerate(shapes)]
    if len(spectra) != len(sizes) or not sizes:
        raise ProblemError(
            f"there are {len(spectra)} spectra and {len(sizes)} shapes: there must be as many of "
            "both, and one at least"
        )
    values = [
        _descending(f"spectra[{i}]", spectrum, min(size))
        for i, (spectrum, size) in enumerate(zip(spectra, sizes, strict=True))
    ]
    costs = [m + n for m, n in sizes]
    budget = checked_integer("parameters", parameters, sum(costs))
    ranks = [len(spectrum) for spectrum in values]
    total = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))

    def price(i: int) -> tuple[float, int]:
        return float(values[i][ranks[i] - 1]) / math.sqrt(costs[i]), i

    heap = [price(i) for i in range(len(values)) if ranks[i] > 1]
    heapq.heapify(heap)
    while total > budget:
        _, i = heapq.heappop(heap)
        ranks[i] -= 1
        total -= costs[i]
        if ranks[i] > 1:
            heapq.heappush(heap, price(i))
    return ranks


def _shape(name: str, shape: Any) -> tuple[int, int]:
    try:
        m, n = shape
    except (TypeError, ValueError):
        raise ProblemError(f"{name} = {shape!r} is not allowed: it must be (m, n)") from None
    return checked_integer(f"{name}[0]", m, 1), checked_integer(f"{name}[1]", n, 1)


def _descending(name: str, value: Any, count: int) -> Any:
    spectrum = checked_array(name, value, (count,), f"({count},)")
    if np.any(np.diff(spectrum) > 0) or spectrum[-1] < 0:
        raise ProblemError(f"{name} is not allowed: it must be ≥ 0, the largest first")
    return spectrum
