"""The folder of a sweep: one checksummed file per finished task, a lock, the spec, a log.

DIR/spec.json            the sweep that was asked for last
DIR/results/ab/KEY       the rows of a finished task; KEY.failed: of one that failed
DIR/table.csv            all rows of the sweep
DIR/log.jsonl            when, where and how long each task ran
DIR/lock                 held while a sweep runs
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from lora_theory.files import written_whole
from lora_theory.observables import to_plain
from lora_theory.problem import ProblemError
from lora_theory.sweeps.tasks import Row, Task

__all__ = ["Store", "StoreError"]


class StoreError(OSError):
    """The folder of a sweep can no longer be written; what is finished is in it."""


class Store:
    """Results of tasks by their keys.

    A file appears under its name only when it is complete: it is written beside it, its checksum
    last, and renamed.  Workers on several machines may write to one store.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    # -- results -------------------------------------------------------------------------------

    def write(self, task: Task, rows: Sequence[Row], *, failed: bool = False) -> None:
        """Keep the rows of a task, or of its failure, which its success replaces."""
        body = json.dumps({"key": task.key, "identity": task.identity, "rows": to_plain(rows)})
        _write(self._path(task, failed), f"{body}\n{_checksum(body)}\n")
        if not failed:
            self._path(task, failed=True).unlink(missing_ok=True)

    def read(self, task: Task) -> list[Row] | None:
        """The rows of a finished task; None without a whole file."""
        return _rows(self._path(task), task.key)

    def read_failure(self, task: Task) -> list[Row] | None:
        """The rows of a task that failed when it was last tried."""
        return _rows(self._path(task, failed=True), task.key)

    def is_damaged(self, task: Task) -> bool:
        """Whether there is a result that cannot be believed."""
        return self._path(task).exists() and self.read(task) is None

    def _path(self, task: Task, failed: bool = False) -> Path:
        name = task.key + (".failed" if failed else "")
        return self.folder / "results" / task.key[:2] / name

    # -- the folder ----------------------------------------------------------------------------

    def create(self) -> None:
        """Make the folder, if need be; a :class:`ProblemError` says why that is impossible."""
        probe = self.folder / f".probe.{uuid.uuid4().hex}"
        try:
            (self.folder / "results").mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ProblemError(
                f"out = {str(self.folder)!r} is not allowed: it must be a folder that can be "
                f"written ({error.strerror or error})"
            ) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Refuse a second sweep in this folder; the system forgets the lock of a killed one."""
        lock, owner = FileLock(self.folder / "lock", blocking=False), self.folder / "lock.owner"
        try:
            lock.acquire()
        except Timeout:
            who = owner.read_text("utf-8").strip() if owner.exists() else "unknown process"
            raise ProblemError(
                f"out = {str(self.folder)!r} is not allowed: another sweep is running in it ({who})"
            ) from None
        try:
            _write(owner, f"process {os.getpid()} on {socket.gethostname()}\n")
            for stale in self.folder.glob("results/*/.*.partial"):  # of a sweep that was killed
                stale.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    def read_spec(self) -> dict[str, Any] | None:
        """The spec of the last sweep in this folder."""
        try:
            spec: dict[str, Any] = json.loads((self.folder / "spec.json").read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return spec

    def write_spec(self, spec: Mapping[str, Any]) -> None:
        """Remember the spec."""
        _write(self.folder / "spec.json", json.dumps(spec, indent=1) + "\n")

    def write_table(self, table: pd.DataFrame) -> None:
        """Write ``table.csv``, whole or not at all."""
        _write(self.folder / "table.csv", table.to_csv(index=False))

    def log(self, entry: Mapping[str, Any]) -> None:
        """One line more in the log."""
        with _writing(), (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(entry))  # first ends a line that a kill cut short

    def logged(self) -> list[dict[str, Any]]:
        """The lines of the log that are whole."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.folder / "log.jsonl").read_text("utf-8").split("\n")
            return [entry for line in lines if (entry := _parsed(line)) is not None]
        return []


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _rows(path: Path, key: str) -> list[Row] | None:
    try:
        body, checksum, _ = path.read_text("utf-8").split("\n")
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None  # absent, or not two lines of UTF-8
    if checksum != _checksum(body):
        return None
    entry = json.loads(body)
    return list(entry["rows"]) if entry["key"] == key else None


def _write(path: Path, text: str) -> None:
    with _writing():
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.write(text)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(error.errno, error.strerror or str(error), error.filename) from error
