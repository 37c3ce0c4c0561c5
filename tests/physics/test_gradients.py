"""Derivatives by the implicit function theorem against differences of predictions; optima."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from lora_theory import ProblemError, gradient, optimize, predict
from lora_theory.theory import optimal
from lora_theory.theory.gradients import OTHER_SEED, NoSolutionError, Tangents

FIELDS = [
    "pretraining.penalty", "pretraining.samples", "label_noise", "teacher_rank",
    "finetuning.samples", "finetuning.penalty", "finetuning.rescaling", "finetuning.signal",
    "inverse_temperature", "teacher.inverse_temperature",
]  # fmt: skip
SEEN = [
    "pretraining.Q", "pretraining.test_error", "effective_noise.variance",
    "finetuning.overlap", "finetuning.m", "finetuning.test_error", "finetuning.potential",
]  # fmt: skip
CASES = {
    "linear, fresh": {"finetuning.samples": 4.0},
    "linear, partly re-used": {
        "finetuning.samples": 4.0, "finetuning.sequences": "reused",
        "finetuning.reused_fraction": 0.5, "finetuning.noise": "redrawn",
    },
    "linear, narrow factor": {"pretraining.rank": 0.3, "finetuning.samples": 4.0},
    "softmax": {
        "activation": "softmax", "pretraining.samples": 0.3, "pretraining.penalty": 0.05,
        "finetuning.samples": 4.0, "inverse_temperature": 1.1,
    },
}  # fmt: skip


def seen(prediction, name):
    stage, _, attribute = name.partition(".")
    return getattr(getattr(prediction, stage), attribute)


#: Further fields, besides the first three of FIELDS, where not all are tried.
FEWER = {
    "linear, partly re-used": ["finetuning.reused_fraction", "finetuning.rescaling"],
    "linear, narrow factor": ["pretraining.rank"],
    "softmax": ["finetuning.penalty", "finetuning.rescaling", "inverse_temperature"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_derivatives_are_differences_of_predictions(problem, case):
    problem, step = problem.replace(CASES[case]), 0.02
    fields = FIELDS if case == "linear, fresh" else FIELDS[:3] + FEWER[case]
    found = gradient(problem, fields, nodes=64)
    for field in fields:
        here, ends = problem.to_flat()[field], []
        for sign in (1, -1):
            moved = problem.replace({field: here * math.exp(sign * step)})
            ends.append([predict(moved, nodes=64, seed=seed) for seed in (0, OTHER_SEED)])
        for name in SEEN:
            up, down = (np.mean([seen(one, name) for one in end]) for end in ends)
            slope = (up - down) / (2 * here * math.sinh(step))
            scale = abs(found.values[name]) / here
            assert found.slopes[name][field] == pytest.approx(slope, rel=2e-3, abs=5e-4 * scale), (
                field, name,
            )  # fmt: skip
    assert found.values["finetuning.overlap"] > 0.5
    assert abs(found.slopes["finetuning.test_error"]["label_noise"]) > 0.1


def test_the_second_stage_does_not_change_the_first(problem):
    found = gradient(problem, ["finetuning.penalty"], nodes=64)
    assert found.slopes["pretraining.Q"]["finetuning.penalty"] == 0
    assert found.errors["pretraining.Q"]["finetuning.penalty"] == 0
    assert found.slopes["finetuning.q"]["finetuning.penalty"] < 0


def test_errors_are_those_of_the_nodes(problem):
    found = gradient(problem, ["label_noise"], nodes=64)
    name, field = "finetuning.overlap", "label_noise"
    many = gradient(problem, ["label_noise"], nodes=1024).slopes[name][field]
    assert found.errors[name][field] > 0
    assert abs(found.slopes[name][field] - many) < 8 * found.errors[name][field]


def test_least_effective_noise_of_linear_attention_is_that_of_a_search(problem):
    """Stage one of linear attention has no nodes: a search without derivatives on exact values."""
    best = optimize(problem, ["pretraining.penalty"], "effective_noise")
    values = minimize_scalar(
        lambda log: predict(
            problem.replace({"pretraining.penalty": math.exp(log)}, finetuning=None)
        ).effective_noise.delta_eff,
        bounds=(-4, -1), method="bounded", options={"xatol": 1e-7},
    )  # fmt: skip
    assert best.objective == pytest.approx(values.fun, rel=1e-9)
    assert best.optimum["pretraining.penalty"] == pytest.approx(math.exp(values.x), rel=1e-4)
    assert (best.minimised, best.maximised, best.at_bound) == ("effective_noise", None, ())
    assert best.gradient_norm < 1e-5
    assert best.problem.pretraining.penalty == best.optimum["pretraining.penalty"]


def test_linear_attention_with_fresh_sequences_has_one_best_penalty(problem):
    """E, E' and the overlap depend on it through Δ_eff alone."""
    problem = problem.replace({"finetuning.samples": 4.0})
    noise = optimize(problem, ["pretraining.penalty"], "effective_noise")
    for objective in ("pretraining.test_error", "finetuning.test_error", "finetuning.overlap"):
        other = optimize(problem, ["pretraining.penalty"], objective, nodes=64)
        assert other.optimum["pretraining.penalty"] == pytest.approx(
            noise.optimum["pretraining.penalty"], rel=2e-3
        ), objective


def test_reused_sequences_want_no_penalty_for_alignment_and_one_for_the_error(problem):
    """docs/theory.md, section 4.3; the overlap is best at the edge of its box, and says so."""
    reused = problem.replace({"finetuning.sequences": "reused"})
    overlap = optimize(
        reused, ["pretraining.penalty"], "finetuning.overlap", nodes=256,
        within={"pretraining.penalty": (0.005, 1.0)},
    )  # fmt: skip
    assert overlap.at_bound == ("pretraining.penalty",)
    assert overlap.optimum["pretraining.penalty"] == pytest.approx(0.005)
    error = optimize(reused, ["pretraining.penalty"], "finetuning.test_error", nodes=256)
    assert error.at_bound == ()
    assert error.optimum["pretraining.penalty"] == pytest.approx(0.0970, abs=2e-4)


@pytest.mark.exhaustive
def test_softmax_has_other_penalties_for_the_error_and_for_the_noise(problem):
    softmax = problem.replace(activation="softmax")
    found = {
        objective: optimize(softmax, ["pretraining.penalty"], objective, nodes=256)
        for objective in ("pretraining.test_error", "effective_noise")
    }
    error, noise = (found[name].optimum["pretraining.penalty"] for name in found)
    assert error == pytest.approx(0.0271, abs=3e-4)
    assert noise == pytest.approx(0.0153, abs=3e-4)
    for name, optimum in found.items():
        at = optimum.problem.replace(finetuning=None)
        value = {
            "pretraining.test_error": lambda answer: answer.pretraining.test_error,
            "effective_noise": lambda answer: answer.effective_noise.variance,
        }[name]
        for factor in (0.8, 1.25):
            moved = at.replace({"pretraining.penalty": factor * at.pretraining.penalty})
            assert value(predict(moved, nodes=256)) > optimum.objective


def test_two_fields_are_better_than_one(problem):
    penalties = ["pretraining.penalty", "finetuning.penalty"]
    one = optimize(problem, penalties[:1], nodes=64)
    both = optimize(problem, penalties, nodes=64)
    assert both.gradient_norm < 1e-3
    assert both.objective < one.objective
    assert set(both.errors) == {*penalties, "objective"}


def test_errors_are_unknown_where_the_second_set_of_nodes_has_no_solution(problem, monkeypatch):
    class Unsolved(Tangents):
        def __init__(self, problem, discretisation):
            if discretisation.seed:
                raise NoSolutionError("none")
            super().__init__(problem, discretisation)

    monkeypatch.setattr(optimal, "Tangents", Unsolved)
    best = optimize(problem, ["pretraining.penalty"], "effective_noise")
    assert best.optimum["pretraining.penalty"] == pytest.approx(0.1039, abs=1e-4)
    assert best.to_dict()["errors"] == {"pretraining.penalty": None, "objective": None}


@pytest.mark.parametrize(
    ("over", "objective", "within", "words"),
    [
        (["pretraining.penalt"], "effective_noise", None, ["'pretraining.penalt'", "label_noise"]),
        ("label_noise", "effective_noise", None, ["over = 'label_noise'", "one or more"]),
        (["label_noise"] * 2, "effective_noise", None, ["a field occurs twice"]),
        ([], "effective_noise", None, ["over = []", "one or more of"]),
        (["label_noise"], "noise", None, ["objective = 'noise'", '"finetuning.overlap"']),
        (["finetuning.penalty"], "effective_noise", None, ["which it does not change"]),
        (["label_noise"], "effective_noise", {"x": (1, 2)}, ["within.x is not allowed"]),
        (["label_noise"], "effective_noise", {"label_noise": (1, 2)}, ["around its value 0.5"]),
        (["label_noise"], "effective_noise", {"label_noise": "a"}, ["two positive numbers"]),
    ],
)
def test_what_cannot_be_optimised_is_refused_in_one_sentence(
    problem, over, objective, within, words
):
    with pytest.raises(ProblemError) as refused:
        optimize(problem, over, objective, within=within)
    assert all(word in str(refused.value) for word in words), refused.value


def test_an_objective_of_lora_needs_lora(problem):
    alone = problem.replace(finetuning=None)
    with pytest.raises(ProblemError, match="not allowed without fine-tuning"):
        optimize(alone, ["pretraining.penalty"], "finetuning.overlap")
    with pytest.raises(ProblemError, match=r"over = 'finetuning\.penalty' is not allowed"):
        gradient(alone, ["finetuning.penalty"])
