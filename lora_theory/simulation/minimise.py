"""Minimisation of a training loss over the weights of a student (docs/theory.md, section 1).

Both stages are the same task: the fields of the student are those of frozen weights (none in
pre-training) plus the centred fields of W, of which the LoRA vector is the case of one column.
Full-batch L-BFGS of optax, on the device.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Integer

from lora_theory.attention import attention
from lora_theory.lowrank.polynomials import PRECONDITIONING, of_matrix
from lora_theory.parts import Pretraining
from lora_theory.simulation.fields import Symmetric, Weights, centred_fields
from lora_theory.simulation.proximal_descent import (
    nuclear_proximal,
    proximal_descent,
    spectral_proximal,
)

__all__ = [
    "FACTOR", "Form", "Minimum", "Task", "minimise", "minimise_together", "student",
    "training_loss",
]  # fmt: skip

#: Weights of this root mean square or less count as this large in the stopping rule, so that a
#: minimum at W = 0 is recognised.
SMALLEST_SCALE = 1e-2
#: Iterations without a lower loss after which rounding is taken to have stopped the descent.
PATIENCE = 20


class Form(NamedTuple):
    """What the trained numbers are, and how they are penalised: that of a regularizer.

    "weight_decay", a factor W with λ‖W‖²_F; "low_rank_decay", the same with λ√D‖W‖_*;
    "preconditioned", W̃ of W = σ̂ g_d(W̃/σ̂) with λ‖W̃‖²_F; "nuclear_norm", factors (A, B) side by
    side of S = (AAᵀ − BBᵀ)/D with λ(‖A‖² + ‖B‖²), which at its least is λD Σ|s_i|; "frobenius", the
    symmetric S with (λD/2)‖S‖²_F; "separable", the same with λD ΣR(s_i).
    """

    regularizer: str = "weight_decay"
    function: str | None = None
    degree: int | None = None
    scale: float | None = None  # ŝ = σ̂²/√(PD)

    @classmethod
    def of(cls, stage: Pretraining) -> Self:
        """That of the first stage of a problem."""
        return cls(stage.regularizer, stage.function, stage.degree, stage.scale)

    @property
    def is_factor(self) -> bool:
        """Whether a factor W is trained, or W̃."""
        return self.regularizer in ("weight_decay", "low_rank_decay", "preconditioned")


#: A factor with weight decay, as the LoRA vector.
FACTOR = Form()


class Task(NamedTuple):
    """Fit σ(τ(frozen + fields of W)) to the targets, with a penalty."""

    sequences: Float[Array, "n T D"]
    frozen: Float[Array, "n T T"]
    targets: Float[Array, "n T T"]
    penalty: Float[Array, ""]
    inverse_temperature: Float[Array, ""] | float = 1.0
    #: of the squares of W, row by row; None for 1 (tokens with a covariance: 1/c)
    decay: Float[Array, "D 1"] | None = None


class Minimum(NamedTuple):
    """Where the descent stopped."""

    weights: Float[Array, "D P"]  # in their form
    objective: Float[Array, ""]  # the loss with its penalty
    train_error: Float[Array, ""]  # mean loss per sequence, penalty excluded
    relative_gradient: Float[Array, ""]  # ‖∇L‖ over that of the penalty, ‖2λW‖
    iterations: Integer[Array, ""]
    converged: Bool[Array, ""]


def student(weights: Float[Array, "D P"], form: Form) -> Weights:
    """The weights of the student with these trained numbers."""
    dim = weights.shape[0]
    if form.regularizer == "preconditioned":
        assert form.degree is not None
        assert form.scale is not None
        top = math.sqrt(form.scale) * weights.size**0.25  # σ̂
        effective: Array = top * of_matrix(weights / top, PRECONDITIONING[form.degree])
        return effective
    if form.regularizer == "nuclear_norm":
        A, B = weights[:, :dim], weights[:, dim:]
        exact = jax.lax.Precision.HIGHEST
        return Symmetric(
            (jnp.matmul(A, A.T, precision=exact) - jnp.matmul(B, B.T, precision=exact)) / dim
        )
    return weights if form.is_factor else Symmetric((weights + weights.T) / 2)


def _penalty(task: Task, weights: Float[Array, "D P"], form: Form) -> Float[Array, ""]:
    """Without its strength λ."""
    square = jnp.sum(weights**2 if task.decay is None else task.decay * weights**2)
    return square * weights.shape[0] / 2 if form.regularizer == "frobenius" else square


def training_loss(
    task: Task, weights: Float[Array, "D P"], activation: str, form: Form = FACTOR
) -> Float[Array, ""]:
    """Σ_μ ‖σ(τ(frozen + fields of W)) − target‖²_F and the penalty."""
    return _data_loss(task, weights, activation, form) + task.penalty * _penalty(
        task, weights, form
    )


def _data_loss(
    task: Task, weights: Float[Array, "D P"], activation: str, form: Form
) -> Float[Array, ""]:
    fields = task.frozen + centred_fields(task.sequences, student(weights, form))
    fitted = attention(task.inverse_temperature * fields, activation)
    return jnp.sum((task.targets - fitted) ** 2)


class _State(NamedTuple):
    weights: Float[Array, "D P"]
    objective: Float[Array, ""]
    gradient: Float[Array, "D P"]
    optimiser: Any
    iterations: Integer[Array, ""]
    lowest: Float[Array, ""]
    since_lowest: Integer[Array, ""]


@functools.partial(jax.jit, static_argnames=("activation", "form"))
def minimise(
    task: Task,
    start: Float[Array, "D P"],
    tolerance: Float[Array, ""],
    max_iterations: Integer[Array, ""],
    *,
    activation: str,
    form: Form = FACTOR,
) -> Minimum:
    """The local minimum of the training loss reached from ``start``.

    It stops when ‖∇L‖ ≤ ``tolerance`` times the gradient of the penalty, ‖2λW‖, after
    ``max_iterations``, or when rounding keeps the loss from falling; only the first counts as
    converged.  Penalties with kinks, separable ones and low-rank decay, are descended by proximal
    gradients, relative to those of the loss.
    """
    if form.regularizer in ("separable", "low_rank_decay"):
        if form.regularizer == "separable":
            assert form.function is not None
            start = (start + start.T) / 2
            proximal = spectral_proximal(form.function, task.penalty * len(start))
        else:
            proximal = nuclear_proximal(task.penalty * len(start) ** 0.5)
        found = proximal_descent(
            lambda W: _data_loss(task, W, activation, form),
            proximal, start, tolerance, max_iterations, PATIENCE,
        )  # fmt: skip
        return Minimum(
            found.weights,
            found.data_loss + found.penalty,
            found.data_loss / task.sequences.shape[0],
            found.relative_gradient,
            found.iterations,
            found.relative_gradient <= tolerance,
        )
    solver = optax.lbfgs()

    def loss(weights: Array) -> Array:
        return training_loss(task, weights, activation, form)

    evaluate = optax.value_and_grad_from_state(loss)

    def relative_gradient(state: _State) -> Array:
        # entries of S are smaller than those of its factor
        size, slope = (
            (start.size**0.25, len(start))
            if form.regularizer == "frobenius"
            else (start.size**0.5, 2)
        )
        smallest = SMALLEST_SCALE * size
        decayed = state.weights if task.decay is None else task.decay * state.weights
        scale = slope * task.penalty * jnp.maximum(jnp.linalg.norm(decayed), smallest)
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
    data_loss = end.objective - task.penalty * _penalty(task, end.weights, form)
    return Minimum(
        end.weights,
        end.objective,
        data_loss / task.sequences.shape[0],
        remaining,
        end.iterations,
        remaining <= tolerance,
    )


@functools.partial(jax.jit, static_argnames=("activation", "form"))
def minimise_together(
    tasks: Task,
    starts: Float[Array, "runs D P"],
    tolerance: Float[Array, ""],
    max_iterations: Integer[Array, ""],
    *,
    activation: str,
    form: Form = FACTOR,
) -> Minimum:
    """:func:`minimise` for several tasks of one shape, stacked along a first axis."""

    def one(task: Task, start: Array) -> Minimum:
        minimum: Minimum = minimise(
            task, start, tolerance, max_iterations,
            activation=activation, form=form,
        )  # fmt: skip
        return minimum

    return jax.vmap(one)(tasks, starts)
