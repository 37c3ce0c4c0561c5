"""The eigenvalues that the trained matrix has learned."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from lora_theory.explorer.answers import COARSE, FINE, Precision
from lora_theory.explorer.draw_spectrum import draw_spectrum
from lora_theory.explorer.points import View
from lora_theory.observables import Estimate
from lora_theory.problem import Problem, ProblemError
from lora_theory.status import Status
from lora_theory.theory import LearnedSpectrum, spectrum

__all__ = ["learned_spectrum"]


def learned_spectrum(problem: Problem) -> Iterator[View]:
    """Density, mass at zero and outliers of the trained S, after a compression what that leaves."""
    for precision, done in ((COARSE, 0.2), (FINE, 1.0)):
        try:
            found = _kept(problem.replace(finetuning=None), precision)
        except ProblemError as refusal:
            raise ProblemError(f"the learned spectrum is not known here: {refusal}") from refusal
        table = _table(problem, found, precision)
        caption = _caption(found, precision)
        yield View(table, caption, done, functools.partial(draw_spectrum, table))


@functools.lru_cache(maxsize=256)
def _kept(problem: Problem, precision: Precision) -> LearnedSpectrum:
    return spectrum(problem, nodes=precision.nodes, blocks=precision.blocks)


def _table(problem: Problem, found: LearnedSpectrum, precision: Precision) -> pd.DataFrame:
    shared: dict[str, Any] = {"source": "theory", "status": found.status.value}
    shared |= {"nodes": precision.points(problem.tokens), "blocks": precision.blocks}
    rows: list[dict[str, Any]] = [
        {"observable": "density", "eigenvalue": at, "value": value}
        for at, value in zip(found.eigenvalues, found.density, strict=True)
    ]
    for low, high in found.bands:
        error = found.quadrature_error["bands"]
        for name, end in (("band_start", low), ("band_end", high)):
            rows.append({"observable": name, "eigenvalue": end, "value": end, "error": error})
    for name in ("mass_at_zero", "rank", "effective_rank", "mean", "second_moment"):
        error = found.quadrature_error[name]
        rows.append({"observable": name, "value": getattr(found, name), "error": error})
    for outlier in found.outliers:
        rows.append(
            {"observable": "outlier", "spike": outlier.spike, "eigenvalue": outlier.eigenvalue,
             "value": outlier.squared_overlap, "error": found.quadrature_error["outliers"]}
        )  # fmt: skip
    for name, spike in zip(("visible_below", "visible_above"), found.visible_spikes, strict=True):
        if spike is not None:
            rows.append({"observable": name, "value": spike})
    flat = problem.to_flat()
    return pd.DataFrame([row | shared | flat for row in rows])


def _of(found: LearnedSpectrum, name: str) -> Estimate:
    return Estimate(getattr(found, name), found.quadrature_error[name], 1)


def _caption(found: LearnedSpectrum, precision: Precision) -> str:
    errors = found.quadrature_error
    below, above = found.visible_spikes
    edges = ((">", above), ("<", below))
    seen = [f"θ {side} {edge:.3g}" for side, edge in edges if edge is not None]
    where = " or ".join(seen)
    spikes = (
        f"Spikes of the teacher are visible outside of the bulk where {where}." if where else ""
    )
    outliers = "; ".join(
        f"θ = {one.spike:g} at {one.eigenvalue:.4g}, squared overlap {one.squared_overlap:.3g}"
        for one in found.outliers
    )
    if outliers:
        error = errors["outliers"]
        exact = f" (error of the positions {error:.1g})" if error else ""
        spikes += f" Outliers: {outliers}{exact}."
    remedy = "" if found.status is Status.CONVERGED else f" {found.status.remedy}"
    points = precision.points(found.problem.tokens)
    compressed = ", after the truncation" if found.problem.compression else ""
    if any(math.isinf(end) for band in found.bands for end in band):
        spikes += " The bulk has no edge: the last 1 % of each side are not shown."
    text = (
        f"Eigenvalues of the trained matrix S{compressed}: density (integrates to the rank/D "
        f"{_of(found, 'rank')}) and the share {_of(found, 'mass_at_zero')} at zero; effective "
        f"rank/D {_of(found, 'effective_rank')}. {spikes} "
        f"Nodes × blocks: {points} × {precision.blocks}.{remedy}"
    )
    return text.replace("  ", " ")
