"""Closed forms of linear attention against the general route: minimisation on Gaussian nodes.

The general route knows only the loss ‖y − σ(h)‖² and draws every field: its minima are found by
descents from many starts, with automatic derivatives.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize

from lora_theory import Finetuning, Prediction, Pretraining, Problem, Teacher, predict
from lora_theory.attention import attention
from lora_theory.symbolic import compiled
from lora_theory.symbolic import notation as n
from lora_theory.symbolic.ridge import ridge_solution, saddle_point
from lora_theory.theory.branches import FinetuningNodes
from lora_theory.theory.fields import field_basis, field_count, to_fields
from lora_theory.theory.finetuning import INFORMED, OBSERVABLES, UNINFORMED
from lora_theory.theory.newton import Expansion, minimise
from lora_theory.theory.nodes import Discretisation, gaussian_blocks
from lora_theory.theory.predict import frozen_weights, solve_pretraining
from lora_theory.theory.proximal import linear_lora_proximal
from lora_theory.theory.training_fields import LinearFields
from lora_theory.theory.weights import Constants, weights_at

NODES, BLOCKS = 256, 8
#: Of the general route.  More blocks: their means have tails.
FULL_BLOCKS, SEED = 32, 5


def problem(tokens: int = 2, sequences: str = "fresh", **pretraining) -> Problem:
    return Problem(
        tokens=tokens,
        activation="linear",
        teacher_rank=0.5,
        label_noise=0.5,
        pretraining=Pretraining(**{"samples": 0.2, "penalty": 0.02} | pretraining),
        finetuning=Finetuning(samples=4.0, penalty=0.2, signal=1.3, sequences=sequences),
    )


@functools.cache
def solved(asked: Problem) -> Prediction:
    answer = predict(asked, nodes=NODES, blocks=BLOCKS)
    assert answer.status.is_solved
    return answer


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def standard_error(values: np.ndarray) -> np.ndarray:
    """Of the mean over the first axis."""
    return np.asarray(values.std(axis=0, ddof=1) / math.sqrt(len(values)))


# -- the general route -----------------------------------------------------------------------------


def objective(loss):
    """‖u − ω‖²/2v + ℓ(u; data) with automatic derivatives, for every node."""

    def value(u, center, variance, *data):
        return jnp.sum((u - center) ** 2) / (2 * variance) + loss(u, *data)

    def expansion(u, *data) -> Expansion:
        per_node = [jnp.moveaxis(entry, -1, 0) for entry in (u, *data)]
        found = [
            jax.vmap(derivative)(*per_node)
            for derivative in (value, jax.grad(value), jax.hessian(value))
        ]
        return Expansion(*(jnp.moveaxis(part, 0, -1) for part in found))

    return expansion


def field_loss(u, label):
    """‖σ(h^y) − σ(h)‖² of the coordinates z_ab."""
    tokens = round((math.sqrt(8 * len(u) + 1) - 1) / 2)
    h, h_y = (field_basis(tokens, "linear") @ part for part in (u, label))
    return jnp.sum((attention(h_y, "linear") - attention(h, "linear")) ** 2)


def lora_loss(chi, frozen, logits, norm):
    """‖σ(h^y + χ*χ*ᵀ − q0 I) − σ(h + χχᵀ − qI)‖²."""
    fitted = frozen + jnp.outer(chi, chi) - norm * jnp.eye(len(chi))
    return jnp.sum((attention(logits, "linear") - attention(fitted, "linear")) ** 2)


@functools.partial(jax.jit, static_argnames="loss")
def lowest(loss, starts, center, variance, *data):
    """The best of descents from all starts."""
    nodes = center.shape[-1]
    data = (center, jnp.broadcast_to(variance, nodes), *data)
    wanted = jnp.ones(nodes, dtype=bool)

    def descend(start):
        return minimise(
            objective(loss), start, data, 1 / jnp.asarray(variance),
            wanted=wanted, tolerance=1e-12, max_steps=200,
        )  # fmt: skip

    points, values = jax.lax.map(descend, jnp.asarray(starts))
    return jnp.take_along_axis(points, jnp.argmin(values, axis=0)[None, None], axis=0)[0]


# -- pre-training ----------------------------------------------------------------------------------


def label_variance(asked: Problem) -> float:
    return 1 + asked.teacher_rank + asked.label_noise / 2


def drawn_fields(asked: Problem, Q: float, M: float, block: np.ndarray):
    """z^y, z and g2 of a block."""
    count, Q_y = field_count(asked.tokens, "linear"), label_variance(asked)
    g1, g2 = block[:count], block[count : 2 * count]
    return math.sqrt(Q_y) * g1, M / math.sqrt(Q_y) * g1 + math.sqrt(Q - M**2 / Q_y) * g2, g2


def field_minima(label, z, V):
    """Prox_V(z; y) of the general route, from z and 0."""
    starts = jnp.stack([jnp.asarray(z), jnp.zeros_like(z)])
    return np.asarray(lowest(field_loss, starts, z, V, label))


def pretraining_hats(asked: Problem, Q: float, M: float, V: float, block: np.ndarray) -> np.ndarray:
    """(Q̂, M̂, V̂) of (2.5), averaged over a block."""
    label, z, g2 = drawn_fields(asked, Q, M, block)
    G, alpha, Q_y = (field_minima(label, z, V) - z) / V, asked.pretraining.samples, label_variance
    V_hat = -2 * alpha / math.sqrt(Q - M**2 / Q_y(asked)) * np.mean(np.sum(G * g2, 0))
    M_hat = (2 * alpha * np.mean(np.sum(G * label, 0)) + M * V_hat) / Q_y(asked)
    return np.array([2 * alpha * np.mean(np.sum(G**2, 0)), M_hat, V_hat])


def field_blocks(asked: Problem) -> np.ndarray:
    return gaussian_blocks(2 * field_count(asked.tokens, "linear"), NODES, FULL_BLOCKS, SEED)


@pytest.mark.parametrize("tokens", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_field_proximal_in_closed_form_on_the_same_nodes(tokens):
    asked = problem(tokens)
    stage = solved(asked).pretraining
    label, z, _ = drawn_fields(asked, stage.Q, stage.M, field_blocks(asked)[0])
    for V in (1e-3, stage.V, 30.0):
        found, ratio = field_minima(label, z, V), 4 * V / tokens**2
        np.testing.assert_allclose(found, (z + ratio * label) / (1 + ratio), rtol=0, atol=1e-8)
        ratio *= 1 + 1e-4
        assert np.abs(found - (z + ratio * label) / (1 + ratio)).max() > 1e-8


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_pretraining_hats_in_closed_form_are_averages_over_nodes(tokens):
    asked = problem(tokens)
    stage = solved(asked).pretraining
    closed = np.array([stage.Q_hat, stage.M_hat, stage.V_hat])

    def z_scores(V: float) -> np.ndarray:
        blocks = np.array(
            [pretraining_hats(asked, stage.Q, stage.M, V, block) for block in field_blocks(asked)]
        )
        error = standard_error(blocks)
        assert np.all(error < 0.05 * closed)
        return np.abs(blocks.mean(axis=0) - closed) / error

    assert z_scores(stage.V).max() < 4.5
    assert z_scores(1.2 * stage.V).max() > 8


def test_whole_pretraining_is_that_of_the_general_route():
    """Root of the six equations, the averages over nodes, for every block."""
    asked = problem()
    stage, constants = solved(asked).pretraining, Constants.of(asked)
    start = np.log([stage.Q_hat, stage.M_hat, stage.V_hat])

    def root(block: np.ndarray, constants: Constants) -> np.ndarray:
        def residual(unknowns: np.ndarray) -> np.ndarray:
            Q, M, V = (float(x) for x in weights_at(unknowns, constants).values[:3])
            return np.log(pretraining_hats(asked, Q, M, V, block)) - unknowns

        found = optimize.root(residual, start + 0.1, tol=1e-10)
        assert found.success
        return np.asarray(weights_at(found.x, constants).values[:3])

    closed = np.array([stage.Q, stage.M, stage.V])

    def z_scores(constants: Constants) -> np.ndarray:
        roots = np.array([root(block, constants) for block in field_blocks(asked)])
        assert np.all(standard_error(roots) < 0.02 * closed)
        return np.abs(roots.mean(axis=0) - closed) / standard_error(roots)

    assert z_scores(constants).max() < 4.5
    other = Constants.of(problem(penalty=0.04))
    assert z_scores(other).max() > 8


# -- LoRA ------------------------------------------------------------------------------------------


class Nodes(NamedTuple):
    """What LoRA sees on nodes, last: h, h^y + χ*χ*ᵀ − q0 I, χ* and ζ."""

    frozen: np.ndarray
    logits: np.ndarray
    star: np.ndarray
    zeta: np.ndarray

    @classmethod
    def drawn(cls, answer: Prediction, block: np.ndarray) -> "Nodes":
        """Of Gaussian numbers for all fields; re-used sequences have the Prox of pre-training."""
        asked, stage = answer.problem, answer.pretraining
        tokens, task = asked.tokens, asked.finetuning
        label, z, _ = drawn_fields(asked, stage.Q, stage.M, block)
        if task.sequences == "reused":
            z = field_minima(label, z, stage.V)
        count, basis = 2 * field_count(tokens, "linear"), field_basis(tokens, "linear")
        star = math.sqrt(task.signal) * block[count : count + tokens]
        lift = star[:, None] * star - task.signal * np.eye(tokens)[:, :, None]
        h, h_y = (np.asarray(to_fields(basis, part)) for part in (z, label))
        return cls(h, h_y + lift, star, block[count + tokens :])

    @classmethod
    def reduced(cls, fields: LinearFields) -> "Nodes":
        """Of the nodes of the solver: the residual matrix is diagonal in its eigenbasis."""
        levels, star, zeta = map(np.asarray, (fields.levels, fields.signal, fields.noise))
        logits = np.eye(len(levels))[:, :, None] * levels
        return cls(np.zeros_like(logits), logits, star, zeta)

    def center(self, stage, signal: float) -> np.ndarray:
        return stage.m / signal * self.star + math.sqrt(stage.q - stage.m**2 / signal) * self.zeta

    def starts(self, omega: np.ndarray, norm: float) -> np.ndarray:
        """ω, ±χ* and, for every positive level of B, its eigenvector of either sign."""
        levels, vectors = np.linalg.eigh(np.moveaxis(self.logits - self.frozen, -1, 0))
        sizes = np.sqrt(np.maximum(levels + norm, 0))
        axes = np.moveaxis(vectors * sizes[:, None], (0, 2), (2, 0))  # (level, T, nodes)
        return np.concatenate([[omega, self.star, -self.star], axes, -axes])

    def minima(self, omega: np.ndarray, v: float, norm: float, starts=None) -> np.ndarray:
        starts = self.starts(omega, norm) if starts is None else starts
        norms = np.full(omega.shape[-1], norm)
        return np.asarray(lowest(lora_loss, starts, omega, v, self.frozen, self.logits, norms))

    def secular(self, omega: np.ndarray, v: float, norm: float) -> np.ndarray:
        levels, vectors = np.linalg.eigh(np.moveaxis(self.logits - self.frozen, -1, 0))
        rotated = np.einsum("Nab,aN->bN", vectors, omega)
        found = _secular(jnp.asarray(levels.T + norm), jnp.asarray(rotated), v)
        return np.einsum("Nab,bN->aN", vectors, np.asarray(found.point))


_secular = jax.jit(linear_lora_proximal)


def full_nodes(answer: Prediction) -> Iterator[Nodes]:
    tokens = answer.problem.tokens
    dimension = 2 * field_count(tokens, "linear") + 2 * tokens
    for block in gaussian_blocks(dimension, NODES, FULL_BLOCKS, SEED):
        yield Nodes.drawn(answer, block)


@pytest.mark.parametrize("sequences", ["fresh", "reused"])
@pytest.mark.parametrize("tokens", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_secular_equation_and_descents_from_many_starts_on_the_same_nodes(tokens, sequences):
    answer = solved(problem(tokens, sequences))
    signal, nodes = answer.problem.finetuning.signal, next(full_nodes(answer))
    for stage in answer.branches:
        omega = nodes.center(stage, signal)
        for v in (0.1 * stage.v, stage.v, 5 * stage.v):
            expected = nodes.secular(omega, v, stage.q)
            np.testing.assert_allclose(nodes.minima(omega, v, stage.q), expected, rtol=0, atol=1e-8)
    # control: descents from χ = −ω alone end in other minima on some nodes
    single = nodes.minima(omega, v, stage.q, starts=-omega[None])
    assert np.mean(np.abs(single - expected).max(axis=0) > 1e-3) > 0.01


def lora_hats(answer: Prediction, stage, nodes: Nodes) -> np.ndarray:
    """(q̂, m̂, v̂) of (3.4) from descents, averaged over nodes."""
    task, tokens = answer.problem.finetuning, answer.problem.tokens
    s, alpha = math.sqrt(stage.q - stage.m**2 / task.signal), task.samples
    omega = nodes.center(stage, task.signal)
    chi = nodes.minima(omega, stage.v, stage.q)
    G = (chi - omega) / stage.v
    trace = np.einsum("aaN->N", nodes.logits - nodes.frozen)
    slope = 2 / tokens**2 * (trace + tokens * stage.q - np.sum(chi**2, 0))
    noise = np.mean(np.sum(G * nodes.zeta, 0))
    m_hat = alpha / task.signal * (np.mean(np.sum(G * nodes.star, 0)) - stage.m / s * noise)
    v_hat = alpha * (2 * np.mean(slope) - noise / s)
    return np.array([alpha * np.mean(np.sum(G**2, 0)), m_hat, v_hat])


@pytest.mark.parametrize("branch", ["informed", "uninformed"])
@pytest.mark.parametrize("sequences", ["fresh", "reused"])
def test_rows_of_the_solver_are_those_of_descents_on_the_same_nodes(sequences, branch):
    answer = solved(problem(2, sequences))
    (stage,) = (found for found in answer.branches if found.branch == branch)
    settings, task = Discretisation(NODES, 2, 0, 1e-10), answer.problem.finetuning
    root = solve_pretraining(answer.problem.replace(finetuning=None), settings)
    fields = FinetuningNodes(task, frozen_weights(answer.problem, root), 2, "linear", settings)
    averages = fields.averages(INFORMED if branch == "informed" else UNINFORMED)
    columns = [OBSERVABLES.index(f"{name}_hat") for name in ("q", "m", "v")]

    def rows(stage) -> np.ndarray:
        s = math.sqrt(stage.q - stage.m**2 / task.signal)
        unknowns = np.array([math.log(s), stage.m / task.signal, math.log(stage.v)])
        found: np.ndarray = averages.at(unknowns, search=True).observables[:, columns].mean(axis=0)
        return found

    chunks = [Nodes.reduced(chunk) for chunk in averages.chunks]
    expected = np.mean([lora_hats(answer, stage, chunk) for chunk in chunks], axis=0)
    np.testing.assert_allclose(rows(stage), expected, rtol=1e-8, atol=1e-8)
    other = dataclasses.replace(stage, v=stage.v * (1 + 1e-6))
    assert not np.allclose(rows(other), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sequences", ["fresh", "reused"])
def test_lora_on_reduced_nodes_is_that_on_gaussian_nodes_of_all_fields(sequences):
    answer = solved(problem(2, sequences))
    stage = answer.finetuning
    assert stage.branch == "informed"
    names = ("q_hat", "m_hat", "v_hat")
    closed = np.array([getattr(stage, name) for name in names])

    def z_scores(of: Prediction) -> np.ndarray:
        blocks = np.array([lora_hats(answer, stage, nodes) for nodes in full_nodes(of)])
        own = [stage.quadrature_error[name] for name in names]
        error = np.hypot(standard_error(blocks), own)
        assert np.all(error < 0.1 * closed)
        return np.abs(blocks.mean(axis=0) - closed) / error

    assert z_scores(answer).max() < 4.5
    # control: the residuals of the other kind of sequences
    other = "reused" if sequences == "fresh" else "fresh"
    assert z_scores(solved(problem(2, other))).max() > 8


# -- whole solutions in closed form ----------------------------------------------------------------

TEACHERS = {
    "wishart": {"teacher_rank": 0.5},
    "goe": {"teacher": Teacher(law="goe")},
    "power law": {"teacher": Teacher(law="power_law", exponent=0.3)},
    "eigenvalues": {"teacher": Teacher(law="eigenvalues", eigenvalues=(0.0, 1.0, 2.0))},
}
NORMS = {"wishart": 1.5, "goe": 1.0, "power law": 1.0, "eigenvalues": 5 / 3}
RIDGE = (n.alpha, n.penalty, n.teacher_norm, n.label_noise, n.tokens, n.visible)
_ridge = compiled(ridge_solution().explicit(), RIDGE)
_ridge_hats = compiled(
    [saddle_point()[symbol] for symbol in (n.Q_hat, n.M_hat, n.V_hat)], (n.Q, n.M, n.V, *RIDGE)
)


@pytest.mark.parametrize("law", TEACHERS)
@pytest.mark.parametrize(
    ("tokens", "samples", "penalty", "noise"),
    [(2, 0.05, 0.3, 0.5), (3, 0.4, 0.02, 0.3), (1, 3.0, 1.0, 0.0), (2, 0.1, 1e-3, 0.5)],
)
def test_ridge_solution_is_that_of_predict(law, tokens, samples, penalty, noise):
    stage = Pretraining(samples=samples, penalty=penalty, regularizer="frobenius")
    asked = Problem(
        tokens=tokens, activation="linear", label_noise=noise, pretraining=stage, **TEACHERS[law]
    )
    answer = predict(asked)
    found, noise_found = answer.pretraining, answer.effective_noise.delta_eff

    def closed(penalty: float) -> list[float]:
        numbers = samples, penalty, NORMS[law], noise, tokens, tokens * (tokens + 1)
        V, M, delta_eff, Q = _ridge(*numbers)
        error = (tokens + 1) / tokens * delta_eff
        fits = error / (1 + 4 * V / tokens**2) ** 2
        hats = _ridge_hats(Q, M, V, *numbers)
        potential = samples * fits + penalty / 2 * Q
        return [Q, M, V, *hats, delta_eff, error, fits, potential]

    values = [found.Q, found.M, found.V, found.Q_hat, found.M_hat, found.V_hat, noise_found]
    values += [found.test_error, found.train_error, found.potential]
    np.testing.assert_allclose(values, np.array(closed(penalty), dtype=float), rtol=1e-8)
    assert np.abs(np.array(values) / closed(penalty * (1 + 1e-5)) - 1).max() > 1e-8


def semicircle_moment(delta: float, epsilon: float) -> tuple[float, float, float]:
    """J of a symmetric Gaussian teacher, and its slopes: μ_δ is a semicircle of variance 1 + δ²."""
    variance = 1 + delta**2
    radius = 2 * math.sqrt(variance)
    # x = r sin t; ∂_δ of the mean of φ over a semicircle is δ/σ² times that of xφ'
    at = math.asin(epsilon / radius)

    def mean(function) -> float:
        def integrand(t: float) -> float:
            density = 2 / math.pi * math.cos(t) ** 2
            return density * function(radius * math.sin(t) - epsilon, radius * math.sin(t))

        return integrate.quad(integrand, at, math.pi / 2, epsabs=1e-12, epsrel=1e-12)[0]

    J = mean(lambda gap, x: gap**2)
    return J, delta / variance * mean(lambda gap, x: 2 * gap * x), -2 * mean(lambda gap, x: gap)


@pytest.mark.parametrize(("regularizer", "sides"), [("weight_decay", 1), ("nuclear_norm", 2)])
@pytest.mark.parametrize(
    ("delta", "epsilon", "tokens"), [(0.4, 0.3, 2), (0.8, 1.0, 3), (1.3, 0.5, 1)]
)
def test_curve_of_a_gaussian_teacher_is_that_of_predict(regularizer, sides, delta, epsilon, tokens):
    """Section 4.2 with an elementary J; a symmetric threshold takes both sides of the spectrum."""
    count, Q_y = tokens * (tokens + 1), 1.25
    J, by_delta, by_epsilon = (sides * part for part in semicircle_moment(delta, epsilon))
    Q, M = J, J - delta / 2 * by_delta - epsilon / 2 * by_epsilon
    noise = Q_y - 2 * M + Q
    samples = noise / (count * delta**2)
    M_hat = 4 / tokens**2 * (samples * count - by_delta / (2 * delta))
    V = by_delta / (2 * delta * M_hat)
    penalty = epsilon * M_hat / 2
    stage = Pretraining(samples=samples, penalty=penalty, regularizer=regularizer)
    asked = Problem(
        tokens=tokens,
        activation="linear",
        label_noise=0.5,
        teacher=Teacher(law="goe"),
        pretraining=stage,
    )

    def values(asked: Problem) -> list[float]:
        found = predict(asked).pretraining
        return [found.Q, found.M, found.V, found.Q_hat, found.M_hat, found.V_hat, found.test_error]

    closed = [Q, M, V, (delta * M_hat) ** 2, M_hat, M_hat, (tokens + 1) / tokens * noise]
    np.testing.assert_allclose(values(asked), closed, rtol=1e-8)
    other = asked.replace({"pretraining.penalty": penalty * (1 + 1e-5)})
    assert np.abs(np.array(values(other)) / closed - 1).max() > 1e-8
