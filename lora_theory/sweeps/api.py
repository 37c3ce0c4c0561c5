"""The public calls: run a sweep, read one, say what it would take."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import pandas as pd
from tqdm import tqdm

from lora_theory.arguments import checked_integer
from lora_theory.problem import Problem, ProblemError
from lora_theory.simulation import Simulation
from lora_theory.simulation.results import from_runs
from lora_theory.status import Status
from lora_theory.sweeps.engine import Outcome, SweepError, here, on_workers
from lora_theory.sweeps.estimate import calibration, expected_memory, expected_seconds
from lora_theory.sweeps.spec import SweepSpec
from lora_theory.sweeps.store import Store
from lora_theory.sweeps.tasks import FAILED, Row, Task

__all__ = ["Plan", "Summary", "kept_simulations", "load", "plan", "sweep"]

#: A sweep as a TOML file, as nested plain values, or validated.
Spec = str | os.PathLike[str] | Mapping[str, Any] | SweepSpec

_LEADING = ("source", *(spec.name for spec in Problem.specs()))
_LEADING += ("dim", "seed", "root_seed", "status", "error")


class Summary(NamedTuple):
    """How the rows of a sweep ended."""

    table: str  #: the file of all rows
    rows: dict[str, int]  #: their number by status and source, "failed" included

    @classmethod
    def of(cls, table: pd.DataFrame, out: str | os.PathLike[str]) -> Self:
        """That of a table in a folder."""
        counts = table.groupby(["source", "status"], sort=True).size()
        rows = {f"{source} {status}": int(n) for (source, status), n in counts.items()}
        return cls(str(Path(out) / "table.csv"), rows)

    @property
    def solved(self) -> bool:
        """Whether every row has numbers that may be used."""
        bad = (FAILED, Status.NOT_CONVERGED.value)
        return not any(name.endswith(bad) for name in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values."""
        return self._asdict()


class Plan(NamedTuple):
    """What a sweep would do in its folder."""

    tasks: tuple[Task, ...]  #: all of them, in the order of the table
    missing: tuple[Task, ...]  #: those that would be computed
    impossible: int  #: of these, simulations whose D does not fit their problem: they will fail
    seconds: float  #: expected on one core, without compilation
    memory: float  #: bytes, expected of the largest task

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values; of the tasks their identities."""
        return {
            "tasks": len(self.tasks),
            "missing": [task.identity for task in self.missing],
            "impossible": self.impossible,
            "seconds": self.seconds,
            "memory": self.memory,
        }


def sweep(
    spec: Spec,
    out: str | os.PathLike[str],
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    threads: int = 1,
    progress: bool = False,
) -> pd.DataFrame:
    """Compute all tasks of a sweep that its folder does not hold yet, and return its table.

    One row per prediction and one per simulated run: the fields of the problem, D, the index of
    the run and the root of its random numbers, statuses, observables under the names of
    :class:`lora_theory.Prediction` and :class:`lora_theory.Simulation` (``*.error``: quadrature
    error), gradient norms, versions, device and dtype.  The same table is written to
    ``OUT/table.csv``; it depends on the spec, the code and that environment alone.

    Every finished task is on disk at once, whole: whatever is killed, the same call goes on where
    it stopped.  A failed task has a row with ``status = "failed"`` and the reason in ``error``, and
    is tried again by the next call.  Wall times and hosts go to ``OUT/log.jsonl``.

    Args:
        spec: a TOML file, or what one holds (README, "Sweeps").
        out: the folder; made if need be.  The workers of a cluster must see it, too.
        workers: processes on this machine; 0 computes in this one.  By default one per core if
            the extra ``distributed`` is installed, else 0.  A script that asks for processes must
            be guarded by ``if __name__ == "__main__":``, for they are spawned.
        scheduler: address of a running dask scheduler, whose workers are used instead.
        threads: of every worker on this machine.
        progress: say on stderr what is done, how fast and until when.

    Raises:
        ProblemError: the spec or an argument is not allowed, or another sweep runs in ``out``.
        StoreError: the folder cannot be written any more; what is finished is kept.
        SweepError: the scheduler or all workers are gone; what is finished is kept.

    Example:
        >>> import tempfile
        >>> from lora_theory import sweep
        >>> spec = {
        ...     "problem": {
        ...         "tokens": 2, "activation": "linear", "teacher_rank": 0.5, "label_noise": 0.5,
        ...         "pretraining": {"samples": 0.2},
        ...     },
        ...     "grid": {"pretraining.penalty": [0.02, 0.1]},
        ... }
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = sweep(spec, folder, workers=0)
        >>> table[["pretraining.penalty", "status", "pretraining.test_error"]].round(4)
           pretraining.penalty     status  pretraining.test_error
        0                 0.02  converged                  0.7981
        1                 0.10  converged                  0.7002
    """
    parsed, store = _parsed(spec), Store(out)
    run = _engine(store, workers, scheduler, threads)
    store.create()
    with store.locked():
        tasks = _distinct(parsed)
        missing = [task for task in tasks if store.read(task) is None]
        if progress:
            for line in _remarks(store, parsed, tasks, missing):
                print(line, file=sys.stderr)
        store.write_spec(parsed.raw)
        try:
            _compute(store, run(missing) if missing else (), len(missing), progress)
        except KeyboardInterrupt:
            store.write_table(_assembled(store, tasks))
            raise
        table = _assembled(store, tasks)
        store.write_table(table)
    return table


def load(out: str | os.PathLike[str]) -> pd.DataFrame:
    """The rows that the last sweep in a folder has so far, as :func:`sweep` returns them.

    Raises:
        ProblemError: the folder holds no sweep.
    """
    store = Store(out)
    raw = store.read_spec()
    if raw is None:
        raise ProblemError(f"out = {str(store.folder)!r} is not allowed: it holds no sweep")
    return _assembled(store, _distinct(SweepSpec.from_dict(raw)))


def kept_simulations(
    problem: Problem,
    dims: Sequence[int],
    seeds: int,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    progress: bool = False,
    **effort: Any,
) -> tuple[Simulation, ...]:
    """:func:`lora_theory.simulate` at each D, in this process, its runs kept one by one in ``out``.

    Args:
        problem, dims, seeds, seed: what is simulated.
        out, progress: as in :func:`sweep`.
        effort: further arguments of :func:`lora_theory.simulate`; None means its default.

    Raises:
        ProblemError: an argument is not allowed. SweepError: a run failed.
    """
    spec = {
        "sources": ["simulation"],
        "dims": list(dims),
        "seeds": seeds,
        "seeds_per_task": 1,
        "seed": seed,
        "problem": {name: entry for name, entry in problem.to_dict().items() if entry is not None},
        "simulation": {name: entry for name, entry in effort.items() if entry is not None},
    }
    table = sweep(spec, out, workers=0, progress=progress)
    failed = table[table["status"] == FAILED]
    if len(failed):
        raise SweepError("; ".join(failed["error"].unique()))
    # fields that this problem does not set have columns too
    labels = {"source", "status", *(spec.name for spec in Problem.specs())} & set(table)
    found = []
    for dim in dims:
        rows = table[table["dim"] == dim].drop(columns=list(labels))
        empty = [name for name in rows if rows[name].isna().all() and "." not in name]
        rows = rows.drop(columns=empty)  # what was not measured, "pretraining.…", stays NaN
        names = {"seed": "seed_index", "root_seed": "seed"}
        found.append(from_runs(problem, rows.rename(columns=names).to_dict("records")))
    return tuple(found)


def plan(spec: Spec, out: str | os.PathLike[str]) -> Plan:
    """What :func:`sweep` would compute, and what that would take; computes and writes nothing."""
    tasks, store = _distinct(_parsed(spec)), Store(out)
    missing = [task for task in tasks if store.read(task) is None]
    ratios = calibration(store.logged())
    seconds = sum(ratios.get(task.source, 1.0) * expected_seconds(task) for task in missing)
    impossible = sum(expected_seconds(task) == 0 for task in missing)
    memory = max((expected_memory(task) for task in missing), default=0.0)
    return Plan(tuple(tasks), tuple(missing), impossible, seconds, memory)


def _parsed(spec: Spec) -> SweepSpec:
    if isinstance(spec, SweepSpec):
        return spec
    if isinstance(spec, Mapping):
        return SweepSpec.from_dict(spec)
    return SweepSpec.from_toml(Path(spec))


def _distinct(spec: SweepSpec) -> list[Task]:
    """The tasks, equal ones once."""
    return list({task.key: task for task in spec.tasks()}.values())


_Engine = Callable[[Sequence[Task]], Iterator[Outcome]]


def _engine(store: Store, workers: int | None, scheduler: str | None, threads: int) -> _Engine:
    folder = str(store.folder.resolve())
    checked_integer("threads", threads, 1)
    if workers is None:
        installed = importlib.util.find_spec("distributed") is not None
        workers = max(1, (os.cpu_count() or 1) // threads) if installed else 0
    elif scheduler is not None:
        raise ProblemError("workers and scheduler are not allowed together: give one of them")
    checked_integer("workers", workers, 0)
    if scheduler is None and workers == 0:
        return lambda tasks: here(folder, tasks)
    return lambda tasks: on_workers(
        folder, tasks, workers=workers, scheduler=scheduler, threads=threads
    )


def _compute(store: Store, outcomes: Iterable[Outcome], count: int, progress: bool) -> None:
    failed = 0
    with tqdm(total=count, unit="task", disable=not (progress and count)) as bar:
        for task, error, seconds, host in outcomes:
            store.log(
                {
                    "key": task.key,
                    "source": task.source,
                    "error": error,
                    "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                    "seconds": round(seconds, 3),
                    "expected": round(expected_seconds(task), 3),
                    "host": host,
                }
            )
            failed += error is not None
            if failed:
                bar.set_postfix(failed=failed)
            bar.update()


def _remarks(
    store: Store, spec: SweepSpec, tasks: Sequence[Task], missing: Sequence[Task]
) -> Iterator[str]:
    former = store.read_spec()
    if former is not None and former != spec.raw:
        changed = sorted(
            name for name in {*former, *spec.raw} if former.get(name) != spec.raw.get(name)
        )
        yield (
            f"the spec has changed since the last sweep in {store.folder} ({', '.join(changed)}): "
            "results of tasks that it no longer asks for stay there, outside the table"
        )
    damaged = sum(store.is_damaged(task) for task in missing)
    if damaged:
        yield f"{damaged} result files are damaged: their tasks are computed again"
    failed = sum(store.read_failure(task) is not None for task in missing)
    if failed:
        yield f"{failed} tasks failed before: they are tried again"
    yield (
        f"{len(tasks)} tasks, {len(tasks) - len(missing)} of them finished before, "
        f"{len(missing)} to do"
    )


def _assembled(store: Store, tasks: Sequence[Task]) -> pd.DataFrame:
    """All rows, in the order of the tasks; the columns do not depend on how they came about."""
    rows: list[Row] = []
    for task in tasks:
        rows += store.read(task) or store.read_failure(task) or []
    names = dict.fromkeys([*_LEADING, *(name for row in rows for name in row)])
    return pd.DataFrame({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: Sequence[Any]) -> pd.Series:
    """With whole numbers and truth values kept as such where some are missing."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int}:
        return pd.Series(values, dtype="Int64")
    if kinds == {bool}:
        return pd.Series(values, dtype="boolean")
    if kinds <= {float, int}:
        return pd.Series(values, dtype="float64")
    return pd.Series(values, dtype="object")
