"""Sweeps resumed, repeated, spread over processes: the same table, and nothing computed twice."""

import random
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from lora_theory import (
    Pretraining,
    Problem,
    ProblemError,
    compare,
    load,
    predict,
    simulate,
    sweep,
)
from lora_theory.sweeps import api, kept_simulations, plan
from lora_theory.sweeps.engine import execute
from lora_theory.sweeps.estimate import expected_seconds
from lora_theory.sweeps.store import Store
from lora_theory.sweeps.tasks import Task

SPEC = {
    "dims": [8],
    "seeds": 3,
    "seeds_per_task": 2,
    "problem": {
        "tokens": 2,
        "activation": "linear",
        "teacher_rank": 0.5,
        "label_noise": 0.5,
        "pretraining": {"samples": 0.5},
        "finetuning": {"samples": 4.0, "penalty": 0.2},
    },
    "theory": {"nodes": 64},
    "simulation": {"starts": 1, "test_sequences": 100},
    "grid": {"pretraining.penalty": [0.05, 0.2]},
}
TASKS = 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an undisturbed sweep."""
    folder = tmp_path_factory.mktemp("whole")
    sweep(SPEC, folder, workers=0)
    return folder


@pytest.fixture
def counted(monkeypatch):
    """The keys of the tasks that are really computed, counted."""
    computed = Counter()
    rows = Task.rows

    def counting(self):
        computed[self.key] += 1
        return rows(self)

    monkeypatch.setattr(Task, "rows", counting)
    return computed


def results(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("results/??/*")}


def test_rows_are_those_of_predict_and_simulate(whole):
    table = load(whole)
    assert len(table) == 2 * (1 + 3)
    theory, *runs = (row for _, row in table.iloc[:4].iterrows())
    problem = Problem.from_dict(
        SPEC["problem"] | {"pretraining": {"samples": 0.5, "penalty": 0.05}}
    )
    prediction = predict(problem, nodes=64)
    assert theory["source"] == "theory"
    assert theory["pretraining.test_error"] == prediction.pretraining.test_error
    assert theory["finetuning.branch"] == prediction.finetuning.branch
    error = prediction.finetuning.quadrature_error["overlap"]
    assert theory["finetuning.overlap.error"] == error > 0
    simulation = simulate(problem, 8, 3, starts=1, test_sequences=100)
    for index, (row, run) in enumerate(zip(runs, simulation.runs, strict=True)):
        assert (row["dim"], row["seed"], row["root_seed"]) == (8, index, 0)
        for name in ("pretraining.Q", "finetuning.q", "finetuning.gradient_norm"):
            assert row[name] == run[name], name
        assert row["dtype"] == "float64"
        assert row["jax"] == run["jax"]
    assert table["error"].isna().all()


def test_the_written_table_is_the_returned_one(whole):
    written, returned = pd.read_csv(whole / "table.csv"), load(whole)
    assert list(written) == list(returned)
    for name in returned:
        values = returned[name]
        if values.dtype == "float64":
            np.testing.assert_array_equal(written[name], values)
        else:
            assert written[name].astype(object).where(written[name].notna(), None).tolist() == [
                None if pd.isna(value) else value for value in values
            ], name


def test_finished_tasks_are_never_computed_again(whole, counted):
    before = (whole / "table.csv").read_bytes()
    (whole / "table.csv").unlink()
    sweep(SPEC, whole, workers=0)
    assert not counted
    assert (whole / "table.csv").read_bytes() == before


def test_shuffled_and_interrupted_sweeps_end_with_the_same_bytes(
    whole, tmp_path, monkeypatch, counted
):
    """Interrupted after every second task, each time in another order."""
    order = random.Random(3)

    def shuffled(folder, tasks):
        for place, task in enumerate(order.sample(list(tasks), len(tasks))):
            if place == 2:
                raise KeyboardInterrupt
            yield execute(folder, task)

    monkeypatch.setattr(api, "here", shuffled)
    for finished in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            sweep(SPEC, tmp_path, workers=0)
        assert len(results(tmp_path)) == finished
        assert len(pd.read_csv(tmp_path / "table.csv")) == len(load(tmp_path)) >= finished
    sweep(SPEC, tmp_path, workers=0)
    assert results(tmp_path) == results(whole)
    assert (tmp_path / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()
    assert set(counted.values()) == {1}


def test_blocks_of_other_size_have_the_same_rows(whole, tmp_path):
    table = sweep(SPEC | {"seeds_per_task": 3}, tmp_path, workers=0)
    pd.testing.assert_frame_equal(table, load(whole), rtol=1e-6)


def test_runs_trained_together_are_those_trained_one_by_one(whole, tmp_path):
    """As far as the gradient tolerance fixes the minima."""
    effort = {"starts": 1, "test_sequences": 100, "gradient_tolerance": 1e-8}
    spec = SPEC | {"sources": ["simulation"], "simulation": effort, "seeds_per_task": 3}
    alone = sweep(spec, tmp_path / "alone", workers=0)
    batched = spec | {"simulation": effort | {"batch": 2}}
    together = sweep(batched, tmp_path / "together", workers=0)
    assert (together.pop("batch") == 2).all()
    assert (alone.pop("batch") == 1).all()
    assert (alone["status"] == "converged").all()
    roundings = [name for name in alone if name.endswith((".gradient_norm", ".iterations"))]
    observed = [table.drop(columns=roundings) for table in (alone, together)]
    pd.testing.assert_frame_equal(*observed, rtol=1e-6)


def test_damaged_results_are_computed_again(whole, tmp_path, counted, capsys):
    sweep(SPEC, tmp_path, workers=0)
    counted.clear()
    first, second, *_ = sorted(tmp_path.glob("results/??/*"))
    first.write_bytes(first.read_bytes()[:-10])
    second.unlink()
    sweep(SPEC, tmp_path, workers=0, progress=True)
    assert counted == {first.name: 1, second.name: 1}
    said = capsys.readouterr().err
    assert "1 result files are damaged: their tasks are computed again" in said
    assert "6 tasks, 4 of them finished before, 2 to do" in said
    assert results(tmp_path) == results(whole)


def test_a_failed_task_has_a_row_and_another_try(tmp_path, monkeypatch, counted, capsys):
    """At D = 8 more sequences would be re-used than there are; and one that breaks once."""
    reused = SPEC | {"grid": {"finetuning.sequences": ["reused"]}, "sources": ["simulation"]}
    reused["problem"] = SPEC["problem"] | {"pretraining": {"samples": 0.1, "penalty": 0.1}}
    assert plan(reused, tmp_path).impossible == 2
    table = sweep(reused, tmp_path, workers=0)
    assert table["status"].tolist() == ["failed"] * 3
    assert table["seed"].tolist() == [0, 1, 2]
    assert table["error"].str.contains("exceed the 6 pre-training sequences").all()

    other = tmp_path / "other"
    alone = SPEC | {"sources": ["theory"]}
    with monkeypatch.context() as patch:
        patch.setattr(Task, "rows", lambda self: 1 / 0)
        broken = sweep(alone, other, workers=0)
    assert broken["error"].tolist() == ["ZeroDivisionError: division by zero"] * 2
    counted.clear()
    mended = sweep(alone, other, workers=0, progress=True)
    assert "2 tasks failed before: they are tried again" in capsys.readouterr().err
    assert mended["status"].tolist() == ["converged"] * 2
    assert sum(counted.values()) == 2


def test_a_changed_spec_keeps_what_it_shares(tmp_path, counted, capsys):
    alone = SPEC | {"sources": ["theory"]}
    sweep(alone, tmp_path, workers=0)
    counted.clear()
    capsys.readouterr()
    more = alone | {"grid": {"pretraining.penalty": [0.2, 0.3]}}
    table = sweep(more, tmp_path, workers=0, progress=True)
    assert sum(counted.values()) == 1
    assert table["pretraining.penalty"].tolist() == [0.2, 0.3]
    said = capsys.readouterr().err
    assert "the spec has changed since the last sweep" in said
    assert "(grid)" in said
    assert len(results(tmp_path)) == 3, "what is no longer asked for stays"
    sweep(more, tmp_path, workers=0, progress=True)
    assert "changed" not in capsys.readouterr().err


def test_a_plan_writes_nothing_and_learns_from_the_log(whole, tmp_path):
    folder = tmp_path / "new"
    before = plan(SPEC, folder)
    assert not folder.exists()
    assert (len(before.tasks), len(before.missing)) == (TASKS, TASKS)
    assert before.seconds > 0
    assert before.memory > 2**29
    after = plan(SPEC, whole)
    assert (len(after.missing), after.seconds, after.memory) == (0, 0, 0)
    longer = plan(SPEC | {"seeds": 5}, whole)
    assert len(longer.missing) == 4
    ratios = {}
    for entry in Store(whole).logged():
        ratios.setdefault(entry["source"], []).append(entry["seconds"] / entry["expected"])
    expected = sum(expected_seconds(task) for task in longer.missing)
    assert longer.seconds == pytest.approx(np.median(ratios["simulation"]) * expected)


def test_the_log_has_one_line_per_task(whole):
    entries = Store(whole).logged()
    assert len(entries) == TASKS
    assert {entry["key"] for entry in entries} == set(results(whole))
    assert all(entry["seconds"] > 0 and entry["host"] for entry in entries)
    assert "seconds" not in (whole / "table.csv").read_text("utf-8")


def test_arguments_that_are_not_allowed(tmp_path):
    for settings, words in [
        ({"workers": -1}, "workers = -1 is not allowed"),
        ({"threads": 0}, "threads = 0 is not allowed"),
        ({"workers": 1, "scheduler": "tcp://x:1"}, "workers and scheduler are not allowed togeth"),
    ]:
        with pytest.raises(ProblemError, match=words):
            sweep(SPEC, tmp_path / "none", **settings)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ProblemError, match="it holds no sweep"):
        load(tmp_path)


def test_a_store_that_cannot_be_written_stops_the_sweep(tmp_path, monkeypatch):
    """The folder vanishes after the first task, as that of a machine that is switched off."""

    def vanishing(folder, tasks):
        yield execute(folder, tasks[0])
        yield execute(f"{folder}/gone", tasks[1])

    monkeypatch.setattr(api, "here", vanishing)
    with pytest.raises(OSError, match="does not see this folder"):
        sweep(SPEC, tmp_path, workers=0)
    assert len(results(tmp_path)) == 1


@pytest.mark.exhaustive
def test_one_and_two_workers_write_the_same_bytes(tmp_path):
    """Spawned processes, theirs threads fixed; the second sweep is resumed from half."""
    pytest.importorskip("distributed")
    one, two = tmp_path / "one", tmp_path / "two"
    sweep(SPEC, one, workers=1)
    sweep(SPEC | {"seeds": 2}, two, workers=2)
    sweep(SPEC, two, workers=2)
    assert (one / "table.csv").read_bytes() == (two / "table.csv").read_bytes()
    assert set(results(one)) <= set(results(two))


def test_a_scheduler_that_does_not_answer_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setitem(api.on_workers.__globals__, "_REACH", 0.5)
    for address in ("tcp://127.0.0.1:9", "nonsense"):
        with pytest.raises(ProblemError, match=f"scheduler = '{address}' is not allowed"):
            sweep(SPEC, tmp_path, scheduler=address)


def test_compare_keeps_its_runs_in_a_sweep(tmp_path, counted):
    stage = {"samples": 0.5, "penalty": 0.2}
    problem = Problem.from_dict(SPEC["problem"] | {"pretraining": stage})
    settings = {"dims": [8], "seeds": 2, "nodes": 64}
    plain = compare(problem, **settings)
    kept = compare(problem, **settings, out=tmp_path)
    assert sum(counted.values()) == 2
    pd.testing.assert_frame_equal(kept.to_frame(), plain.to_frame())
    for stored, computed in zip(kept.simulations, plain.simulations, strict=True):
        for name in ("problem", "dim", "seeds", "status", "pretraining", "effective_noise"):
            assert getattr(stored, name) == getattr(computed, name), name
        assert stored.finetuning == computed.finetuning
        assert stored.finetuning_random == computed.finetuning_random
        assert stored.environment.items() >= computed.environment.items()
        for run, same in zip(stored.runs, computed.runs, strict=True):
            assert run.items() >= same.items()
    again = compare(problem, dims=[8], seeds=3, nodes=64, out=tmp_path)
    assert sum(counted.values()) == 3
    assert again.simulations[0].seeds == 3


def test_runs_without_a_second_stage_are_kept(tmp_path):
    problem = Problem(
        tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        pretraining=Pretraining(samples=0.4, penalty=0.1),
    )  # fmt: skip
    for _ in range(2):  # computed, then read
        (found,) = kept_simulations(problem, [8], 2, tmp_path, starts=0, test_sequences=2)
        assert found.finetuning is None
        assert found.pretraining.Q.count == 2
