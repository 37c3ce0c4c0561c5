"""The two commands about the installation and the checkout."""

import contextlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import pytest

from lora_theory import doctor
from lora_theory.cli import commands

SCRIPT = """
import json, pathlib, sys
pathlib.Path(__file__).with_name("seen.json").write_text(json.dumps(sys.argv[1:]))
sys.exit({code})
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "_checkout", lambda: tmp_path)
    return tmp_path


def write_script(checkout: Path, code: int = 0) -> Path:
    folder = checkout / "experiments"
    folder.mkdir(exist_ok=True)
    (folder / "reproduce.py").write_text(SCRIPT.format(code=code))
    return folder / "seen.json"


def test_figures_elsewhere_needs_a_checkout(command, checkout):
    answer = command("figures")
    assert (answer.code, answer.out) == (2, "")
    assert "needs a checkout" in answer.err
    assert str(checkout) in answer.err


@pytest.mark.parametrize(
    ("flags", "passed"),
    [
        ([], ["--quick"]),
        (["--quick"], ["--quick"]),
        (["--full", "--only", "figure1"], ["--full", "--only", "figure1"]),
    ],
)
def test_figures_runs_the_script_of_the_checkout(command, checkout, flags, passed):
    seen = write_script(checkout)
    assert command("figures", *flags).code == 0
    assert json.loads(seen.read_text()) == passed


@pytest.mark.parametrize(("code", "expected"), [(1, 1), (2, 2), (130, 130)])
def test_figures_passes_the_exit_code_on(command, checkout, code, expected):
    write_script(checkout, code)
    assert command("figures").code == expected


def test_this_checkout_has_the_script():
    assert commands._checkout() == Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def examined(command):
    return command("doctor", "--json")


def test_doctor_finds_this_installation_in_order(examined):
    assert examined.code == 0
    result = examined.result
    assert result["ok"] is True
    assert result["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert result["versions"]["jax"] == version("jax")
    assert {"lora-theory", "numpy", "scipy", "jaxlib"} <= set(result["versions"])
    assert result["devices"]
    assert result["default_precision"] == "float32"
    assert len(result["checks"]) == 3
    assert all(check["ok"] for check in result["checks"])


def test_doctor_finds_a_wrong_number(command, monkeypatch):
    monkeypatch.setitem(doctor._REFERENCE, "Q", 1.71)
    answer = command("doctor")
    assert answer.code == 1
    assert "FAILED: expected Q 1.7100" in answer.out
    assert "does not work" in answer.out


def test_doctor_reports_a_check_that_raises(command, monkeypatch):
    def broken():
        raise RuntimeError("no backend")

    monkeypatch.setattr(doctor, "_CHECKS", {"backend": broken})
    answer = command("doctor")
    assert answer.code == 1
    assert "RuntimeError: no backend" in answer.out
    assert "Traceback" not in answer.out + answer.err


def test_doctor_finds_lost_precision(command, monkeypatch):
    monkeypatch.setattr(jax, "enable_x64", lambda on: contextlib.nullcontext())
    monkeypatch.setattr(doctor, "_CHECKS", {"64-bit precision": doctor._precision})
    assert command("doctor").code == 1


def test_doctor_reports_that_no_device_is_usable(command, monkeypatch):
    def none(*_):
        raise AssertionError

    monkeypatch.setattr(jax, "devices", none)
    monkeypatch.setattr(doctor, "_CHECKS", {})
    assert "none that JAX can use (AssertionError)" in command("doctor").out
