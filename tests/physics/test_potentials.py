"""At a solution the discretised potentials are stationary, and equal the training losses.

Φ and φ of docs/theory.md, sections 2 and 3, are written down here on the nodes of the solution and
differentiated automatically.  The minimiser may be held fixed: the envelope theorem.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_theory import Finetuning, Prediction, Pretraining, Problem, predict
from lora_theory.theory.branches import FrozenWeights
from lora_theory.theory.fields import field_basis, field_count
from lora_theory.theory.nodes import Discretisation, gaussian_blocks
from lora_theory.theory.predict import frozen_weights, solve_pretraining
from lora_theory.theory.proximal import (
    linear_lora_proximal,
    rank_one_part,
    softmax_field_minima,
    softmax_field_proximal,
    softmax_lora_minima,
    softmax_lora_proximal,
    softmax_lora_starts,
)
from lora_theory.theory.spectrum import truncated_second_moment
from lora_theory.theory.training_fields import linear_fields, node_dimension

# seed 11: every branch has a root on so few nodes, though jumps carry half of some responses
NODES, BLOCKS, SEED = 128, 4, 11
SOFTMAX = Problem(
    tokens=2,
    activation="softmax",
    teacher_rank=0.5,
    label_noise=0.5,
    pretraining=Pretraining(samples=0.2, penalty=0.02, rank=0.8),
    finetuning=Finetuning(samples=3.0, penalty=0.2, signal=1.3),
)
LINEAR = SOFTMAX.replace(activation="linear", label_noise=0.4)
REUSED = {"finetuning.sequences": "reused"}
PROBLEMS = [
    pytest.param(LINEAR, id="linear, fresh"),
    pytest.param(LINEAR.replace(REUSED), id="linear, reused"),
    pytest.param(LINEAR.replace({"tokens": 4, "pretraining.penalty": 0.3}), id="linear, T = 4"),
    pytest.param(SOFTMAX, id="softmax, fresh", marks=pytest.mark.exhaustive),
    pytest.param(SOFTMAX.replace(REUSED), id="softmax, reused", marks=pytest.mark.slow),
    pytest.param(
        SOFTMAX.replace({"tokens": 3, **REUSED}),
        id="softmax, T = 3, reused",
        marks=pytest.mark.exhaustive,
    ),
]
PRETRAINING = ("Q", "M", "V", "Q_hat", "M_hat", "V_hat")
FINETUNING = ("q", "m", "v", "q_hat", "m_hat", "v_hat")


@functools.cache
def solved(problem: Problem) -> Prediction:
    answer = predict(problem, nodes=NODES, blocks=BLOCKS, seed=SEED)
    assert answer.pretraining.residual < 1e-10
    assert {branch.branch for branch in answer.branches} == {"informed", "uninformed"}
    assert all(branch.residual < 1e-10 for branch in answer.branches)
    return answer


def weights_of(problem: Problem) -> FrozenWeights:
    """Q, M and V of every block: stage two takes those of the block's own root."""
    discretisation = Discretisation(NODES, BLOCKS, SEED, tolerance=1e-10)
    return frozen_weights(
        problem, solve_pretraining(problem.replace(finetuning=None), discretisation)
    )


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def all_nodes(dimension: int, seed: int) -> np.ndarray:
    return np.concatenate(gaussian_blocks(dimension, NODES, BLOCKS, seed), axis=1)


def with_mirror(kept: np.ndarray, mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.tile(kept, (1, 2)), np.concatenate([mirrored, -mirrored], axis=1)


def sigma(scores):
    """Row softmax of (T, T, nodes)."""
    return jax.nn.softmax(scores, axis=1)


def fields(problem: Problem, coordinates):
    return jnp.tensordot(field_basis(problem.tokens, problem.activation), coordinates, 1)


def label_variance(problem: Problem) -> float:
    return 1 + problem.teacher_rank + problem.label_noise / 2


def frozen_pair(problem: Problem, g1, g2, Q, M):
    """z^y and z."""
    Q_y = label_variance(problem)
    label = np.sqrt(Q_y) * g1
    return label, M / Q_y * label + jnp.sqrt(Q - M**2 / Q_y) * g2


def with_many_others(minimum):
    """The minimum and those of 40 other nodes, on which the lowest one may be found."""
    return jnp.stack([jnp.roll(minimum, 25 * k, axis=-1) for k in range(41)])


@jax.jit
def field_proximal(y, label, z, V):
    """Prox_V(z; y)."""
    minimum = softmax_field_minima(y, z, V, jnp.stack([z, label])).point
    minimum = softmax_field_minima(y, z, V, with_many_others(minimum)).point
    return softmax_field_proximal(y, z, V, minimum).point


@jax.jit
def lora_proximal(h, y, omega, v, q, likely):
    """prox(ω) of softmax attention."""
    starts = softmax_lora_starts(h, y, omega, v, q, likely)
    minimum = softmax_lora_minima(h, y, omega, v, q, starts).point
    minimum = softmax_lora_minima(h, y, omega, v, q, with_many_others(minimum)).point
    return softmax_lora_proximal(h, y, omega, v, q, minimum).point


_linear_proximal = jax.jit(lambda *arguments: linear_lora_proximal(*arguments).point)


# -- pre-training ----------------------------------------------------------------------------------


def pretraining_envelope(problem: Problem, at: np.ndarray):
    """(V, Q, M) ↦ E min_u ‖u − z‖²/2V + ℓ(u; y), the minimiser held at the one of ``at``."""
    T = problem.tokens
    if problem.activation == "linear":
        # k equal terms, each quadratic in two Gaussians: three Gauss–Hermite points are exact.
        points, weights = np.polynomial.hermite_e.hermegauss(3)
        g1, g2 = (g.ravel()[None] for g in np.meshgrid(points, points))
        weight = np.outer(weights, weights).ravel() / (2 * np.pi) * T * (T + 1) / 2
        label, z_at = frozen_pair(problem, g1, g2, at[0], at[1])
        u = (z_at / at[2] + 4 / T**2 * label) / (1 / at[2] + 4 / T**2)
        loss = 2 / T**2 * (label - u) ** 2
    else:
        count = field_count(T, "softmax")
        nodes = all_nodes(2 * count, SEED)
        g1, g2 = with_mirror(nodes[:count], nodes[count:])
        weight = 1 / g1.shape[1]
        label, z_at = frozen_pair(problem, g1, g2, at[0], at[1])
        y = sigma(fields(problem, label))
        u = field_proximal(y, label, z_at, at[2])
        loss = jnp.sum((y - sigma(fields(problem, u))) ** 2, axis=(0, 1))

    def envelope(V, Q, M):
        z = frozen_pair(problem, g1, g2, Q, M)[1]
        return jnp.sum(weight * (jnp.sum((u - z) ** 2, axis=0) / (2 * V) + loss))

    return envelope


@functools.cache
def pretraining_point(problem: Problem):
    """Φ with the minimiser held, its gradient, and the solution."""
    stage = solved(problem).pretraining
    at = np.array([getattr(stage, name) for name in PRETRAINING])
    envelope = pretraining_envelope(problem, at)
    threshold = 2 * np.sqrt(problem.pretraining.rank) * problem.pretraining.penalty

    def potential(values):
        Q, M, V, Q_hat, M_hat, V_hat = values
        J = truncated_second_moment(
            jnp.sqrt(Q_hat) / M_hat, threshold / M_hat, jnp.asarray(problem.teacher_rank)
        )
        return (
            (Q_hat * V + 2 * M_hat * M - V_hat * Q) / 4
            + problem.pretraining.samples * envelope(V, Q, M)
            - M_hat**2 / (4 * V_hat) * J
        )

    return jax.jit(potential), jax.jit(jax.grad(potential)), at


def pretraining_slopes(problem: Problem, factors=(1, 1, 1)) -> np.ndarray:
    """Gradient of Φ at the solution, its hats times ``factors``, relative to what cancels in it."""
    _, gradient, at = pretraining_point(problem)
    scale = np.array([at[5] / 4, at[4] / 2, at[3] / 4, at[2] / 4, at[1] / 2, at[0] / 4])
    return np.abs(np.asarray(gradient(at * np.array([1, 1, 1, *factors]))) / scale)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_pretraining_potential_is_stationary(problem):
    assert pretraining_slopes(problem).max() < 1e-8


@pytest.mark.parametrize("problem", PROBLEMS)
def test_wrong_pretraining_hats_are_seen(problem):
    for wrong in ((2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 1.001)):
        assert pretraining_slopes(problem, wrong).max() > 5e-4


@pytest.mark.parametrize("problem", PROBLEMS)
def test_pretraining_potential_is_the_training_loss(problem):
    stage, pretraining = solved(problem).pretraining, problem.pretraining
    function, _, at = pretraining_point(problem)
    potential = float(function(at))
    penalty = np.sqrt(pretraining.rank) * pretraining.penalty
    delta, epsilon = np.sqrt(stage.Q_hat) / stage.M_hat, 2 * penalty / stage.M_hat
    slope = jax.grad(truncated_second_moment, argnums=1)
    trace = -0.5 * stage.M_hat / stage.V_hat * slope(delta, epsilon, problem.teacher_rank)
    loss = pretraining.samples * stage.train_error + penalty * float(trace)
    assert stage.potential == pytest.approx(potential, rel=1e-8)
    assert loss == pytest.approx(potential, rel=1e-8)
    assert penalty * float(trace) > 1e-3 * potential


# -- fine-tuning -----------------------------------------------------------------------------------


def finetuning_nodes(problem: Problem):
    """χ*, ζ, a function (χ, q) ↦ ℓ per node, and one that solves for the minimiser."""
    T, stage, weights = problem.tokens, problem.finetuning, weights_of(problem)
    q0, eye = stage.signal, np.eye(T)[:, :, None]
    nodes = all_nodes(node_dimension(T, problem.activation), SEED + 1)
    if problem.activation == "linear":
        (noise,) = label_variance(problem) - 2 * weights.M + weights.Q
        if stage.sequences == "reused":
            noise = noise / (1 + 4 * weights.V[0] / T**2) ** 2
        parts = linear_fields(nodes, noise, q0, tokens=T)

        def loss(chi, q):
            target = eye * (parts.levels + q)[:, None]
            return jnp.sum((target - chi[:, None] * chi) ** 2, axis=(0, 1)) / T**2

        def solve(omega, q, v):
            return _linear_proximal(parts.levels + q, omega, v)

        return parts.signal, parts.noise, loss, solve
    n = field_count(T, "softmax")
    star, zeta = with_mirror(np.sqrt(q0) * nodes[2 * n : 2 * n + T], nodes[2 * n + T :])
    Q, M, V = (np.repeat(part, NODES) for part in (weights.Q, weights.M, weights.V))
    label, z = frozen_pair(problem, nodes[:n], nodes[n : 2 * n], Q, M)
    if stage.sequences == "reused":
        z = field_proximal(sigma(fields(problem, label)), label, z, V)
    label, z = np.tile(label, (1, 2)), np.tile(np.asarray(z), (1, 2))
    h = fields(problem, z)
    y = sigma(fields(problem, label) + star[:, None] * star - q0 * eye)
    likely = jnp.stack([star, rank_one_part(fields(problem, label) - h + star[:, None] * star)])

    def loss(chi, q):
        return jnp.sum((y - sigma(h + chi[:, None] * chi - q * eye)) ** 2, axis=(0, 1))

    def solve(omega, q, v):
        return lora_proximal(h, y, omega, v, q, likely)

    return star, zeta, loss, solve


@functools.cache
def finetuning_point(problem: Problem, branch: str):
    """φ with the minimiser held, its gradient, the solution, E ∂_qℓ there and the prediction."""
    found = {entry.branch: entry for entry in solved(problem).branches}[branch]
    at = np.array([getattr(found, name) for name in FINETUNING])
    stage, q0 = problem.finetuning, problem.finetuning.signal
    star, zeta, loss, solve = finetuning_nodes(problem)

    def field(q, m):
        return m / q0 * star + jnp.sqrt(q - m**2 / q0) * zeta

    chi = solve(field(at[0], at[1]), at[0], at[2])

    def potential(values):
        q, m, v, q_hat, m_hat, v_hat = values
        pull = jnp.sum((chi - field(q, m)) ** 2, axis=0) / (2 * v)
        return (
            stage.samples * jnp.mean(pull + loss(chi, q))
            + (q_hat * v + 2 * m_hat * m - v_hat * q) / 2
            - (q0 * m_hat**2 + q_hat) / (2 * (2 * stage.penalty + v_hat))
        )

    slope = float(jax.grad(lambda q: jnp.mean(loss(chi, q)))(at[0]))
    return jax.jit(potential), jax.jit(jax.grad(potential)), at, slope, found


def finetuning_slopes(problem: Problem, branch: str, change=None) -> np.ndarray:
    """The same for φ, with ``change`` applied to (q̂, m̂, v̂)."""
    _, gradient, at, _, _ = finetuning_point(problem, branch)
    values = at.copy()
    if change is not None:
        values[3:] = change(at[3:])
    scale = np.abs([at[5] / 2, at[4], at[3] / 2, at[2] / 2, at[1], at[0] / 2])
    held = scale == 0  # m = m̂ = 0 by symmetry of the law, not of the nodes
    return np.abs(np.asarray(gradient(values)))[~held] / scale[~held]


@pytest.mark.parametrize("branch", ["informed", "uninformed"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_finetuning_potential_is_stationary(problem, branch):
    slopes = finetuning_slopes(problem, branch)
    assert slopes.size == (6 if branch == "informed" else 4)
    assert slopes.max() < 1e-8


@pytest.mark.parametrize("problem", PROBLEMS)
def test_wrong_finetuning_hats_are_seen(problem):
    *_, slope, _ = finetuning_point(problem, "informed")
    centring = 2 * problem.finetuning.samples * slope
    wrong = {
        "factor 2 in q̂": lambda hats: hats * [2, 1, 1],
        "factor 2 in m̂": lambda hats: hats * [1, 2, 1],
        "factor 2 in v̂": lambda hats: hats * [1, 1, 2],
        "dropped ∂_qℓ": lambda hats: hats - [0, 0, centring],
        "sign of the response": lambda hats: [*hats[:2], 2 * centring - hats[2]],
        "one per mille": lambda hats: hats * [1, 1, 1.001],
    }
    for name, change in wrong.items():
        assert finetuning_slopes(problem, "informed", change).max() > 5e-4, name


@pytest.mark.parametrize("branch", ["informed", "uninformed"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_finetuning_potential_is_the_training_loss(problem, branch):
    potential, _, at, _, found = finetuning_point(problem, branch)
    stage = problem.finetuning
    loss = stage.samples * found.train_error + stage.penalty * found.q
    assert found.potential == pytest.approx(float(potential(at)), rel=1e-8)
    if branch == "informed":
        assert loss == pytest.approx(found.potential, rel=1e-8)
    assert stage.penalty * found.q > 1e-3 * loss
