"""Slopes of the averaged minima 𝓜 and 𝓜' by the envelope theorem: conjugates as averages.

Only the explicit dependence of a minimum on (V, M, Q) counts.  The fields are written in Gaussians
that do not depend on the order parameters, differentiated, and the minimiser is put back as
z + VG; what is left is linear in products of the force G, whose averages have names.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy as sp

from lora_theory.symbolic import notation as n
from lora_theory.symbolic.potentials import Potential, lora_potential, pretraining_potential

__all__ = ["lora_conjugates", "pretraining_conjugates"]

_minimiser, _force, _fixed, _noise = sp.symbols("u G fixed noise", real=True)


def pretraining_conjugates() -> dict[sp.Symbol, sp.Expr]:
    """Q̂, M̂, V̂ by averages over the force G = (Prox − z)/V (docs/theory.md, (2.5)).

    z = (M/Q_y)z^y + S g with S² = Q − M²/Q_y; one component stands for all a ≤ b.

    Example:
        >>> from lora_theory.symbolic import notation as n, pretraining_conjugates
        >>> pretraining_conjugates()[n.Q_hat]
        2*alpha*mean_GG
    """
    spread = sp.sqrt(n.Q - n.M**2 / n.label_variance)
    field = n.M / n.label_variance * _fixed + spread * _noise
    names = {_force**2: n.force_square, _noise: n.force_noise, _fixed: n.force_label}
    slopes = _slopes(field, n.V, (n.V, n.M, n.Q), names)
    return _with_slopes(pretraining_potential(), n.moreau(n.V, n.M, n.Q), slopes)


def lora_conjugates() -> dict[sp.Symbol, sp.Expr]:
    """q̂, m̂, v̂ by averages over the force G = (prox − ω)/v (docs/theory.md, (3.4)).

    ω = (m/q0)χ* + sζ with s² = q − m²/q0; the loss itself contains q, hence E ∂_qℓ in v̂.

    Example:
        >>> from lora_theory.symbolic import lora_conjugates, notation as n
        >>> lora_conjugates()[n.q_hat]
        alpha_prime*mean_gg
    """
    spread = sp.sqrt(n.q - n.m**2 / n.signal)
    field = n.m / n.signal * _fixed + spread * _noise
    names = {
        _force**2: n.lora_force_square,
        _noise: n.lora_force_noise,
        _fixed: n.lora_force_signal,
    }
    slopes = _slopes(field, n.v, (n.v, n.m, n.q), names)
    slopes[n.q] += n.norm_slope
    return _with_slopes(lora_potential(), n.lora_moreau(n.v, n.m, n.q), slopes)


def _slopes(
    field: sp.Expr,
    response: sp.Symbol,
    order: tuple[sp.Symbol, ...],
    names: Mapping[sp.Expr, sp.Symbol],
) -> dict[sp.Symbol, sp.Expr]:
    """Averages of the derivatives of (u − field)²/(2 response) at u = field + response · G."""
    pull = (_minimiser - field) ** 2 / (2 * response)
    slopes = {}
    for symbol in order:
        slope = pull.diff(symbol).subs(_minimiser, field + response * _force)
        terms = sp.Poly(sp.expand(slope), _force, _fixed, _noise).terms()
        slopes[symbol] = sum(factor * _average(powers, names) for powers, factor in terms)
    return slopes


def _average(powers: tuple[int, ...], names: Mapping[sp.Expr, sp.Symbol]) -> sp.Symbol:
    force, fixed, noise = powers
    return names[_force**2 if force == 2 else _fixed**fixed * _noise**noise]


def _with_slopes(
    potential: Potential, average: sp.Expr, slopes: Mapping[sp.Symbol, sp.Expr]
) -> dict[sp.Symbol, sp.Expr]:
    values = {sp.Derivative(average, symbol): slope for symbol, slope in slopes.items()}
    found = potential.conjugate_equations()
    return {symbol: sp.expand(entry.subs(values)) for symbol, entry in found.items()}
