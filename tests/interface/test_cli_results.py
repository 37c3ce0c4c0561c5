"""Results on the command line: names, numbers, exit codes."""

import dataclasses
import json
import math

import numpy as np
import pytest

from lora_theory import Estimate, Problem, Status, predict, simulation
from lora_theory.observables import FINETUNING, PRETRAINING

STAGE = {"status", "residual", "quadrature_error", "jump_mass"}
JSON_NAMES = {
    "": {"problem", "status", "stability", "pretraining", "effective_noise", "finetuning"}
    | {"branches"},
    "stability": {"pretraining", "finetuning"},
    "problem": {
        "tokens", "activation", "teacher_rank", "label_noise", "inverse_temperature", "teacher",
        "covariance", "pretraining", "compression", "finetuning",
    },
    "pretraining": STAGE
    | {"Q", "M", "V", "Q_hat", "M_hat", "V_hat", "potential"}
    | {"test_error", "train_error", "overlap", "learned_rank"},
    "effective_noise": {"gain", "variance", "delta_eff", "delta_eff_training", "kept_variance"}
    | {"Q", "quadrature_error"},
    "finetuning": STAGE
    | {"q", "m", "v", "q_hat", "m_hat", "v_hat", "potential", "branch", "signal_growth"}
    | {"overlap", "test_error", "train_error", "frozen_test_error"},
}  # fmt: skip


@pytest.fixture(scope="module")
def predicted(command, words, few_nodes):
    return command("predict", *words, *few_nodes, "--json")


def test_json_of_predict_has_the_attribute_names(predicted, problem):
    result = predicted.result
    assert set(result) == JSON_NAMES[""]
    for part in ("problem", "pretraining", "effective_noise", "finetuning"):
        assert set(result[part]) == JSON_NAMES[part], part
    assert all(set(branch) == JSON_NAMES["finetuning"] for branch in result["branches"])
    assert result["problem"] == problem.to_dict()
    for stage, names in (("pretraining", PRETRAINING), ("finetuning", FINETUNING)):
        assert set(names) <= set(result[stage]["quadrature_error"])


def test_json_of_predict_is_to_dict(predicted, problem):
    assert predicted.code == 0
    expected = predict(problem, nodes=64, blocks=2).to_dict()
    assert predicted.result == json.loads(json.dumps(expected))
    assert predicted.result["finetuning"] == predicted.result["branches"][0]


def test_settings_reach_the_theory(command, words, few_nodes, predicted):
    other = command("predict", *words, *few_nodes, "--seed", 1, "--json").result
    assert other["finetuning"]["q"] != predicted.result["finetuning"]["q"]
    assert other["pretraining"] == predicted.result["pretraining"]  # closed forms, no nodes


def test_without_finetuning_fields_there_is_none(command, words, few_nodes):
    first = words[: words.index("--finetuning.samples")]
    result = command("predict", *first, *few_nodes, "--json").result
    assert result["finetuning"] is None
    assert result["branches"] == []
    assert result["problem"]["finetuning"] is None


def test_unreachable_tolerance_is_not_converged_and_still_printed(command, words, few_nodes):
    answer = command("predict", *words, *few_nodes, "--tolerance", 1e-30, "--json")
    assert answer.code == 1
    assert answer.result["status"] == "not_converged"
    assert answer.result["finetuning"]["q"] > 0
    table = command("predict", *words, *few_nodes, "--tolerance", 1e-30)
    assert table.code == 1
    assert " ".join(table.out.split()).startswith(f"status not_converged: {remedy()}")


def remedy() -> str:
    return " ".join(Status.NOT_CONVERGED.remedy.split())


def test_undefined_numbers_are_null_in_json_and_undefined_in_the_table(command, words, few_nodes):
    heavy = [*words, "--pretraining.penalty", 100.0, *few_nodes]
    answer = command("predict", *heavy, "--json")
    assert answer.code == 0
    assert answer.result["pretraining"]["status"] == "collapsed"
    assert answer.result["pretraining"]["overlap"] is None
    assert "undefined" in command("predict", *heavy).out


def test_table_of_predict_shows_the_numbers_with_their_errors(command, words, few_nodes, predicted):
    table = command("predict", *words, *few_nodes).out
    result = predicted.result
    lines = [line.split() for line in table.splitlines()]
    assert ["Q", f"{result['pretraining']['Q']:.6g}"] in lines  # exact, so without an error
    q, error = result["finetuning"]["q"], result["finetuning"]["quadrature_error"]["q"]
    assert ["q", *str(Estimate(q, error, 2)).split()] in lines
    assert lines[0][:2] == ["status", "converged:"]
    branches = [branch["branch"] for branch in result["branches"]]
    assert len(branches) > 1
    first = next(i for i, line in enumerate(lines) if line[:1] == ["branches"])
    assert [line[0] for line in lines[first + 2 :]] == branches


# -- the problem -------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch, problem):
    """The problems that predict is asked to solve; none is solved."""
    seen: list[Problem] = []
    answer = predict(problem, nodes=64, blocks=2)

    def record(problem, **settings):
        seen.append(problem)
        return dataclasses.replace(answer, problem=problem)

    monkeypatch.setattr("lora_theory.theory.predict", record)
    return seen


def test_flags_file_and_constructor_ask_the_same(command, asked, problem, words, tmp_path):
    reused = problem.replace({"finetuning.sequences": "reused", "pretraining.rank": 1.5})
    for index, one in enumerate([problem, reused, problem.replace(finetuning=None)]):
        file = tmp_path / f"{index}.toml"
        one.to_toml(file)
        spelled = [w for name, value in one.to_flat().items() for w in (f"--{name}", value)]
        assert command("predict", file).code == 0
        assert command("predict", *spelled).code == 0
        assert command("predict", *(f"--{n}={v}" for n, v in one.to_flat().items())).code == 0
        assert asked[-3:] == [one, one, one]


def test_flags_override_the_file(command, asked, problem, tmp_path):
    file = tmp_path / "problem.toml"
    problem.to_toml(file)
    command("predict", file, "--pretraining.penalty", 0.3, "--tokens", 3)
    assert asked == [problem.replace({"pretraining.penalty": 0.3}, tokens=3)]
    first = problem.replace(finetuning=None)
    first.to_toml(file)
    command("predict", "--finetuning.samples", 4, "--finetuning.penalty", 0.2, file)
    assert asked[-1] == problem


def test_flag_replaces_a_bad_value_and_completes_a_table(command, asked, problem, tmp_path):
    file = tmp_path / "problem.toml"
    text = problem.to_toml().replace("penalty = 0.1", "penalty = -1").replace("tokens = 2\n", "")
    file.write_text(text, encoding="utf-8")
    assert command("predict", file).code == 2
    assert command("predict", file, "--pretraining.penalty", 0.1, "--tokens", 2).code == 0
    assert asked == [problem]


def test_hyphens_are_as_good_as_underscores(command, asked, problem, words):
    hyphens = [word.replace("_", "-") if word.startswith("--") else word for word in words]
    assert hyphens != words
    assert command("predict", *hyphens).code == 0
    assert asked == [problem]


# -- simulate and compare ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated(command, words, tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "weights.npz"
    size = ["--dim", 8, "--seeds", 2, "--starts", 1, "--seed", 3]
    return command("simulate", *words, *size, "--save", file, "--json"), file


def test_json_of_simulate_holds_estimates_under_the_names_of_the_theory(simulated, problem):
    answer, _ = simulated
    result = answer.result
    assert answer.code == (1 if result["status"] == "not_converged" else 0)
    assert result["problem"] == problem.to_dict()
    assert (result["dim"], result["seeds"], result["environment"]["seed"]) == (8, 2, 3)
    groups = {
        "pretraining": PRETRAINING,
        "effective_noise": ("gain", "variance"),
        "finetuning": FINETUNING,
        "finetuning_random": FINETUNING,
    }
    for group, names in groups.items():
        for name in names:
            estimate = result[group][name]
            assert set(estimate) == {"mean", "error", "count"}
            assert estimate["count"] == 2
            assert math.isfinite(estimate["mean"])
            assert estimate["error"] >= 0


def test_simulate_shows_progress_on_stderr_and_saves_the_weights(simulated):
    answer, file = simulated
    assert "seeds" in answer.err
    with np.load(file) as weights:
        assert weights["W"].shape == (2, 8, 8)
        assert weights["w"].shape == (2, 8)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_one_seed_has_no_error(command, words):
    answer = command("simulate", *words, "--dim", 8, "--seeds", 1, "--starts", 1, "--json")
    assert answer.result["pretraining"]["Q"]["error"] is None


def test_table_of_simulate_shows_the_numbers(command, words, simulated, monkeypatch):
    def with_distinct_mean(*arguments, **settings):
        answer = simulation.api.simulate(*arguments, **settings)
        mean = dataclasses.replace(answer.finetuning_random.start_mean, q=Estimate(7.0, 0.5, 2))
        random = dataclasses.replace(answer.finetuning_random, start_mean=mean)
        return dataclasses.replace(answer, finetuning_random=random)

    monkeypatch.setattr(simulation, "simulate", with_distinct_mean)
    table = command("simulate", *words, "--dim", 8, "--seeds", 2, "--starts", 1, "--seed", 3).out
    result = simulated[0].result
    lines = [line.split() for line in table.splitlines()]
    assert ["M", *str(Estimate(**result["pretraining"]["M"])).split()] in lines
    assert ["q", *str(Estimate(**result["finetuning"]["q"])).split()] in lines
    lowest = str(Estimate(**result["finetuning_random"]["q"]))
    assert ["q", *lowest.split(), "7.00", "±", "0.50"] in lines


def test_missed_gradient_tolerance_is_exit_code_1(command, words, monkeypatch):
    def give_up(*arguments, **settings):
        return simulation.api.simulate(*arguments, **{**settings, "max_iterations": 1})

    monkeypatch.setattr(simulation, "simulate", give_up)
    small = ("simulate", *words, "--dim", 8, "--seeds", 1, "--starts", 0)
    answer = command(*small, "--json")
    assert (answer.code, answer.result["status"]) == (1, "not_converged")
    assert "missed the gradient tolerance" in command(*small).out


def test_compare_puts_both_beside_each_other(command, words, few_nodes):
    first = words[: words.index("--finetuning.samples")]
    arguments = ("compare", *first, "--dims", 8, 12, "--seeds", 2, "--nodes", 64)
    answer = command(*arguments, "--json")
    result = answer.result
    assert {"problem", "status", "agreements", "prediction", "simulations"} == set(result)
    assert [simulation["dim"] for simulation in result["simulations"]] == [8, 12]
    assert answer.code == (1 if result["status"] == "not_converged" else 0)
    agreement = result["agreements"][0]
    assert agreement["theory"] == result["prediction"]["pretraining"][agreement["observable"]]
    table = command(*arguments).out
    shown = str(Estimate(**agreement["simulation"])).split()
    row = next(line.split() for line in table.splitlines() if line.split()[:1] == ["Q"])
    assert row == ["Q", f"{agreement['theory']:.6g}", *shown, f"{agreement['z']:+.1f}"]


@pytest.mark.slow
def test_softmax_has_no_single_effective_noise(command, words, few_nodes):
    first = words[: words.index("--finetuning.samples")]
    result = command("predict", *first, "--activation", "softmax", *few_nodes, "--json").result
    assert result["effective_noise"]["delta_eff"] is None
    assert result["effective_noise"]["delta_eff_training"] is None
    assert result["effective_noise"]["gain"] > 0


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ZeroDivisionError("deep inside"), 70, ["ZeroDivisionError: deep inside", "report"]),
        (MemoryError(), 2, ["not enough memory"]),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 2, ["not enough memory"]),
        (KeyboardInterrupt(), 130, ["lora-theory predict: interrupted"]),
    ],
)
def test_failures_have_exit_codes_of_their_own(command, words, monkeypatch, error, code, said):
    def fail(*arguments, **settings):
        raise error

    monkeypatch.setattr("lora_theory.theory.predict", fail)
    answer = command("predict", *words, "--json")
    assert (answer.code, answer.out) == (code, "")
    assert all(text in answer.err for text in said)
    assert ("Traceback" in answer.err) == (code == 70)
