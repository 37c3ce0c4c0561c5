"""Spectrum of M̂S0 + √Q̂Z: Wishart ⊞ semicircle and the truncated second moment J.

With a = 1/κ0, c = √a and d = δ², the inverse of the Stieltjes transform G(x) = ∫μ_δ(dy)/(x−y) of
μ_δ = law(S0) ⊞ semicircle(δ²) is rational,

    x(g) = 1/g + 1/(c(1 − cg)) + dg,

so every tail integral of μ_δ is an elementary function of the single complex number
g_ε = G(ε + i0): no quadrature (docs/theory.md, section 2).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["learned_rank", "stieltjes", "truncated_second_moment"]

_SEGMENT = np.polynomial.legendre.leggauss(24)


def _cubic_coefficients(
    x: Float[Array, ""], delta: Float[Array, ""], teacher_rank: Float[Array, ""]
) -> tuple[Float[Array, ""], ...]:
    c = 1.0 / jnp.sqrt(teacher_rank)
    return c * delta**2, -(c * x + delta**2), x + c - 1.0 / c, -jnp.ones_like(x)


def stieltjes(
    x: Float[Array, ""], delta: Float[Array, ""], teacher_rank: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Real part and density −Im/π of G(x + i0) for μ_δ = law(S0) ⊞ semicircle(δ²).

    Root of cδ²G³ − (cx + δ²)G² + (x + c − 1/c)G − 1 = 0, c = 1/√κ0: the one in the lower half
    plane, or outside the support the real one on which x(g) decreases (docs/theory.md, section 2).

    Args:
        x: real point. delta: δ > 0. teacher_rank: κ0 > 0. All scalars (vmap for arrays).

    Example:
        >>> import jax
        >>> with jax.enable_x64(True):
        ...     x = jnp.linspace(-4, 8, 4001)
        ...     real, density = jax.vmap(lambda x: stieltjes(x, 0.7, 0.5))(x)
        ...     bool(abs(density.sum() * 12 / 4000 - 1) < 1e-3)
        True
    """
    x, delta, teacher_rank = (jnp.asarray(v, dtype=float) for v in (x, delta, teacher_rank))
    a3, a2, a1, a0 = _cubic_coefficients(x, delta, teacher_rank)
    # Cardano for the real root farthest from the others, which is well conditioned; the other two
    # from the quadratic that is left.
    shift = -a2 / (3 * a3)
    p = (3 * a3 * a1 - a2**2) / (9 * a3**2)
    half_q = (2 * a2**3 - 9 * a3 * a2 * a1 + 27 * a3**2 * a0) / (54 * a3**3)
    inner, side = half_q**2 + p**3, jnp.where(half_q > 0, -1.0, 1.0)
    cube = side * jnp.cbrt(jnp.abs(half_q) + jnp.sqrt(jnp.maximum(inner, 0.0)))
    alone = cube - jnp.where(cube == 0, 0.0, p / jnp.where(cube == 0, 1.0, cube))
    size = jnp.sqrt(jnp.maximum(-p, 0.0))
    cosine = jnp.clip(jnp.abs(half_q) / jnp.where(size == 0, 1.0, size**3), 0.0, 1.0)
    extreme = side * 2 * size * jnp.cos(jnp.arccos(cosine) / 3)

    def polish(_: int, g: Array) -> Array:
        value = ((a3 * g + a2) * g + a1) * g + a0
        slope = (3 * a3 * g + 2 * a2) * g + a1
        step = value / jnp.where(slope == 0, 1.0, slope)
        return jnp.where(jnp.abs(step) < 0.5 * jnp.abs(g), g - step, g)

    first = jax.lax.fori_loop(0, 4, polish, shift + jnp.where(inner > 0, alone, extreme))
    b0 = -a0 / first  # a3 g² + b1 g + b0; b1 by the way that cancels less
    forward = jnp.maximum(jnp.abs(a2), jnp.abs(a3 * first))
    backward = jnp.maximum(jnp.abs(a1), jnp.abs(b0)) / jnp.abs(first)
    b1 = jnp.where(forward < backward, a2 + a3 * first, (b0 - a1) / first)
    discriminant = b1**2 - 4 * a3 * b0
    root = jnp.sqrt(jnp.abs(discriminant))
    larger = -(b1 + jnp.where(b1 < 0, -1.0, 1.0) * root) / 2
    real = jnp.stack([first, larger / a3, b0 / jnp.where(larger == 0, 1.0, larger)])
    real = jax.lax.fori_loop(0, 2, polish, real)
    c = 1.0 / jnp.sqrt(teacher_rank)
    decreasing = -1 / real**2 + 1 / (1 - c * real) ** 2 + delta**2
    outside = real[jnp.argmin(decreasing)]
    inside = discriminant < 0
    return (
        jnp.where(inside, -b1 / (2 * a3), outside),
        jnp.where(inside, root / (2 * a3 * jnp.pi), 0.0),
    )


def truncated_second_moment(
    delta: Float[Array, ""], epsilon: Float[Array, ""], teacher_rank: Float[Array, ""]
) -> Float[Array, ""]:
    """J(δ, ε) = ∫_ε^∞ (x − ε)² μ_δ(dx), differentiable twice in δ and ε.

    J = −Im 𝒜(g_ε)/(3π) with 𝒜 = ∫(x(g) − ε)³dg, by parts from −Im∫(x − ε)² g dx/π.  The
    integrands of J, ∂_δJ and ∂_εJ vanish at g_ε, where x(g_ε) = ε: their first derivatives need
    no derivative of g_ε, which is therefore held fixed (docs/theory.md, section 2).

    Args:
        delta: δ = √Q̂/M̂ > 0. epsilon: ε = 2λ̃/M̂ ≥ 0. teacher_rank: κ0 > 0. Scalars.

    Example:
        >>> import jax
        >>> with jax.enable_x64(True):
        ...     J = truncated_second_moment(0.5, -50.0, 0.5)  # all of μ: 1 + κ0 + δ² + mean terms
        ...     bool(abs(J - (1.5 + 0.25 + 100 * 0.5**0.5 + 2500)) < 1e-6)
        True
    """
    delta, epsilon = jnp.asarray(delta, dtype=float), jnp.asarray(epsilon, dtype=float)
    fixed = [jax.lax.stop_gradient(jnp.asarray(v, float)) for v in (epsilon, delta, teacher_rank)]
    real, density = stieltjes(*fixed)
    c = 1.0 / jnp.sqrt(teacher_rank)
    depth, room = jnp.pi * density, jnp.minimum(real, jnp.sqrt(fixed[2]) - real)
    near = depth < 0.5 * room
    return jnp.where(
        near,
        _near_the_edge(
            jnp.where(near, real, 0.5 / c), jnp.where(near, depth, 0.0), delta, epsilon, c
        ),
        _in_the_bulk(real, depth, delta, epsilon, c),
    )


def _near_the_edge(real: Array, depth: Array, delta: Array, epsilon: Array, c: Array) -> Array:
    """J along the segment from Re g_ε down to g_ε: exact to rounding where 𝒜 would cancel.

    On it x(g) − ε = (g − g_ε)[−1/(g g_ε) + 1/((1 − cg)(1 − cg_ε)) + δ²]; its derivatives in δ, ε
    and c are added as terms of value zero, for those of J act under the integral.
    """
    end, c0, d0, eps0 = map(jax.lax.stop_gradient, (real - 1j * depth, c, delta**2, epsilon))
    points, weights = (jnp.asarray(part) for part in _SEGMENT)
    g = end.real - 0.5j * depth * (1 + points)
    height = (g - end) * (-1 / (g * end) + 1 / ((1 - c0 * g) * (1 - c0 * end)) + d0)
    pole = 1 / (c * (1 - c * g))
    height += pole - jax.lax.stop_gradient(pole) + (delta**2 - d0) * g - (epsilon - eps0)
    return 0.5 * depth * jnp.sum(weights * (height**3).real) / (3 * jnp.pi)


def _in_the_bulk(real: Array, depth: Array, delta: Array, epsilon: Array, c: Array) -> Array:
    """J by the antiderivative of (x(g) − ε)³."""
    g = real - 1j * depth
    d, eps = delta**2, epsilon
    b = 1.0 / c
    u = 1.0 - c * g
    # logarithms on the closed half planes reached from above the real x axis
    log_g = jnp.log(jnp.abs(g)) - 1j * jnp.arctan2(depth, real)
    log_u = jnp.log(jnp.abs(u)) + 1j * jnp.arctan2(c * depth, u.real)
    at_zero = (b - eps, 1.0 + d)  # x(g) − ε = 1/g + h0 + h1 g + …
    at_pole = (c + d / c - eps, c - d / c)  # x(g) − ε = b/u + k0 + k1 u + …
    t1, t2 = 1.0 - b / c, -b / c**2  # x(g) − ε = dg − ε + t1/g + t2/g² + …
    principal_zero = (
        -1.0 / (2 * g**2) - 3 * at_zero[0] / g + 3 * (at_zero[1] + at_zero[0] ** 2) * log_g
    )
    principal_pole = (
        -(
            -(b**3) / (2 * u**2)
            - 3 * b**2 * at_pole[0] / u
            + 3 * (b**2 * at_pole[1] + b * at_pole[0] ** 2) * log_u
        )
        / c
    )
    polynomial = (
        d**3 * g**4 / 4
        - d**2 * eps * g**3
        + 1.5 * (d * eps**2 + d**2 * t1) * g**2
        + (3 * d**2 * t2 - 6 * d * eps * t1 - eps**3) * g
    )
    return -(principal_zero + principal_pole + polynomial).imag / (3 * jnp.pi)


def learned_rank(
    delta: Float[Array, ""], epsilon: Float[Array, ""], teacher_rank: Float[Array, ""]
) -> Float[Array, ""]:
    """Rank of Ŝ over D: the kept share ∫_ε^∞ μ_δ = ∂²_εJ/2 (docs/theory.md, section 2)."""
    second = jax.grad(jax.grad(truncated_second_moment, argnums=1), argnums=1)
    return jnp.asarray(0.5 * second(delta, epsilon, teacher_rank))
