"""The table of a figure: whole, and with its theory computed again."""

import dataclasses
import sys
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import figure_tools

    yield figure_tools
    sys.modules.pop("figure_tools")


def experiment(tools, offset: float):
    """Two rows per source; its numbers tell which run they are of."""

    def compute(profile, store) -> pd.DataFrame:
        theory = [{"source": "theory", "x": x, "value": x + offset} for x in (1.0, 2.0)]
        measured = [{"source": "simulation", "x": 1.0, "value": 1.1 + offset, "dim": 48}]
        every = {"theory": theory, "simulation": measured}
        return pd.DataFrame([row for name in profile.sources for row in every[name]])

    return tools.Experiment("toy", compute, lambda _: Figure(), lambda t: f"{len(t)} rows")


def test_theory_again_keeps_the_simulations(tools, tmp_path):
    experiment(tools, 0.0).run(tools.QUICK, tmp_path)
    whole = pd.read_csv(tmp_path / "toy.csv")
    assert whole["value"].tolist() == [1.0, 2.0, 1.1]
    theory_only = dataclasses.replace(tools.QUICK, sources=("theory",))
    experiment(tools, 10.0).run(theory_only, tmp_path)
    again = pd.read_csv(tmp_path / "toy.csv")
    assert again["value"].tolist() == [11.0, 12.0, 1.1]
    assert list(again) == list(whole)
    assert again[again["source"] == "simulation"].equals(whole[whole["source"] == "simulation"])
    assert (tmp_path / "toy.md").read_text(encoding="utf-8") == "3 rows\n"


def test_theory_alone_needs_a_table(tools, tmp_path):
    theory_only = dataclasses.replace(tools.QUICK, sources=("theory",))
    with pytest.raises(FileNotFoundError, match=r"toy\.csv"):
        experiment(tools, 0.0).run(theory_only, tmp_path)
