"""The command about thresholds: reasons beside values, and what it refuses."""

import pytest

from lora_theory import thresholds

ALONE = [
    "--tokens",
    "2",
    "--activation",
    "softmax",
    "--teacher_rank",
    "0.5",
    "--label_noise",
    "0.5",
]
ALONE += ["--pretraining.samples", "0.2", "--pretraining.penalty", "0.1"]


def test_thresholds_prints_what_the_call_returns(command):
    answer = command("thresholds", *ALONE, "--json")
    assert answer.code == 0
    result = answer.result
    assert result["interpolation"] == pytest.approx(0.15348, abs=5e-6)
    assert result["errors"]["interpolation"] == 1e-9
    assert set(result["reasons"]) == {n for n, error in result["errors"].items() if error is None}
    assert all(result[name] is None for name in result["reasons"])


def test_thresholds_for_people_gives_the_reasons(command):
    answer = command("thresholds", *ALONE)
    assert answer.code == 0
    assert max(map(len, answer.out.splitlines())) <= 100
    text = " ".join(answer.out.split())
    assert "ridgeless_Q: pretraining.samples = 0.2 is not below the interpolation" in text
    assert "informed_appears: there is no fine-tuning: give finetuning.samples" in text


@pytest.mark.exhaustive
def test_thresholds_measures_random_starts(command, problem, words):
    flags = ["--dim", 20, "--seeds", 4, "--nodes", 256]
    answer = command("thresholds", *words, *flags, "--json")
    found = thresholds(problem, dim=20, seeds=4, nodes=256)
    assert answer.result == found.to_dict()
    assert found.errors["random_start"] > 0
    assert found.random_start > 0.2


@pytest.mark.parametrize(
    ("flags", "words_of_refusal"),
    [
        (["--dim", 20], "seeds = None is not allowed with dim = 20: give both or neither"),
        (["--seeds", 4], "dim = None is not allowed with seeds = 4: give both or neither"),
        (["--dim", 9, "--seeds", 4], "dim = 9 is not allowed: it must be an integer ≥ 16"),
        (["--dim", 20, "--seeds", 1], "seeds = 1 is not allowed: it must be an integer ≥ 2"),
    ],
)
def test_thresholds_refuses_in_one_sentence(command, words, flags, words_of_refusal):
    answer = command("thresholds", *words, *flags)
    assert (answer.code, answer.out) == (2, "")
    assert words_of_refusal in " ".join(answer.err.split())
