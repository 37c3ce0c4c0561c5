"""Compiled programs are dropped before a process holds more than it may, and compiled again."""

from pathlib import Path

import jax
import numpy as np
import pytest

from lora_theory import compilation

pytestmark = pytest.mark.skipif(
    not compilation._MAPS.exists(), reason="only Linux limits memory maps"
)


#: Maps that threads of this process may take or give back meanwhile.
OTHERS = 50


def maps() -> int:
    return compilation._MAPS.read_bytes().count(b"\n")


@pytest.fixture
def programs():
    """Functions whose programs keep at least a memory map each."""
    functions = [jax.jit(lambda x, shift=shift: np.pi * x + shift) for shift in range(20)]
    for function in functions:
        function(np.ones(3))
    return functions


def limit(monkeypatch: pytest.MonkeyPatch, folder: Path, most: int) -> None:
    (folder / "most").write_text(f"{most}\n")
    monkeypatch.setattr(compilation, "_MOST_MAPS", folder / "most")


@pytest.mark.parametrize("entry", [compilation.make_room, lambda: compilation.double_precision()])
def test_programs_are_dropped_when_half_of_the_limit_is_reached(
    programs, entry, monkeypatch, tmp_path
):
    limit(monkeypatch, tmp_path, 2 * maps() - 2 * OTHERS)
    before = maps()
    if (scope := entry()) is not None:
        with scope:
            pass
    assert maps() <= before - len(programs)
    np.testing.assert_allclose(programs[3](np.ones(2)), np.pi + 3, rtol=1e-6)


def test_programs_stay_below_half_of_the_limit(programs, monkeypatch, tmp_path):
    limit(monkeypatch, tmp_path, 2 * maps() + 2 * OTHERS)
    before = maps()
    compilation.make_room()
    assert maps() > before - len(programs)


def test_without_such_a_limit_nothing_is_dropped(programs, monkeypatch, tmp_path):
    monkeypatch.setattr(compilation, "_MOST_MAPS", tmp_path / "absent")
    before = maps()
    compilation.make_room()
    assert maps() >= before


def test_double_precision_holds_inside_alone():
    with compilation.double_precision():
        assert jax.numpy.ones(1).dtype == np.float64
    assert jax.numpy.ones(1).dtype == np.float32
