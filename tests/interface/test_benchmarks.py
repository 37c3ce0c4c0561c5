"""The benchmarks run, keep what the other parts measured, and do without torch."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_theory import Pretraining, Problem, predict

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SENTENCE = "torch is not installed; it comes with the extra: pip install '.[benchmarks]'"


@pytest.fixture
def module(monkeypatch):
    """Import by the names that the scripts use among themselves, and forget them afterwards."""
    monkeypatch.syspath_prepend(FOLDER)
    names = [path.stem for path in FOLDER.glob("*.py")]
    assert not set(names) & set(sys.modules)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def without_torch(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name)
    )


def _run(run, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, words)])
    return run.main()


def test_a_part_replaces_its_own_entry(module, monkeypatch, tmp_path, capsys, without_torch):
    run, common = module("run"), module("common")

    class Counted:
        seconds = iter([1.5, 0.25])

        @classmethod
        def measure(cls, toy):
            columns = common.Column("case", "case"), common.Column("warm_s", "warm s", ".2f")
            return common.Part(
                "Some notes.", columns, [{"case": "one", "warm_s": next(cls.seconds)}]
            )

    monkeypatch.setitem(run.PARTS, "theory", Counted)
    file = tmp_path / "results.json"
    for part in ("theory", "torch", "theory"):
        assert _run(run, monkeypatch, "--only", part, "--json", file) == 0
    held = json.loads(file.read_text())
    assert list(held) == ["theory", "torch"]
    assert held["theory"]["rows"] == [{"case": "one", "warm_s": 0.25}]
    assert held["theory"]["environment"]["threads"] >= 1
    assert held["theory"]["environment"]["versions"]["jax"]
    assert held["torch"]["skipped"] == SENTENCE
    assert held["torch"]["rows"] == []
    printed = capsys.readouterr().out
    assert "case  warm s\none     1.50" in printed
    assert f"skipped: {SENTENCE}" in printed


def test_a_failing_part_is_reported(module, monkeypatch, tmp_path, capsys):
    run = module("run")

    class Failing:
        @staticmethod
        def measure(toy):
            raise RuntimeError("the child died")

    monkeypatch.setitem(run.PARTS, "theory", Failing)
    assert _run(run, monkeypatch, "--only", "theory", "--json", tmp_path / "results.json") == 1
    assert "theory: the child died" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_plain_loop_has_the_weight_side_of_the_theory(module):
    asked = Problem(
        tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        pretraining=Pretraining(samples=0.2, penalty=0.02),
    )  # fmt: skip
    solved = predict(asked).pretraining
    loop = module("plain_loop")
    stage = loop.Pretraining(asked, 1, np.random.default_rng(0))
    right = np.array([solved.Q, solved.M, solved.V])
    hats = np.array([solved.Q_hat, solved.M_hat, solved.V_hat])
    assert stage.step(hats, right) == pytest.approx(right, rel=2e-3)
    assert stage.step(1.05 * hats, right) != pytest.approx(right, rel=2e-3)


@pytest.mark.slow
def test_floor_from_the_shell(tmp_path):
    file = tmp_path / "results.json"
    command = [sys.executable, FOLDER / "run.py", "--toy", "--only", "floor", "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (row,) = json.loads(file.read_text())["floor"]["rows"]
    assert row["case"] in done.stdout
    # N·T = 6·3 rows of D = 8 against P = 8 columns, two products
    assert row["counted_gflop"] == pytest.approx(4 * 18 * 8 * 8 / 1e9)
    assert row["counted_gflop"] < row["compiled_gflop"]
    assert row["share"] > 0


@pytest.mark.slow
def test_theory_and_simulation_at_toy_sizes(module, monkeypatch):
    def here(function, **arguments):
        name, _, attribute = function.partition(".")
        plain = json.loads(json.dumps(arguments))
        return json.loads(json.dumps(getattr(module(name), attribute)(**plain)))

    rows = {}
    for name in ("theory", "simulation", "integration"):
        monkeypatch.setattr(module(name), "fresh", here)
        rows[name] = module(name).measure(toy=True).rows
    case, curve = rows["theory"]
    assert case["cold_s"] > 0
    assert curve["nodes"] == 64
    for row in (case, curve):
        assert row["warm_s"] > 0
        assert 0 < row["relative_error"] < 1
        assert row["within_target"] in ("yes", "no")
    (row,) = rows["simulation"]
    assert row["peak_mb"] >= 0
    assert row["missed"] == 0
    assert row["pretraining_iterations"] > 0
    weighted, stein = rows["integration"]
    assert (weighted["choice"], stein["choice"]) == ("weighted", "Stein")
    assert min(weighted["response"], stein["response"]) > 0
    assert stein["remark"].startswith("jumps ")
