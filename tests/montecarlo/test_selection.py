"""Fine-tuning on sequences chosen from a pool: theory against trained systems."""

import pandas as pd
import pytest

from lora_theory import Finetuning, Pretraining, Problem, Selection, compare, predict
from lora_theory.compare import agreements

BASE = Problem(
    tokens=2,
    activation="linear",
    teacher_rank=0.5,
    label_noise=0.5,
    pretraining=Pretraining(samples=0.2, penalty=0.05),
    finetuning=Finetuning(samples=4.0, penalty=0.2, selection=Selection(pool=80.0)),
)
SCORE, RESCALING = "finetuning.selection.score", "finetuning.rescaling"
#: Frozen weights twice too large leave linear attention much to choose; and the number of runs.
CASES = {
    "linear, low variance": ({"activation": "linear", RESCALING: 2.0}, 12),
    "softmax, large cross-token logit": ({"activation": "softmax", SCORE: "cross_token"}, 32),
}
#: The training error shows the law of the training sequences, the overlap what is learnt from them.
SEEN = ("train_error", "overlap", "test_error")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "linear, low variance",
        pytest.param("softmax, large cross-token logit", marks=pytest.mark.exhaustive),
    ],
)
def test_theory_is_the_limit_of_trained_systems(case):
    changes, seeds = CASES[case]
    problem = BASE.replace(changes)
    found = compare(problem, dims=[32, 48, 80], seeds=seeds, dtype="float32", nodes=1024)
    scores = {a.observable: a.z for a in found.agreements if a.stage == "finetuning"}
    assert max(abs(scores[name]) for name in SEEN) < 4, scores
    # controls: any sequences, and those of highest score
    runs = {run.dim: pd.DataFrame(run.runs) for run in found.simulations}
    opposite = {"linear": "-variance", "softmax": "cross"}[problem.activation]
    for other in (
        {SCORE: "uniform"},
        {SCORE: "function", "finetuning.selection.function": opposite},
    ):
        wrong = agreements(predict(problem.replace(other), nodes=1024), runs)
        scores = [a.z for a in wrong if a.stage == "finetuning" and a.observable in SEEN]
        assert max(map(abs, scores)) > 5, scores
