"""Partly re-used sequences and redrawn noise: theory against trained systems."""

import pandas as pd
import pytest

from lora_theory import Finetuning, Pretraining, Problem, compare, predict
from lora_theory.compare import agreements

REUSED = Problem(
    tokens=2,
    activation="linear",
    teacher_rank=0.5,
    label_noise=0.5,
    pretraining=Pretraining(samples=0.2, penalty=0.05),
    finetuning=Finetuning(samples=4.0, penalty=0.2, sequences="reused"),
)
FRESH = REUSED.replace({"finetuning.sequences": "fresh"})
CASES = {
    "half": {"finetuning.reused_fraction": 0.5},
    "new noise": {"finetuning.noise": "redrawn"},
}
#: The training error shows the law of the training sequences, the overlap what is learnt from them.
SEEN = ("train_error", "overlap", "test_error")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "activation"),
    [
        pytest.param("half", "linear", marks=pytest.mark.exhaustive),
        pytest.param("half", "softmax", marks=pytest.mark.exhaustive),
        ("new noise", "linear"), ("new noise", "softmax"),
    ],
)  # fmt: skip
def test_theory_is_the_limit_of_trained_systems(case, activation):
    problem = REUSED.replace(CASES[case], activation=activation)
    found = compare(problem, dims=[32, 48, 80], seeds=12, dtype="float32", nodes=512)
    scores = {a.observable: a.z for a in found.agreements if a.stage == "finetuning"}
    assert max(abs(scores[name]) for name in SEEN) < 4, scores
    # controls: all sequences fresh, or all re-used with their noise
    runs = {run.dim: pd.DataFrame(run.runs) for run in found.simulations}
    for other in (FRESH, REUSED):
        wrong = agreements(predict(other.replace(activation=activation), nodes=512), runs)
        scores = [a.z for a in wrong if a.stage == "finetuning" and a.observable in SEEN]
        assert max(map(abs, scores)) > 5, scores
