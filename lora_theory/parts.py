"""The parts of a problem: teacher, both stages, compression between them, choice of sequences."""

from __future__ import annotations

from dataclasses import dataclass

from lora_theory.expression import Expression, fault_as_penalty
from lora_theory.field_specs import ProblemError, refuse_misplaced, spec, validate
from lora_theory.selection import SCORES, Score, fault_as_score, score_name

__all__ = ["Compression", "Covariance", "Finetuning", "Pretraining", "Selection", "Teacher"]


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The matrix S0 behind the pre-training labels (docs/theory.md, sections 1 and 2).

    Its eigenvalues follow a law of :mod:`lora_theory.laws`; its eigenvectors are uniformly random.
    A finite number of spikes changes no order parameter, but what the learned spectrum shows.
    """

    law: str = spec(
        "ρ",
        "law of the eigenvalues of S0: W0W0ᵀ/√(P0D), symmetric Gaussian, i^{−γ}, or given ones",
        '"wishart", "goe", "power_law" or "eigenvalues"',
        default="wishart",
        choices=("wishart", "goe", "power_law", "eigenvalues"),
    )
    exponent: float | None = spec(
        "γ", "eigenvalues √(1−2γ)(i/D)^{−γ} of a power law", "> 0 and < 0.5", default=None
    )
    eigenvalues: tuple[float, ...] | None = spec(
        "s", "eigenvalues of equal shares of D", "numbers that are not all 0", default=None
    )
    spikes: tuple[float, ...] | None = spec(
        "θ", "rank-one matrices θvvᵀ, ‖v‖ = 1, added to S0", "numbers other than 0", default=None
    )
    inverse_temperature: float = spec(
        "τ₀", "factor of the teacher's pre-activations, σ(τ₀·)", "> 0", default=1.0
    )

    def __post_init__(self) -> None:
        validate(self, "teacher.")


@dataclass(frozen=True, kw_only=True)
class Covariance:
    """Covariance C of the tokens, x = C^{1/2}g with g iid normal (docs/theory.md, section 2.9).

    C is diagonal, which is no restriction: weights and teacher have no preferred directions.
    """

    eigenvalues: tuple[float, ...] = spec(
        "c", "eigenvalues of the covariance C of the tokens, of equal shares of D",
        "positive numbers",
    )  # fmt: skip
    shifted: tuple[float, ...] | None = spec(
        "c'",
        "those of C', the covariance of the tokens of fine-tuning, in the same order and with the "
        "same eigenvectors; c if left out",
        "as many positive numbers",
        default=None,
    )

    def __post_init__(self) -> None:
        validate(self, "covariance.")
        if self.shifted is not None and len(self.shifted) != len(self.eigenvalues):
            raise ProblemError(
                f"covariance.shifted = {self.shifted!r} is not allowed: it must have as many "
                f"numbers as covariance.eigenvalues, {len(self.eigenvalues)}"
            )

    @property
    def later(self) -> tuple[float, ...]:
        """c' of fine-tuning."""
        return self.eigenvalues if self.shifted is None else self.shifted

    @property
    def shifts(self) -> bool:
        """Whether C' differs from C."""
        return self.later != self.eigenvalues


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Pre-training of W ∈ R^{D×P} on N sequences (docs/theory.md, section 1)."""

    samples: float = spec("α", "pre-training sequences, N/D²", "> 0")
    penalty: float = spec("λ", "strength of the penalty, see regularizer", "> 0")
    rank: float = spec("κ", "width of the trained factor, P/D", "> 0", default=1.0)
    regularizer: str = spec(
        "",
        "λ‖W‖²_F or λ√D‖W‖_* on the factor, or λ‖W̃‖²_F on that of W = σ̂ g_d(W̃/σ̂); on an "
        "unfactorised symmetric S with eigenvalues s: (λD/2)‖S‖²_F, λD‖S‖_* or λD ΣR(s)",
        '"weight_decay", "low_rank_decay", "preconditioned", "frobenius", "nuclear_norm" or '
        '"separable"',
        default="weight_decay",
        choices=(
            "weight_decay", "low_rank_decay", "preconditioned", "frobenius", "nuclear_norm",
            "separable",
        ),
    )  # fmt: skip
    function: str | None = spec(
        "R(s)",
        'the function of the separable penalty, as "abs(s)**1.5 + s**2/2"',
        "an expression in s of numbers, + - * / **, abs, sqrt, exp, log, log1p, cosh, tanh, "
        'minimum, maximum, inf and "… if s >= 0 else …"',
        default=None,
        expression=lambda text: fault_as_penalty(Expression(text)),
    )
    degree: int | None = spec(
        "d", "degree of the preconditioning polynomial g_d", "1, 3, 5, 7 or 9", default=None
    )
    scale: float | None = spec(
        "ŝ", "its fixed scale, as an eigenvalue of S: σ̂²/√(PD)", "> 0", default=None
    )

    def __post_init__(self) -> None:
        validate(self, "pretraining.")
        for name, wanted in (
            ("function", "separable"), ("degree", "preconditioned"), ("scale", "preconditioned")
        ):  # fmt: skip
            switch = "pretraining.regularizer", self.regularizer
            refuse_misplaced(self, "pretraining.", name, *switch, wanted)


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Truncation of Ŝ to low rank before it is frozen (docs/theory.md, section 2.8)."""

    rank: float = spec(
        "ρᵣ", "share of the eigenvalues that are kept, those of largest size; rank/D",
        "> 0 and ≤ 1",
    )  # fmt: skip

    whitening: str = spec(
        "",
        "metric of the truncation under tokens with a covariance: C^{1/2}SC^{1/2}, SC^{1/2} (then "
        "made symmetric), or S itself",
        '"two_sided", "one_sided" or "none"',
        default="two_sided",
        choices=("two_sided", "one_sided", "none"),
    )
    calibration: str = spec(
        "",
        "whose covariance it is: C, C' of fine-tuning, or C for what is to be kept and C' for "
        "what it is kept under",
        '"pretraining", "finetuning" or "anchored"',
        default="pretraining",
        choices=("pretraining", "finetuning", "anchored"),
    )

    def __post_init__(self) -> None:
        validate(self, "compression.")
        if self.whitening == "none" and self.calibration != "pretraining":
            raise ProblemError(
                f'compression.calibration = "{self.calibration}" is not allowed with '
                'compression.whitening = "none", which sees no tokens: leave it out'
            )


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Active fine-tuning: the sequences of lowest score in a pool (docs/theory.md, section 3.6).

    A score sees the frozen logits alone: no label, and not the task.
    """

    pool: float = spec("ᾱ'", "unlabelled fine-tuning sequences to choose from, over D", "> 0")
    score: str | Score = spec(
        "s(h)",
        "which are kept: any, those of least Σz² of the frozen logits, of highest entropy of the "
        "frozen attention, of largest mean cross-token logit, of least margin between its two "
        "largest weights, or of the least value of a function",
        '"uniform", "low_variance", "entropy", "cross_token", "margin" or "function"; in Python '
        "also a function of logits (n, T, T) with values (n,)",
        default="low_variance",
        choices=("uniform", *SCORES, "function"),
        function=True,
    )
    function: str | None = spec(
        "",
        'the score "function", as "variance - 2*cross"',
        "an expression in variance (Σz²), entropy, margin, cross and diagonal (mean logits of "
        "different and of equal tokens), spelled as pretraining.function",
        default=None,
        expression=fault_as_score,
    )

    def __post_init__(self) -> None:
        validate(self, _SELECTION)
        chosen = "function" if self.score == "function" else score_name(self.score)
        refuse_misplaced(self, _SELECTION, "function", f"{_SELECTION}score", chosen, "function")


_SELECTION = "finetuning.selection."


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """Rank-one LoRA w ∈ R^D on N' sequences with W frozen (docs/theory.md, section 1)."""

    samples: float = spec("α'", "fine-tuning sequences, N'/D", "> 0")
    penalty: float = spec("λ'", "weight decay λ'‖w‖² on the LoRA vector", "> 0")
    signal: float = spec("q₀", "strength of the task vector, ‖w*‖²/D", "> 0", default=1.0)
    sequences: str = spec(
        "e",
        "fresh sequences (e = 0) or sequences of the pre-training set with their noise (e = 1)",
        '"fresh" or "reused"',
        default="fresh",
        choices=("fresh", "reused"),
    )
    reused_fraction: float | None = spec(
        "r", "share of re-used sequences among them, the others fresh; all if left out",
        "> 0 and ≤ 1", default=None,
    )  # fmt: skip
    noise: str | None = spec(
        "",
        "label noise of re-used sequences: as in pre-training, which is the default, or drawn anew",
        '"shared" or "redrawn"',
        default=None,
        choices=("shared", "redrawn"),
    )
    rescaling: float = spec(
        "β", "factor of the frozen weights, W → √β W, S → βS", "> 0", default=1.0
    )
    selection: Selection | None = None

    def __post_init__(self) -> None:
        validate(self, "finetuning.")
        if not isinstance(self.selection, Selection | None):
            raise ProblemError(
                f"finetuning.selection = {self.selection!r} must be a Selection or None"
            )
        if self.selection is not None:
            if self.sequences != "fresh":
                raise ProblemError(
                    f'finetuning.selection is not allowed with sequences = "{self.sequences}": '
                    "leave it out, or choose among fresh sequences"
                )
            if self.selection.pool < self.samples:
                raise ProblemError(
                    f"finetuning.selection.pool = {self.selection.pool!r} is not allowed with "
                    f"finetuning.samples = {self.samples!r}: a pool holds at least what is kept"
                )
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
    def chosen(self) -> Selection | None:
        """How sequences are chosen, None where any are taken."""
        any_are_taken = self.selection is None or self.selection.score == "uniform"
        return None if any_are_taken else self.selection

    @property
    def redraws_noise(self) -> bool:
        """Whether re-used sequences have other label noise than in pre-training."""
        return self.noise == "redrawn"
