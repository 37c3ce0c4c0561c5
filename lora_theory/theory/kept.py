"""The fields of the sequences that a score keeps: Gaussian, conditioned on a low score.

Of ᾱ'D sequences with fields z ~ N(0, Q) the share ρ = α'/ᾱ' of lowest score s(h) is kept, so that z
has the Gaussian law given s(h) ≤ its ρ-quantile (docs/theory.md, section 3.6).
"""

from __future__ import annotations

import functools
import math

import numpy as np
from jaxtyping import Float
from scipy.special import gammainc, gammaincinv

from lora_theory.parts import Finetuning, Selection
from lora_theory.problem import ProblemError
from lora_theory.selection import kept
from lora_theory.theory.fields import field_pairs, full_basis
from lora_theory.theory.nodes import Discretisation, gaussian_blocks, gaussian_points

__all__ = ["check_drawn", "kept_coordinates"]

#: Beside the other seeds of a discretisation.
_SEED = 3
#: Numbers that are drawn for a block, at most.
_MOST = 2**27


def kept_coordinates(
    stage: Finetuning,
    scale: Float[np.ndarray, " #R"],
    tokens: int,
    discretisation: Discretisation,
    others: int = 0,
) -> Float[np.ndarray, "R k+others points"]:
    """z/√Q of kept sequences in the basis of :func:`full_basis`, k = T(T+1)/2, on every block.

    For "low_variance" the radius of Gaussian nodes is mapped, r² → F⁻¹(ρF(r²)) with F the law of
    χ²_k; for other scores the nodes are the best of points/ρ Gaussian ones.

    Args:
        stage: with a selection. scale: of the logits, τβ√Q, on every block or on all.
        others: as many standard normal numbers follow, independent of z.

    Raises:
        ProblemError: the share is too small, or the score is refused.

    Example:
        >>> settings = Discretisation.checked(256, 2, 0, 1e-10)
        >>> stage = Finetuning(samples=1.0, penalty=1.0, selection=Selection(pool=10.0))
        >>> z = kept_coordinates(stage, np.ones(2), 2, settings)
        >>> z.shape, bool((z**2).sum(axis=1).max() < 0.585)  # the 10 % point of χ²₃
        ((2, 3, 256), True)
    """
    selection = stage.chosen
    assert selection is not None
    share = stage.samples / selection.pool
    count, points = len(field_pairs(tokens)), discretisation.points(tokens)
    blocks, seed = discretisation.blocks, discretisation.seed + _SEED
    if selection.score == "low_variance":
        nodes = gaussian_blocks(count + others, points, blocks, seed)
        half = (nodes[:, :count] ** 2).sum(axis=1, keepdims=True) / 2
        within = gammaincinv(count / 2, share * gammainc(count / 2, half))
        return np.concatenate([nodes[:, :count] * np.sqrt(within / half), nodes[:, count:]], axis=1)
    drawn = check_drawn(stage, count, points)
    scales = tuple(np.broadcast_to(scale, blocks).tolist())
    z = _lowest(selection, scales, tokens, points, drawn, blocks, seed)
    if not others:
        return z
    # two Sobol sequences run alike: the second one is shuffled
    shuffled = np.random.default_rng(seed).permutation(points)
    rest = gaussian_blocks(others, points, blocks, seed + 1)[:, :, shuffled]
    return np.concatenate([z, rest], axis=1)


def check_drawn(stage: Finetuning, count: int, points: int) -> int:
    """How many nodes of ``count`` numbers are drawn so that ``points`` are kept."""
    selection = stage.chosen
    assert selection is not None
    drawn = math.ceil(points * selection.pool / stage.samples)
    if drawn * count > _MOST:
        raise ProblemError(
            f"finetuning.selection.pool = {selection.pool:g} is not allowed with "
            f"finetuning.samples = {stage.samples:g} in the theory of score = "
            f"{selection.score!r}: with nodes = {points} it must be at most "
            f"{_MOST * stage.samples / (count * points):g}"
        )
    return drawn


@functools.lru_cache(maxsize=16)
def _lowest(
    selection: Selection,
    scale: tuple[float, ...],
    tokens: int,
    points: int,
    drawn: int,
    blocks: int,
    seed: int,
) -> Float[np.ndarray, "R k points"]:
    basis = full_basis(tokens)
    found = []
    for one, child in zip(scale, np.random.SeedSequence(seed).spawn(blocks), strict=True):
        nodes = gaussian_points(basis.shape[2], drawn, child)
        logits = one * np.tensordot(nodes.T, basis, axes=(1, 2))
        found.append(nodes[:, kept(selection, logits, points)])
    together = np.stack(found)
    together.setflags(write=False)
    return together
