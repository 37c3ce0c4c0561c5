"""Minimisation of a training loss over the factor W of a student (docs/theory.md, section 1).

Both stages are the same task: the fields of the student are those of frozen weights (none in
pre-training) plus the centred fields of W, of which the LoRA vector is the case of one column.
Full-batch L-BFGS.  Along a direction the fields are a quadratic polynomial of the step, so one
iteration costs two products with the sequences, whatever the line search does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from lora_theory.attention import attention
from lora_theory.simulation.fields import fields_between, matmul, project
from lora_theory.simulation.line_search import line_search
from lora_theory.simulation.quasi_newton import (
    History,
    descent_direction,
    empty_history,
    remember,
)

__all__ = ["Minimum", "Task", "minimise", "training_loss", "training_loss_gradient"]

#: The projections X W are updated along the path; they are computed afresh every REFRESH
#: iterations, and once the gradient is within NEAR times the tolerance.
REFRESH, NEAR = 32, 2.0
#: Weights of this root mean square or less count as this large in the stopping rule, so that a
#: minimum at W = 0 is recognised.
SMALLEST_SCALE = 1e-2


class Task(NamedTuple):
    """Fit σ(frozen + fields of W) to the targets, with the penalty λ‖W‖²_F."""

    sequences: Float[Array, "n T D"]
    frozen: Float[Array, "n T T"]
    targets: Float[Array, "n T T"]
    penalty: Float[Array, ""]


class Minimum(NamedTuple):
    """Where the descent stopped."""

    weights: Float[Array, "D P"]
    objective: Float[Array, ""]  # the loss with its penalty
    train_error: Float[Array, ""]  # mean loss per sequence, penalty excluded
    relative_gradient: Float[Array, ""]  # ‖∇L‖ / ‖2λW‖
    iterations: Integer[Array, ""]
    converged: Bool[Array, ""]


def _mismatch(task: Task, fields: Float[Array, "n T T"], activation: str) -> Float[Array, ""]:
    return jnp.sum((task.targets - attention(task.frozen + fields, activation)) ** 2)


def training_loss(task: Task, weights: Float[Array, "D P"], activation: str) -> Float[Array, ""]:
    """Σ_μ ‖σ(frozen + fields of W) − target‖²_F + λ‖W‖²_F."""
    return _loss(task, project(task.sequences, weights), weights, activation)


def _loss(
    task: Task, projections: Float[Array, "n T P"], weights: Float[Array, "D P"], activation: str
) -> Float[Array, ""]:
    squared_norm = jnp.sum(weights**2)
    fields = fields_between(projections, projections, squared_norm, weights.shape[0])
    return _mismatch(task, fields, activation) + task.penalty * squared_norm


def training_loss_gradient(
    task: Task, projections: Float[Array, "n T P"], weights: Float[Array, "D P"], activation: str
) -> tuple[Float[Array, ""], Float[Array, "D P"]]:
    """The loss and its gradient at W, given X W.

    W enters through X W, through the centring −Tr S (or −q) and through the penalty.
    """
    loss, (by_projections, by_weights) = jax.value_and_grad(_loss, (1, 2))(
        task, projections, weights, activation
    )
    rows = task.sequences.reshape(-1, weights.shape[0])
    through_sequences = matmul(rows.T, by_projections.reshape(rows.shape[0], -1))
    return loss, through_sequences + by_weights


def _along(
    task: Task,
    projections: Float[Array, "n T P"],
    projected: Float[Array, "n T P"],
    weights: Float[Array, "D P"],
    direction: Float[Array, "D P"],
    activation: str,
) -> Callable[[Float[Array, ""]], tuple[Float[Array, ""], Float[Array, ""]]]:
    """φ(t) and φ'(t), the loss at W + t direction: the fields are h + t h' + t² h''."""
    dim = weights.shape[0]
    norm, product, square = (
        jnp.sum(left * right)
        for left, right in ((weights, weights), (weights, direction), (direction, direction))
    )
    constant = fields_between(projections, projections, norm, dim)
    half = fields_between(projections, projected, product, dim)
    linear = half + half.swapaxes(1, 2)
    quadratic = fields_between(projected, projected, square, dim)

    def value(step: Float[Array, ""]) -> Float[Array, ""]:
        fields = constant + step * linear + step**2 * quadratic
        penalty = task.penalty * (norm + 2 * step * product + step**2 * square)
        return _mismatch(task, fields, activation) + penalty

    return lambda step: jax.jvp(value, (step,), (jnp.ones_like(step),))


class _State(NamedTuple):
    weights: Float[Array, "D P"]
    projections: Float[Array, "n T P"]
    gradient: Float[Array, "D P"]
    history: History
    iterations: Integer[Array, ""]
    exact: Bool[Array, ""]  # the projections are X W, free of accumulated rounding
    stalled: Bool[Array, ""]


@functools.partial(jax.jit, static_argnames="activation")
def minimise(
    task: Task,
    start: Float[Array, "D P"],
    tolerance: Float[Array, ""],
    max_iterations: Integer[Array, ""],
    *,
    activation: str,
) -> Minimum:
    """The local minimum of the training loss reached from ``start``.

    It stops when ‖∇L‖ ≤ ``tolerance`` ‖2λW‖, after ``max_iterations``, or when even steepest
    descent finds no lower point; only the first counts as converged.
    """

    def relative(gradient: Array, weights: Array) -> Array:
        smallest = SMALLEST_SCALE * weights.size**0.5
        scale = 2 * task.penalty * jnp.maximum(jnp.linalg.norm(weights), smallest)
        ratio: Array = jnp.linalg.norm(gradient) / scale
        return ratio

    def unfinished(state: _State) -> Array:
        settled = state.exact & (relative(state.gradient, state.weights) <= tolerance)
        return ~settled & (state.iterations < max_iterations) & ~state.stalled

    def advance(state: _State) -> _State:
        weights, projections, gradient, history, iterations, _, _ = state
        direction = descent_direction(history, weights, gradient)
        projected = project(task.sequences, direction)
        along = _along(task, projections, projected, weights, direction, activation)
        step, found = line_search(along, weights.dtype)
        moved = weights + step * direction
        exact = (iterations % REFRESH == REFRESH - 1) | (
            relative(gradient, weights) <= NEAR * tolerance
        )
        moved_projections = jax.lax.cond(
            exact,
            lambda: project(task.sequences, moved),
            lambda: projections + step * projected,
        )
        _, moved_gradient = training_loss_gradient(task, moved_projections, moved, activation)
        longer = remember(history, moved - weights, moved_gradient - gradient)
        kept = longer._replace(
            inverse_curvatures=jnp.where(found, longer.inverse_curvatures, 0),
            stored=jnp.where(found, longer.stored, 0),
        )
        stalled = ~found & (history.stored == 0)
        return _State(
            moved, moved_projections, moved_gradient, kept, iterations + 1, exact, stalled
        )

    def evaluated(weights: Array) -> tuple[Array, Array, Array]:
        projections = project(task.sequences, weights)
        return projections, *training_loss_gradient(task, projections, weights, activation)

    projections, _, gradient = evaluated(start)
    zero, no, yes = jnp.zeros((), jnp.int32), jnp.zeros((), bool), jnp.ones((), bool)
    state = _State(start, projections, gradient, empty_history(start), zero, yes, no)
    end = jax.lax.while_loop(unfinished, advance, state)
    _, objective, gradient = evaluated(end.weights)
    data_loss = objective - task.penalty * jnp.sum(end.weights**2)
    remaining = relative(jnp.where(end.exact, end.gradient, gradient), end.weights)
    return Minimum(
        end.weights,
        objective,
        data_loss / task.sequences.shape[0],
        remaining,
        end.iterations,
        remaining <= tolerance,
    )
