"""Controls for every field of a problem: ranges, help, and when each applies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from lora_theory.problem import FieldSpec, Problem
from lora_theory.spelling import problem_of_texts, texts_of

__all__ = ["CONTROLS", "Control", "Range", "problem_of", "ranges", "values_of"]

ON, OFF = "on", ""


class Range(NamedTuple):
    """The ends of a slider and how it runs between them; a typed value may lie outside."""

    low: float
    high: float
    scale: Literal["log", "linear", "integer"] = "log"


@dataclasses.dataclass(frozen=True)
class Control:
    """One control: a slider, a choice, a text, or the switch of a part of the problem.

    ``needs`` lists other controls with the values of which one must be set for this to apply;
    ``default`` is what it holds before it is touched, "" where the field is left out.
    """

    name: str
    label: str
    help: str
    group: str
    range: Range | None = None
    choices: tuple[str | tuple[str, str], ...] = ()  # values, or values with their words
    switch: bool = False
    buttons: bool = False  # choices as buttons side by side
    action: bool = False  # a button; its value counts how often it was pressed
    default: str = ""
    needs: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def applies(self, values: Mapping[str, str]) -> bool:
        """Whether the field has a meaning beside the values of the other controls."""
        return all(values[name] in allowed for name, allowed in self.needs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the page."""
        return dataclasses.asdict(self) | {"range": self.range and self.range._asdict()}


#: Titles of the groups; a group with a name in SWITCHES can be left out.
GROUPS = {
    "": "Attention layer and labels",
    "teacher": "Pre-training teacher",
    "covariance": "Covariance of the tokens",
    "pretraining": "Pre-training",
    "compression": "Compression",
    "finetuning": "Fine-tuning (LoRA)",
    "finetuning.selection": "Active fine-tuning",
}
SWITCHES = {
    "covariance": "tokens have a covariance C; otherwise they are white",
    "compression": "the weights are truncated to low rank before they are frozen",
    "finetuning": "a second stage follows the pre-training",
    "finetuning.selection": "its sequences are chosen from a pool by a score",
}
_RANGES = {
    "tokens": Range(1, 8, "integer"),
    "teacher_rank": Range(0.02, 10),
    "label_noise": Range(0, 2, "linear"),
    "inverse_temperature": Range(0.1, 10),
    "teacher.exponent": Range(0.02, 0.48, "linear"),
    "teacher.inverse_temperature": Range(0.1, 10),
    "pretraining.samples": Range(0.01, 10),
    "pretraining.penalty": Range(1e-3, 10),
    "pretraining.rank": Range(0.02, 1),
    "pretraining.scale": Range(0.1, 10),
    "compression.rank": Range(0.01, 1),
    "finetuning.samples": Range(0.1, 100),
    "finetuning.penalty": Range(1e-3, 10),
    "finetuning.signal": Range(0.1, 10),
    "finetuning.reused_fraction": Range(0.01, 1, "linear"),
    "finetuning.rescaling": Range(0.1, 10),
    "finetuning.selection.pool": Range(1, 1000),
}
#: Start values of fields that have none of their own.
_DEFAULTS = {
    "tokens": "2", "activation": "softmax", "teacher_rank": "0.5", "label_noise": "0.5",
    "teacher.exponent": "0.25", "teacher.eigenvalues": "1, -1",
    "covariance.eigenvalues": "0.5, 1.5",
    "pretraining.samples": "0.2", "pretraining.penalty": "0.1",
    "pretraining.function": "abs(s)**1.5", "pretraining.degree": "5", "pretraining.scale": "2.0",
    "compression.rank": "0.3",
    "finetuning.samples": "3.0", "finetuning.penalty": "0.5", "finetuning.reused_fraction": "1.0",
    "finetuning.noise": "shared",
    "finetuning.selection.pool": "60.0", "finetuning.selection.function": "variance - 2*cross",
}  # fmt: skip
_NEEDS = {
    "teacher_rank": ("teacher.law", ("wishart",)),
    "teacher.exponent": ("teacher.law", ("power_law",)),
    "teacher.eigenvalues": ("teacher.law", ("eigenvalues",)),
    "pretraining.function": ("pretraining.regularizer", ("separable",)),
    "pretraining.degree": ("pretraining.regularizer", ("preconditioned",)),
    "pretraining.scale": ("pretraining.regularizer", ("preconditioned",)),
    "compression.whitening": ("covariance", (ON,)),
    "compression.calibration": ("covariance", (ON,)),
    "finetuning.reused_fraction": ("finetuning.sequences", ("reused",)),
    "finetuning.noise": ("finetuning.sequences", ("reused",)),
    "finetuning.selection.function": ("finetuning.selection.score", ("function",)),
}
#: Values at which a field that may be left out says nothing.
_SILENT = {"finetuning.reused_fraction": 1.0, "finetuning.noise": "shared"}


def _control(spec: FieldSpec) -> Control:
    group, _, inner = spec.name.rpartition(".")
    words = inner.replace("_", " ")
    needs = [(part, (ON,)) for part in SWITCHES if group == part or group.startswith(f"{part}.")]
    if spec.name in _NEEDS:
        needs.append(_NEEDS[spec.name])
    stated = spec.default if isinstance(spec.default, str | int | float) else None
    choices = ("1", "3", "5", "7", "9") if spec.name == "pretraining.degree" else spec.choices
    return Control(
        name=spec.name,
        label=f"{words} {spec.symbol}".rstrip(),
        help=spec.meaning + ("" if choices else f"; {spec.allowed}"),
        group=group,
        range=_RANGES.get(spec.name),
        choices=choices,
        default=_DEFAULTS.get(spec.name, "" if stated is None else str(stated)),
        needs=tuple(needs),
    )


def _switch(name: str) -> Control:
    outer = name.rpartition(".")[0]
    needs = ((outer, (ON,)),) if outer in SWITCHES else ()
    return Control(
        name, GROUPS[name], SWITCHES[name], group=name, switch=True, default=OFF, needs=needs
    )


#: Every control in the order of the page.
CONTROLS: tuple[Control, ...] = tuple(
    control
    for group in GROUPS
    for control in (
        *((_switch(group),) if group in SWITCHES else ()),
        *(_control(s) for s in Problem.specs() if s.name.rpartition(".")[0] == group),
    )
)


def problem_of(values: Mapping[str, str]) -> Problem:
    """The problem that the controls spell.

    Raises:
        ProblemError: it is not allowed; the message names field, value and range.

    Example:
        >>> problem_of({control.name: control.default for control in CONTROLS}).tokens
        2
    """
    texts = {
        control.name: text
        for control in CONTROLS
        if not control.switch and control.applies(values) and (text := values[control.name].strip())
    }
    problem = problem_of_texts(texts)
    silent = {n: None for n, value in _SILENT.items() if problem.to_flat().get(n) == value}
    return problem.replace(silent)


def values_of(problem: Problem) -> dict[str, str]:
    """What the controls show of a problem; those that do not apply hold their defaults."""
    texts = texts_of(problem)
    parts = dict.fromkeys(SWITCHES, OFF)
    parts |= {name: ON for name in SWITCHES if any(field.startswith(f"{name}.") for field in texts)}
    defaults = {control.name: control.default for control in CONTROLS}
    return defaults | texts | parts


def ranges(problem: Problem) -> dict[str, Range]:
    """The fields of a problem that can be varied, with the ranges of their sliders."""
    values = values_of(problem)
    return {c.name: c.range for c in CONTROLS if c.range is not None and c.applies(values)}
