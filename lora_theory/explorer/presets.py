"""Problems to begin with: sets of published figures, and regimes worth seeing."""

from __future__ import annotations

from typing import NamedTuple

from lora_theory.problem import Compression, Finetuning, Pretraining, Problem, Selection

__all__ = ["PRESETS", "Preset"]


class Preset(NamedTuple):
    """A problem, and the view in which to look at it first."""

    problem: Problem
    view: str
    field: str  # along which the view shows it
    words: str


def _problem(
    activation: str,
    samples: float,
    penalty: float,
    task: Finetuning | None,
    *,
    tokens: int = 2,
    teacher_rank: float = 0.5,
    label_noise: float = 0.5,
    compression: Compression | None = None,
) -> Problem:
    return Problem(
        tokens=tokens, activation=activation, teacher_rank=teacher_rank, label_noise=label_noise,
        pretraining=Pretraining(samples=samples, penalty=penalty), compression=compression,
        finetuning=task,
    )  # fmt: skip


_CHOSEN = Selection(pool=60.0, score="cross_token")

#: By the name in the menu.
PRESETS = {
    "Published Fig 1, softmax": Preset(
        _problem(
            "softmax", 0.1, 0.1, Finetuning(samples=3.0, penalty=0.5), tokens=3, teacher_rank=1.0
        ),
        "curve", "pretraining.penalty",
        "Test error and overlap against the four fields of the published figure 1, three tokens.",
    ),
    "Published Fig 1, linear": Preset(
        _problem(
            "linear", 0.1, 0.1, Finetuning(samples=3.0, penalty=0.5), tokens=3, teacher_rank=1.0
        ),
        "curve", "pretraining.penalty",
        "The same for linear attention.",
    ),
    "Published Fig 3, re-used": Preset(
        _problem("linear", 0.2, 0.05, Finetuning(samples=3.0, penalty=0.2, sequences="reused")),
        "trajectory", "pretraining.penalty",
        "Fine-tuning on the sequences of pre-training: below the best λ a larger one lowers E' and "
        "the overlap together.",
    ),
    "Published Fig 4, active": Preset(
        _problem(
            "linear", 0.1, 0.1, Finetuning(samples=3.0, penalty=0.5, selection=_CHOSEN),
            tokens=3, teacher_rank=1.0, label_noise=0.0,
        ),
        "curve", "finetuning.samples",
        "Sequences with the largest cross-token logits are chosen from a pool of 60 D.",
    ),
    "Lower error, worse alignment": Preset(
        _problem("softmax", 0.2, 0.08, Finetuning(samples=3.0, penalty=1.0)),
        "trajectory", "pretraining.penalty",
        "Softmax with fresh sequences: between the λ that is best for E' and the one that is best "
        "for the overlap, the two disagree.",
    ),
    "LoRA worse than frozen": Preset(
        _problem("linear", 0.2, 0.5, Finetuning(samples=3.0, penalty=0.02, signal=0.4)),
        "map", "finetuning.penalty",
        "A weak task under a weak penalty: w points to the task, yet its noise costs more than it "
        "brings.",
    ),
    "Truncated weights": Preset(
        _problem(
            "linear", 0.4, 0.02, Finetuning(samples=3.0, penalty=0.2),
            compression=Compression(rank=0.3),
        ),
        "curve", "compression.rank",
        "Weakly decayed weights are truncated before they are frozen: how much rank is best?",
    ),
}  # fmt: skip
