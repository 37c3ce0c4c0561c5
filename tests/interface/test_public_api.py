"""The public names and their signatures, frozen: changing one is a decision, taken here.

``python tests/interface/test_public_api.py`` writes ``public_api.txt`` anew.
"""

import dataclasses
import enum
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lora_theory
from lora_theory import predict
from lora_theory.lowrank import Gram

FROZEN = Path(__file__).with_name("public_api.txt")
MODULES = (
    "lora_theory",
    "lora_theory.symbolic",
    "lora_theory.lowrank",
    "lora_theory.lowrank.deep_linear",
    "lora_theory.lowrank.spectral",
    "lora_theory.simulation.message_passing",
)


def entries(name: str, thing: Any) -> Iterator[str]:
    """One line for a function; for a class one for itself, each field, each method."""
    if inspect.ismodule(thing):
        return
    if not inspect.isclass(thing):
        yield name + signature(thing)
        return
    fields: dict[str, str] = {}
    if dataclasses.is_dataclass(thing):
        fields = {entry.name: default_of(entry) for entry in dataclasses.fields(thing)}
        by_keyword = all(entry.kw_only for entry in dataclasses.fields(thing))
        yield f"{name}: dataclass" + (" by keyword" if by_keyword else "")
    elif issubclass(thing, enum.Enum):
        fields = {entry.name: f" = {entry.value!r}" for entry in thing}
        yield f"{name}: enumeration"
    elif hasattr(thing, "_fields"):
        fields = dict.fromkeys(thing._fields, "")
        fields |= {field: f" = {value!r}" for field, value in thing._field_defaults.items()}
        yield f"{name}: named tuple"
    elif issubclass(thing, Exception):
        yield f"{name}: {thing.__base__.__name__}"
    else:
        yield name + signature(thing)
    for field, default in fields.items():
        yield f"{name}.{field}{default}"
    for member, value in sorted(vars(thing).items()):
        if member in fields or member.startswith("_"):
            continue
        if isinstance(value, property):
            yield f"{name}.{member}: property"
        elif callable(getattr(thing, member)):
            yield f"{name}.{member}" + signature(getattr(thing, member))


def signature(thing: Callable[..., Any]) -> str:
    """Names, kinds and defaults of the parameters."""
    found = inspect.signature(thing)
    parameters = found.parameters.values()
    return str(
        found.replace(
            parameters=[entry.replace(annotation=inspect.Parameter.empty) for entry in parameters],
            return_annotation=inspect.Signature.empty,
        )
    )


def default_of(entry: dataclasses.Field) -> str:
    if entry.default_factory is not dataclasses.MISSING:
        return f" = {entry.default_factory.__name__}()"
    return "" if entry.default is dataclasses.MISSING else f" = {entry.default!r}"


def current() -> list[str]:
    """The lines of everything public."""
    lines: list[str] = []
    for name in MODULES:
        module = importlib.import_module(name)
        for public in sorted(module.__all__):
            lines += entries(f"{name}.{public}", getattr(module, public))
    return lines


def differences(frozen: list[str], found: list[str]) -> list[str]:
    """What was removed, added and changed, by name."""
    old, new = ({re.split(r"[(: ]", line)[0]: line for line in lines} for lines in (frozen, found))
    said = [f"removed: {old[name]}" for name in old if name not in new]
    said += [f"added: {new[name]}" for name in new if name not in old]
    both = [name for name in old if name in new and old[name] != new[name]]
    return said + [f"changed: {old[name]}\n     to: {new[name]}" for name in both]


def test_public_names_and_signatures_are_the_frozen_ones():
    said = differences(FROZEN.read_text(encoding="utf-8").splitlines(), current())
    assert not said, "\n".join(
        ["the public names are not those of public_api.txt", *said,
         "if this is wanted: python tests/interface/test_public_api.py"]
    )  # fmt: skip


def test_the_frozen_file_is_one_line_per_name_without_addresses():
    lines = FROZEN.read_text(encoding="utf-8").splitlines()
    names = [re.split(r"[(: ]", line)[0] for line in lines]
    assert len(set(names)) == len(names) > 200
    assert not [line for line in lines if " at 0x" in line]


@pytest.mark.parametrize("name", sorted(lora_theory.__all__))
def test_a_public_name_is_no_module_and_has_a_docstring(name):
    assert callable(getattr(lora_theory, name))
    assert getattr(lora_theory, name).__doc__


def _fewer(problem, *, nodes=None, blocks=8, seed=0):
    raise NotImplementedError


def _other_default(problem, *, nodes=None, blocks=9, seed=0, tolerance=1e-10):
    raise NotImplementedError


def _by_position(problem, nodes=None, blocks=8, seed=0, tolerance=1e-10):
    raise NotImplementedError


@pytest.mark.parametrize("other", [_fewer, _other_default, _by_position])
def test_another_signature_is_seen(other):
    (said,) = differences([*entries("predict", predict)], [*entries("predict", other)])
    before, after = said.split("\n")
    assert before == "changed: predict(problem, *, nodes=None, blocks=8, seed=0, tolerance=1e-10)"
    assert after == f"     to: predict{signature(other)}"


def test_other_fields_and_names_are_seen():
    def made(**fields: Any) -> list[str]:
        given = [(name, float, dataclasses.field(default=fields[name])) for name in fields]
        return [*entries("Answer", dataclasses.make_dataclass("Answer", given))]

    assert differences(made(q=0.0, m=1.0), made(q=0.0, m=2.0, v=3.0)) == [
        "added: Answer.v = 3.0",
        "changed: Answer.m = 1.0\n     to: Answer.m = 2.0",
    ]
    assert differences(made(q=0.0), []) == ["removed: Answer: dataclass", "removed: Answer.q = 0.0"]
    assert differences([], [*entries("Gram", Gram)])
    assert differences(current(), current()) == []


if __name__ == "__main__":
    FROZEN.write_text("".join(f"{line}\n" for line in current()), encoding="utf-8")
