"""Linear attention, S unfactorised under (λD/2)‖S‖²_F: solved in closed form.

Any teacher of Tr S0²/D = Q0.  The solution is one quadratic for V; everything else is rational in
V.  c_T = T(T+1) throughout.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import sympy as sp

from lora_theory.symbolic import notation as n
from lora_theory.symbolic.forms import factored
from lora_theory.symbolic.linear import effective_noise, linear_potential
from lora_theory.symbolic.potentials import frobenius_weights

__all__ = [
    "RidgeSolution",
    "best_penalty",
    "replicon",
    "ridge_solution",
    "ridgeless_noise",
    "saddle_point",
]

_label_variance = n.teacher_norm + n.label_noise / 2


class RidgeSolution(NamedTuple):
    """The solution: V in α and λ, the other entries in V as well."""

    V: sp.Expr
    M: sp.Expr
    delta_eff: sp.Expr
    Q: sp.Expr  # in M and Δ_eff,0

    def explicit(self) -> RidgeSolution:
        """Every entry in α, λ, Q0, Δ, T and c_T alone."""
        values: dict[sp.Symbol, sp.Expr] = {}
        for name, entry in self._asdict().items():
            values[getattr(n, name)] = entry.subs(values)
        return RidgeSolution(*values.values())


def saddle_point() -> dict[sp.Symbol, sp.Expr]:
    """All six equations, from the potential, with Q_y = Q0 + Δ/2 and T(T+1) written as c_T."""
    potential = linear_potential(weights=frobenius_weights())
    found = {**potential.conjugate_equations(), **potential.order_equations()}
    counted = {n.tokens * (n.tokens + 1): n.visible, n.label_variance: _label_variance}
    return {symbol: factored(sp.factor(entry).subs(counted)) for symbol, entry in found.items()}


@functools.cache
def ridge_solution() -> RidgeSolution:
    """Q, M, V and Δ_eff,0 of the ridge problem.

    V = 1/(V̂ + 2λ) with V̂ = αc_T/(V + T²/4) is quadratic, with one positive root; then
    M = Q0(1 − 2λV) and Δ_eff,0 = (Δ/2 + Q0(2λV)²)/(1 − (1 − 2λV)²/(αc_T)).

    Example:
        >>> from lora_theory.symbolic.ridge import ridge_solution
        >>> ridge_solution().M
        -2*Q_0*V*penalty + Q_0
    """
    equations = saddle_point()
    V_hat = equations[n.V_hat]
    quadratic = sp.numer(sp.together(n.V - equations[n.V].subs(n.V_hat, V_hat)))
    # the product of the roots is −T²/8λ: one is positive, whatever the parameters
    sample = {n.alpha: 1, n.penalty: 1, n.visible: 6, n.tokens: 2}
    (root,) = (root for root in sp.solve(quadratic, n.V) if root.subs(sample) > 0)
    # at the solution V̂ = 1/V − 2λ, and V + T²/4 = αc_T/V̂ leaves through Q̂/V̂²
    stiffness = 1 / n.V - 2 * n.penalty
    hats = {n.M_hat: stiffness, n.V_hat: stiffness}
    hats[n.Q_hat] = sp.factor(equations[n.Q_hat] / V_hat**2) * stiffness**2
    M = sp.expand(equations[n.M].subs(hats))
    noise = effective_noise().subs(n.label_variance, _label_variance)
    # Q is linear in itself through Q̂
    (Q,) = sp.solve(n.Q - equations[n.Q].subs(hats).subs(n.M, M), n.Q)
    delta_eff = factored(noise.subs(n.M, M).subs(n.Q, Q))
    return RidgeSolution(root, M, delta_eff, sp.expand(n.delta_eff - noise + n.Q))


def ridgeless_noise() -> tuple[sp.Expr, sp.Expr]:
    """Δ_eff,0 for λ → 0⁺ below and above interpolation, αc_T < 1 and αc_T > 1.

    2λV tends to 1 − αc_T below and to 0 above.
    """
    solution, product = ridge_solution(), sp.Symbol("product")
    above, below = sp.fraction(solution.delta_eff.subs(n.V, product / (2 * n.penalty)))
    limits = (1 - n.alpha * n.visible, sp.S.Zero)
    first, second = (above.subs(product, at) / sp.factor(below.subs(product, at)) for at in limits)
    return first, second


def best_penalty() -> sp.Expr:
    """λ* = Δ/(T²Q0), which minimises Δ_eff,0 at every α.

    V falls with λ, so that g = 1 − 2λV may serve as the variable: Δ_eff,0 is rational in g, and so
    is λ = (αc_T − g)(1 − g)·2/(T²g).
    """
    gain = sp.Symbol("gain", positive=True)
    V = (1 - gain) / (2 * n.penalty)
    noise = ridge_solution().delta_eff.subs(n.V, V)
    (label_noise,) = sp.solve(noise.diff(gain), n.label_noise)
    balance = saddle_point()[n.V_hat].subs(n.V, V) - gain / V
    (penalty,) = sp.solve(sp.numer(sp.together(balance)), n.penalty)
    return sp.simplify(penalty / label_noise) * n.label_noise


def replicon() -> sp.Expr:
    """(2α/V̂²) E‖∂_zG‖² ∬((f(x) − f(y))/(x − y))² for f(y) = yV̂/(V̂ + 2λ); stable below 1.

    G = (z^y − z)/(V + T²/4) has c_T/2 components.  With V = 1/(V̂ + 2λ) it is (1 − 2λV)²/(αc_T),
    always below 1.
    """
    stiffness = 1 / n.V - 2 * n.penalty
    force = -stiffness / (n.alpha * n.visible)  # −1/(V + T²/4)
    slope = stiffness * n.V  # f' = V̂/(V̂ + 2λ)
    fields = n.visible / 2
    return sp.factor(2 * n.alpha / stiffness**2 * fields * force**2 * slope**2)
