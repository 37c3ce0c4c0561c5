"""Proximal operators of both stages: global minima, batched over nodes, implicitly differentiated.

A proximal operator is u = argmin_u ‖u − ω‖²/(2v) + ℓ(u).  Its derivative is that of the implicit
equation (u − ω)/v + ∇ℓ(u) = 0; where two minima tie it jumps, and the derivative does not see it
(docs/theory.md, sections 2, 3 and 5).

The search for the minima (``*_minima``) is apart from what is read off at them (``*_proximal``):
minima found at nearby arguments are by far the best starts.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_theory.attention import attention
from lora_theory.compilation import quickly_compiled
from lora_theory.theory.fields import (
    field_basis,
    softmax_field_hessian,
    softmax_loss,
    to_fields,
)
from lora_theory.theory.newton import Expansion, Objective, minimise, solve_positive_definite

__all__ = [
    "Minima",
    "Proximal",
    "linear_lora_proximal",
    "rank_one_part",
    "softmax_field_minima",
    "softmax_field_proximal",
    "softmax_lora_minima",
    "softmax_lora_proximal",
    "softmax_lora_starts",
    "with_others",
]

_TOLERANCE, _MAX_STEPS = 1e-6, 200
# multiples of this share of the nodes come close to every node before any comes twice
_GOLDEN = (5**0.5 - 1) / 2
_BISECTIONS = 48


class Minima(NamedTuple):
    """What a search found per node, to about 1e-6; not differentiable."""

    point: Float[Array, "n nodes"]  # the lowest minimum
    rival: Float[Array, "n nodes"]  # the next lowest distinct one; the lowest itself if none
    gap: Float[Array, " nodes"]  # what the rival costs more; inf if there is none

    @property
    def both(self) -> Float[Array, "2 n nodes"]:
        """The lowest minimum and its rival."""
        return jnp.stack([self.point, self.rival])


class Proximal(NamedTuple):
    """The minimiser per node; differentiable in everything the objective depends on."""

    point: Float[Array, "n nodes"]
    force: Float[Array, "n nodes"]  # G = −∇ℓ(u), equal to (u − ω)/v
    loss: Float[Array, " nodes"]  # ℓ at the minimiser
    hessian: Float[Array, "n n nodes"]  # I + v∇²ℓ there, the inverse of ∂u/∂ω


def _field_objective(u: Array, labels: Array, center: Array, variance: Array) -> Expansion:
    """‖u − z‖²/(2V) + ‖y − σ(h(u))‖²."""
    tokens = labels.shape[0]
    basis = field_basis(tokens, "softmax")
    loss = softmax_loss(to_fields(basis, u), labels)
    pull = (u - center) / variance
    return Expansion(
        0.5 * jnp.sum(pull * (u - center), 0) + loss.value,
        pull + jnp.einsum("abn,abN->nN", jnp.asarray(basis), loss.gradient),
        softmax_field_hessian(loss.hessian) + jnp.eye(u.shape[0])[:, :, None] / variance,
    )


def softmax_field_minima(
    labels: Float[Array, "T T nodes"],
    center: Float[Array, "n nodes"],
    variance: Float[Array, ""] | Float[Array, " nodes"],
    starts: Float[Array, "count n nodes"],
) -> Minima:
    """Minima of ‖u − z‖²/(2V) + ‖y − σ(h(u))‖² reached from ``starts``.

    The starts z and z^y, the logits of the label, lead to the global minimum on most nodes
    (docs/theory.md, section 5).  Coordinates: :func:`~lora_theory.theory.fields.field_basis`.

    Args:
        labels: y.
        center: z.
        variance: V.
    """
    data = (labels, center, jnp.broadcast_to(variance, center.shape[-1:]))
    return _two_lowest(_field_objective, starts, data, 1 / jnp.mean(variance))


def softmax_field_proximal(
    labels: Float[Array, "T T nodes"],
    center: Float[Array, "n nodes"],
    variance: Float[Array, ""] | Float[Array, " nodes"],
    minimum: Float[Array, "n nodes"],
) -> Proximal:
    """Prox_V(z; y) = argmin_u ‖u − z‖²/(2V) + ‖y − σ(h(u))‖² (docs/theory.md, section 2).

    Args:
        labels: y.
        center: z.
        variance: V.
        minimum: the minimiser, from the search.
    """
    return _at_minimum(_field_objective, minimum, (labels, center, variance), center, variance)


def _lora_objective(
    chi: Array, frozen: Array, labels: Array, center: Array, variance: Array, norm: Array
) -> Expansion:
    """‖χ − ω‖²/(2v) + ‖y' − σ(h + χχᵀ − qI)‖²."""
    eye = jnp.eye(chi.shape[0])[:, :, None]
    loss = softmax_loss(frozen + chi[:, None] * chi[None] - norm * eye, labels)
    slope = loss.gradient + jnp.swapaxes(loss.gradient, 0, 1)
    bent = jnp.sum(loss.hessian * chi[None, None], axis=2)  # H_r χ
    cross = chi[:, None] * bent
    diagonal = eye * jnp.sum(bent * chi[None], axis=1)[:, None]
    spread = jnp.sum(chi[:, None, None] ** 2 * loss.hessian, axis=0)
    pull = (chi - center) / variance
    return Expansion(
        0.5 * jnp.sum(pull * (chi - center), 0) + loss.value,
        pull + jnp.sum(slope * chi[None], axis=1),
        eye / variance + slope + diagonal + cross + jnp.swapaxes(cross, 0, 1) + spread,
    )


def softmax_lora_minima(
    frozen: Float[Array, "T T nodes"],
    labels: Float[Array, "T T nodes"],
    center: Float[Array, "T nodes"],
    variance: Float[Array, ""],
    norm: Float[Array, ""],
    starts: Float[Array, "count T nodes"],
) -> Minima:
    """Minima of ‖χ − ω‖²/(2v) + ‖y' − σ(h + χχᵀ − qI)‖² reached from ``starts``.

    Args:
        frozen: h.
        labels: y'.
        center: ω.
        variance: v.
        norm: q.
    """
    nodes = center.shape[-1:]
    scales = (jnp.broadcast_to(variance, nodes), jnp.broadcast_to(norm, nodes))
    return _two_lowest(_lora_objective, starts, (frozen, labels, center, *scales), 1 / variance)


def softmax_lora_starts(
    frozen: Float[Array, "T T nodes"],
    labels: Float[Array, "T T nodes"],
    center: Float[Array, "T nodes"],
    variance: Float[Array, ""],
    norm: Float[Array, ""],
    likely: Float[Array, "count T nodes"],
) -> Float[Array, "count+1 T nodes"]:
    """Starts for the minima of LoRA: ω, then the points ±``likely`` per node, the best first.

    Args:
        frozen: h.
        labels: y'.
        center: ω.
        variance: v.
        norm: q.
        likely: χ*, :func:`rank_one_part`.
    """
    eye = jnp.eye(center.shape[0])[:, :, None]

    def value(chi: Array) -> Array:
        fields = frozen + chi[:, None] * chi[None] - norm * eye
        loss = jnp.sum((attention(fields, "softmax", row_axis=0) - labels) ** 2, (0, 1))
        return jnp.sum((chi - center) ** 2, 0) / (2 * variance) + loss

    both = jnp.concatenate([likely, -likely])
    order = jnp.argsort(jax.lax.map(value, both), axis=0)
    return jnp.concatenate([center[None], jnp.take_along_axis(both, order[:, None], axis=0)])


def rank_one_part(target: Float[Array, "T T nodes"]) -> Float[Array, "T nodes"]:
    """χ for which χχᵀ is closest to the symmetric ``target`` less its mean entry.

    With target = h^y − h + χ*χ*ᵀ this χ would be the best one if σ were linear; adding a number to
    all entries changes no softmax.
    """
    levels, vectors = jnp.linalg.eigh(jnp.moveaxis(target - jnp.mean(target, (0, 1)), -1, 0))
    part: Array = jnp.sqrt(jnp.maximum(levels[:, -1], 0.0)) * vectors[:, :, -1].T
    return part


def softmax_lora_proximal(
    frozen: Float[Array, "T T nodes"],
    labels: Float[Array, "T T nodes"],
    center: Float[Array, "T nodes"],
    variance: Float[Array, ""],
    norm: Float[Array, ""],
    minimum: Float[Array, "T nodes"],
) -> Proximal:
    """prox(ω) = argmin_χ ‖χ − ω‖²/(2v) + ‖y' − σ(h + χχᵀ − qI)‖² (docs/theory.md, section 3).

    Args:
        frozen: h.
        labels: y'.
        center: ω.
        variance: v.
        norm: q.
        minimum: the minimiser.
    """
    data = (frozen, labels, center, variance, norm)
    return _at_minimum(_lora_objective, minimum, data, center, variance)


def _two_lowest(
    objective: Objective, starts: Array, data: tuple[Array, ...], curvature: Array
) -> Minima:
    def descend(start: tuple[Array, Array]) -> tuple[Array, Array]:
        return minimise(
            objective, start[0], data, curvature,
            wanted=start[1], tolerance=_TOLERANCE, max_steps=_MAX_STEPS,
        )  # fmt: skip

    same = jnp.all(starts[:, None] == starts[None], axis=2)
    earlier = jnp.tri(len(starts), k=-1, dtype=bool)[:, :, None]
    first = ~jnp.any(same & earlier, axis=1)
    found, values = jax.lax.map(descend, (starts, first))
    found = jnp.moveaxis(found, 0, 1)

    def pick(index: Array) -> Array:
        return jnp.take_along_axis(found, index[None, None], axis=1)[:, 0]

    lowest = pick(jnp.argmin(values, axis=0))
    distance = jnp.max(jnp.abs(found - lowest[:, None]), axis=0)
    distinct = distance > 1e-2 * (1e-6 + jnp.max(jnp.abs(lowest), axis=0))
    others = jnp.where(distinct, values, jnp.inf)
    gap = jnp.min(others, axis=0) - jnp.min(values, axis=0)
    rival = jnp.where(jnp.isfinite(gap), pick(jnp.argmin(others, axis=0)), lowest)
    return Minima(lowest, rival, gap)


def _at_minimum(
    objective: Objective, minimum: Array, data: tuple[Array, ...], center: Array, variance: Array
) -> Proximal:
    point = _implicit(minimum, objective(jax.lax.stop_gradient(minimum), *data))
    final = objective(point, *data)
    pull = (point - center) / variance
    loss = final.value - 0.5 * jnp.sum(pull * (point - center), 0)
    return Proximal(point, pull - final.gradient, loss, variance * final.hessian)


def _implicit(point: Array, expansion: Expansion) -> Array:
    """The solution with the derivative of its implicit equation: a Newton step from it."""
    hessian = jax.lax.stop_gradient(expansion.hessian)
    step = solve_positive_definite(hessian, expansion.gradient)
    return jax.lax.stop_gradient(point) - step


def linear_lora_proximal(
    levels: Float[Array, "T nodes"],
    center: Float[Array, "T nodes"],
    variance: Float[Array, ""],
) -> Proximal:
    """prox(ω) for ℓ(χ) = ‖B − χχᵀ‖²_F/T² in the eigenbasis of B: a secular equation.

    With s = ‖χ‖², ((1/v + 4s/T²)I − (4/T²)B)χ = ω/v; the largest root s, on which the matrix is
    positive definite, is the global minimum (docs/theory.md, section 3).

    Args:
        levels: eigenvalues of B, ascending.
        center: ω in that basis.
        variance: v.
    """
    steep = 4.0 / levels.shape[0] ** 2
    b, omega, v = (jax.lax.stop_gradient(entry) for entry in (levels, center, variance))
    # on the boundary of a jump either sign is a minimum
    omega = omega.at[-1].set(jnp.where(omega[-1] == 0, 1e-100, omega[-1]))
    pull = (omega / v) ** 2
    base = jnp.maximum(0.0, b[-1] - 1 / (steep * v))  # s = base + t, t > 0
    # 1/v + steep·(base − b), exactly 0 at the top level where base > 0
    floor = jnp.where(base > 0, steep * (b[-1] - b), 1 / v - steep * b)
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
    return Proximal(point, force, loss, variance * hessian)


@quickly_compiled("count")
def with_others(
    minima: Float[Array, "known n nodes"], away: float, count: int
) -> Float[Array, "known+count n nodes"]:
    """The minima and, as further starts, the first ones of ``count`` other nodes.

    ``away`` is how far the first of these is, as a share of all nodes; 0: of the node itself.
    """
    shifts = jnp.sign(away) * (away + _GOLDEN * jnp.arange(count)) % 1.0 * minima.shape[-1]
    others = [jnp.roll(minima[0], shift.astype(int), axis=-1) for shift in shifts]
    return jnp.concatenate([minima, jnp.stack(others)])
