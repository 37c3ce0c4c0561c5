"""Forms in which expressions are easy to read."""

from __future__ import annotations

import sympy as sp

__all__ = ["factored"]


def factored(expression: sp.Expr) -> sp.Expr:
    """The expression factored, a leading minus sign taken into the sum that has most of them.

    Example:
        >>> import sympy as sp
        >>> x, y = sp.symbols("x y")
        >>> factored(x / (y - x))
        x/(-x + y)
        >>> factored(x / (1 - x - y))
        -x/(x + y - 1)
    """
    result = sp.factor(expression)
    if not (result.is_Mul and result.could_extract_minus_sign()):
        return result
    sums = [part for part in result.args if part.is_Add or (part.is_Pow and part.base.is_Add)]
    odd = [part for part in sums if part.is_Add or part.exp in (1, -1)]
    best = max(odd, key=_minus_signs, default=None)
    if best is None or _minus_signs(best) < 0:
        return result
    base, power = best.as_base_exp()
    flipped = sp.Pow(sp.Add(*(-term for term in base.args)), power)
    return sp.Mul(-1, flipped, *(part for part in result.args if part is not best))


def _minus_signs(part: sp.Expr) -> int:
    """Terms with a minus sign less those without one."""
    terms = part.as_base_exp()[0].args
    return sum(1 if term.could_extract_minus_sign() else -1 for term in terms)
