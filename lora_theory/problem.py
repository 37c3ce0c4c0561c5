"""The question: one pre-training, one optional rank-one LoRA fine-tuning, validated once.

A :class:`Problem` is read by the theory, the simulation, the command line, the TOML files and the
tables; its field names are the flags, keys and columns.  Scalings are those of docs/theory.md,
section 1: D is the embedding dimension, sequences are counted in units of D² (pre-training) and
D (fine-tuning).
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from lora_theory.expression import Expression, fault_as_penalty

__all__ = ["FieldSpec", "Finetuning", "Pretraining", "Problem", "ProblemError", "Teacher"]


class ProblemError(ValueError):
    """A field of the problem has a value that is not allowed; the message is one sentence."""


def _spec(
    symbol: str,
    meaning: str,
    allowed: str,
    *,
    default: Any = MISSING,
    choices: tuple[str, ...] = (),
    text: bool = False,
) -> Any:
    metadata = {
        "symbol": symbol, "meaning": meaning, "allowed": allowed, "choices": choices,
        "text": text or bool(choices),
    }  # fmt: skip
    return field(default=default, metadata=metadata)


def _validate(part: Any, prefix: str) -> None:
    """Check and normalise the plain fields of one part against its specs."""
    for entry in dataclasses.fields(part):
        if not entry.metadata:
            continue
        name, value, allowed = entry.name, getattr(part, entry.name), entry.metadata["allowed"]
        complaint = ProblemError(f"{prefix}{name} = {value!r} is not allowed: it must be {allowed}")
        if value is None and entry.default is None:
            continue
        if entry.metadata["choices"]:
            if not isinstance(value, str) or value not in entry.metadata["choices"]:
                raise complaint
        elif entry.metadata["text"]:
            _check_penalty(value, complaint)
        elif name in _LISTS:
            object.__setattr__(part, name, _numbers(value, _LISTS[name], complaint))
        elif isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise complaint
        elif name == "tokens":
            if not isinstance(value, numbers.Integral) or value < 1:
                raise complaint
            object.__setattr__(part, name, int(value))
        else:
            try:
                number = float(value)
            except OverflowError:
                raise ProblemError(f"{prefix}{name} is too large: it must be finite") from None
            in_range = number >= 0 if allowed == "≥ 0" else number > 0
            in_range &= not (allowed.endswith("< 0.5") and number >= 0.5)
            in_range &= not (allowed.endswith("≤ 1") and number > 1)
            if not (math.isfinite(number) and in_range):
                raise ProblemError(f"{complaint.args[0]} and finite")
            object.__setattr__(part, name, number)


#: Fields that hold several numbers, and how many of these must not be 0.
_LISTS: dict[str, Callable[[Iterable[float]], bool]] = {"eigenvalues": any, "spikes": all}


def _numbers(
    value: Any, differ_from_0: Callable[[Iterable[float]], bool], complaint: ProblemError
) -> tuple[float, ...]:
    """One or more finite numbers."""
    entries = [value] if isinstance(value, numbers.Real) else value
    try:
        found = tuple(float(entry) for entry in entries)
    except (TypeError, ValueError, OverflowError):
        raise complaint from None
    finite = len(found) > 0 and all(map(math.isfinite, found))
    if isinstance(value, str) or not finite or not differ_from_0(found):
        raise complaint
    return found


def _check_penalty(text: Any, complaint: ProblemError) -> None:
    """Refuse what is no expression, or none that can be a penalty."""
    if not isinstance(text, str):
        raise complaint
    try:
        fault = fault_as_penalty(Expression(text))
    except ValueError as error:
        raise ProblemError(f"{complaint.args[0]}; {error}") from None
    if fault is not None:
        raise ProblemError(f"{complaint.args[0].partition(':')[0]}: {fault}")


def _refuse_misplaced(name: str, value: Any, switch: str, chosen: str, wanted: str) -> None:
    """A field that one value of another field needs, and no other value allows."""
    if chosen == wanted and value is None:
        (spec,) = (spec for spec in Problem.specs() if spec.name == name)
        raise ProblemError(f"{name} is missing: {spec.meaning}, {spec.allowed}")
    if chosen != wanted and value is not None:
        raise ProblemError(
            f'{name} = {value!r} is not allowed with {switch} = "{chosen}": leave it out'
        )


class FieldSpec(NamedTuple):
    """What one field is: the row of the notation table, the help of the flag."""

    name: str
    symbol: str
    meaning: str
    allowed: str
    default: Any  # dataclasses.MISSING if the field must be given
    choices: tuple[str, ...]
    text: bool  # whether values are text, not numbers


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The matrix S0 behind the pre-training labels (docs/theory.md, sections 1 and 2).

    Its eigenvalues follow a law of :mod:`lora_theory.laws`; its eigenvectors are uniformly random.
    A finite number of spikes changes no order parameter, but what the learned spectrum shows.
    """

    law: str = _spec(
        "ρ",
        "law of the eigenvalues of S0: W0W0ᵀ/√(P0D), symmetric Gaussian, i^{−γ}, or given ones",
        '"wishart", "goe", "power_law" or "eigenvalues"',
        default="wishart",
        choices=("wishart", "goe", "power_law", "eigenvalues"),
    )
    exponent: float | None = _spec(
        "γ", "eigenvalues √(1−2γ)(i/D)^{−γ} of a power law", "> 0 and < 0.5", default=None
    )
    eigenvalues: tuple[float, ...] | None = _spec(
        "s", "eigenvalues of equal shares of D", "numbers that are not all 0", default=None
    )
    spikes: tuple[float, ...] | None = _spec(
        "θ", "rank-one matrices θvvᵀ, ‖v‖ = 1, added to S0", "numbers other than 0", default=None
    )
    inverse_temperature: float = _spec(
        "τ₀", "factor of the teacher's pre-activations, σ(τ₀·)", "> 0", default=1.0
    )

    def __post_init__(self) -> None:
        _validate(self, "teacher.")


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Pre-training of W ∈ R^{D×P} on N sequences (docs/theory.md, section 1)."""

    samples: float = _spec("α", "pre-training sequences, N/D²", "> 0")
    penalty: float = _spec("λ", "strength of the penalty, see regularizer", "> 0")
    rank: float = _spec("κ", "width of the trained factor, P/D", "> 0", default=1.0)
    regularizer: str = _spec(
        "",
        "λ‖W‖²_F on the factor, or on an unfactorised symmetric S with eigenvalues s: "
        "(λD/2)‖S‖²_F, λD‖S‖_* or λD ΣR(s)",
        '"weight_decay", "frobenius", "nuclear_norm" or "separable"',
        default="weight_decay",
        choices=("weight_decay", "frobenius", "nuclear_norm", "separable"),
    )
    function: str | None = _spec(
        "R(s)",
        'the function of the separable penalty, as "abs(s)**1.5 + s**2/2"',
        "an expression in s of numbers, + - * / **, abs, sqrt, exp, log, log1p, cosh, tanh, "
        'minimum, maximum, inf and "… if s >= 0 else …"',
        default=None,
        text=True,
    )

    def __post_init__(self) -> None:
        _validate(self, "pretraining.")
        _refuse_misplaced(
            "pretraining.function", self.function, "pretraining.regularizer", self.regularizer,
            "separable",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """Rank-one LoRA w ∈ R^D on N' sequences with W frozen (docs/theory.md, section 1)."""

    samples: float = _spec("α'", "fine-tuning sequences, N'/D", "> 0")
    penalty: float = _spec("λ'", "weight decay λ'‖w‖² on the LoRA vector", "> 0")
    signal: float = _spec("q₀", "strength of the task vector, ‖w*‖²/D", "> 0", default=1.0)
    sequences: str = _spec(
        "e",
        "fresh sequences (e = 0) or sequences of the pre-training set with their noise (e = 1)",
        '"fresh" or "reused"',
        default="fresh",
        choices=("fresh", "reused"),
    )
    reused_fraction: float | None = _spec(
        "r", "share of re-used sequences among them, the others fresh; all if left out",
        "> 0 and ≤ 1", default=None,
    )  # fmt: skip
    noise: str | None = _spec(
        "",
        "label noise of re-used sequences: as in pre-training, which is the default, or drawn anew",
        '"shared" or "redrawn"',
        default=None,
        choices=("shared", "redrawn"),
    )
    rescaling: float = _spec(
        "β", "factor of the frozen weights, W → √β W, S → βS", "> 0", default=1.0
    )

    def __post_init__(self) -> None:
        _validate(self, "finetuning.")
        if self.sequences == "fresh":
            for name in ("reused_fraction", "noise"):
                if (value := getattr(self, name)) is not None:
                    raise ProblemError(
                        f"finetuning.{name} = {value!r} is not allowed with finetuning.sequences = "
                        '"fresh": leave it out, or re-use sequences'
                    )

    @property
    def reused(self) -> float:
        """The share of re-used sequences, from 0 to 1."""
        if self.sequences == "fresh":
            return 0.0
        return 1.0 if self.reused_fraction is None else self.reused_fraction

    @property
    def redraws_noise(self) -> bool:
        """Whether re-used sequences have other label noise than in pre-training."""
        return self.noise == "redrawn"


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

    tokens: int = _spec("T", "tokens per sequence", "an integer ≥ 2 (≥ 1 for linear)")
    activation: str = _spec(
        "σ",
        "row softmax, or σ(A) = A/T",
        '"softmax" or "linear"',
        choices=("softmax", "linear"),
    )
    teacher_rank: float | None = _spec(
        "κ₀", "rank of the pre-training teacher, P₀/D, of the Wishart law", "> 0", default=None
    )
    label_noise: float = _spec("Δ", "variance of the noise on the teacher's pre-activations", "≥ 0")
    inverse_temperature: float = _spec(
        "τ", "factor of the student's pre-activations, σ(τ·)", "> 0", default=1.0
    )
    teacher: Teacher = Teacher()
    pretraining: Pretraining
    finetuning: Finetuning | None = None

    def __post_init__(self) -> None:
        _validate(self, "")
        for name, part in (("teacher", Teacher), ("pretraining", Pretraining)):
            if not isinstance(getattr(self, name), part):
                raise ProblemError(f"{name} = {getattr(self, name)!r} must be a {part.__name__}")
        if not isinstance(self.finetuning, Finetuning | None):
            raise ProblemError(f"finetuning = {self.finetuning!r} must be a Finetuning or None")
        if self.tokens < (1 if self.activation == "linear" else 2):
            raise ProblemError(
                f"tokens = {self.tokens} is not allowed with activation = {self.activation!r}: "
                "it must be an integer ≥ 2 (1 only for linear)"
            )
        for name, wanted, value in (
            ("teacher_rank", "wishart", self.teacher_rank),
            ("teacher.exponent", "power_law", self.teacher.exponent),
            ("teacher.eigenvalues", "eigenvalues", self.teacher.eigenvalues),
        ):
            _refuse_misplaced(name, value, "teacher.law", self.teacher.law, wanted)

    # -- the one definition of the fields ------------------------------------------------------

    @classmethod
    def specs(cls) -> tuple[FieldSpec, ...]:
        """All fields by their dotted names, in the order of flags, keys and columns."""
        return tuple(_specs(cls, ""))

    def to_flat(self) -> dict[str, Any]:
        """Dotted field names to values; those that are None, or of no second stage, are absent."""
        flat: dict[str, Any] = {}
        for name, value in self.to_dict().items():
            if isinstance(value, dict):
                flat |= {f"{name}.{inner}": entry for inner, entry in value.items()}
            else:
                flat[name] = value
        return {name: value for name, value in flat.items() if value is not None}

    @property
    def rescaling(self) -> float:
        """β, 1 without fine-tuning."""
        return self.finetuning.rescaling if self.finetuning else 1.0

    def replace(self, changes: Mapping[str, Any] | None = None, /, **named: Any) -> Self:
        """A copy with some fields changed, by dotted names; top-level ones also as keywords.

        ``finetuning=None`` drops the second stage.
        """
        raw = self.to_dict()
        for name, value in {**(changes or {}), **named}.items():
            group, _, inner = name.partition(".")
            if not inner:
                raw[name] = value
            elif isinstance(raw.get(group), dict):
                raw[group][inner] = value
            else:
                raw[group] = {inner: value}
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
        _refuse_unknown(cls, raw, "")
        values = dict(raw)
        for group, part in _PARTS.items():
            entry = values.get(group)
            if isinstance(entry, Mapping):
                values[group] = part(**_checked_keys(part, entry, group + "."))
            elif group in values and not isinstance(entry, part | None):
                raise ProblemError(f"{group} = {entry!r} must be a table of fields, [{group}]")
        if values.get("pretraining") is None:
            values["pretraining"] = Pretraining(**_checked_keys(Pretraining, {}, "pretraining."))
        return cls(**_checked_keys(cls, values, ""))

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """The problem from a TOML file: top-level keys, ``[pretraining]`` and ``[finetuning]``."""
        return cls.from_dict(read_toml(path))

    def to_toml(self, path: str | Path | None = None) -> str:
        """The TOML text of the problem, also written to ``path`` if one is given."""
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
    "teacher": Teacher, "pretraining": Pretraining, "finetuning": Finetuning,
}  # fmt: skip


def assign(raw: dict[str, Any], name: str, value: Any) -> None:
    """Set a field by its dotted name in nested values; what is no table is left to be refused."""
    group, dot, inner = name.partition(".")
    table = raw.setdefault(group, {}) if dot else raw
    if isinstance(table, dict):
        table[inner if dot else name] = value


def read_toml(path: str | Path) -> dict[str, Any]:
    """The nested values in a TOML file; a :class:`ProblemError` says why it cannot be read."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ProblemError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ProblemError(f"{path} is not UTF-8 text") from error
    except (ValueError, RecursionError) as error:  # numbers too long, tables too deep included
        raise ProblemError(f"{path} is not valid TOML: {error}") from error


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
                data["text"],
            )
        else:
            yield from _specs(_PARTS[entry.name], entry.name + ".")


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
