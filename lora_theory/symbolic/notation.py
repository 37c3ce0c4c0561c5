"""Symbols and functions of the equations, each with its LaTeX (docs/theory.md, Notation)."""

from __future__ import annotations

from typing import Any

import sympy as sp

__all__ = [
    "LATEX",
    "J",
    "J_delta",
    "J_epsilon",
    "Moment",
    "lora_moreau",
    "moreau",
]


def _positive(names: str) -> Any:
    return sp.symbols(names, positive=True)


# the problem; visible is c_T, twice the number of field directions that σ sees
tokens, visible, teacher_rank, label_noise = _positive("T c_T teacher_rank label_noise")
teacher_norm, label_variance, signal = _positive("Q_0 Q_y q_0")
alpha, penalty, scaled_penalty, rank = _positive("alpha penalty scaled_penalty rank")
alpha_prime, lora_penalty = _positive("alpha_prime lora_penalty")

# order parameters and conjugates of both stages
Q, V, Q_hat, M_hat, V_hat = _positive("Q V Q_hat M_hat V_hat")
q, v, q_hat, v_hat = _positive("q v q_hat v_hat")
M, m, m_hat = sp.symbols("M m m_hat", real=True)

# the spectrum: ratios, the point and the value of the Stieltjes transform
delta, epsilon, eta = _positive("delta epsilon eta")
point = sp.Symbol("x", real=True)
transform, edge = sp.Symbol("g"), _positive("x_plus")

# the fields of a sequence, their effective noise, rescaling of the frozen weights
field, label_field = sp.symbols("z z_y", real=True)
delta_eff = _positive("Delta_eff")
response_slope = sp.Symbol("dV_dpenalty", real=True)
rescaling = sp.Symbol("beta", real=True)

# averages over the force G of one sequence; named so that they are printed last in products
force_square, lora_force_square = _positive("mean_GG mean_gg")
force_noise, force_label = sp.symbols("mean_Gg mean_Gzy", real=True)
lora_force_noise, lora_force_signal = sp.symbols("mean_gzeta mean_gchi", real=True)
norm_slope = sp.Symbol("mean_slope", real=True)

#: Least loss of one sequence with its pull, averaged: without a formula but for linear attention.
moreau, lora_moreau = sp.Function(r"\mathcal{M}"), sp.Function(r"\mathcal{M}'")

LATEX: dict[sp.Symbol, str] = {
    tokens: "T",
    visible: "c_T",
    teacher_rank: r"\kappa_0",
    label_noise: r"\Delta",
    teacher_norm: "Q_0",
    label_variance: "Q_y",
    signal: "q_0",
    alpha: r"\alpha",
    penalty: r"\lambda",
    scaled_penalty: r"\tilde{\lambda}",
    rank: r"\kappa",
    alpha_prime: r"\alpha'",
    lora_penalty: r"\lambda'",
    Q_hat: r"\hat{Q}",
    M_hat: r"\hat{M}",
    V_hat: r"\hat{V}",
    q_hat: r"\hat{q}",
    m_hat: r"\hat{m}",
    v_hat: r"\hat{v}",
    delta: r"\delta",
    epsilon: r"\varepsilon",
    eta: r"\eta",
    point: "x",
    transform: "g",
    edge: "x_+",
    delta_eff: r"\Delta_{\mathrm{eff},0}",
    label_field: "z^{y}",
    response_slope: r"\frac{\mathrm{d}V}{\mathrm{d}\lambda}",
    rescaling: r"\beta",
    force_square: r"\mathbb{E}\|G\|^2",
    lora_force_square: r"\mathbb{E}\|G\|^2",
    force_noise: r"\mathbb{E}\,G\cdot g",
    force_label: r"\mathbb{E}\,G\cdot z^{y}",
    lora_force_noise: r"\mathbb{E}\,G\cdot\zeta",
    lora_force_signal: r"\mathbb{E}\,G\cdot\chi^{\star}",
    norm_slope: r"\mathbb{E}\,\partial_q\ell",
}


class Moment(sp.Function):  # type: ignore[misc]  # SymPy has no types
    """A function of (δ, ε); its arguments are not printed where they are δ and ε themselves."""

    nargs = 2
    sign = ""

    def _latex(self, printer: Any, exp: Any = None) -> str:
        name = self.sign if exp is None else rf"\left({self.sign}\right)^{{{exp}}}"
        if self.args == (delta, epsilon):
            return name
        arguments = ",".join(printer._print(argument) for argument in self.args)
        return rf"{name}\left({arguments}\right)"


class J_delta(Moment):
    """∂_δJ."""

    sign = r"\partial_\delta J"


class J_epsilon(Moment):
    """∂_εJ."""

    sign = r"\partial_\varepsilon J"


class J(Moment):
    """J(δ, ε) = ∫_ε^∞ (x − ε)² μ_δ(dx), for any law of the teacher (docs/theory.md, section 2.3).

    Example:
        >>> from lora_theory.symbolic.notation import J, delta, epsilon
        >>> J(delta, epsilon**2).diff(epsilon)
        2*epsilon*J_epsilon(delta, epsilon**2)
    """

    sign = "J"

    def fdiff(self, argindex: int = 1) -> Any:
        """The derivatives by name, so that they can be printed and compiled."""
        return (J_delta, J_epsilon)[argindex - 1](*self.args)
