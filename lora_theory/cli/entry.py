"""main: one command from its arguments to its exit code."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from lora_theory.cli.commands import COMMANDS
from lora_theory.cli.exits import Exit
from lora_theory.cli.flags import PROGRAM, given, parse
from lora_theory.problem import ProblemError

__all__ = ["main"]

_LONGEST_MESSAGE = 600


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the arguments are those of the process unless given.

    Returns:
        0 solved, 1 not converged (the result is printed, its status says so), 2 bad input (a
        message on stderr, no result, no file), 130 interrupted.

    Example:
        >>> int(main(["--version"]))
        lora-theory ...
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _show_greek_or_a_substitute()
    try:
        code = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except ProblemError as refusal:
        return _complain(str(refusal), _command_name(arguments))
    except KeyboardInterrupt:
        _end_open_bars()
        _complain("interrupted", _command_name(arguments))
        return Exit.INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return Exit.BROKEN_PIPE
    except OSError as error:
        _forget_stdout()
        _complain(f"the result cannot be written: {error.strerror or error}")
        return Exit.NOT_WRITTEN
    except Exception as error:
        if _out_of_memory(error):
            return _complain("not enough memory for this problem and these settings")
        traceback.print_exc()
        _complain(
            f"if `{PROGRAM} doctor` fails too, the installation is at fault; if not, this is "
            "a bug: please report it with the lines above"
        )
        return Exit.BUG


def _run(arguments: list[str]) -> int:
    if arguments[:1] in (["--version"], ["-V"]):
        print(PROGRAM, _version())
        return Exit.SOLVED
    if arguments[:1] not in (["--help"], ["-h"]):
        _check_command(arguments)
    parsed = parse(arguments, tuple(COMMANDS.values()))
    if parsed is None:
        return Exit.SOLVED
    command = COMMANDS[type(parsed).__name__]
    return command.run(given(command, parsed))


def _end_open_bars() -> None:
    """End the line of a bar that was interrupted while it appeared, and let it write no more."""
    bars = list(sys.modules["tqdm"].tqdm._instances) if "tqdm" in sys.modules else []
    for bar in bars:
        bar.disable = True
    if bars and sys.stderr is not None:
        print(file=sys.stderr)


def _check_command(arguments: list[str]) -> None:
    allowed = f"it must be one of {', '.join(COMMANDS)} (see {PROGRAM} --help)"
    if not arguments:
        raise ProblemError(f"the command is missing: {allowed}")
    name = arguments[0]
    if name not in COMMANDS and not name.startswith("--tyro-"):  # tyro's shell completion
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ProblemError(f"command {name!r} is not allowed: {allowed}{hint}")


def _command_name(arguments: list[str]) -> str:
    return arguments[0] if arguments and arguments[0] in COMMANDS else ""


def _version() -> str:
    try:
        return version("lora-theory")
    except PackageNotFoundError:
        return "(not installed)"


def _complain(message: str, command: str = "") -> int:
    """One message of a few lines on stderr, whatever was in the value it quotes."""
    if sys.stderr is not None:
        who = f"{PROGRAM} {command}".rstrip()
        text = " ".join(message.split())
        if len(text) > _LONGEST_MESSAGE:
            half = _LONGEST_MESSAGE // 2
            text = f"{text[:half]} … {text[-half:]}"
        wrapped = textwrap.wrap(
            f"{who}: {text}", 200, subsequent_indent="  ", break_on_hyphens=False
        )
        with contextlib.suppress(OSError):
            print("\n".join(wrapped), file=sys.stderr, flush=True)
    return Exit.BAD_INPUT


def _show_greek_or_a_substitute() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _forget_stdout() -> None:
    """Keep the interpreter from complaining about the closed pipe when it flushes at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
