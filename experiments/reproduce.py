"""Compute and draw all figures: --quick into figures/quick/ (ignored), --full into figures/."""

from __future__ import annotations

import argparse
import dataclasses
import logging
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
import lowrank
import matplotlib as mpl
import mismatch
import optimal
import phases
import price
import published
import rounds
import selection
import spectra
from figure_tools import FULL, QUICK

from lora_theory.compilation import keep_programs

EXPERIMENTS = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
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
}
FIGURES = Path(__file__).resolve().parent.parent / "figures"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    profile = parser.add_mutually_exclusive_group()
    profile.add_argument("--quick", action="store_true", help="small sizes (the default)")
    profile.add_argument("--full", action="store_true", help="publication sizes")
    parser.add_argument("--only", choices=EXPERIMENTS, help="one figure")
    work = parser.add_mutually_exclusive_group()
    work.add_argument("--redraw", action="store_true", help="from the tables, computing nothing")
    work.add_argument(
        "--theory", action="store_true", help="the theory again; simulations stay as in the tables"
    )
    options = parser.parse_args()
    mpl.use("Agg")
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # remarks on dates in font files
    chosen = FULL if options.full else QUICK
    if options.theory:
        chosen = dataclasses.replace(chosen, sources=("theory",))
    keep_programs(FIGURES / "quick" / "compiled")
    folder = FIGURES if options.full else FIGURES / "quick"
    for name in [options.only] if options.only else EXPERIMENTS:
        start = time.perf_counter()
        print(f"{name}: {chosen.name} profile …", file=sys.stderr, flush=True)
        if options.redraw:
            EXPERIMENTS[name].redraw(folder)
        else:
            EXPERIMENTS[name].run(chosen, folder)
        print(f"{name}: {time.perf_counter() - start:.0f} s, in {folder}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: nothing was written for the unfinished figure", file=sys.stderr)
        sys.exit(130)
