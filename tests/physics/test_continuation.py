"""Branches along a field: against predict, through a fold, and what is refused."""

import numpy as np
import pytest

from lora_theory import Finetuning, Pretraining, Problem, ProblemError, continuation, predict

LINEAR = Problem(
    tokens=2,
    activation="linear",
    teacher_rank=0.5,
    label_noise=0.5,
    pretraining=Pretraining(samples=0.2, penalty=0.02),
    finetuning=Finetuning(samples=3.0, penalty=0.2),
)
#: One token, as in phase retrieval: coexistence at strong overlap.
FOLDED = LINEAR.replace(
    {
        "pretraining.samples": 2.0, "finetuning.samples": 2.5, "finetuning.penalty": 0.05,
        "label_noise": 0.02,
    },
    tokens=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("over", "within"),
    [("label_noise", (0.3, 0.8)), ("pretraining.samples", (0.15, 0.3)),
     ("finetuning.penalty", (0.1, 0.4))],
)  # fmt: skip
def test_points_are_predictions(over, within):
    curve = continuation(LINEAR, over, within=within, nodes=64, tolerance=1e-10)
    assert curve.ends == ("the end of the range",) * 2
    assert curve.values == tuple(sorted(curve.values))
    assert within[0] <= curve.values[0] < 1.2 * within[0]
    for place in (0, len(curve.values) // 2, -1):
        found = curve.predictions[place]
        known = predict(LINEAR.replace({over: curve.values[place]}), nodes=64).finetuning
        for name in ("q", "m", "v", "overlap", "test_error", "potential"):
            assert getattr(found, name) == pytest.approx(getattr(known, name), rel=1e-6), name
            errors = found.quadrature_error[name], known.quadrature_error[name]
            assert errors[0] == pytest.approx(errors[1], rel=0.05)
        assert found.status is known.status
    ends = curve.predictions[0], curve.predictions[-1]
    assert abs(ends[0].test_error - ends[1].test_error) > 0.005, "nothing was varied"


def test_pretraining_along_its_penalty():
    curve = continuation(LINEAR, "pretraining.penalty", within=(0.01, 0.1), branch="pretraining")
    for value, found in zip(curve.values[::3], curve.predictions[::3], strict=True):
        problem = LINEAR.replace({"pretraining.penalty": value}, finetuning=None)
        known = predict(problem).pretraining
        for name in ("Q", "M", "V", "test_error"):
            assert getattr(found, name) == pytest.approx(getattr(known, name), rel=1e-6)
    table = curve.table
    assert np.all(np.diff(table["pretraining.penalty"]) > 0)
    assert np.all(np.diff(table["Q"]) < 0)


@pytest.mark.slow
def test_coexistence_between_a_fold_and_the_exchange():
    """Two roots above the fold; the upper one is the branch that predict finds, none below it."""
    curve = continuation(FOLDED, "finetuning.samples", within=(1.2, 4.0), nodes=1024)
    assert len(curve.folds) >= 1
    fold = curve.folds[-1]
    assert fold == pytest.approx(1.50, abs=0.03)
    table = curve.table
    samples, overlap = table["finetuning.samples"], table["overlap"]
    near = overlap[samples < 1.02 * fold]
    assert near.max() - near.min() > 0.015, "both sides of the fold"
    assert overlap.iloc[-1] > 0.99
    assert np.all(samples > 0.98 * fold)
    assert set(table["status"][samples > 1.1 * fold]) == {"converged"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"over": "tokens"}, "over = 'tokens' is not allowed: it must be one of teacher_rank"),
        ({"over": "finetuning.penalti"}, "it must be one of"),
        ({"within": (0.3, 0.5)}, "two positive numbers around finetuning.penalty = 0.2"),
        ({"within": 3}, "two positive numbers"),
        ({"within": (-1.0, 0.5)}, "two positive numbers"),
        ({"branch": "best"}, 'one of "pretraining", "informed", "uninformed"'),
        ({"problem": LINEAR.replace(finetuning=None)}, "without fine-tuning"),
        (
            {"problem": LINEAR.replace({"finetuning.samples": 0.1})},
            'branch = "informed" is not allowed here',
        ),
        (
            {"branch": "pretraining"},
            "over = 'finetuning.penalty' is not allowed",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(arguments, words):
    given = {"problem": LINEAR, "over": "finetuning.penalty", "within": (0.1, 0.3)} | arguments
    with pytest.raises(ProblemError) as caught:
        continuation(given.pop("problem"), given.pop("over"), nodes=64, **given)
    assert words in str(caught.value)
