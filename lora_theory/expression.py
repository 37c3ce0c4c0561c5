"""Functions of numbers with names, written as an expression: "abs(s)**1.5 + s**2/2".

Read as a syntax tree of a few known kinds, never executed as code: an expression may come from a
file.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

__all__ = ["Expression", "fault_as_penalty"]

_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.Pow: operator.pow,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_CONSTANTS = {"inf": math.inf, "pi": math.pi, "e": math.e}
_FUNCTIONS = {
    "abs": 1, "sqrt": 1, "exp": 1, "log": 1, "log1p": 1, "cosh": 1, "tanh": 1,
    "minimum": 2, "maximum": 2,
}  # fmt: skip
_LONGEST, _LARGEST = 1000, 1e30


class Expression:
    """The function of s, or of other ``variables``, that a text spells, for NumPy and JAX arrays.

    Numbers, s, inf, pi, e; + - * / **; abs, sqrt, exp, log, log1p, cosh, tanh, minimum, maximum;
    "a if s >= b else c".

    Raises:
        ValueError: something else is in the text.

    Example:
        >>> half_line = Expression("s if s >= 0 else inf")
        >>> half_line(np.array([-1.0, 2.0])).tolist()
        [inf, 2.0]
    """

    def __init__(self, text: str, variables: Collection[str] = ("s",)) -> None:
        if len(text) > _LONGEST:
            raise ValueError(f"it is longer than {_LONGEST} characters")
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError("it is not an expression") from None
        self.text = text
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        self.used = tuple(name for name in variables if name in names)
        self._evaluate = _compiled(tree, variables)

    def __call__(self, s: Any, xp: Any = np) -> Any:
        """Its values at s, by the functions of ``xp``, NumPy or ``jax.numpy``."""
        return self.at({"s": s}, xp)

    def at(self, values: Mapping[str, Any], xp: Any = np) -> Any:
        """The same at arrays of all variables, of one shape."""
        shape = next(iter(values.values())).shape
        with np.errstate(all="ignore"):  # NaN and inf are judged by those who read them
            return xp.broadcast_to(self._evaluate(values, xp), shape)


_Evaluate = Callable[[Mapping[str, Any], Any], Any]


def _compiled(node: ast.expr, variables: Collection[str]) -> _Evaluate:
    def applied(operation: Callable[..., Any], *operands: ast.expr) -> _Evaluate:
        parts = [_compiled(operand, variables) for operand in operands]
        return lambda at, xp: operation(*(part(at, xp) for part in parts))

    match node:
        case ast.Constant(value=bool() | complex() | str() | bytes() | None):
            pass
        case ast.Constant(value=int() | float() as value):
            return _constant(value)
        case ast.Name(id=name) if name in variables:
            return lambda at, xp: at[name]
        case ast.Name(id=name) if name in _CONSTANTS:
            return _constant(_CONSTANTS[name])
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return applied(_OPERATORS[type(op)], operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return applied(_OPERATORS[type(op)], left, right)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
            return applied(_OPERATORS[type(op)], left, right)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if _FUNCTIONS.get(
            name
        ) == len(args):
            parts = [_compiled(arg, variables) for arg in args]
            return lambda at, xp: getattr(xp, name)(*(part(at, xp) for part in parts))
        case ast.IfExp(test=ast.Compare() as test, body=body, orelse=orelse):
            condition, yes, no = (_compiled(part, variables) for part in (test, body, orelse))
            return lambda at, xp: xp.where(condition(at, xp), yes(at, xp), no(at, xp))
    raise ValueError(f"{ast.unparse(node)!r} is not allowed in it")


def _constant(value: float) -> _Evaluate:
    if abs(value) > _LARGEST and not math.isinf(value):
        raise ValueError(f"a number above {_LARGEST:g} is not allowed in it")
    return lambda at, xp: xp.asarray(value, next(iter(at.values())).dtype)


def fault_as_penalty(R: Expression) -> str | None:
    """Why R(s) is no penalty: not finite anywhere, undefined somewhere, or not bounded below."""
    sizes = np.concatenate([np.geomspace(1e-6, 1e6, 121), np.linspace(0, 10, 101)])
    s = np.concatenate([-sizes, sizes])
    values = R(s)
    if np.any(np.isnan(values)):
        place = s[np.isnan(values)][-1]
        return (
            f'it is not a number at s = {place:g}; an R that is infinite there is "… if s >= 0 '
            'else inf"'
        )
    near = np.min(values, where=np.abs(s) < 1e3, initial=math.inf)
    if not math.isfinite(near):
        return "it must be finite somewhere, and nowhere -inf"
    if np.min(values) < near - 1e-3 * (1 + abs(near)):
        return "it must be bounded from below, and falls without end"
    return None
