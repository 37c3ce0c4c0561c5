"""The tables of the paper, as LaTeX: one macro each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paper_numbers import (
    NOISE,
    OBJECTIVES,
    OWN,
    compared,
    named,
    optimum,
    points_of,
)
from paper_rows import MissingError, Number, Tables, count, in_digits, math_mode, printed

#: D of the simulations shown.
LARGEST = 100
METHODS = {
    "weight_decay": "weight decay",
    "low_rank_decay": "low-rank decay",
    "preconditioned": "preconditioned",
    "truncation": "truncation",
}


def tabular(columns: str, head: Sequence[Sequence[str]], rows: Iterable[Sequence[str]]) -> str:
    lines = [r" & ".join(cells) + r" \\" for cells in head]
    body = [r" & ".join(cells) + r" \\" for cells in rows]
    parts = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *lines, r"\midrule", *body]
    return "\n".join([*parts, r"\bottomrule", r"\end{tabular}"])


def validation(tables: Tables) -> str:
    """A row per problem: cells, largest z, mean square of z."""
    rows = []
    for problem, cells in compared(tables).groupby("problem", sort=False):
        z = cells["z"].abs()
        numbers = [math_mode(f"{number:.1f}") for number in (z.max(), (z**2).mean())]
        rows.append([named(str(problem)), count(len(cells)), *numbers])
    head = [["problem", "cells", r"$\max|z|$", r"$\chi^2$/cell"]]
    return tabular("@{}lrrr@{}", head, rows)


def best_penalties(tables: Tables) -> str:
    """A row per objective: its best λ in theory and simulation, and what that costs in E'."""
    rows = []
    for objective, words in OBJECTIVES.items():
        cells = [words]
        for activation in ("linear", "softmax"):
            cells += _best(tables, activation, objective)
        rows.append(cells)
    head = [
        ["", r"\multicolumn{3}{c}{linear, re-used}", r"\multicolumn{3}{c}{softmax, fresh}"],
        ["best for", *2 * ["theory", "simulation", r"cost in $E'$ (\%)"]],
    ]
    return tabular("@{}lrrrrrr@{}", head, rows)


def _best(tables: Tables, activation: str, objective: str) -> list[str]:
    best = optimum(tables, activation, objective, "best_penalty", source="theory")
    if activation == "linear" and objective == "finetuning.overlap":
        shown = [r"$\to0$", "--"]
    else:
        measured = {"source": "simulation", "dim": LARGEST}
        trained = optimum(tables, activation, objective, "best_penalty", **measured)
        shown = [in_digits(best), in_digits(trained)]
    if objective == OWN:
        return [*shown, "--"]
    cost = optimum(tables, activation, objective, "excess_test_error", source="theory")
    return [*shown, in_digits(cost.times(100))]


def least_noise(tables: Tables) -> str:
    """A row per method: its least noise, the rank there and the error after LoRA there."""
    rows = []
    for method, words in METHODS.items():
        cells = [words]
        for activation, noise in NOISE.items():
            points = points_of(tables, activation, method)
            if noise not in points:
                raise MissingError(f"figures/lowrank.csv has no {noise} of {method}, {activation}")
            best = points.loc[points[noise].idxmin()]
            cells += [
                printed(Number(best[noise], best[f"{noise}.error"]), 3),
                printed(Number(best["rank"], 0.0), 2),
                printed(Number(best["test_error"], best["test_error.error"])),
            ]
        rows.append(cells)
    head = [
        ["", r"\multicolumn{3}{c}{linear}", r"\multicolumn{3}{c}{softmax}"],
        ["method", r"least $\Delta_{\mathrm{eff},0}$", "rank", "$E'$", "variance", "rank", "$E'$"],
    ]
    return tabular("@{}lrrrrrr@{}", head, rows)


TABLES = {
    "tabValidation": validation,
    "tabPenalties": best_penalties,
    "tabLowrank": least_noise,
}
