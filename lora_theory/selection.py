"""Scores by which fine-tuning sequences are chosen from a pool, functions of their frozen logits.

The logits of a sequence are h = τβ(x_aᵀ S x_b − δ_ab Tr S)/√D, all that the frozen weights say of
it (docs/theory.md, section 3.6).  The sequences of lowest score are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from lora_theory.expression import Expression
from lora_theory.field_specs import ProblemError

if TYPE_CHECKING:
    from lora_theory.parts import Selection

__all__ = [
    "FEATURES",
    "SCORES",
    "Logits",
    "Score",
    "check_score",
    "kept",
    "score_name",
    "scores_of",
]

Logits = Float[np.ndarray, "n T T"]
Scores = Float[np.ndarray, " n"]
Score = Callable[[Logits], Scores]

#: Sequences whose features are computed at once, and on which a score is tried.
_CHUNK, _TRIAL = 2**16, 64


def _weights(h: Logits) -> Logits:
    """The row softmax, without the libraries that the command line does not wait for."""
    raised = np.exp(h - h.max(axis=2, keepdims=True))
    return np.asarray(raised / raised.sum(axis=2, keepdims=True))


def _entropy(h: Logits) -> Scores:
    weights = _weights(h)
    logarithms = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    return np.asarray(-(weights * logarithms).sum(axis=2).mean(axis=1))


def _margin(h: Logits) -> Scores:
    largest = np.sort(_weights(h), axis=2)[:, :, -2:]
    return np.asarray((largest[:, :, -1] - largest[:, :, 0]).mean(axis=1))


def _cross(h: Logits) -> Scores:
    upper = np.triu_indices(h.shape[1], 1)
    return h[:, *upper].mean(axis=1) if h.shape[1] > 1 else np.zeros(len(h))


#: What an expression may contain, by name.
FEATURES: dict[str, Score] = {
    "variance": lambda h: (h**2).sum(axis=(1, 2)) / 2,  # Σ_{a≤b} z_ab²
    "entropy": _entropy,
    "margin": _margin,
    "cross": _cross,
    "diagonal": lambda h: np.einsum("naa->n", h) / h.shape[1],
}

#: The named scores as such expressions; "uniform" keeps the first ones.
SCORES = {
    "low_variance": "variance",
    "entropy": "-entropy",
    "cross_token": "-cross",
    "margin": "margin",
}


def scores_of(selection: Selection, logits: Logits) -> Scores:
    """The score of every sequence.

    Raises:
        ProblemError: the score is NaN, or one given as a function fails or has another shape.

    Example:
        >>> from lora_theory import Selection
        >>> h = np.array([[[0.5, 1.0], [1.0, 0.0]], [[0.0, 0.1], [0.1, 0.0]]])
        >>> scores_of(Selection(pool=9.0, score="low_variance"), h).round(3).tolist()
        [1.125, 0.01]
    """
    parts = np.array_split(logits, max(1, -(-len(logits) // _CHUNK)))
    return np.concatenate([_scores(selection, part) for part in parts])


def _scores(selection: Selection, logits: Logits) -> Scores:
    score, name = selection.score, "finetuning.selection.score"
    if callable(score):
        given = f"{name} = {score_name(score)}"
        try:
            values = np.asarray(score(logits), dtype=float)
        except Exception as error:
            raise ProblemError(f"{given} fails: {type(error).__name__}: {error}") from error
        if values.shape != logits.shape[:1]:
            raise ProblemError(
                f"{given} is not allowed: for logits of shape {logits.shape} it returns an array "
                f"of shape {values.shape}, and must return {logits.shape[:1]}"
            )
    else:
        text = SCORES.get(score, selection.function)
        assert text is not None
        given = f"{name} = {score!r}"
        if score == "function":
            given = f"finetuning.selection.function = {text!r}"
        expression = Expression(text, FEATURES)
        features = {part: FEATURES[part](logits) for part in expression.used}
        values = expression.at(features)
    if np.any(np.isnan(values)):
        count = int(np.isnan(values).sum())
        raise ProblemError(
            f"{given} is not allowed: it is NaN for {count} of {len(logits)} sequences, and must "
            "be a number for all"
        )
    return values


def score_name(score: str | Score) -> str:
    """A score in words."""
    return getattr(score, "__name__", repr(score)) if callable(score) else score


def fault_as_score(text: str) -> str | None:
    """Why an expression is no score; a ValueError where it is none at all."""
    return None if Expression(text, FEATURES).used else "it must depend on the logits"


def check_score(selection: Selection, tokens: int) -> None:
    """Refuse a score that fails on random logits."""
    if selection.score != "uniform":
        half = np.random.default_rng(0).standard_normal((_TRIAL, tokens, tokens))
        scores_of(selection, half + half.swapaxes(1, 2))


def kept(selection: Selection, logits: Logits, count: int) -> np.ndarray:
    """Which ``count`` sequences are kept, in their order; of equal scores the first ones."""
    order = np.argsort(scores_of(selection, logits), kind="stable")
    return np.sort(order[:count])
