"""Timings, a table on stdout and JSON in the file given by --json; ratios within one run.

    python benchmarks/run.py [--only PART] [--json FILE]

Every part starts its measurements in fresh processes, one after the other.  With --only, the part
replaces its own entry in FILE and leaves the others.  Threads: all cores, or NPROC.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import batches
import explorer
import floor
import integration
import plain_loop
import simulation
import theory
import torch_adam
from common import Part, environment, table, timed

PARTS = {
    "theory": theory,
    "batches": batches,
    "floor": floor,
    "integration": integration,
    "simulation": simulation,
    "loop": plain_loop,
    "torch": torch_adam,
    "explorer": explorer,
}


def entry(part: Part, seconds: float) -> dict[str, Any]:
    """What the JSON file holds of a part."""
    held: dict[str, Any] = {
        "environment": environment(),
        "seconds": seconds,
        "notes": wrapped(part.notes),
    }
    if part.skipped:
        held["skipped"] = part.skipped
    return held | {"rows": part.rows}


def wrapped(notes: str) -> str:
    paragraphs = notes.strip().split("\n\n")
    return "\n".join(textwrap.fill(" ".join(text.split()), 96) for text in paragraphs)


def show(name: str, part: Part, seconds: float) -> None:
    title = f"{name}, measured in {seconds:.0f} s"
    print(f"\n{title}\n{'-' * len(title)}")
    print(f"skipped: {part.skipped}" if part.skipped else wrapped(part.notes))
    if part.rows:
        print(f"\n{table(part.columns, part.rows)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument(
        "--toy", action="store_true", help="smallest sizes, to see that it runs: no timing counts"
    )
    options = parser.parse_args()
    machine = environment()
    print(f"{machine['cpu']}, cores: {machine['cores']}, threads: {machine['threads']}")
    failed = False
    for name in [options.only] if options.only else PARTS:
        try:
            seconds, part = timed(lambda name=name: PARTS[name].measure(toy=options.toy))
        except RuntimeError as error:
            print(f"\n{name}: {error}", file=sys.stderr)
            failed = True
            continue
        show(name, part, seconds)
        if options.json:
            held = json.loads(options.json.read_text()) if options.json.exists() else {}
            held[name] = entry(part, seconds)
            options.json.write_text(json.dumps(held, indent=1, ensure_ascii=False) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
