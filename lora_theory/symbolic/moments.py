"""Means of polynomials in Gaussian variables: Isserlis' theorem."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import sympy as sp

__all__ = ["gaussian_mean"]


def gaussian_mean(
    polynomial: sp.Expr, covariance: Mapping[tuple[sp.Symbol, sp.Symbol], sp.Expr]
) -> sp.Expr:
    """E of a polynomial in centred Gaussian variables of the given covariance.

    By parts, E[x_i p] = Σ_j C_ij E[∂_j p], until nothing is left.

    Args:
        covariance: C_ij by pairs in either order; pairs left out are independent.

    Example:
        >>> import sympy as sp
        >>> x, y, c = sp.symbols("x y c")
        >>> gaussian_mean((x * y) ** 2, {(x, x): 1, (y, y): 1, (x, y): c})
        2*c**2 + 1
    """
    variables = sorted({symbol for pair in covariance for symbol in pair}, key=str)
    size = range(len(variables))

    def entry(i: int, j: int) -> sp.Expr:
        pair = variables[i], variables[j]
        return covariance.get(pair, covariance.get(pair[::-1], sp.S.Zero))

    @functools.cache
    def mean(powers: tuple[int, ...]) -> sp.Expr:
        first = next((i for i in size if powers[i]), None)
        if first is None:
            return sp.S.One
        left = tuple(powers[i] - (i == first) for i in size)
        return sum(
            left[j] * entry(first, j) * mean(tuple(left[i] - (i == j) for i in size))
            for j in size
            if left[j]
        )

    terms = sp.Poly(sp.expand(polynomial), *variables).terms()
    return sp.expand(sum(factor * mean(powers) for powers, factor in terms))
