"""The numbers of the paper: one TeX macro each, all from the committed tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import collapse
import lowrank
import mismatch
import numpy as np
import pandas as pd
from battery import outcomes
from figure_tools import limit
from lowrank import NOISE
from optimal import BASE
from paper_rows import (
    COMMON,
    MissingError,
    Number,
    Tables,
    count,
    in_words,
    listed,
    math_mode,
    one_value,
    parameters,
    printed,
    shown,
)
from validation import SHOWN, spelled_out, summary

Macros = Iterator[tuple[str, str]]
Chosen = Mapping[str, Any]
ACTIVATION, SEQUENCES = "activation", "finetuning.sequences"
SAMPLES, PENALTY, TUNED = "pretraining.samples", "pretraining.penalty", "finetuning.samples"
STAGES = (SAMPLES, PENALTY, TUNED, "finetuning.penalty")

VALIDATION = "figures/validation.csv"
BATTERY, PUBLISHED = "tests/reference/battery.csv.gz", "figures/published.csv"
COLLAPSE, FIGURE3, OPTIMAL = "figures/collapse.csv", "figures/figure3.csv", "figures/optimal.csv"
MISMATCH, PRICE, FIGURE4 = "figures/mismatch.csv", "figures/price.csv", "figures/figure4.csv"
SELECTION, ROUNDS, LOWRANK = "figures/selection.csv", "figures/rounds.csv", "figures/lowrank.csv"
DECAY, COVARIANCE = "figures/decay.csv", "figures/covariance.csv"
DEEP = "figures/deep_linear.csv"


def bound(value: float) -> str:
    """A power of ten with one digit, rounded up."""
    power = math.floor(math.log10(value))
    return math_mode(rf"{math.ceil(value / 10.0**power)}\times10^{{{power}}}")


def percent(number: float, decimals: int = 0) -> str:
    return rf"{number:.{decimals}%}".replace("%", r"\,\%")


def in_percent(number: Number) -> str:
    return printed(number.times(100)) + r"\,\%"


def plain(number: float, digits: int = 3) -> str:
    """A parameter, a χ², a z: what has no error of its own."""
    return math_mode(f"{number:.{digits}g}")


def sizes(rows: pd.DataFrame) -> str:
    """D of simulations, and their number of seeds."""
    groups = rows[np.isfinite(rows["dim"])].groupby("dim")["seeds"].first()
    first, *others = [f"{dim:.0f}" for dim in groups.index]
    dims = listed([math_mode(f"D={first}"), *map(math_mode, others)])
    seeds = listed([count(number) for number in dict.fromkeys(groups)])
    return f"{dims} with {seeds} seeds each"


def at_infinity(tables: Tables, name: str, chosen: Chosen) -> Number:
    """D → ∞ of a simulated number at two D, on a line in 1/D."""
    rows = tables.rows(name, {"source": "simulation", **chosen})
    if len(rows) != 2:
        raise MissingError(f"{name} has {len(rows)} rows, not one at each of two D, with {chosen}")
    return Number(*limit(rows))


# -- validation ----------------------------------------------------------------------------------


COLUMNS = {"problem", "stage", "observable", "z", "dims", "seeds", "missed"}


def compared(tables: Tables) -> pd.DataFrame:
    """The cells of the validation that have an error, and so a z."""
    table = tables.all(VALIDATION)
    if lacking := COLUMNS - set(table):
        raise MissingError(f"{VALIDATION} has no column {', '.join(sorted(lacking))}")
    cells = table[table["z"].notna()]
    if cells.empty:
        raise MissingError(f"{VALIDATION} has no row with a z")
    return cells


def validation(tables: Tables) -> Macros:
    cells = compared(tables)
    found = summary(cells)
    worst = cells.loc[cells["z"].abs().idxmax()]
    yield "numCells", count(found["cells"])
    yield "numProblems", count(found["problems"])
    yield "numChi", printed(Number(found["chi2"], found["chi2_error"]))
    yield "numBound", plain(2)  # of summary
    yield "numShareWithin", percent(found["within"])
    yield "numLargestZ", plain(found["largest"], 2)
    yield "numLargestChance", percent(found["chance"])
    yield "numFrozenBias", printed(Number(found["bias"], found["bias_error"]))
    place = f"{in_plain_words(worst['observable'])} of {SHOWN[worst['stage']]}"
    yield "numLargestWhere", f"{place} ({named(worst['problem'])})"
    means = (cells["z"] ** 2).groupby(cells["problem"]).mean()
    yield "numWorstChi", plain(means.max(), 2)
    yield "numWorstProblem", named(str(means.idxmax()))
    sizes_of = one_value(VALIDATION, cells, "dims").split()
    yield "numRunSizes", listed([math_mode(f"D={sizes_of[0]}"), *map(math_mode, sizes_of[1:])])
    yield "numRunSeeds", count(one_value(VALIDATION, cells, "seeds"))
    by_problem = cells.groupby("problem").first()
    yield "numMissed", count(by_problem["missed"].sum())
    yield "numRuns", count(len(sizes_of) * by_problem["seeds"].sum())
    became = outcomes(tables.all(BATTERY))
    yield "numBattery", count(len(became))
    for macro, outcome in (("Solved", "solved"), ("Jumps", "jumps"), ("Unsolved", "not solved")):
        yield f"numBattery{macro}", count((became == outcome).sum())
    yield "numBatteryFalse", in_words(int((became == "false success").sum()))
    both = [tables.rows(PUBLISHED, {"source": one}) for one in ("published", "simulation")]
    pairs = both[0].merge(both[1], on=["tokens", "alpha"], suffixes=("", "_own"))
    deviation = (pairs["value"] - pairs["value_own"]) / np.hypot(pairs["error"], pairs["error_own"])
    yield "numPublishedPoints", count(len(pairs))
    yield "numPublishedChi", plain((deviation**2).sum(), 3)
    yield "numPublishedSize", plain(both[0]["dim"].iloc[0], 4)


def named(problem: str) -> str:
    """A name such as softmax-2-reused in words."""
    activation, tokens, special = spelled_out(problem).split(", ", 2)
    return f"{activation}, {math_mode(tokens.replace(' ', ''))}, {special}"


def in_plain_words(observable: str) -> str:
    return {
        "test_error": "the test error",
        "frozen_test_error": "the error of the frozen weights",
        "train_error": "the training error",
        "overlap": "the overlap",
        "potential": "the training loss",
    }.get(observable, f"${observable}$")


# -- effective noise -----------------------------------------------------------------------------

PANELS = {
    f"{activation.capitalize()}{word}": (activation, observable)
    for activation in ("linear", "softmax")
    for word, observable in (("Error", "test_error"), ("Overlap", "overlap"))
}


def effective_noise(tables: Tables) -> Macros:
    table = tables.all(COLLAPSE)
    first = {}
    for activation in ("linear", "softmax"):
        for family in (*collapse.NAMES, *collapse.CONTROLS[activation]):
            for source in ("theory", "simulation"):
                chosen = {ACTIVATION: activation, "family": family, "source": source}
                rows = tables.rows(COLLAPSE, chosen)
                if (family, source) == ("A", "theory"):
                    first[activation] = rows.iloc[0]
    shared = ("tokens", "finetuning.penalty")
    yield "parCollapse", shown({name: one_value(COLLAPSE, table, name) for name in shared})
    yield "parCommon", shown(COMMON)
    yield "numFamilies", in_words(len(collapse.NAMES))
    yield "numCollapseNoise", printed(Number(first["linear"]["delta_eff"], 0.0))
    yield "numCollapseGain", printed(Number(first["softmax"]["gain"], 0.0), 3)
    yield "numCollapseVariance", printed(Number(first["softmax"]["variance"], 0.0), 3)
    yield "numCollapseLabels", plain(first["softmax"]["label_variance"])
    others, counts = [], set()
    for word, (activation, observable) in PANELS.items():
        chi, points = collapse.chi_square(table, activation, observable)
        yield f"numCollapse{word}", plain(chi, 2)
        counts.add(points)
        for control in collapse.CONTROLS[activation]:
            others.append(collapse.chi_square(table, activation, observable, control)[0])
    if len(counts) != 1:
        raise MissingError(f"{COLLAPSE} has {sorted(counts)} simulated points in its panels")
    yield "numCollapsePoints", count(counts.pop())
    yield "numCollapseControls", plain(min(others), 3)
    spread = max(collapse.spread(table, "softmax", name) for name in ("test_error", "overlap"))
    yield "numCollapseSpread", bound(spread)


# -- optimal pre-training and mismatch -----------------------------------------------------------

OBJECTIVES = {
    "pretraining.test_error": "pre-training error $E$",
    "effective_noise": "effective noise",
    "finetuning.test_error": "error after LoRA $E'$",
    "finetuning.overlap": "alignment $o$",
}
OWN = "finetuning.test_error"


def optimum(
    tables: Tables, activation: str, objective: str, observable: str, **more: Any
) -> Number:
    """What the table of best penalties holds at the base."""
    chosen = {ACTIVATION: activation, "objective": objective, "observable": observable}
    return tables.number(OPTIMAL, BASE | chosen | more)


def optimal(tables: Tables) -> Macros:
    table = tables.all(OPTIMAL)
    base = tables.rows(OPTIMAL, {**BASE, "source": "theory"})
    yield "parOptimal", parameters(OPTIMAL, base, (SAMPLES, TUNED, "finetuning.penalty"))
    simulated = tables.rows(OPTIMAL, {"observable": "best_penalty", "source": "simulation"})
    yield "numOptimalSimulated", sizes(simulated[simulated["dim"] == simulated["dim"].max()])
    softmax = {"source": "theory", ACTIVATION: "softmax", "observable": "excess_test_error"}
    noise = {**softmax, "objective": "effective_noise"}
    for word, samples in (("Few", table[SAMPLES].min()), ("Many", table[SAMPLES].max())):
        yield f"num{word}Samples", plain(samples)
        at = {**noise, **BASE, SAMPLES: samples}
        yield f"numExcessNoise{word}", in_percent(tables.number(OPTIMAL, at))
    costs = tables.rows(OPTIMAL, {**softmax, "objective": "pretraining.test_error"})
    worst = costs.loc[costs["value"].idxmax()]
    yield "numExcessPretraining", in_percent(Number(worst["value"], worst["error"]))
    for word, activation, objective in (
        ("Linear", "linear", "pretraining.test_error"), ("Softmax", "softmax", "effective_noise"),
    ):  # fmt: skip
        chosen = {ACTIVATION: activation, "objective": objective, "observable": "log_ratio"}
        yield f"numRatio{word}", printed(at_infinity(tables, OPTIMAL, BASE | chosen))
        best, own = (
            optimum(tables, activation, name, "best_penalty", source="theory").log()
            for name in (objective, OWN)
        )
        yield f"numRatio{word}Theory", printed(best - own)


def figure3(tables: Tables) -> Macros:
    table = tables.all(FIGURE3)
    fields = (SAMPLES, TUNED, "finetuning.penalty")
    yield "parPenalty", parameters(FIGURE3, table, fields)
    yield "numPenaltySizes", sizes(tables.rows(FIGURE3, {"source": "simulation"}))
    for activation in ("linear", "softmax"):
        for sequences in ("fresh", "reused"):
            for word, name in (("Error", "test_error"), ("Overlap", "overlap")):
                macro = f"num{word}{activation.capitalize()}{sequences.capitalize()}"
                if macro == "numOverlapLinearReused":
                    continue  # no finite penalty is best
                chosen = {ACTIVATION: activation, SEQUENCES: sequences, "source": "theory"}
                chosen["observable"] = f"{name}_best_penalty"
                yield macro, printed(tables.number(FIGURE3, chosen))


def mismatched(tables: Tables) -> Macros:
    """What less penalty does to linear attention, with re-used and with fresh sequences."""
    start, end = 0.1, 0.02
    yield "numPenaltyFrom", plain(start)
    yield "numPenaltyTo", plain(end)
    for word, sequences in (("Reused", "reused"), ("Fresh", "fresh")):
        shared = {ACTIVATION: "linear", SEQUENCES: sequences, "part": f"along {PENALTY}"}
        if word == "Reused":
            fields = (SAMPLES, TUNED, "finetuning.penalty")
            yield "parMismatch", parameters(MISMATCH, tables.rows(MISMATCH, shared), fields)
            measured = tables.rows(MISMATCH, {**shared, "source": "simulation"})
            yield "numMismatchSizes", sizes(measured)
        for letter, name in (("Error", "test_error"), ("Overlap", "overlap")):
            difference = {**shared, "observable": f"{name}_difference", PENALTY: end}
            yield f"numLess{word}{letter}", printed(tables.number(MISMATCH, difference))
            ends = [
                tables.number(
                    MISMATCH, {**shared, "source": "theory", "observable": name, PENALTY: at}
                )
                for at in (end, start)
            ]
            yield f"numLess{word}{letter}Theory", printed(ends[0] - ends[1])
    share = 0.5
    yield "numReusedShare", plain(share)
    linear = tables.rows(MISMATCH, {ACTIVATION: "linear", "part": "share"})
    for word, noise in (("Shared", "shared"), ("Redrawn", "redrawn")):
        best = mismatch.shares(linear, noise).get(share, {})
        error, overlap = (best.get(name) for name in ("test_error", "overlap"))
        if error is None or overlap is None:
            raise MissingError(
                f"{MISMATCH} has no best penalties at share = {share}, {noise} noise"
            )
        ratio = Number(error.mean, error.error) / Number(overlap.mean, overlap.error)
        yield f"num{word}Gap", printed(ratio.log())
    rows = tables.rows(
        MISMATCH, {ACTIVATION: "linear", SEQUENCES: "reused", "part": f"map {SAMPLES}"}
    )
    signs = mismatch.Slopes.of(rows, SAMPLES, PENALTY).signs()
    yield "numMismatchCells", count((signs > 0).sum())
    yield "numMismatchUnknown", count((signs == 0).sum())
    yield "numMismatchAll", count(signs.size)


# -- price of noise, choice of sequences ---------------------------------------------------------


def price(tables: Tables) -> Macros:
    theory = {ACTIVATION: "linear", "source": "theory", "observable": "price_of_variance"}
    for word, equal, level in (
        ("Low", "overlap", 0.9), ("High", "overlap", 0.98), ("Error", "test_error", 1.0),
    ):  # fmt: skip
        rows = tables.rows(PRICE, {**theory, "equal": equal, "level": level})
        rows = rows[rows["value"].notna()].sort_values("variance")
        yield f"numPrice{word}Level", plain(level)
        for place, row in (("First", rows.iloc[0]), ("Last", rows.iloc[-1])):
            yield f"numPrice{word}{place}", printed(Number(row["value"], row["error"]))
            if word == "Low":
                yield f"numNoise{place}", plain(row["variance"])
    for word, kind in (("Line", "line"), ("Control", "control")):
        chosen = {ACTIVATION: "linear", "observable": f"{kind}_overlap"}
        rows = tables.rows(PRICE, {**chosen, "source": "simulation"})
        limits = [
            at_infinity(tables, PRICE, {**chosen, "variance": variance})
            for variance in sorted(rows["variance"].unique())
        ]
        yield f"numPrice{word}", listed([printed(one) for one in limits])
    yield "parPrice", parameters(PRICE, rows, ("finetuning.penalty",))
    yield "numPriceLevel", plain(rows["level"].iloc[0])
    splits = {ACTIVATION: "linear", "source": "theory", "observable": "best_share"}
    shares = tables.rows(PRICE, splits)["value"]
    yield "numShareLeast", percent(shares.min())
    yield "numShareMost", percent(shares.max())


SCORES = {"Variance": "low_variance", "Cross": "cross_token"}


def active(tables: Tables) -> Macros:
    fields = (SAMPLES, "finetuning.penalty")
    yield "parActive", parameters(FIGURE4, tables.all(FIGURE4), fields)
    yield "numActivePool", plain(tables.all(FIGURE4)["finetuning.selection.pool"].max())
    yield "numActiveSizes", sizes(tables.rows(FIGURE4, {"source": "simulation"}))
    kept = 4.0
    yield "numActiveKept", plain(kept)
    for activation in ("linear", "softmax"):
        for word, score in SCORES.items():
            here = {ACTIVATION: activation, TUNED: kept, "start": "informed"}
            column = "finetuning.selection.score"
            chosen, any_ = (
                tables.number(
                    FIGURE4,
                    {**here, column: name, "source": "theory", "observable": "test_error"},
                )
                for name in (score, "uniform")
            )
            macro = f"numActive{activation.capitalize()}{word}"
            yield f"{macro}Theory", printed(chosen - any_)
            measured = {**here, column: score, "observable": "test_error_difference"}
            yield macro, printed(tables.number(FIGURE4, measured))
    softmax = {ACTIVATION: "softmax", "source": "theory"}
    best = {**softmax, "observable": "best_c"}
    yield "numBestScore", printed(tables.number(SELECTION, best))
    error = {**softmax, "observable": "test_error"}
    level = {**error, "panel": "level", "finetuning.selection.score": "uniform"}
    uniform = tables.number(SELECTION, level)
    family = tables.rows(SELECTION, {**error, "panel": "family"})
    lowest = family.loc[family["value"].idxmin()]
    yield "parFamily", parameters(SELECTION, family, STAGES)
    yield "numFamilyPool", plain(one_value(SELECTION, family, "finetuning.selection.pool"))
    yield "numFamilyRatio", printed(Number(lowest["value"], lowest["error"]) / uniform)
    for word, score in SCORES.items():
        named_one = tables.number(SELECTION, {**level, "finetuning.selection.score": score})
        yield f"numNamedRatio{word}", printed(named_one / uniform)
    rounds = tables.rows(ROUNDS, {ACTIVATION: "linear"})
    yield "parRound", parameters(ROUNDS, rounds, STAGES)
    pool = rounds["second_pool"].max()
    second = {ACTIVATION: "linear", "second_pool": pool, "choice": "current cross_token"}
    yield "numRoundPool", plain(pool)
    error = {"observable": "test_error", "source": "theory"}
    current = tables.number(ROUNDS, {**second, **error})
    any_ = tables.rows(ROUNDS, {ACTIVATION: "linear", "choice": "random ", **error}).iloc[0]
    yield "numRoundTheory", printed(current - Number(any_["value"], any_["error"]))
    difference = {**second, "observable": "test_error_difference"}
    yield "numRound", printed(at_infinity(tables, ROUNDS, difference))


# -- low-rank methods ----------------------------------------------------------------------------


def points_of(tables: Tables, activation: str, method: str) -> pd.DataFrame:
    """The theory of a method along its strength, for fresh sequences."""
    chosen = {"source": "theory", "row": activation, "method": method, "kind": "fresh"}
    tables.rows(LOWRANK, chosen)  # that there are any
    return lowrank.wide(tables.all(LOWRANK), **chosen)


def low_rank(tables: Tables) -> Macros:
    rows = tables.rows(LOWRANK, {"kind": "fresh"})
    fields = (SAMPLES, "finetuning.penalty")
    yield "parLowrank", parameters(LOWRANK, rows, fields)
    yield "numLowrankSizes", sizes(tables.rows(LOWRANK, {"kind": "fresh", "source": "simulation"}))
    for activation in NOISE:
        tuned = tables.rows(LOWRANK, {"row": activation, "kind": "fresh"})
        yield f"parLowrank{activation.capitalize()}", parameters(LOWRANK, tuned, (TUNED,))
    rank = 0.2
    yield "numLowrankAt", plain(rank)
    for word, method in (
        ("Decay", "weight_decay"), ("Shrunk", "low_rank_decay"), ("Truncated", "truncation"),
    ):  # fmt: skip
        points = points_of(tables, "softmax", method)
        noise = [lowrank.at_rank(points, name, rank) for name in ("variance", "variance.error")]
        yield f"numLowrank{word}", printed(Number(*noise))
    yield from decay(tables)
    yield from metrics(tables)


def decay(tables: Tables) -> Macros:
    """The branches of low-rank decay."""
    penalty = 0.3
    yield "numDecayPenalty", plain(penalty)
    names = {"Rank": "learned_rank", "Error": "test_error"}
    at = {PENALTY: penalty}
    order_one = tables.rows(DECAY, {"curve": "order_one", "source": "simulation"})
    yield "parDecay", parameters(DECAY, tables.all(DECAY), (SAMPLES,))
    yield "numDecaySizes", sizes(order_one)
    for word, name in names.items():
        chosen = {"curve": "order_one", "observable": name, **at}
        yield f"numDecay{word}", printed(at_infinity(tables, DECAY, chosen))
        for branch in ("metastable", "least"):
            line = tables.rows(DECAY, {"curve": branch, "source": "theory", "observable": name})
            line = line.sort_values(PENALTY)
            value, error = (
                np.interp(np.log(penalty), np.log(line[PENALTY]), line[column])
                for column in ("value", "error")
            )
            yield f"numDecay{word}{branch.capitalize()}", printed(Number(value, error), 3)
        small = {"curve": "small", "observable": name, "dim": order_one["dim"].max(), **at}
        yield f"numDecay{word}Small", printed(tables.number(DECAY, small))
    yield "numDecayLarge", plain(order_one["dim"].max(), 4)


def metrics(tables: Tables) -> Macros:
    """Truncation where tokens have a covariance."""
    shared = {ACTIVATION: "linear", "source": "theory", "rank": 0.1}
    yield "parMetric", parameters(COVARIANCE, tables.rows(COVARIANCE, shared), STAGES)
    yield "numMetricRank", plain(shared["rank"])
    same = {**shared, "condition": 100, "power": 1.0, "observable": "distortion"}
    yield "numMetricCondition", plain(same["condition"])
    for word, method in (("Two", "two_sided"), ("One", "one_sided"), ("None", "none")):
        found = tables.number(COVARIANCE, {**same, "method": method})
        yield f"numDistortion{word}", printed(found)
    moved = {**shared, "condition": 30, "power": 0.5, "observable": "test_error"}
    yield "numShiftPower", plain(moved["power"])
    yield "numShiftCondition", plain(moved["condition"])
    for word, method in (
        ("None", "none"), ("Old", "two_sided"), ("New", "shifted"), ("Anchored", "anchored"),
    ):  # fmt: skip
        found = tables.number(COVARIANCE, {**moved, "method": method})
        yield f"numShift{word}", printed(found)


def deep_linear(tables: Tables) -> Macros:
    ratios = {"panel": "rates", "observable": "rate_ratio", "kind": "exact"}
    off = (tables.rows(DEEP, ratios)["value"] - 1).abs().max()
    yield "numRateOff", percent(math.ceil(1000 * off) / 1000, 1)
    alone = tables.rows(DEEP, {"panel": "rates", "observable": "rate_ratio_resolved"})
    worst = max(alone["highest"].max() - 1, 1 - alone["lowest"].min())
    yield "numRateRuns", count(alone["seeds"].sum())
    yield "numRateOffAlone", bound(worst)
    yield "numDegree", in_words(5)
    steps = {"panel": "speed", "observable": "steps_ratio"}
    for word, arm in (("Five", "degree 5"), ("One", "degree 1"), ("Enlarged", "plain, enlarged")):
        yield f"numSteps{word}", printed(tables.number(DEEP, {**steps, "arm": arm}))


PARTS: tuple[Callable[[Tables], Macros], ...] = (
    validation, effective_noise, optimal, figure3, mismatched, price, active, low_rank, deep_linear,
)  # fmt: skip


def numbers(tables: Tables) -> dict[str, str]:
    """Every number of the text by the name of its macro."""
    found: dict[str, str] = {}
    for part in PARTS:
        for name, text in part(tables):
            if name in found:
                raise ValueError(f"two numbers are called {name}")
            found[name] = text
    return found
