"""The replica-symmetric potentials of both stages and their saddle points by differentiation.

Each is a coupling of the order parameters with their conjugates, plus the minimum of the loss of
one sequence (output side), minus the minimum over the weights (docs/theory.md, sections 2.3 and 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy as sp

from lora_theory.symbolic import notation as n
from lora_theory.symbolic.forms import factored

__all__ = [
    "Potential",
    "frobenius_weights",
    "lora_potential",
    "pretraining_potential",
    "weight_decay_weights",
]


@dataclass(frozen=True)
class Potential:
    """Coupling + output − weights; the coupling is bilinear in order parameters and conjugates.

    Example:
        >>> from lora_theory.symbolic import lora_potential, notation as n
        >>> lora_potential().order_equations()[n.m]
        m_hat*q_0/(2*lora_penalty + v_hat)
    """

    order: tuple[sp.Symbol, ...]
    conjugates: tuple[sp.Symbol, ...]
    coupling: sp.Expr
    output: sp.Expr  # depends on the order parameters only
    weights: sp.Expr  # depends on the conjugates only

    @property
    def expression(self) -> sp.Expr:
        """The potential itself."""
        return self.coupling + self.output - self.weights

    def conjugate_equations(self) -> dict[sp.Symbol, sp.Expr]:
        """The conjugates at stationary order parameters: ∂Φ/∂Q = ∂Φ/∂M = ∂Φ/∂V = 0."""
        return self._stationary(self.order, self.conjugates)

    def order_equations(self) -> dict[sp.Symbol, sp.Expr]:
        """The order parameters at stationary conjugates: ∂Φ/∂Q̂ = ∂Φ/∂M̂ = ∂Φ/∂V̂ = 0."""
        return self._stationary(self.conjugates, self.order)

    def _stationary(
        self, by: tuple[sp.Symbol, ...], solved: tuple[sp.Symbol, ...]
    ) -> dict[sp.Symbol, sp.Expr]:
        # the coupling pairs each symbol with one conjugate: one linear equation each
        rest = self.output - self.weights
        found = {}
        for slope in by:
            for symbol in solved:
                factor = self.coupling.diff(slope, symbol)
                if factor != 0:
                    found[symbol] = _tidy(-rest.diff(slope) / factor)
        return {symbol: found[symbol] for symbol in solved}


def _tidy(entry: sp.Expr) -> sp.Expr:
    """A sum of moments stays a sum; anything else is factored."""
    return sp.expand(entry) if entry.has(n.J, n.J_delta, n.J_epsilon) else factored(entry)


def weight_decay_weights() -> sp.Expr:
    """Ψ = (M̂²/4V̂) J(√Q̂/M̂, 2λ̃/M̂), λ̃ = √κ λ: decay of the factor (docs/theory.md, section 2.3)."""
    moment = n.J(sp.sqrt(n.Q_hat) / n.M_hat, 2 * n.scaled_penalty / n.M_hat)
    return n.M_hat**2 / (4 * n.V_hat) * moment


def frobenius_weights() -> sp.Expr:
    """Ψ = (M̂²Q0 + Q̂)/(4(V̂ + 2λ)): S unfactorised under (λD/2)‖S‖²_F.

    The minimum of V̂s²/4 − ys/2 + λs²/2 is −y²/(4(V̂ + 2λ)) and ∫y² = M̂²Q0 + Q̂.
    """
    return (n.M_hat**2 * n.teacher_norm + n.Q_hat) / (n.V_hat + 2 * n.penalty) / 4


def pretraining_potential(
    *, weights: sp.Expr | None = None, average: sp.Expr | None = None
) -> Potential:
    """Φ = (Q̂V + 2M̂M − V̂Q)/4 + α𝓜(V, M, Q) − Ψ (docs/theory.md, section 2.3).

    Args:
        weights: Ψ; by default :func:`weight_decay_weights`.
        average: 𝓜 as an expression in V, M, Q; by default left open.
    """
    average = n.moreau(n.V, n.M, n.Q) if average is None else average
    return Potential(
        order=(n.Q, n.M, n.V),
        conjugates=(n.Q_hat, n.M_hat, n.V_hat),
        coupling=(n.Q_hat * n.V + 2 * n.M_hat * n.M - n.V_hat * n.Q) / 4,
        output=n.alpha * average,
        weights=weight_decay_weights() if weights is None else weights,
    )


def lora_potential() -> Potential:
    """φ = α'𝓜'(v, m, q) + (q̂v + 2m̂m − v̂q)/2 − (q0m̂² + q̂)/(2(2λ' + v̂)) (docs/theory.md, (3.3))."""
    return Potential(
        order=(n.q, n.m, n.v),
        conjugates=(n.q_hat, n.m_hat, n.v_hat),
        coupling=(n.q_hat * n.v + 2 * n.m_hat * n.m - n.v_hat * n.q) / 2,
        output=n.alpha_prime * n.lora_moreau(n.v, n.m, n.q),
        weights=(n.signal * n.m_hat**2 + n.q_hat) / (2 * n.lora_penalty + n.v_hat) / 2,
    )
