"""The README says what is true: its example runs, its table is the Problem, its map exists."""

import re
import tomllib
from dataclasses import MISSING
from pathlib import Path

import pytest

from lora_theory import Problem
from lora_theory.sweeps import SweepSpec

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_runs_and_theory_and_simulation_are_close(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    names: dict = {}
    exec(example, names)
    theory, measured = names["theory"].finetuning, names["measured"].finetuning
    overlap = measured.overlap
    assert abs(overlap.mean - theory.overlap) < 5 * overlap.error + 0.01
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith(f"overlap: theory {theory.overlap:.4f} ± ")
    assert printed[1].endswith(f"D = 60 {overlap}")


def test_the_sweep_is_one():
    (spec,) = re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL)
    asked = SweepSpec.from_dict(tomllib.loads(spec))
    assert len(asked.points) == 3 * 2 * 10
    assert len(asked.tasks()) == 60 * (1 + 2 * 2)


def test_the_notation_table_is_the_problem():
    rows = [line for line in README.splitlines() if line.startswith("| `")]
    table = {
        row.split("|")[1].strip(" `"): [c.strip() for c in row.split("|")[2:-1]] for row in rows
    }
    for spec in Problem.specs():
        symbol, meaning, allowed, default = table[spec.name]
        assert (symbol, meaning, allowed) == (spec.symbol, spec.meaning, spec.allowed)
        assert default == ("" if spec.default in (MISSING, None) else _shown(spec.default))


def _shown(value):
    return f'`"{value}"`' if isinstance(value, str) else f"{value:g}"


def test_everything_on_the_map_exists():
    (block,) = re.findall(r"## Map\n\n(.*?)\n\nMIT", README, flags=re.DOTALL)
    named = set(re.findall(r"[\w/]+\.(?:py|md)|[\w]+/", block))
    assert len(named) > 20
    existing = {
        str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if ".venv" not in path.parts
    }
    for name in named:
        wanted = name.rstrip("/")
        assert any(path == wanted or path.endswith(f"/{wanted}") for path in existing), name


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert target.startswith("http") or (ROOT / target).exists(), target
