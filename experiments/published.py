"""Published simulations of pre-training beside ours and the theory: test error against α.

Softmax, D = 100, data of arXiv 2509.24914 (tests/reference/README.md).  The full profile takes our
runs from tests/reference/published_runs.csv, where experiments/published_runs.py stored them; the
quick profile trains a few small systems instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from figure_tools import CURVES, Experiment, Profile, solved
from matplotlib.figure import Figure
from published_runs import (
    AVERAGED,
    DIM,
    PENALTIES,
    RUNS,
    SAMPLES,
    comparison,
    problem,
    scatter,
    simulated,
)
from published_runs import published as published_table

from lora_theory import predict

#: source: its label in the legend
LABELS = {
    "published": "published, $D=100$",
    "simulation": "our simulation, $D={dim:.0f}$",
    "theory": r"theory, $D\to\infty$",
    "corrected": "theory with the $1/D$ offset of our simulation",
}
#: positions of the α that the quick profile simulates
QUICK = (3, 8)


def compute(profile: Profile, _: Path) -> pd.DataFrame:
    return pd.DataFrame(
        [
            *_published_rows(),
            *_theory_rows(profile),
            *profile.pick(quick=_trained, full=_stored)(profile),
        ]
    )


def _published_rows() -> Iterator[dict[str, Any]]:
    shares = scatter(pd.read_csv(RUNS), "test_error").groupby("tokens")["teacher"].first()
    for row in published_table().itertuples():
        average = row.spread / AVERAGED[row.tokens] ** 0.5
        error = float(np.hypot(shares[row.tokens] * row.test_error, average))
        yield _row("published", row.tokens, row.alpha, row.test_error, error, dim=row.D)


def _theory_rows(profile: Profile) -> Iterator[dict[str, Any]]:
    for tokens, alphas in SAMPLES.items():
        between = np.sqrt(np.multiply(alphas[1:], alphas[:-1])).tolist()
        for alpha in profile.pick(quick=alphas, full=sorted([*alphas, *between])):
            yield predicted(tokens, alpha, profile)


def predicted(tokens: int, alpha: float, profile: Profile) -> dict[str, Any]:
    """The row of the theory at one α."""
    prediction = predict(problem(tokens, alpha), nodes=profile.nodes, blocks=profile.blocks)
    stage = prediction.pretraining
    error, status = stage.quadrature_error["test_error"], prediction.status.value
    return _row("theory", tokens, alpha, stage.test_error, error, status=status)


def _stored(profile: Profile) -> Iterator[dict[str, Any]]:
    """Our stored runs, and their offset from D → ∞."""
    for row in comparison(pd.read_csv(RUNS), "test_error").itertuples():
        place = row.tokens, row.alpha
        yield _row("simulation", *place, row.simulation, row.simulation_error, dim=DIM)
        yield _row("offset", *place, row.offset, row.offset_error, dim=DIM)


def _trained(profile: Profile) -> Iterator[dict[str, Any]]:
    for tokens, alphas in SAMPLES.items():
        for alpha in (alphas[position] for position in QUICK):
            runs = pd.DataFrame(simulated(tokens, alpha, profile.dim, profile.seeds))
            numbers = runs["test_error"].mean(), runs["test_error"].sem()
            status = "converged" if runs["converged"].all() else "not_converged"
            yield _row("simulation", tokens, alpha, *numbers, profile.dim, status)


def _row(
    source: str,
    tokens: int,
    alpha: float,
    value: float,
    error: float,
    dim: float | None = None,
    status: str = "converged",
) -> dict[str, Any]:
    labels = {"tokens": tokens, "alpha": alpha, "source": source, "dim": dim, "status": status}
    return {**labels, "value": value, "error": error}


def _with_offset(part: pd.DataFrame) -> pd.DataFrame:
    """Theory plus offset, where both are known."""
    theory, offset = (part[part["source"] == source] for source in ("theory", "offset"))
    both = theory[["alpha", "value"]].merge(
        offset[["alpha", "value", "error"]], on="alpha", suffixes=("", "_offset")
    )
    return both.assign(value=both["value"] + both["value_offset"]).sort_values("alpha")


def draw(table: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(
        2, 2, figsize=(7.2, 4.6), sharex="col", layout="constrained", height_ratios=(3, 2)
    )
    table = solved(table)
    for column, tokens in enumerate(SAMPLES):
        part = table[table["tokens"] == tokens]
        upper, lower = axes[:, column]
        _draw_values(upper, part)
        _draw_deviations(lower, part)
        upper.set_title(rf"$T={tokens}$, $\lambda={PENALTIES[tokens]:g}$")
        upper.set_ylim(bottom=0)
        lower.set_xlabel(r"$\alpha=N/D^2$")
    axes[0, 0].set_ylabel("test error $E$")
    axes[1, 0].set_ylabel("deviation from\ntheory (%)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, columnspacing=1.2)
    return figure


def _draw_values(panel: Any, part: pd.DataFrame) -> None:
    theory = part[part["source"] == "theory"].sort_values("alpha")
    panel.plot(theory["alpha"], theory["value"], "-", color=CURVES[0][0], label=LABELS["theory"])
    corrected = _with_offset(part)
    if len(corrected):
        panel.plot(
            corrected["alpha"], corrected["value"], "--", color=CURVES[0][0],
            label=LABELS["corrected"],
        )  # fmt: skip
    for source, (color, _, marker) in zip(("published", "simulation"), CURVES[1:], strict=True):
        points = part[part["source"] == source]
        panel.errorbar(
            points["alpha"], points["value"], points["error"], fmt=marker, color=color,
            mfc="white", capsize=0, linewidth=0.8, markersize=2 if source == "published" else 4,
            zorder=2 if source == "published" else 3,
            label=LABELS[source].format(dim=points["dim"].iloc[0]),
        )  # fmt: skip
    panel.set_xscale("log")


def _draw_deviations(panel: Any, part: pd.DataFrame) -> None:
    theory = part[part["source"] == "theory"][["alpha", "value"]]
    panel.axhline(0, color=CURVES[0][0])

    def percent(points: pd.DataFrame) -> pd.DataFrame:
        both = points.merge(theory, on="alpha", suffixes=("", "_theory"))
        scale = 100 / both["value_theory"]
        return both.assign(
            value=(both["value"] - both["value_theory"]) * scale,
            error=both["error"] * scale,
        )

    corrected = percent(_with_offset(part))
    panel.plot(corrected["alpha"], corrected["value"], "--", color=CURVES[0][0])
    low, high = (corrected["value"] + sign * corrected["error"] for sign in (-1, 1))
    panel.fill_between(corrected["alpha"], low, high, color="0.87", linewidth=0, zorder=0)
    # side by side where both are at the same α
    for source, shift, (color, _, marker) in zip(
        ("published", "simulation"), (0.97, 1.03), CURVES[1:], strict=True
    ):
        points = percent(part[part["source"] == source])
        panel.errorbar(
            points["alpha"] * shift, points["value"], points["error"], fmt=marker, color=color,
            mfc="white", capsize=1.5, linewidth=0.8, zorder=3,
        )  # fmt: skip


def caption(table: pd.DataFrame) -> str:
    shown = solved(table)
    theory, simulation = (shown[shown["source"] == s] for s in ("theory", "simulation"))
    stored = "offset" in set(table["source"])
    origin = (
        "16 stored runs (tests/reference/published_runs.csv)"
        if stored
        else "a few runs of the quick profile"
    )
    offset = (
        "; dashed: theory plus the O(1/D) offset at D = 100, the slope in 1/D of our runs at "
        "three D (two D at some α), below with its standard error in grey"
        if stored
        else ""
    )
    unsolved = (table["source"] == "theory") & (table["status"] == "not_converged")
    return (
        "**Published simulations.** Test error E of pre-training (label noise included) against "
        "α: softmax, κ0 = 0.5, κ = 1, Δ = 0.5. Squares: simulations published with arXiv "
        "2509.24914, Adam at D = 100, averages over at most 32 (T = 2) or 8 (T = 3) runs with one "
        "teacher per point; bars: their standard error combined with the scatter between "
        "teachers, estimated from our runs. Triangles: our simulation, L-BFGS at "
        f"D = {simulation['dim'].iloc[0]:.0f}, mean ± standard error of {origin}, every run with "
        f"its own teacher. Solid: theory, D → ∞, largest quadrature error "
        f"{(theory['error'] / theory['value']).max():.1%}{offset}. Lower panels: relative "
        "deviation from the theory where all were computed at the same α. Theory points "
        f"left out as not converged: {unsolved.sum()}."
    )


EXPERIMENT = Experiment("published", compute, draw, caption)
