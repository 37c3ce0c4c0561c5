"""The public call: reproducibility, bookkeeping, files, messages."""

import json

import jax
import numpy as np
import pytest

from lora_theory import Finetuning, Pretraining, Problem, ProblemError
from lora_theory.observables import FINETUNING, PRETRAINING
from lora_theory.simulation import Simulation, simulate
from lora_theory.status import Status

PROBLEM = Problem(
    tokens=2,
    activation="softmax",
    teacher_rank=0.5,
    label_noise=0.5,
    pretraining=Pretraining(samples=0.5, penalty=0.05),
    finetuning=Finetuning(samples=4.0, penalty=0.2),
)
DIM = 16


def run(problem: Problem = PROBLEM, seeds: int = 2, **options) -> Simulation:
    return simulate(problem, DIM, seeds, **{"starts": 2, "test_sequences": 1500, **options})


@pytest.fixture(scope="module")
def reference() -> Simulation:
    return run()


def numbers(row: dict) -> dict:
    return {name: entry for name, entry in row.items() if "." in name}


def test_more_seeds_do_not_change_the_earlier_ones(reference):
    longer = run(seeds=3)
    assert longer.runs[:2] == reference.runs
    assert numbers(longer.runs[2]) != numbers(longer.runs[1])
    assert run(seed=1, seeds=1).runs[0]["pretraining.Q"] != reference.runs[0]["pretraining.Q"]


def test_more_starts_do_not_change_the_earlier_ones(reference):
    one, two = numbers(run(seeds=1, starts=1).runs[0]), numbers(reference.runs[0])
    assert {name: two[name] for name in one} == one
    assert any(name.startswith("finetuning_random.1.") for name in two)


def test_more_test_sequences_keep_the_earlier_ones(reference):
    more = run(seeds=1, test_sequences=3000).runs[0]
    first = reference.runs[0]
    assert more["pretraining.Q"] == first["pretraining.Q"]
    # Half of the sequences are shared, so the two means differ by about σ/√3000, not by 0.
    shift = abs(more["pretraining.test_error"] - first["pretraining.test_error"])
    assert 0 < shift < 5 * more["pretraining.test_error_sampling"]
    assert more["pretraining.test_error_sampling"] == pytest.approx(
        first["pretraining.test_error_sampling"] / np.sqrt(2), rel=0.1
    )


def test_estimates_are_means_over_the_rows(reference):
    for name in PRETRAINING:
        values = [row[f"pretraining.{name}"] for row in reference.runs]
        estimate = getattr(reference.pretraining, name)
        assert estimate.mean == pytest.approx(np.mean(values))
        assert estimate.error == pytest.approx(np.std(values, ddof=1) / np.sqrt(2))
    for name in FINETUNING:
        values = [row[f"finetuning.{name}"] for row in reference.runs]
        assert getattr(reference.finetuning, name).mean == pytest.approx(np.mean(values))


def test_random_starts_are_summarised_by_the_lowest_loss_and_by_their_mean(reference):
    starts = [
        [
            {key: row[f"finetuning_random.{index}.{key}"] for key in ("objective", "q")}
            for index in (0, 1)
        ]
        for row in reference.runs
    ]
    lowest = [min(pair, key=lambda start: start["objective"])["q"] for pair in starts]
    assert reference.finetuning_random.q.mean == pytest.approx(np.mean(lowest))
    everything = [start["q"] for pair in starts for start in pair]
    assert reference.finetuning_random.start_mean.q.mean == pytest.approx(np.mean(everything))
    assert reference.finetuning_random.start_mean.q.count == 2


def test_effective_noise_uses_the_measured_teacher(reference):
    for row in reference.runs:
        Q, M, Q0 = (row[f"pretraining.{name}"] for name in ("Q", "M", "Q0"))
        assert row["effective_noise.gain"] == pytest.approx(M / Q)
        assert row["effective_noise.variance"] == pytest.approx(0.25 + Q0 - M**2 / Q)


def test_every_row_says_where_it_comes_from(reference):
    for index, row in enumerate(reference.runs):
        assert (row["seed"], row["seed_index"], row["dim"]) == (0, index, DIM)
        assert row["dtype"] == "float64"
        assert row["jax"] == jax.__version__
        assert row["platform"] == "cpu"


def test_result_is_plain_json(reference):
    plain = json.loads(json.dumps(reference.to_dict()))
    assert plain["status"] == "converged"
    assert plain["pretraining"]["Q"]["mean"] == reference.pretraining.Q.mean
    assert plain["problem"] == PROBLEM.to_dict()
    assert plain["finetuning_random"]["start_mean"]["q"]["count"] == 2


def test_single_precision_agrees_with_double(reference):
    single = run(dtype="float32")
    for narrow, wide in zip(single.runs, reference.runs, strict=True):
        assert narrow["pretraining.Q0"] == pytest.approx(wide["pretraining.Q0"], rel=1e-6)
        for name in ("pretraining.Q", "pretraining.M", "pretraining.test_error"):
            assert narrow[name] == pytest.approx(wide[name], rel=1e-3)
            assert narrow[name] != wide[name]
        for name in ("q", "overlap", "test_error"):
            name = f"finetuning.{name}"
            assert narrow[name] == pytest.approx(wide[name], rel=5e-3)


def test_tighter_tolerance_moves_nothing(reference):
    tight = run(gradient_tolerance=1e-8)
    assert tight.pretraining.gradient_norm <= 1e-8 < reference.pretraining.gradient_norm
    for name in ("pretraining.Q", "pretraining.M", "finetuning.q", "finetuning.test_error"):
        for new, old in zip(tight.runs, reference.runs, strict=True):
            assert new[name] == pytest.approx(old[name], rel=1e-5)


def test_missed_tolerance_is_counted_and_kept():
    hurried = run(max_iterations=2)
    assert hurried.status is Status.NOT_CONVERGED
    assert hurried.remedy == Status.NOT_CONVERGED.remedy
    assert hurried.pretraining.missed == hurried.finetuning.missed == 2
    assert hurried.finetuning_random.start_mean.missed == 4
    assert hurried.pretraining.Q.count == len(hurried.runs) == 2
    assert hurried.pretraining.gradient_norm > 1e-5


def test_collapse_is_reported_without_nan():
    collapsed = run(PROBLEM.replace({"pretraining.penalty": 50.0, "finetuning.penalty": 50.0}))
    assert collapsed.status is Status.COLLAPSED
    assert collapsed.pretraining.overlap.mean == collapsed.finetuning.overlap.mean == 0
    assert collapsed.effective_noise.gain.mean == 0
    assert all(np.isfinite(entry) for row in collapsed.runs for entry in numbers(row).values())


def test_one_stage_has_no_finetuning():
    alone = run(PROBLEM.replace(finetuning=None))
    assert alone.finetuning is alone.finetuning_random is None
    first, same = (numbers(simulation.runs[0]) for simulation in (alone, run(seeds=1)))
    assert first == {name: entry for name, entry in same.items() if "finetuning" not in name}


def test_without_random_starts_only_the_informed_one_is_reported(reference):
    alone = run(starts=0)
    assert alone.finetuning == reference.finetuning
    assert alone.finetuning_random is None


def test_reused_sequences_are_learnt_better_than_fresh_ones():
    # They share their noise, so their training error is far below that of fresh sequences.
    reused = run(PROBLEM.replace({"finetuning.sequences": "reused"}))
    fresh = run()
    assert reused.pretraining == fresh.pretraining
    assert reused.finetuning.train_error.mean < 0.5 * fresh.finetuning.train_error.mean


def test_progress_goes_to_stderr(capsys):
    run(seeds=1, progress=True)
    captured = capsys.readouterr()
    assert "seeds" in captured.err
    assert captured.out == ""
    run(seeds=1)
    assert capsys.readouterr().err == ""


def test_saved_weights_give_the_reported_numbers(tmp_path, reference):
    path = tmp_path / "weights.npz"
    assert run(save=path) == reference
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.npz"]
    with np.load(path) as saved:
        (tmp_path / "problem.toml").write_text(str(saved["problem"]), encoding="utf-8")
        assert Problem.from_toml(tmp_path / "problem.toml") == PROBLEM
        assert saved["seed"] == 0
        assert saved["W"].shape == (2, DIM, DIM)
        assert saved["W0"].shape == (2, DIM, DIM // 2)
        for index, row in enumerate(reference.runs):
            W, W0 = saved["W"][index], saved["W0"][index]
            w, w_star = saved["w"][index], saved["w_star"][index]
            S, S0 = W @ W.T / DIM, W0 @ W0.T / np.sqrt(DIM * DIM / 2)
            K = S0 - S
            cross = (w_star @ K @ w_star - w @ K @ w) / DIM**1.5
            expected = {
                "pretraining.Q": np.trace(S @ S) / DIM,
                "pretraining.M": np.trace(S @ S0) / DIM,
                "pretraining.Q0": np.trace(S0 @ S0) / DIM,
                "finetuning.q": w @ w / DIM,
                "finetuning.m": abs(w @ w_star) / DIM,
                "finetuning.overlap": abs(w @ w_star) / np.sqrt((w @ w) * (w_star @ w_star)),
                "finetuning.cross_term": cross,
                "finetuning.frozen_cross_term": w_star @ K @ w_star / DIM**1.5,
            }
            for name, entry in expected.items():
                assert row[name] == pytest.approx(entry, rel=1e-10)
            random = saved["w_random"][index]
            objectives = [row[f"finetuning_random.{start}.objective"] for start in (0, 1)]
            lowest = row[f"finetuning_random.{int(np.argmin(objectives))}.q"]
            assert random @ random / DIM == pytest.approx(lowest, rel=1e-12)


def test_interrupted_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def broken(*_args, **_entries):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(OSError, match="disk full"):
        run(seeds=1, starts=0, save=tmp_path / "weights.npz")
    assert list(tmp_path.iterdir()) == []


def test_numpy_integers_are_integers(reference):
    again = simulate(PROBLEM, np.int64(DIM), np.int32(2), starts=2, test_sequences=1500)
    assert again == reference
    assert type(again.dim) is int


REUSED = PROBLEM.replace({"finetuning.sequences": "reused", "finetuning.samples": 20.0})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 3}, ["dim = 3", "≥ 4"]),
        ({"dim": 16.0}, ["dim = 16.0", "integer"]),
        ({"seeds": 0}, ["seeds = 0", "≥ 1"]),
        ({"seed": -1}, ["seed = -1", "from 0 to 4294967295"]),
        ({"starts": -1}, ["starts = -1", "≥ 0"]),
        ({"starts": True}, ["starts = True", "integer"]),
        ({"test_sequences": 1}, ["test_sequences = 1", "≥ 2"]),
        ({"max_iterations": 0}, ["max_iterations = 0", "≥ 1"]),
        ({"dtype": "float16"}, ["dtype = 'float16'", '"float32" or "float64"']),
        ({"gradient_tolerance": "low"}, ["gradient_tolerance = 'low'", "between 0 and 1"]),
        ({"gradient_tolerance": 0.0}, ["gradient_tolerance = 0.0", "between 0 and 1"]),
        ({"device": "tpu"}, ["device = 'tpu'", '"cpu", "gpu" or None']),
        ({"save": "missing/weights.npz"}, ["save = 'missing/weights.npz'", "does not exist"]),
        ({"save": "weights.txt"}, ["save = 'weights.txt'", ".npz"]),
        ({"problem": 3}, ["problem = 3", "Problem"]),
        (
            {"problem": PROBLEM.replace(teacher_rank=0.01)},
            ["dim = 16", "teacher_rank = 0.01", "at least 1"],
        ),
        (
            {"problem": PROBLEM.replace({"pretraining.samples": 1e-4})},
            ["dim = 16", "pretraining.samples = 0.0001"],
        ),
        ({"problem": PROBLEM.replace({"pretraining.rank": 0.01})}, ["pretraining.rank = 0.01"]),
        ({"problem": PROBLEM.replace({"finetuning.samples": 0.01})}, ["finetuning.samples = 0.01"]),
        (
            {"problem": REUSED},
            ["dim = 16", "320", "128", "finetuning.samples = 20", "pretraining.samples = 0.5"],
        ),
    ],
    ids=str,
)
def test_what_is_not_allowed_is_said_in_one_sentence(options, words):
    arguments = {"problem": PROBLEM, "dim": DIM, "seeds": 1, **options}
    with pytest.raises(ProblemError) as caught:
        simulate(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.skipif(
    any(device.platform == "gpu" for device in jax.devices()), reason="there is a GPU here"
)
def test_absent_device_is_named():
    with pytest.raises(ProblemError, match=r"device = 'gpu' is not available here: .* only cpu"):
        run(device="gpu")
