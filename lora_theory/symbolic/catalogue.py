"""Every equation of the symbolic route under a name, in the order of docs/theory.md."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import sympy as sp

from lora_theory.symbolic import expansions, linear, ridge, thresholds, wishart
from lora_theory.symbolic import notation as n
from lora_theory.symbolic.averages import lora_conjugates, pretraining_conjugates
from lora_theory.symbolic.potentials import (
    Potential,
    frobenius_weights,
    lora_potential,
    pretraining_potential,
    weight_decay_weights,
)
from lora_theory.symbolic.series import PowerSeries

__all__ = ["Equation", "equations"]

_NAMES = {
    n.Q: "norm", n.M: "overlap", n.V: "response",
    n.Q_hat: "noise", n.M_hat: "signal", n.V_hat: "stiffness",
    n.q: "norm", n.m: "overlap", n.v: "response",
    n.q_hat: "noise", n.m_hat: "signal", n.v_hat: "stiffness",
    n.delta_eff: "effective_noise", n.alpha: "samples", n.scaled_penalty: "penalty",
}  # fmt: skip


class Equation(NamedTuple):
    """left = right."""

    left: sp.Symbol
    right: sp.Expr | PowerSeries
    source: str  # section or number in docs/theory.md


_Named = Iterator[tuple[str, Equation]]


@functools.cache
def equations() -> Mapping[str, Equation]:
    """All equations by name.

    Example:
        >>> from lora_theory.symbolic import equations
        >>> equations()["linear_pretraining_error"].right
        Delta_eff*(T + 1)/T
    """
    found: dict[str, Equation] = {}
    for part in (_pretraining, _lora, _spectrum, _linear, _curve, _ridge, _thresholds, _expansions):
        for name, equation in part():
            assert name not in found, name
            found[name] = equation
    return found


def _left(latex: str) -> sp.Symbol:
    return sp.Symbol(latex)


def _each(prefix: str, entries: Mapping[sp.Symbol, sp.Expr | PowerSeries], source: str) -> _Named:
    for symbol, entry in entries.items():
        yield f"{prefix}_{_NAMES[symbol]}", Equation(symbol, entry, source)


def _in_ratios(potential: Potential) -> dict[sp.Symbol, sp.Expr]:
    """The order parameters with J(δ, ε) in place of J(√Q̂/M̂, 2λ̃/M̂)."""
    short = {
        moment(sp.sqrt(n.Q_hat) / n.M_hat, 2 * n.scaled_penalty / n.M_hat): moment(
            n.delta, n.epsilon
        )
        for moment in (n.J, n.J_delta, n.J_epsilon)
    }
    return {symbol: entry.subs(short) for symbol, entry in potential.order_equations().items()}


def _pretraining() -> _Named:
    potential, section = pretraining_potential(), "section 2.3"
    yield "scaled_penalty", Equation(n.scaled_penalty, sp.sqrt(n.rank) * n.penalty, "(2.1)")
    yield "pretraining_potential", Equation(_left(r"\Phi"), potential.expression, section)
    yield "weight_decay_term", Equation(_left(r"\Psi"), weight_decay_weights(), section)
    yield "frobenius_term", Equation(_left(r"\Psi"), frobenius_weights(), section)
    yield from _each("pretraining", potential.conjugate_equations(), section)
    yield from _each("pretraining_average", pretraining_conjugates(), "(2.5)")
    yield "noise_ratio", Equation(n.delta, sp.sqrt(n.Q_hat) / n.M_hat, "(2.7)")
    yield "penalty_ratio", Equation(n.epsilon, 2 * n.scaled_penalty / n.M_hat, "(2.7)")
    yield from _each("weight_decay", _in_ratios(potential), "(2.8)")
    frobenius = pretraining_potential(weights=frobenius_weights())
    yield from _each("frobenius", frobenius.order_equations(), section)


def _lora() -> _Named:
    potential = lora_potential()
    yield "lora_potential", Equation(_left(r"\varphi"), potential.expression, "(3.3)")
    yield from _each("lora", potential.conjugate_equations(), "section 3.1")
    yield from _each("lora_average", lora_conjugates(), "(3.4)")
    yield from _each("lora", potential.order_equations(), "(3.2)")


def _spectrum() -> _Named:
    section = "section 2.4"
    powers = (3, 2, 1, 0)
    G = sp.Symbol("G")
    cubic = sp.Add(*(a * G**k for a, k in zip(wishart.stieltjes_cubic(), powers, strict=True)))
    yield "inverse_transform", Equation(_left("x(g)"), wishart.inverse_transform(), section)
    yield "stieltjes_cubic", Equation(_left("0"), cubic, section)
    yield "edge_noise", Equation(_left(r"\delta^2"), wishart.upper_edge()[0], section)
    yield "edge", Equation(n.edge, wishart.inverse_transform(), section)
    yield "full_rank_moment", Equation(_left("J"), wishart.moment_with_full_rank(), section)
    little = wishart.small_noise_moment() + sp.Order(n.delta**7)
    yield "small_noise_moment", Equation(_left("J"), little, section)


def _linear() -> _Named:
    potential = linear.linear_potential()
    hats = {
        symbol: linear.in_effective_noise(entry)
        for symbol, entry in potential.conjugate_equations().items()
    }
    best, least = linear.best_rescaling()
    training = _left(r"\Delta_{\mathrm{eff},1}")
    slope = _left(r"\frac{\mathrm{d}\Delta_{\mathrm{eff},1}}{\mathrm{d}\lambda}")
    error, lora_error = _left("E"), _left("E'")
    average = linear.in_effective_noise(linear.moreau_average())
    yield "effective_noise", Equation(n.delta_eff, linear.effective_noise(), "(4.1)")
    yield (
        "linear_proximal",
        Equation(_left(r"\mathrm{Prox}_V(z;y)"), linear.proximal(), "section 4.2"),
    )
    yield "linear_average", Equation(_left(r"\mathcal{M}"), average, "section 4.2")
    yield from _each("linear", hats, "(4.3)")
    yield "training_noise", Equation(training, linear.training_noise(), "(4.3)")
    yield "linear_pretraining_error", Equation(error, linear.pretraining_error(), "(4.2)")
    yield (
        "linear_training_error",
        Equation(_left(r"\mathbb{E}\,\ell"), linear.training_error(), "section 4.2"),
    )
    yield "linear_lora_error", Equation(lora_error, linear.lora_error(), "(4.4)")
    yield "rescaled_noise", Equation(n.delta_eff, linear.rescaled_noise(), "section 4.1")
    yield "best_rescaling", Equation(n.rescaling, best, "section 4.1")
    yield "best_rescaled_noise", Equation(n.delta_eff, least, "section 4.1")
    yield "mismatch_slope", Equation(slope, linear.mismatch_slope(), "section 4.3")


def _curve() -> _Named:
    curve = linear.parametric_curve()._asdict()
    entries = {getattr(n, name): entry for name, entry in curve.items()}
    yield from _each("curve", entries, "section 4.2")


def _ridge() -> _Named:
    source = "from section 2.3"
    solution = {getattr(n, k): entry for k, entry in ridge.ridge_solution()._asdict().items()}
    below, above = ridge.ridgeless_noise()
    best, stability = _left(r"\lambda^{\star}"), _left(r"\mathrm{replicon}")
    yield from _each("ridge", solution, source)
    yield "ridgeless_noise_below", Equation(n.delta_eff, below, source)
    yield "ridgeless_noise_above", Equation(n.delta_eff, above, source)
    yield "best_ridge_penalty", Equation(best, ridge.best_penalty(), source)
    yield "ridge_replicon", Equation(stability, ridge.replicon(), source)


def _thresholds() -> _Named:
    source = "section 2.5"
    limit, threshold = thresholds.interpolating_limit(), thresholds.interpolation_threshold()
    samples, penalty = thresholds.collapse()
    softmax = thresholds.visible_directions("softmax")
    zero, at = _left("0"), _left(r"\alpha_{\mathrm{interp}}")
    yield "visible_directions_softmax", Equation(n.visible, softmax, source)
    yield "interpolating_response", Equation(zero, limit.response, source)
    yield "interpolating_noise", Equation(zero, limit.noise, source)
    yield "interpolating_norm", Equation(n.Q, limit.Q, source)
    yield "interpolating_overlap", Equation(n.M, limit.M, source)
    yield "interpolation_samples", Equation(at, threshold.alpha, source)
    yield "interpolation_noise", Equation(n.label_variance, threshold.label_variance, source)
    yield "collapse_samples", Equation(n.alpha, samples, source)
    yield "collapse_penalty", Equation(n.scaled_penalty, penalty, source)
    yield (
        "collapse_penalty_at_few_samples",
        Equation(n.scaled_penalty, thresholds.collapse_at_few_samples(), source),
    )


def _expansions() -> _Named:
    source = "from section 4.2"
    yield from _each("full_rank", expansions.full_rank_solution(), source)
    yield from _each("ridge_many", expansions.ridge_many_samples(), source)
    yield from _each("ridge_few", expansions.ridge_few_samples(), source)
    yield from _each("weight_decay_many", expansions.weight_decay_many_samples(), source)
    yield from _each(
        "interpolating_few", expansions.interpolating_few_samples(), "from section 2.5"
    )
