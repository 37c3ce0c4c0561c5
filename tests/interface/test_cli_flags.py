"""Flags are made from the fields: every field has one, and every value arrives unchanged."""

import inspect

import pytest
from hypothesis import given as forall
from hypothesis import settings
from hypothesis import strategies as st

from lora_theory import Finetuning, Pretraining, Problem, Selection, compare, predict, simulate
from lora_theory.cli.commands import COMMANDS
from lora_theory.cli.flags import given, parse
from lora_theory.spelling import number

positive = st.floats(1e-12, 1e12)
problems = st.builds(
    Problem,
    tokens=st.integers(2, 9),
    activation=st.sampled_from(["softmax", "linear"]),
    teacher_rank=positive,
    label_noise=st.floats(0, 1e12),
    pretraining=st.builds(Pretraining, samples=positive, penalty=positive, rank=positive),
    finetuning=st.none()
    | st.builds(
        Finetuning,
        samples=positive,
        penalty=positive,
        signal=positive,
        sequences=st.sampled_from(["fresh", "reused"]),
    )
    | st.builds(
        Finetuning,
        samples=st.floats(1e-300, 1.0),
        penalty=positive,
        selection=st.builds(
            Selection, pool=st.floats(1.0, 1e300), score=st.sampled_from(["uniform", "margin"])
        )
        | st.just(Selection(pool=2.0, score="function", function="variance - 2*cross")),
    ),
)


@settings(max_examples=30)
@forall(problems)
def test_problem_survives_the_way_through_flags(problem):
    words = [
        word for name, value in problem.to_flat().items() for word in (f"--{name}", str(value))
    ]
    parsed = parse(["predict", *words], tuple(COMMANDS.values()))
    assert given(COMMANDS["predict"], parsed).problem == problem


@forall(st.integers() | st.floats(allow_nan=False))
def test_number_reads_what_python_writes(value):
    read = number(str(value))
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("work", ["predict", "simulate", "compare"])
def test_help_lists_every_field_and_setting(command, work):
    answer = command(work, "--help")
    assert (answer.code, answer.err) == (0, "")
    for spec in Problem.specs():
        assert f"--{spec.name} " in answer.out
    for setting in COMMANDS[work].settings:
        assert f"--{setting.name} " in answer.out
    assert "--json" in answer.out


@pytest.mark.parametrize("call", [predict, simulate, compare])
def test_help_states_the_defaults_of_the_calls(call):
    parameters = inspect.signature(call).parameters
    for setting in COMMANDS[call.__name__].settings:
        default = parameters[setting.name].default
        assert setting.required == (default is inspect.Parameter.empty), setting.name
        assert setting.required or setting.default == default, setting.name


def test_help_lists_the_commands(command):
    answer = command("--help")
    assert (answer.code, answer.err) == (0, "")
    for name in ("predict", "simulate", "compare", "explore", "figures", "doctor"):
        assert f" {name} " in answer.out
    assert max(map(len, answer.out.splitlines())) <= 100
