"""Minimisation of a training loss over the factor W of a student (docs/theory.md, section 1).

Both stages are the same task: the fields of the student are those of frozen weights (none in
pre-training) plus the centred fields of W, of which the LoRA vector is the case of one column.
Full-batch L-BFGS of optax, on the device.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Integer

from lora_theory.attention import attention
from lora_theory.simulation.fields import centred_fields

__all__ = ["Minimum", "Task", "minimise", "minimise_together", "training_loss"]

#: Weights of this root mean square or less count as this large in the stopping rule, so that a
#: minimum at W = 0 is recognised.
SMALLEST_SCALE = 1e-2
#: Iterations without a lower loss after which rounding is taken to have stopped the descent.
PATIENCE = 20


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


def training_loss(task: Task, weights: Float[Array, "D P"], activation: str) -> Float[Array, ""]:
    """Σ_μ ‖σ(frozen + fields of W) − target‖²_F + λ‖W‖²_F."""
    fields = task.frozen + centred_fields(task.sequences, weights)
    mismatch = jnp.sum((task.targets - attention(fields, activation)) ** 2)
    return mismatch + task.penalty * jnp.sum(weights**2)


class _State(NamedTuple):
    weights: Float[Array, "D P"]
    objective: Float[Array, ""]
    gradient: Float[Array, "D P"]
    optimiser: Any
    iterations: Integer[Array, ""]
    lowest: Float[Array, ""]
    since_lowest: Integer[Array, ""]


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

    It stops when ‖∇L‖ ≤ ``tolerance`` ‖2λW‖, after ``max_iterations``, or when rounding keeps the
    loss from falling; only the first counts as converged.
    """
    solver = optax.lbfgs()

    def loss(weights: Array) -> Array:
        return training_loss(task, weights, activation)

    evaluate = optax.value_and_grad_from_state(loss)

    def relative_gradient(state: _State) -> Array:
        smallest = SMALLEST_SCALE * start.size**0.5
        scale = 2 * task.penalty * jnp.maximum(jnp.linalg.norm(state.weights), smallest)
        return jnp.asarray(jnp.linalg.norm(state.gradient) / scale)

    def unfinished(state: _State) -> Array:
        moving = (state.iterations < max_iterations) & (state.since_lowest < PATIENCE)
        return (relative_gradient(state) > tolerance) & moving

    def advance(state: _State) -> _State:
        update, optimiser = solver.update(
            state.gradient,
            state.optimiser,
            state.weights,
            value=state.objective,
            grad=state.gradient,
            value_fn=loss,
        )
        weights = optax.apply_updates(state.weights, update)
        objective, gradient = evaluate(weights, state=optimiser)
        return _State(
            weights,
            objective,
            gradient,
            optimiser,
            state.iterations + 1,
            jnp.minimum(objective, state.lowest),
            jnp.where(objective < state.lowest, 0, state.since_lowest + 1),
        )

    objective, gradient = jax.value_and_grad(loss)(start)
    zero = jnp.zeros((), jnp.int32)
    first = _State(start, objective, gradient, solver.init(start), zero, objective, zero)
    end = jax.lax.while_loop(unfinished, advance, first)
    remaining = relative_gradient(end)
    data_loss = end.objective - task.penalty * jnp.sum(end.weights**2)
    return Minimum(
        end.weights,
        end.objective,
        data_loss / task.sequences.shape[0],
        remaining,
        end.iterations,
        remaining <= tolerance,
    )


@functools.partial(jax.jit, static_argnames="activation")
def minimise_together(
    tasks: Task,
    starts: Float[Array, "runs D P"],
    tolerance: Float[Array, ""],
    max_iterations: Integer[Array, ""],
    *,
    activation: str,
) -> Minimum:
    """:func:`minimise` for several tasks of one shape, stacked along a first axis."""

    def one(task: Task, start: Array) -> Minimum:
        minimum: Minimum = minimise(task, start, tolerance, max_iterations, activation=activation)
        return minimum

    return jax.vmap(one)(tasks, starts)
