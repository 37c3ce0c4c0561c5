"""What is shown, to take away: the problem, and the command and program that compute it again."""

from __future__ import annotations

import dataclasses
import json
import pprint
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from lora_theory.problem import Problem, assign
from lora_theory.spelling import texts_of

__all__ = ["Recipe", "address", "given_fields"]

_PROGRAM = "lora-theory"


def given_fields(problem: Problem) -> dict[str, Any]:
    """The fields that are not at their default, by dotted names."""
    texts_of(problem)  # refuses what no text can hold
    defaults = {spec.name: spec.default for spec in Problem.specs()}
    return {n: value for n, value in problem.to_flat().items() if value != defaults[n]}


def address(problem: Problem) -> dict[str, str]:
    """The fields of a problem as the query of an address.

    Example:
        >>> from urllib.parse import urlencode
        >>> from lora_theory import Pretraining
        >>> problem = Problem(tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.0,
        ...                   pretraining=Pretraining(samples=0.2, penalty=0.1))
        >>> urlencode(address(problem))
        'tokens=2&activation=linear&teacher_rank=0.5&label_noise=0.0&pretraining.samples=...
    """
    texts = texts_of(problem)
    return {name: texts[name] for name in given_fields(problem)}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a view is computed again.

    Args:
        calls: what the program does after ``problem = …``. command: of the shell, its flags of the
            problem left out. varied: in place of a command, the fields that a sweep varies, with
            lists of equal length of their values.
        theory: settings of the theory.
    """

    problem: Problem
    imports: Sequence[str]
    calls: Sequence[str]
    command: Sequence[str] = ()
    varied: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    theory: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def shell(self) -> str:
        """The command; that of a sweep with the file it reads."""
        if self.varied:
            return (
                f"cat > points.toml <<'END'\n{self._spec()}END\n"
                f"{_PROGRAM} sweep points.toml --out points"
            )
        name, *settings = self.command
        flags = [
            word for field, text in address(self.problem).items() for word in (f"--{field}", text)
        ]
        return shlex.join([_PROGRAM, name, *flags, *settings])

    def program(self) -> str:
        """A Python program."""
        nested: dict[str, Any] = {}
        for name, value in given_fields(self.problem).items():
            assign(nested, name, value)
        text = pprint.pformat(nested, sort_dicts=False, width=90)
        head = f"from lora_theory import {', '.join(sorted({'Problem', *self.imports}))}\n\n"
        return f"{head}problem = Problem.from_dict({text})\n" + "\n".join(self.calls) + "\n"

    def _spec(self) -> str:
        lines = ["[problem]"]
        for name, value in given_fields(self.problem).items():
            shown = json.dumps(value if not isinstance(value, tuple) else list(value))
            lines.append(f"{name} = {shown}")
        if self.theory:
            lines += ["", "[theory]", *(f"{name} = {value}" for name, value in self.theory.items())]
        lines += ["", "[zip]"]
        lines += [f"{json.dumps(n)} = {list(values)!r}" for n, values in self.varied.items()]
        return "\n".join(lines) + "\n"
