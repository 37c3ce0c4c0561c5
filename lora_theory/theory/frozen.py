"""The noise that the user's own frozen weights leave: (gain, variance, Q) measured from arrays."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_theory.problem import ProblemError
from lora_theory.theory.results import EffectiveNoise

__all__ = ["measure_noise"]


def measure_noise(
    *,
    teacher: ArrayLike,
    weights: ArrayLike | None = None,
    matrix: ArrayLike | None = None,
    label_noise: float = 0.0,
    linear: bool = False,
) -> EffectiveNoise:
    """Gain, variance and Q of frozen weights against the pre-training teacher.

    Q = Tr S²/D, M = Tr S S0/D, Q0 = Tr S0²/D; gain = M/Q, variance = Δ/2 + Q0 − M²/Q
    (docs/theory.md, section 4).  The result goes into :func:`lora_theory.finetune`, which treats
    the weights as fixed before the fine-tuning sequences were drawn (``sequences = "fresh"``).

    Args:
        teacher: S0, symmetric (D, D), eigenvalues of order one.
        weights: W, (D, P), with S = WWᵀ/√(PD); or instead
        matrix: S itself, symmetric (D, D).
        label_noise: Δ ≥ 0.
        linear: also give Δ_eff = Δ/2 + Q0 − 2M + Q, the one number linear attention feels.

    Raises:
        ProblemError: not exactly one of ``weights`` and ``matrix``, wrong shapes, a matrix that is
            not symmetric, values that are not finite, or weights that vanish.

    Example:
        >>> import numpy as np
        >>> from lora_theory import measure_noise
        >>> W0 = np.random.default_rng(0).standard_normal((200, 100))
        >>> S0 = W0 @ W0.T / np.sqrt(200 * 100)
        >>> noise = measure_noise(teacher=S0, matrix=0.5 * S0, label_noise=0.4)
        >>> round(noise.gain, 12), round(noise.variance, 12)
        (2.0, 0.2)
    """
    if (weights is None) == (matrix is None):
        raise ProblemError("exactly one of weights and matrix must be given")
    if not _is_noise(label_noise):
        raise ProblemError(
            f"label_noise = {label_noise!r} is not allowed: it must be ≥ 0 and finite"
        )
    S0 = _symmetric("teacher", teacher, None)
    size = S0.shape[0]
    if weights is not None:
        W = _numbers("weights", weights)
        if W.ndim != 2 or W.shape[0] != size or W.shape[1] < 1 or not np.all(np.isfinite(W)):
            raise ProblemError(
                f"weights of shape {W.shape} are not allowed: they must be finite, ({size}, P)"
            )
        S = W @ W.T / math.sqrt(W.shape[1] * size)
    else:
        assert matrix is not None
        S = _symmetric("matrix", matrix, size)
    with np.errstate(over="ignore", under="ignore"):
        Q, M, Q0 = (float(np.sum(A * B)) / size for A, B in ((S, S), (S, S0), (S0, S0)))
    if Q == 0:
        raise ProblemError(
            "the frozen weights are zero: gain and variance have no meaning; they must have "
            "eigenvalues of order one"
        )
    label_variance = Q0 + label_noise / 2
    if not math.isfinite(label_variance + Q + M / Q * M):
        raise ProblemError(
            "teacher or frozen weights are too large or too small for their squares: they must "
            "have eigenvalues of order one"
        )
    delta = label_variance - 2 * M + Q
    return EffectiveNoise(
        gain=M / Q,
        variance=max(label_variance - M**2 / Q, 0.0),  # negative by rounding only
        Q=Q,
        delta_eff=delta if linear else None,
        delta_eff_training=delta if linear else None,
    )


def _symmetric(name: str, value: ArrayLike, size: int | None) -> NDArray[np.float64]:
    array = _numbers(name, value)
    allowed = f"({size}, {size})" if size else "square"
    shape_fits = array.ndim == 2 and array.shape[0] == array.shape[1] and array.size > 0
    if not shape_fits or (size is not None and array.shape[0] != size):
        raise ProblemError(f"{name} of shape {array.shape} is not allowed: it must be {allowed}")
    if not np.all(np.isfinite(array)):
        raise ProblemError(f"{name} has entries that are not finite")
    if not np.allclose(array, array.T, rtol=0, atol=1e-6 * max(1.0, float(np.abs(array).max()))):
        raise ProblemError(f"{name} is not symmetric: it must be")
    return array


def _numbers(name: str, value: ArrayLike) -> NDArray[np.float64]:
    try:
        array = np.asarray(value)
        if np.iscomplexobj(array):
            raise ValueError
        return array.astype(np.float64)
    except (TypeError, ValueError):
        raise ProblemError(f"{name} is no array of numbers: it must hold real numbers") from None


def _is_noise(value: Any) -> bool:
    return isinstance(value, numbers.Real) and 0 <= float(value) < math.inf
