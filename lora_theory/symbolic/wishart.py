"""μ_δ = law(S0) ⊞ semicircle(δ²) for the Wishart teacher: J in closed form, at little noise, edge.

The inverse of the Stieltjes transform is x(g) = 1/g + 1/(c(1 − cg)) + δ²g with c = 1/√κ0
(docs/theory.md, section 2.4).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import sympy as sp

from lora_theory.symbolic import notation as n

__all__ = [
    "MomentForms",
    "inverse_transform",
    "moment_forms",
    "moment_with_full_rank",
    "small_noise_moment",
    "stieltjes_cubic",
    "upper_edge",
]

_c, _g = sp.symbols("c g")
_inverse, _pole = sp.symbols("inverse pole")  # 1/g and 1/(1 − cg)
_squared_delta = sp.Symbol("delta_squared", positive=True)
_root_rank = sp.sqrt(n.teacher_rank)


def inverse_transform() -> sp.Expr:
    """x(g) = 1/g + 1/(c(1 − cg)) + δ²g, c = 1/√κ0: the R-transforms of S0 and δZ added."""
    c = 1 / _root_rank
    return 1 / n.transform + 1 / (c * (1 - c * n.transform)) + n.delta**2 * n.transform


def stieltjes_cubic() -> tuple[sp.Expr, ...]:
    """Coefficients of the cubic in G that x(G) = x amounts to, highest power first."""
    cubic = sp.numer(sp.together(inverse_transform() - n.point))
    polynomial = sp.Poly(cubic, n.transform)
    scale = -polynomial.nth(0)
    return tuple(sp.simplify(entry / scale) for entry in polynomial.all_coeffs())


class MomentForms(NamedTuple):
    """J, ∂_δJ and ∂_εJ by g = G(ε + i0), Im g ≤ 0."""

    value: sp.Expr
    by_delta: sp.Expr
    by_epsilon: sp.Expr


@functools.cache
def moment_forms() -> MomentForms:
    """J = −Im 𝒜(g)/(3π), 𝒜 = ∫(x(g) − ε)³dg, and its derivatives at fixed g.

    (x − ε)³ is reduced to powers of g, 1/g and 1/(1 − cg), each integrated.  It vanishes at
    g = G(ε), so that the derivatives of J need none of g.
    """
    antiderivative = _antiderivative()

    def moment(expression: sp.Expr) -> sp.Expr:
        named = {_squared_delta: n.delta**2, _c: 1 / _root_rank, _g: n.transform}
        return -sp.im(expression.subs(named)) / (3 * sp.pi)

    return MomentForms(
        moment(antiderivative),
        moment(2 * n.delta * antiderivative.diff(_squared_delta)),
        moment(antiderivative.diff(n.epsilon)),
    )


@functools.cache
def _antiderivative() -> sp.Expr:
    """∫(x(g) − ε)³dg, real on the small positive real axis."""
    integrand = sp.expand((_inverse + _pole / _c + _squared_delta * _g - n.epsilon) ** 3)
    # all products of two of g, 1/g and 1/(1 − cg) are sums of their powers
    relations = [
        _g * _inverse - 1,
        _inverse * _pole - _inverse - _c * _pole,
        _c * _g * _pole - _pole + 1,
    ]
    _, simple = sp.reduced(integrand, relations, _pole, _inverse, _g, order="lex")
    total = sp.S.Zero
    for (poles, inverses, power), factor in sp.Poly(simple, _pole, _inverse, _g).terms():
        if poles:
            total += factor * _integrated_power(1 - _c * _g, poles) / -_c
        elif inverses:
            total += factor * _integrated_power(_g, inverses)
        else:
            total += factor * _g ** (power + 1) / (power + 1)
    return total


def _integrated_power(base: sp.Expr, power: int) -> sp.Expr:
    """∫ base^{−power} d base."""
    return sp.log(base) if power == 1 else base ** (1 - power) / (1 - power)


def moment_with_full_rank() -> sp.Expr:
    """J where ε lies below the whole of μ_δ: ∫(x − ε)²μ_δ, from the moments in x(g).

    At g → 0, x(g) = 1/g + κ1 + κ2g + … with mean κ1 and variance κ2.
    """
    rest = sp.series(inverse_transform() - 1 / n.transform, n.transform, 0, 2).removeO()
    mean, variance = rest.coeff(n.transform, 0), rest.coeff(n.transform, 1)
    return sp.expand(sp.simplify((mean - n.epsilon) ** 2 + variance))


@functools.cache
def small_noise_moment() -> sp.Expr:
    """J for κ0 < 1 at δ → 0 with ε = ηδ², up to O(δ⁷): the zero eigenvalues of S0 spread.

    They form a semicircle of width δ, and ε cuts it near its middle: g_ε = −i√(1 − κ0)/δ + O(1).
    The integrand of 𝒜 vanishes there to first order, x − ε ~ 2δ²(g − g_ε), so that this g gives
    𝒜 up to (2δ²)³(g − g_ε)⁴/4; its leading part, of order δ⁶, is real.
    """
    order = 7
    spread = sp.sqrt(1 - n.teacher_rank)
    tau = n.delta * _root_rank / spread
    ratio = sum((sp.I * tau) ** k for k in range(order + 1))  # 1/(1 − iτ)
    # Im log(1 − cg) = Im log(1 + i/τ) = π/2 − arctan τ
    arctan = sum((-1) ** k * tau ** (2 * k + 1) / (2 * k + 1) for k in range(order // 2 + 1))
    logarithm = sp.I * (sp.pi / 2 - arctan)
    expression = _antiderivative().subs(
        {sp.log(_g): -sp.I * sp.pi / 2, sp.log(1 - _c * _g): logarithm}
    )
    for power in (1, 2):
        inverse = (-sp.I * tau * ratio) ** power  # (1 − cg)^{−power} at cg = −i/τ
        expression = expression.subs((1 - _c * _g) ** -power, inverse)
    named = {_g: -sp.I * spread / n.delta, _c: 1 / _root_rank, _squared_delta: n.delta**2}
    expression = expression.subs(named).subs(n.epsilon, n.eta * n.delta**2)
    imaginary = sp.expand(sp.expand(expression).coeff(sp.I, 1))
    zeros = sp.Symbol("zeros", positive=True)  # 1 − κ0, in which the coefficients factor
    moment = sp.S.Zero
    for power in range(order):
        for cut in range(power + 1):
            factor = -imaginary.coeff(n.delta, power).coeff(n.eta, cut) / (3 * sp.pi)
            factor = sp.factor(factor.subs(n.teacher_rank, 1 - zeros))
            moment += factor.subs(zeros, 1 - n.teacher_rank) * n.delta**power * n.eta**cut
    return moment


def upper_edge() -> tuple[sp.Expr, sp.Expr]:
    """(δ², x₊) by g, 0 < g < √κ0/(1 + √κ0): the edge is where x'(g) = 0.

    Example:
        >>> from lora_theory.symbolic.wishart import upper_edge
        >>> upper_edge()[0]
        -1/(-g/sqrt(teacher_rank) + 1)**2 + g**(-2)
    """
    squared = n.delta**2 - inverse_transform().diff(n.transform)
    return squared, inverse_transform().subs(n.delta**2, squared)
