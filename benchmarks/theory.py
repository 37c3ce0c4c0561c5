"""predict: cold and warm by T, activation and e, and its error against time over the nodes."""

from __future__ import annotations

import statistics

from common import (
    TARGET_ERROR,
    TARGET_SECONDS,
    Column,
    Part,
    Row,
    figure1_problem,
    fresh,
    problem,
    relative_errors,
    timed,
)

NOTES = """
Both stages.  Cold: first call of a fresh process, imports and compilation included.  Warm: median
over other problems of the same shape, each seen once (predict remembers pre-training).  Error:
largest quadrature error over value among E, Q, M, E', the frozen error, the overlap, q and m,
over the warm problems.  Target: error ≤ 2e-3 in 0.5 s at T = 2, 1.5 s at T = 3.  Ratio: warm time
over that of softmax T=2 fresh.  Rows with nodes: the curve of error against time; the others take
the default.
"""
COLUMNS = (
    Column("case", "case"),
    Column("nodes", "nodes"),
    Column("cold_s", "cold s", ".2f"),
    Column("warm_s", "warm s", ".3f"),
    Column("ratio", "ratio", ".2f"),
    Column("cold_over_warm", "cold/warm", ".0f"),
    Column("relative_error", "error", ".1e"),
    Column("worst", "largest for"),
    Column("within_target", "in target"),
    Column("status", "status"),
)
PENALTIES = (0.05, 0.06, 0.07, 0.08)
CURVE_NODES = {2: (512, 1024, 2048, 4096), 3: (512, 1024, 2048)}
REFERENCE = "softmax T=2 fresh"


def case(
    name: str, penalties: list[float], tokens: int, nodes: int | None = None, **asked: str
) -> Row:
    """Cold on the first penalty, warm on the others; to be called in a fresh process."""

    def first() -> tuple[object, object]:
        from lora_theory import predict

        return predict, predict(_problem(penalties[0], tokens, **asked), nodes=nodes)

    cold, (predict, _) = timed(first)
    return _row(name, predict, penalties[1:], tokens, nodes, asked) | {"cold_s": cold}


def curve(name: str, penalties: list[float], tokens: int, nodes: list[int], **asked: str) -> list:
    """Warm rows by number of nodes; to be called in a fresh process."""
    from lora_theory import predict

    rows = []
    for count in nodes:
        predict(_problem(penalties[0], tokens, **asked), nodes=count)
        rows.append(_row(name, predict, penalties[1:], tokens, count, asked))
    return rows


def _problem(penalty: float, tokens: int, activation: str = "softmax", sequences: str = "fresh"):
    if sequences == "figure 1":
        return figure1_problem(penalty, tokens)
    return problem(tokens, activation, sequences, penalty)


def _row(name, predict, penalties, tokens, nodes, asked) -> Row:
    runs = [
        timed(lambda p=penalty: predict(_problem(p, tokens, **asked), nodes=nodes))
        for penalty in penalties
    ]
    errors = [relative_errors(answer) for _, answer in runs]
    worst = max(errors[0], key=lambda key: max(error[key] for error in errors))
    largest = max(error[worst] for error in errors)
    statuses = {answer.status.value for _, answer in runs}
    seconds = statistics.median(seconds for seconds, _ in runs)
    row = {
        "case": name,
        "tokens": tokens,
        "nodes": nodes,
        "warm_s": seconds,
        "relative_error": largest,
        "worst": worst,
        "status": ", ".join(sorted(statuses)),
    }
    if tokens in TARGET_SECONDS:
        within = largest <= TARGET_ERROR and seconds <= TARGET_SECONDS[tokens]
        row["within_target"] = "yes" if within else "no"
    return row


def measure(toy: bool = False) -> Part:
    sizes, penalties, nodes = (2, 3, 4), PENALTIES, CURVE_NODES
    activations, sequences = ("linear", "softmax"), ("fresh", "reused")
    curves = {(2, "fresh"), (3, "fresh"), (3, "figure 1")}
    if toy:
        sizes, penalties, nodes, curves = (2,), PENALTIES[:2], {2: (64,)}, {(2, "fresh")}
        activations, sequences = ("linear",), ("fresh",)
    rows = [
        fresh("theory.case", name=f"{activation} T={tokens} {kind}", penalties=penalties,
              tokens=tokens, activation=activation, sequences=kind)
        for activation in activations for tokens in sizes for kind in sequences
    ]  # fmt: skip
    for tokens, kind in sorted(curves):
        activation = activations[-1]
        rows += fresh("theory.curve", name=f"{activation} T={tokens} {kind}", penalties=penalties,
                      tokens=tokens, nodes=nodes[tokens], activation=activation,
                      sequences=kind)  # fmt: skip
    reference = next((row["warm_s"] for row in rows if row["case"] == REFERENCE), None)
    for row in rows:
        if reference:
            row["ratio"] = row["warm_s"] / reference
        if "cold_s" in row:
            row["cold_over_warm"] = row["cold_s"] / row["warm_s"]
    return Part(NOTES, COLUMNS, rows)
