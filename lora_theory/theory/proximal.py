"""Proximal operators of both stages: global minima, batched over nodes, implicitly differentiated.

A proximal operator is u = argmin_u ‖u − ω‖²/(2v) + ℓ(u).  Its derivative is that of the implicit
equation (u − ω)/v + ∇ℓ(u) = 0; where two minima tie it jumps, and the derivative does not see it
(docs/theory.md, sections 2, 3 and 5).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lora_theory.theory.fields import softmax_loss, to_fields
from lora_theory.theory.newton import Expansion, Objective, minimise, solve_positive_definite

__all__ = ["Proximal", "linear_lora_proximal", "softmax_field_proximal", "softmax_lora_proximal"]

_TOLERANCE, _MAX_STEPS = 1e-6, 60
_BISECTIONS = 48


class Proximal(NamedTuple):
    """The minimiser per node; differentiable in everything the objective depends on."""

    point: Float[Array, "n nodes"]
    force: Float[Array, "n nodes"]  # G = −∇ℓ(u), equal to (u − ω)/v
    loss: Float[Array, " nodes"]  # ℓ at the minimiser
    hessian: Float[Array, "n n nodes"]  # I + v∇²ℓ there, the inverse of ∂u/∂ω
    rival: Float[Array, "n nodes"]  # second minimum found (the minimiser itself if none was)
    gap: Float[Array, " nodes"]  # what it costs more than the minimum; inf if none was found


def softmax_field_proximal(
    basis: Float[np.ndarray, "T T n"],
    labels: Float[Array, "T T nodes"],
    label_coordinates: Float[Array, "n nodes"],
    center: Float[Array, "n nodes"],
    variance: Float[Array, ""],
) -> Proximal:
    """Prox_V(z; y) = argmin_u ‖u − z‖²/(2V) + ‖y − σ(h(u))‖² (docs/theory.md, section 2).

    Args:
        labels: y. label_coordinates: z^y, the logits of the label. center: z. variance: V.
    """
    count = basis.shape[-1]
    pairs = jnp.asarray(np.einsum("abn,acm->nmabc", basis, basis).reshape(count * count, -1))

    def objective(u: Array, labels: Array, center: Array, variance: Array) -> Expansion:
        loss = softmax_loss(to_fields(basis, u), labels)
        pull = (u - center) / variance
        hessian = pairs @ loss.hessian.reshape(pairs.shape[1], -1)
        return Expansion(
            0.5 * jnp.sum(pull * (u - center), 0) + loss.value,
            pull + jnp.einsum("abn,abN->nN", jnp.asarray(basis), loss.gradient),
            hessian.reshape(count, count, -1) + jnp.eye(count)[:, :, None] / variance,
        )

    data = (labels, center, jnp.broadcast_to(variance, center.shape[-1:]))
    return _global_minimum(objective, [center, label_coordinates], data, center, variance)


def softmax_lora_proximal(
    frozen: Float[Array, "T T nodes"],
    labels: Float[Array, "T T nodes"],
    signal: Float[Array, "T nodes"],
    center: Float[Array, "T nodes"],
    variance: Float[Array, ""],
    norm: Float[Array, ""],
) -> Proximal:
    """prox(ω) = argmin_χ ‖χ − ω‖²/(2v) + ‖y' − σ(h + χχᵀ − qI)‖² (docs/theory.md, section 3).

    Args:
        frozen: h. labels: y'. signal: χ*, one of the starts. center: ω. variance: v. norm: q.
    """
    eye = jnp.eye(center.shape[0])[:, :, None]

    def objective(
        chi: Array, frozen: Array, labels: Array, center: Array, variance: Array, norm: Array
    ) -> Expansion:
        loss = softmax_loss(frozen + chi[:, None] * chi[None] - norm * eye, labels)
        slope = loss.gradient + jnp.swapaxes(loss.gradient, 0, 1)
        bent = jnp.einsum("rijN,jN->riN", loss.hessian, chi)  # H_r χ
        cross = chi[:, None] * bent
        diagonal = eye * jnp.einsum("riN,iN->rN", bent, chi)[:, None]
        spread = jnp.einsum("rN,rijN->ijN", chi**2, loss.hessian)
        pull = (chi - center) / variance
        return Expansion(
            0.5 * jnp.sum(pull * (chi - center), 0) + loss.value,
            pull + jnp.einsum("abN,bN->aN", slope, chi),
            eye / variance + slope + diagonal + cross + jnp.swapaxes(cross, 0, 1) + spread,
        )

    nodes = center.shape[-1:]
    data = (
        frozen,
        labels,
        center,
        jnp.broadcast_to(variance, nodes),
        jnp.broadcast_to(norm, nodes),
    )
    return _global_minimum(objective, [center, signal, -signal], data, center, variance)


def _global_minimum(
    objective: Objective,
    starts: list[Array],
    data: tuple[Array, ...],
    center: Array,
    variance: Array,
) -> Proximal:
    """The lowest minimum reached from the starts; the next lowest distinct one is its rival."""
    count, nodes = len(starts), starts[0].shape[-1]
    fixed = tuple(jax.lax.stop_gradient(entry) for entry in data)
    tiled = tuple(jnp.concatenate([entry] * count, axis=-1) for entry in fixed)
    stiffness = jax.lax.stop_gradient(1 / variance)
    minima = minimise(
        objective,
        jax.lax.stop_gradient(jnp.concatenate(starts, axis=-1)),
        tiled,
        stiffness,
        tolerance=_TOLERANCE,
        max_steps=_MAX_STEPS,
    )
    values = objective(minima, *tiled).value.reshape(count, nodes)
    minima = minima.reshape(-1, count, nodes)
    best = jnp.argmin(values, axis=0)
    point = jnp.take_along_axis(minima, best[None, None], axis=1)[:, 0]
    distance = jnp.max(jnp.abs(minima - point[:, None]), axis=0)
    distinct = distance > 1e-2 * (1e-6 + jnp.max(jnp.abs(point), axis=0))
    others = jnp.where(distinct, values, jnp.inf)
    rival = jnp.take_along_axis(minima, jnp.argmin(others, axis=0)[None, None], axis=1)[:, 0]
    gap = jnp.min(others, axis=0) - jnp.min(values, axis=0)
    expansion = objective(point, *data)
    point = _implicit(point, expansion)
    final = objective(point, *data)
    pull = (point - center) / variance
    loss = final.value - 0.5 * jnp.sum(pull * (point - center), 0)
    return Proximal(point, pull - final.gradient, loss, variance * expansion.hessian, rival, gap)


def _implicit(point: Array, expansion: Expansion) -> Array:
    """The solution with the derivative of its implicit equation: a Newton step from it."""
    hessian = jax.lax.stop_gradient(expansion.hessian)
    return point - solve_positive_definite(hessian, expansion.gradient)[0]


def linear_lora_proximal(
    levels: Float[Array, "T nodes"],
    center: Float[Array, "T nodes"],
    variance: Float[Array, ""],
) -> Proximal:
    """prox(ω) for ℓ(χ) = ‖B − χχᵀ‖²_F/T² in the eigenbasis of B: a secular equation.

    With s = ‖χ‖², ((1/v + 4s/T²)I − (4/T²)B)χ = ω/v; the largest root s, on which the matrix is
    positive definite, is the global minimum (docs/theory.md, section 3).  The rival is the largest
    root with the sign of the top component of ω reversed.

    Args:
        levels: eigenvalues of B, ascending. center: ω in that basis. variance: v.
    """
    steep = 4.0 / levels.shape[0] ** 2
    b, omega, v = (jax.lax.stop_gradient(entry) for entry in (levels, center, variance))
    pull = (omega / v) ** 2
    base = jnp.maximum(0.0, b[-1] - 1 / (steep * v))  # s = base + t, t > 0
    floor = 1 / v + steep * (base - b)
    high = jnp.maximum(b[-1], 0.0) + jnp.sum(omega**2, 0) - base
    low_free = jnp.sum(pull / (floor + steep * high) ** 2, 0)
    low_held = jnp.abs(omega[-1]) / (v * steep * jnp.sqrt(base + high))
    low = jnp.log(jnp.where(base > 0, low_held, low_free))
    high = jnp.maximum(jnp.log(high), low)

    def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = 0.5 * (low + high)
        t = jnp.exp(middle)
        above = jnp.sum(pull / (floor + steep * t) ** 2, 0) > base + t
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (low, high))
    denominator = floor + steep * jnp.exp(0.5 * (low + high))
    point = (omega / v) / denominator
    mirrored = point.at[-1].multiply(-1.0)
    gap = jnp.where(base > 0, 2 * jnp.abs(point[-1] * omega[-1]) / v, jnp.inf)

    squared = jnp.sum(point**2, 0)
    eye = jnp.eye(levels.shape[0])[:, :, None]
    gradient = (point - center) / variance + steep * (squared - levels) * point
    hessian = (1 / variance + steep * (squared - levels))[:, None] * eye + 2 * steep * (
        point[:, None] * point[None]
    )
    point = _implicit(point, Expansion(squared, gradient, hessian))
    squared = jnp.sum(point**2, 0)
    loss = 0.25 * steep * (jnp.sum(levels**2 - 2 * levels * point**2, 0) + squared**2)
    force = steep * (levels - squared) * point
    return Proximal(point, force, loss, variance * hessian, mirrored, gap)
