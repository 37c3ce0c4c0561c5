"""What both batches of two rounds fix on their nodes: fields, labels and the first round's vector.

The first batch is known to w₁; the second was chosen with it (docs/theory.md, section 3.7).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_theory.parts import Finetuning
from lora_theory.selection import kept
from lora_theory.theory.averages import Averages, in_parallel
from lora_theory.theory.branches import FrozenWeights
from lora_theory.theory.fields import full_basis
from lora_theory.theory.finetuning import LinearFinetuning, SoftmaxFinetuning
from lora_theory.theory.kept import check_drawn
from lora_theory.theory.nodes import Discretisation, gaussian_blocks, gaussian_points
from lora_theory.theory.pretraining import paired
from lora_theory.theory.proximal import linear_lora_proximal, softmax_lora_proximal
from lora_theory.theory.roots import Root
from lora_theory.theory.training_fields import (
    LinearFields,
    SoftmaxFields,
    Task,
    eigenbasis,
    given_frozen,
    softmax_fields,
)

__all__ = ["FirstRound", "RoundFields", "round_fields"]

#: Beside the other seeds of a discretisation: of ζ₂ on the first batch, of the pool.
_NOISE_SEED, _POOL_SEED = 4, 5
_Fields = LinearFields | SoftmaxFields


class FirstRound(NamedTuple):
    """The order parameters of w₁ on a block of nodes."""

    q: float
    m: float
    v: float

    @classmethod
    def at(cls, unknowns: Float[np.ndarray, " 3"], signal: float) -> FirstRound:
        """From (log s, m/q0, log v)."""
        s, gain, v = math.exp(unknowns[0]), float(unknowns[1]), math.exp(unknowns[2])
        return cls(s**2 + gain**2 * signal, gain * signal, v)

    def spread(self, signal: float) -> float:
        """s₁, of the part of w₁ orthogonal to w*."""
        return math.sqrt(self.q - self.m**2 / signal)


class RoundFields(NamedTuple):
    """Nodes of both batches: four of the first, with ±ζ₁ and ±ζ₂, for two of the second, ±ζ₂."""

    frozen: LinearFields | SoftmaxFields  # with ζ₂ as noise, and α₁ and α₂ in the weights
    first: Float[Array, "T nodes"]  # ω₁, or χ₁ of sequences that w₁ has not seen
    noise: Float[Array, "T nodes"]  # ζ₁ = (first − (m₁/q0)χ*)/s₁
    push: Float[Array, "T nodes"]  # v₁G₁, 0 on the second batch
    before: FirstRound


def round_fields(
    averages: Averages,
    root: Root,
    task: Task,
    second: Finetuning,
    weights: FrozenWeights,
    *,
    by_current: bool,
    tokens: int,
    discretisation: Discretisation,
) -> list[RoundFields]:
    """The chunks of both batches, each of one block.

    Args:
        averages: the first round on its nodes. root: its root there. task: its numbers.
        second: samples and selection of the second batch. weights: on every block.
        by_current: whether logits with w₁ merged in are scored, or those of the frozen weights.
    """
    blocks = discretisation.blocks
    by_block = _by_block(averages.each(lambda chunk, minima: (chunk, minima)), blocks)
    seen = isinstance(by_block[0][0][0], LinearFields)
    children = np.random.SeedSequence(discretisation.seed + _NOISE_SEED).spawn(blocks)
    rest = gaussian_blocks(
        tokens, 2 * discretisation.points(tokens), blocks, discretisation.seed + _NOISE_SEED
    )
    new = _new_nodes(second, root, task, weights, tokens, by_current, discretisation)

    def chunks(block: int) -> list[RoundFields]:
        before = FirstRound.at(root.block_unknowns[block], task.signal)
        parts = len(by_block[block])
        # two nets in the same order would not be independent
        own = np.random.default_rng(children[block]).permutation(rest[block], axis=1)
        noises, nodes = np.split(own, parts, axis=1), np.split(new[block], parts, axis=1)
        Q, M = (_on_block(part, block) for part in (weights.Q, weights.M))
        found = []
        for (chunk, minima), noise, at in zip(by_block[block], noises, nodes, strict=True):
            known = _known(averages, root.block_unknowns[block], before, task, chunk, minima)
            make = _new_linear if seen else _new_softmax
            fresh = make(at, Q, M, before, task, tokens, weights.rescaling)
            found.append(_joined(known, noise, fresh, before, task, second.samples))
        return found

    return [chunk for found in in_parallel(chunks, range(blocks)) for chunk in found]


def _on_block(values: Float[np.ndarray, " #R"], block: int) -> float:
    """Linear weights are exact: one value for all blocks."""
    return float(values[block if len(values) > 1 else 0])


def _by_block(chunks: list[Any], blocks: int) -> list[list[Any]]:
    """The chunks of every block; those that hold several blocks in both halves are taken apart."""
    if len(chunks) >= blocks:
        step = len(chunks) // blocks
        return [chunks[first : first + step] for first in range(0, len(chunks), step)]
    together = blocks // len(chunks)

    def part(array: Array, block: int) -> Array:
        if array.shape[-1] == 1:
            return array  # one weight for all nodes
        halves = array.reshape(*array.shape[:-1], 2, together, -1)
        return halves[..., block, :].reshape(*array.shape[:-1], -1)

    return [
        [jax.tree.map(lambda array, block=block: part(array, block), chunk)]
        for chunk in chunks
        for block in range(together)
    ]


def _known(
    averages: Averages,
    unknowns: Float[np.ndarray, " 3"],
    before: FirstRound,
    task: Task,
    chunk: _Fields,
    minima: Array | None,
) -> tuple[_Fields, Array, Array]:
    """The first batch: its fields, ω₁ and v₁G₁."""
    q, m, v = (jnp.asarray(number) for number in before)
    omega = m / task.signal * chunk.signal + before.spread(task.signal) * chunk.noise
    equations = averages.equations
    if isinstance(chunk, LinearFields):
        assert isinstance(equations, LinearFinetuning)
        return chunk, omega, v * linear_lora_proximal(chunk.levels + q, omega, v).force
    assert isinstance(equations, SoftmaxFinetuning)
    assert minima is not None
    starts = jnp.concatenate([minima, equations.likely(unknowns, chunk)])
    lowest = equations.minima(unknowns, chunk, starts)[0]
    prox = softmax_lora_proximal(chunk.training, chunk.labels, omega, v, q, lowest)
    return chunk, omega, v * prox.force


def _new_nodes(
    second: Finetuning,
    root: Root,
    task: Task,
    weights: FrozenWeights,
    tokens: int,
    by_current: bool,
    discretisation: Discretisation,
) -> list[Float[np.ndarray, "2k+3T points"]]:
    """z/√Q and χ₁/√q₁ of the sequences that are kept, then the Gaussians of labels, χ* and ζ₂."""
    basis = full_basis(tokens)
    k, points = basis.shape[2], discretisation.points(tokens)
    numbers = 2 * k + 3 * tokens
    drawn = check_drawn(second, numbers, points) if second.chosen else points
    children = np.random.SeedSequence(discretisation.seed + _POOL_SEED).spawn(discretisation.blocks)

    def block(index: int) -> Float[np.ndarray, "2k+3T points"]:
        pool = gaussian_points(numbers, drawn, children[index])
        if second.chosen is None:
            return pool
        scale = math.sqrt(_on_block(weights.rescaled[0], index))
        logits = scale * np.tensordot(pool[:k].T, basis, axes=(1, 2))
        if by_current:
            q = FirstRound.at(root.block_unknowns[index], task.signal).q
            chi = math.sqrt(q) * pool[k : k + tokens].T
            logits = logits + chi[:, :, None] * chi[:, None] - q * np.eye(tokens)
        return pool[:, kept(second.chosen, logits, points)]

    return in_parallel(block, range(discretisation.blocks))


def _vectors(
    nodes: Float[np.ndarray, "2k+3T points"], before: FirstRound, task: Task, k: int, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """χ₁ and χ* given it."""
    chi = math.sqrt(before.q) * nodes[k : k + tokens]
    spread = math.sqrt(task.signal - before.m**2 / before.q)
    own = nodes[2 * k + tokens : 2 * k + 2 * tokens]
    return chi, before.m / before.q * chi + spread * own


def _new_linear(
    nodes: Float[np.ndarray, "2k+3T points"],
    Q: float,
    M: float,
    before: FirstRound,
    task: Task,
    tokens: int,
    rescaling: float,
) -> tuple[LinearFields, Array]:
    """The second batch of linear attention, in the eigenbasis of its residual matrix."""
    k = full_basis(tokens).shape[2]
    chi, star = _vectors(nodes, before, task, k, tokens)
    gain, spread = given_frozen(np.array([Q]), np.array([M]), task.label_variance)
    label_noise = nodes[k + tokens : 2 * k + tokens]
    residual = (gain - rescaling * math.sqrt(Q)) * nodes[:k] + spread * label_noise
    arrays = (jnp.asarray(part) for part in (residual, star, chi, task.signal))
    both, noise = paired(eigenbasis(*arrays, tokens), jnp.asarray(nodes[-tokens:]))
    levels, signal, first = jnp.split(both, 3)
    return LinearFields(levels, signal, noise, jnp.ones(1)), first


def _new_softmax(
    nodes: Float[np.ndarray, "2k+3T points"],
    Q: float,
    M: float,
    before: FirstRound,
    task: Task,
    tokens: int,
    rescaling: float,
) -> tuple[SoftmaxFields, Array]:
    """The same for softmax, which does not see the flat direction of z."""
    k = full_basis(tokens).shape[2]
    chi, star = _vectors(nodes, before, task, k, tokens)
    label_noise = nodes[k + tokens + 1 : 2 * k + tokens]
    together = [nodes[1:k], label_noise, star / math.sqrt(task.signal), nodes[-tokens:]]
    Qs, Ms = (np.full(nodes.shape[1], number) for number in (Q, M))
    fields = softmax_fields(
        np.concatenate(together), Qs, Ms, np.zeros_like(Qs), task,
        tokens=tokens, rescaling=rescaling, kept=True,
    )  # fmt: skip
    return fields, jnp.asarray(np.tile(chi, 2))


def _joined(
    known: tuple[_Fields, Array, Array],
    noise: Float[np.ndarray, "T 2*points"],
    new: tuple[_Fields, Array],
    before: FirstRound,
    task: Task,
    samples: float,
) -> RoundFields:
    """Both batches on one axis, in six parts of as many nodes."""
    old, omega, push = known
    fresh, chi = new

    def thrice(first: Array, second: Array) -> Array:
        return jnp.concatenate([first, first, second], axis=-1)

    weights = [1.5 * task.samples] * 4 + [3.0 * samples] * 2  # of mean α₁ + α₂
    parts = {
        name: thrice(getattr(old, name), getattr(fresh, name))
        for name in old._fields
        if name not in ("noise", "share")
    }
    zeta = jnp.asarray(noise)
    parts["noise"] = jnp.concatenate([zeta, -zeta, fresh.noise], axis=-1)
    parts["share"] = jnp.repeat(jnp.asarray(weights), chi.shape[1] // 2)
    first = thrice(omega, chi)
    own = (first - before.m / task.signal * parts["signal"]) / before.spread(task.signal)
    return RoundFields(type(old)(**parts), first, own, thrice(push, jnp.zeros_like(chi)), before)
