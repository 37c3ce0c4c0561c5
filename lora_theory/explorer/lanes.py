"""Work in the background of a page: in each lane the newest request, a step at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Lane"]

_IDLE = 0.5  # s between looks whether the page is still there


class Lane:
    """One thread that runs the newest job; a newer one takes over at the next step of the old.

    A job is a function that returns an iterator; what it does happens in its steps, and it is
    closed when it is superseded.  The thread ends after the one that made the lane, which is that
    of the page.

    Args:
        failed: called with what a job raised.
        thread: makes the thread, such as marimo's Thread, which may talk to the page.

    Example:
        >>> seen, done = [], threading.Event()
        >>> lane = Lane(lambda error: None)
        >>> def job():
        ...     seen.append("worked")
        ...     yield
        ...     done.set()
        >>> lane.ask(job)
        >>> done.wait(10), seen
        (True, ['worked'])
        >>> lane.close()
    """

    def __init__(
        self,
        failed: Callable[[Exception], None],
        thread: Callable[..., threading.Thread] = threading.Thread,
    ) -> None:
        self._condition = threading.Condition()
        self._next: Callable[[], Iterator[Any]] | None = None
        self._asked = self._started = 0
        self._closed = False
        self._failed, self._maker = failed, threading.current_thread()
        self._thread = thread(target=self._work, daemon=True)
        self._thread.start()

    def ask(self, job: Callable[[], Iterator[Any]] | None) -> None:
        """Run a job next, or none, in place of what is running."""
        with self._condition:
            self._next, self._asked = job, self._asked + 1
            self._condition.notify()

    @property
    def busy(self) -> bool:
        """Whether something runs or waits."""
        return self._next is not None

    def wait(self, seconds: float) -> bool:
        """Pause a job; True if nothing newer came meanwhile."""
        with self._condition:
            return not self._condition.wait_for(self._superseded, seconds)

    def close(self) -> None:
        """End the thread after its step, and wait for that."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()

    def _gone(self) -> bool:
        return self._closed or not self._maker.is_alive()

    def _superseded(self) -> bool:
        return self._gone() or self._asked != self._started

    def _work(self) -> None:
        while True:
            with self._condition:
                while not self._superseded():
                    self._condition.wait(_IDLE)
                if self._gone():
                    return
                job, self._started = self._next, self._asked
            if job is not None:
                self._run(job)
            with self._condition:
                if self._asked == self._started:
                    self._next = None

    def _run(self, job: Callable[[], Iterator[Any]]) -> None:
        try:
            with contextlib.closing(job()) as steps:  # type: ignore[type-var]
                for _ in steps:
                    if self._superseded():
                        return
        except Exception as error:
            self._failed(error)
