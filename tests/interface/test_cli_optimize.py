"""The command that looks for an optimum: what it prints, for programs and for people."""

import pytest

from lora_theory import Pretraining, Problem, optimize

PROBLEM = Problem(
    tokens=2,
    activation="linear",
    teacher_rank=0.5,
    label_noise=0.5,
    pretraining=Pretraining(samples=0.2, penalty=0.02),
)
ASKED = ["--over", "pretraining.penalty", "--objective", "effective_noise"]


@pytest.fixture
def file(tmp_path):
    PROBLEM.to_toml(tmp_path / "problem.toml")
    return tmp_path / "problem.toml"


def test_json_holds_what_the_call_returns(command, file):
    answer = command("optimize", file, *ASKED, "--json")
    assert answer.code == 0
    assert answer.result == optimize(PROBLEM, ["pretraining.penalty"], "effective_noise").to_dict()
    assert answer.result["optimum"]["pretraining.penalty"] == pytest.approx(0.1039, abs=1e-4)
    assert answer.result["objective"] == pytest.approx(0.4667, abs=1e-4)
    assert answer.result["gradient_norm"] < 1e-5
    assert answer.result["at_bound"] == []
    assert answer.result["status"] == "converged"


def test_an_optimum_at_the_edge_of_its_box_says_so(command, file):
    box = ["--within", "pretraining.penalty=0.01:0.05"]
    answer = command("optimize", file, *ASKED, *box)
    assert answer.code == 0
    assert "at the end of its box" in answer.out
    assert command("optimize", file, *ASKED, *box, "--json").result["at_bound"] == [
        "pretraining.penalty"
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["over is missing", "names of fields"]),
        (["--over", "penalty"], ["over = 'penalty'", "pretraining.penalty"]),
        (["--over", "label_noise", "--objective", "noise"],
         ["objective = 'noise'", '"pretraining.test_error"']),
        (["--over", "label_noise"], ["without fine-tuning", "finetuning.samples"]),
        ([*ASKED, "--within", "pretraining.penalty"], ["within = ", "FIELD=LOW:HIGH"]),
        ([*ASKED, "--within", "pretraining.penalty=1:x"], ["within.pretraining.penalty", "'x'"]),
    ],
)  # fmt: skip
def test_optimize_refuses_in_one_sentence(command, file, flags, words):
    answer = command("optimize", file, *flags)
    assert answer.code == 2
    assert answer.out == ""
    assert all(word in answer.err for word in words), answer.err
    assert len(answer.err.strip().splitlines()) <= 3
