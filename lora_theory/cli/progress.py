"""A sign of life on stderr for work that takes over a second."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

__all__ = ["announced"]


@contextlib.contextmanager
def announced(
    work: str, *, counting: bool = True, patience: float = 1.0, tick: float = 0.5
) -> Iterator[None]:
    """After ``patience`` seconds say what is being done; on a terminal, count the seconds.

    Nothing is written by work that ends sooner.  Work that draws its own bar must not be counted.
    """
    stream, start, done = sys.stderr, time.monotonic(), threading.Event()

    def watch() -> None:
        if done.wait(patience):
            return
        with contextlib.suppress(OSError, ValueError):
            if not (counting and stream.isatty()):
                print(f"{work} …", file=stream, flush=True)
                return
            while not done.wait(tick):
                print(
                    f"\r{work} … {time.monotonic() - start:.0f} s", end="", file=stream, flush=True
                )
            print("\r\x1b[K", end="", file=stream, flush=True)

    if stream is None:
        yield
        return
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
