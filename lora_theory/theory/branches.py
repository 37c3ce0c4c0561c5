"""The branches of LoRA: solved from informed and uninformed starts, ordered by potential."""

from __future__ import annotations

import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_theory.problem import Finetuning
from lora_theory.status import Status
from lora_theory.theory import finetuning as lora
from lora_theory.theory.nodes import Discretisation, gaussian_blocks
from lora_theory.theory.results import FinetuningPrediction
from lora_theory.theory.roots import BlockValues, Root, solve, standard_error

__all__ = ["FrozenWeights", "solve_branches"]

# (log s, m/q0, log v) at q0 = 1: the uninformed root repels the damped iteration at large α'
_UNINFORMED_STARTS = np.array(
    [
        [math.log(s), 0.0, math.log(v)]
        for s in (0.15, 0.3, 0.45, 0.7)
        for v in (0.02, 0.06, 0.2, 0.6)
    ]
)
_START_V = 0.05
# an informed branch this weak is the uninformed one, moved by the discreteness of the nodes
_MERGED_OVERLAP = 0.05
# w/√(q0 D) of this size has vanished
_VANISHED = 1e-3


class FrozenWeights:
    """What the equations of LoRA contain of the frozen weights.

    ``shift`` is how far (Q, M, V) of each block of nodes are from their means.
    """

    def __init__(
        self,
        Q: float,
        M: float,
        V: float,
        label_variance: float,
        shift: Float[np.ndarray, "R 3"] | None = None,
    ) -> None:
        self.Q, self.M, self.V = Q, M, V
        self.label_variance, self.shift = label_variance, shift

    def noises(self, tokens: int, reused: bool) -> tuple[float, float]:
        """Δ_eff of linear attention on the test law and on the training sequences."""
        test = self.label_variance - 2 * self.M + self.Q
        return test, test / (1 + 4 * self.V / tokens**2) ** 2 if reused else test


def solve_branches(
    stage: Finetuning,
    weights: FrozenWeights,
    tokens: int,
    activation: str,
    discretisation: Discretisation,
) -> tuple[FinetuningPrediction, ...]:
    """All branches found, the one of least potential first (docs/theory.md, section 3.3)."""
    task = lora.Task(stage.samples, stage.penalty, stage.signal, weights.label_variance)
    reused, blocks = stage.sequences == "reused", discretisation.blocks
    gaussian = gaussian_blocks(
        lora.node_dimension(tokens, activation),
        discretisation.points(tokens),
        blocks,
        discretisation.seed + 1,
    )
    linear = activation == "linear"
    support: list[Array] | list[lora.Fields]
    if linear:
        test, training = weights.noises(tokens, reused)
        support = [
            lora.linear_fields(g, training, test, stage.signal, tokens=tokens) for g in gaussian
        ]
    else:
        support = [jnp.asarray(g) for g in gaussian]
    parameters = np.zeros(0) if linear else np.array([weights.Q, weights.M, weights.V])
    scale = 0.5 * math.log(stage.signal)

    def branch(held: tuple[bool, bool, bool], log_s: float, m: float) -> Root:
        def values(x: Float[np.ndarray, " 3"], block: int) -> BlockValues:
            return lora.finetuning_values(
                x, parameters, support[block], task, held,
                activation=activation, tokens=tokens, reused=reused,
            )  # fmt: skip

        others = _UNINFORMED_STARTS + np.array([scale, 0.0, 0.0])
        return solve(
            values,
            np.array([log_s, m, math.log(_START_V)]),
            blocks=blocks,
            tolerance=discretisation.tolerance,
            relaxation=lora.relaxation,
            parameter_shift=None if linear else weights.shift,
            others=list(others) if held == lora.UNINFORMED else [],
        )

    found: dict[str, Root] = {}
    informed = branch(lora.INFORMED, scale + math.log(0.1), 0.9)
    vanished = scale + math.log(_VANISHED)
    learned = abs(informed.unknowns[1]) > _VANISHED or informed.unknowns[0] > vanished
    if learned and informed.observables[lora.OBSERVABLES.index("overlap")] > _MERGED_OVERLAP:
        found["informed"] = informed
    uninformed = branch(lora.UNINFORMED, scale + math.log(0.5), 0.0)
    if uninformed.unknowns[0] > vanished:
        found["uninformed"] = uninformed
    else:
        zero = branch(lora.ZERO, lora.ZERO_SPREAD, 0.0)
        shrinks = zero.observables[lora.OBSERVABLES.index("growth")] < 0
        solved = zero.residual < discretisation.tolerance
        found |= {"zero": zero} if shrinks and solved else {"uninformed": uninformed}
    return _by_potential(found, discretisation.tolerance)


def _prediction(name: str, root: Root, tolerance: float) -> FinetuningPrediction:
    values = dict(zip(lora.OBSERVABLES, root.observables.tolist(), strict=True))
    errors = dict(zip(lora.OBSERVABLES, root.quadrature_error.tolist(), strict=True))
    status = root.status(values["jump_mass"], errors["jump_mass"], tolerance)
    if name == "zero":
        values |= {"q": 0.0, "m": 0.0, "q_hat": 0.0, "m_hat": 0.0, "overlap": math.nan}
        values["test_error"] = values["frozen_test_error"]
        status = Status.COLLAPSED if status.is_solved else status
    if name == "uninformed":
        values |= {"m": 0.0, "m_hat": 0.0, "overlap": 0.0}
        errors |= {"m": 0.0, "m_hat": 0.0, "overlap": 0.0}
    if values["m"] < 0:  # the mirror image w → −w
        values |= {"m": -values["m"], "m_hat": -values["m_hat"]}
    del values["growth"], errors["growth"]
    return FinetuningPrediction(
        status=status, residual=root.residual, quadrature_error=errors, branch=name, **values
    )


def _by_potential(found: dict[str, Root], tolerance: float) -> tuple[FinetuningPrediction, ...]:
    """Branches by potential; a difference below its own quadrature error is a tie.

    An unsolved branch has no potential to compare: an informed one is put first, to be seen.
    """
    predictions = {name: _prediction(name, root, tolerance) for name, root in found.items()}

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
