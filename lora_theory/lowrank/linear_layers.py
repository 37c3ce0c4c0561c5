"""Layers, inputs and targets of a deep linear network: checked, multiplied, reduced."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import reduce
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from lora_theory.lowrank.checks import Matrix, checked_array, checked_matrix
from lora_theory.lowrank.preconditioning import Preconditioned
from lora_theory.problem import ProblemError

__all__ = [
    "acting", "check_train_gain", "check_widths", "checked_data", "checked_layers", "entries",
    "extremes", "input_matrix", "multiplied", "reduced", "row_space", "shape_of", "stacked",
    "widths_of", "without_gain",
]  # fmt: skip

#: Singular values of X below this share of the largest count as 0.
_RANK = 1e-12


def checked_layers(layers: Sequence[Any]) -> list[Any]:
    """Finite matrices, or preconditioned ones, each of which fits the one before."""
    given = entries("layers", layers)
    if not given:
        raise ProblemError("layers is empty: it must hold at least one matrix")
    checked = [
        layer if isinstance(layer, Preconditioned) else checked_matrix(f"layers[{i}]", layer)
        for i, layer in enumerate(given)
    ]
    for index, (first, second) in enumerate(itertools.pairwise(map(shape_of, checked))):
        if second[1] != first[0]:
            raise ProblemError(
                f"layers[{index + 1}] of shape {second} is not allowed: it must have {first[0]} "
                f"columns, as many as layers[{index}] has rows"
            )
    return checked


def checked_data(inputs: Any, targets: Any) -> tuple[Matrix, Matrix]:
    """X and Y with as many columns."""
    X, Y = checked_matrix("inputs", inputs), checked_matrix("targets", targets)
    if X.shape[1] != Y.shape[1]:
        raise ProblemError(
            f"targets has {Y.shape[1]} columns: it must have {X.shape[1]}, as many as inputs"
        )
    return X, Y


def entries(name: str, values: Any) -> list[Any]:
    """A list of what is given."""
    try:
        return list(values)
    except TypeError:
        raise ProblemError(f"{name} = {values!r} is not allowed: it must be a sequence") from None


def check_train_gain(train_gain: Any) -> None:
    """Refuse what is no bool."""
    if not isinstance(train_gain, bool):
        raise ProblemError(f"train_gain = {train_gain!r} is not allowed: it must be True or False")


def input_matrix(inputs: Any, layers: list[Any]) -> Matrix:
    """X, with as many rows as the first layer has columns."""
    X, columns = checked_matrix("inputs", inputs), shape_of(layers[0])[1]
    if len(X) != columns:
        raise ProblemError(
            f"inputs has {len(X)} rows: it must have {columns}, as layers[0] columns"
        )
    return X


def stacked(name: str, value: Any) -> NDArray[np.float64]:
    """One matrix per seed: (S, m, n), S = 1 for a single one."""
    if np.ndim(value) == 3:
        return checked_array(name, value, (None, None, None), "a matrix, or one per seed")
    return checked_matrix(name, value)[None]


def check_widths(widths: list[int], X: NDArray[np.float64]) -> None:
    """Refuse layers too narrow for the best product."""
    rank = min(widths[-1], max(row_space(one).shape[1] for one in X))
    if min(widths) < rank:
        raise ProblemError(
            f"widths {widths} are not allowed: none must be below min(n_L, rank X) = {rank}, or "
            "the minimum of f is another"
        )


def shape_of(layer: Any) -> tuple[int, int]:
    """Of a matrix or a preconditioned one."""
    matrix = layer.weight if isinstance(layer, Preconditioned) else layer
    rows, columns = matrix.shape
    return rows, columns


def widths_of(layers: Sequence[Any]) -> list[int]:
    """n_0, …, n_L."""
    return [shape_of(layers[0])[1], *(shape_of(layer)[0] for layer in layers)]


def row_space(X: Matrix) -> Matrix:
    """X in an orthonormal basis of its row space: n_0×r, with its singular values."""
    U, s, _ = np.linalg.svd(X, full_matrices=False)
    kept = s > _RANK * s[0]
    if not kept.any():
        raise ProblemError("inputs is zero: no layer can be learned from it")
    return np.asarray(U[:, kept] * s[kept])


def reduced(X: Matrix, Y: Matrix) -> tuple[Matrix, Matrix, float]:
    """X and Y on the row space of X, filled up with zeros to one size for all seeds; and f*."""
    U, s, Vt = np.linalg.svd(X, full_matrices=False)
    kept = s > _RANK * s[0]
    part = (Y @ Vt.T) * kept
    rest = Y - part @ Vt
    return U * (s * kept), part, float(np.sum(rest**2) / 2)


def extremes(matrix: Any) -> tuple[float, float]:
    """The smallest and the largest of its min(m, n) singular values."""
    s = np.linalg.svd(matrix, compute_uv=False)
    return float(s[-1]), float(s[0])


def multiplied(matrices: Sequence[Any], first: Any) -> Any:
    """M_k…M_1 times ``first``."""
    return reduce(lambda product, W: W @ product, matrices, first)


def acting(layer: Any, follow: bool = False) -> Array:
    """The matrix that acts; with ``follow`` its derivative follows the outer σ̂ as well."""
    if not isinstance(layer, Preconditioned):
        return layer  # type: ignore[no-any-return]
    acting: Array = layer.effective
    if follow:
        acting *= layer.scale / jax.lax.stop_gradient(layer.scale)
    return acting


def without_gain(gradient: Any, train_gain: bool) -> Any:
    """The gradient that trains: that of γ is 0 unless it is trained."""
    if train_gain or not isinstance(gradient, Preconditioned):
        return gradient
    return eqx.tree_at(lambda layer: layer.gain, gradient, jnp.zeros_like(gradient.gain))
