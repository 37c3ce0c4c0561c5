"""Stretches of a trajectory on which error and overlap move in given directions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from lora_theory.explorer.points import pending
from lora_theory.status import Status

__all__ = ["Stretch", "path", "stretches"]


class Stretch(NamedTuple):
    """Neighbouring points between which E' and o keep the signs of their changes."""

    start: float  # of the field
    end: float
    mismatch: bool  # whether both change in one direction
    decided: bool  # whether both changes exceed the quadrature errors of their ends


def path(table: pd.DataFrame) -> pd.DataFrame:
    """The solved points of theory, by the field: values and errors of E' and o."""
    rows = table[(table["source"] == "theory") & ~pending(table)]
    wide = rows.pivot(index="x", columns="observable", values=["value", "error"]).astype(float)
    first = rows.groupby("x").last()[["status", "precision", "chosen"]]
    found = pd.DataFrame(
        {
            "E": wide["value", "finetuning.test_error"],
            "o": wide["value", "finetuning.overlap"],
            "error_E": wide["error", "finetuning.test_error"],
            "error_o": wide["error", "finetuning.overlap"],
        }
    ).join(first)
    found.loc[found["status"] == Status.NOT_CONVERGED.value, ["E", "o"]] = np.nan
    return found.reset_index()


def stretches(table: pd.DataFrame) -> list[Stretch]:
    """All stretches, in the order of the field; points of different precision are not compared."""
    points, found = path(table), []
    kinds = points["precision"].to_numpy()
    steps = points[["E", "o"]].diff().to_numpy()[1:]
    known = np.isfinite(steps).all(axis=1) & (kinds[1:] == kinds[:-1])
    signs = np.where(known[:, None], np.sign(np.nan_to_num(steps)), 0.0)
    start = 0
    for end in range(1, len(points)):
        if end < len(points) - 1 and np.array_equal(signs[end], signs[start]):
            continue
        if signs[start].all():
            first, last = points.iloc[start], points.iloc[end]
            decided = all(
                abs(last[name] - first[name]) > first[f"error_{name}"] + last[f"error_{name}"]
                for name in ("E", "o")
            )
            same = bool(signs[start, 0] == signs[start, 1])
            found.append(Stretch(first["x"], last["x"], same, decided))
        start = end
    return found
