"""Stability of both stages against replica symmetry breaking: replicons and jump masses.

A random perturbation of the minimiser, of size ε, has the size √r ε after one iteration of message
passing.  r is the replicon: message passing settles, and replica symmetry holds, only where it is
below 1 (docs/theory.md, section 6).  The proximal operators jump where two minima tie; the
derivatives in r do not see that, and any jump makes the true value infinite.  So the smooth
replicon is reported side by side with the share of the response that jumps carry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_theory.attention import attention
from lora_theory.compilation import quickly_compiled
from lora_theory.theory import finetuning as lora
from lora_theory.theory import pretraining as pre
from lora_theory.theory.averages import Averages
from lora_theory.theory.divergence import spectral_divergence
from lora_theory.theory.fields import field_basis, to_fields
from lora_theory.theory.newton import solve_positive_definite
from lora_theory.theory.proximal import (
    Proximal,
    linear_lora_proximal,
    softmax_field_proximal,
    softmax_lora_proximal,
)
from lora_theory.theory.results import Stability
from lora_theory.theory.roots import Root, standard_error
from lora_theory.theory.training_fields import LinearFields, SoftmaxFields, Task
from lora_theory.theory.weights import Constants

__all__ = ["Stability", "finetuning_stability", "pretraining_stability", "squared_response"]


def finetuning_stability(averages: Averages, root: Root, task: Task) -> Stability:
    """α'v² E‖∂_ωG‖²_F = α' E‖I − ∂prox/∂ω‖²_F at a branch of LoRA, with its jump mass.

    A perturbation of w of variance τ per component moves every ω by Gaussians of variance τ, the
    forces G by ∂_ωG of that, and so w by v²α' E‖∂_ωG‖²_F τ (docs/theory.md, section 6).  On the
    branch w = 0 this is the growth of section 3.3.  Call it in the 64-bit scope.

    Args:
        averages: the equations of the branch on their nodes. root: their root. task: its numbers.

    Example:
        >>> from lora_theory import Finetuning
        >>> from lora_theory.theory.branches import FinetuningNodes, FrozenWeights
        >>> from lora_theory.theory.nodes import Discretisation
        >>> from lora_theory.theory.roots import refine
        >>> stage, linear = Finetuning(samples=3.0, penalty=0.2), "linear"
        >>> Q, M, V = np.full((3, 2), [[1.05], [1.15], [0.68]])
        >>> with jax.enable_x64(True):
        ...     nodes = FinetuningNodes(
        ...         stage, FrozenWeights(Q, M, V, 1.75), 2, linear, Discretisation(64, 2, 0, 1e-8)
        ...     )
        ...     averages = nodes.averages(lora.INFORMED)
        ...     root = refine(averages, np.log([0.15, 2.7, 0.08]), tolerance=1e-8)
        ...     found = finetuning_stability(averages, root, nodes.task)
        >>> found.is_stable, 0.25 < found.replicon < 0.35
        (True, True)
    """
    unknowns, blocks = jnp.asarray(root.unknowns), _blocks_per_chunk(averages)

    def rows(chunk: Any, minima: Any) -> Array:
        found: Array
        if isinstance(chunk, LinearFields):
            found = _linear_lora(unknowns, chunk, task, blocks)
        else:
            found = _softmax_lora(unknowns, chunk, task, minima[0], blocks)
        return found

    here = averages.at(root.unknowns, search=True).observables
    values, by_block = _average(averages, rows, root.block_unknowns - root.unknowns)
    jumps, response = map(lora.OBSERVABLES.index, ("jumps", "response"))
    size = root.observables[response] or math.nan
    return Stability(
        float(values.mean()),
        float(standard_error(by_block)),
        float(root.observables[jumps] / size),
        _error_at_one_point(here[:, jumps] / abs(size)),
    )


def pretraining_stability(
    averages: Averages, root: Root, constants: Constants, tokens: int
) -> Stability:
    """2α E‖∂_zG‖²_F ∬((s(x) − s(y))/(x − y))² dμdμ of pre-training, s = f/V̂, with its jump mass.

    A perturbation of S of variance τ moves every field by Gaussians of variance τ, hence
    Y = M̂S0 + √Q̂Z, of law μ, by a GOE matrix of variance 2α E‖∂_zG‖²_F τ, hence S = f(Y)/V̂ in the
    eigenbasis of Y by the difference quotients of s (docs/theory.md, section 6).  Linear attention
    with weight decay: ∬((f(x) − f(y))/(x − y))²/αT(T + 1), always below 1.  Call it in the 64-bit
    scope.

    Args:
        averages: the equations on their nodes. root: their root.
        constants: the numbers of the problem. tokens: T.

    Example:
        >>> from lora_theory import Pretraining, Problem
        >>> from lora_theory.theory.nodes import Discretisation
        >>> from lora_theory.theory.predict import pretraining_averages, solve_pretraining
        >>> problem = Problem(tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        ...                   pretraining=Pretraining(samples=0.2, penalty=0.02))
        >>> settings, constants = Discretisation(None, 8, 0, 1e-10), Constants.of(problem)
        >>> with jax.enable_x64(True):
        ...     averages, _ = pretraining_averages(problem, settings)
        ...     root = solve_pretraining(problem, settings)
        ...     found = pretraining_stability(averages, root, constants, 2)
        >>> round(found.replicon, 4), found.is_stable
        (0.5187, True)
    """
    weight = spectral_divergence(root.unknowns, constants)
    if isinstance(averages.equations, pre.LinearPretraining):
        V_hat = np.exp(root.unknowns[2])
        replicon = weight * V_hat**2 / (constants.samples * tokens * (tokens + 1))
        return Stability(float(replicon), 0.0, 0.0, 0.0)
    columns = [pre.OBSERVABLES.index(name) for name in ("Q", "M", "V")]
    center, blocks = root.observables[columns], _blocks_per_chunk(averages)

    def rows(chunk: Any, minima: Any) -> Array:
        numbers = constants.samples, constants.label_variance
        found: Array = _softmax_fields(
            jnp.asarray(center), chunk, minima[0], *numbers, tokens, blocks
        )
        return found

    moves = root.block_observables[:, columns] - center
    here = averages.at(root.unknowns, search=True).observables
    forces, by_block = _average(averages, rows, moves)
    weights = np.array([spectral_divergence(x, constants) for x in root.block_unknowns])
    jump_mass = pre.OBSERVABLES.index("jump_mass")
    return Stability(
        float(weight * forces.mean()),
        float(standard_error(weights * by_block)) if math.isfinite(weight) else math.nan,
        float(root.observables[jump_mass]),
        _error_at_one_point(here[:, jump_mass]),
    )


def _blocks_per_chunk(averages: Averages) -> int:
    """A chunk is part of a block, or a few blocks."""
    return max(1, averages.blocks // len(averages.chunks))


def _error_at_one_point(jump_mass: Float[np.ndarray, " R"]) -> float:
    """From the blocks all at the root of the mean.

    The Stein form in it is not differentiated: it cannot be taken to the roots of the blocks.
    """
    return float(standard_error(jump_mass))


def _average(
    averages: Averages, rows: Callable[[Any, Any], Array], moves: Float[np.ndarray, "R n"]
) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """A value by block at the last point, and moved to the roots of the blocks."""
    found = averages.of(rows)
    return found[:, 0], found[:, 0] + moves @ found[:, 1:].mean(axis=0)


def _with_gradient(value: Callable[[Array], Array], point: Array) -> Float[Array, "blocks 1+n"]:
    return jnp.concatenate([value(point)[:, None], jax.jacfwd(value)(point)], axis=1)


def squared_response(prox: Proximal) -> Float[Array, " nodes"]:
    """‖I − ∂u/∂ω‖²_F = v²‖∂_ωG‖²_F per node, ∂u/∂ω the inverse of the Hessian."""
    eye = jnp.eye(prox.point.shape[0])[:, :, None]
    units = jnp.broadcast_to(eye, prox.hessian.shape)
    columns = [unit - solve_positive_definite(prox.hessian, unit) for unit in units]
    return jnp.sum(jnp.stack(columns) ** 2, axis=(0, 1))


def _lora_rows(
    unknowns: Array,
    fields: LinearFields | SoftmaxFields,
    task: Task,
    blocks: int,
    prox: Callable[[Array, Array, Array], Proximal],
) -> Array:
    def value(x: Array) -> Array:
        q, _, v, s = lora.point_of(x, task)
        at = prox(x[1] * fields.signal + s * fields.noise, v, q)
        replicon = task.samples * pre.block_means(fields.share * squared_response(at), blocks)
        return replicon * lora.squared_spread(x, task)

    return _with_gradient(value, unknowns)


@quickly_compiled("blocks")
def _linear_lora(unknowns: Array, fields: LinearFields, task: Task, blocks: int) -> Array:
    def prox(omega: Array, v: Array, q: Array) -> Proximal:
        return linear_lora_proximal(fields.levels + q, omega, v)

    return _lora_rows(unknowns, fields, task, blocks, prox)


@quickly_compiled("blocks")
def _softmax_lora(
    unknowns: Array, fields: SoftmaxFields, task: Task, minimum: Array, blocks: int
) -> Array:
    def prox(omega: Array, v: Array, q: Array) -> Proximal:
        return softmax_lora_proximal(fields.training, fields.labels, omega, v, q, minimum)

    return _lora_rows(unknowns, fields, task, blocks, prox)


@quickly_compiled("tokens", "blocks")
def _softmax_fields(
    point: Array,
    nodes: pre.Labels,
    minimum: Array,
    samples: Array,
    label_variance: Array,
    tokens: int,
    blocks: int,
) -> Array:
    """2α E‖∂_zG‖²_F by block at (Q, M, V); along the flat direction of the fields G is 0."""

    def value(point: Array) -> Array:
        Q, M, V = point[0], point[1], jnp.maximum(point[2], pre.SMALLEST_VARIANCE)
        both = pre.paired(nodes.label_noise, nodes.frozen_noise)
        label, frozen, _ = pre.frozen_coordinates(*both, Q, M, label_variance)
        logits = to_fields(field_basis(tokens, "softmax"), label)
        labels = attention(logits, "softmax", row_axis=0)
        prox = softmax_field_proximal(labels, frozen, V, minimum)
        return 2 * samples / V**2 * pre.block_means(squared_response(prox), blocks)

    return _with_gradient(value, point)
