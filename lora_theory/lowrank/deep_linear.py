"""Deep linear networks: how fast gradient descent converges, predicted and run.

f = ½‖W_L…W_1X − Y‖²_F for layers W_l of n_l×n_{l−1}, inputs X of n_0×N, targets Y of n_L×N.  Loss
above the minimum f* shrinks geometrically while singular values of the layers stay within bounds;
the derivation is in docs/results/preconditioning_deep_linear.md.  Layers may be plain matrices or
:class:`~lora_theory.lowrank.Preconditioned`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from lora_theory.arguments import checked_integer
from lora_theory.compilation import double_precision, quickly_compiled
from lora_theory.lowrank.checks import checked_matrix, checked_number
from lora_theory.lowrank.deep_linear_training import Training, train
from lora_theory.lowrank.linear_layers import (
    acting,
    check_train_gain,
    checked_data,
    checked_layers,
    entries,
    extremes,
    input_matrix,
    multiplied,
    reduced,
    row_space,
    widths_of,
    without_gain,
)  # fmt: skip
from lora_theory.lowrank.preconditioning import Preconditioned
from lora_theory.problem import ProblemError

__all__ = [
    "Rates",
    "Training",
    "asymptotic_factor",
    "envelope",
    "minimum_loss",
    "product_rate",
    "rates",
    "tangent_kernel",
    "train",
]


class Rates(NamedTuple):
    """Constants μ of ‖∇f‖² ≥ 2μ(f − f*), weakest first, and the largest eigenvalue beside them."""

    product: float  #: from each layer's smallest singular value, see :func:`product_rate`
    layerwise: float  #: Σ_l σ_min(W_L…W_{l+1})² σ_r(W_{l−1}…W_1X)²
    smallest: float  #: smallest eigenvalue of the tangent kernel: no larger constant holds
    largest: float  #: its largest eigenvalue, the curvature of f at a minimum


def minimum_loss(inputs: Any, targets: Any) -> float:
    """f* = ½‖Y(1 − Π)‖²_F, Π the projector on the row space of X.

    The least f of all products W_L…W_1, provided that no layer is narrower than min(n_L, rank X).

    Example:
        >>> minimum_loss([[1.0, 0.0]], [[3.0, 2.0]])
        2.0
    """
    X, Y = checked_data(inputs, targets)
    return float(reduced(X, Y)[2])


def tangent_kernel(
    layers: Sequence[Any], inputs: Any, *, train_gain: bool = True
) -> NDArray[np.float64]:
    """K of dE/dt = −K[E] for small steps of gradient descent, E = (W_L…W_1X − Y)Π.

    For plain layers K[E] = Σ_l A_lA_lᵀ E B_lᵀB_l with A_l = W_L…W_{l+1}, B_l = W_{l−1}…W_1X.  Under
    preconditioning K = J J̃ᵀ: the gradient J̃ᵀE holds the outer σ̂, while what acts follows it; K
    is then not symmetric, and f need not fall.

    Args:
        layers: W_1, …, W_L, or :class:`Preconditioned` with u and v refreshed.
        inputs: X, of rank r.
        train_gain: whether the gains γ of preconditioned layers are trained.

    Returns:
        (n_L r, n_L r), on entries of E in an orthonormal basis of the row space of X.

    Raises:
        ProblemError: layers that do not fit one another or X, or are no finite matrices; X = 0.

    Example:
        >>> tangent_kernel([[[2.0]], [[3.0]]], [[1.0]]).tolist()
        [[13.0]]
    """
    check_train_gain(train_gain)
    checked = checked_layers(layers)
    X = row_space(input_matrix(inputs, checked))
    with double_precision():
        exact = jax.tree.map(
            lambda array: jnp.asarray(array, jnp.float64), checked, is_leaf=_is_numpy
        )
        return np.asarray(_kernel(exact, jnp.asarray(X), train_gain))


def asymptotic_factor(
    layers: Sequence[Any], inputs: Any, learning_rate: float, *, train_gain: bool = True
) -> float:
    """The factor by which each step shrinks the residual near a minimum: max |1 − ηλ(K)|.

    f − f* shrinks by its square.  Exact as f → f*, for the layers at the end of training; it is 1
    where K is singular, and convergence is then not geometric.  Args: see :func:`tangent_kernel`.

    Example:
        >>> round(asymptotic_factor([[[2.0]], [[3.0]]], [[1.0]], 0.05), 12)
        0.35
    """
    rate = checked_number("learning_rate", learning_rate, positive=True)
    kernel = tangent_kernel(layers, inputs, train_gain=train_gain)
    return float(np.abs(1 - rate * np.linalg.eigvals(kernel)).max())


def rates(layers: Sequence[Any], inputs: Any) -> Rates:
    """Constants of the inequality ‖∇f‖² ≥ 2μ(f − f*) at plain layers, weakest first.

    Args:
        layers: W_1, …, W_L, plain matrices.
        inputs: X, of rank r.

    Raises:
        ProblemError: as :func:`tangent_kernel`; a preconditioned layer, whose K is not symmetric.

    Example:
        >>> rates([[[2.0]], [[3.0]]], [[1.0]])
        Rates(product=13.0, layerwise=13.0, smallest=13.0, largest=13.0)
    """
    matrices = checked_layers(layers)
    for index, layer in enumerate(matrices):
        if isinstance(layer, Preconditioned):
            raise ProblemError(
                f"layers[{index}] is preconditioned: these constants are of plain layers; take "
                "merged(layers), or asymptotic_factor"
            )
    X = row_space(input_matrix(inputs, matrices))
    lowest = [extremes(W)[0] for W in matrices]
    product = product_rate(lowest, widths_of(matrices), extremes(X)[0])
    layerwise = 0.0
    for place in range(len(matrices)):
        after = multiplied(matrices[place + 1 :], np.eye(len(matrices[place])))
        before = multiplied(matrices[:place], X)
        # over all directions of E, not only over as many as the matrix has singular values
        smallest = [
            extremes(M)[0] if rank <= min(M.shape) else 0.0
            for M, rank in ((after, matrices[-1].shape[0]), (before, X.shape[1]))
        ]
        layerwise += math.prod(smallest) ** 2
    eigenvalues = np.linalg.eigvalsh(tangent_kernel(matrices, inputs))
    return Rates(product, layerwise, max(float(eigenvalues[0]), 0.0), float(eigenvalues[-1]))


def product_rate(lowest: Sequence[float], widths: Sequence[int], input_lowest: float) -> float:
    """μ = σ_r(X)² Σ_l Π_{k≠l} τ_k², from lower bounds τ_k of the layers' singular values.

    Of the sum only the l with n_l ≥ … ≥ n_L and n_{l−1} ≥ … ≥ n_0: W_k has to keep every direction
    of E, on the left for k > l, on the right for k < l.  For non-increasing n_1 ≥ … ≥ n_L < n_0
    that is l = 1 alone, for square layers all L; 0 if there is none.

    Args:
        lowest: τ_1, …, τ_L.
        widths: n_0, …, n_L.
        input_lowest: σ_r(X), the smallest singular value of X that is not 0.

    Raises:
        ProblemError: numbers that are negative or not finite; lengths that do not fit.

    Example:
        >>> product_rate([0.5, 0.5], [3, 2, 2], 2.0), product_rate([0.5, 0.5], [2, 2, 2], 2.0)
        (1.0, 2.0)
    """
    bounds = [checked_number(f"lowest[{i}]", b) for i, b in enumerate(entries("lowest", lowest))]
    sizes = [checked_integer(f"widths[{i}]", n, 1) for i, n in enumerate(entries("widths", widths))]
    scale = checked_number("input_lowest", input_lowest)
    if len(sizes) != len(bounds) + 1 or not bounds:
        raise ProblemError(
            f"widths has {len(sizes)} entries and lowest {len(bounds)}: there must be n_0, …, n_L "
            "for τ_1, …, τ_L"
        )
    terms = 0.0
    for place in range(len(bounds)):
        before, after = sizes[: place + 1], sizes[place + 1 :]
        if before == sorted(before) and after == sorted(after, reverse=True):
            terms += math.prod(b**2 for i, b in enumerate(bounds) if i != place)
    return scale**2 * terms


def envelope(
    start: float,
    *,
    lowest: Sequence[float],
    highest: float,
    widths: Sequence[int],
    inputs: Any,
    learning_rate: float,
    steps: int,
) -> NDArray[np.float64]:
    """Upper bounds on f − f* after 0, …, ``steps`` steps of gradient descent on plain layers.

    f_{t+1} − f* ≤ (1 − ημ(2 − ηβ)) (f_t − f*) for ηβ ≤ 2, while σ_min(W_k) ≥ τ_k (k = 1, …, L) and
    ‖W_k‖ ≤ s hold before every step; μ is that of :func:`product_rate`, and with x = ‖X‖,
    e² = 2(f_t − f*), c = (L−1) x s^{L−2} (1 + ηx s^{L−2}e)^{L−2},

        β = Λ + ce + ¼c²η²Λe²,    Λ = L s^{2L−2}x².

    Args:
        start: f_0 − f*.
        lowest, highest: τ_1, …, τ_L and s, bounds over all steps.
        widths: n_0, …, n_L.
        inputs: X.
        learning_rate: η.
        steps: how many.

    Raises:
        ProblemError: ηβ > 2, with which nothing is guaranteed; numbers out of range; lengths that
            do not fit.

    Example:
        >>> envelope(8.0, lowest=[1], highest=1, widths=[1, 1], inputs=[[1.0]], learning_rate=0.5,
        ...          steps=2).tolist()
        [8.0, 2.0, 0.5]
    """
    smallest, x = extremes(row_space(checked_matrix("inputs", inputs)))
    mu = product_rate(lowest, widths, smallest)
    excess, rate = checked_number("start", start), checked_number("learning_rate", learning_rate)
    s, depth = checked_number("highest", highest, positive=True), len(lowest)
    count = checked_integer("steps", steps, 0)
    if s < max(lowest):
        raise ProblemError(f"highest = {highest!r} is not allowed: it must be ≥ all of lowest")
    largest, bounds = depth * s ** (2 * depth - 2) * x**2, [excess]
    for _ in range(count):
        e = math.sqrt(2 * bounds[-1])
        curved = 0.0
        if depth > 1:
            single = x * s ** (depth - 2)
            curved = (depth - 1) * single * (1 + rate * single * e) ** (depth - 2)
        beta = largest + curved * e + (curved * rate * e) ** 2 * largest / 4
        if rate * beta > 2:
            raise ProblemError(
                f"learning_rate = {learning_rate!r} is not allowed: it must be ≤ 2/β = "
                f"{2 / beta:.3g}, β the curvature that these bounds allow"
            )
        bounds.append(bounds[-1] * (1 - rate * mu * (2 - rate * beta)))
    return np.array(bounds)


def _is_numpy(node: Any) -> bool:
    return isinstance(node, np.ndarray)


@quickly_compiled("train_gain")
def _kernel(layers: list[Any], X: Array, train_gain: bool) -> Array:
    def outputs(layers: list[Any], follow: bool) -> Any:
        return multiplied([acting(layer, follow) for layer in layers], X)

    value, backward = jax.vjp(partial(outputs, follow=False), layers)

    def velocity(residual: Array) -> Array:
        (gradient,) = backward(residual.reshape(value.shape))
        moved = [without_gain(part, train_gain) for part in gradient]
        _, change = jax.jvp(partial(outputs, follow=True), (layers,), (moved,))
        return jnp.ravel(change)

    columns: Array = jax.vmap(velocity)(jnp.eye(value.size, dtype=value.dtype))
    return columns.T
