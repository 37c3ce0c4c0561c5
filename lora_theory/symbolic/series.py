"""Power series with rational exponents and the exponent of what they leave out."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import sympy as sp

from lora_theory.symbolic import notation as n
from lora_theory.symbolic.forms import factored

__all__ = ["PowerSeries", "implicit", "raised", "truncated"]


@dataclass(frozen=True)
class PowerSeries:
    """Σ_i coefficients[i] α^exponents[i], up to terms of the order of α^remainder.

    Example:
        >>> import sympy as sp
        >>> small = sp.Symbol("x", positive=True)
        >>> PowerSeries.of(1 + small + small**2 + small**3, small, 3, exponent=sp.Integer(-1))
        1 + 1/alpha + alpha**(-2) + O(alpha**-3)
    """

    exponents: tuple[sp.Rational, ...]
    coefficients: tuple[sp.Expr, ...]
    remainder: sp.Rational

    @classmethod
    def of(
        cls, polynomial: sp.Expr, small: sp.Symbol, order: int, *, exponent: sp.Rational
    ) -> PowerSeries:
        """The terms below small^order of a polynomial in small = α^exponent."""
        terms = sp.expand(polynomial)
        factors = [(power, factored(terms.coeff(small, power))) for power in range(order)]
        kept = [(exponent * power, factor) for power, factor in factors if factor != 0]
        exponents, coefficients = ([pair[i] for pair in kept] for i in range(2))
        return cls(tuple(exponents), tuple(coefficients), exponent * order)

    @property
    def expression(self) -> sp.Expr:
        """The sum of the terms."""
        return sp.Add(*self.terms())

    def terms(self) -> list[sp.Expr]:
        """The terms, in the order of their exponents."""
        pairs = zip(self.exponents, self.coefficients, strict=True)
        return [factor * n.alpha**power for power, factor in pairs]

    def __str__(self) -> str:
        terms = [*map(str, self.terms()), f"O(alpha**{self.remainder})"]
        return " + ".join(terms).replace("+ -", "- ")

    __repr__ = __str__


def truncated(polynomial: sp.Expr, small: sp.Symbol, order: int) -> sp.Expr:
    """A polynomial in ``small`` without its powers from ``order`` on."""
    terms = sp.expand(polynomial)
    return sum(terms.coeff(small, power) * small**power for power in range(order))


def raised(part: sp.Expr, exponent: sp.Rational, small: sp.Symbol, order: int) -> sp.Expr:
    """(1 + part)^exponent below small^order for a polynomial ``part`` that vanishes at 0.

    Example:
        >>> import sympy as sp
        >>> x = sp.Symbol("x")
        >>> raised(x + x**2, sp.Rational(1, 2), x, 3)
        3*x**2/8 + x/2 + 1
    """
    total = term = sp.S.One
    for k in range(1, order):
        term = truncated(term * part, small, order)
        total += sp.binomial(exponent, k) * term
    return truncated(total, small, order)


def implicit(
    residual: sp.Expr,
    unknown: sp.Symbol,
    small: sp.Symbol,
    order: int,
    *,
    start: sp.Expr | None = None,
) -> sp.Expr:
    """Taylor polynomial, below small^order, of the root of a polynomial ``residual``.

    Args:
        start: the root at small = 0, if the equation for it is not linear.

    Example:
        >>> import sympy as sp
        >>> x, y = sp.symbols("x y")
        >>> implicit(y**2 - 1 - x, y, x, 3, start=sp.Integer(1))
        -x**2/8 + x/2 + 1
    """
    known = sp.S.Zero if start is None else start
    new = sp.Symbol("new")
    for power in range(0 if start is None else 1, order):
        trial = sp.expand(residual.subs(unknown, known + new * small**power))
        # coefficient by coefficient: polynomials over rational functions would be slow
        factors = (trial.coeff(small, lowest) for lowest in itertools.count())
        equation = next(factor for factor in factors if factor.has(new))
        found = -equation.subs(new, 0) / equation.diff(new)
        known += sp.factor(found) * small**power
    return known
