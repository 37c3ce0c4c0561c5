"""The branches of LoRA: solved from informed and uninformed starts, ordered by potential."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lora_theory.problem import Finetuning
from lora_theory.status import Status
from lora_theory.theory import finetuning as lora
from lora_theory.theory.averages import Averages, in_parallel
from lora_theory.theory.errors import Errors, OrderParameters, effective_noise
from lora_theory.theory.fields import field_pairs
from lora_theory.theory.kept import kept_coordinates
from lora_theory.theory.nodes import Discretisation, coarse_chunks
from lora_theory.theory.results import FinetuningPrediction, Stability
from lora_theory.theory.roots import (
    ROUGH,
    Root,
    first_good,
    refine,
    solve,
    standard_error,
    with_jumps,
)
from lora_theory.theory.stability import finetuning_stability
from lora_theory.theory.training_fields import (
    LinearFields,
    Reuse,
    SoftmaxFields,
    Task,
    Trained,
    kept_linear_fields,
    linear_fields,
    node_dimension,
    softmax_fields,
)

__all__ = ["FinetuningNodes", "FrozenWeights", "growth_by_block", "solve_branches"]

# log s at q0 = 1 among which a root is looked for where it repels the damped iteration
_SCAN = np.arange(-10.0, 2.5, 0.5)
_START_M, _START_V = 0.9, 0.05
_EASIER = (81.0, 27.0, 9.0, 3.0)
# an informed branch this weak is the uninformed one, moved by the discreteness of the nodes
_MERGED_OVERLAP = 0.05
# errors by which a potential is above another for certain
_CLEARLY = 6
# residual above which an informed root that no search has found counts as absent
_ABSENT = 0.02
#: What is held on a branch.
HELD = {"informed": lora.INFORMED, "uninformed": lora.UNINFORMED, "zero": lora.ZERO}
# w/√(q0 D) of this size has vanished
_VANISHED = 1e-3


class FrozenWeights(NamedTuple):
    """What the equations of LoRA contain of the frozen weights: one value per block of nodes.

    The blocks of stage two take the roots of the blocks of stage one, whose error they so inherit.
    """

    Q: Float[np.ndarray, " R"]
    M: Float[np.ndarray, " R"]
    V: Float[np.ndarray, " R"]
    label_variance: float
    rescaling: float = 1.0  # β: fields of the frozen weights are multiplied by it
    noise_variance: float = 0.0  # Δ/2, the part of the label variance that may be drawn anew
    before: Trained | None = None
    token_levels: Float[np.ndarray, " n"] | None = None  # c' of tokens with a covariance

    @property
    def trained(self) -> Trained:
        """What training made, before a compression."""
        return self.before or Trained(self.Q, self.M, self.V, self.Q)

    @property
    def rescaled(self) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
        """Q and M of βS."""
        return self.rescaling**2 * self.Q, self.rescaling * self.M

    def effective_noise(self) -> Float[np.ndarray, " R"]:
        """Δ_eff of linear attention on the test law."""
        return effective_noise(*self.rescaled, self.label_variance)

    def training_noise(self, tokens: int, *, redrawn: bool) -> Float[np.ndarray, " R"]:
        """Δ_eff of linear attention on re-used sequences (docs/theory.md, section 4).

        Their field is β(z' + p(z^y − z)), z that of the trained weights, which is z' without a
        compression; new noise in the label is not in it.
        """
        (Q, M), before = self.rescaled, self.trained
        taught = self.rescaling * self.V / (before.V + tokens**2 / 4)  # βp
        label, cross = 1 - taught, self.rescaling * before.cross
        # of (1 − βp)z^y + βp z − βz'
        noise = label**2 * self.label_variance + taught**2 * before.Q + Q
        noise += 2 * (label * taught * before.M - label * M - taught * cross)
        if redrawn:
            noise = noise + 2 * taught * self.noise_variance
        return np.asarray(np.maximum(noise, 0.0))


def solve_branches(
    stage: Finetuning,
    weights: FrozenWeights,
    tokens: int,
    activation: str,
    discretisation: Discretisation,
) -> tuple[tuple[FinetuningPrediction, ...], Stability]:
    """All branches found, the one of least potential first (docs/theory.md, section 3.3).

    Also the stability of the first.
    """
    nodes = FinetuningNodes(stage, weights, tokens, activation, discretisation)
    task = nodes.task
    scale, tolerance = 0.5 * math.log(task.signal), discretisation.tolerance
    vanished = scale + math.log(_VANISHED)
    potential, overlap, growth = map(lora.OBSERVABLES.index, ("potential", "overlap", "growth"))

    def branch(
        held: tuple[bool, bool],
        log_s: float,
        *,
        few: bool = False,
        near: Root | None = None,
        merged: Root | None = None,
    ) -> Root:
        search = functools.partial(
            solve,
            start=np.array([log_s, 0.0 if held[1] else _START_M, math.log(_START_V)]),
            coarse=nodes.coarse,
            relaxation=lora.relaxation,
            grid=() if held == lora.ZERO else (_SCAN + scale).tolist(),
        )
        averages = nodes.averages(held, few=few)

        def roots() -> Iterator[Root]:
            if near is not None:
                yield refine(averages, near.unknowns, tolerance=tolerance)
            yield search(averages, tolerance=tolerance, thorough=False)
            eased = come_from_larger_penalties(search, averages, held)
            # where LoRA does not learn at larger penalties, this has followed the wrong branch
            lost = held == lora.INFORMED and eased.observables[overlap] < _MERGED_OVERLAP
            if not lost:
                yield eased
            yield search(averages, tolerance=tolerance)
            if lost:
                yield eased
            if merged is not None:
                yield refine(averages, merged.unknowns, tolerance=tolerance)

        best = first_good(roots(), tolerance)
        jumps = best.status(*_jump_mass(best), tolerance) is Status.JUMPS
        return with_jumps(averages, best) if jumps else best

    def come_from_larger_penalties(
        search: Callable[..., Root], averages: Averages, held: tuple[bool, bool]
    ) -> Root:
        # v grows without bound as λ' → 0 below interpolation
        last: Root | None = None
        for factor in _EASIER:
            rough = nodes.averages(held, penalty=factor * stage.penalty).first(nodes.coarse)
            if last is None:
                last = search(rough, tolerance=ROUGH, thorough=False)
            else:
                last = refine(rough, last.unknowns, tolerance=ROUGH)
            last = last if last.residual < ROUGH else None
        start = np.array([scale, 0.0, 0.0]) if last is None else last.unknowns
        return refine(averages, start, tolerance=tolerance)

    def growths(found: dict[str, Root]) -> dict[str, float]:
        """Of a small m, on few nodes, at the roots without one."""
        growth = {}
        for name, root in found.items():
            if name != "informed":
                averages = nodes.averages(HELD[name], few=True)
                growth[name] = float(growth_by_block(averages, root.unknowns).mean())
        return growth

    found: dict[str, Root] = {}
    informed = branch(lora.INFORMED, scale + math.log(0.1))
    learned = abs(informed.unknowns[1]) > _VANISHED or informed.unknowns[0] > vanished
    if learned and informed.observables[overlap] > _MERGED_OVERLAP:
        found["informed"] = informed
    uninformed_branch = functools.partial(
        branch, lora.UNINFORMED, merged=None if found else informed
    )
    # few nodes show whether the uninformed branch lies clearly above the informed one
    uninformed = uninformed_branch(scale + math.log(0.5), few=True)
    if nodes.has_few:
        gap = uninformed.block_observables[:, potential] - informed.observables[potential]
        above = uninformed.is_good(tolerance) and gap.mean() > _CLEARLY * standard_error(gap)
        if "informed" not in found or informed.residual > tolerance or not above:
            uninformed = uninformed_branch(uninformed.unknowns[0], near=uninformed)
    if uninformed.unknowns[0] > vanished:
        found["uninformed"] = uninformed
    else:
        zero = branch(lora.ZERO, lora.ZERO_SPREAD)
        solved = zero.observables[growth] < 0 and zero.residual < tolerance
        found |= {"zero": zero} if solved else {"uninformed": uninformed}
    others = [root for name, root in found.items() if name != "informed"]
    if informed.residual > _ABSENT and others[0].is_good(tolerance):
        found.pop("informed", None)
    test = BranchErrors(weights, task.signal, tokens, activation, discretisation, task)
    ordered = _by_potential(found, test, tolerance, growths(found))
    best = found[ordered[0].branch]
    averages = nodes.averages(HELD[ordered[0].branch])
    return ordered, finetuning_stability(averages, best, nodes.task)


def growth_by_block(
    averages: Averages, unknowns: Float[np.ndarray, " 3"]
) -> Float[np.ndarray, " R"]:
    """That of a small m at a root without one (docs/theory.md, (3.5))."""
    equations = averages.equations
    assert isinstance(equations, lora.LinearFinetuning | lora.SoftmaxFinetuning)
    averages.at(unknowns, search=True)
    return averages.of(functools.partial(equations.signal_growth, unknowns))[:, 0]


class FinetuningNodes:
    """The nodes of stage two with what the frozen weights and the task fix on them."""

    def __init__(
        self,
        stage: Finetuning,
        weights: FrozenWeights,
        tokens: int,
        activation: str,
        discretisation: Discretisation,
    ) -> None:
        signal, levels = stage.signal, weights.token_levels
        if levels is not None:
            signal *= float(levels.mean())
        self.task = Task(stage.samples, stage.penalty, signal, weights.label_variance, levels)
        self._blocks, self._linear = discretisation.blocks, activation == "linear"
        if stage.chosen:
            blocks = _kept_nodes(stage, weights, tokens, activation, discretisation)
            chunks, self._together = discretisation.in_chunks(blocks, tokens)
        else:
            dimension = node_dimension(
                tokens, activation, new_noise=stage.redraws_noise,
                compressed=bool(stage.reused) and weights.before is not None,
            )  # fmt: skip
            seed = discretisation.seed + 1
            chunks, self._together = discretisation.chunks(dimension, tokens, seed)
        self.coarse = coarse_chunks(chunks, tokens)
        total = sum(chunk.shape[1] for chunk in chunks)
        # linear weights are exact: one value for all blocks
        numbers = *weights[:3], *weights.trained
        by_block = (np.broadcast_to(part, self._blocks) for part in numbers)
        per_node = [np.repeat(part, total // self._blocks) for part in by_block]
        parts = zip(*(np.split(part, len(chunks)) for part in per_node), strict=True)
        fields = functools.partial(self._fields_of, stage, weights, tokens)
        self._fields = in_parallel(fields, zip(chunks, parts, strict=True))

    def _fields_of(
        self,
        stage: Finetuning,
        weights: FrozenWeights,
        tokens: int,
        part: tuple[np.ndarray, tuple[np.ndarray, ...]],
    ) -> LinearFields | SoftmaxFields:
        """What a chunk of nodes stands for, with the order parameters of both matrices on it."""
        nodes, (Q, M, V, *before) = part
        beta = weights.rescaling
        if self._linear and stage.chosen:
            return kept_linear_fields(nodes, Q, M, self.task, tokens=tokens, rescaling=beta)
        redrawn = stage.redraws_noise
        reuse = Reuse(stage.reused, weights.noise_variance if redrawn else None)
        if self._linear:
            nodes, reused, share = reuse.by_kind(nodes)
            noises = weights.training_noise(tokens, redrawn=redrawn), weights.effective_noise()
            noise = np.where(reused, *(noise[0] for noise in noises))
            return linear_fields(nodes, noise, self.task.signal, tokens=tokens, share=share)
        return softmax_fields(
            nodes, Q, M, V, self.task,
            tokens=tokens, reuse=reuse, rescaling=beta, kept=stage.chosen is not None,
            before=None if weights.before is None else Trained(*before),
        )  # fmt: skip

    def under(self, stage: Finetuning) -> FinetuningNodes:
        """The same nodes for another number of samples or penalty."""
        nodes = copy.copy(self)
        nodes.task = self.task._replace(samples=stage.samples, penalty=stage.penalty)
        return nodes

    @property
    def has_few(self) -> bool:
        """Whether a block has several chunks, so that few nodes are a part of all."""
        return len(self._fields) > self._blocks

    def averages(
        self,
        held: tuple[bool, bool],
        *,
        few: bool = False,
        penalty: float | None = None,
    ) -> Averages:
        """The equations of a branch on these nodes, or on the first chunk of every block.

        ``penalty`` replaces λ'.
        """
        task = self.task if penalty is None else self.task._replace(penalty=penalty)
        kind = lora.LinearFinetuning if self._linear else lora.SoftmaxFinetuning
        equations = kind(task, held, blocks=self._together)
        step = len(self._fields) // self._blocks if few and self.has_few else 1
        return Averages(equations, self._fields[::step], self._blocks)


def _kept_nodes(
    stage: Finetuning,
    weights: FrozenWeights,
    tokens: int,
    activation: str,
    discretisation: Discretisation,
) -> Float[np.ndarray, "R dimension points"]:
    """Nodes of chosen sequences: z/√Q where the activation sees it, labels given z, χ* and ζ."""
    pairs = len(field_pairs(tokens))
    hidden = int(activation == "softmax")  # the flat direction, which the score alone sees
    nodes = kept_coordinates(
        stage, np.sqrt(weights.rescaled[0]), tokens, discretisation, pairs - hidden + 2 * tokens
    )
    return nodes[:, hidden:]


class BranchErrors:
    """E' of a branch and of the frozen weights alone, with quadrature errors."""

    def __init__(
        self,
        weights: FrozenWeights,
        signal: float,
        tokens: int,
        activation: str,
        discretisation: Discretisation,
        task: Task | None = None,
    ) -> None:
        blocks = discretisation.blocks
        self._signal, self._task = signal, task
        self._errors = Errors(
            activation, tokens, weights.label_variance, blocks=blocks, seed=discretisation.seed
        )
        self._Q, self._M = (np.broadcast_to(part, (blocks,)) for part in weights.rescaled)
        nothing = np.zeros(blocks)
        self.frozen = self.estimate(nothing, nothing, 0.0, 0.0)

    def of(self, root: Root) -> tuple[float, float]:
        """E' at the root, its error from the roots of the blocks."""
        points = np.vstack([root.unknowns, root.block_unknowns])
        (q, *blocks_q), (m, *blocks_m) = self._overlaps(points)
        return self.estimate(np.array(blocks_q), np.array(blocks_m), q, m)

    def _overlaps(self, x: Float[np.ndarray, "n 3"]) -> tuple[Float[np.ndarray, " n"], ...]:
        if self._task is not None and self._task.levels is not None:
            q, m = lora.seen_overlaps(x, self._task)
            return np.asarray(q), np.asarray(m)
        s, m = np.exp(x[:, 0]), x[:, 1] * self._signal
        return s**2 + m**2 / self._signal, m

    def estimate(
        self, blocks_q: Float[np.ndarray, " R"], blocks_m: Float[np.ndarray, " R"],
        q: float, m: float,
    ) -> tuple[float, float]:  # fmt: skip
        """E' at (q, m), its error from the values on the blocks."""
        at = OrderParameters(self._Q, self._M, blocks_q, blocks_m)
        center = OrderParameters.same(self._Q.mean(), self._M.mean(), q, m, len(blocks_q))
        value = self._errors.at(center, self._signal).mean()
        return float(value), float(standard_error(self._errors.at(at, self._signal)))


def _jump_mass(root: Root) -> tuple[float, float]:
    """Share of the response that jumps of the proximal operator carry, and its error."""
    jumps, response = map(lora.OBSERVABLES.index, ("jumps", "response"))
    size = root.observables[response] or math.nan
    return float(root.observables[jumps] / size), float(root.quadrature_error[jumps] / abs(size))


def branch_prediction(
    name: str, root: Root, test: BranchErrors, tolerance: float, growth: float
) -> FinetuningPrediction:
    values = dict(zip(lora.OBSERVABLES, root.observables.tolist(), strict=True))
    errors = dict(zip(lora.OBSERVABLES, root.quadrature_error.tolist(), strict=True))
    jumps = values["jump_mass"], errors["jump_mass"] = _jump_mass(root)
    for name_of_part in ("jumps", "response", "growth"):
        del values[name_of_part], errors[name_of_part]
    status = root.status(*jumps, tolerance)
    found = test.frozen if name == "zero" else test.of(root)
    values["test_error"], errors["test_error"] = found
    values["frozen_test_error"], errors["frozen_test_error"] = test.frozen
    if name == "zero":
        values |= {"q": 0.0, "m": 0.0, "q_hat": 0.0, "m_hat": 0.0, "overlap": math.nan}
        status = Status.COLLAPSED if status.is_solved else status
    if name == "uninformed":
        values |= {"m": 0.0, "m_hat": 0.0, "overlap": 0.0}
        errors |= {"m": 0.0, "m_hat": 0.0, "overlap": 0.0}
    if values["m"] < 0:  # the mirror image w → −w
        values |= {"m": -values["m"], "m_hat": -values["m_hat"]}
    return FinetuningPrediction(
        status=status,
        residual=root.residual,
        quadrature_error=errors,
        branch=name,
        signal_growth=growth,
        **values,
    )


def _by_potential(
    found: dict[str, Root], test: BranchErrors, tolerance: float, growths: dict[str, float]
) -> tuple[FinetuningPrediction, ...]:
    """Branches by potential; a difference below its own quadrature error is a tie.

    An unsolved branch has no potential to compare: an informed one is put first, to be seen.
    """
    predictions = {
        name: branch_prediction(name, root, test, tolerance, growths.get(name, math.nan))
        for name, root in found.items()
    }

    def order(prediction: FinetuningPrediction) -> tuple[int, float]:
        unsolved = 0 if prediction.branch == "informed" else 2
        return 1 if prediction.status.is_solved else unsolved, prediction.potential

    ordered = sorted(predictions.values(), key=order)
    if len(ordered) > 1 and all(prediction.status.is_solved for prediction in ordered):
        column = lora.OBSERVABLES.index("potential")
        first, second = (found[p.branch].block_observables[:, column] for p in ordered)
        if ordered[1].potential - ordered[0].potential < standard_error(second - first):
            ordered[0] = replace(ordered[0], status=Status.TIE)
    return tuple(ordered)
