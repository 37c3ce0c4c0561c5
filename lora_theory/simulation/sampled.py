"""Pre-trained matrices without training: Ŝ = f(M̂S0 + √Q̂Z)/V̂ at finite D (docs/theory.md, 2.4)."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from lora_theory.arguments import check_problem, checked_integer
from lora_theory.compilation import double_precision
from lora_theory.problem import Problem, ProblemError
from lora_theory.simulation.data import Draw, draw_normal, run_key
from lora_theory.simulation.fields import Symmetric, Weights
from lora_theory.simulation.measure import as_matrix
from lora_theory.simulation.minimise import Minimum
from lora_theory.simulation.pretraining import PretrainingData
from lora_theory.simulation.sizes import Sizes
from lora_theory.simulation.teacher import draw_teacher
from lora_theory.theory.nodes import Discretisation
from lora_theory.theory.predict import check_tokens, solve_pretraining
from lora_theory.theory.units import Units
from lora_theory.theory.weights import Constants

__all__ = ["check_sampled", "sample_pretrained", "sampled_minimum", "teacher_alone"]


def sample_pretrained(
    problem: Problem, dim: int, *, seed: int = 0, index: int = 0
) -> tuple[Float[np.ndarray, "D D"], Float[np.ndarray, "D D"]]:
    """A draw (Ŝ, S0) of the pre-trained matrix and its teacher, without training.

    Ŝ = f(Y)/V̂ with Y = M̂S0 + √Q̂Z, Z symmetric Gaussian, at the solution of the equations: the
    joint law of a trained Ŝ with S0 for D → ∞, outliers included.  It comes without training data,
    so it can stand in for trained weights on fresh sequences only (docs/theory.md, section 2.4).

    Args:
        problem: the question; its fine-tuning is left aside.
        dim: embedding dimension D.  The cost is that of the eigenvectors of a D × D matrix.
        seed, index: run ``index`` of root ``seed``; S0 is the teacher that
            :func:`lora_theory.simulate` draws there.

    Raises:
        ProblemError: an argument is not allowed, or the equations have no solution to draw from.

    Example:
        >>> from lora_theory import Pretraining
        >>> problem = Problem(
        ...     tokens=2, activation="linear", teacher_rank=0.5, label_noise=0.5,
        ...     pretraining=Pretraining(samples=0.2, penalty=0.02),
        ... )
        >>> S, S0 = sample_pretrained(problem, 200)
        >>> bool(abs(np.sum(S * S) / 200 - 1.709) < 0.1)  # Q
        True
        >>> bool(abs(np.sum(S * S0) / 200 - 1.463) < 0.1)  # M
        True
    """
    check_problem(problem)
    problem = problem.alone
    check_sampled(problem)
    sizes = Sizes.of(problem, dim, trained=False)
    seed = checked_integer("seed", seed, 0, 2**32 - 1)
    key = run_key(seed, checked_integer("index", index, 0, 2**32 - 1))
    with double_precision():
        teacher = draw_teacher(key, problem, sizes, np.float64)
        return sampled_matrix(key, problem, sizes, teacher), as_matrix(teacher)


def check_sampled(problem: Problem) -> None:
    """Refuse what weights that come without training data, from the theory, cannot answer."""
    if problem.covariance is not None:
        raise ProblemError(
            'covariance is not allowed with pretrained = "sampled": it must be "trained"'
        )
    if problem.finetuning is not None and problem.finetuning.sequences == "reused":
        raise ProblemError(
            'finetuning.sequences = "reused" is not allowed with pretrained = "sampled", which '
            'trains on no sequences: it must be "fresh"'
        )
    if problem.pretraining.regularizer == "low_rank_decay":
        raise ProblemError(
            'pretraining.regularizer = "low_rank_decay" is not allowed with pretrained = '
            '"sampled": training does not reach the minimum that the theory would draw from'
        )
    if problem.activation == "softmax":
        check_tokens(problem.tokens)


def sampled_matrix(
    key: Key[Array, ""], problem: Problem, sizes: Sizes, teacher: Weights
) -> Float[np.ndarray, "D D"]:
    """Ŝ of a run, in float64; for factors of P < D columns, of rank P at most."""
    discretisation = Discretisation.checked(None, 8, 0, 1e-10)
    root = solve_pretraining(problem.alone, discretisation)
    if not root.is_good(discretisation.tolerance):
        raise ProblemError(
            'pretrained = "sampled" is not allowed for this problem: it needs a solution of the '
            "pre-training equations, and none was found"
        )
    Q_hat, M_hat, V_hat = np.exp(root.unknowns)
    dim, units = sizes.dim, Units.of(problem)
    square = np.asarray(draw_normal(Draw.PRETRAINED_NOISE.key(key), (dim, dim), np.float64))
    noise = (square + square.T) / math.sqrt(2 * dim)
    signal = units.teacher * M_hat
    levels, vectors = np.linalg.eigh(signal * as_matrix(teacher) + math.sqrt(Q_hat) * noise)
    kept = np.asarray(Constants.of(problem).regularizer.shrink(jnp.asarray(levels), V_hat))
    if problem.pretraining.regularizer == "weight_decay":
        kept = np.where(np.arange(dim) < dim - sizes.student_rank, 0.0, kept)
    return np.asarray((vectors * (kept / units.student)) @ vectors.T)


def teacher_alone(
    key: Key[Array, ""], problem: Problem, sizes: Sizes, dtype: type[np.floating]
) -> PretrainingData:
    """The first stage of a run that trains nothing: its teacher, and no sequences."""
    tokens, dim = sizes.tokens, sizes.dim
    return PretrainingData(
        draw_teacher(key, problem, sizes, dtype),
        jnp.zeros((0, tokens, dim), dtype),
        jnp.zeros((0, tokens, tokens), dtype),
        jnp.zeros((dim, 0), dtype),
    )


def sampled_minimum(
    key: Key[Array, ""], problem: Problem, sizes: Sizes, data: PretrainingData
) -> tuple[Minimum, Symmetric]:
    """The sampled weights of a run in place of trained ones; losses were not measured: NaN."""
    S = jnp.asarray(sampled_matrix(key, problem, sizes, data.teacher), data.start.dtype)
    unknown, none = jnp.asarray(math.nan), jnp.asarray(0)
    return Minimum(S, unknown, unknown, 0.0 * none, none, jnp.asarray(True)), Symmetric(S)
