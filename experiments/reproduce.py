"""All figures and their tables: --quick into figures/quick/ (ignored by git), --full into figures/.

Each run says first what it will compute and how long that takes.  Interrupted, the same command
goes on: finished figures are kept, and of most others the finished simulations.  --check computes
the theory of the committed tables again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
from pathlib import Path

import collapse
import contraction
import covariance
import decay
import deep_linear
import figure1
import figure2
import figure3
import figure4
import jax
import lowrank
import manifest
import matplotlib as mpl
import mismatch
import optimal
import phases
import price
import published
import rounds
import selection
import spectra
import validation
from check import check_all
from figure_tools import FULL, QUICK, Experiment, Profile

from lora_theory import ProblemError
from lora_theory.compilation import keep_programs
from lora_theory.files import written_whole
from lora_theory.sweeps.engine import SweepError

MODULES = (
    validation,
    figure1,
    figure2,
    collapse,
    price,
    figure3,
    optimal,
    mismatch,
    figure4,
    selection,
    rounds,
    lowrank,
    decay,
    spectra,
    phases,
    contraction,
    covariance,
    deep_linear,
    published,
)
EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT for module in MODULES
}
FIGURES = Path(__file__).resolve().parent.parent / "figures"
#: About how many seconds each figure takes on two cores, by profile.
TIMES = Path(__file__).resolve().with_name("times.json")


class Refused(Exception):
    """What is asked for cannot be done; the text says why, and what can."""


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    profile = parser.add_mutually_exclusive_group()
    profile.add_argument("--quick", action="store_true", help="small sizes (the default)")
    profile.add_argument("--full", action="store_true", help="publication sizes")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, metavar="FIGURE",
                        help=f"some of {', '.join(EXPERIMENTS)}")  # fmt: skip
    work = parser.add_mutually_exclusive_group()
    work.add_argument("--plan", action="store_true", help="say what would be computed, no more")
    work.add_argument("--redraw", action="store_true", help="from the tables, computing nothing")
    work.add_argument(
        "--theory", action="store_true", help="the theory again; simulations stay as in the tables"
    )
    work.add_argument(
        "--check", action="store_true",
        help="compute theory of the committed tables again, some points of each, and compare",
    )  # fmt: skip
    parser.add_argument("--every", action="store_true", help="with --check: all points")
    options = parser.parse_args(arguments)
    if options.check and options.quick:
        parser.error("--check is for the committed tables, which are those of --full")
    if options.every and not options.check:
        parser.error("--every goes with --check")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    mpl.use("Agg")
    # several processes may share one GPU
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # remarks on dates in font files
    keep_programs(FIGURES / "quick" / "compiled")
    names = [name for name in EXPERIMENTS if not options.only or name in options.only]
    profile = FULL if options.full else QUICK
    folder = FIGURES if options.full else FIGURES / "quick"
    try:
        if options.check:
            return checked(names, every=options.every)
        if options.redraw:
            redraw(names, profile, folder)
            return 0
        if options.theory:
            profile = dataclasses.replace(profile, sources=("theory",))
        computed(names, profile, folder, plan_only=options.plan)
    except json.JSONDecodeError as error:
        say(f"error: manifest.json or unfinished.json in {folder} is damaged: {error}")
        return 2
    except (Refused, ProblemError, SweepError, OSError) as error:
        say(f"error: {error}")
        return 2
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- computing -----------------------------------------------------------------------------------


def computed(names: list[str], profile: Profile, folder: Path, *, plan_only: bool) -> None:
    """Compute and draw; what an interrupted call of the same has finished is not done again."""
    if "simulation" not in profile.sources:
        for name in names:
            known(name, profile, folder)
    unfinished = Unfinished(folder, names, profile)
    left = unfinished.names()
    for line in plan(left, profile, folder):
        say(line)
    if len(left) < len(names):
        say(f"Going on: {len(names) - len(left)} of {len(names)} figures are there already.")
    if plan_only:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(left):
        unfinished.keep(left[place:])
        start = time.perf_counter()
        say(f"{name}: {profile.name} profile …")
        EXPERIMENTS[name].run(profile, folder)
        seconds = time.perf_counter() - start
        manifest.record(folder, name, profile, seconds)
        say(f"{name}: {seconds:.0f} s, in {folder}")
    unfinished.keep([])


def plan(names: list[str], profile: Profile, folder: Path) -> list[str]:
    """What will be computed, and how long that takes: as last time, or on two cores elsewhere."""
    elsewhere, here = json.loads(TIMES.read_text(encoding="utf-8")), manifest.read(folder)
    times: dict[str, float] = {}
    for name in names:
        last = here.get(name, {}).get("computed", {}).get("simulation", {})
        times[name] = last.get("seconds", elsewhere[profile.name][name])
    what = " and ".join(profile.sources)
    total = f"about {duration(sum(times.values()))}"
    if "simulation" not in profile.sources:
        total = f"less than {duration(sum(times.values()))}"
    lines = [
        f"{what} of {len(names)} figures, {profile.name} profile, into {folder}; "
        f"on {jax.devices()[0].device_kind}, {total}:"
    ]
    width = max(map(len, names))
    for module in MODULES:
        name = module.EXPERIMENT.name
        if name in times:
            about = (module.__doc__ or "").partition("\n")[0]
            lines.append(f"  {name:<{width}}  {duration(times[name]):>8}  {about}")
    return lines


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


@dataclasses.dataclass
class Unfinished:
    """Which figures of a call are still to be computed, kept in a file until all are done."""

    folder: Path
    asked: list[str]
    profile: Profile

    @property
    def path(self) -> Path:
        return self.folder / "unfinished.json"

    @property
    def call(self) -> str:
        return " ".join((*self.profile.sources, *self.asked))

    def calls(self) -> dict[str, list[str]]:
        """What every interrupted call left."""
        if not self.path.exists():
            return {}
        found: dict[str, list[str]] = json.loads(self.path.read_text(encoding="utf-8"))
        return found

    def names(self) -> list[str]:
        """Those that an interrupted call like this left, and those whose table is not as it was."""
        left = self.calls().get(self.call, self.asked)
        return [name for name in self.asked if name in left or not whole(name, self.folder)]

    def keep(self, left: list[str]) -> None:
        """Write down what is left; nothing once all is done."""
        calls = self.calls() | {self.call: left}
        calls = {call: names for call, names in calls.items() if names}
        if not calls:
            self.path.unlink(missing_ok=True)
            return
        with written_whole(self.path) as stream:
            json.dump(calls, stream)


# -- from tables ---------------------------------------------------------------------------------


def whole(name: str, folder: Path) -> bool:
    """Whether a table is there, and the one that the manifest names."""
    path, entry = folder / f"{name}.csv", manifest.read(folder).get(name)
    return path.exists() and entry is not None and entry["table"]["sha256"] == manifest.sha256(path)


def known(name: str, profile: Profile, folder: Path, *, changed: bool = False) -> None:
    """Refuse a table that is not there, is not of this profile or, unless allowed, was changed."""
    path = folder / f"{name}.csv"
    if not path.exists():
        raise Refused(
            f"{path} is not there: compute it first, by "
            f"`python experiments/reproduce.py --{profile.name} --only {name}`"
        )
    entry = manifest.read(folder).get(name)
    was = None
    if entry is None:
        was = "not in manifest.json"
    elif entry["profile"] != profile.name:
        was = f"of the {entry['profile']} profile"
    elif not changed and not whole(name, folder):
        was = "not the table that manifest.json names"
    if was is not None:
        raise Refused(
            f"{path} is {was}, and what comes of several profiles is never mixed: compute it "
            f"again, by `python experiments/reproduce.py --{profile.name} --only {name}`"
        )


def redraw(names: list[str], profile: Profile, folder: Path) -> None:
    for name in names:
        known(name, profile, folder)
    for name in names:
        EXPERIMENTS[name].redraw(folder)
        say(f"{name}: drawn from its table in {folder}")


def checked(names: list[str], *, every: bool) -> int:
    """Compute the theory of the committed tables again; 1 if any number does not come out."""
    for name in names:
        known(name, FULL, FIGURES, changed=True)
    say(
        f"theory of {len(names)} tables in {FIGURES}, "
        + ("every point, hours:" if every else "some points of each, at most 10 min on two cores:")
    )
    start, red = time.perf_counter(), 0
    for name in names:
        if not whole(name, FIGURES):
            red += 1
            say(f"{name}: RED, the table is not the one that manifest.json names")
    for verdict in check_all([FIGURES / f"{name}.csv" for name in names], every=every):
        red += len(verdict.deviations)
        say(str(verdict))
        for deviation in verdict.deviations[:5]:
            say(f"  {deviation}")
        if len(verdict.deviations) > 5:
            say(f"  and {len(verdict.deviations) - 5} more")
    word = f"{red} deviations" if red else "all came out again"
    say(f"{word}; {duration(time.perf_counter() - start)}")
    return 1 if red else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say(
            "interrupted: finished figures are kept, and where a folder NAME-runs is beside them "
            "the finished simulations of the next; the same command goes on from there"
        )
        sys.exit(130)
