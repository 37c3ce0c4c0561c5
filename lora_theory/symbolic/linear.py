"""Linear attention, σ(A) = A/T: its closed forms from the loss (docs/theory.md, section 4).

The residuals of a sequence are the k = T(T+1)/2 iid numbers z^y − z of variance Δ_eff, and
ℓ = (2/T²) Σ_{a≤b} (z^y − u)².
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import sympy as sp

from lora_theory.symbolic import notation as n
from lora_theory.symbolic.forms import factored
from lora_theory.symbolic.moments import gaussian_mean
from lora_theory.symbolic.potentials import Potential, pretraining_potential

__all__ = [
    "ParametricCurve",
    "best_rescaling",
    "effective_noise",
    "in_effective_noise",
    "in_ratios",
    "linear_potential",
    "lora_error",
    "mismatch_slope",
    "moreau_average",
    "parametric_curve",
    "pretraining_error",
    "proximal",
    "rescaled_noise",
    "stiff",
    "training_error",
    "training_noise",
]

_u, _z, _label = sp.Symbol("u", real=True), n.field, n.label_field
_fields = n.tokens * (n.tokens + 1) / 2
_loss = 2 / n.tokens**2 * (_label - _u) ** 2
_pull = (_u - _z) ** 2 / (2 * n.V)
_law = {(_label, _label): n.label_variance, (_z, _z): n.Q, (_z, _label): n.M}


def effective_noise() -> sp.Expr:
    """Δ_eff,0 = E(z^y − z)² = Q_y − 2M + Q (docs/theory.md, (4.1))."""
    return gaussian_mean((_label - _z) ** 2, _law)


def in_effective_noise(expression: sp.Expr) -> sp.Expr:
    """The same expression, factored, with Δ_eff,0 in place of Q_y − 2M + Q."""
    return factored(expression.subs(n.label_variance, n.delta_eff - n.Q + 2 * n.M))


def stiff() -> sp.Expr:
    """V + T²/4, the response of a field and its loss in series."""
    return n.V + n.tokens**2 / 4


def proximal() -> sp.Expr:
    """Prox_V(z; y), the one stationary point of (u − z)²/2V + ℓ(u), in z and z^y."""
    (found,) = sp.solve((_pull + _loss).diff(_u), _u)
    return found


def moreau_average() -> sp.Expr:
    """𝓜 = T(T+1)Δ_eff,0/(4(V + T²/4)), by Gaussian moments of the minimum."""
    least = _fields * (_pull + _loss).subs(_u, proximal())
    return in_effective_noise(gaussian_mean(least, _law)).subs(n.delta_eff, effective_noise())


def linear_potential(*, weights: sp.Expr | None = None) -> Potential:
    """Φ of linear attention; its conjugates are docs/theory.md, (4.3)."""
    return pretraining_potential(weights=weights, average=moreau_average())


def training_noise() -> sp.Expr:
    """Δ_eff,1 = Δ_eff,0/(1 + 4V/T²)², variance of z^y − Prox (docs/theory.md, (4.3))."""
    return in_effective_noise(gaussian_mean((_label - proximal()) ** 2, _law))


def pretraining_error() -> sp.Expr:
    """E = ((T+1)/T) Δ_eff,0 (docs/theory.md, (4.2))."""
    return in_effective_noise(gaussian_mean(_fields * _loss.subs(_u, _z), _law))


def training_error() -> sp.Expr:
    """E ℓ(Prox) = ((T+1)/T) Δ_eff,1, the mean loss of a training sequence."""
    return in_effective_noise(gaussian_mean(_fields * _loss.subs(_u, proximal()), _law))


def lora_error() -> sp.Expr:
    """E' = ((T+1)/T)(Δ_eff,0 + q0² + q² − 2m²), by Gaussian moments (docs/theory.md, (4.4)).

    T diagonal and T(T−1) other entries of h^y − h + χ*χ*ᵀ − q0I − χχᵀ + qI; the residual field of
    an entry has variance (1 + δ_ab)Δ_eff,0.
    """
    star, chi, field = sp.symbols("star:2"), sp.symbols("chi:2"), sp.Symbol("field")
    law: dict[tuple[sp.Symbol, sp.Symbol], sp.Expr] = {}
    for a in range(2):
        law |= {(star[a], star[a]): n.signal, (chi[a], chi[a]): n.q, (star[a], chi[a]): n.m}
    diagonal = field + star[0] ** 2 - n.signal - chi[0] ** 2 + n.q
    other = field + star[0] * star[1] - chi[0] * chi[1]
    mean = n.tokens * gaussian_mean(diagonal**2, law | {(field, field): 2 * n.delta_eff})
    mean += n.tokens * (n.tokens - 1) * gaussian_mean(other**2, law | {(field, field): n.delta_eff})
    return factored(mean / n.tokens**2)


def rescaled_noise() -> sp.Expr:
    """Δ_eff,0 of frozen weights W → √β W: Q_y − 2βM + β²Q (docs/theory.md, section 4.1)."""
    return gaussian_mean((_label - n.rescaling * _z) ** 2, _law)


def best_rescaling() -> tuple[sp.Expr, sp.Expr]:
    """The β of least Δ_eff,0, M/Q, and its value Q_y − M²/Q."""
    noise = rescaled_noise()
    (best,) = sp.solve(noise.diff(n.rescaling), n.rescaling)
    return best, sp.expand(noise.subs(n.rescaling, best))


class ParametricCurve(NamedTuple):
    """A solution for every (δ, ε), one entry after the other (docs/theory.md, section 4.2)."""

    Q: sp.Expr
    M: sp.Expr
    alpha: sp.Expr  # in Q and M
    M_hat: sp.Expr  # = V̂, in α
    V: sp.Expr  # in M̂
    scaled_penalty: sp.Expr  # in M̂

    def explicit(self) -> ParametricCurve:
        """Every entry in δ, ε and the constants of the problem alone."""
        values: dict[sp.Symbol, sp.Expr] = {}
        for name, entry in self._asdict().items():
            values[getattr(n, name)] = entry.subs(values)
        return ParametricCurve(*values.values())


def parametric_curve() -> ParametricCurve:
    """Weight decay: α = Δ_eff,0/(T(T+1)δ²) and everything else for given (δ, ε).

    M̂ = V̂, Q̂ = (δM̂)² and λ̃ = εM̂/2 are put into the equations of the order parameters; the two
    equations of the output side that are left give α and M̂.

    Example:
        >>> from lora_theory.symbolic.linear import parametric_curve
        >>> parametric_curve().alpha
        (-2*M + Q + Q_y)/(T*delta**2*(T + 1))
    """
    potential = linear_potential()
    hats, order = potential.conjugate_equations(), in_ratios(potential.order_equations())
    (alpha,) = sp.solve(sp.simplify(hats[n.Q_hat] / hats[n.M_hat] ** 2) - n.delta**2, n.alpha)
    # M̂ = αT(T+1)/(V + T²/4) with VM̂ = ∂_δJ/2δ given is linear in M̂
    balance = sp.numer(sp.together(n.M_hat - hats[n.M_hat].subs(n.V, order[n.V])))
    (M_hat,) = sp.solve(balance, n.M_hat)
    return ParametricCurve(
        order[n.Q],
        order[n.M],
        factored(alpha),
        sp.expand(M_hat),
        order[n.V],
        n.epsilon * n.M_hat / 2,
    )


def in_ratios(order: Mapping[sp.Symbol, sp.Expr]) -> dict[sp.Symbol, sp.Expr]:
    """The order parameters of weight decay where M̂ = V̂, in δ = √Q̂/M̂, ε = 2λ̃/M̂ and M̂."""
    ratios = {n.Q_hat: (n.delta * n.M_hat) ** 2, n.scaled_penalty: n.epsilon * n.M_hat / 2}
    return {
        symbol: sp.expand(sp.simplify(entry.subs(n.V_hat, n.M_hat).subs(ratios)))
        for symbol, entry in order.items()
    }


def mismatch_slope() -> sp.Expr:
    """dΔ_eff,1/dλ where dΔ_eff,0/dλ = 0, in dV/dλ (docs/theory.md, section 4.3)."""
    V, noise = sp.Function("V")(n.penalty), sp.Function("Delta")(n.penalty)
    slope = training_noise().subs({n.V: V, n.delta_eff: noise}).diff(n.penalty)
    fixed = slope.subs({noise.diff(n.penalty): 0, V.diff(n.penalty): n.response_slope})
    return factored(fixed.subs({V: n.V, noise: n.delta_eff}))
