"""Teachers, sequences and their noise (docs/theory.md, section 1; arXiv 2606.05899).

All draws are made in float32 and cast, so that float32 and float64 runs see the same data.  Every
sequence has its own key, so that more sequences never change the earlier ones.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Key

__all__ = [
    "Draw",
    "draw_normal",
    "draw_sequences",
    "draw_task_vector",
    "run_key",
    "sequence_chunks",
]

CHUNK = 1000  # sequences drawn, and tested, at once


class Draw(enum.IntEnum):
    """What random numbers are for; the number is folded into the key of the run."""

    TEACHER = 0
    PRETRAINING_START = 1
    PRETRAINING_SEQUENCES = 2
    TASK_VECTOR = 3
    FINETUNING_STARTS = 4
    FINETUNING_SEQUENCES = 5
    TEST_SEQUENCES = 6
    PRETRAINED_NOISE = 7
    FINETUNING_NOISE = 8  # of re-used sequences
    SECOND_ROUND_SEQUENCES = 9

    def key(self, run: Key[Array, ""]) -> Key[Array, ""]:
        """The key of this purpose in a run."""
        return jax.random.fold_in(run, int(self))


def run_key(seed: int, seed_index: int) -> Key[Array, ""]:
    """The key of one run: independent of how many seeds there are."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), seed_index)


def draw_normal(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any) -> Float[Array, "..."]:
    """iid N(0, 1), drawn in float32."""
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


@functools.partial(jax.jit, static_argnames=("tokens", "dim", "dtype"))
def _chunk(
    key: Key[Array, ""], first: Integer[Array, ""], *, tokens: int, dim: int, dtype: Any
) -> tuple[Float[Array, "n T D"], Float[Array, "n T T"]]:
    def draw(index: Array) -> Array:
        return draw_normal(jax.random.fold_in(key, index), (tokens, dim + tokens), dtype)

    sample = jax.vmap(draw)(first + jnp.arange(CHUNK))
    square = sample[:, :, dim:]
    return sample[:, :, :dim], (square + square.swapaxes(1, 2)) / 2


def sequence_chunks(
    key: Key[Array, ""], count: int, tokens: int, dim: int, dtype: Any
) -> Iterator[tuple[Float[Array, "n T D"], Float[Array, "n T T"]]]:
    """The sequences 0 … count − 1 with their noise, in chunks of bounded memory.

    The entries of X ∈ R^{T×D} are iid N(0, 1); the noise ξ is symmetric Gaussian with
    Var ξ_ab = 1/(2 − δ_ab).
    """
    for first in range(0, count, CHUNK):
        sequences, noise = _chunk(key, first, tokens=tokens, dim=dim, dtype=dtype)
        yield sequences[: count - first], noise[: count - first]


def draw_sequences(
    key: Key[Array, ""], count: int, tokens: int, dim: int, dtype: Any
) -> tuple[Float[Array, "n T D"], Float[Array, "n T T"]]:
    """The sequences 0 … count − 1 and their noise, all at once."""
    chunks = list(sequence_chunks(key, count, tokens, dim, dtype))
    sequences, noise = (jnp.concatenate(parts) for parts in zip(*chunks, strict=True))
    return sequences, noise


def draw_task_vector(
    key: Key[Array, ""], dim: int, signal: float, dtype: Any
) -> Float[Array, "D 1"]:
    """w* with ‖w*‖² = q₀D exactly and a uniformly random direction.

    The exact norm leaves q₀ without a fluctuation of its own.
    """
    direction = draw_normal(key, (dim, 1), dtype)
    return direction * jnp.sqrt(signal * dim / jnp.sum(direction**2)).astype(dtype)
