"""Bad input: a few lines that name field, value and what is allowed; exit 2, nothing else."""

import math
import sys
from pathlib import Path

import jax
import pytest

from lora_theory import Problem

BIG = "1" + 400 * "0"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_refused(answer, *mentioned: str) -> None:
    assert answer.code == 2, answer
    assert answer.out == ""
    lines = [line for line in answer.err.splitlines() if not line.endswith(" …")]  # progress
    assert 1 <= len(lines) <= 4, answer.err
    assert all(len(line) <= 200 for line in lines)
    assert lines[0].startswith("lora-theory")
    assert "Traceback" not in answer.err
    message = " ".join(answer.err.split())
    for text in mentioned:
        assert text in message, (text, message)


def with_flag(words: list[str], name: str, value: str) -> list[str]:
    """The flags of a good problem, one of them replaced."""
    changed = list(words)
    changed[words.index(f"--{name}") + 1] = value
    return changed


POSITIVE = (
    "teacher_rank",
    "pretraining.samples",
    "pretraining.penalty",
    "pretraining.rank",
    "finetuning.samples",
    "finetuning.penalty",
    "finetuning.signal",
)
# field, value as TOML spells it, how the message shows the value, what it says is allowed
VALUES = [
    *[(name, "0", "0", "> 0 and finite") for name in POSITIVE],
    *[(name, "-0.5", "-0.5", "> 0 and finite") for name in POSITIVE],
    *[(name, "nan", "nan", "> 0 and finite") for name in POSITIVE],
    *[(name, "inf", "inf", "> 0 and finite") for name in POSITIVE],
    ("pretraining.penalty", "-inf", "-inf", "> 0 and finite"),
    ("pretraining.penalty", '"half"', "'half'", "> 0"),
    ("pretraining.penalty", '""', "''", "> 0"),
    ("label_noise", "-1e-9", "-1e-09", "≥ 0 and finite"),
    ("label_noise", "nan", "nan", "≥ 0 and finite"),
    ("label_noise", "inf", "inf", "≥ 0 and finite"),
    ("label_noise", '"none"', "'none'", "≥ 0"),
    ("tokens", "0", "0", "an integer ≥ 2"),
    ("tokens", "-2", "-2", "an integer ≥ 2"),
    ("tokens", "2.0", "2.0", "an integer ≥ 2"),
    ("tokens", "2.5", "2.5", "an integer ≥ 2"),
    ("tokens", "nan", "nan", "an integer ≥ 2"),
    ("tokens", "inf", "inf", "an integer ≥ 2"),
    ("tokens", '"two"', "'two'", "an integer ≥ 2"),
    ("activation", '"gelu"', "'gelu'", '"softmax" or "linear"'),
    ("activation", '"Softmax"', "'Softmax'", '"softmax" or "linear"'),
    ("finetuning.sequences", '"stale"', "'stale'", '"fresh" or "reused"'),
    ("finetuning.sequences", '""', "''", '"fresh" or "reused"'),
]


@pytest.mark.parametrize(("name", "value", "shown", "allowed"), VALUES)
def test_bad_value_is_refused_with_the_same_words_in_a_flag_and_in_a_file(
    command, problem, words, folder, name, value, shown, allowed
):
    flagged = command("predict", *with_flag(words, name, value.strip('"')))
    assert_refused(flagged, f"{name} = {shown} is not allowed", f"must be {allowed}")

    file = folder / "problem.toml"
    good = problem.to_toml()
    table, _, key = name.rpartition(".")
    head, bracket, body = good.partition(f"[{table}]") if table else ("", "", good)
    line = next(line for line in body.splitlines() if line.startswith(f"{key} = "))
    file.write_text(head + bracket + body.replace(line, f"{key} = {value}", 1), encoding="utf-8")
    filed = command("predict", file)
    assert filed == flagged
    assert list(folder.iterdir()) == [file]


def test_one_token_needs_linear_attention(command, words):
    softmax = with_flag(words, "activation", "softmax")
    for tokens in ("1", "0"):
        answer = command("predict", *with_flag(softmax, "tokens", tokens))
        assert_refused(answer, f"tokens = {tokens}", "≥ 2")
    answer = command("simulate", *with_flag(softmax, "tokens", "1"), "--dim", 16, "--seeds", 1)
    assert_refused(answer, "tokens = 1", "activation = 'softmax'")


def test_number_beyond_floats_is_refused_in_few_lines(command, words):
    answer = command("predict", *with_flag(words, "teacher_rank", BIG))
    assert_refused(answer, "teacher_rank = inf")
    answer = command("predict", *with_flag(words, "activation", "x" * 100_000))
    assert_refused(answer, "activation = 'xxx", "must be")


FILES = {
    "empty": (b"", ["is missing", "> 0"]),
    "truncated": (b'tokens = 2\nactivation = "lin', ["is not valid TOML"]),
    "no UTF-8": (b'tokens = 2\nactivation = "\xff\xfe"\n', ["is not UTF-8 text"]),
    "unknown key": (
        b"tokens = 2\ntoken = 3\n[pretraining]\nsamples = 1.0\npenalty = 1.0\n",
        ["token is not a field", "tokens, activation"],
    ),
    "unknown key in a table": (
        b"[pretraining]\nsamples = 1.0\npenalty = 1.0\nwidth = 2\n",
        ["pretraining.width is not a field", "samples, penalty, rank"],
    ),
    "missing key in a table": (
        b"[pretraining]\nsamples = 1.0\n",
        ["pretraining.penalty is missing", "> 0"],
    ),
    "number for a table": (b"pretraining = 3\n", ["pretraining = 3", "[pretraining]"]),
    "truth for a number": (
        b"[pretraining]\nsamples = true\npenalty = 1.0\n",
        ["pretraining.samples = True", "> 0"],
    ),
    "list for a number": (
        b"[pretraining]\nsamples = [1.0]\npenalty = 1.0\n",
        ["pretraining.samples = [1.0]", "> 0"],
    ),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("work", ["predict", "simulate"])
def test_bad_file_is_refused(command, folder, case, work):
    content, mentioned = FILES[case]
    file = folder / "problem.toml"
    file.write_bytes(content)
    size = ["--dim", 16, "--seeds", 1, "--save", "w.npz"] if work == "simulate" else []
    assert_refused(command(work, "problem.toml", *size), *mentioned)
    assert list(folder.iterdir()) == [file]


def test_file_that_cannot_be_read_is_refused(command, folder):
    assert_refused(command("predict", "none.toml"), "none.toml", "No such file")
    assert_refused(command("predict", folder), str(folder), "directory")
    assert_refused(command("predict", "a" * 5000), "cannot be read")
    assert list(folder.iterdir()) == []


# command, its settings, what the message mentions
SETTINGS = [
    ("predict", ["--nodes", "100"], ["nodes = 100", "a power of two ≥ 16"]),
    ("predict", ["--nodes", "8"], ["nodes = 8", "a power of two ≥ 16"]),
    ("predict", ["--nodes", "64.0"], ["nodes = 64.0", "a power of two ≥ 16"]),
    ("predict", ["--nodes", "many"], ["nodes = 'many'", "a power of two ≥ 16"]),
    ("predict", ["--blocks", "1"], ["blocks = 1", "an integer ≥ 2"]),
    ("predict", ["--blocks", "nan"], ["blocks = nan", "an integer ≥ 2"]),
    ("predict", ["--seed", "-1"], ["seed = -1", "an integer ≥ 0"]),
    ("predict", ["--seed", "x"], ["seed = 'x'", "an integer ≥ 0"]),
    ("predict", ["--tolerance", "0"], ["tolerance = 0"]),
    ("predict", ["--tolerance", "nan"], ["tolerance = nan"]),
    ("predict", ["--tolerance", "tiny"], ["tolerance = 'tiny'"]),
    ("simulate", ["--seeds", "1"], ["dim is missing", "an integer ≥ 4"]),
    ("simulate", ["--dim", "16"], ["seeds is missing", "an integer ≥ 1"]),
    ("simulate", ["--dim", "3", "--seeds", "1"], ["dim = 3", "an integer ≥ 4"]),
    ("simulate", ["--dim", "-16", "--seeds", "1"], ["dim = -16", "an integer ≥ 4"]),
    ("simulate", ["--dim", "16.5", "--seeds", "1"], ["dim = 16.5", "an integer ≥ 4"]),
    ("simulate", ["--dim", "big", "--seeds", "1"], ["dim = 'big'", "an integer ≥ 4"]),
    ("simulate", ["--dim", "16", "--seeds", "0"], ["seeds = 0", "an integer ≥ 1"]),
    ("simulate", ["--dim", "16", "--seeds", "1.5"], ["seeds = 1.5", "an integer ≥ 1"]),
    ("simulate", ["--dim", "16", "--seeds", "1", "--seed", "-1"], ["seed = -1", "an integer"]),
    ("simulate", ["--dim", "16", "--seeds", "1", "--seed", str(2**32)], [f"seed = {2**32}"]),
    ("simulate", ["--dim", "16", "--seeds", "1", "--starts", "-1"], ["starts = -1", "≥ 0"]),
    (
        "simulate",
        ["--dim", "16", "--seeds", "1", "--dtype", "float16"],
        ["dtype = 'float16'", '"float32" or "float64"'],
    ),
    ("simulate", ["--dim", "16", "--seeds", "1", "--device", "tpu"], ["device = 'tpu'", '"cpu"']),
    ("compare", ["--seeds", "2"], ["dims is missing", "integers ≥ 4"]),
    ("compare", ["--dims", "--seeds", "2"], ["dims is missing", "integers ≥ 4"]),
    ("compare", ["--dims", "16", "x", "--seeds", "2"], ["dims = 'x'", "integers ≥ 4"]),
    ("compare", ["--dims", "16", "24.5", "--seeds", "2"], ["dims = 24.5", "integers ≥ 4"]),
    ("compare", ["--dims", "16", "16", "--seeds", "2"], ["dims = [16, 16]", "different"]),
    ("compare", ["--dims", "3", "--seeds", "2"], ["dim = 3", "an integer ≥ 4"]),
    ("compare", ["--dims", "16", "--seeds", "1"], ["seeds = 1", "2"]),
    ("compare", ["--dims", "16"], ["seeds is missing", "an integer ≥ 2"]),
]


@pytest.mark.parametrize(("work", "settings", "mentioned"), SETTINGS)
def test_bad_setting_is_refused(command, words, folder, work, settings, mentioned):
    assert_refused(command(work, *words, *settings), *mentioned)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "mentioned"),
    [
        ("teacher_rank", "0.01", ["teacher_rank = 0.01"]),
        ("pretraining.rank", "0.01", ["pretraining.rank = 0.01"]),
        ("pretraining.samples", "0.001", ["pretraining.samples = 0.001"]),
        ("finetuning.samples", "0.01", ["finetuning.samples = 0.01"]),
    ],
)
def test_dimension_too_small_for_the_counts_is_refused(command, words, name, value, mentioned):
    answer = command("simulate", *with_flag(words, name, value), "--dim", 16, "--seeds", 1)
    assert_refused(answer, "dim = 16 is too small", *mentioned)


def test_reusing_more_sequences_than_there_are_is_refused(command, problem, words):
    dim = math.floor(problem.finetuning.samples / problem.pretraining.samples) - 2
    reused = with_flag(words, "finetuning.sequences", "reused")
    answer = command("simulate", *reused, "--dim", dim, "--seeds", 1)
    assert_refused(answer, 'finetuning.sequences = "reused"', f"dim = {dim}")


@pytest.mark.skipif(
    any(device.platform == "gpu" for device in jax.devices()), reason="there is a GPU here"
)
def test_absent_device_is_refused(command, words):
    answer = command("simulate", *words, "--dim", 16, "--seeds", 1, "--device", "gpu")
    assert_refused(answer, "device = 'gpu'", "cpu")


@pytest.mark.parametrize(
    "save",
    [
        "weights.txt",
        "no/such/folder/weights.npz",
        "folder.npz",
        "w" * 300 + ".npz",
        pytest.param(
            "/proc/weights.npz",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux's /proc"),
        ),
    ],
)
def test_save_that_cannot_be_written_is_refused_before_the_work(
    command, words, folder, save, monkeypatch
):
    monkeypatch.setattr("lora_theory.simulation.simulate", None)  # work would raise
    (folder / "folder.npz").mkdir()
    answer = command("simulate", *words, "--dim", 16, "--seeds", 1, "--save", save)
    assert_refused(answer, "save = ", "is not allowed")
    assert [path.name for path in folder.iterdir()] == ["folder.npz"]


@pytest.mark.parametrize(
    ("arguments", "mentioned"),
    [
        ([], ["command is missing", "predict, simulate"]),
        (["predct"], ["'predct'", "did you mean predict"]),
        (["--json", "predict"], ["--json"]),
        (["predict", "--pretraining.penalti", "0.1"], ["did you mean --pretraining.penalty?"]),
        (["predict", "--tok", "2"], ["--tok is not a flag", "did you mean --tokens?"]),
        (["predict", "--dim", "16"], ["--dim is not a flag of predict"]),
        (["predict", "-x"], ["-x is not a flag"]),
        (["predict", "a.toml", "b.toml"], ["'b.toml'", "too many"]),
        (["predict", "--tokens"], ["--tokens"]),
        (["predict", "--tokens", "--json"], ["--tokens"]),
        (["figures", "--quick", "--full"], ["quick", "full"]),
        (["figures", "fig1"], ["'fig1'", "too many"]),
        (["doctor", "--verbose"], ["--verbose is not a flag of doctor"]),
    ],
)
def test_bad_command_line_is_refused(command, folder, arguments, mentioned):
    assert_refused(command(*arguments), *mentioned)
    assert list(folder.iterdir()) == []


def test_the_unchanged_problem_is_accepted(problem, words):
    """The control of this file: what the cases change is what is refused."""
    assert Problem.from_dict(problem.to_dict()) == problem
    assert len(words) == 2 * len(problem.to_flat())
