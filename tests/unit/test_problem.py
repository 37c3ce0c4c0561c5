"""The question: one definition, validated once, the same from Python, dictionaries and TOML."""

import functools
import json
import math
import tomllib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_theory import (
    Estimate,
    Finetuning,
    Pretraining,
    Problem,
    ProblemError,
    Selection,
    Teacher,
)
from lora_theory.observables import to_plain

RIGHT = {
    "tokens": 2,
    "activation": "softmax",
    "teacher_rank": 0.5,
    "label_noise": 0.5,
    "pretraining": {"samples": 0.2, "penalty": 0.02},
    "finetuning": {"samples": 3.0, "penalty": 0.2},
}

positive = st.floats(1e-300, 1e300)
problems = st.builds(
    functools.partial,
    st.just(Problem),
    tokens=st.integers(2, 9),
    activation=st.sampled_from(["softmax", "linear"]),
    label_noise=st.floats(0, 1e300),
    inverse_temperature=positive,
    pretraining=st.builds(
        Pretraining,
        samples=positive,
        penalty=positive,
        rank=positive,
        regularizer=st.sampled_from(["weight_decay", "frobenius", "nuclear_norm"]),
    )
    | st.builds(
        Pretraining,
        samples=positive,
        penalty=positive,
        regularizer=st.just("separable"),
        function=st.sampled_from(["abs(s)**1.5 + s**2/2", " (1 +\n s**2)", "minimum(s**2, 1)"]),
    ),
    finetuning=st.none()
    | st.builds(
        Finetuning,
        samples=positive,
        penalty=positive,
        signal=positive,
        rescaling=positive,
    )
    | st.builds(
        Finetuning,
        samples=positive,
        penalty=positive,
        sequences=st.just("reused"),
        reused_fraction=st.none() | st.floats(1e-9, 1.0),
        noise=st.sampled_from([None, "shared", "redrawn"]),
    )
    | st.builds(
        Finetuning,
        samples=st.floats(1e-300, 1.0),
        penalty=positive,
        selection=st.builds(
            Selection,
            pool=st.floats(1.0, 1e300),
            score=st.sampled_from(["uniform", "low_variance", "entropy", "cross_token", "margin"]),
        )
        | st.just(Selection(pool=2.0, score="function", function="cross**2 - entropy")),
    ),
)
spikes = st.none() | st.lists(positive, min_size=1, max_size=3).map(tuple)
common = {"spikes": spikes, "inverse_temperature": positive}
teachers = st.one_of(
    st.fixed_dictionaries({"teacher_rank": positive, "teacher": st.builds(Teacher, **common)}),
    st.builds(Teacher, law=st.just("power_law"), exponent=st.floats(1e-9, 0.49), **common).map(
        lambda teacher: {"teacher": teacher}
    ),
    st.builds(
        Teacher,
        law=st.just("eigenvalues"),
        eigenvalues=st.lists(st.floats(-9, -1), min_size=1).map(tuple),
        **common,
    ).map(lambda teacher: {"teacher": teacher}),
)
problems = st.builds(lambda teacher, rest: rest(**teacher), teachers, problems)

BAD = [
    ("tokens", 1, "integer ≥ 2"),
    ("tokens", 0, "integer ≥ 2"),
    ("tokens", 2.5, "integer ≥ 2"),
    ("tokens", True, "integer ≥ 2"),
    ("activation", "relu", '"softmax" or "linear"'),
    ("activation", 3, '"softmax" or "linear"'),
    ("teacher_rank", 0, "> 0"),
    ("teacher_rank", "1", "> 0"),
    ("label_noise", -1e-9, "≥ 0"),
    ("inverse_temperature", 0, "> 0"),
    ("teacher.law", "uniform", '"wishart", "goe", "power_law" or "eigenvalues"'),
    ("teacher.inverse_temperature", -1, "> 0"),
    ("teacher.spikes", [], "other than 0"),
    ("teacher.spikes", [1.0, 0.0], "other than 0"),
    ("teacher.spikes", "12", "other than 0"),
    ("teacher.eigenvalues", [0.0, 0], "not all 0"),
    ("teacher.eigenvalues", [math.nan, 1.0], "not all 0"),
    ("teacher.exponent", 0.5, "< 0.5"),
    ("pretraining.regularizer", "l1", '"nuclear_norm" or "separable"'),
    ("finetuning.rescaling", 0, "> 0"),
    ("label_noise", math.nan, "≥ 0"),
    ("pretraining.samples", 0.0, "> 0"),
    ("pretraining.penalty", -1, "> 0"),
    ("pretraining.rank", math.inf, "> 0"),
    ("pretraining.rank", None, "> 0"),
    ("finetuning.samples", math.nan, "> 0"),
    ("finetuning.penalty", 0, "> 0"),
    ("finetuning.signal", -math.inf, "> 0"),
    ("finetuning.sequences", "new", '"fresh" or "reused"'),
    ("finetuning.reused_fraction", 0.0, "> 0 and ≤ 1"),
    ("finetuning.reused_fraction", 1.01, "> 0 and ≤ 1"),
    ("finetuning.reused_fraction", 0.5, 'finetuning.sequences = "fresh"'),
    ("finetuning.noise", "new", '"shared" or "redrawn"'),
    ("finetuning.noise", "redrawn", 'finetuning.sequences = "fresh"'),
]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD)
def test_a_bad_value_is_named_with_what_is_allowed(name, value, allowed):
    with pytest.raises(ProblemError) as caught:
        Problem.from_dict(RIGHT).replace({name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} = {value!r} ")
    assert allowed in message
    assert "\n" not in message


def test_one_token_is_for_linear_attention_only():
    assert Problem.from_dict(RIGHT).replace(tokens=1, activation="linear").tokens == 1


@given(problems)
def test_toml_and_dictionaries_give_the_problem_back(problem):
    assert Problem.from_dict(problem.to_dict()) == problem
    assert Problem.from_dict(tomllib.loads(problem.to_toml())) == problem


def test_toml_files(tmp_path):
    path = tmp_path / "problem.toml"
    problem = Problem.from_dict(RIGHT)
    problem.to_toml(path)
    assert Problem.from_toml(path) == problem
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ProblemError, match="not UTF-8"):
        Problem.from_toml(path)
    path.write_text("tokens = [")
    with pytest.raises(ProblemError, match="not valid TOML"):
        Problem.from_toml(path)
    with pytest.raises(ProblemError, match="cannot be read"):
        Problem.from_toml(tmp_path / "absent.toml")


@pytest.mark.parametrize("key", ["colour", "pretraining.colour", "finetuning.colour"])
def test_an_unknown_key_is_refused(key):
    with pytest.raises(ProblemError, match=f"^{key} is not a field"):
        Problem.from_dict(RIGHT).replace({key: 1})


def test_each_law_has_its_own_numbers():
    right = Problem.from_dict(RIGHT)
    power = {"teacher_rank": None, "teacher.law": "power_law", "teacher.exponent": 0.3}
    assert right.replace(power).teacher.exponent == 0.3
    given = {"teacher.law": "eigenvalues", "teacher.eigenvalues": [1, 0.5], "teacher_rank": None}
    assert right.replace(given).teacher.eigenvalues == (1.0, 0.5)
    for name in power:
        with pytest.raises(ProblemError, match=r"is missing: |leave it out"):
            right.replace({n: value for n, value in power.items() if n != name})
    with pytest.raises(ProblemError, match=r"^teacher.exponent = 0.3 is not allowed with"):
        right.replace({"teacher.exponent": 0.3})


@pytest.mark.parametrize("key", ["tokens", "label_noise", "teacher_rank"])
def test_a_missing_key_is_named(key):
    with pytest.raises(ProblemError, match=f"^{key} is missing"):
        Problem.from_dict({name: value for name, value in RIGHT.items() if name != key})


def test_missing_keys_of_the_stages_are_named():
    with pytest.raises(ProblemError, match=r"^pretraining\.samples is missing"):
        Problem.from_dict({**RIGHT, "pretraining": {"penalty": 1.0}})
    with pytest.raises(ProblemError, match=r"^finetuning\.penalty is missing"):
        Problem.from_dict({**RIGHT, "finetuning": {"samples": 1.0}})
    with pytest.raises(ProblemError, match=r"^pretraining = 3 must be a table"):
        Problem.from_dict({**RIGHT, "pretraining": 3})


def test_a_number_too_large_for_a_float_is_refused():
    with pytest.raises(ProblemError, match="label_noise is too large"):
        Problem.from_dict({**RIGHT, "label_noise": 10**400})


def test_numbers_of_numpy_are_normalised():
    problem = Problem.from_dict(
        {**RIGHT, "tokens": np.int64(3), "teacher_rank": np.float32(0.5), "label_noise": 1}
    )
    assert type(problem.tokens) is int
    assert type(problem.teacher_rank) is float
    assert type(problem.label_noise) is float


def test_replace_changes_only_what_is_named():
    problem = Problem.from_dict(RIGHT)
    changed = problem.replace({"finetuning.signal": 2.0}, tokens=3)
    assert (changed.tokens, changed.finetuning.signal) == (3, 2.0)
    assert changed.replace({"finetuning.signal": 1.0}, tokens=2) == problem
    assert problem.replace(finetuning=None).finetuning is None


def test_flat_names_are_those_of_the_specs():
    """Those that are set, in their order."""
    flat = Problem.from_dict(RIGHT).to_flat()
    assert list(flat) == [spec.name for spec in Problem.specs() if spec.name in flat]
    unset = {spec.name for spec in Problem.specs()} - set(flat)
    assert unset == {
        "teacher.exponent", "teacher.eigenvalues", "teacher.spikes", "pretraining.function",
        "pretraining.degree", "pretraining.scale", "covariance.eigenvalues", "covariance.shifted",
        "compression.rank", "compression.whitening", "compression.calibration",
        "finetuning.reused_fraction", "finetuning.noise", "finetuning.selection.pool",
        "finetuning.selection.score", "finetuning.selection.function",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "text"),
    [([1.0, 1.2, 1.1, 1.1], "1.100 ± 0.041"), ([3.0], "3"), ([2.0, 2.0], "2")],
)
def test_an_estimate_is_printed_with_its_error(values, text):
    assert str(Estimate.of(values)) == text


def test_an_estimate_of_many_values_covers_their_mean():
    rng = np.random.default_rng(0)
    estimates = [Estimate.of(rng.normal(2.0, 3.0, 50)) for _ in range(400)]
    covered = np.mean([abs(e.mean - 2.0) < 2 * e.error for e in estimates])
    assert 0.92 < covered < 0.98
    assert estimates[0].count == 50


def test_plain_values_are_strict_json():
    plain = to_plain({"a": [np.float64(1.5), math.nan], "b": Estimate(1.0, None, 1)})
    text = json.dumps(plain, allow_nan=False)
    assert json.loads(text) == {"a": [1.5, None], "b": {"mean": 1.0, "error": None, "count": 1}}
