"""Where pre-training starts to learn, and where it stops to interpolate (docs/theory.md, 2.5)."""

from __future__ import annotations

from typing import NamedTuple

import sympy as sp

from lora_theory.arguments import checked_integer
from lora_theory.problem import ProblemError
from lora_theory.symbolic import notation as n
from lora_theory.symbolic.linear import in_ratios, linear_potential
from lora_theory.symbolic.potentials import pretraining_potential
from lora_theory.symbolic.series import PowerSeries, raised, truncated

__all__ = [
    "InterpolatingLimit",
    "InterpolationThreshold",
    "collapse",
    "collapse_at_few_samples",
    "fitting_average",
    "interpolating_limit",
    "interpolation_threshold",
    "visible_directions",
]

_inverse_delta = sp.Symbol("inverse_delta", positive=True)


def visible_directions(activation: str) -> sp.Expr:
    """c_T: T(T+1) for "linear"; two less for "softmax", blind to one constant on all logits."""
    unseen = {"linear": 0, "softmax": 2}
    if activation not in unseen:
        raise ProblemError(
            f'activation = {activation!r} is not allowed: it must be "softmax" or "linear"'
        )
    return n.tokens * (n.tokens + 1) - unseen[activation]


def fitting_average() -> sp.Expr:
    """𝓜 for V → ∞: c_T(Q_y − 2M + Q)/(4V), what it costs to fit c_T/2 directions exactly."""
    return n.visible / 2 * (n.label_variance - 2 * n.M + n.Q) / (2 * n.V)


class InterpolatingLimit(NamedTuple):
    """λ → 0⁺ below the threshold: the two conditions on (δ, ε), each zero, then Q and M."""

    response: sp.Expr
    noise: sp.Expr
    Q: sp.Expr
    M: sp.Expr


def interpolating_limit() -> InterpolatingLimit:
    """∂_δJ/2δ = αc_T, δ²αc_T = Q_y − 2M + Q, Q = J, M = J − (δ∂_δJ + ε∂_εJ)/2, for any σ.

    From the potential with :func:`fitting_average`: V drops out.
    """
    potential = pretraining_potential(average=fitting_average())
    hats, order = potential.conjugate_equations(), in_ratios(potential.order_equations())
    response = sp.simplify(order[n.V] * n.M_hat) - sp.simplify(hats[n.M_hat] * n.V)
    noise = sp.simplify(hats[n.Q_hat] / hats[n.M_hat] ** 2) - n.delta**2
    return InterpolatingLimit(
        response,
        sp.simplify(noise * n.alpha * n.visible),
        order[n.Q],
        order[n.M],
    )


class InterpolationThreshold(NamedTuple):
    """α_interp at δ̄, and Q_y as a function of δ̄, which fixes δ̄."""

    alpha: sp.Expr
    label_variance: sp.Expr


def interpolation_threshold() -> InterpolationThreshold:
    """α_interp = ∂_δJ/(2δ̄c_T), Q_y = J − (δ̄/2)∂_δJ: :func:`interpolating_limit` at ε = 0.

    Example:
        >>> from lora_theory.symbolic.thresholds import interpolation_threshold
        >>> interpolation_threshold().label_variance
        -delta*J_delta(delta, 0)/2 + J(delta, 0)
    """
    limit = interpolating_limit()
    (alpha,) = sp.solve(limit.response, n.alpha)
    noise = limit.noise.subs({n.M: limit.M, n.Q: limit.Q}).subs(n.alpha, alpha)
    (label_variance,) = sp.solve(noise, n.label_variance)
    return InterpolationThreshold(*(part.subs(n.epsilon, 0) for part in (alpha, label_variance)))


def collapse() -> tuple[sp.Expr, sp.Expr]:
    """(α, λ̃) by δ and x₊ on the line above which linear attention learns nothing.

    W = 0 solves the equations iff M̂x₊(δ) ≤ 2λ̃ with the conjugates at Q = M = V = 0.  For Wishart
    teachers :func:`~lora_theory.symbolic.wishart.upper_edge` gives δ² and x₊ by one parameter.

    Example:
        >>> from lora_theory.symbolic.thresholds import collapse
        >>> collapse()
        (Q_y/(T*delta**2*(T + 1)), 2*Q_y*x_plus/(T**2*delta**2))
    """
    hats = linear_potential().conjugate_equations()
    nothing = {n.Q: 0, n.M: 0, n.V: 0}
    Q_hat, M_hat = (hats[symbol].subs(nothing) for symbol in (n.Q_hat, n.M_hat))
    (alpha,) = sp.solve(Q_hat / M_hat**2 - n.delta**2, n.alpha)
    return sp.factor(alpha), sp.factor(M_hat.subs(n.alpha, alpha) * n.edge / 2)


def collapse_at_few_samples(order: int = 5) -> PowerSeries:
    """The λ̃ of :func:`collapse` in powers of √α, below α^{order/2}.

    With e = 1/δ the edge is at g = e/√(1 + e²/(1 − cg)²), and e = √(αT(T+1)/Q_y).
    """
    checked_integer("order", order, 1)
    small, e = sp.Symbol("small", positive=True), _inverse_delta
    c, g = 1 / sp.sqrt(n.teacher_rank), e
    for _ in range(order):
        pole = raised(-c * g, sp.Integer(-2), e, order)
        g = truncated(e * raised(e**2 * pole, -sp.Rational(1, 2), e, order), e, order)
    # x(g) = 1/g + 1/(c(1 − cg)) + g/e²
    reciprocal = raised(sp.expand(g / e) - 1, sp.S.NegativeOne, e, order) / e
    edge = reciprocal + raised(-c * g, sp.S.NegativeOne, e, order) / c + g / e**2
    hats = linear_potential().conjugate_equations()
    M_hat = hats[n.M_hat].subs(n.V, 0).subs(n.alpha, small**2)
    samples = n.tokens * (n.tokens + 1) / n.label_variance
    penalty = (M_hat / 2 * sp.expand(edge)).subs(e, small * sp.sqrt(samples))
    return PowerSeries.of(penalty, small, order, exponent=sp.Rational(1, 2))
