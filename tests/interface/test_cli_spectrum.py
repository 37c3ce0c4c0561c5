"""The command about the learned spectrum, and simulations of sampled weights."""

import pytest

from lora_theory import spectrum


def test_spectrum_prints_what_the_call_returns(command, problem, words):
    answer = command("spectrum", *words, "--points", 20, "--dim", 64, "--json")
    assert answer.code == 0
    assert answer.result == spectrum(problem, points=20, dim=64).to_dict()
    assert answer.result["merged"]["dim"] == 64


def test_spectrum_for_people_names_bands_and_outliers(command, words):
    answer = command("spectrum", *words, "--teacher.spikes", "5", "--dim", 64)
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert max(map(len, lines)) <= 100
    values = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    rank, zero = float(values["rank"][0]), float(values["mass_at_zero"][0])
    assert rank + zero == pytest.approx(1, abs=1e-4)
    (spike,) = [words for first, words in values.items() if first == "5"]
    assert float(values["1"][1]) < float(spike[0])  # the band ends below the outlier
    assert "merged LoRA" in answer.out
    without = command("spectrum", *words).out
    assert "merged LoRA" not in without


@pytest.mark.parametrize(
    ("flags", "words_of_refusal"),
    [
        (["--points", 3], "points = 3 is not allowed: it must be an integer ≥ 8"),
        (["--dim", "many"], "dim = 'many' is not allowed: it must be an integer ≥ 1"),
    ],
)
def test_spectrum_refuses_in_one_sentence(command, words, flags, words_of_refusal):
    answer = command("spectrum", *words, *flags)
    assert (answer.code, answer.out) == (2, "")
    assert words_of_refusal in " ".join(answer.err.split())


def test_sampled_weights_from_the_command_line(command, words):
    flags = ["--dim", 16, "--seeds", 2, "--starts", 0, "--pretrained", "sampled"]
    answer = command("simulate", *words, *flags, "--json")
    assert answer.code == 0
    assert answer.result["environment"]["pretrained"] == "sampled"
    assert answer.result["pretraining"]["train_error"]["mean"] is None
    refused = command("simulate", *words, *flags, "--finetuning.sequences", "reused")
    assert refused.code == 2
    assert 'it must be "fresh"' in " ".join(refused.err.split())
