"""Flags from field definitions, and values from the text of flags.

Every flag takes plain text: :class:`~lora_theory.problem.Problem` and the public calls check the
values, so that a flag, a TOML key and an argument are refused with the same words.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import io
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from lora_theory.problem import FieldSpec, Problem, ProblemError, read_toml
from lora_theory.spelling import number, problem_of_texts

__all__ = ["PROGRAM", "Command", "Given", "Setting", "given", "parse"]

PROGRAM = "lora-theory"
_DESCRIPTION = f"""\
Theory and simulation of the pre-training and rank-one LoRA fine-tuning of attention.
  {PROGRAM} COMMAND --help  flags of a command
  {PROGRAM} --version       version of the package
  exit codes                 0 solved, 1 not converged (result printed), 2 bad input"""
_GROUPS = {
    "teacher": "The matrix S0 behind the labels: by default W0W0ᵀ/√(P0D) of rank teacher_rank.",
    "covariance": "Tokens have a covariance; without these flags they are white.",
    "pretraining": "First stage: W is trained on N sequences, then frozen.",
    "compression": "Ŝ is truncated before it is frozen; without these flags it is not.",
    "finetuning": "Second stage: rank-one LoRA on N' sequences; without these flags there is none.",
    "finetuning.selection": "Its sequences are chosen from a pool; without these flags any are.",
}
_GENERAL = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)


class Setting(NamedTuple):
    """A flag beside the fields of the problem: how to compute, not what is asked."""

    name: str
    meaning: str
    allowed: str = ""
    kind: Literal[
        "integer", "natural", "integers", "number", "text", "texts", "ranges", "switch", "file"
    ] = "text"
    metavar: str = "TEXT"
    default: Any = None  # for the help; the call knows its default itself
    required: bool = False


class Given(NamedTuple):
    """What the user asked for; ``settings`` holds only what was given."""

    problem: Problem | None
    settings: dict[str, Any]
    json: bool


class Command(NamedTuple):
    """A subcommand: its help, its settings, and what it runs."""

    name: str
    help: str
    settings: tuple[Setting, ...]
    run: Callable[[Given], int]
    takes_problem: bool = True
    needs_problem: bool = True
    offers_json: bool = True


def parse(arguments: Sequence[str], commands: Sequence[Command]) -> Any:
    """The parsed flags, as an object of a class named after the command; None if help was printed.

    Raises:
        ProblemError: an unknown flag, a missing value, one argument too many.
    """
    forms: Any = [Annotated[_form(c), tyro.conf.subcommand(name=c.name)] for c in commands]
    complaint, told = io.StringIO(), contextlib.ExitStack()
    if arguments[:1] in (["--help"], ["-h"]):
        told.enter_context(_shortened_usage())
    try:
        with contextlib.redirect_stderr(complaint), told:
            parsed, unknown = tyro.cli(
                functools.reduce(operator.or_, forms),
                prog=PROGRAM,
                description=_DESCRIPTION,
                args=list(arguments),
                config=_GENERAL,
                use_underscores=True,
                return_unknown_args=True,
            )
    except SystemExit as ended:
        if not ended.code:
            return None
        raise ProblemError(_without_box(complaint.getvalue())) from ended
    if unknown:
        command = next(c for c in commands if c.name == type(parsed).__name__)
        raise ProblemError(_unknown(unknown[0], command))
    return parsed


@contextlib.contextmanager
def _shortened_usage() -> Iterator[None]:
    """COMMAND in place of the list of all commands, which the help goes on with."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            yield
    finally:
        print(re.sub(r"\{[\w,]+\}", "COMMAND", text.getvalue(), count=1), end="")


def given(command: Command, parsed: Any) -> Given:
    """Problem and settings from parsed flags.

    Raises:
        ProblemError: a value is not allowed, or a required one is missing.
    """
    settings: dict[str, Any] = {}
    for setting in command.settings:
        value = getattr(parsed, setting.name)
        if value not in (None, (), False):
            settings[setting.name] = _converted(setting, value)
        elif setting.required:
            raise ProblemError(f"{setting.name} is missing: it must be {setting.allowed}")
    problem = _problem(parsed, command.needs_problem) if command.takes_problem else None
    return Given(problem, settings, command.offers_json and parsed.json)


def _problem(parsed: Any, needed: bool) -> Problem | None:
    """The problem of the TOML file, if one is named, its values replaced by the given flags."""
    raw = read_toml(parsed.file) if parsed.file else {}
    texts = {spec.name: operator.attrgetter(spec.name)(parsed) for spec in Problem.specs()}
    if not (needed or parsed.file or any(texts.values())):
        return None
    return problem_of_texts(texts, raw)


def _converted(setting: Setting, value: Any) -> Any:
    if setting.kind == "integers":
        return [_converted(setting._replace(kind="integer"), text) for text in value]
    if setting.kind == "ranges":
        return dict(_range(setting, text) for text in value)
    if setting.kind in ("text", "texts", "switch", "file"):
        return value
    converted = number(value)
    wrong = not isinstance(converted, int) and (
        setting.kind != "number" or isinstance(converted, str)
    )
    if wrong or (setting.kind == "natural" and converted < 0):  # type: ignore[operator]
        raise ProblemError(
            f"{setting.name} = {converted!r} is not allowed: it must be {setting.allowed}"
        )
    return converted


def _range(setting: Setting, text: str) -> tuple[str, tuple[Any, Any]]:
    """A name and two numbers from NAME=LOW:HIGH."""
    name, _, ends = text.partition("=")
    low, colon, high = ends.partition(":")
    if not (name and colon):
        raise ProblemError(
            f"{setting.name} = {text!r} is not allowed: it must be {setting.allowed}"
        )
    return name, (number(low), number(high))


# -- classes for tyro --------------------------------------------------------------------------


def _form(command: Command) -> type:
    """The dataclass whose fields are the flags of a command."""
    fields: list[Any] = []
    if command.takes_problem:
        where = "TOML file with the problem; flags override it"
        fields.append(_field("file", str, "[FILE]", where, positional=True))
        fields += _problem_fields("")
    for setting in command.settings:
        fields.append(_setting_field(setting))
    if command.offers_json:
        fields.append(_field("json", bool, "", "the result as JSON on stdout", default=False))
    form = dataclasses.make_dataclass(command.name, fields)
    form.__doc__ = command.help
    return form


def _problem_fields(group: str) -> list[Any]:
    """The fields of the problem, or of a group of them, and the groups in it."""
    specs = [spec for spec in Problem.specs() if spec.name.rpartition(".")[0] == group]
    fields = [_problem_field(spec) for spec in specs]
    for full, meaning in _GROUPS.items():
        outer, _, name = full.rpartition(".")
        if outer == group:
            table = dataclasses.make_dataclass(name, _problem_fields(full))
            table.__doc__ = meaning
            fields.append((name, table, dataclasses.field(default_factory=table)))
    return fields


def _problem_field(spec: FieldSpec) -> Any:
    return _field(
        spec.name.rpartition(".")[2],
        str,
        f"{{{','.join(spec.choices)}}}" if spec.choices else spec.symbol,
        spec.meaning + ("" if spec.choices else f"; {spec.allowed}"),
        hint="" if spec.default in (dataclasses.MISSING, None) else f"(default: {spec.default})",
    )


def _setting_field(setting: Setting) -> Any:
    kind, default = {
        "switch": (bool, False),
        **dict.fromkeys(("integers", "texts", "ranges"), (tuple[str, ...], ())),
    }.get(setting.kind, (str, None))
    hint = "(required)" if setting.required else ""
    if setting.default is not None:
        hint = f"(default: {setting.default})"
    text = "; ".join(part for part in (setting.meaning, setting.allowed) if part)
    return _field(
        setting.name, kind, setting.metavar, text,
        default=default, hint=hint, positional=setting.kind == "file",
    )  # fmt: skip


def _field(
    name: str,
    kind: Any,
    metavar: str,
    text: str,
    *,
    default: Any = None,
    hint: str = "",
    positional: bool = False,
) -> Any:
    described = tyro.conf.arg(metavar=metavar or None, help=text, help_behavior_hint=hint)
    annotated: Any = Annotated[kind if default is not None else kind | None, described]
    if positional:
        annotated = Annotated[annotated, tyro.conf.Positional]
    return (name, annotated, dataclasses.field(default=default))


# -- the words of a refusal --------------------------------------------------------------------


def _flag_names(command: Command) -> list[str]:
    fields = [f"--{spec.name}" for spec in Problem.specs()] if command.takes_problem else []
    return fields + [f"--{s.name}" for s in command.settings] + ["--json"] * command.offers_json


def _unknown(token: str, command: Command) -> str:
    if not token.startswith("-"):
        return f"{token!r} is one argument too many (see {PROGRAM} {command.name} --help)"
    flag = token.partition("=")[0]
    spelled = "--" + flag.lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(spelled, _flag_names(command), 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return (
        f"{flag} is not a flag of {command.name}: {hint}{PROGRAM} {command.name} --help lists them"
    )


def _without_box(text: str) -> str:
    """What tyro says, without colours, frame and rules."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    plain = re.sub(r"[╭╮╰╯│]|─+|^[+|]|[+|]$|-{4,}", " ", plain, flags=re.MULTILINE)
    lines = [" ".join(line.split()) for line in plain.splitlines()]
    return ". ".join(line.rstrip(".") for line in lines if line) or "the flags cannot be read"
