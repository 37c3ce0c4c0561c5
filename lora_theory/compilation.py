"""Compiled programs: quick to compile, in double precision, and never more than a process holds."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

__all__ = ["COMPILED", "double_precision", "keep_programs", "make_room", "quickly_compiled"]

#: Each halves the time to compile on a CPU and leaves the time to run as it is (jax 0.10).
_OPTIONS = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 1}
#: Settings of JAX with which processes share compiled programs; a size makes it lock the folder.
COMPILED = {
    "jax_compilation_cache_max_size": 4_000_000_000,
    "jax_persistent_cache_min_compile_time_secs": 0.1,
}
#: Where Linux tells how many memory maps this process has, one a line, and how many it may have.
_MAPS, _MOST_MAPS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


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


def make_room() -> None:
    """Drop all of JAX's compiled programs once they may fill half of the process's memory maps.

    Each program for a CPU keeps several: a simulation some 800 for every new size, of 65530 that
    Linux allows by default.  The program compiled beyond them ends the process by a signal.
    Dropped programs are compiled again when they are next called.
    """
    try:
        most, maps = int(_MOST_MAPS.read_text()), _MAPS.read_bytes().count(b"\n")
    except OSError:
        return  # not Linux: no such limit
    if maps > most / 2:
        jax.clear_caches()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """64-bit numbers inside, where a new computation begins and may compile programs."""
    make_room()
    with jax.enable_x64(True):
        yield


def keep_programs(folder: str | os.PathLike[str] | None = None) -> None:
    """Keep compiled programs on disk from here on, for this process and those it starts.

    Nothing changes where the environment names a folder of its own, as JAX reads it.

    Args:
        folder: by default one of the user's cache.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    chosen = str(folder or cache / "lora_theory" / "programs")
    for name, value in {"jax_compilation_cache_dir": chosen, **COMPILED}.items():
        jax.config.update(name, value)  # type: ignore[no-untyped-call]
        os.environ[name.upper()] = str(value)
