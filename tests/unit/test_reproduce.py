"""reproduce.py: says what it will do, goes on where it stopped, keeps profiles apart."""

import json

import figure_tools
import manifest
import pandas as pd
import pytest
import reproduce
from matplotlib.figure import Figure


def drawn(table):
    figure = Figure()
    figure.subplots().plot(table["value"])
    return figure


def toy(name, log, fails=None):
    def compute(profile, store):
        log.append((name, profile.name))
        if fails is not None and fails.pop():
            raise KeyboardInterrupt
        rows = [{"source": source, "value": 1.0} for source in profile.sources]
        return pd.DataFrame([{**row, "tokens": 2, "label_noise": 0.5} for row in rows])

    return figure_tools.Experiment(name, compute, drawn, lambda table: f"{len(table)} rows")


@pytest.fixture
def log(monkeypatch, tmp_path):
    """The figures that were computed, of two toy figures; the second is interrupted once."""
    found = []
    toys = {"figure1": toy("figure1", found), "figure2": toy("figure2", found, [False, True])}
    monkeypatch.setattr(reproduce, "EXPERIMENTS", toys)
    monkeypatch.setattr(reproduce, "FIGURES", tmp_path)
    monkeypatch.setattr(reproduce, "keep_programs", lambda folder: None)
    return found


def test_it_says_what_it_will_compute_and_how_long(log, capsys):
    assert reproduce.main(["--full", "--plan"]) == 0
    said = capsys.readouterr().err
    assert "theory and simulation of 2 figures, full profile" in said
    assert "figure1 " in said
    assert "Published Fig 1's set" in said
    assert log == []


def test_every_figure_has_a_time_in_both_profiles():
    times = json.loads(reproduce.TIMES.read_text(encoding="utf-8"))
    for profile in ("quick", "full"):
        assert set(times[profile]) == set(reproduce.EXPERIMENTS)


def test_an_interrupted_call_goes_on(log, capsys, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        reproduce.main(["--quick"])
    assert (tmp_path / "quick" / "figure1.pdf").exists()
    assert not (tmp_path / "quick" / "figure2.csv").exists()
    assert reproduce.main(["--quick"]) == 0
    assert [name for name, _ in log] == ["figure1", "figure2", "figure2"]
    assert "1 of 2 figures are there already" in capsys.readouterr().err
    assert reproduce.main(["--quick", "--only", "figure1"]) == 0  # whole calls begin again
    assert [name for name, _ in log][3:] == ["figure1"]


def test_profiles_are_not_mixed(log, capsys, tmp_path):
    assert reproduce.main(["--quick", "--only", "figure1"]) == 0
    for name in ("figure1.csv", "manifest.json"):
        (tmp_path / name).write_bytes((tmp_path / "quick" / name).read_bytes())
    for work in ("--theory", "--redraw"):
        assert reproduce.main(["--full", work, "--only", "figure1"]) == 2
        assert "of the quick profile" in capsys.readouterr().err
    assert reproduce.main(["--full", "--redraw", "--only", "figure2"]) == 2
    assert "--full --only figure2" in capsys.readouterr().err
    assert [profile for _, profile in log] == ["quick"]


def test_drawing_again_gives_the_same_files(log, tmp_path):
    assert reproduce.main(["--quick", "--only", "figure1"]) == 0
    files = [tmp_path / "quick" / f"figure1.{kind}" for kind in ("pdf", "png", "md")]
    first = [path.read_bytes() for path in files]
    assert reproduce.main(["--quick", "--redraw", "--only", "figure1"]) == 0
    assert [path.read_bytes() for path in files] == first
    assert b"CreationDate" not in first[0]


def test_the_manifest_says_what_a_table_is_of(log, tmp_path):
    assert reproduce.main(["--quick", "--only", "figure1"]) == 0
    entry = manifest.read(tmp_path / "quick")["figure1"]
    assert entry["table"]["sha256"] == manifest.sha256(tmp_path / "quick" / "figure1.csv")
    assert entry["problems"] == {
        "number": 1, "same": {"tokens": "2", "label_noise": "0.5"}, "varied": {},
    }  # fmt: skip
    assert entry["computed"]["simulation"]["versions"]["jax"]
    before = entry["computed"]["simulation"]
    assert reproduce.main(["--quick", "--theory", "--only", "figure1"]) == 0
    assert manifest.read(tmp_path / "quick")["figure1"]["computed"]["simulation"] == before


def test_the_committed_tables_are_those_of_the_manifest():
    entries = manifest.read(reproduce.FIGURES)
    assert set(entries) == set(reproduce.EXPERIMENTS)
    for name, entry in entries.items():
        path = reproduce.FIGURES / f"{name}.csv"
        assert entry | manifest.described(path, "full") == entry, name


def test_a_changed_table_is_red(log, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "check_all", lambda paths, every: [])
    assert reproduce.main(["--full", "--only", "figure1"]) == 0
    assert reproduce.main(["--check", "--only", "figure1"]) == 0
    table = tmp_path / "figure1.csv"
    table.write_text(table.read_text() + "theory,1,2,0.5\n")
    assert reproduce.main(["--check", "--only", "figure1"]) == 1
    assert "figure1: RED" in capsys.readouterr().err
