"""The equations as NumPy functions, with J given or in closed form for the Wishart teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import sympy as sp
from numpy.typing import ArrayLike, NDArray
from sympy.core.function import AppliedUndef

from lora_theory.problem import ProblemError
from lora_theory.symbolic import notation as n
from lora_theory.symbolic.wishart import inverse_transform, moment_forms, stieltjes_cubic

__all__ = ["SecondMoment", "compiled", "wishart_moment"]

Numerical = Callable[..., Any]
_Numbers = NDArray[np.float64]


class SecondMoment(NamedTuple):
    """J(δ, ε) and its first derivatives as functions of numbers or arrays."""

    value: Numerical
    by_delta: Numerical
    by_epsilon: Numerical


def compiled(
    expressions: Iterable[sp.Expr],
    arguments: Sequence[sp.Symbol],
    *,
    moment: SecondMoment | None = None,
) -> Callable[..., tuple[Any, ...]]:
    """The expressions as one function of the arguments, by position, on numbers or arrays.

    Args:
        moment: what stands for J, ∂_δJ and ∂_εJ, where they occur.

    Raises:
        ProblemError: a symbol or function of the expressions has no value.

    Example:
        >>> from lora_theory.symbolic import notation as n, pretraining_potential
        >>> weights = pretraining_potential().order_equations()
        >>> at = compiled([weights[n.Q]], [n.Q_hat, n.M_hat, n.V_hat, n.scaled_penalty],
        ...               moment=wishart_moment(0.5))
        >>> [round(float(value), 6) for value in at(0.3, 2.0, 2.1, 0.1)]
        [1.285032]
    """
    whole = sp.Tuple(*expressions)
    names = (n.J.__name__, n.J_delta.__name__, n.J_epsilon.__name__)
    functions = {} if moment is None else dict(zip(names, moment, strict=True))
    missing = {str(symbol) for symbol in whole.free_symbols - set(arguments)}
    called = {str(entry.func) for entry in whole.atoms(AppliedUndef, n.Moment)}
    missing |= called - set(functions)
    if missing:
        raise ProblemError(f"{', '.join(sorted(missing))} must be an argument or be given")
    function: Numerical = sp.lambdify(list(arguments), list(whole), [functions, "numpy"], cse=True)
    return lambda *values: tuple(function(*values))


def wishart_moment(teacher_rank: float) -> SecondMoment:
    """J of μ_δ = law(S0) ⊞ semicircle(δ²) from its closed form (docs/theory.md, section 2.4).

    G(ε + i0) is the root of the cubic with the least imaginary part, or where all are real the one
    on which x(g) decreases.

    Args:
        teacher_rank: κ0 > 0.

    Raises:
        ProblemError: κ0 is not > 0, or the functions are asked for a δ that is not.

    Example:
        >>> moment = wishart_moment(0.5)
        >>> float(moment.value(0.5, -50.0).round(6))  # all of μ: moments only
        2572.460678
    """
    if not 0 < teacher_rank < math.inf:
        raise ProblemError(
            f"teacher_rank = {teacher_rank!r} is not allowed: it must be > 0 and finite"
        )
    known = {n.teacher_rank: sp.Float(teacher_rank, 17)}
    cubic = sp.lambdify([n.delta, n.point], [entry.subs(known) for entry in stieltjes_cubic()])
    slope = sp.lambdify([n.delta, n.transform], inverse_transform().diff(n.transform).subs(known))

    def transform(delta: _Numbers, epsilon: _Numbers) -> NDArray[np.complex128]:
        a3, a2, a1, a0 = (entry + 0 * delta for entry in cubic(delta, epsilon))
        roots = _roots(a3, a2, a1, a0)
        pair = roots.imag.min(axis=0) < -1e-12 * np.abs(roots).max(axis=0)
        order = np.where(pair, roots.imag, slope(delta, roots.real))
        found = np.take_along_axis(roots, order.argmin(axis=0)[None], axis=0)[0]
        # outside the support reached from below: log g = log|g| − iπ for g < 0
        return np.asarray(np.where(pair, found, np.conj(found.real + 0j)))

    def function(form: sp.Expr) -> Numerical:
        evaluated = sp.lambdify([n.delta, n.epsilon, n.transform], form.subs(known), "numpy")

        def at(delta: ArrayLike, epsilon: ArrayLike) -> _Numbers:
            both = np.broadcast_arrays(np.asarray(delta, float), np.asarray(epsilon, float))
            if not np.all((both[0] > 0) & np.isfinite(both[0]) & np.isfinite(both[1])):
                raise ProblemError(
                    f"delta = {delta!r} with epsilon = {epsilon!r} is not allowed: delta must be > "
                    "0 and both finite; for delta → 0 see small_noise_moment"
                )
            return np.asarray(evaluated(*both, transform(*both)))

        return at

    return SecondMoment(*(function(form) for form in moment_forms()[:3]))


def _roots(a3: _Numbers, a2: _Numbers, a1: _Numbers, a0: _Numbers) -> NDArray[np.complex128]:
    """The roots of a3 g³ + a2 g² + a1 g + a0, stacked first."""
    companion = np.zeros((*a3.shape, 3, 3))
    companion[..., 1, 0] = companion[..., 2, 1] = 1
    for column, entry in enumerate((a2, a1, a0)):
        companion[..., 0, column] = -entry / a3
    g = np.moveaxis(np.linalg.eigvals(companion).astype(complex), -1, 0)
    for _ in range(2):
        slope = (3 * a3 * g + 2 * a2) * g + a1
        g = g - (((a3 * g + a2) * g + a1) * g + a0) / np.where(slope == 0, 1, slope)
    return g
