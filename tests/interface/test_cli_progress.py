"""A sign of life after a second, silence before."""

import io
import sys
import time

import pytest
from tqdm import tqdm

from lora_theory.cli.progress import announced


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_short_work_is_silent(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with announced("working", patience=60):
        pass
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("stream", "counting"), [(io.StringIO(), True), (Terminal(), False)])
def test_long_work_says_one_line_in_a_log_and_above_a_bar(monkeypatch, stream, counting):
    monkeypatch.setattr(sys, "stderr", stream)
    with announced("working", counting=counting, patience=0.01, tick=0.01):
        time.sleep(0.3)
    assert stream.getvalue() == "working …\n"


def test_long_work_counts_seconds_on_a_terminal_and_cleans_up(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with announced("working", patience=0.01, tick=0.01):
        time.sleep(0.3)
    assert stream.getvalue().count("\rworking … 0 s") > 1
    assert stream.getvalue().endswith("\r\x1b[K")


def test_work_without_stderr_is_done(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    done = []
    with announced("working", patience=0.0):
        done.append(True)
    assert done


def test_a_bar_that_is_interrupted_while_it_appears_ends_before_the_message(
    command, problem, monkeypatch, tmp_path
):
    def interrupted(bar, *args, **kwargs):
        monkeypatch.undo()
        bar.refresh()
        raise KeyboardInterrupt

    problem.to_toml(tmp_path / "problem.toml")
    monkeypatch.setattr(tqdm, "refresh", interrupted)
    answer = command("simulate", tmp_path / "problem.toml", "--dim", 8, "--seeds", 2)
    assert answer.code == 130
    assert "seeds at D = 8" in answer.err
    assert answer.err.endswith("\nlora-theory simulate: interrupted\n")
