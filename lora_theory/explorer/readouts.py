"""The point that is asked for: what theory says of it, in words and with full precision."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

from lora_theory.explorer.exports import address
from lora_theory.observables import Estimate
from lora_theory.problem import Problem
from lora_theory.theory import Prediction

__all__ = ["Point", "rows_of"]

#: stage → {observable: (symbol, words)}
_SHOWN = {
    "pretraining": {
        "test_error": ("E", "test error"),
        "overlap": ("M/√(QQ₀)", "overlap"),
        "learned_rank": ("", "learned rank / D"),
    },
    "effective_noise": {
        "gain": ("M/Q", "gain"),
        "variance": ("", "variance"),
        "delta_eff": ("Δ_eff", "fresh"),
        "delta_eff_training": ("Δ_eff", "in training"),
    },
    "finetuning": {
        "test_error": ("E'", "test error"),
        "frozen_test_error": ("E'", "without LoRA"),
        "overlap": ("o", "overlap"),
        "q": ("q", "= ‖w‖²/D"),
        "m": ("m", "= |w·w*|/D"),
    },
}
_TITLES = {
    "pretraining": "Pre-training",
    "effective_noise": "Noise of the frozen weights",
    "finetuning": "Fine-tuning (LoRA)",
}


@dataclasses.dataclass(frozen=True)
class Point:
    """What is known of the problem that the controls spell.

    ``problem`` is the last one that could be read; ``message`` says what is being done, or why
    there is no prediction; ``refused`` whether the controls or the theory refuse it; ``waiting``
    whether the prediction is still that of the former problem; ``notice`` what else happened.
    """

    problem: Problem
    prediction: Prediction | None = None
    message: str = ""
    refined: bool = False
    refused: bool = False
    waiting: bool = False
    notice: str = ""

    def to_html(self) -> str:
        """Readouts; every number has an attribute ``data-value`` that spells all its digits."""
        waiting = self.waiting or self.prediction is None
        state = "waiting" if waiting else "refined" if self.refined else "coarse"
        state = "refused" if self.refused else state
        problem = html.escape(urlencode(address(self.problem)))
        parts = [
            f'<section class="readouts" aria-label="Readouts" data-state="{state}" '
            f'data-problem="{problem}">'
        ]
        if self.notice:
            parts.append(f'<p class="notice" role="alert">{html.escape(self.notice)}</p>')
        parts.append(f'<p class="status" role="status">{self._sentence()}</p>')
        if self.prediction is not None:
            parts.append('<div class="stages">')
            parts += [_table(self.prediction, stage) for stage in _SHOWN]
            parts.append("</div>")
        return "".join([*parts, "</section>"])

    def _sentence(self) -> str:
        if self.message or self.prediction is None:
            return html.escape(self.message)
        status, branch = self.prediction.status, ""
        name = status.value.replace("_", " ")
        if self.prediction.finetuning is not None:
            branch = f" LoRA is on its {html.escape(self.prediction.finetuning.branch)} branch."
        frozen = _worse_than_frozen(self.prediction)
        if not self.refined:
            return f"<b>Coarse</b>: few nodes, refining …{branch}"
        return f"<b>{name.capitalize()}</b>: {html.escape(status.remedy)}{branch}{frozen}"


def _worse_than_frozen(prediction: Prediction) -> str:
    stage = prediction.finetuning
    if stage is None or not stage.status.is_solved:
        return ""
    errors = stage.quadrature_error
    margin = math.hypot(errors["test_error"], errors["frozen_test_error"])
    if not stage.test_error - stage.frozen_test_error > 2 * margin:
        return ""
    return " <b>LoRA is worse than the frozen layer</b>: take more samples or penalty λ'."


def _table(prediction: Prediction, stage: str) -> str:
    rows = [
        f'<tr><th scope="row"><i>{html.escape(symbol)}</i> {html.escape(words)}</th>'
        f'<td data-name="{name}" data-value="{value!r}" data-error="{error!r}">{shown}</td></tr>'
        for name, symbol, words, value, error, shown in rows_of(prediction, stage)
    ]
    if not rows:
        return ""
    return f"<table><caption>{_TITLES[stage]}</caption><tbody>{''.join(rows)}</tbody></table>"


def rows_of(
    prediction: Prediction, stage: str
) -> Iterator[tuple[str, str, str, float, float | None, str]]:
    """Name, symbol, words, value, quadrature error and text of the numbers of a stage."""
    found: Any = getattr(prediction, stage)
    if found is None:
        return
    errors = found.quadrature_error or {}
    for name, (symbol, words) in _SHOWN[stage].items():
        value, error = getattr(found, name), errors.get(name)
        if value is None:
            continue
        shown = "undefined" if math.isnan(value) else str(Estimate(value, error, 1))
        yield f"{stage}.{name}", symbol, words, value, error, shown
