"""The question: one pre-training, one optional rank-one LoRA fine-tuning, validated once.

A :class:`Problem` is read by the theory, the simulation, the command line, the TOML files and the
tables; its field names are the flags, keys and columns.  Scalings are those of docs/theory.md,
section 1: D is the embedding dimension, sequences are counted in units of D² (pre-training) and
D (fine-tuning).
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Self

from lora_theory.field_specs import FieldSpec, ProblemError, refuse_misplaced, spec, validate
from lora_theory.parts import (
    Compression,
    Covariance,
    Finetuning,
    Pretraining,
    Selection,
    Teacher,
)
from lora_theory.selection import check_score, score_name

__all__ = [
    "Compression", "Covariance", "FieldSpec", "Finetuning", "Pretraining", "Problem",
    "ProblemError", "Selection", "Teacher", "assign", "parse_toml", "read_toml",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Pre-training followed by rank-one LoRA fine-tuning of a tied attention layer.

    The student is σ(h + χχᵀ − qI) with h_ab = (x_aᵀ S x_b − δ_ab Tr S)/√D, S = WWᵀ/√(PD),
    χ = Xw/√D and q = ‖w‖²/D; σ is the row softmax or σ(A) = A/T (docs/theory.md, section 1;
    model of arXiv 2606.05899).  Without ``finetuning`` only the pre-training is asked for.

    Raises:
        ProblemError: a value is outside its range; the message names field, value and range.

    Example:
        >>> problem = Problem(
        ...     tokens=2, activation="softmax", teacher_rank=0.5, label_noise=0.5,
        ...     pretraining=Pretraining(samples=0.2, penalty=0.02),
        ...     finetuning=Finetuning(samples=3.0, penalty=0.2),
        ... )
        >>> problem.replace({"pretraining.penalty": 0.1}).pretraining.penalty
        0.1
        >>> Problem.from_dict(problem.to_dict()) == problem
        True
    """

    tokens: int = spec("T", "tokens per sequence", "an integer ≥ 2 (≥ 1 for linear)")
    activation: str = spec(
        "σ",
        "row softmax, or σ(A) = A/T",
        '"softmax" or "linear"',
        choices=("softmax", "linear"),
    )
    teacher_rank: float | None = spec(
        "κ₀", "rank of the pre-training teacher, P₀/D, of the Wishart law", "> 0", default=None
    )
    label_noise: float = spec("Δ", "variance of the noise on the teacher's pre-activations", "≥ 0")
    inverse_temperature: float = spec(
        "τ", "factor of the student's pre-activations, σ(τ·)", "> 0", default=1.0
    )
    teacher: Teacher = Teacher()
    covariance: Covariance | None = None
    pretraining: Pretraining
    compression: Compression | None = None
    finetuning: Finetuning | None = None

    def __post_init__(self) -> None:
        validate(self, "")
        for name, kind in (("teacher", Teacher), ("pretraining", Pretraining)):
            if not isinstance(value := getattr(self, name), kind):
                raise ProblemError(f"{name} = {value!r} must be a {kind.__name__}")
        for name, part in (("compression", Compression), ("finetuning", Finetuning)):
            if not isinstance(value := getattr(self, name), part | None):
                raise ProblemError(f"{name} = {value!r} must be a {part.__name__} or None")
        if self.tokens < (1 if self.activation == "linear" else 2):
            raise ProblemError(
                f"tokens = {self.tokens} is not allowed with activation = {self.activation!r}: "
                "it must be an integer ≥ 2 (1 only for linear)"
            )
        law, teacher = self.teacher.law, (self.teacher, "teacher.")
        refuse_misplaced(self, "", "teacher_rank", "teacher.law", law, "wishart")
        refuse_misplaced(*teacher, "exponent", "teacher.law", law, "power_law")
        refuse_misplaced(*teacher, "eigenvalues", "teacher.law", law, "eigenvalues")
        if not isinstance(self.covariance, Covariance | None):
            raise ProblemError(f"covariance = {self.covariance!r} must be a Covariance or None")
        if self.covariance is not None:
            self._check_covariance(self.covariance)
        elif self.compression is not None:
            for name, default in (("whitening", "two_sided"), ("calibration", "pretraining")):
                if (value := getattr(self.compression, name)) != default:
                    raise ProblemError(
                        f'compression.{name} = "{value}" is not allowed without covariance: leave '
                        "it out"
                    )
        if self.finetuning is not None and self.finetuning.selection is not None:
            check_score(self.finetuning.selection, self.tokens)

    def _check_covariance(self, covariance: Covariance) -> None:
        """Refuse what a covariance of the tokens is not understood with."""
        stage = self.finetuning
        wrong = {
            "teacher.law": (self.teacher.law, "wishart"),
            "teacher.spikes": (self.teacher.spikes, None),
            "pretraining.regularizer": (self.pretraining.regularizer, "weight_decay"),
            "finetuning.selection": (stage.selection if stage else None, None),
        }
        if covariance.shifts and stage:
            wrong["finetuning.sequences"] = (stage.sequences, "fresh")
        for name, (value, wanted) in wrong.items():
            if value != wanted:
                which = "covariance.shifted" if name == "finetuning.sequences" else "covariance"
                raise ProblemError(
                    f"{name} = {value!r} is not allowed with {which}: it must be {wanted!r}"
                )

    # -- the one definition of the fields ------------------------------------------------------

    @classmethod
    def specs(cls) -> tuple[FieldSpec, ...]:
        """All fields by their dotted names, in the order of flags, keys and columns."""
        return tuple(_specs(cls, ""))

    def to_flat(self) -> dict[str, Any]:
        """Dotted field names to values; those that are None, or of no second stage, are absent."""
        return dict(_flattened(self.to_dict(), ""))

    @property
    def alone(self) -> Self:
        """The pre-training without what follows it."""
        unshifted = {"covariance.shifted": None} if self.covariance else {}
        return self.replace(unshifted, compression=None, finetuning=None)

    @property
    def rescaling(self) -> float:
        """β, 1 without fine-tuning."""
        return self.finetuning.rescaling if self.finetuning else 1.0

    def replace(self, changes: Mapping[str, Any] | None = None, /, **named: Any) -> Self:
        """A copy with some fields changed, by dotted names; top-level ones also as keywords.

        ``compression=None`` and ``finetuning=None`` drop these.
        """
        raw = self.to_dict()
        for name, value in {**(changes or {}), **named}.items():
            assign(raw, name, value)
        return type(self).from_dict(raw)

    # -- dictionaries and TOML -----------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values; ``finetuning`` is None without a second stage."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """The problem from nested plain values, as in a TOML file.

        Raises:
            ProblemError: unknown or missing key, wrong type, value out of range.
        """
        values = _with_parts(cls, raw, "")
        if values.get("pretraining") is None:
            values["pretraining"] = Pretraining(**_checked_keys(Pretraining, {}, "pretraining."))
        return cls(**_checked_keys(cls, values, ""))

    def check_text(self) -> None:
        """Refuse a problem that cannot be written as text."""
        selection = self.finetuning.selection if self.finetuning else None
        if selection is not None and callable(selection.score):
            raise ProblemError(
                f"finetuning.selection.score = {score_name(selection.score)} is a function of "
                "Python, which no file or table can hold: write it as finetuning.selection.function"
            )

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """The problem from a TOML file: top-level keys, ``[pretraining]`` and ``[finetuning]``."""
        return cls.from_dict(read_toml(path))

    def to_toml(self, path: str | Path | None = None) -> str:
        """The TOML text of the problem, also written to ``path`` if one is given.

        Raises:
            ProblemError: a score is a Python function.
        """
        self.check_text()
        lines: list[str] = []
        for name, value in self.to_flat().items():
            group, _, inner = name.rpartition(".")
            if group and f"[{group}]" not in lines:
                lines += ["", f"[{group}]"]
            # a string of JSON is one of TOML
            shown = json.dumps(value) if isinstance(value, str) else repr(value)
            lines.append(f"{inner} = " + (str(list(value)) if isinstance(value, tuple) else shown))
        text = "\n".join(lines) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text


#: The groups of fields.
_PARTS: dict[str, type] = {
    "teacher": Teacher, "covariance": Covariance, "pretraining": Pretraining,
    "compression": Compression, "finetuning": Finetuning, "finetuning.selection": Selection,
}  # fmt: skip


def assign(raw: dict[str, Any], name: str, value: Any) -> None:
    """Set a field by its dotted name in nested values; what is no table is left to be refused."""
    group, dot, inner = name.partition(".")
    if not dot:
        raw[name] = value
        return
    if raw.get(group) is None:
        raw[group] = {}
    if isinstance(raw[group], dict):
        assign(raw[group], inner, value)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The nested values in a TOML file; a :class:`ProblemError` says why it cannot be read."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ProblemError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_toml(content, str(path))


def parse_toml(content: bytes, name: str) -> dict[str, Any]:
    """The same of what a file of this name contains."""
    try:
        return tomllib.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ProblemError(f"{name} is not UTF-8 text") from error
    except (ValueError, RecursionError) as error:  # numbers too long, tables too deep included
        raise ProblemError(f"{name} is not valid TOML: {error}") from error


def _with_parts(part: type, raw: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The values of a part, its tables made the parts they stand for."""
    _refuse_unknown(part, raw, prefix)
    values = dict(raw)
    for name, value in raw.items():
        inner, full = _PARTS.get(prefix + name), prefix + name
        if inner is None or isinstance(value, inner | None):
            continue
        if not isinstance(value, Mapping):
            raise ProblemError(f"{full} = {value!r} must be a table of fields, [{full}]")
        found = _with_parts(inner, value, f"{full}.")
        values[name] = inner(**_checked_keys(inner, found, f"{full}."))
    return values


def _flattened(nested: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in nested.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value


def _specs(part: type, prefix: str) -> Iterator[FieldSpec]:
    for entry in dataclasses.fields(part):
        if entry.metadata:
            data = entry.metadata
            yield FieldSpec(
                prefix + entry.name,
                data["symbol"],
                data["meaning"],
                data["allowed"],
                entry.default,
                data["choices"],
                bool(data["choices"] or data["expression"]),
            )
        else:
            name = prefix + entry.name
            yield from _specs(_PARTS[name], f"{name}.")


def _refuse_unknown(part: type, raw: Mapping[str, Any], prefix: str) -> None:
    known = [entry.name for entry in dataclasses.fields(part)]
    for name in raw:
        if name not in known:
            allowed = ", ".join(known)
            raise ProblemError(f"{prefix}{name} is not a field; the fields here are {allowed}")


def _checked_keys(part: type, raw: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    _refuse_unknown(part, raw, prefix)
    for entry in dataclasses.fields(part):
        name = entry.name
        if name not in raw and entry.default is MISSING:
            meaning, allowed = entry.metadata["meaning"], entry.metadata["allowed"]
            raise ProblemError(f"{prefix}{name} is missing: {meaning}, {allowed}")
    return dict(raw)
