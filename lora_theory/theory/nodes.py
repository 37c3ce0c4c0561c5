"""Fixed Gaussian nodes: independent blocks of scrambled Sobol points."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Float
from scipy.special import ndtri
from scipy.stats import qmc

from lora_theory.arguments import checked_integer, is_integer
from lora_theory.problem import ProblemError

__all__ = ["Discretisation", "coarse_chunks", "gaussian_blocks", "gaussian_points"]

#: Sobol points per block (each is used with its mirror image), by number of tokens.
_DEFAULT_POINTS, _FEWEST_POINTS = {1: 4096, 2: 2048, 3: 2048}, 512
#: Points computed at once, by number of tokens: what fits the cache.
_CHUNKS, _SMALLEST_CHUNK = {1: 1024, 2: 512, 3: 256}, 128
#: Points on which a root is first looked for.
_COARSE, _FEWEST_COARSE = {1: 256, 2: 256, 3: 256}, 128
#: Of all blocks together, beyond which they do not fit into memory.
_MOST_POINTS = 2**24


def _is_share(value: Any) -> bool:
    return isinstance(value, numbers.Real) and 0 < float(value) < 1  # neither False nor True


class Discretisation(NamedTuple):
    """How finely the averages of the equations are taken, and how well these are solved."""

    nodes: int | None
    blocks: int
    seed: int
    tolerance: float

    @classmethod
    def checked(cls, nodes: int | None, blocks: int, seed: int, tolerance: float) -> Self:
        """The settings, or a :class:`ProblemError` that names the one that is not allowed."""
        if nodes is not None and (not is_integer(nodes) or nodes < 16 or nodes & (nodes - 1)):
            raise ProblemError(f"nodes = {nodes!r} is not allowed: it must be a power of two ≥ 16")
        blocks = checked_integer("blocks", blocks, 2)
        if (nodes or 1) * blocks > _MOST_POINTS:
            raise ProblemError(
                f"nodes = {nodes!r} with blocks = {blocks} is not allowed: nodes·blocks must be at "
                f"most {_MOST_POINTS}"
            )
        seed = checked_integer("seed", seed, 0)
        if not _is_share(tolerance):
            raise ProblemError(f"tolerance = {tolerance!r} is not allowed: it must be in (0, 1)")
        return cls(nodes, blocks, seed, tolerance)

    def chunks(
        self, dimension: int, tokens: int, seed: int
    ) -> tuple[list[Float[np.ndarray, "dimension points"]], int]:
        """Gaussian nodes in chunks, and the number of blocks in each: see :meth:`in_chunks`."""
        blocks = gaussian_blocks(dimension, self.points(tokens), self.blocks, seed)
        return self.in_chunks(blocks, tokens)

    def in_chunks(
        self, blocks: Float[np.ndarray, "blocks dimension points"], tokens: int
    ) -> tuple[list[Float[np.ndarray, "dimension points"]], int]:
        """Nodes in chunks ordered by block, and the number of blocks in each.

        A chunk is part of a block, or a few small blocks one after another.
        """
        _, dimension, points = blocks.shape
        size = _CHUNKS.get(tokens, _SMALLEST_CHUNK)
        if points >= size:
            return [part for block in blocks for part in np.split(block, points // size, 1)], 1
        together = max(n for n in range(1, size // points + 1) if self.blocks % n == 0)
        joined = blocks.reshape(self.blocks // together, together, dimension, points)
        return [np.concatenate(list(part), axis=1) for part in joined], together

    def points(self, tokens: int) -> int:
        """Sobol points per block: ``nodes``, or the default for this number of tokens."""
        return self.nodes or _DEFAULT_POINTS.get(tokens, _FEWEST_POINTS)


def coarse_chunks(chunks: Sequence[Float[np.ndarray, "dimension points"]], tokens: int) -> int:
    """How many chunks have the nodes on which a root is first looked for."""
    points = _COARSE.get(tokens, _FEWEST_COARSE)
    return min(len(chunks), max(1, points // int(chunks[0].shape[1])))


@functools.lru_cache(maxsize=16)
def gaussian_blocks(
    dimension: int, count: int, blocks: int, seed: int
) -> Float[np.ndarray, "blocks dimension count"]:
    """Standard normal nodes: ``blocks`` independent scramblings of ``count`` Sobol points each.

    Each block integrates Gaussian expectations without bias; their spread gives the quadrature
    error (docs/theory.md, section 5).

    Example:
        >>> gaussian_blocks(3, 64, 2, seed=0).shape
        (2, 3, 64)
    """
    seeds = np.random.SeedSequence(seed).spawn(blocks)
    nodes = np.stack([gaussian_points(dimension, count, child) for child in seeds])
    nodes.setflags(write=False)
    return nodes


def gaussian_points(
    dimension: int, count: int, seed: np.random.SeedSequence
) -> Float[np.ndarray, "dimension count"]:
    """One scrambling: the first ``count`` points of a sequence of a power of two."""
    sobol = qmc.Sobol(dimension, scramble=True, rng=np.random.default_rng(seed))
    uniform = sobol.random_base2((count - 1).bit_length())[:count]
    return np.ascontiguousarray(ndtri(np.clip(uniform, 2.0**-54, 1 - 2.0**-54)).T)
