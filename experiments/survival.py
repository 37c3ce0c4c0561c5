"""A sweep of real tasks, killed again and again: is its table that of an undisturbed one?

``python experiments/survival.py`` computes 200 tasks, theory and simulation, undisturbed; then the
same sweep in another folder, whose workers, or client, or all processes at once are killed by
SIGKILL at random moments, each time followed by the same command.  It compares the tables byte by
byte and counts what was lost and what was computed twice.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

SPEC = """\
dims = [16, 24]
seeds = 2
seeds_per_task = 1

[problem]
tokens = 2
activation = "linear"
teacher_rank = 0.5
label_noise = 0.5
pretraining.samples = 0.5
finetuning.samples = 4.0

[theory]
nodes = 64

[simulation]
starts = 1
test_sequences = 5000

[grid]
"pretraining.penalty" = {penalties}
"finetuning.penalty" = [0.1, 0.3]
"""
#: Tasks per value of the first penalty: 2 × (theory, 2 D × 2 seeds).
PER_VALUE = 10
VICTIMS = ("worker", "client", "all")


def write_spec(path: Path, tasks: int) -> None:
    """A sweep of as many tasks."""
    count = tasks // PER_VALUE
    penalties = [round(0.05 * 20 ** (i / max(count - 1, 1)), 4) for i in range(count)]
    path.write_text(SPEC.format(penalties=penalties), encoding="utf-8")


def start(spec: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    """The sweep in a process group of its own."""
    command = [sys.executable, "-m", "lora_theory.cli", "sweep", spec, "--out", out]
    with (out.parent / f"{out.name}.err").open("ab") as errors:
        return subprocess.Popen(
            [*command, "--workers", str(workers)],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
            # compiled once, not after every kill
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(out.parent / "compiled")},
        )


def finished(out: Path) -> set[str]:
    """Keys of the results there."""
    return {path.name for path in out.glob("results/??/*") if "." not in path.name}


def kill(client: subprocess.Popen[bytes], victim: str, rng: random.Random) -> None:
    """SIGKILL to one worker, to the client alone, or to every process of the sweep."""
    children = psutil.Process(client.pid).children(recursive=True)
    if victim == "worker":
        rng.choice([child for child in children if _is_worker(child)]).kill()
        return
    client.kill()
    if victim == "all":
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended with the client
                child.kill()
    client.wait()


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def undisturbed(spec: Path, out: Path, workers: int) -> bytes:
    """The bytes of the table of a sweep that nobody disturbs."""
    if start(spec, out, workers).wait() != 0:
        raise SystemExit((out.parent / f"{out.name}.err").read_text("utf-8"))
    return (out / "table.csv").read_bytes()


def survive(spec: Path, out: Path, *, workers: int, kills: int, seed: int) -> dict[str, object]:
    """Run, kill, resume; what was killed, lost and done twice."""
    rng, killed, lost = random.Random(seed), Counter[str](), 0
    client, victims = start(spec, out, workers), [VICTIMS[i % 3] for i in range(kills)]
    for victim in victims:
        before, until = finished(out), rng.randint(1, 5)
        while len(finished(out) - before) < until and client.poll() is None:
            time.sleep(0.02)
        if client.poll() is not None:
            break  # nothing is left to be killed
        time.sleep(0.2 * rng.random())
        before = finished(out)
        kill(client, victim, rng)
        killed[victim] += 1
        lost += len(before - finished(out))
        if victim != "worker":
            client = start(spec, out, workers)
    end = client.wait()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").split("\n") if line]
    done = Counter(entry["key"] for entry in log if entry["error"] is None)
    return {
        "exit": end,
        "killed": dict(killed),
        "results": len(finished(out)),
        "results lost": lost,
        "results computed twice": sum(count - 1 for count in done.values()),
        "failures": sum(entry["error"] is not None for entry in log),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=200, help=f"a multiple of {PER_VALUE}")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spec, clock = Path(folder) / "spec.toml", time.perf_counter()
        write_spec(spec, options.tasks)
        table = undisturbed(spec, Path(folder) / "undisturbed", options.workers)
        print(f"undisturbed: {time.perf_counter() - clock:.0f} s", flush=True)
        out = Path(folder) / "killed"
        found = survive(spec, out, workers=options.workers, kills=options.kills, seed=options.seed)
        print(f"killed: {time.perf_counter() - clock:.0f} s", flush=True)
        same = (out / "table.csv").read_bytes() == table
    print(*(f"{name}: {value}" for name, value in found.items()), sep="\n")
    print(f"tables of {len(table.splitlines()) - 1} rows equal byte by byte: {same}")
    wrong = found["results lost"] or found["results computed twice"] or found["failures"]
    sys.exit(not same or found["results"] != options.tasks or bool(wrong))


if __name__ == "__main__":
    if os.name != "posix":
        sys.exit("SIGKILL is wanted: run this on Linux or macOS")
    main()
