"""Theory beside simulations, observable by observable."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pandas as pd

from lora_theory.compare import Agreement, agreements
from lora_theory.explorer.answers import FINE, answer
from lora_theory.explorer.draw_comparison import draw_comparison, far_z
from lora_theory.explorer.points import View
from lora_theory.problem import Problem, ProblemError
from lora_theory.status import Status

__all__ = ["comparison"]


def comparison(problem: Problem, runs: Mapping[int, pd.DataFrame]) -> View:
    """Theory, simulation at every D, and the limit D → ∞ of several, with z-scores.

    Args:
        problem: what was simulated.
        runs: by D, one row per seed, as ``Simulation.runs``.
    """
    by_dim = {dim: runs[dim] for dim in sorted(runs) if len(runs[dim])}
    if not by_dim:
        raise ProblemError("there are no runs to compare with: simulate some first")
    found = answer(problem, FINE)
    used = {"nodes": FINE.points(problem.tokens), "blocks": FINE.blocks}
    used |= {"status": found.status.value} | problem.to_flat()
    rows: list[dict[str, Any]] = []
    for dim, table in by_dim.items():
        for one in agreements(found, {dim: table}):
            row = _row(one, "simulation", dim, len(by_dim) == 1)
            rows.append(row | used)
    if len(by_dim) > 1:
        for one in agreements(found, by_dim):
            rows.append(_row(one, "limit", None, True) | used)
    for one in agreements(found, by_dim):
        row = _row(one, "theory", None, False)
        row |= {"value": one.theory, "error": one.quadrature_error, "runs": None}
        rows.append(row | used)
    table = pd.DataFrame(rows)
    caption = _caption(table, found.status)
    return View(table, caption, 1.0, functools.partial(draw_comparison, table))


def _row(one: Agreement, source: str, dim: int | None, judged: bool) -> dict[str, Any]:
    estimate = one.simulation
    return {
        "source": source, "dim": dim, "observable": f"{one.stage}.{one.observable}",
        "value": estimate.mean, "error": estimate.error, "runs": estimate.count,
        "corrected": one.corrected, "power": one.power, "z": one.z if judged else None,
    }  # fmt: skip


def _caption(table: pd.DataFrame, status: Status) -> str:
    simulated = table[table["source"] == "simulation"]
    sizes = simulated.groupby("dim")["runs"].first().astype(int)
    several = len(sizes) > 1
    shown = ", ".join(f"D = {dim:.0f} ({runs} runs)" for dim, runs in sizes.items())
    judged = table[table["z"].notna()]
    text = f"Theory (line, band: quadrature error) beside trained systems: {shown}. "
    if len(judged):
        worst = judged.loc[judged["z"].abs().astype(float).idxmax()]
        name = worst["observable"].replace("_", " ").replace(".", ", ")
        text += f"Largest |z| = {abs(worst['z']):.1f} of {len(judged)} observables ({name})"
        text += ", of the limits D → ∞ (diamonds). " if several else ". "
        text += f"Red: |z| > {far_z(table):.1f}, by chance once in a hundred such comparisons. "
    if not several:
        text += (
            "At one D the difference contains the offset of finite D, which falls as 1/D, for q, "
            "m, training and fine-tuning errors of softmax as 1/√D: simulate at several D to "
            "extrapolate it away. "
        )
    if table["corrected"].any():
        text += "The errors of fine-tuning are without their measured cross term. "
    text += f"Nodes × blocks: {table['nodes'].iloc[0]} × {table['blocks'].iloc[0]}."
    return text if status is Status.CONVERGED else f"{text} {status.remedy}"
