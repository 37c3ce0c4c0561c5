"""Pre-training of linear attention at many and at few samples, in powers of α.

Many: the ridge and the weight-decay problem at fixed penalty.  Few: the ridge problem at fixed
penalty (weight decay learns nothing there, see :func:`~.thresholds.collapse_at_few_samples`) and
weight decay in the limit λ → 0⁺, which holds for softmax too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import sympy as sp
from sympy.polys.ring_series import rs_mul
from sympy.polys.rings import PolyElement

from lora_theory.arguments import checked_integer
from lora_theory.symbolic import notation as n
from lora_theory.symbolic.forms import factored
from lora_theory.symbolic.linear import effective_noise, in_ratios, linear_potential
from lora_theory.symbolic.ridge import ridge_solution, saddle_point
from lora_theory.symbolic.series import PowerSeries, implicit, raised, truncated
from lora_theory.symbolic.wishart import moment_with_full_rank, small_noise_moment

__all__ = [
    "full_rank_solution",
    "interpolating_few_samples",
    "ridge_few_samples",
    "ridge_many_samples",
    "weight_decay_many_samples",
]

_small = sp.Symbol("small", positive=True)
_half_noise = n.label_noise / 2


@functools.cache
def ridge_many_samples(order: int = 3) -> Mapping[sp.Symbol, PowerSeries]:
    """V, M, Δ_eff,0 and Q of the ridge problem below α^{−order}.

    Example:
        >>> from lora_theory.symbolic import notation as n
        >>> ridge_many_samples(2)[n.delta_eff]
        label_noise/2 + label_noise/(2*alpha*c_T) + O(alpha**-2)
    """
    return _ridge(1 / _small, sp.S.Zero, sp.S.NegativeOne, order)


@functools.cache
def ridge_few_samples(order: int = 3) -> Mapping[sp.Symbol, PowerSeries]:
    """The same below α^order, from S = 0."""
    return _ridge(_small, 1 / (2 * n.penalty), sp.S.One, order)


def _ridge(
    alpha: sp.Expr, start: sp.Expr, exponent: sp.Rational, order: int
) -> dict[sp.Symbol, PowerSeries]:
    """One linear equation per power: V from its quadratic, then the others from V."""
    checked_integer("order", order, 1)
    solution, equations = ridge_solution(), saddle_point()
    V_hat = equations[n.V_hat].subs(n.alpha, alpha)
    # one order more, for Δ_eff,0 at few samples is a ratio of two numbers of order α
    residual = sp.numer(sp.together(n.V - equations[n.V].subs(n.V_hat, V_hat)))
    found = {n.V: implicit(residual, n.V, _small, order + 1, start=start)}
    for symbol, entry in (
        (n.M, solution.M),
        (n.delta_eff, solution.delta_eff.subs(n.alpha, alpha)),
        (n.Q, solution.Q),
    ):
        residual = sp.numer(sp.together(symbol - entry)).subs(found)
        found[symbol] = implicit(residual, symbol, _small, order)
    return {
        symbol: PowerSeries.of(entry, _small, order, exponent=exponent)
        for symbol, entry in found.items()
    }


def full_rank_solution() -> dict[sp.Symbol, sp.Expr]:
    """Weight decay where every eigenvalue is kept: κ0 > 1, ε = 2λ̃V below the edge of μ_δ.

    J is a polynomial there, M̂ = V̂ = 1/V, and V = (T²/4)/(αT(T+1) − 1) as without a penalty.
    """
    J = moment_with_full_rank()
    values = {
        n.J(n.delta, n.epsilon): J,
        n.J_delta(n.delta, n.epsilon): J.diff(n.delta),
        n.J_epsilon(n.delta, n.epsilon): J.diff(n.epsilon),
    }
    potential = linear_potential()
    ratios = in_ratios(potential.order_equations())
    order = {symbol: sp.expand(entry.subs(values)) for symbol, entry in ratios.items()}
    stiffness = potential.conjugate_equations()[n.V_hat]  # = M̂
    (V,) = sp.solve(n.V - order[n.V].subs(n.M_hat, stiffness), n.V)
    label_variance = 1 + n.teacher_rank + _half_noise
    noise = effective_noise().subs(n.label_variance, label_variance)
    samples = n.alpha * n.tokens * (n.tokens + 1)  # δ² = Δ_eff,0/(αT(T+1))
    balance = sp.expand(noise.subs(order)).subs(n.delta, sp.sqrt(n.delta_eff / samples))
    (delta_eff,) = sp.solve(balance - n.delta_eff, n.delta_eff)
    penalty = {n.epsilon: 2 * n.scaled_penalty * n.V}
    return {
        n.V: factored(V),
        n.delta_eff: factored(delta_eff.subs(penalty)),
        n.M: order[n.M].subs(penalty),
        n.Q: sp.expand(n.delta_eff - noise + n.Q),
    }


@functools.cache
def weight_decay_many_samples(order: int = 5) -> Mapping[sp.Symbol, PowerSeries]:
    """V, M, Δ_eff,0 and Q of weight decay, Wishart teacher with κ0 < 1, below α^{−order/2}.

    δ = O(α^{−1/2}) and η = ε/δ² = O(1), so that the term Kδ^nη^k of J counts as α^{−n/2}.  With
    Δ_eff,0 = (Δ/2)(1 + y) and w = ∂_δJ/2δ, the curve of docs/theory.md, section 4.2, reads
    δ² = Δ_eff,0/(αc_T) and η = (λ̃T²/Δ)/((1 + y)(1 − w/αc_T)); substitution gains at least one
    power of α^{−1/2} each time.  For Δ > 0.

    Args:
        order: at most 7, that of :func:`~.wishart.small_noise_moment`.

    Example:
        >>> from lora_theory.symbolic import notation as n
        >>> weight_decay_many_samples(3)[n.V]
        T**2*(-teacher_rank**2 + 2*teacher_rank + 1)/(8*alpha*c_T) + O(alpha**-3/2)
    """
    checked_integer("order", order, 1, 7)
    moments = sp.Poly(small_noise_moment(), n.delta, n.eta).terms()
    names = ["K_{}_{}".format(*powers) for powers, _ in moments]
    # polynomials in x = α^{−1/2}, √(Δ/2c_T), λ̃T²/Δ, 1/c_T, 2/Δ and the K
    field, x, root, cut, share, inverse, *factors = sp.ring(
        ["x", "root", "cut", "share", "inverse", *names], sp.QQ
    )

    def power(part: PolyElement, exponent: sp.Rational) -> PolyElement:
        """(1 + part)^exponent; ``part`` begins with x²."""
        total = term = field.one
        for k in range(1, (order + 1) // 2):
            term = rs_mul(term, part, x, order)
            total += sp.QQ.from_sympy(sp.binomial(exponent, k)) * term
        return total

    def summed(weight: Callable[[int, int], sp.Rational], shift: int = 0) -> PolyElement:
        """Σ weight(n, k) K δ^{n − shift}η^k over n > 0, at the present y and w."""
        total = field.zero
        for ((degree, k), _), K in zip(moments, factors, strict=True):
            left = degree - shift
            if degree and left < order:
                term = sp.QQ.from_sympy(weight(degree, k)) * K * (x * root) ** left * cut**k
                term = rs_mul(term, power(y, sp.Rational(left, 2) - k), x, order)
                total += rs_mul(term, power(-(x**2) * share * w, sp.Integer(-k)), x, order)
        return total

    y = w = field.zero
    # δ∂_δ and ε∂_ε of Kδ^nη^k = Kδ^{n−2k}ε^k are n − 2k and k times itself
    for _ in range(order):
        w, y = (
            summed(lambda degree, k: sp.Rational(degree - 2 * k, 2), shift=2),
            inverse * summed(lambda degree, k: sp.Integer(degree - k - 1)),
        )
    M = summed(lambda degree, k: 1 - sp.Rational(degree - k, 2))
    V = rs_mul(x**2 * share * w, power(-(x**2) * share * w, sp.S.NegativeOne), x, order)
    values = dict(zip(names, (factor for _, factor in moments), strict=True))
    values |= {
        "x": _small,
        "root": sp.sqrt(_half_noise / n.visible),
        "cut": n.scaled_penalty * n.tokens**2 / n.label_noise,
        "share": 1 / n.visible,
        "inverse": 1 / _half_noise,
    }

    def series(entry: sp.Expr) -> PowerSeries:
        return PowerSeries.of(entry.subs(values), _small, order, exponent=-sp.Rational(1, 2))

    norm = 1 + n.teacher_rank
    return {
        n.V: series(n.tokens**2 / 4 * V.as_expr()),
        n.M: series(norm + M.as_expr()),
        n.delta_eff: series(_half_noise * (1 + y.as_expr())),
        n.Q: series(norm + _half_noise * y.as_expr() + 2 * M.as_expr()),
    }


def interpolating_few_samples() -> dict[sp.Symbol, PowerSeries]:
    """Q and M of weight decay at λ → 0⁺ and α → 0, two orders each, for any σ; Wishart teacher.

    Only eigenvalues close to the edge of a wide semicircle are kept: with ε − √κ0 = δ(2 − h),
    j(h) = ∫₀^h(h − u)²ρ and a(h) = j + (2 − h)j'/2, the conditions of
    :func:`~.thresholds.interpolating_limit` are a = αc_T and Q = δ²j = Q_y r/(1 − r), r = j/a, but
    for M = O(√α).  M = −√κ0 ∂_εJ/2 = √(κ0Q_y a(1 − r))/(2 − h) comes from the mean of S0.

    Example:
        >>> from lora_theory.symbolic import notation as n
        >>> interpolating_few_samples()[n.M]
        sqrt(Q_y)*sqrt(alpha)*sqrt(c_T)*sqrt(teacher_rank)/2 + ...
    """
    h, H, half, fifth = sp.Symbol("h"), sp.Symbol("H"), sp.Rational(1, 2), sp.Rational(2, 5)

    def tail(power: int) -> sp.Expr:
        """∫₀^h(h − u)^power ρ(2 − u)du/h^{power+3/2}, ρ = √(u(1 − u/4))/π to two orders."""
        betas = [sp.beta(power + 1, k + sp.Rational(3, 2)).rewrite(sp.gamma) for k in range(2)]
        return (betas[0] - betas[1] * h / 8) / sp.pi

    a = sp.expand(h * tail(2) + (2 - h) * tail(1))  # a/h^{5/2}, j' = 2∫(h − u)ρ
    first = a.subs(h, 0)
    # H = O(α^{2/5}) is h to leading order, αc_T = a(0)H^{5/2}
    ratio = H - h * raised(a / first - 1, fifth, h, 3)
    width = implicit(ratio, h, H, 3, start=sp.S.Zero)
    r = h * tail(2) / first * raised(a / first - 1, sp.S.NegativeOne, h, 3)
    r = truncated(r.subs(h, width), H, 3)
    Q = truncated(n.label_variance * r * raised(-r, sp.S.NegativeOne, H, 3), H, 3)
    M = raised(-r, half, H, 3) * raised(-width / 2, sp.S.NegativeOne, H, 3) / 2
    base = (n.visible / first) ** fifth  # H = base · α^{2/5}
    scale = sp.sqrt(n.teacher_rank * n.label_variance * n.visible)
    return {
        n.Q: PowerSeries(
            (fifth, 2 * fifth),
            tuple(sp.expand(Q).coeff(H, k) * base**k for k in (1, 2)),
            fifth + half,
        ),
        n.M: PowerSeries(
            (half, half + fifth),
            tuple(scale * sp.expand(M).coeff(H, k) * base**k for k in (0, 1)),
            sp.S.One,
        ),
    }
