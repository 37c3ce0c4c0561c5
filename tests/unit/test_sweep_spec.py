"""Sweeps are read from nested values: points, tasks, names of results, refusals."""

import copy
import json

import numpy as np
import pytest

from lora_theory import Problem, ProblemError
from lora_theory.sweeps import SweepSpec
from lora_theory.sweeps.tasks import Task

BASE = {
    "problem": {
        "tokens": 2,
        "activation": "linear",
        "teacher_rank": 0.5,
        "label_noise": 0.5,
        "pretraining": {"samples": 0.5, "penalty": 0.1},
    }
}


def spec(**changes):
    return SweepSpec.from_dict({**copy.deepcopy(BASE), **changes})


def test_points_are_the_product_of_grid_zip_and_random():
    found = spec(
        grid={"label_noise": [0.0, 1.0], "pretraining.penalty": [0.1, 0.2, 0.3]},
        zip={"tokens": [2, 3], "activation": ["linear", "softmax"]},
        random={"points": 5, "teacher_rank": {"from": 0.2, "to": 5.0, "scale": "log"}},
    )
    assert len(found.points) == 2 * 3 * 2 * 5
    first, second, *_ = found.points
    assert first.teacher_rank != second.teacher_rank, "the last one is the fastest"
    assert {(p.tokens, p.activation) for p in found.points} == {(2, "linear"), (3, "softmax")}
    assert [p.label_noise for p in found.points] == [0.0] * 30 + [1.0] * 30


def test_fields_that_are_varied_may_be_absent_or_nested():
    raw = copy.deepcopy(BASE)
    del raw["problem"]["pretraining"], raw["problem"]["tokens"]
    found = SweepSpec.from_dict(
        raw
        | {
            "grid": {"tokens": [2], "pretraining": {"penalty": [0.1], "samples": [0.2]}},
            "random": {"points": 2, "finetuning": {"samples": [3.0], "penalty": [0.1, 0.2]}},
        }
    )
    assert found.points[0].pretraining.samples == 0.2
    assert found.points[0].finetuning.samples == 3.0


def test_draws_are_uniform_and_never_change():
    law = {"from": 1e-3, "to": 10.0, "scale": "log"}
    many = spec(random={"points": 400, "pretraining.penalty": law})
    fewer = spec(
        random={"points": 7, "label_noise": {"from": 0, "to": 2}, "pretraining.penalty": law}
    )
    penalties = [p.pretraining.penalty for p in many.points]
    assert [p.pretraining.penalty for p in fewer.points] == penalties[:7]
    share = np.log(np.array(penalties) / 1e-3) / np.log(1e4)
    assert 0 <= share.min() <= share.max() <= 1
    np.testing.assert_allclose(np.quantile(share, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.06)
    assert len(set(penalties)) > 390
    other = spec(random={"points": 7, "seed": 1, "pretraining.penalty": law})
    assert other.points[0] != many.points[0]


def test_tasks_are_theory_then_blocks_of_seeds_at_every_dim():
    found = spec(dims=[12, 20], seeds=5, seeds_per_task=2, seed=7).tasks()
    assert [task.source for task in found] == ["theory"] + ["simulation"] * 6
    settings = [task.settings for task in found[1:]]
    assert [(s["dim"], s["first"], s["seeds"]) for s in settings] == [
        (dim, first, count) for dim in (12, 20) for first, count in ((0, 2), (2, 2), (4, 1))
    ]
    assert all(s["seed"] == 7 for s in settings)
    assert [t.source for t in spec(dims=[12], seeds=1, sources=["simulation"]).tasks()] == [
        "simulation"
    ]


def test_names_of_results_hold_what_differs_from_the_defaults():
    (problem,) = spec().points
    plain = Task(problem, "theory", {})
    assert plain.identity["problem"] == {
        "tokens": 2,
        "activation": "linear",
        "teacher_rank": 0.5,
        "label_noise": 0.5,
        "pretraining.samples": 0.5,
        "pretraining.penalty": 0.1,
    }
    assert plain.identity["settings"] == {}
    assert plain.key == Task(problem, "theory", {"blocks": 8, "nodes": None}).key
    same = Problem.from_dict(json.loads(json.dumps(problem.to_dict())))
    assert plain.key == Task(same, "theory", {}).key
    others = [
        Task(problem, "theory", {"nodes": 64}),
        Task(problem.replace({"pretraining.rank": 2.0}), "theory", {}),
        Task(problem, "simulation", {"dim": 12, "seeds": 1, "first": 0, "seed": 0}),
        Task(problem, "simulation", {"dim": 12, "seeds": 1, "first": 1, "seed": 0}),
        Task(problem, "simulation", {"dim": 12, "seeds": 1, "first": 1, "seed": 1}),
    ]
    assert len({plain.key, *(task.key for task in others)}) == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grids": {}}, "grids is not a key of a sweep; the keys here are sources, dims"),
        ({"grid": {"penalty": [1.0]}}, "grid.penalty is not a field of a problem"),
        ({"grid": {"label_noise": []}}, "grid.label_noise is an empty list"),
        ({"grid": {"label_noise": 0.1}}, "grid.label_noise = 0.1 is not allowed: it must be a li"),
        ({"grid": {"label_noise": [-1.0]}}, r"label_noise = -1.0 is not allowed.*\(at label_noise"),
        ({"zip": {"tokens": [2, 3], "label_noise": [0.1]}}, "zip must be equally long: tokens has"),
        (
            {"grid": {"tokens": [2]}, "zip": {"tokens": [2]}},
            "tokens is varied twice: it must be in one of grid, zip, random",
        ),
        ({"random": {"tokens": [2, 3]}}, "random needs points"),
        ({"random": {"points": 0, "tokens": [2]}}, "random.points = 0 is not allowed"),
        ({"random": {"points": 2, "label_noise": {"from": 2, "to": 1}}}, "must be a list to choo"),
        (
            {"random": {"points": 2, "label_noise": {"from": 0, "to": 1, "scale": "log"}}},
            "random.label_noise.scale = 'log' is not allowed",
        ),
        ({"random": {"points": 10**7, "label_noise": [0.1]}}, "random.points = 10000000 is not"),
        ({"dims": [12]}, "seeds is missing: a simulation needs"),
        ({"sources": ["simulation"]}, "dims is missing: a simulation needs"),
        ({"dims": [12, 12], "seeds": 1}, r"dims = \[12, 12\] is not allowed: they must differ"),
        ({"dims": [2], "seeds": 1}, "dims = 2 is not allowed: it must be an integer ≥ 4"),
        ({"dims": 12, "seeds": 1}, "dims = 12 is not allowed: it must be a list"),
        ({"sources": ["theory", "practice"]}, "it must be a list of theory, simulation"),
        ({"sources": []}, "sources is empty"),
        ({"theory": {"points": 3}}, "theory.points is not a key of a sweep"),
        ({"theory": {"nodes": 3}}, "nodes = 3 is not allowed: it must be a power of two"),
        ({"simulation": {"dtype": "float16"}}, "dtype = 'float16' is not allowed"),
        ({"problem": 3}, r"problem = 3 must be a table, \[problem\]"),
        ({"problem": {}}, "pretraining.samples is missing"),
        ({"seeds_per_task": 0}, "seeds_per_task = 0 is not allowed"),
    ],
)
def test_what_is_not_allowed_is_said_in_one_sentence(changes, words):
    with pytest.raises(ProblemError, match=words):
        spec(**changes)
