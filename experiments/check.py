"""The theory of the committed tables, computed again by the programs that wrote it.

A recipe says, for one table, which of its theory rows are computed together, and by what.  As many
of these groups as it names, at equal distances through the table, or all of them, must come out
again: each number within TOLERANCE of itself and SHARE of its stated error, and its status.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import contraction
import covariance
import decay
import deep_linear_rows
import figure3
import figure4
import lowrank
import mismatch_rows
import numpy as np
import optimal
import pandas as pd
import phases
import price_rows
import published
import rounds
import selection
import spectra
import validation
from figure_tools import FULL, OBSERVED, predicted_rows

from lora_theory import Problem, predict
from lora_theory.spelling import problem_of_texts

#: Relative to the number, for rounding and other machines, and to its stated error; where it is 0.
TOLERANCE, SHARE, FLOOR = 1e-5, 0.05, 1e-9
#: What a row says of its number; everything else says what the number is of.
SAID = ("value", "error")
#: Tables that take minutes.
LONG = ("optimal", "price", "lowrank")
FIELDS = [spec.name for spec in Problem.specs()]

Row = Mapping[str, str]
Rows = Iterable[Mapping[str, Any]]


class Recipe(NamedTuple):
    """How some theory rows of a table are computed again, a group at a time."""

    again: Callable[[Row, pd.DataFrame], Rows]  # from the first row of a group, and all of it
    most: int  # groups that are computed unless all are asked for, 0 for what takes minutes
    keys: tuple[str, ...] | None = None  # equal in a group; None: the problem and all labels
    rows: Callable[[pd.DataFrame], pd.Series] | None = None  # which it is for; None: all
    numbers: Mapping[str, str] = MappingProxyType({"value": "error"})  # and their errors


class Deviation(NamedTuple):
    """A number that did not come out again."""

    where: str
    stated: str
    found: str

    def __str__(self) -> str:
        return f"{self.where}: {self.stated} in the table, {self.found} now"


class Verdict(NamedTuple):
    """What became of one table, or of a part of it."""

    name: str
    groups: int
    of: int
    numbers: int
    largest: float  # deviation, relative to what is allowed
    deviations: tuple[Deviation, ...]

    def __str__(self) -> str:
        word = "RED" if self.deviations else "green"
        return (
            f"{self.name}: {word}, {self.numbers} numbers of {self.groups} of {self.of} points; "
            f"largest deviation {self.largest:.1g} of what is allowed"
        )


def problem_of(row: Row) -> Problem:
    """The problem whose fields are columns."""
    return problem_of_texts({name: row[name] for name in FIELDS if name in row})


def solved_with(nodes: Mapping[str, int] | int | None) -> Callable[[Row, pd.DataFrame], Rows]:
    """Rows of a prediction on so many nodes, by activation or for both."""

    def again(row: Row, group: pd.DataFrame) -> Rows:
        count = nodes[row["activation"]] if isinstance(nodes, Mapping) else nodes
        asked = problem_of(row)
        return predicted_rows(predict(asked, nodes=count, blocks=FULL.blocks), {})

    return again


def observed(*names: str) -> Callable[[pd.DataFrame], pd.Series]:
    return lambda table: table["observable"].isin(names)


def by_activation(recipe: Recipe) -> tuple[Recipe, Recipe]:
    """For linear attention, and for softmax, which takes minutes, only if all is asked for."""
    whole = recipe.rows or (lambda table: pd.Series(True, table.index))

    def rows(activation: str) -> Callable[[pd.DataFrame], pd.Series]:
        return lambda table: whole(table) & table["activation"].eq(activation)

    return recipe._replace(rows=rows("linear")), recipe._replace(rows=rows("softmax"), most=0)


def _curve(row: Row, group: pd.DataFrame) -> Rows:
    return figure3.theory(row["activation"], row["finetuning.sequences"], FULL, Path())


def _optima(row: Row, group: pd.DataFrame) -> Rows:
    settings = {"nodes": optimal.NODES[row["activation"]], "blocks": FULL.blocks}
    asked = problem_of(row).replace({optimal.PENALTY: optimal.FIRST_PENALTY})
    return optimal.optima(asked, settings)


def _slopes(row: Row, group: pd.DataFrame) -> Rows:
    knobs = tuple(dict.fromkeys(group["knob"]))
    return mismatch_rows.slopes(problem_of(row), knobs, {}, FULL, int(row["seed"]))


def _map_row(row: Row, group: pd.DataFrame) -> Rows:
    (which,) = (one for one in phases.MAPS if one.name == row["map"])
    return phases.theory(which, float(row[which.field]), FULL)


def _priced(row: Row, group: pd.DataFrame) -> Rows:
    noise = price_rows.Noise(row["activation"], float(row["gain"]), float(row["variance"]))
    return price_rows.priced(noise, row["equal"], float(row["level"]), FULL)


def _growth(row: Row, group: pd.DataFrame) -> Rows:
    (column,) = (one for one in contraction.COLUMNS if one.name == row["column"])
    return contraction.predicted(column, float(row["at"]), FULL)


def _covariance(row: Row, group: pd.DataFrame) -> Rows:
    at = {name: float(row[name]) for name in covariance.BASE}
    return covariance.predicted(row["activation"], row["method"], at, FULL)


def _decay(row: Row, group: pd.DataFrame) -> Rows:
    (curve,) = (one for one in decay.CURVES if one.name == row["curve"])
    return decay.predicted(curve, float(row["pretraining.penalty"]))


def _lowrank(row: Row, group: pd.DataFrame) -> Rows:
    key = row["method"], row["kind"], float(row["strength"])
    asked = lowrank.jobs(row["row"], FULL, simulated=False)[key]
    found = predict(asked, nodes=lowrank.NODES, blocks=FULL.blocks)
    return lowrank.predicted_rows(row["row"], key, found)


def _second_round(row: Row, group: pd.DataFrame) -> Rows:
    choice, pool = rounds.Choice(*(row["choice"].split(" "))), float(row["second_pool"])
    return rounds.predicted(row["activation"], choice, pool, FULL)


def _ratio(row: Row, group: pd.DataFrame) -> Rows:
    asked = problem_of(row)
    return [selection.predicted_ratio(row["activation"], asked.pretraining.penalty, FULL)]


def _best_in_family(row: Row, group: pd.DataFrame) -> Rows:
    return [selection.best_in_family(FULL)]


def _system(row: Row, group: pd.DataFrame) -> Rows:
    noise = price_rows.Noise(row["activation"], float(row["gain"]), float(row["variance"]))
    stage = noise.finetuned(float(row["finetuning.samples"]), nodes=price_rows.FINE)
    numbers = {"value": stage.overlap, "error": stage.quadrature_error["overlap"]}
    return [{"observable": row["observable"], **numbers}]


def _published(row: Row, group: pd.DataFrame) -> Rows:
    return [published.predicted(int(row["tokens"]), float(row["alpha"]), FULL)]


def _split(row: Row, group: pd.DataFrame) -> Rows:
    prices = float(row["budget"]), float(row["cost"])
    return price_rows.best_split(row["activation"], *prices, FULL)


def _spectrum(row: Row, group: pd.DataFrame) -> Rows:
    return spectra.theory(float(row[spectra.SAMPLES]), FULL, Path())


def _network(row: Row, group: pd.DataFrame) -> Rows:
    parts = {"loss": deep_linear_rows.loss_rows, "rank": deep_linear_rows.rank_rows}
    parts |= {"decay": deep_linear_rows.decay_rows, "rates": deep_linear_rows.rate_rows}
    return (found for found in parts[row["panel"]](FULL) if found["source"] == "theory")


def _cells(row: Row, group: pd.DataFrame) -> Rows:
    return validation.predicted(row["problem"])


WITH_REPLICON = {"value": "error", "replicon": ""}
RECIPES: dict[str, tuple[Recipe, ...]] = {
    "figure1": (Recipe(solved_with(FULL.nodes), 24),),
    "figure2": (Recipe(solved_with(FULL.nodes), 24),),
    "collapse": (Recipe(solved_with(FULL.nodes), 16),),
    "price": (
        Recipe(
            _priced, 4, ("activation", "equal", "level", "gain", "variance"),
            rows=observed("needed", "price_of_variance", "price_of_gain"),
        ),
        *by_activation(
            Recipe(
                _split, 1, ("activation", "budget", "cost"),
                rows=lambda table: table["share"].isna() & table["budget"].notna(),
            )
        ),
        Recipe(
            _system, 2, ("activation", "observable", "variance"),
            rows=observed("line_overlap", "control_overlap"),
        ),
        Recipe(
            solved_with(price_rows.FINE), 8,
            rows=lambda table: table["share"].notna() & table["observable"].isin(OBSERVED),
        ),
    ),
    "figure3": (
        Recipe(solved_with(figure3.NODES), 12, rows=observed(*OBSERVED)),
        *by_activation(Recipe(_curve, 1, ("activation", "finetuning.sequences"))),
    ),
    "optimal": (
        Recipe(_optima, 2, tuple(name for name in FIELDS if name != optimal.PENALTY)),
    ),
    "mismatch": (
        Recipe(solved_with(mismatch_rows.NODES_ALONG), 12, rows=observed(*OBSERVED)),
        Recipe(
            _slopes, 12, (*FIELDS, "part", "seed", "share", "noise"),
            rows=observed("test_error_slope", "overlap_slope"),
        ),
    ),
    "figure4": (Recipe(solved_with(figure4.NODES), 10),),
    "selection": (
        Recipe(solved_with(selection.NODES), 6, rows=observed(*OBSERVED)),
        Recipe(
            _ratio, 2, ("activation", "pretraining.penalty"), rows=observed("test_error_ratio")
        ),
        Recipe(_best_in_family, 1, ("activation",), rows=observed("best_c")),
    ),
    "rounds": (Recipe(_second_round, 5),),
    "lowrank": (Recipe(_lowrank, 24, numbers=WITH_REPLICON),),
    "decay": (Recipe(_decay, 15, numbers=WITH_REPLICON),),
    "spectra": (Recipe(_spectrum, 2, (spectra.SAMPLES,)),),
    "phases": (
        Recipe(
            _map_row, 4, ("map", "label_noise", "pretraining.samples"),
            numbers={"test_error": "error"}
            | dict.fromkeys(("frozen_test_error", "overlap", "signal_growth", "replicon"), ""),
        ),
    ),
    "contraction": (Recipe(_growth, 12),),
    "covariance": (Recipe(_covariance, 6),),
    "deep_linear": (
        Recipe(_network, 3, ("panel",), rows=lambda table: table["panel"] != "rates"),
        Recipe(_network, 0, ("panel",), rows=lambda table: table["panel"] == "rates"),
    ),
    "published": (Recipe(_published, 12),),
    "validation": (Recipe(
            _cells, 10, ("problem",),
            numbers={"theory": "quadrature_error", "simulation": "error"},
        ),),
}  # fmt: skip


def theory_of(path: Path) -> pd.DataFrame:
    """The rows of a table that are checked, as text: names and numbers keep their digits."""
    table = pd.read_csv(path, dtype=str)
    return table[table["source"].isin(("theory", "comparison"))]


def checked(name: str, recipe: Recipe, table: pd.DataFrame, most: int) -> Verdict:
    """Compute so many groups of rows again by one recipe, at equal distances through the table."""
    part = table if recipe.rows is None else table[recipe.rows(table)]
    not_labels = {*SAID, "observable", "eigenvalue", "spike", "start", "status"}
    keys = [c for c in part if c not in not_labels] if recipe.keys is None else recipe.keys
    keys = [key for key in keys if key in part]
    groups = [group for _, group in part.groupby(keys, dropna=False, sort=False)]
    wanted = min(most, len(groups))
    deviations: list[Deviation] = []
    largest, numbers = 0.0, 0
    for place in np.linspace(0, len(groups) - 1, wanted).round().astype(int):
        group = groups[place]
        first = group.iloc[0].dropna().to_dict()
        label = " ".join(f"{key}={first[key]}" for key in keys if part[key].nunique() > 1
                         and key in first)  # fmt: skip
        try:
            found = by_observable(recipe.again(first, group), group)
        except (ArithmeticError, AssertionError, RuntimeError) as error:  # no solution
            deviations.append(Deviation(f"{name}, {label}", "numbers", f"{error or 'no solution'}"))
            continue
        for _, stated in group.iterrows():
            where = f"{name}, {label}, {stated.get('observable', 'row')}"
            new = next(found[stated.get("observable")], None)
            if new is None:
                deviations.append(Deviation(where, "a number", "none"))
                continue
            for column, error in recipe.numbers.items():
                numbers += 1
                excess = deviation(stated, new, column, error)
                largest = max(largest, excess)
                if not excess <= 1:
                    deviations.append(Deviation(where, stated[column], f"{new[column]:.8g}"))
                if error and not same_error(stated.get(error), new.get(error)):
                    deviations.append(
                        Deviation(f"{where}, error", f"{stated[error]}", f"{new[error]}")
                    )
            if not same_status(stated, new):
                deviations.append(Deviation(where, stated["status"], str(new["status"])))
    return Verdict(name, wanted, len(groups), numbers, largest, tuple(deviations))


def by_observable(rows: Rows, group: pd.DataFrame) -> dict[Any, Iterator[Mapping[str, Any]]]:
    """Rows in their order, apart by observable, as many as the group has."""
    found: dict[Any, list[Mapping[str, Any]]] = {n: [] for n in group.get("observable", [None])}
    for row in rows:
        if row.get("observable") in found:
            found[row.get("observable")].append(row)
        if sum(map(len, found.values())) == len(group):
            break
    return {name: iter(some) for name, some in found.items()}


def deviation(
    stated: Mapping[str, Any], new: Mapping[str, Any], column: str, error_column: str
) -> float:
    """By how much a number differs, relative to what is allowed; missing ones stay missing."""
    before, now = float(stated[column]), float(new.get(column, math.nan))
    if math.isnan(before) or math.isinf(before):
        return 0.0 if math.isnan(now) == math.isnan(before) and not math.isfinite(now) else math.inf
    error = float(stated.get(error_column, math.nan))
    allowed = TOLERANCE * abs(before) + (SHARE * error if error > 0 else 0.0) + FLOOR
    found = abs(now - before) / allowed
    return found if math.isfinite(found) else math.inf


def same_error(stated: str | float | None, new: float | None) -> bool:
    """Whether a stated error comes out again, to SHARE of itself; rows without one need none."""
    before, now = (math.nan if error is None else float(error) for error in (stated, new))
    return math.isnan(before) or abs(now - before) <= SHARE * before + FLOOR


def same_status(stated: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether both are said to be solved alike, where it is said."""
    both = stated.get("status"), new.get("status")
    return not isinstance(both[0], str) or both[1] is None or both[0] == both[1]


def check_all(paths: Iterable[Path], *, every: bool = False) -> Iterator[Verdict]:
    """The same of many tables, on two processes, as they come; what takes longest begins first."""
    jobs = [
        (path, place)
        for path in paths
        for place, recipe in enumerate(RECIPES[path.stem])
        if every or recipe.most
    ]
    jobs.sort(key=lambda job: job[0].stem not in LONG)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_one, job, every) for job in jobs]):
            yield done.result()


def _one(job: tuple[Path, int], every: bool) -> Verdict:
    path, place = job
    table, recipe = theory_of(path), RECIPES[path.stem][place]
    return checked(path.stem, recipe, table, len(table) if every else recipe.most)
