"""The loop one writes first: random samples, scipy.optimize.minimize for each, damped iteration.

One map of each stage is timed on few samples at the solution of ``predict``; samples and
iterations for the error of ``predict`` are scaled from what these samples show.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from common import Column, Part, Row, fresh, problem, relative_errors, timed
from scipy.optimize import minimize

if TYPE_CHECKING:
    from lora_theory import Problem

NOTES = """
Softmax, fresh sequences, the branch that predict reports.  Per sample and iteration one call of
scipy.optimize.minimize (BFGS, gradient given) from each start: z and the label's field in pre-
training, ω, χ* and −χ* in LoRA; weighted equations, docs/theory.md (2.5), (3.4).

Measured: seconds per sample, on few samples at the solution of predict.  Scaled: (1) samples N,
as 1/error², from the variance of the samples' terms carried through the equations to first order,
until the relative standard errors of Q, M and their overlap (q, m and theirs) are at the largest
that predict states for any number; E, E' and the frozen error come for free, and LoRA does not
feel the error of pre-training (both favour the loop); (2) iterations n, as log(error)/log(rate),
from the Jacobian of the map by differences on the same samples, with the best damping of .1, .2,
…, 1 for each stage.

Loop: Σ seconds per sample × N × n.  Ratio: loop over warm predict.  Check: largest distance of
the map from the solution of predict, in standard errors.
"""
COLUMNS = (
    Column("case", "case"),
    Column("relative_error", "error", ".1e"),
    Column("predict_s", "predict s", ".3f"),
    Column("sample_ms_1", "ms/sample W", ".2f"),
    Column("samples_1", "N W", ".1e"),
    Column("iterations_1", "n W"),
    Column("sample_ms_2", "ms/sample w", ".2f"),
    Column("samples_2", "N w", ".1e"),
    Column("iterations_2", "n w"),
    Column("loop_s", "loop s", ".1e"),
    Column("ratio", "ratio", ".1e"),
    Column("check", "check", ".1f"),
)
DAMPINGS = np.arange(1, 11) / 10
Array = np.ndarray


class Measured(NamedTuple):
    """One stage of the loop at the solution."""

    seconds: float  # per sample and iteration
    samples: float  # for the error asked
    iterations: int
    check: float


def softmax(scores: Array) -> Array:
    grown = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return grown / grown.sum(axis=-1, keepdims=True)


def loss_and_slope(scores: Array, labels: Array) -> tuple[float, Array]:
    """‖y − σ(h)‖² and its derivatives in the entries of h."""
    p = softmax(scores)
    d = p - labels
    return float(np.sum(d**2)), 2 * p * (d - np.sum(p * d, axis=1, keepdims=True))


def lowest(objective: Any, starts: list[Array]) -> Array:
    ends = [minimize(objective, start, jac=True, method="BFGS") for start in starts]
    return min(ends, key=lambda end: end.fun).x


class Pretraining:
    """Map of (Q, M, V); a sample holds z^y and g of z = (M/Q_y) z^y + S g."""

    def __init__(self, problem: Problem, samples: int, generator: np.random.Generator) -> None:
        self.problem, tokens = problem, problem.tokens
        self.rows, self.columns = np.triu_indices(tokens)
        self.scale = np.where(self.rows == self.columns, math.sqrt(2), 1.0)
        self.label_variance = 1 + problem.teacher_rank + problem.label_noise / 2
        draws = generator.standard_normal((samples, 2, self.rows.size))
        self.labels, self.noise = math.sqrt(self.label_variance) * draws[:, 0], draws[:, 1]

    def fields(self, z: Array) -> Array:
        h = np.zeros((self.problem.tokens,) * 2)
        h[self.rows, self.columns] = h[self.columns, self.rows] = self.scale * z
        return h

    def terms(self, x: Array) -> Array:
        """What every sample adds to (Q̂, M̂, V̂), equation (2.5)."""
        Q, M, V = x
        alpha, Qy = self.problem.pretraining.samples, self.label_variance
        centers = M / Qy * self.labels + math.sqrt(Q - M**2 / Qy) * self.noise
        terms = []
        for label, center in zip(self.labels, centers, strict=True):
            y = softmax(self.fields(label))

            def objective(u: Array, y: Array = y, center: Array = center) -> tuple[float, Array]:
                value, slope = loss_and_slope(self.fields(u), y)
                both = slope + slope.T
                both[np.diag_indices_from(both)] /= 2
                gradient = self.scale * both[self.rows, self.columns]
                pull = (u - center) / V
                return value + pull @ (u - center) / 2, gradient + pull

            G = (lowest(objective, [center, label]) - center) / V
            spread = Qy * Q - M**2
            terms.append([
                G @ G,
                G @ (Q * label - M * center) / spread,
                -G @ (Qy * center - M * label) / spread,
            ])  # fmt: skip
        return 2 * alpha * np.array(terms)

    def step(self, hats: Array, x: Array) -> Array:
        """(Q, M, V) of (Q̂, M̂, V̂), equations (2.8) and (2.10), by a sum over the spectrum."""
        Q_hat, M_hat, V_hat = hats
        penalty = math.sqrt(self.problem.pretraining.rank) * self.problem.pretraining.penalty
        delta, epsilon = math.sqrt(Q_hat) / M_hat, 2 * penalty / M_hat
        c = 1 / math.sqrt(self.problem.teacher_rank)
        upper = (1 + math.sqrt(self.problem.teacher_rank)) ** 2 * c + 2 * delta
        x, width = np.linspace(epsilon, max(upper, epsilon), 4000, retstep=True)
        cubic = np.stack(
            [np.full_like(x, c * delta**2), -(c * x + delta**2), x + c - 1 / c, -np.ones_like(x)]
        )
        companion = np.zeros((x.size, 3, 3))
        companion[:, 0] = -(cubic[1:] / cubic[0]).T
        companion[:, 1, 0] = companion[:, 2, 1] = 1.0
        roots = np.linalg.eigvals(companion)
        G = np.take_along_axis(roots, np.argmin(roots.imag, axis=1)[:, None], axis=1)[:, 0]
        density, tail = np.abs(G.imag) / np.pi * width, x - epsilon
        J = np.sum(tail**2 * density)
        J_delta = 4 * delta * np.sum(tail * density * G.real)
        J_epsilon = -2 * np.sum(tail * density)
        return np.array([
            (M_hat / V_hat) ** 2 * J,
            (M_hat * J - math.sqrt(Q_hat) / 2 * J_delta - penalty * J_epsilon) / V_hat,
            M_hat * J_delta / (2 * math.sqrt(Q_hat) * V_hat),
        ])  # fmt: skip


class Finetuning:
    """Map of (q, m, v) on frozen (Q, M); a sample holds h^y, h, χ* and ζ of ω = (m/q0)χ* + sζ."""

    def __init__(
        self, stage: Pretraining, Q: float, M: float, generator: np.random.Generator
    ) -> None:
        self.task, Qy = stage.problem.finetuning, stage.label_variance
        tokens = stage.problem.tokens
        z = M / Qy * stage.labels + math.sqrt(Q - M**2 / Qy) * stage.noise
        signal = self.task.signal
        draws = generator.standard_normal((len(z), 2, tokens))
        self.star, self.zeta = math.sqrt(signal) * draws[:, 0], draws[:, 1]
        lifted = [np.outer(star, star) - signal * np.eye(tokens) for star in self.star]
        self.frozen = [stage.fields(row) for row in z]
        self.labels = [
            softmax(stage.fields(row) + lift)
            for row, lift in zip(stage.labels, lifted, strict=True)
        ]

    def terms(self, x: Array) -> Array:
        """What every sample adds to (q̂, m̂, v̂), equation (3.4) in terms of ω and χ*."""
        q, m, v = x
        alpha, q0 = self.task.samples, self.task.signal
        centers = m / q0 * self.star + math.sqrt(q - m**2 / q0) * self.zeta
        eye, terms = np.eye(self.star.shape[1]), []
        for h, y, star, center in zip(self.frozen, self.labels, self.star, centers, strict=True):

            def objective(
                chi: Array, h: Array = h, y: Array = y, center: Array = center
            ) -> tuple[float, Array]:
                value, slope = loss_and_slope(h + np.outer(chi, chi) - q * eye, y)
                pull = (chi - center) / v
                return value + pull @ (chi - center) / 2, (slope + slope.T) @ chi + pull

            chi = lowest(objective, [center, star, -star])
            G, spread = (chi - center) / v, q0 * q - m**2
            norm_slope = -np.trace(loss_and_slope(h + np.outer(chi, chi) - q * eye, y)[1])
            terms.append([
                G @ G,
                G @ (q * star - m * center) / spread,
                2 * norm_slope - G @ (q0 * center - m * star) / spread,
            ])  # fmt: skip
        return alpha * np.array(terms)

    def step(self, hats: Array, x: Array) -> Array:
        """(q, m, v) of (q̂, m̂, v̂)."""
        q_hat, m_hat, v_hat = hats
        q0, R = self.task.signal, 2 * self.task.penalty + v_hat
        return np.array([(q0 * m_hat**2 + q_hat) / R**2, q0 * m_hat / R, 1 / R])


def examined(stage: Pretraining | Finetuning, solution: Array, error: float) -> Measured:
    """Cost, samples and iterations of the loop around a solution, in logarithms of the unknowns."""
    start = time.perf_counter()
    terms = stage.terms(solution)
    seconds = time.perf_counter() - start

    def log_step(hats: Array) -> Array:
        return np.log(stage.step(hats, solution))

    hats, step = terms.mean(axis=0), 0.02
    jacobian, response = np.empty((3, 3)), np.empty((3, 3))
    for index in range(3):
        factor = np.where(np.arange(3) == index, math.exp(step), 1.0)
        moved = stage.terms(solution * factor).mean(axis=0)
        jacobian[:, index] = (log_step(moved) - log_step(hats)) / step
        response[:, index] = (log_step(hats * factor) - log_step(hats / factor)) / (2 * step)
    # a sample changes the hats by its term, the map by the response, the solution by (1 − J)⁻¹
    moves = response @ (terms / hats - 1).T
    Q, M, _ = np.linalg.solve(np.eye(3) - jacobian, moves)
    deviations = np.std([Q, M, M - Q / 2], axis=1, ddof=1)  # the last: overlap, M/√Q
    eigenvalues = np.linalg.eigvals(jacobian)
    rate = min(np.max(np.abs(1 - eta + eta * eigenvalues)) for eta in DAMPINGS)
    if rate >= 1:
        raise RuntimeError(f"{len(terms)} samples are too few to see the iteration contract")
    iterations = math.ceil(math.log(error) / math.log(rate))
    spread = np.std(moves, axis=1, ddof=1) / math.sqrt(len(terms))
    check = float(np.max(np.abs(log_step(hats) - np.log(solution)) / spread))
    samples = float(np.max(deviations) / error) ** 2
    return Measured(seconds / len(terms), samples, iterations, check)


def case(tokens: int, samples: int, nodes: int | None) -> Row:
    """To be called in a fresh process."""
    from lora_theory import predict

    predict(problem(tokens, penalty=0.05), nodes=nodes)
    asked = problem(tokens, penalty=0.06)
    predict_s, answer = timed(lambda: predict(asked, nodes=nodes))
    error = max(relative_errors(answer).values())
    generator = np.random.default_rng(0)
    first = Pretraining(asked, samples, generator)
    solved, tuned = answer.pretraining, answer.finetuning
    second = Finetuning(first, solved.Q, solved.M, generator)
    stages = [
        examined(first, np.array([solved.Q, solved.M, solved.V]), error),
        examined(second, np.array([tuned.q, tuned.m, tuned.v]), error),
    ]
    loop_s = sum(stage.seconds * stage.samples * stage.iterations for stage in stages)
    row = {"case": f"softmax T={tokens}", "measured_samples": samples, "relative_error": error,
           "predict_s": predict_s, "loop_s": loop_s, "ratio": loop_s / predict_s,
           "check": max(stage.check for stage in stages)}  # fmt: skip
    for index, stage in enumerate(stages, 1):
        row |= {
            f"sample_ms_{index}": 1e3 * stage.seconds,
            f"samples_{index}": stage.samples,
            f"iterations_{index}": stage.iterations,
        }
    return row


def measure(toy: bool = False) -> Part:
    if toy:
        return Part(NOTES, COLUMNS, [fresh("plain_loop.case", tokens=2, samples=100, nodes=64)])
    rows = [
        fresh("plain_loop.case", tokens=tokens, samples=samples, nodes=None)
        for tokens, samples in ((2, 1000), (3, 500))
    ]
    return Part(NOTES, COLUMNS, rows)
