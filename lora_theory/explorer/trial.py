"""A small simulation in a process of its own: the page stays quick, and can end it at any moment.

As a program (``python -m lora_theory.explorer.trial``) it reads one request from its input, trains
run by run, and writes one line of JSON after each; it ends when its input does.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lora_theory.problem import Problem, ProblemError
from lora_theory.spelling import problem_of_texts, texts_of

__all__ = ["Trial", "trial"]

_HEARTBEAT = 0.2  # s between looks whether the trial is still wanted


@dataclass(frozen=True)
class Trial:
    """What has been measured so far: by D one row per run, as in ``Simulation.runs``."""

    problem: Problem
    dims: tuple[int, ...]
    seeds: int
    runs: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Runs that have ended."""
        return sum(map(len, self.runs.values()))

    @property
    def total(self) -> int:
        """Runs that are asked for."""
        return len(self.dims) * self.seeds

    @property
    def comparable(self) -> bool:
        """Whether there are two runs at each D, so that there are standard errors."""
        return all(len(self.runs.get(dim, ())) > 1 for dim in self.dims)

    def with_run(self, dim: int, row: dict[str, Any]) -> Trial:
        """The same with one run more."""
        runs = {**self.runs, dim: [*self.runs.get(dim, []), row]}
        return Trial(self.problem, self.dims, self.seeds, runs)


def trial(problem: Problem, dims: tuple[int, ...], seeds: int) -> Iterator[Trial]:
    """Train ``seeds`` runs at each D; yields often, the same trial until a run ends.

    Runs alternate between the D.  Closing the iterator ends the process.

    Raises:
        ProblemError: the simulation refuses the problem, D or seeds.
        RuntimeError: the process ended otherwise before its work did.
    """
    state = Trial(problem, dims, seeds)
    request = json.dumps({"problem": texts_of(problem), "dims": dims, "seeds": seeds})
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_theory.explorer.trial"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip
    assert process.stdin is not None
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_pass_on, args=(process, lines), daemon=True).start()
    try:
        yield state
        process.stdin.write(request + "\n")
        process.stdin.flush()
        while state.done < state.total:
            try:
                line = lines.get(timeout=_HEARTBEAT)
            except queue.Empty:
                yield state
                continue
            if line is None:
                code = process.wait()
                raise RuntimeError(f"the simulation ended before its work did (exit {code})")
            told = json.loads(line)
            if "refused" in told:
                raise ProblemError(told["refused"])
            state = state.with_run(told["dim"], told["row"])
            yield state
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


def _pass_on(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.put(line)
    lines.put(None)


def main() -> None:
    """The program: one request in, one line per run out."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_input, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(10)  # the page comes first
    from lora_theory.simulation import simulate

    problem = problem_of_texts(request["problem"])
    for index in range(request["seeds"]):
        for dim in request["dims"]:
            try:
                found = simulate(problem, dim, 1, first=index, starts=1)
            except ProblemError as error:
                print(json.dumps({"refused": str(error)}), flush=True)
                return
            (row,) = found.runs
            print(json.dumps({"dim": dim, "row": row}), flush=True)


def _end_with_the_input() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
