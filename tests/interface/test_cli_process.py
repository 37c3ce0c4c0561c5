"""The command line as a process: streams, signals, exit codes, start-up."""

import os
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest

PROGRAM = [sys.executable, "-m", "lora_theory.cli"]
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and pipes")

# the package's own __init__ imports JAX; the command line by itself must not
HELP_WITHOUT_JAX = """
import importlib.util, sys, types
package = types.ModuleType("lora_theory")
package.__path__ = importlib.util.find_spec("lora_theory").submodule_search_locations
package.__file__ = package.__path__[0] + "/__init__.py"
sys.modules["lora_theory"] = package
from lora_theory.cli import main
assert main(["--help"]) == 0
print("loaded:", sorted({"jax", "scipy", "pandas", "matplotlib"} & set(sys.modules)))
"""


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments], capture_output=True, text=True, check=False, **options
    )


def test_version_is_that_of_the_distribution():
    ended = run("--version")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"lora-theory {version('lora-theory')}\n"


def test_bad_input_is_one_message_on_stderr(tmp_path):
    ended = run("predict", "none.toml", "--json", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "lora-theory predict: none.toml cannot be read: No such file or directory\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_help_does_not_wait_for_jax():
    ended = subprocess.run(
        [sys.executable, "-c", HELP_WITHOUT_JAX], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "loaded: []"


@POSIX
def test_closed_pipe_ends_quietly():
    # buffered, as in a shell: what could not be written is tried again when the interpreter ends
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [*PROGRAM, "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 141
    assert errors == ""


@POSIX
def test_interrupt_ends_with_one_line(words, tmp_path):
    size = ["--dim", "40", "--seeds", "100000", "--starts", "0", "--save", "w.npz"]
    process = subprocess.Popen(
        [*PROGRAM, "simulate", *words, *size],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        cwd=tmp_path,
    )
    with process:
        seen = ""
        while "seeds" not in seen:
            character = process.stderr.read(1)
            assert character, seen
            seen += character
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "lora-theory simulate: interrupted"
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's /dev/full")
def test_full_disk_is_said_in_one_line():
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [*PROGRAM, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert ended.returncode == 74
    assert ended.stderr == ("lora-theory: the result cannot be written: No space left on device\n")
