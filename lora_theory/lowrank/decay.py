"""Low-rank decay: a step along the polar factor of the weights, which lowers all singular values.

Weight decay multiplies every singular value by the same factor; this takes the same amount off
each, so that small ones reach zero (docs/lowrank.md, section 1; arXiv 2606.04405).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from lora_theory.lowrank.polar import (
    at_least_single,
    check_method,
    checked_matrices,
    iterated,
    norm_of,
    polar_of,
)
from lora_theory.lowrank.polynomials import polar_polynomials, polar_slope
from lora_theory.problem import ProblemError

__all__ = ["LowRankDecayState", "low_rank_decay", "shrink"]

Schedule = Callable[[Any], Any]


class LowRankDecayState(NamedTuple):
    """How many steps were taken, for the schedules."""

    count: Int[Array, ""]  # type: ignore[assignment]  # the name that optax looks for


def low_rank_decay(
    strength: float | Array | Schedule,
    *,
    learning_rate: float | Array | Schedule = 1.0,
    adaptive: bool = False,
    method: str = "svd",
    steps: int | None = None,
    clip: bool = True,
    mask: Any = None,
) -> optax.GradientTransformation:
    """Decoupled low-rank decay, the last link of an optax chain (arXiv 2606.04405).

    With W' the weights after the update of the links before, they become ``shrink(W', step)``:
    every singular value is lowered by ``step`` and none goes below zero.  No gradient passes
    through.  The paper writes the step in several ways; λ is ``strength``, η ``learning_rate``:

    ==========================================  =====================================
    step                                        arguments
    ==========================================  =====================================
    λ, that of its code                         ``low_rank_decay(λ)``
    ηλ                                          ``learning_rate=η``
    ηλ‖W'‖_F/‖polar(W')‖_F                      ``learning_rate=η, adaptive=True``
    ==========================================  =====================================

    Its code is ``low_rank_decay(λ, method="newton_schulz", steps=5, clip=False)`` on the query and
    key matrices: five steps give no polar factor but nearly W itself, see :func:`polar_factor`;
    and a step that is not clipped overshoots: without a gradient W reaches zero and then changes
    sign for ever.

    Args:
        strength: λ ≥ 0, or a schedule of optax.
        learning_rate: η ≥ 0, or a schedule.
        adaptive: whether the step is relative to the size of the weights.
        method, steps, clip: see :func:`shrink`.
        mask: which leaves decay, as in :func:`optax.add_decayed_weights`: a tree of booleans, or a
            function of the parameters that returns one.  By default all matrices, that is leaves
            with two axes; leaves with more that a mask chooses are stacks of matrices.

    Raises:
        ProblemError: an argument out of range; in ``update``: no parameters, or a chosen leaf that
            is no matrix.

    Weights that are not finite stay so, as in optax's own transformations.

    Example:
        >>> import jax.numpy as jnp
        >>> optimizer = optax.chain(optax.sgd(0.1), low_rank_decay(0.5))
        >>> weights = {"query": jnp.diag(jnp.array([2.0, 0.3])), "bias": jnp.ones(2)}
        >>> gradients = {"query": jnp.zeros((2, 2)), "bias": jnp.ones(2)}
        >>> updates, _ = optimizer.update(gradients, optimizer.init(weights), weights)
        >>> after = optax.apply_updates(weights, updates)
        >>> print(jnp.diag(after["query"]), after["bias"])
        [1.5 0. ] [0.9 0.9]
    """
    for name, value in (("strength", strength), ("learning_rate", learning_rate)):
        _check_size(name, value)
    for name, flag in (("adaptive", adaptive), ("clip", clip)):
        if not isinstance(flag, bool):
            raise ProblemError(f"{name} = {flag!r} is not allowed: it must be True or False")
    check_method(method, steps)

    def init(params: Any) -> LowRankDecayState:
        del params
        return LowRankDecayState(jnp.zeros([], jnp.int32))

    def update(
        updates: Any, state: LowRankDecayState, params: Any = None
    ) -> tuple[Any, LowRankDecayState]:
        if params is None:
            raise ProblemError("params is missing: update(updates, state, params) needs it")
        step = _at(strength, state.count) * _at(learning_rate, state.count)

        def decayed(path: Any, change: Array | None, weights: Array) -> Array | None:
            if change is None:
                return None
            name = f"leaf {jax.tree_util.keystr(path)}, chosen by mask,"
            W = at_least_single(checked_matrices(name, weights))
            moved = W + change
            size = step * _relative_size(moved, method, steps) if adaptive else step
            result: Array = _shrunk(moved, jnp.asarray(size, W.dtype), method, steps, clip)
            return (result - W).astype(change.dtype)

        changed = jax.tree.map_with_path(
            decayed, updates, params, is_leaf=lambda leaf: leaf is None
        )
        return changed, LowRankDecayState(optax.safe_increment(state.count))

    return optax.masked(
        optax.GradientTransformation(init, update), _matrices if mask is None else mask
    )


def shrink(
    weights: Float[Array, "*stack m n"],
    step: float | Array,
    *,
    method: str = "svd",
    steps: int | None = None,
    clip: bool = True,
) -> Float[Array, "*stack m n"]:
    """Weights with every singular value lowered by a step, and none below zero.

    With "svd": σ → max(σ − step, 0) exactly, the proximal operator of step·‖W‖_*.  The other
    methods subtract step·X_K, X_K their polynomials f_K of W/s.  Since f_K(x) ≤ c x with
    c = Πc_0, the product of the slopes at zero (1.5^K for Newton–Schulz), the scale
    s = max(‖W‖_F, c·step) keeps step·f_K(σ/s) ≤ σ: no singular value changes sign.  Those above
    a few steps move by the step, those of its size by a little less, smaller ones nearly to zero
    (docs/lowrank.md, section 1).

    Args:
        weights: W, or a stack of them.  It may be traced by JAX, and so may the step.
        step: what is taken off, ≥ 0; one number, or one for each matrix of a stack.
        method, steps: how the polar factor is computed, see :func:`polar_factor`.
        clip: False subtracts step·polar(W) as it is, beyond zero too.

    Raises:
        ProblemError: an argument out of range, or weights that are no matrices.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> W = jnp.diag(jnp.array([2.0, 0.3]))
        >>> for clip in (True, False):
        ...     print(np.diag(shrink(W, 0.5, clip=clip)).round(3))
        [1.5 0. ]
        [ 1.5 -0.2]
    """
    _check_size("step", step, schedules=False)
    check_method(method, steps)
    given = checked_matrices("weights", weights)
    W = at_least_single(given)
    size = jnp.asarray(step, W.dtype)
    if size.ndim and size.shape != W.shape[:-2]:
        raise ProblemError(
            f"step of shape {size.shape} is not allowed: it must be one number, or one for each "
            f"matrix, {W.shape[:-2]}"
        )
    result: Array = _shrunk(W, size, method, steps, bool(clip)).astype(given.dtype)
    return result


@partial(jax.jit, static_argnames=("method", "steps", "clip"))
def _shrunk(
    W: Float[Array, "*stack m n"], step: Array, method: str, steps: int | None, clip: bool
) -> Float[Array, "*stack m n"]:
    each = step[..., None, None]
    if not clip:
        direction: Array = polar_of(W, method, steps)
        return W - each * direction
    if method == "svd":
        U, s, Vt = jnp.linalg.svd(W, full_matrices=False)
        lowered = jnp.maximum(s - step[..., None], 0)
        return jnp.matmul(U * lowered[..., None, :], Vt, precision=jax.lax.Precision.HIGHEST)
    polynomials = polar_polynomials(method, steps)
    scale = jnp.maximum(norm_of(W), step * polar_slope(polynomials))
    return W - each * iterated(W, scale, polynomials)


def _relative_size(W: Array, method: str, steps: int | None) -> Array:
    """‖W‖_F/‖polar(W)‖_F, 0 for W = 0."""
    of_factor = norm_of(polar_of(W, method, steps))
    return norm_of(W) / jnp.where(of_factor > 0, of_factor, 1)


def _matrices(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) == 2, tree)


def _at(value: Any, count: Array) -> Any:
    return value(count) if callable(value) else value


def _check_size(name: str, value: Any, *, schedules: bool = True) -> None:
    """A number ≥ 0, or an array of them; what JAX traces is not known yet."""
    if (schedules and callable(value)) or isinstance(value, jax.core.Tracer):
        return
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if isinstance(value, jax.Array | np.ndarray) or is_number:
        size = np.asarray(value, dtype=float)
        if np.all((size >= 0) & (size < math.inf)):
            return
    allowed = "finite and ≥ 0" + (", or a schedule" if schedules else "")
    raise ProblemError(f"{name} = {value!r} is not allowed: it must be {allowed}")
