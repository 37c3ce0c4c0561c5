"""Averages over fixed nodes at any unknowns: nodes in chunks, on threads, minima remembered.

The nodes come in R independent blocks.  A chunk is the part of a block, or the few small blocks,
that is computed at once: large enough to hide the cost of a call, small enough for the cache.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_theory.theory.proximal import with_others

__all__ = ["AWAY", "Averages", "BlockValues", "Equations", "in_parallel"]

# NPROC bounds the threads of XLA, and these
_THREADS = min(2, int(os.environ.get("NPROC") or 0) or 2)
#: From one search elsewhere to the next, as a share of the nodes; irrational: none comes twice.
AWAY = 2**0.5 - 1
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="averages")


_INSIDE = threading.local()


def in_parallel(function: Callable[[_In], _Out], arguments: Iterable[_In]) -> list[_Out]:
    """``function`` of each argument on the threads of the theory; serially if called on one."""

    def one(argument: _In) -> _Out:
        _INSIDE.running = True
        # a thread has its own JAX scopes: the 64-bit one must be opened in each
        with jax.enable_x64(True):
            return function(argument)

    if getattr(_INSIDE, "running", False):
        return [function(argument) for argument in arguments]
    return list(_pool().map(one, arguments))


class BlockValues(NamedTuple):
    """Residuals and observables on every block of nodes, and the Jacobian of their mean."""

    residual: Float[np.ndarray, "R n"]
    observables: Float[np.ndarray, "R K"]
    jacobian: Float[np.ndarray, "n+K n"]

    @classmethod
    def of(cls, rows: Any, jacobian: Any) -> Self:
        """From rows of residuals and observables: as many residuals as unknowns."""
        rows, jacobian = np.asarray(rows), np.asarray(jacobian)
        count = jacobian.shape[1]
        return cls(rows[:, :count], rows[:, count:], jacobian)

    @property
    def mean(self) -> Float[np.ndarray, " n"]:
        """Residuals on all nodes."""
        with np.errstate(invalid="ignore", over="ignore"):
            return np.asarray(self.residual.mean(axis=0))

    @property
    def size(self) -> float:
        """Largest relative residual on all nodes; inf where one is not finite."""
        return float(np.abs(self.mean).max()) if np.all(np.isfinite(self.mean)) else np.inf


class Equations(Protocol):
    """The equations of a stage, averaged over the nodes of a chunk."""

    #: Starts of a search beside the known minima; 0 where the minima are known in closed form.
    further: int = 0

    def likely(self, unknowns: Float[np.ndarray, " n"], chunk: Any) -> Any:
        """Likely starts for the minima of the proximal operators, ``further`` ≥ 2 of them."""
        return None

    def minima(self, unknowns: Float[np.ndarray, " n"], chunk: Any, starts: Any) -> Any:
        """The lowest minimum reached from ``starts`` and its rival, per node."""
        return None

    def values(self, unknowns: Float[np.ndarray, " n"], chunk: Any, minima: Any) -> BlockValues:
        """Residuals, linear in the averages, and observables: one row per block in ``chunk``."""


class Averages:
    """The equations of a stage on given chunks, ordered by block; ``blocks`` = R."""

    def __init__(self, equations: Equations, chunks: Sequence[Any], blocks: int) -> None:
        self.equations, self.chunks, self.blocks = equations, list(chunks), blocks
        self._minima: list[Any] = [None] * len(self.chunks)
        self._elsewhere = 0

    def first(self, chunks: int) -> Averages:
        """The same on the first ``chunks`` alone, taken as one block."""
        return Averages(self.equations, self.chunks[:chunks], 1)

    def like(self, other: Averages) -> Averages:
        """These, with the minima that another one remembers on the same nodes."""
        self._minima = list(other._minima)
        return self

    def of(self, function: Callable[[Any, Any], Any]) -> Float[np.ndarray, "R K"]:
        """Further averages: ``function`` of a chunk and its last minima gives rows."""
        return self._by_block(np.concatenate([np.asarray(part) for part in self.each(function)]))

    def each(self, function: Callable[[Any, Any], _Out]) -> list[_Out]:
        """``function`` of every chunk and its last minima."""
        return in_parallel(
            lambda i: function(self.chunks[i], self._minima[i]), range(len(self.chunks))
        )

    def at(
        self,
        unknowns: Float[np.ndarray, " n"],
        *,
        search: bool,
        elsewhere: bool = False,
        remember: bool = True,
    ) -> BlockValues:
        """Values at ``unknowns``; minima are searched for anew, or followed from the last ones.

        Without a search the minima may be no global ones.  A search ``elsewhere`` starts at the
        minima of other nodes, each time of different ones.  Those found are the last ones from now
        on if ``remember``.
        """
        self._elsewhere += elsewhere
        away = AWAY * self._elsewhere % 1.0 if elsewhere else 0.0

        def one(index: int) -> BlockValues:
            chunk, minima = self.chunks[index], None
            if self.equations.further:
                starts = self._starts(index, unknowns, search, away)
                minima = self.equations.minima(unknowns, chunk, starts)
                if remember:
                    self._minima[index] = minima
            return self.equations.values(unknowns, chunk, minima)

        parts = [one(0)] if len(self.chunks) == 1 else in_parallel(one, range(len(self.chunks)))
        residual = np.concatenate([part.residual for part in parts])
        observables = np.concatenate([part.observables for part in parts])
        with np.errstate(invalid="ignore", over="ignore"):
            jacobian = np.mean([part.jacobian for part in parts], axis=0)

        return BlockValues(self._by_block(residual), self._by_block(observables), jacobian)

    def _by_block(self, rows: Float[np.ndarray, "rows K"]) -> Float[np.ndarray, "R K"]:
        # what is not finite, far from any root, is judged by those who read it
        with np.errstate(invalid="ignore", over="ignore"):
            return np.asarray(rows.reshape(self.blocks, -1, rows.shape[1]).mean(axis=1))

    def _starts(
        self, index: int, unknowns: Float[np.ndarray, " n"], search: bool, away: float
    ) -> Array:
        """The last minima and further starts: always as many, for a repeated one costs nothing."""
        known = self._minima[index]
        if known is None or (search and not away):
            likely = self.equations.likely(unknowns, self.chunks[index])
            return jnp.concatenate([likely[:2] if known is None else known, likely])
        started: Array = with_others(known, away if search else 0.0, self.equations.further)
        return started
