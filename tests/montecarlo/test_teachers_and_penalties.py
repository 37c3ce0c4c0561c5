"""Narrow factors, given penalties, temperatures, rescaled weights: theory against trained systems.

Other teachers and penalties: test_learned_spectrum.py, test_message_passing.py.
"""

import pytest

from lora_theory import Finetuning, Pretraining, Problem, compare, predict
from lora_theory.compare import agreements

BASE = Problem(
    tokens=2,
    activation="linear",
    teacher_rank=0.5,
    label_noise=0.5,
    pretraining=Pretraining(samples=0.4, penalty=0.1),
    finetuning=Finetuning(samples=4.0, penalty=0.2),
)
CASES = {
    "narrow factor": {"pretraining.rank": 0.3, "pretraining.penalty": 0.05},
    "separable penalty": {
        "pretraining.regularizer": "separable",
        "pretraining.function": "s**4 + 2*abs(s)",
    },
    "temperatures": {"inverse_temperature": 1.5, "teacher.inverse_temperature": 0.8},
    "softmax, temperatures, re-used": {
        "activation": "softmax",
        "inverse_temperature": 1.5,
        "teacher.inverse_temperature": 0.8,
        "finetuning.sequences": "reused",
        "finetuning.rescaling": 0.9,
    },
}
#: Cases that take half a minute.
LONG = ("narrow factor", "softmax, temperatures, re-used")
#: The observables whose finite-D offsets are known powers, and which scatter least.
SEEN = [("pretraining", "overlap"), ("pretraining", "test_error"), ("finetuning", "overlap"),
        ("finetuning", "test_error"), ("pretraining", "train_error")]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.exhaustive] * (name in LONG)) for name in CASES],
)
def test_theory_is_the_limit_of_trained_systems(name):
    problem = BASE.replace(CASES[name])
    found = compare(problem, dims=[32, 48, 80], seeds=10, dtype="float32", nodes=512)
    scores = {(a.stage, a.observable): a.z for a in found.agreements}
    assert max(abs(scores[key]) for key in SEEN) < 4, scores
    # control: the prediction without what this case is about
    plain = predict(BASE.replace(activation=problem.activation), nodes=512)
    runs = {run.dim: run for run in found.simulations}
    import pandas as pd

    wrong = agreements(plain, {dim: pd.DataFrame(run.runs) for dim, run in runs.items()})
    assert max(abs(a.z) for a in wrong if (a.stage, a.observable) in SEEN) > 6
