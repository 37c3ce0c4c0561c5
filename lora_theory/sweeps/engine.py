"""Tasks of a sweep carried out: here, on worker processes of this machine, or on a cluster."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lora_theory.problem import ProblemError
from lora_theory.sweeps.store import Store, StoreError
from lora_theory.sweeps.tasks import Task

__all__ = ["Outcome", "SweepError", "execute", "here", "on_workers"]

_EXTRA = "pip install 'lora-theory[distributed]'"
#: Deaths of workers that one task survives; it is then believed to kill them.
_DEATHS = 3
#: Seconds: to reach a scheduler, between two looks, and without any worker.
_REACH, _LOOK, _ALONE = 10.0, 0.05, 60.0
_GONE = "the scheduler, or all of its workers, are gone"


class SweepError(RuntimeError):
    """The sweep cannot go on; what is finished is in its folder."""


class Outcome(NamedTuple):
    """How a task ended, and what that took."""

    task: Task
    error: str | None  # of a task that failed
    seconds: float
    host: str


def execute(folder: str, task: Task) -> Outcome:
    """Compute one task and keep its rows, or the reason of its failure.

    Raises:
        StoreError: the folder cannot be written; a task computed later could not be kept either.
    """
    if not os.path.isdir(folder):
        raise StoreError(2, f"{socket.gethostname()} does not see this folder", folder)
    start, error = time.perf_counter(), None
    try:
        rows = task.rows()
    except Exception as failure:  # whatever it is, it is the result of this task
        named = isinstance(failure, ProblemError)
        error = str(failure) if named else f"{type(failure).__name__}: {failure}"
        rows = task.failure(error)
    Store(folder).write(task, rows, failed=error is not None)
    return Outcome(task, error, time.perf_counter() - start, socket.gethostname())


def here(folder: str, tasks: Sequence[Task]) -> Iterator[Outcome]:
    """One after the other in this process."""
    for task in tasks:
        yield execute(folder, task)


def on_workers(
    folder: str, tasks: Sequence[Task], *, workers: int, scheduler: str | None, threads: int
) -> Iterator[Outcome]:
    """On spawned processes of this machine, or on the workers of the scheduler at an address.

    A task whose worker dies goes to another one; after a few deaths it counts as failed.

    Raises:
        SweepError: the scheduler, or all workers on this machine, are gone.
    """
    if importlib.util.find_spec("distributed") is None:
        raise ProblemError(f"workers and scheduler need an extra that is not installed: {_EXTRA}")
    from distributed import as_completed

    with _told_when_gone(), _cluster(workers, scheduler, threads) as client:
        futures = client.map(
            execute, [folder] * len(tasks), list(tasks), key=[t.key for t in tasks], pure=False
        )
        by_key = {future.key: task for future, task in zip(futures, tasks, strict=True)}
        waiting = as_completed(futures, loop=client.loop)
        left, seen = len(futures), time.monotonic()
        try:
            while left:
                batch = waiting.next_batch(block=False)
                left -= len(batch)
                for future in batch:
                    yield _outcome(folder, future, by_key[future.key])
                    future.release()
                if batch or (scheduler is not None and client.status == "running"):
                    seen = time.monotonic()
                elif client.status != "running" or _is_alone(client, seen):
                    raise SweepError(_GONE)
                if not batch:
                    time.sleep(_LOOK)
        finally:
            with contextlib.suppress(Exception):  # of a scheduler that is gone
                client.cancel(futures, force=True)


def _outcome(folder: str, future: Any, task: Task) -> Outcome:
    from distributed import CancelledError, KilledWorker

    try:
        outcome: Outcome = future.result()
    except CancelledError as lost:
        raise SweepError(_GONE) from lost
    except KilledWorker:
        error = f"its worker died {_DEATHS} times, perhaps for want of memory"
        Store(folder).write(task, task.failure(error), failed=True)
        return Outcome(task, error, 0.0, "")
    return outcome


def _is_alone(client: Any, seen: float) -> bool:
    """Whether there has been no worker for long."""
    return time.monotonic() - seen > _ALONE and not client.scheduler_info()["workers"]


@contextlib.contextmanager
def _told_when_gone() -> Iterator[None]:
    """A lost connection as one SweepError, without the remarks of distributed about it."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    except OSError as lost:
        if "distributed" not in type(lost).__module__:
            raise
        raise SweepError(_GONE) from lost
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _cluster(workers: int, scheduler: str | None, threads: int) -> Iterator[Any]:
    import dask
    from distributed import Client, LocalCluster

    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=_REACH, set_as_default=False)
        except (OSError, ValueError) as error:
            reason = str(error).split("\n")[0] or type(error).__name__
            raise ProblemError(
                f"scheduler = {scheduler!r} is not allowed: it must be the address of a dask "
                f"scheduler that answers, such as tcp://HOST:8786 ({reason})"
            ) from error
        with client:
            yield client
        return
    settings = {
        "distributed.scheduler.allowed-failures": _DEATHS - 1,
        "distributed.worker.multiprocessing-method": "spawn",
    }
    environment = {"NPROC": str(threads), "OMP_NUM_THREADS": str(threads)}
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            host="127.0.0.1",
            silence_logs=logging.CRITICAL,
            env=environment,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client
