"""Preconditioned weights: an odd polynomial lifts their small singular values while they train.

W_eff = γ sg(σ̂) g_d(W/σ̂), σ̂ = uᵀWv, with sg the stop-gradient (docs/lowrank.md, section 2;
arXiv 2606.06470).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from lora_theory.arguments import checked_integer
from lora_theory.lowrank.checks import checked_matrix, checked_number
from lora_theory.lowrank.polar import at_least_single, checked_matrices
from lora_theory.lowrank.polynomials import of_matrix, preconditioning_polynomial
from lora_theory.problem import ProblemError

__all__ = ["Preconditioned", "gmcn", "merged", "precondition", "refreshed", "trainable"]

_EPSILON = 1e-7


class Preconditioned(eqx.Module):
    """A weight matrix in the PC parametrisation; :func:`precondition` makes one.

    Its effective weights have the singular values γσ̂g_d(σ/σ̂) (:func:`spectral.preconditioned`),
    g_d(1) = 1 and g_d steep at zero.  σ̂ inside g_d is differentiated, the factor σ̂ outside is
    not: changes of W along itself change nothing, so the gradient is orthogonal to W.

    ``left`` and ``right`` are estimates of the first singular vectors, float32 at least, without
    gradient.  :func:`refreshed` has to be called after every update of the weights: g_d explodes
    for singular values well above σ̂ (g_9(1.5) = 15).
    """

    weight: Float[Array, "m n"]
    gain: Float[Array, ""]
    left: Float[Array, " m"]
    right: Float[Array, " n"]
    degree: int = eqx.field(static=True)

    @property
    def scale(self) -> Float[Array, ""]:
        """σ̂ = uᵀWv + 10⁻⁷."""
        result: Array = _scale(self.weight, self.left, self.right)
        return result

    @property
    def effective(self) -> Float[Array, "m n"]:
        """W_eff, the weights that act."""
        result: Array = _effective(self.weight, self.gain, self.left, self.right, self.degree)
        return result

    def __call__(self, inputs: Float[Array, "*batch n"]) -> Float[Array, "*batch m"]:
        """W_eff x for every x."""
        return inputs @ self.effective.T

    def update(self, rounds: int = 10) -> Preconditioned:
        """The same weights with u and v refreshed by rounds of power iteration from u."""
        count = checked_integer("rounds", rounds, 1)
        left, right = _power_iteration(*_constant(self.weight, self.left, self.right), count)
        return dataclasses.replace(self, left=left, right=right)

    def merge(self) -> Float[Array, "m n"]:
        """Plain weights with the same outputs."""
        return jax.lax.stop_gradient(self.effective)


def precondition(
    weight: Float[Array, "m n"],
    *,
    degree: int = 9,
    gain: float | Float[Array, ""] = 1.0,
    rounds: int = 10,
    key: Key[Array, ""] | None = None,
) -> Preconditioned:
    """Weights in the PC parametrisation W_eff = γ sg(σ̂) g_d(W/σ̂) (arXiv 2606.06470).

    Train ``weight`` and ``gain`` (:func:`trainable`), call :func:`refreshed` after every optimizer
    step, and :func:`merged` at the end.  The paper preconditions the matrices of the MLP and the
    output of attention, not queries, keys and values; degree 9 with AdamW, 5 with Muon.

    Args:
        weight: W, m×n, floating-point.
        degree: of g_d: 3, 5, 7 or 9; or 1, which leaves the spectrum as it is (a control: only the
            gradient changes).
        gain: the initial γ.
        rounds: of power iteration before the first use.
        key: of the random vectors it starts from; ``jax.random.key(0)`` if left out.

    Raises:
        ProblemError: a degree without coefficients, weights that are no finite matrix, a gain that
            is not finite, rounds that are not a positive integer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> module = precondition(jnp.diag(jnp.array([2.0, 0.2])), degree=9)
        >>> print(module(jnp.array([1.0, 1.0])).round(3))
        [2.    0.707]
        >>> print(jax.grad(lambda m: m.effective.sum())(module).gain.round(3))
        2.707
    """
    preconditioning_polynomial(degree)
    array = checked_matrices("weight", weight)
    if array.ndim != 2:
        raise ProblemError(f"weight of shape {array.shape} is not allowed: it must be a matrix")
    if not isinstance(array, jax.core.Tracer):
        checked_matrix("weight", array)
    if not isinstance(gain, jax.Array) and not _is_finite(gain):
        raise ProblemError(f"gain = {gain!r} is not allowed: it must be a finite number")
    dtype = jnp.promote_types(array.dtype, jnp.float32)
    left, right = _random_directions(jax.random.key(0) if key is None else key, array.shape, dtype)
    gain = jnp.asarray(gain, dtype)
    return Preconditioned(array, gain, left, right, int(degree)).update(rounds)


def refreshed(tree: PyTree, rounds: int = 10) -> PyTree:
    """A model in which every :class:`Preconditioned` has its u and v refreshed.

    Example:
        >>> import jax.numpy as jnp
        >>> module = precondition(jnp.diag(jnp.array([2.0, 0.2])))
        >>> grown = eqx.tree_at(lambda m: m.weight, module, 3 * module.weight)
        >>> round(float(refreshed([grown])[0].scale), 3)
        6.0
    """
    return _on_modules(lambda module: module.update(rounds), tree)


def merged(tree: PyTree) -> PyTree:
    """A model in which plain weights stand for every :class:`Preconditioned`.

    Example:
        >>> import jax.numpy as jnp
        >>> merged({"out": precondition(jnp.eye(2))})["out"].round(3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return _on_modules(lambda module: module.merge(), tree)


def trainable(tree: PyTree) -> PyTree:
    """Booleans of the shape of a model, for ``eqx.partition`` and masks of optax.

    True for all floating-point arrays but u and v: those have no gradient, yet weight decay and
    noise of an optimizer would move them.

    Example:
        >>> import jax.numpy as jnp
        >>> flags = trainable(precondition(jnp.eye(2)))
        >>> flags.weight, flags.gain, flags.left, flags.right
        (True, True, False, False)
    """
    flags = jax.tree.map(eqx.is_inexact_array, tree)
    return _on_modules(
        lambda module: eqx.tree_at(lambda m: (m.left, m.right), module, (False, False)), flags
    )


def gmcn(matrices: Sequence[Any], *, fraction: float = 0.1) -> float:
    """Geometric mean over matrices of σ₁ over the mean of the smallest singular values.

    The condition metric of arXiv 2606.06470: the smallest ⌈10 %⌉ of the min(m, n) of each.

    Args:
        matrices: one or more matrices, or :class:`Preconditioned`, of which the effective weights
            are measured.
        fraction: > 0 and ≤ 1, of the singular values that count as smallest.

    Returns:
        ≥ 1; infinite if those of one matrix are all 0.

    Raises:
        ProblemError: no matrices, one that is not finite or zero, a fraction out of range.

    Example:
        >>> import numpy as np
        >>> gmcn([np.diag([4.0, 1.0]), np.diag([9.0, 1.0])])
        6.0
    """
    share = checked_number("fraction", fraction, positive=True, largest=1.0)
    logarithms = [
        _logarithm_of_condition(f"matrices[{i}]", entry, share) for i, entry in enumerate(matrices)
    ]
    if not logarithms:
        raise ProblemError("matrices is empty: it must hold at least one matrix")
    return math.exp(math.fsum(logarithms) / len(logarithms))


def _logarithm_of_condition(name: str, entry: Any, fraction: float) -> float:
    matrix = entry.effective if isinstance(entry, Preconditioned) else entry
    s = np.linalg.svd(checked_matrix(name, matrix), compute_uv=False)
    if s[0] == 0:
        raise ProblemError(f"{name} is zero: its condition has no meaning")
    count = math.ceil(fraction * len(s) - 1e-9)  # 0.1·30 is a little above 3
    smallest = float(np.mean(s[-count:]))
    return math.log(s[0] / smallest) if smallest > 0 else math.inf


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _on_modules(function: Any, tree: PyTree) -> PyTree:
    def is_module(node: Any) -> bool:
        return isinstance(node, Preconditioned)

    return jax.tree.map(
        lambda node: function(node) if is_module(node) else node, tree, is_leaf=is_module
    )


@jax.jit
def _scale(weight: Array, left: Array, right: Array) -> Array:
    left, right = _constant(left, right)
    return jnp.vdot(left, _times(at_least_single(weight), right)) + _EPSILON


@partial(jax.jit, static_argnames="degree")
def _effective(weight: Array, gain: Array, left: Array, right: Array, degree: int) -> Array:
    scale: Array = _scale(weight, left, right)
    shaped = of_matrix(at_least_single(weight) / scale, preconditioning_polynomial(degree))
    return (gain * jax.lax.stop_gradient(scale) * shaped).astype(weight.dtype)


@partial(jax.jit, static_argnums=(1, 2))
def _random_directions(key: Array, shape: tuple[int, int], dtype: Any) -> tuple[Array, Array]:
    vectors = [
        jax.random.normal(one, (size,), dtype)
        for one, size in zip(jax.random.split(key), shape, strict=True)
    ]
    return _unit(vectors[0], vectors[0]), _unit(vectors[1], vectors[1])


@jax.jit
def _power_iteration(weight: Array, left: Array, right: Array, rounds: int) -> tuple[Array, Array]:
    W = at_least_single(weight)

    def turn(_: int, vectors: tuple[Array, Array]) -> tuple[Array, Array]:
        left, right = vectors
        right = _unit(_times(W.T, left), right)
        return _unit(_times(W, right), left), right

    result: tuple[Array, Array] = jax.lax.fori_loop(0, rounds, turn, (left, right))
    return result


def _constant(*arrays: Array) -> tuple[Array, ...]:
    return tuple(jax.lax.stop_gradient(array) for array in arrays)


def _unit(vector: Array, otherwise: Array) -> Array:
    """The direction of a vector; another one if it is zero."""
    norm = jnp.linalg.norm(vector)
    return jnp.where(norm > 0, vector / jnp.where(norm > 0, norm, 1), otherwise)


def _times(matrix: Array, vector: Array) -> Array:
    return jnp.matmul(matrix, vector, precision=jax.lax.Precision.HIGHEST)
