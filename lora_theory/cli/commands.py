"""The commands: what each accepts, calls and prints."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_theory
from lora_theory.cli.exits import Exit
from lora_theory.cli.flags import PROGRAM, Command, Given, Setting
from lora_theory.cli.progress import announced
from lora_theory.problem import Problem, ProblemError

__all__ = ["COMMANDS"]


def _predict(request: Given) -> int:
    from lora_theory.cli.tables import prediction_table
    from lora_theory.theory import predict

    with announced("solving the equations"):
        prediction = predict(_asked(request), **request.settings)
    return _deliver(request, prediction, prediction_table, prediction.status.is_solved)


def _spectrum(request: Given) -> int:
    from lora_theory.cli.tables import spectrum_table
    from lora_theory.theory import spectrum

    with announced("solving the equations"):
        learned = spectrum(_asked(request), **request.settings)
    return _deliver(request, learned, spectrum_table, learned.status.is_solved)


def _thresholds(request: Given) -> int:
    from lora_theory.cli.tables import thresholds_table
    from lora_theory.theory import thresholds

    with announced("following the branches"):
        found = thresholds(_asked(request), **request.settings)
    return _deliver(request, found, thresholds_table, True)


def _optimize(request: Given) -> int:
    from lora_theory.cli.tables import optimum_table
    from lora_theory.theory import optimize

    with announced("looking for the optimum"):
        found = optimize(_asked(request), **request.settings)
    return _deliver(request, found, optimum_table, found.status.is_solved)


def _simulate(request: Given) -> int:
    from lora_theory.cli.tables import simulation_table
    from lora_theory.simulation import simulate

    _check_writable(request.settings.get("save"))
    show = sys.stderr is not None
    simulation = simulate(_asked(request), **request.settings, progress=show)
    return _deliver(request, simulation, simulation_table, simulation.status.is_solved)


def _compare(request: Given) -> int:
    from lora_theory.cli.tables import comparison_table
    from lora_theory.compare import compare

    show = sys.stderr is not None
    with announced("predicting, then simulating", counting=False):
        comparison = compare(_asked(request), **request.settings, progress=show)
    return _deliver(request, comparison, comparison_table, comparison.status.is_solved)


def _sweep(request: Given) -> int:
    from lora_theory.cli.tables import plan_table, sweep_table
    from lora_theory.sweeps import Summary, SweepError, plan, sweep

    settings = dict(request.settings)
    spec, out = settings.pop("spec"), settings.pop("out")
    if settings.pop("dry_run", False):
        return _deliver(request, plan(spec, out), plan_table, True)
    again = f"the same command goes on where it stopped; what is finished is in {out}"
    try:
        table = sweep(spec, out, **settings, progress=sys.stderr is not None)
    except KeyboardInterrupt:
        print(f"interrupted: {again}", file=sys.stderr)
        return Exit.INTERRUPTED
    except (OSError, SweepError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        print(f"{PROGRAM} sweep stopped: {reason or error}; {again}", file=sys.stderr)
        return Exit.NOT_WRITTEN
    summary = Summary.of(table, out)
    return _deliver(request, summary, sweep_table, summary.solved)


def _explore(request: Given) -> int:
    from lora_theory.explorer.server import serve

    asked = {"host": "127.0.0.1", "port": 2718, **request.settings}
    serve(
        request.problem, host=asked["host"], port=asked["port"],
        browser=not asked.get("no_browser", False),
    )  # fmt: skip
    return Exit.SOLVED


def _figures(request: Given) -> int:
    quick, full = (request.settings.get(name, False) for name in ("quick", "full"))
    if quick and full:
        raise ProblemError("quick and full are not allowed together: give one of --quick, --full")
    script = _checkout() / "experiments" / "reproduce.py"
    if not script.is_file():
        raise ProblemError(
            f"figures needs a checkout of the repository: there is no {script}; clone the "
            "repository and run `make figures` there"
        )
    only = request.settings.get("only")
    options = ["--full" if full else "--quick", *(["--only", only] if only else [])]
    code = subprocess.run([sys.executable, script, *options], check=False).returncode
    return code if code >= 0 else 128 - code


def _doctor(request: Given) -> int:
    from lora_theory.doctor import examine

    with announced("checking"):
        report = examine()
    return _deliver(request, report, str, report.ok)


def _asked(request: Given) -> Problem:
    assert request.problem is not None
    return request.problem


def _checkout() -> Path:
    """The folder that holds the package: the checkout, unless the package was installed."""
    return Path(lora_theory.__file__).resolve().parents[1]


def _deliver(request: Given, result: Any, table: Callable[[Any], str], solved: bool) -> Exit:
    """The result on stdout, as strict JSON or as a table, and the exit code."""
    if request.json:
        from lora_theory.observables import to_plain

        print(json.dumps(to_plain(result.to_dict()), indent=2, allow_nan=False))
    else:
        print(table(result))
    return Exit.SOLVED if solved else Exit.NOT_CONVERGED


def _check_writable(save: str | None) -> None:
    """Refuse before the work what could not be written after it."""
    if save is None:
        return
    from lora_theory.simulation.storage import checked_path

    try:
        path = checked_path(save)
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ProblemError(
            f"save = {save!r} is not allowed: it must be a file that can be written ({reason})"
        ) from error


_SEED = Setting("seed", "root of all random numbers", "an integer ≥ 0", "natural", "N", 0)
_NODES = Setting(
    "nodes",
    "Sobol points per block; by default chosen by tokens",
    "a power of two ≥ 16",
    "integer",
    "N",
)
_THEORY = (
    _NODES,
    Setting(
        "blocks",
        "independent scramblings, whose spread is the quadrature error",
        "an integer ≥ 2",
        "integer",
        "N",
        8,
    ),
    _SEED._replace(meaning="seed of the scramblings"),
    Setting(
        "tolerance",
        "largest relative residual that counts as converged",
        "between 0 and 1",
        "number",
        "X",
        1e-10,
    ),
)


def _simulation_settings(fewest_seeds: int, starts: int) -> tuple[Setting, ...]:
    return (
        Setting(
            "seeds",
            "independent runs, the count of every estimate",
            f"an integer ≥ {fewest_seeds}",
            "integer",
            "N",
            required=True,
        ),
        _SEED,
        Setting(
            "starts",
            "random starts of the fine-tuning",
            "an integer ≥ 0",
            "integer",
            "N",
            starts,
        ),
        Setting(
            "dtype", "precision of the training", metavar="{float32,float64}", default="float64"
        ),
        Setting("device", "where to train; by default what JAX prefers", metavar="{cpu,gpu}"),
    )


#: The subcommands by name, in the order of the help.
COMMANDS = {
    command.name: command
    for command in (
        Command(
            "predict",
            "Solve the equations: test errors and alignments, with their quadrature errors.",
            _THEORY,
            _predict,
        ),
        Command(
            "simulate",
            "Draw data, train, fine-tune and measure the same observables, with standard errors.",
            (
                Setting(
                    "dim",
                    "embedding dimension D",
                    "an integer ≥ 4",
                    "integer",
                    "D",
                    required=True,
                ),
                *_simulation_settings(1, starts=3),
                Setting(
                    "batch", "runs trained together, for a GPU", "an integer ≥ 1", "integer", "N", 1
                ),
                Setting(
                    "pretrained",
                    "frozen weights: trained, or drawn from their asymptotic law",
                    metavar="{trained,sampled}",
                    default="trained",
                ),
                Setting(
                    "save",
                    "write W0, W, w* and w of all seeds to this .npz file",
                    "",
                    metavar="FILE",
                ),
            ),
            _simulate,
        ),
        Command(
            "compare",
            "Put theory beside simulation, at one dimension or extrapolated from several.",
            (
                Setting(
                    "dims",
                    "embedding dimensions D; several are extrapolated to D → ∞",
                    "one or more integers ≥ 4",
                    "integers",
                    "D [D ...]",
                    required=True,
                ),
                *_simulation_settings(2, starts=1),
                _NODES,
                Setting("out", "folder that keeps every run, to go on from", metavar="DIR"),
            ),
            _compare,
        ),
        Command(
            "spectrum",
            "The eigenvalues of the pre-trained matrix: bands, mass at zero, outliers.",
            (
                Setting("points", "of each band", "an integer ≥ 8", "integer", "N", 400),
                Setting(
                    "dim",
                    "embedding dimension D at which the LoRA vector is merged",
                    "an integer ≥ 1",
                    "integer",
                    "D",
                ),
                *_THEORY,
            ),
            _spectrum,
        ),
        Command(
            "thresholds",
            "Find where training data are fitted exactly, and where the branches of LoRA change.",
            (
                Setting(
                    "dim",
                    "embedding dimension D at which descents from random starts are simulated",
                    "an integer ≥ 16",
                    "integer",
                    "D",
                ),
                Setting("seeds", "of them, runs per α'", "an integer ≥ 2", "integer", "N"),
                *_THEORY[:3],
            ),
            _thresholds,
        ),
        Command(
            "optimize",
            "Find the fields at which an error, the overlap or the effective noise is best.",
            (
                Setting(
                    "over",
                    "fields to vary",
                    "one or more names of fields",
                    "texts",
                    "FIELD [FIELD ...]",
                    required=True,
                ),
                Setting(
                    "objective",
                    "finetuning.overlap is maximised, the others minimised",
                    metavar="{finetuning.test_error,finetuning.overlap,pretraining.test_error,"
                    "effective_noise}",
                    default="finetuning.test_error",
                ),
                Setting(
                    "within",
                    "ends of the box; by default a hundredth and a hundred times the value",
                    "one or more FIELD=LOW:HIGH",
                    "ranges",
                    "FIELD=LOW:HIGH",
                ),
                *_THEORY,
            ),
            _optimize,
        ),
        Command(
            "sweep",
            "Compute many points of theory and simulation into a folder; run again, it goes on.",
            (
                Setting(
                    "spec",
                    "TOML file of the sweep",
                    "the name of a TOML file",
                    "file",
                    "FILE",
                    required=True,
                ),
                Setting("out", "folder of the results", "a folder", metavar="DIR", required=True),
                Setting(
                    "workers",
                    "processes on this machine; 0: this one. By default one per core",
                    "an integer ≥ 0",
                    "natural",
                    "N",
                ),
                Setting(
                    "scheduler",
                    "address of a dask scheduler, whose workers compute instead",
                    metavar="TCP",
                ),
                Setting("threads", "of each worker here", "an integer ≥ 1", "integer", "N", 1),
                Setting(
                    "dry_run",
                    "list the tasks, expected time and memory",
                    "",
                    "switch",
                    "",
                ),
            ),
            _sweep,
            takes_problem=False,
        ),
        Command(
            "explore",
            "Open a page with sliders that theory answers at once; needs the extra: explore.",
            (
                Setting(
                    "port",
                    "of the page; 0: any that is free",
                    "an integer ≥ 0",
                    "natural",
                    "N",
                    2718,
                ),
                Setting(
                    "host",
                    "who may connect; by default this machine alone",
                    metavar="ADDRESS",
                    default="127.0.0.1",
                ),
                Setting("no_browser", "only print the address", "", "switch", ""),
            ),
            _explore,
            needs_problem=False,
            offers_json=False,
        ),
        Command(
            "figures",
            "Recompute and draw the figures; needs a checkout of the repository.",
            (
                Setting(
                    "quick", "small sizes, into figures/quick/ (the default)", "", "switch", ""
                ),
                Setting("full", "publication sizes, into figures/", "", "switch", ""),
                Setting("only", "one figure, by its name", "", "text", "NAME"),
            ),
            _figures,
            takes_problem=False,
            offers_json=False,
        ),
        Command(
            "doctor",
            "Check this installation: versions, devices, precision, known numbers.",
            (),
            _doctor,
            takes_problem=False,
        ),
    )
}
