"""Results on disk: whole or absent, whatever is done to them; one sweep per folder."""

import errno
import math
import os

import pandas as pd
import pytest

from lora_theory import Pretraining, Problem, ProblemError
from lora_theory.sweeps.store import Store, StoreError
from lora_theory.sweeps.tasks import Task

ROWS = [{"source": "theory", "status": "converged", "Q": 0.1 + 0.2, "nan": math.nan, "n": 3}]


PROBLEM = Problem(
    tokens=2,
    activation="linear",
    teacher_rank=0.5,
    label_noise=0.5,
    pretraining=Pretraining(samples=0.5, penalty=0.1),
)


def task(**settings) -> Task:
    return Task(PROBLEM, "theory", settings)


def the_file(store: Store):
    (path,) = store.folder.glob("results/??/*")
    return path


def test_rows_come_back_to_the_last_bit(tmp_path):
    store = Store(tmp_path)
    assert store.read(task()) is None
    store.write(task(), ROWS)
    assert store.read(task()) == [ROWS[0] | {"nan": None}]
    assert not store.is_damaged(task())
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [task().key]


def test_a_failure_is_replaced_by_a_success(tmp_path):
    store = Store(tmp_path)
    store.write(task(), task().failure("no\n  reason"), failed=True)
    assert store.read(task()) is None
    (row,) = store.read_failure(task())
    assert (row["status"], row["error"]) == ("failed", "no reason")
    store.write(task(), ROWS)
    assert store.read_failure(task()) is None
    assert the_file(store).name == task().key


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text[:-1],
        lambda text: text.replace("0.3", "0.4"),
        lambda text: "",
        lambda text: text + text,
        lambda text: "\x00" * len(text),
        lambda text: text.replace(task().key, task().key[::-1]),
    ],
)
def test_a_damaged_result_is_not_read(tmp_path, damage):
    store = Store(tmp_path)
    store.write(task(), ROWS)
    path = the_file(store)
    path.write_text(damage(path.read_text("utf-8")), encoding="utf-8")
    assert store.read(task()) is None
    assert store.is_damaged(task())
    path.write_bytes(b"\xff\xfe\x00")
    assert store.read(task()) is None


def test_a_result_of_another_task_is_not_read(tmp_path):
    store, other = Store(tmp_path), task(nodes=64)
    store.write(task(), ROWS)
    path = tmp_path / "results" / other.key[:2] / other.key
    path.parent.mkdir(exist_ok=True)
    the_file(store).rename(path)
    assert store.read(other) is None


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.write(task(), ROWS)
    before = the_file(store).read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        store.write(task(), [{"Q": 2.0}])
    with pytest.raises(StoreError):
        store.write_table(pd.DataFrame(ROWS))
    assert the_file(store).read_bytes() == before
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [task().key]


def test_a_folder_has_one_sweep_at_a_time(tmp_path):
    first, second = Store(tmp_path), Store(tmp_path)
    first.create()
    with first.locked():
        with (
            pytest.raises(ProblemError, match=rf"another sweep .* \(process {os.getpid()} on"),
            second.locked(),
        ):
            pass
        assert first.read(task()) is None
    with second.locked():
        pass


def test_what_a_kill_left_is_cleared_away(tmp_path):
    store = Store(tmp_path)
    store.write(task(), ROWS)
    partial = the_file(store).with_name(".abc.partial")
    partial.write_text("{", encoding="utf-8")
    with store.locked():
        pass
    assert not partial.exists()
    assert store.read(task()) is not None


def test_log_lines_survive_one_that_was_cut_short(tmp_path):
    store = Store(tmp_path)
    assert store.logged() == []
    store.log({"key": "a"})
    with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('\n{"key": "b", "sec')
    store.log({"key": "c"})
    assert [entry["key"] for entry in store.logged()] == ["a", "c"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ProblemError, match="it must be a folder that can be written"):
        Store(tmp_path / "file").create()
    with pytest.raises(ProblemError, match="it must be a folder that can be written"):
        Store(tmp_path / "file" / "below").create()


def test_specs_are_remembered(tmp_path):
    store = Store(tmp_path)
    assert store.read_spec() is None
    store.write_spec({"grid": {"λ": [0.1]}})
    assert store.read_spec() == {"grid": {"λ": [0.1]}}
    (tmp_path / "spec.json").write_text("{", encoding="utf-8")
    assert store.read_spec() is None
