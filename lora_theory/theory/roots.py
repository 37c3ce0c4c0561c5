"""Root of a few equations averaged over nodes, with the quadrature error of everything read off it.

The nodes come in R independent blocks.  A first root is found on one block; the root is taken on
the mean over all blocks; the spread of the R roots that one Newton step gives for the single
blocks is the quadrature error (docs/theory.md, section 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from scipy.optimize import root

from lora_theory.status import Status

__all__ = ["BlockValues", "Root", "log_ratio", "solve", "standard_error"]

_BASIN_ROUNDS, _BASIN_STEPS, _BASIN_RESIDUAL, _OTHER_STARTS = 3, 40, 0.05, 3
_BLOCK_EVALUATIONS, _FULL_EVALUATIONS, _SECANT_EVALUATIONS = 40, 10, 30
# relative step of the secant: wide enough to average over the jumps of many nodes
_SECANT_STEP = 0.02
_THREADS = 2
_MATTERING_JUMPS, _LARGEST_JUMP_RESIDUAL = 0.05, 0.02


class BlockValues(NamedTuple):
    """Residuals and observables on one block of nodes, with their Jacobian."""

    residual: Float[np.ndarray, " n"]
    observables: Float[np.ndarray, " K"]
    jacobian: Float[np.ndarray, "n+K n+p"]  # columns: the unknowns, then the parameters


class Root(NamedTuple):
    """A root, the observables there and the observables of the single blocks."""

    unknowns: Float[np.ndarray, " n"]
    residual: float  # largest relative residual of the mean equations
    residual_noise: float  # its standard error over the blocks
    observables: Float[np.ndarray, " K"]
    block_observables: Float[np.ndarray, "R K"]

    @property
    def quadrature_error(self) -> Float[np.ndarray, " K"]:
        """Standard error of the observables from the spread of the blocks; 0 for exact averages."""
        return standard_error(self.block_observables)

    def status(self, jump_mass: float, jump_error: float, tolerance: float) -> Status:
        """How good the root is: converged, or jumps of the proximal operator are seen in it."""
        if not np.all(np.isfinite(self.observables)):
            return Status.NOT_CONVERGED
        if self.residual < tolerance:
            jumps = abs(jump_mass) > max(_MATTERING_JUMPS, 4 * jump_error)
            return Status.JUMPS if jumps else Status.CONVERGED
        within = self.residual < min(self.residual_noise, _LARGEST_JUMP_RESIDUAL)
        return Status.JUMPS if within else Status.NOT_CONVERGED


def standard_error(blocks: Float[np.ndarray, "R ..."]) -> Float[np.ndarray, "..."]:
    """Standard error of the mean over independent blocks; 0 for the single block of exact means."""
    if len(blocks) == 1:
        return np.zeros(blocks.shape[1:])
    return np.asarray(blocks.std(axis=0, ddof=1) / np.sqrt(len(blocks)))


#: Residuals to a damped step.
Relaxation = Callable[[Float[np.ndarray, " n"]], Float[np.ndarray, " n"]]
#: Residuals, observables and Jacobian at given unknowns on block r.
Evaluate = Callable[[Float[np.ndarray, " n"], int], BlockValues]


def solve(
    evaluate: Evaluate,
    start: Float[np.ndarray, " n"],
    *,
    blocks: int,
    tolerance: float,
    relaxation: Relaxation | None = None,
    parameter_shift: Float[np.ndarray, "R p"] | None = None,
    others: Sequence[Float[np.ndarray, " n"]] = (),
) -> Root:
    """Damped steps into the basin, then Levenberg–Marquardt (MINPACK); on one block, then on all.

    Args:
        evaluate: values on one block; the residuals are linear in the node averages, so that
            the mean over the blocks is the residual on all nodes.
        start: first unknowns.
        blocks: R, number of blocks.
        tolerance: residual at which the search on one block ends.
        relaxation: the damped step at given residuals; by default half of them, bounded.  The
            last unknown relaxes first.
        parameter_shift: how far the parameters of each block are from their mean (the error handed
            on by the previous stage).
        others: points to search from where the damped iteration fails, since the root repels it.

    Returns:
        The root with the smallest residual met; the caller judges that residual.
    """
    relaxation = relaxation or _halved
    x = _basin(
        lambda x: evaluate(x, 0), np.array(start, dtype=np.float64), tolerance, relaxation, others
    )
    with ThreadPoolExecutor(min(_THREADS, blocks)) as pool:

        def everywhere(x: Float[np.ndarray, " n"]) -> list[BlockValues]:
            # a thread has its own JAX scopes: the 64-bit one must be opened in each
            def one(block: int) -> BlockValues:
                with jax.enable_x64(True):
                    return evaluate(x, block)

            return list(pool.map(one, range(blocks)))

        x, values = _polish(everywhere, x, tolerance, _FULL_EVALUATIONS)
    return _root(x, values, parameter_shift)


def _basin(
    evaluate: Callable[[Float[np.ndarray, " n"]], BlockValues],
    x: Float[np.ndarray, " n"],
    tolerance: float,
    relaxation: Relaxation,
    others: Sequence[Float[np.ndarray, " n"]],
) -> Float[np.ndarray, " n"]:
    """Damped iteration until Levenberg–Marquardt succeeds from where it has come."""
    for _ in range(4):
        step = np.zeros_like(x)
        step[-1] = np.nan_to_num(relaxation(evaluate(x).residual))[-1]
        x = x + step
    best, best_size = x, np.inf
    for _ in range(_BASIN_ROUNDS):
        for _ in range(_BASIN_STEPS):
            residual = evaluate(x).residual
            if np.max(np.abs(residual)) < _BASIN_RESIDUAL:
                break
            x = x + np.nan_to_num(relaxation(residual))
        found, values = _polish(lambda x: [evaluate(x)], x, tolerance, _BLOCK_EVALUATIONS)
        size = _size(values)
        progress = size < 0.5 * best_size
        if size < best_size:
            best, best_size = found, size
        if size < tolerance or not progress:
            break
    if best_size > tolerance:
        nearest = sorted(others, key=lambda x: _size([evaluate(x)]))[:_OTHER_STARTS]
        for x in nearest:
            found, values = _polish(lambda x: [evaluate(x)], x, tolerance, _BLOCK_EVALUATIONS)
            if _size(values) < best_size:
                best, best_size = found, _size(values)
            if best_size < tolerance:
                break
    return best


def log_ratio(ratio: Float[np.ndarray, "..."] | float) -> Float[np.ndarray, "..."]:
    """log x, continued linearly below ½: for ratios of new to old that may have any sign."""
    return np.where(ratio > 0.5, np.log(np.maximum(ratio, 0.5)), 2 * ratio - 1 - math.log(2.0))


def _halved(residual: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return np.asarray(0.5 * np.clip(residual, -1.0, 1.0))


def _polish(
    evaluate: Callable[[Float[np.ndarray, " n"]], list[BlockValues]],
    x: Float[np.ndarray, " n"],
    tolerance: float,
    evaluations: int,
) -> tuple[Float[np.ndarray, " n"], list[BlockValues]]:
    """Root of the mean residual: the best point met and the values there.

    Levenberg–Marquardt with the exact Jacobian; where jumps make the residual discontinuous that
    Jacobian misses their share, and Powell's hybrid method with wide differences goes on.
    """
    met: dict[bytes, list[BlockValues]] = {}

    def at(x: Float[np.ndarray, " n"]) -> list[BlockValues]:
        key = np.asarray(x).tobytes()
        if key not in met:
            met[key] = evaluate(np.array(x))
        return met[key]

    def residual(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        return _mean([values.residual for values in at(x)], outside=1e6)

    def jacobian(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n n"]:
        return _mean([values.jacobian[: x.size, : x.size] for values in at(x)], outside=0.0)

    def best() -> tuple[bytes, list[BlockValues]]:
        return min(met.items(), key=lambda entry: _size(entry[1]))

    options = {"xtol": 1e-13, "ftol": 1e-14, "factor": 0.5, "maxiter": evaluations}
    root(residual, x, jac=jacobian, method="lm", options=options)
    if _size(best()[1]) > tolerance:
        options = {"eps": _SECANT_STEP**2, "factor": 0.1, "maxfev": _SECANT_EVALUATIONS}
        root(residual, np.frombuffer(best()[0]), method="hybr", options=options)
    point, values = best()
    return np.frombuffer(point).copy(), values


def _mean(values: list[Float[np.ndarray, "..."]], outside: float) -> Float[np.ndarray, "..."]:
    """Mean over the blocks; what is not finite, far from any root, counts as ``outside``."""
    finite = np.nan_to_num(np.array(values), nan=outside, posinf=outside, neginf=-outside)
    return np.asarray(finite.mean(axis=0))


def _size(values: list[BlockValues]) -> float:
    residual = np.array([value.residual for value in values])
    if not np.all(np.isfinite(residual)):
        return np.inf
    return float(np.abs(residual.mean(axis=0)).max())


def _root(
    x: Float[np.ndarray, " n"],
    values: list[BlockValues],
    parameter_shift: Float[np.ndarray, "R p"] | None,
) -> Root:
    size = x.size
    residual = np.array([value.residual for value in values])
    observables = np.array([value.observables for value in values])
    jacobian = _mean([value.jacobian for value in values], outside=0.0)
    change, drift = residual - residual.mean(axis=0), observables
    if parameter_shift is not None and jacobian.shape[1] > size:
        shifted = parameter_shift @ jacobian[:, size:].T
        change, drift = change + shifted[:, :size], drift + shifted[:, size:]
    moves = np.linalg.lstsq(jacobian[:size, :size], -change.T, rcond=None)[0].T
    return Root(
        x,
        _size(values),
        float(standard_error(residual).max()),
        observables.mean(axis=0),
        drift + moves @ jacobian[size:, :size].T,
    )
