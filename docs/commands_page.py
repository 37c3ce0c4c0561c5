"""Write docs/commands.md anew from the commands themselves: python docs/commands_page.py."""

from pathlib import Path

from lora_theory.cli.commands import COMMANDS
from lora_theory.cli.flags import PROGRAM, Command

PAGE = Path(__file__).with_name("commands.md")

HEAD = f"""\
# Commands

`make install` puts `{PROGRAM}` into `.venv/bin/`. `{PROGRAM} COMMAND --help` shows the same as this
page, with the flags of the problem.

A problem is a TOML file, flags, or both: flags override the file. Its flags are its fields, by
their dotted names, as in `--pretraining.penalty 0.1`: [Notation](../README.md#notation) lists them
all. Results are tables for people, or with `--json` strict JSON on stdout; bars and messages go to
stderr.

| exit status | |
|---|---|
| 0 | solved |
| 1 | not converged: the numbers are printed, the status says so |
| 2 | bad input: one message, no result, no file |
| 70 | a bug, or a broken installation: `{PROGRAM} doctor` tells which |
| 74 | the result cannot be written; a sweep keeps what is finished |
| 130 | interrupted |
"""


def section(command: Command) -> str:
    """What one command does, and its flags beside those of the problem."""
    problem = "problem.toml" if command.needs_problem else "[problem.toml]"
    files = [setting for setting in command.settings if setting.kind == "file"]
    words = [PROGRAM, command.name, *([problem] if command.takes_problem else [])]
    words += [f"{setting.name}.toml" for setting in files]
    flags = [setting for setting in command.settings if setting not in files]
    for setting in flags:
        if setting.required:
            words += [f"--{setting.name}", setting.metavar]
    text = f"\n## {command.name}\n\n    {' '.join(words)}\n\n{command.help}\n"
    rows = []
    for setting in flags:
        meaning = "; ".join(part for part in (setting.meaning, setting.allowed) if part)
        default = "" if setting.default is None else setting.default
        default = "required" if setting.required else default
        shown = f"--{setting.name} {setting.metavar}".rstrip().replace("|", "\\|")
        rows.append(f"| `{shown}` | {meaning} | {default} |\n")
    if command.offers_json:
        rows.append("| `--json` | the result as JSON on stdout |  |\n")
    head = "\n| flag | meaning | default |\n|---|---|---|\n" if rows else ""
    return text + head + "".join(rows)


def page() -> str:
    """The whole page."""
    return HEAD + "".join(map(section, COMMANDS.values()))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
