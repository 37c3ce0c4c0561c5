"""predict_many: time per problem in batches of 1, 8 and 64."""

from __future__ import annotations

from common import (
    TARGET_ERROR,
    TARGET_SECONDS,
    Column,
    Part,
    Row,
    fresh,
    problem,
    relative_errors,
    timed,
)

NOTES = """
Warm, both stages, softmax, fresh sequences: a batch of as many other problems goes first.  Ratio:
time per problem over that of predict, alone, in the same process.  A batch that would take longer
than 120 s at the pace of the one before is left out.
"""
COLUMNS = (
    Column("case", "case"),
    Column("batch", "batch"),
    Column("first_s", "first s", ".2f"),
    Column("batch_s", "batch s", ".2f"),
    Column("per_problem_s", "s/problem", ".3f"),
    Column("ratio", "ratio", ".2f"),
    Column("relative_error", "error", ".1e"),
    Column("within_target", "in target"),
    Column("remark", "remark"),
)
LIMIT = 120.0


def family(tokens: int, count: int, offset: float, activation: str = "softmax") -> list:
    """Different problems: both penalties grow by steps of 2 %, λ from .02·1.02^offset."""
    return [
        problem(tokens, activation, "fresh", 0.02 * 1.02 ** (k + offset), 0.1 * 1.02**k)
        for k in range(count)
    ]


def tokens_rows(tokens: int, batches: list[int], activation: str, nodes: int | None) -> list[Row]:
    """To be called in a fresh process."""
    try:
        from lora_theory import predict, predict_many
    except ImportError:
        return []
    predict(problem(tokens, activation, penalty=0.2), nodes=nodes)
    alone, _ = timed(lambda: predict(problem(tokens, activation, penalty=0.21), nodes=nodes))
    rows: list[Row] = [
        {"case": f"{activation} T={tokens}", "batch": "alone", "per_problem_s": alone}
    ]
    pace = alone
    for index, batch in enumerate(batches):
        row: Row = {"case": f"{activation} T={tokens}", "batch": batch}
        rows.append(row)
        if 2 * pace * batch > LIMIT:
            row["remark"] = f"left out: {2 * pace * batch:.0f} s at the pace before"
            continue
        # offsets within one step: no λ of one family is met again in another
        offsets = (2 * index) / (2 * len(batches)), (2 * index + 1) / (2 * len(batches))
        warm_up, asked = (family(tokens, batch, offset, activation) for offset in offsets)
        row["first_s"], _ = timed(lambda p=warm_up: predict_many(p, nodes=nodes))
        row["batch_s"], answers = timed(lambda p=asked: predict_many(p, nodes=nodes))
        pace = row["per_problem_s"] = row["batch_s"] / batch
        row["ratio"] = pace / alone
        row["relative_error"] = max(max(relative_errors(answer).values()) for answer in answers)
        unsolved = sum(not answer.status.is_solved for answer in answers)
        row["remark"] = f"{unsolved} not converged" if unsolved else None
        if tokens in TARGET_SECONDS:
            within = pace <= TARGET_SECONDS[tokens] and row["relative_error"] <= TARGET_ERROR
            row["within_target"] = "yes" if within else "no"
    return rows


def measure(toy: bool = False) -> Part:
    sizes, batches, activation, nodes = (2, 3), (1, 8, 64), "softmax", None
    if toy:
        sizes, batches, activation, nodes = (2,), (1, 2), "linear", 64
    rows = [
        row
        for tokens in sizes
        for row in fresh("batches.tokens_rows", tokens=tokens, batches=batches,
                         activation=activation, nodes=nodes)
    ]  # fmt: skip
    reason = None if rows else "lora_theory has no predict_many"
    return Part(NOTES, COLUMNS, rows, reason)
