"""Gradient descent on deep linear networks, plain or preconditioned, with what it goes through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from lora_theory.arguments import checked_integer
from lora_theory.compilation import double_precision, quickly_compiled
from lora_theory.lowrank.checks import checked_number
from lora_theory.lowrank.linear_layers import (
    acting,
    check_train_gain,
    check_widths,
    checked_data,
    checked_layers,
    entries,
    input_matrix,
    multiplied,
    reduced,
    stacked,
    widths_of,
    without_gain,
)  # fmt: skip
from lora_theory.lowrank.polynomials import preconditioning_polynomial
from lora_theory.lowrank.preconditioning import Preconditioned, gmcn, precondition, refreshed
from lora_theory.problem import ProblemError

__all__ = ["Training", "train"]


@dataclass(frozen=True)
class Training:
    """What :func:`train` recorded, for S seeds and R steps."""

    steps: NDArray[np.int64]  #: (R,) how many steps had been taken
    excess: NDArray[np.float64]  #: (S, R) f − f*; infinite from where a run diverged
    minimum: NDArray[np.float64]  #: (S,) f*
    spectra: list[NDArray[np.float64]]  #: per layer (S, R, min(n_l, n_{l−1})) of what acts, or inf
    scales: NDArray[np.float64]  #: (S, R, L): σ̂ of preconditioned layers, σ_1 of plain ones
    layers: list[Any]  #: at the end, stacked over seeds: matrices, or Preconditioned

    def final(self, seed: int) -> list[Any]:
        """The layers of one seed at the end, as asymptotic_factor and others take them."""
        return [jax.tree.map(lambda array: array[seed], layer) for layer in self.layers]

    @cached_property
    def conditions(self) -> NDArray[np.float64]:
        """(S, R): :func:`~lora_theory.lowrank.gmcn` of the layers that act; inf if diverged."""
        places = np.ndindex(self.excess.shape)
        values = [
            gmcn([np.diag(spectrum[at]) for spectrum in self.spectra])
            if np.isfinite(self.excess[at])
            else math.inf
            for at in places
        ]
        return np.reshape(values, self.excess.shape)


def train(
    layers: Sequence[Any],
    inputs: Any,
    targets: Any,
    *,
    learning_rate: float,
    steps: int,
    degree: int | None = None,
    gains: Any = 1.0,
    train_gain: bool = True,
    decay: float = 0.0,
    rounds: int = 10,
    every: int = 1,
) -> Training:
    """Full-batch gradient descent on f + λΣ_l‖W_l‖²_F, of several seeds at once, in float64.

    Args:
        layers: the weights W_1, …, W_L at the start; all (n_l, n_{l−1}), or all with the same
            number S of seeds in front.
        inputs, targets: X (n_0, N) and Y (n_L, N), or with the seeds in front.
        learning_rate: η > 0.
        steps: a multiple of ``every``.
        degree: None for plain layers; 1, 3, 5, 7 or 9 for :func:`~lora_theory.lowrank.precondition`
            with its stop-gradients, u and v refreshed after every step.
        gains: γ at the start, a number or (L,) or (S, L); of preconditioned layers.
        train_gain: whether γ is trained, with the same η.
        decay: λ ≥ 0, on the raw weights and not on γ.
        rounds: of power iteration before the first and after every step.
        every: steps from one record to the next.

    Raises:
        ProblemError: arrays that do not fit or are not finite; layers narrower than min(n_L, rank
            X), whose f* is another; numbers out of range.

    Example:
        >>> import numpy as np
        >>> layers = [np.eye(2), np.eye(2)]
        >>> found = train(layers, np.eye(2), np.diag([2.0, 1.5]), learning_rate=0.1, steps=60)
        >>> from lora_theory.lowrank.deep_linear import asymptotic_factor
        >>> factor = asymptotic_factor(found.final(0), np.eye(2), 0.1)
        >>> measured = np.sqrt(found.excess[0, -1] / found.excess[0, -2])
        >>> round(factor, 4), round(float(measured), 4)
        (0.7, 0.7)
    """
    if degree is not None:
        preconditioning_polynomial(degree)
    check_train_gain(train_gain)
    rate = checked_number("learning_rate", learning_rate, positive=True)
    penalty = checked_number("decay", decay)
    spacing, turns = checked_integer("every", every, 1), checked_integer("rounds", rounds, 1)
    count = checked_integer("steps", steps, 1)
    if count % spacing:
        raise ProblemError(
            f"steps = {count} is not allowed: it must be a multiple of every = {spacing}"
        )
    weights = [stacked(f"layers[{i}]", one) for i, one in enumerate(entries("layers", layers))]
    X, Y = stacked("inputs", inputs), stacked("targets", targets)
    seeds = max((len(array) for array in (*weights, X, Y)), default=1)
    named = [*((f"layers[{i}]", W) for i, W in enumerate(weights)), ("inputs", X), ("targets", Y)]
    for name, array in named:
        if len(array) not in (1, seeds):
            raise ProblemError(f"{name} has {len(array)} seeds: it must have 1 or {seeds}")
    checked_layers([W[0] for W in weights])
    checked_data(X[0], Y[0])
    input_matrix(X[0], [W[0] for W in weights])
    if Y.shape[1] != weights[-1].shape[1]:
        raise ProblemError(
            f"targets has {Y.shape[1]} rows: it must have {weights[-1].shape[1]}, as the last layer"
        )
    check_widths(widths_of([W[0] for W in weights]), X)
    try:
        gamma = np.broadcast_to(np.asarray(gains, float), (seeds, len(weights)))
    except (TypeError, ValueError):
        raise ProblemError("gains must be a number, or (L,), or (seeds, L) numbers") from None
    if not np.all(np.isfinite(gamma)):
        raise ProblemError("gains has entries that are not finite: all must be")
    data = [reduced(X[i % len(X)], Y[i % len(Y)]) for i in range(seeds)]
    stacks = [np.broadcast_to(W, (seeds, *W.shape[1:])) for W in weights]
    with double_precision():
        found = _trained(
            [jnp.asarray(W) for W in stacks], jnp.asarray(gamma),
            jnp.asarray([X for X, _, _ in data]), jnp.asarray([Y for _, Y, _ in data]),
            jnp.asarray(rate), jnp.asarray(penalty), jnp.asarray(spacing),
            degree, train_gain, count // spacing, turns,
        )  # fmt: skip
    final, excess, spectra, scales = found
    excess = np.asarray(excess)
    return Training(
        spacing * np.arange(count // spacing + 1),
        np.where(np.isfinite(excess), excess, np.inf),
        np.array([least for _, _, least in data]),
        [np.asarray(spectrum) for spectrum in spectra],
        np.asarray(scales),
        [layer if degree is not None else np.asarray(layer) for layer in final],
    )


def _spectrum(matrix: Array) -> Array:
    finite = jnp.all(jnp.isfinite(matrix))  # LAPACK complains of others
    return jnp.where(
        finite, jnp.linalg.svd(jnp.where(finite, matrix, 0), compute_uv=False), jnp.inf
    )


@quickly_compiled("degree", "train_gain", "records", "rounds")
def _trained(
    weights: list[Array],
    gains: Array,
    X: Array,
    Y: Array,
    rate: Array,
    decay: Array,
    every: Array,
    degree: int | None,
    train_gain: bool,
    records: int,
    rounds: int,
) -> Any:
    def one(weights: list[Array], gains: Array, X: Array, Y: Array) -> Any:
        layers: list[Any] = weights
        if degree is not None:
            layers = [
                precondition(W, degree=degree, gain=gains[i], rounds=rounds)
                for i, W in enumerate(weights)
            ]

        def excess(layers: list[Any]) -> Array:
            return jnp.sum((multiplied([acting(layer) for layer in layers], X) - Y) ** 2) / 2

        def step(_: Any, layers: list[Any]) -> list[Any]:
            gradients = jax.grad(excess)(layers)
            moved = [
                _moved(layer, without_gain(gradient, train_gain), rate, decay)
                for layer, gradient in zip(layers, gradients, strict=True)
            ]
            result: list[Any] = refreshed(moved, rounds)
            return result

        def record(layers: list[Any]) -> Any:
            spectra = [_spectrum(acting(layer)) for layer in layers]
            scales = [
                layer.scale if isinstance(layer, Preconditioned) else s[0]
                for layer, s in zip(layers, spectra, strict=True)
            ]
            return excess(layers), spectra, jnp.stack(scales)

        def block(layers: list[Any], _: None) -> Any:
            layers = jax.lax.fori_loop(0, every, step, layers)
            return layers, record(layers)

        final, rest = jax.lax.scan(block, layers, None, length=records)
        together = jax.tree.map(
            lambda first, others: jnp.concatenate([first[None], others]), record(layers), rest
        )
        return final, *together

    return jax.vmap(one)(weights, gains, X, Y)


def _moved(layer: Any, gradient: Any, rate: Array, decay: Array) -> Any:
    if not isinstance(layer, Preconditioned):
        return layer - rate * (gradient + 2 * decay * layer)
    weight = layer.weight - rate * (gradient.weight + 2 * decay * layer.weight)
    gain = layer.gain - rate * gradient.gain
    return eqx.tree_at(lambda one: (one.weight, one.gain), layer, (weight, gain))
