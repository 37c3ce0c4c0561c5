"""μ_δ = law(S0) ⊞ semicircle(δ²) and its tail integrals against quadrature and sampled matrices."""

from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_theory.laws import Wishart
from lora_theory.theory.regularizers import WeightDecay
from lora_theory.theory.spectrum import learned_rank, stieltjes, truncated_second_moment
from lora_theory.theory.weights import Constants, weight_side

TEACHER_RANKS = [0.2, 0.5, 1.0, 3.0, 5.0]
DELTAS = [0.01, 0.05, 0.3, 1.0, 4.0, 20.0]


def transform(x: np.ndarray, delta: float, teacher_rank: float) -> np.ndarray:
    """G(x + i0) inside the support: least imaginary part among companion eigenvalues."""
    c = teacher_rank**-0.5
    cubic = [c * delta**2, -(c * x + delta**2), x + c - 1 / c, -1.0]
    companion = np.zeros((x.size, 3, 3))
    companion[:, 1, 0] = companion[:, 2, 1] = 1
    for column in range(3):
        companion[:, 0, column] = -cubic[column + 1] / cubic[0]
    roots = np.linalg.eigvals(companion)
    return np.take_along_axis(roots, np.argmin(roots.imag, axis=1)[:, None], axis=1)[:, 0]


def edges(delta: float, teacher_rank: float) -> np.ndarray:
    """Ends of the bulks: x(g) at the real zeros of x'(g)."""
    c = teacher_rank**-0.5
    pole = np.array([c**2, -2 * c, 1])  # (1 − cg)²
    g = np.roots(np.polysub(np.polyadd(np.polymul([delta**2, 0, 0], pole), [1, 0, 0]), pole))
    g = g[np.abs(g.imag) < 1e-9 * np.abs(g)].real
    return np.sort(1 / g + 1 / (c * (1 - c * g)) + delta**2 * g)


class Tail(NamedTuple):
    J: float
    by_delta: float
    by_epsilon: float
    rank: float


POINTS, WEIGHTS = np.polynomial.legendre.leggauss(600)


def tail_by_quadrature(delta: float, epsilon: float, teacher_rank: float) -> Tail:
    """The integrals over each bulk beyond ε; square-root edges are smooth in the angle."""
    angle, weight = (POINTS + 1) * np.pi / 2, WEIGHTS * np.pi / 2
    ends, total = edges(delta, teacher_rank), np.zeros(4)
    for bottom, top in pairwise(ends):
        if top <= epsilon:
            continue
        half, middle = (top - max(bottom, epsilon)) / 2, (top + max(bottom, epsilon)) / 2
        x = middle - half * np.cos(angle)
        G = transform(x, delta, teacher_rank)
        mass = weight * half * np.sin(angle) * -G.imag / np.pi
        above = x - epsilon
        for i, integrand in enumerate((above**2, 4 * delta * above * G.real, -2 * above, 1)):
            total[i] += np.sum(mass * integrand)
    return Tail(*total)


def thresholds(delta: float, teacher_rank: float) -> np.ndarray:
    """ε below the support, inside every bulk and every gap, next to the edges and above them."""
    ends = edges(delta, teacher_rank)
    inside = (ends[:-1, None] + np.diff(ends)[:, None] * np.array([0.1, 0.5, 0.9])).ravel()
    beside = np.concatenate([ends - 1e-3 * delta, ends + 1e-3 * delta])
    far = [ends[0] - 3.0, ends[0] - 0.1 * delta, ends[-1] + 0.1 * delta, ends[-1] + 3.0]
    return np.concatenate([inside, beside, far])


@jax.jit
def _tails(delta, epsilon, teacher_rank):
    slopes = jax.value_and_grad(truncated_second_moment, argnums=(0, 1))
    J, (by_delta, by_epsilon) = jax.vmap(slopes)(delta, epsilon, teacher_rank)
    return J, by_delta, by_epsilon, jax.vmap(learned_rank)(delta, epsilon, teacher_rank)


_transforms = jax.jit(jax.vmap(stieltjes))
_curvatures = jax.jit(jax.vmap(jax.hessian(truncated_second_moment, argnums=(0, 1))))
_weight_side = jax.jit(weight_side)


def broadcast(function, *arguments) -> np.ndarray:
    """``function`` of the package on broadcast arguments, in 64 bits; outputs stacked first."""
    with jax.enable_x64(True):
        flat = (np.ravel(a) for a in np.broadcast_arrays(*map(np.float64, arguments)))
        return np.array(function(*map(jnp.asarray, flat)))


def worst_error(delta: float, teacher_rank: float) -> float:
    """Of J, ∂_δJ, ∂_εJ and the rank over all thresholds, relative to their largest values."""
    epsilon = thresholds(delta, teacher_rank)
    computed = broadcast(_tails, delta, epsilon, teacher_rank)
    expected = np.array([tail_by_quadrature(delta, e, teacher_rank) for e in epsilon]).T
    assert np.ptp(expected[3]) > 0.99
    whole = np.abs(tail_by_quadrature(delta, epsilon.min(), teacher_rank))
    return float(np.max(np.abs(computed - expected) / whole[:, None]))


@pytest.mark.parametrize("teacher_rank", TEACHER_RANKS)
@pytest.mark.parametrize("delta", DELTAS)
def test_tail_integrals_are_those_of_the_density(delta, teacher_rank):
    assert worst_error(delta, teacher_rank) < 1e-11


@pytest.mark.parametrize("teacher_rank", [0.01, 0.2, 0.5, 5.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-4, 1e-6])
def test_tail_integrals_at_little_noise(delta, teacher_rank):
    """One root of the cubic is of order 1/δ²: the others must not drown in it."""
    assert worst_error(delta, teacher_rank) < 1e-8


def test_quadrature_itself_has_unit_mass_and_shows_the_gap():
    assert edges(0.01, 0.2).size == 4
    assert edges(1.0, 0.2).size == 2
    for teacher_rank in TEACHER_RANKS:
        for delta in DELTAS:
            whole = tail_by_quadrature(delta, -100.0, teacher_rank)
            assert whole.rank == pytest.approx(1, abs=1e-11)
    # The gap splits the mass as the rank of S0 does, and the control κ0 = .21 does not.
    assert tail_by_quadrature(0.01, 0.3, 0.2).rank == pytest.approx(0.2, abs=1e-11)
    assert tail_by_quadrature(0.01, 0.3, 0.21).rank > 0.205


@pytest.mark.parametrize("teacher_rank", TEACHER_RANKS)
@pytest.mark.parametrize("delta", DELTAS)
def test_below_the_support_the_moments_are_exact(delta, teacher_rank):
    epsilon = -60.0
    mean, second = np.sqrt(teacher_rank), 1 + teacher_rank + delta**2
    expected = [
        second - 2 * mean * epsilon + epsilon**2,
        2 * delta,
        -2 * (mean - epsilon),
        1,
    ]
    computed = broadcast(_tails, delta, epsilon, teacher_rank)[:, 0]
    np.testing.assert_allclose(computed, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("teacher_rank", TEACHER_RANKS)
@pytest.mark.parametrize("delta", DELTAS)
def test_transform_solves_the_cubic_and_pastur_s_equation(delta, teacher_rank):
    ends = edges(delta, teacher_rank)
    x = np.linspace(ends[0] - 1, ends[-1] + 1, 501)
    real, density = broadcast(_transforms, x, delta, teacher_rank)
    G, c = real - 1j * np.pi * density, teacher_rank**-0.5
    terms = [c * delta**2 * G**3, -(c * x + delta**2) * G**2, (x + c - 1 / c) * G, -1 + 0 * G]
    assert np.all(np.abs(sum(terms)) < 1e-12 * np.sum(np.abs(terms), axis=0))
    inside = np.any([(x > a) & (x < b) for a, b in zip(ends[::2], ends[1::2], strict=True)], axis=0)
    np.testing.assert_array_equal(density > 0, inside)
    # G = G_MP(x − δ²G), with the Marchenko–Pastur transform in closed form: another equation.
    w = x - delta**2 * G
    bottom, top = ((1 - s * np.sqrt(teacher_rank)) ** 2 / np.sqrt(teacher_rank) for s in (1, -1))
    root = np.sqrt(w - bottom) * np.sqrt(w - top)
    marchenko_pastur = (w + (1 - teacher_rank) * c - root) / (2 * c * w)
    np.testing.assert_allclose(marchenko_pastur[inside], G[inside], rtol=1e-9)
    wrong = (w + (1 - teacher_rank) * c + root) / (2 * c * w)
    assert np.median(np.abs(wrong / G - 1)[inside]) > 1e-3


@pytest.mark.parametrize("delta", [0.05, 0.3, 4.0])
@pytest.mark.parametrize("teacher_rank", [0.2, 1.0, 5.0])
def test_outside_the_support_the_transform_is_an_integral(delta, teacher_rank):
    angle, weight = (POINTS + 1) * np.pi / 2, WEIGHTS * np.pi / 2
    ends = edges(delta, teacher_rank)
    gaps = (ends[1:-1:2] + ends[2:-1:2]) / 2
    outside = np.concatenate([[ends[0] - 0.5 * delta], gaps, [ends[-1] + 0.5 * delta]])
    expected = np.zeros_like(outside)
    for bottom, top in zip(ends[::2], ends[1::2], strict=True):
        x = (top + bottom) / 2 - (top - bottom) / 2 * np.cos(angle)
        density = -transform(x, delta, teacher_rank).imag / np.pi
        mass = weight * (top - bottom) / 2 * np.sin(angle) * density
        expected += np.sum(mass / (outside[:, None] - x), axis=1)
    real, density = broadcast(_transforms, outside, delta, teacher_rank)
    np.testing.assert_allclose(real, expected, rtol=1e-9)
    np.testing.assert_array_equal(density, 0.0)


@pytest.mark.parametrize(("delta", "teacher_rank"), [(0.05, 0.2), (0.5, 0.5), (1.0, 3.0)])
def test_counts_of_sampled_eigenvalues(delta, teacher_rank):
    dim = 800
    levels = np.linalg.eigvalsh(sample(dim, delta, teacher_rank, np.random.default_rng(1))[1])
    x = np.linspace(levels[0] - 0.1, levels[-1] + 0.1, 400)
    counted = np.mean(levels[:, None] > x, axis=0)

    def distance(delta: float, teacher_rank: float) -> float:
        predicted = broadcast(_tails, delta, x, teacher_rank)[3]
        return float(np.abs(predicted - counted).max())

    assert distance(delta, teacher_rank) < 4 / dim
    assert distance(1.1 * delta, teacher_rank) > 4 / dim
    assert distance(delta, 1.05 * teacher_rank) > 4 / dim


def sample(dim, delta, teacher_rank, rng) -> tuple[np.ndarray, np.ndarray]:
    """S0 and S0 + δZ."""
    W0 = rng.standard_normal((dim, round(teacher_rank * dim)))
    S0 = W0 @ W0.T / np.sqrt(W0.shape[1] * dim)
    A = rng.standard_normal((dim, dim))
    return S0, S0 + delta * (A + A.T) / np.sqrt(2 * dim)


def test_weight_side_is_the_thresholded_noisy_teacher():
    """Q, M and V of Ŝ = (Y − 2λ̃)₊/V̂ by sampling, O(1/D) offsets within the tolerance."""
    Q_hat, M_hat, V_hat, penalty, teacher_rank, dim = 0.5, 1.4, 0.8, 0.35, 0.5, 500
    rng, rows = np.random.default_rng(2), []
    for _ in range(6):
        S0, Y = sample(dim, np.sqrt(Q_hat) / M_hat, teacher_rank, rng)
        levels, vectors = np.linalg.eigh(M_hat * Y)
        kept = np.maximum(levels - 2 * penalty, 0)
        gap = levels[:, None] - levels + np.eye(dim)
        slopes = (kept[:, None] - kept) / gap + np.diag((kept > 0) * 1.0)
        S = (vectors * kept) @ vectors.T / V_hat
        rows.append([np.sum(S**2) / dim, np.sum(S * S0) / dim, slopes.mean() / V_hat])
    measured, error = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) / np.sqrt(len(rows))
    with jax.enable_x64(True):
        constants = Constants(1.0, 1.5, Wishart(teacher_rank), 1.0, WeightDecay(penalty))
        predicted = np.array(_weight_side(*map(jnp.float64, (Q_hat, M_hat, V_hat)), constants))
    bound = 4 * error + 3 / dim
    assert np.all(np.abs(predicted - measured) < bound)
    # Controls: M without its threshold term, V with δ for δ².
    delta, epsilon = np.sqrt(Q_hat) / M_hat, 2 * penalty / M_hat
    J, by_delta, by_epsilon, _ = broadcast(_tails, delta, epsilon, teacher_rank)[:, 0]
    whole = M_hat / V_hat * (J - delta / 2 * by_delta - epsilon / 2 * by_epsilon)
    assert whole == pytest.approx(predicted[1], rel=1e-12)
    assert abs(predicted[1] + M_hat / V_hat * epsilon / 2 * by_epsilon - measured[1]) > bound[1]
    assert abs(by_delta / (2 * V_hat) - measured[2]) > bound[2]


@pytest.mark.parametrize(
    ("delta", "epsilon", "teacher_rank"),
    [(0.3, 0.5, 0.5), (0.05, 0.3, 0.2), (1.0, 0.0, 1.0), (4.0, 6.0, 3.0), (0.02, 1.5, 0.5)],
)
def test_second_derivatives_are_differences_of_first_ones(delta, epsilon, teacher_rank):
    point, step = np.array([delta, epsilon]), 1e-5 * delta
    differences = []
    for direction in np.eye(2):
        ahead, behind = (
            broadcast(_tails, *(point + sign * step * direction), teacher_rank)[1:3, 0]
            for sign in (1, -1)
        )
        differences.append((ahead - behind) / (2 * step))
    with jax.enable_x64(True):
        arguments = [jnp.asarray([value]) for value in (delta, epsilon, teacher_rank)]
        exact = np.array(_curvatures(*arguments))[:, :, 0]
    np.testing.assert_allclose(exact, np.array(differences), rtol=1e-6, atol=1e-8)
    assert exact[0, 1] == pytest.approx(exact[1, 0], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("delta", "teacher_rank"), [(0.3, 0.5), (0.05, 0.2), (1.0, 3.0)])
def test_powers_at_the_top_edge(delta, teacher_rank):
    top = edges(delta, teacher_rank)[-1]
    below = delta * np.array([4e-2, 1e-2])  # nearer, J is lost in rounding
    density = broadcast(_transforms, top - below, delta, teacher_rank)[1]
    J, by_delta, by_epsilon, rank = broadcast(_tails, delta, top - below, teacher_rank)
    powers = {0.5: density, 3.5: J, 2.5: by_epsilon, 1.5: rank}
    for power, values in powers.items():
        assert np.log(values[0] / values[1]) / np.log(4) == pytest.approx(power, abs=0.02)
    assert by_delta[0] > by_delta[1] > 0
    above = broadcast(_tails, delta, top + delta * np.array([1e-6, 1e-3, 1.0, 1e3]), teacher_rank)
    np.testing.assert_array_equal(above, 0.0)


def test_nothing_is_lost_next_to_an_edge():
    for delta, teacher_rank in [(0.3, 0.5), (0.05, 0.2), (1.0, 1.0), (20.0, 5.0)]:
        ends = edges(delta, teacher_rank)
        offsets = delta * np.concatenate([[-(10.0**-k), 10.0**-k] for k in range(4, 15)])
        x = (ends[:, None] + offsets).ravel()
        values = broadcast(_tails, delta, x, teacher_rank)
        assert np.all(np.isfinite(values))
        center = np.repeat(broadcast(_tails, delta, ends, teacher_rank), offsets.size, axis=1)
        slope = np.abs(center[2]).max() + 1
        # J, ∂J and the rank are continuous: the rank changes as (distance)^{3/2} at most.
        assert np.all(np.abs(values - center) < 10 * slope * np.tile(np.abs(offsets), ends.size))
