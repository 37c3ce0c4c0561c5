"""lora-theory sweep: what people see, and what is left when something goes wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from lora_theory.sweeps.store import Store

SPEC = """\
[problem]
tokens = 2
activation = "linear"
teacher_rank = 0.5
label_noise = 0.5
pretraining.samples = 0.5

[theory]
nodes = 64
blocks = 2

[grid]
"pretraining.penalty" = {penalties}
"""
PROGRAM = [sys.executable, "-m", "lora_theory.cli"]
FEW, MANY = [0.05, 0.1, 0.2], [round(0.05 + 0.01 * i, 2) for i in range(40)]


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return written(tmp_path, FEW)


def written(folder: Path, penalties: list[float], text: str = SPEC) -> Path:
    path = folder / "spec.toml"
    path.write_text(text.format(penalties=penalties), encoding="utf-8")
    return path


def results(folder: Path) -> list[Path]:
    """Those that are whole."""
    return [path for path in folder.glob("results/??/*") if not path.name.startswith(".")]


def test_a_dry_run_lists_the_tasks_and_writes_nothing(command, spec):
    answer = command("sweep", spec, "--out", "new", "--dry-run")
    assert answer.code == 0
    assert answer.out.splitlines()[:3] == [
        f"theory      pretraining.penalty = {penalty:g}" for penalty in FEW
    ]
    assert "tasks    3, 3 of them to do" in answer.out
    assert "time     about 1 s on one core" in answer.out
    assert "memory   about 0.8 GiB per worker" in answer.out
    assert not Path("new").exists()
    result = command("sweep", spec, "--out", "new", "--dry-run", "--json").result
    assert [task["problem"]["pretraining.penalty"] for task in result["missing"]] == FEW


def test_the_result_counts_rows_and_names_the_table(command, spec):
    answer = command("sweep", spec, "--out", "new", "--workers", 0, "--json")
    assert answer.code == 0
    assert answer.result == {
        "table": str(Path("new/table.csv")),
        "rows": {"theory converged": 3},
    }
    assert len(pd.read_csv("new/table.csv")) == 3
    again = command("sweep", spec, "--out", "new", "--workers", 0)
    assert again.out.split() == ["rows", "theory", "converged", "3", "table", "new/table.csv"]
    assert "3 tasks, 3 of them finished before, 0 to do" in again.err


def test_failed_tasks_are_in_the_exit_code(command, spec, tmp_path):
    text = SPEC.replace("[problem]", 'dims = [8]\nseeds = 1\nsources = ["simulation"]\n[problem]')
    text = text.replace("pretraining.samples = 0.5", "pretraining.samples = 0.001")
    answer = command("sweep", written(tmp_path, [0.1], text), "--out", "new", "--workers", 0)
    assert answer.code == 1
    assert "simulation failed" in answer.out
    assert "dim = 8 is too small" in pd.read_csv("new/table.csv")["error"][0]


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        (["--out", "new"], "spec is missing: it must be the name of a TOML file"),
        (["spec.toml"], "out is missing: it must be a folder"),
        (["none.toml", "--out", "new"], "none.toml cannot be read: No such file or directory"),
        (["spec.toml", "--out", "spec.toml"], "it must be a folder that can be written"),
        (["spec.toml", "--out", "new", "--workers", "-1"], "workers = -1 is not allowed"),
        (["spec.toml", "--out", "new", "--worker", "1"], "did you mean --workers?"),
        (
            ["spec.toml", "--out", "new", "--workers", "1", "--scheduler", "tcp://x:1"],
            "workers and scheduler are not allowed together",
        ),
    ],
)
def test_bad_words_are_refused(command, spec, words, mentioned):
    answer = command("sweep", *words)
    assert (answer.code, answer.out) == (2, "")
    assert mentioned in " ".join(answer.err.split())
    assert not Path("new").exists()


def test_bad_specs_are_refused(command, spec, tmp_path):
    for text, mentioned in [
        (SPEC + '"label_noise" = []', "grid.label_noise is an empty list: the sweep would have no"),
        (SPEC + '"noise" = [1.0]', "grid.noise is not a field of a problem; the fields are tokens"),
        ("dims = [8]\n" + SPEC, "seeds is missing"),
        ("[problem", "is not valid TOML"),
    ]:
        answer = command("sweep", written(tmp_path, FEW, text), "--out", "new")
        assert (answer.code, answer.out) == (2, "")
        assert mentioned in " ".join(answer.err.split())
        assert not Path("new").exists()


def test_a_second_sweep_in_the_folder_is_refused(command, spec):
    store = Store("new")
    store.create()
    with store.locked():
        answer = command("sweep", spec, "--out", "new", "--workers", 0)
    assert answer.code == 2
    assert f"another sweep is running in it (process {os.getpid()}" in answer.err
    assert not Path("new/table.csv").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupted_sweep_says_how_to_go_on(spec, tmp_path):
    written(tmp_path, MANY)
    words = [*PROGRAM, "sweep", "spec.toml", "--out", "new", "--workers", "0"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    while not results(tmp_path / "new"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert "interrupted: the same command goes on where it stopped" in said
    assert "Traceback" not in said
    finished = len(results(tmp_path / "new"))
    assert 0 < finished < len(MANY)
    assert len(pd.read_csv(tmp_path / "new/table.csv")) == finished
    ended = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 0
    assert f"40 tasks, {finished} of them finished before, {40 - finished} to do" in ended.stderr


FULL_DISK = """
mkdir small && mount -t tmpfs -o size=96k tmpfs small || exit 99
{sweep} --out small; echo "first: $?" >&2
ls small/results/*/* | wc -l >&2
mount -o remount,size=8m small
{sweep} --out small && cp small/table.csv here.csv
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs the Linux tool unshare")
def test_a_full_disk_loses_nothing(spec, tmp_path):
    """A real one: a memory disk of 96 KiB, later enlarged."""
    written(tmp_path, MANY)
    sweep = " ".join([*PROGRAM, "sweep", "spec.toml", "--workers", "0"])
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", FULL_DISK.format(sweep=sweep)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    if ended.returncode == 99 or "unshare:" in ended.stderr:
        pytest.skip(f"no private mounts here: {ended.stderr.splitlines()[-1]}")
    assert ended.returncode == 0, ended.stderr
    said = " ".join(ended.stderr.split())
    assert "sweep stopped: No space left on device; the same command goes on" in said
    assert "first: 74" in said
    assert "Traceback" not in said
    kept = int(said.split("first: 74 ")[1].split()[0])
    assert 0 < kept < 40
    assert f"40 tasks, {kept} of them finished before" in said
    subprocess.run(
        [*PROGRAM, "sweep", "spec.toml", "--workers", "0", "--out", "large"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "here.csv").read_bytes() == (tmp_path / "large/table.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_sweep_is_resumed_to_the_same_bytes():
    """A worker, the client and everything, once each; experiments/survival.py does it 20 times."""
    pytest.importorskip("distributed")
    script = Path(__file__).resolve().parents[2] / "experiments" / "survival.py"
    ended = subprocess.run(
        [sys.executable, script, "--tasks", "20", "--kills", "3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "killed: {'worker': 1, 'client': 1, 'all': 1}" in ended.stdout
    assert "results: 20\nresults lost: 0" in ended.stdout
    assert "tables of 20 rows equal byte by byte: True" in ended.stdout


@pytest.fixture
def cluster(tmp_path: Path):
    """A scheduler and two workers, started by the documented commands: its process and address."""
    pytest.importorskip("distributed")
    dask, started = Path(sys.executable).with_name("dask"), []

    def start(*words: str) -> None:
        with (tmp_path / f"{len(started)}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    [dask, *words],
                    stdout=log,
                    stderr=log,
                    cwd=tmp_path,
                    env={**os.environ, "NPROC": "1"},
                )
            )

    start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
          "--scheduler-file", "scheduler.json")  # fmt: skip
    while not (tmp_path / "scheduler.json").exists():
        time.sleep(0.05)
    address = json.loads((tmp_path / "scheduler.json").read_text("utf-8"))["address"]
    for _ in range(2):
        start("worker", address, "--nworkers", "1", "--nthreads", "1", "--no-dashboard")
    yield started[0], address
    for process in started:
        process.terminate()
    for process in started:
        process.wait()


@pytest.mark.slow
def test_a_scheduler_and_its_workers_are_processes_of_their_own(cluster, spec, tmp_path):
    """The table is that of one process."""
    for words in (["--scheduler", cluster[1]], ["--workers", "0"]):
        subprocess.run(
            [*PROGRAM, "sweep", "spec.toml", "--out", words[0].strip("-"), *words],
            cwd=tmp_path,
            check=True,
            env={**os.environ, "NPROC": "1"},
            capture_output=True,
        )
    tables = [(tmp_path / name / "table.csv").read_bytes() for name in ("scheduler", "workers")]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_a_scheduler_that_dies_loses_nothing(cluster, spec, tmp_path):
    scheduler, address = cluster
    written(tmp_path, MANY)
    words = [*PROGRAM, "sweep", "spec.toml", "--out", "new"]
    process = subprocess.Popen(
        [*words, "--scheduler", address], stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    while not results(tmp_path / "new"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    scheduler.kill()
    _, said = process.communicate()
    assert process.returncode == 74
    assert "sweep stopped: the scheduler, or all of its workers, are gone; the same command" in said
    assert "Traceback" not in said
    finished = len(results(tmp_path / "new"))
    assert 0 < finished < len(MANY)
    again = subprocess.run(
        [*words, "--workers", "0"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    # a worker may have finished the one it was at
    resumed = int(again.stderr.split("40 tasks, ")[1].split()[0])
    assert finished <= resumed <= finished + 2
    assert len(pd.read_csv(tmp_path / "new/table.csv")) == len(MANY)
