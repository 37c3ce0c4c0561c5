"""jit with the XLA options that compile the long unrolled loops over nodes fastest."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

__all__ = ["quickly_compiled"]

#: Each halves the time to compile on a CPU and leaves the time to run as it is (jax 0.10).
_OPTIONS = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 1}


@functools.cache
def _options() -> dict[str, Any] | None:
    """The options, or None where this version of XLA does not know them."""
    try:
        jax.jit(lambda x: x, compiler_options=_OPTIONS)(0.0)
    except jax.errors.JaxRuntimeError:
        return None
    return _OPTIONS


def quickly_compiled(*static_argnames: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``jax.jit`` with those options, looked up at the first call: importing compiles nothing."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.cache
        def compiled() -> Callable[..., Any]:
            return jax.jit(function, static_argnames=static_argnames, compiler_options=_options())

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return compiled()(*args)

        return call

    return decorate
