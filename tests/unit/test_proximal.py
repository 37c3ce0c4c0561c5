"""Proximal operators of both stages against brute force, and their implicit derivatives."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from lora_theory.theory.fields import field_basis
from lora_theory.theory.proximal import (
    Minima,
    Proximal,
    linear_lora_proximal,
    rank_one_part,
    softmax_field_minima,
    softmax_field_proximal,
    softmax_lora_minima,
    softmax_lora_proximal,
    softmax_lora_starts,
)

NODES = 24


def softmax(fields: np.ndarray) -> np.ndarray:
    shifted = np.exp(fields - fields.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


# -- the objectives, written for one node; in NumPy points may have trailing axes ------------------


def field_loss(u, basis, labels):
    if isinstance(u, jax.Array):
        return jnp.sum((jax.nn.softmax(basis @ u, axis=1) - labels) ** 2)
    labels = labels.reshape(labels.shape + (1,) * (u.ndim - 1))
    return np.sum((softmax(np.tensordot(basis, u, 1)) - labels) ** 2, axis=(0, 1))


def lora_loss(chi, frozen, labels, norm):
    centred = frozen - norm * np.eye(chi.shape[0])
    if isinstance(chi, jax.Array):
        return jnp.sum((jax.nn.softmax(centred + jnp.outer(chi, chi), axis=1) - labels) ** 2)
    centred, labels = (a.reshape(a.shape + (1,) * (chi.ndim - 1)) for a in (centred, labels))
    return np.sum((softmax(centred + chi[:, None] * chi[None]) - labels) ** 2, axis=(0, 1))


def linear_loss(chi, levels):
    if isinstance(chi, jax.Array):
        return jnp.sum((jnp.diag(levels) - jnp.outer(chi, chi)) ** 2) / levels.size**2
    target = np.diag(levels).reshape((levels.size,) * 2 + (1,) * (chi.ndim - 1))
    return np.sum((target - chi[:, None] * chi[None]) ** 2, axis=(0, 1)) / levels.size**2


# -- one batch of nodes per kind of operator -------------------------------------------------------


class Case(NamedTuple):
    """Arguments of the operator on all nodes, likely starts, and the loss of node i."""

    arguments: tuple
    likely: np.ndarray | None
    center: np.ndarray
    variance: float
    loss: Callable[[int], Callable]


def field_case(Q: float, variance: float, tokens: int = 2, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    basis = field_basis(tokens, "softmax")
    label = np.sqrt(1.75) * rng.standard_normal((basis.shape[-1], NODES))
    center = np.sqrt(Q) * (0.7 * label / np.sqrt(1.75) + 0.71 * rng.standard_normal(label.shape))
    labels = softmax(np.tensordot(basis, label, 1))
    return Case(
        (labels, center, variance),
        np.stack([center, label]),
        center,
        variance,
        lambda i: lambda u: field_loss(u, basis, labels[..., i]),
    )


def lora_case(
    variance: float, signal: float = 1.0, overlap: float = 0.9, tokens: int = 2, seed: int = 0
) -> Case:
    """Fields with a quarter of the label's variance unexplained, as after a good pre-training."""
    rng = np.random.default_rng(seed)
    basis, norm = field_basis(tokens, "softmax"), 0.8 * signal
    frozen, residual = (rng.standard_normal((basis.shape[-1], NODES)) for _ in range(2))
    residual = 0.7 * np.tensordot(basis, residual, 1)
    star, noise = np.sqrt(signal) * rng.standard_normal((2, tokens, NODES))
    center = np.sqrt(0.8) * (overlap * star + np.sqrt(1 - overlap**2) * noise)
    frozen = np.tensordot(basis, frozen, 1)
    lift = star[:, None] * star - signal * np.eye(tokens)[:, :, None]
    labels = softmax(frozen + residual + lift)
    with jax.enable_x64(True):
        guess = rank_one_part(jnp.asarray(residual + star[:, None] * star))
    return Case(
        (frozen, labels, center, variance, norm),
        np.stack([star, guess]),
        center,
        variance,
        lambda i: lambda chi: lora_loss(chi, frozen[..., i], labels[..., i], norm),
    )


def linear_case(variance: float, tokens: int = 2, scale: float = 1.0, seed: int = 0) -> Case:
    """Levels of any sign; ``scale`` is that of ω."""
    rng = np.random.default_rng(seed)
    levels = np.sort(1.2 * rng.standard_normal((tokens, NODES)), axis=0)
    center = scale * rng.standard_normal((tokens, NODES))
    return Case(
        (levels, center, variance),
        None,
        center,
        variance,
        lambda i: lambda chi: linear_loss(chi, levels[:, i]),
    )


def lora_minima(frozen, labels, center, variance, norm, likely) -> Minima:
    """From the starts of the search in the solver."""
    arguments = frozen, labels, center, variance, norm
    return softmax_lora_minima(*arguments, softmax_lora_starts(*arguments, likely))


_minima = {field_case: jax.jit(softmax_field_minima), lora_case: jax.jit(lora_minima)}
_operators = {
    field_case: softmax_field_proximal,
    lora_case: softmax_lora_proximal,
    linear_case: linear_lora_proximal,
}
_compiled = {kind: jax.jit(operator) for kind, operator in _operators.items()}


def search(kind, case: Case) -> Minima:
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, _minima[kind](*case.arguments, case.likely))


def solve(kind, case: Case) -> Proximal:
    with jax.enable_x64(True):
        minimum = (search(kind, case).point,) if kind in _minima else ()
        return jax.tree.map(np.asarray, _compiled[kind](*case.arguments, *minimum))


def objective(case: Case, i: int) -> Callable[[np.ndarray], np.ndarray]:
    """‖u − ω‖²/(2v) + ℓ(u) of node i."""
    loss, center = case.loss(i), case.center[:, i]

    def value(u):
        offset = u - center.reshape(center.shape + (1,) * (u.ndim - 1))
        return (offset**2).sum(0) / (2 * case.variance) + loss(u)

    return value


def brute_force(case: Case, i: int, spacing: float) -> np.ndarray:
    """The global minimum in the plane: within √(2vℓ(ω)) of ω, as ℓ ≥ 0.

    Every local minimum of a grid there is refined on ever smaller grids around it.
    """
    value, center = objective(case, i), case.center[:, i]
    radius = 1.01 * np.sqrt(2 * case.variance * float(case.loss(i)(center))) + 1e-9
    count = 2 * int(np.ceil(min(radius / spacing, 200))) + 9
    axis = np.linspace(-radius, radius, count)
    grid = center[:, None] + np.stack(np.meshgrid(axis, axis, indexing="ij")).reshape(2, -1)
    padded = np.pad(value(grid).reshape(count, count), 1, constant_values=np.inf)
    around = [np.roll(padded, shift, (0, 1)) for shift in ((0, 1), (0, -1), (1, 0), (-1, 0))]
    lowest = np.all([padded <= other for other in around], axis=0)[1:-1, 1:-1]
    stencil = np.stack(np.meshgrid(*[np.linspace(-1, 1, 9)] * 2)).reshape(2, -1)
    best = center
    for point in grid[:, lowest.ravel()].T:
        width = axis[1] - axis[0]
        while width > 1e-9:
            trial = point[:, None] + width * stencil
            new = trial[:, np.argmin(value(trial))]
            inside = np.max(np.abs(new - point)) < 0.9 * width
            point, width = new, width * (0.4 if inside else 1.0)
        if value(point) < value(best):
            best = point
    return best


def excess(kind, case: Case, spacing: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """How far the operator's value is above the least one, and its distance from that point."""
    prox = solve(kind, case)
    cost, distance = np.zeros(NODES), np.zeros(NODES)
    for i in range(NODES):
        value, best = objective(case, i), brute_force(case, i, spacing)
        cost[i] = value(prox.point[:, i]) - value(best)
        distance[i] = np.abs(prox.point[:, i] - best).max()
    return cost, distance


VARIANCES = [0.05, 0.3, 1.0, 5.0, 30.0]


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("Q", [0.5, 1.5, 3.0])
def test_field_proximal_is_the_global_minimum(Q, variance):
    cost, distance = excess(field_case, field_case(Q, variance))
    assert np.all(np.abs(cost) < 1e-12)
    assert np.all(distance < 3e-7)


@pytest.mark.parametrize("variance", VARIANCES[:2])
@pytest.mark.parametrize(("signal", "overlap"), [(1.0, 0.9), (1.0, 0.0), (3.0, 0.7)])
def test_lora_proximal_is_the_global_minimum(signal, overlap, variance):
    cost, distance = excess(lora_case, lora_case(variance, signal, overlap))
    assert np.all(np.abs(cost) < 1e-12)
    assert np.all(distance < 3e-7)


@pytest.mark.parametrize("variance", VARIANCES[2:])
@pytest.mark.parametrize(("signal", "overlap"), [(1.0, 0.9), (1.0, 0.0), (3.0, 0.7)])
def test_lora_proximal_seldom_misses_where_minima_abound(signal, overlap, variance):
    """From five starts a few nodes end in another minimum once v is large, never on average."""
    cost, distance = excess(lora_case, lora_case(variance, signal, overlap), spacing=0.05)
    assert np.all(cost > -1e-12)
    assert np.mean(cost > 1e-9) < 0.1
    assert np.all(distance[cost < 1e-9] < 3e-7)


def test_descents_from_the_wrong_side_would_be_caught():
    """Negative control of the comparison: local minima from −ω, not from the likely starts."""
    case = lora_case(30.0)
    missed = 0
    for i in range(NODES):
        value, best = objective(case, i), brute_force(case, i, 0.1)
        missed += optimize.minimize(value, -case.center[:, i]).fun > value(best) + 1e-6
    assert missed > 0.3 * NODES


@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("variance", [*VARIANCES, 1000.0])
def test_linear_proximal_is_the_global_minimum(variance, scale):
    cost, distance = excess(linear_case, linear_case(variance, scale=scale))
    assert np.all(np.abs(cost) < 1e-11)
    assert np.all(distance < 1e-6)


@pytest.mark.parametrize("variance", [0.3, 5.0])
def test_linear_proximal_beats_many_descents_in_four_dimensions(variance):
    case, rng = linear_case(variance, tokens=4), np.random.default_rng(3)
    point, several = solve(linear_case, case).point, 0
    for i in range(8):
        value = objective(case, i)
        starts = case.center[:, i] + 1.5 * rng.standard_normal((12, 4))
        found = [optimize.minimize(value, start, tol=1e-10) for start in starts]
        values = np.array([result.fun for result in found])
        lowest = found[int(np.argmin(values))]
        assert value(point[:, i]) == pytest.approx(lowest.fun, abs=1e-9)
        np.testing.assert_allclose(point[:, i], lowest.x, atol=1e-4)
        several += np.ptp(values) > 1e-3
    assert several > 0 or variance < 1, "no node with two minima: the test shows nothing"


@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e-12])
def test_linear_proximal_near_the_origin(scale):
    """ω → 0: length² = level − T²/4v along the top eigenvector, on ω's side, if that is > 0."""
    tokens, variance = 3, 2.0
    case = linear_case(variance, tokens, scale)
    levels, omega, _ = case.arguments
    prox = solve(linear_case, case)
    excess_level = levels[-1] - tokens**2 / (4 * variance)
    above, below = excess_level > 0.05, excess_level < -0.05
    assert above.sum() > 3
    assert below.sum() > 3
    expected = np.sign(omega[-1]) * np.sqrt(np.maximum(excess_level, 0))
    np.testing.assert_allclose(prox.point[-1, above], expected[above], rtol=30 * scale**0.5 + 1e-9)
    assert np.all(np.abs(prox.point[:-1, above]) < 1e3 * scale)
    linear = omega / (1 - 4 * variance / tokens**2 * levels)
    np.testing.assert_allclose(prox.point[:, below], linear[:, below], rtol=1e4 * scale**2 + 1e-9)


CASES = [
    pytest.param(field_case, field_case(1.5, 1.0), id="field"),
    pytest.param(field_case, field_case(10.0, 30.0), id="field, large V"),
    pytest.param(lora_case, lora_case(0.6), id="lora"),
    pytest.param(lora_case, lora_case(5.0), id="lora, large v"),
    pytest.param(linear_case, linear_case(0.5), id="linear"),
    pytest.param(linear_case, linear_case(20.0), id="linear, large v"),
]


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_fields_of_the_answer_are_consistent(kind, case):
    prox = solve(kind, case)
    assert {entry.dtype for entry in prox} == {np.dtype(np.float64)}
    np.testing.assert_allclose(
        prox.force, (prox.point - case.center) / case.variance, rtol=1e-9, atol=1e-10
    )
    with jax.enable_x64(True):
        for i in range(0, NODES, 3):
            loss, point = case.loss(i), jnp.asarray(prox.point[:, i])
            gradient, hessian = (
                np.asarray(jax.grad(loss)(point)),
                np.asarray(jax.hessian(loss)(point)),
            )
            assert prox.loss[i] == pytest.approx(float(loss(point)), rel=1e-10, abs=1e-14)
            residual = (prox.point[:, i] - case.center[:, i]) / case.variance + gradient
            assert np.abs(residual).max() < 1e-10
            expected = np.eye(len(hessian)) + case.variance * hessian
            np.testing.assert_allclose(prox.hessian[..., i], expected, rtol=1e-6, atol=1e-7)
            assert np.linalg.eigvalsh(expected)[0] > 0


@pytest.mark.parametrize(("kind", "case"), CASES[:4])
def test_rivals_cost_what_the_gap_says(kind, case):
    prox = search(kind, case)
    rivals = np.isfinite(prox.gap)
    assert np.all(prox.gap >= 0)
    assert np.any(rivals) or case.variance <= 1
    np.testing.assert_array_equal(prox.rival[:, ~rivals], prox.point[:, ~rivals])
    for i in np.flatnonzero(rivals):
        value = objective(case, i)
        difference = value(prox.rival[:, i]) - value(prox.point[:, i])
        assert difference == pytest.approx(prox.gap[i], rel=1e-4, abs=1e-6)
        assert np.abs(prox.rival[:, i] - prox.point[:, i]).max() > 1e-3


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_implicit_derivatives_are_differences(kind, case):
    """Along one random direction in all arguments, at the nodes far from a jump."""
    rng = np.random.default_rng(4)
    direction = [0.3 * rng.standard_normal(np.shape(a)) for a in case.arguments]
    if kind is linear_case:
        direction[0] = np.sort(direction[0], axis=0)
    step = 1e-5 * case.variance / (1 + case.variance)

    def moved(sign: int) -> Proximal:
        changed = [a + sign * step * d for a, d in zip(case.arguments, direction, strict=True)]
        return solve(kind, case._replace(arguments=tuple(changed)))

    ahead, behind = moved(1), moved(-1)
    arguments, tangents = list(case.arguments), list(direction)
    safe = np.abs(ahead.point - behind.point).max(0) < 0.1
    if kind in _minima:
        found = search(kind, case)
        safe &= found.gap > 0.05
        # the minimum is a start: how it would move must not matter
        arguments.append(found.point)
        tangents.append(rng.standard_normal(found.point.shape))
    slope = slopes(kind, arguments, tangents)
    assert safe.sum() > NODES / 2
    for name in ("point", "force", "loss"):
        difference = (getattr(ahead, name) - getattr(behind, name)) / (2 * step)
        exact = np.asarray(getattr(slope, name))
        scale = np.abs(exact[..., safe]).max()
        np.testing.assert_allclose(
            exact[..., safe], difference[..., safe], rtol=1e-5, atol=1e-5 * scale, err_msg=name
        )


_slopes = {
    kind: jax.jit(lambda a, t, f=operator: jax.jvp(f, a, t)[1])
    for kind, operator in _operators.items()
}


def slopes(kind, arguments: list, tangents: list) -> Proximal:
    """Derivatives of the operator along ``tangents``."""
    with jax.enable_x64(True):
        both = (tuple(jnp.asarray(x, dtype=float) for x in part) for part in (arguments, tangents))
        return jax.tree.map(np.asarray, _slopes[kind](*both))


def test_the_derivative_in_the_center_is_the_inverse_hessian():
    case = lora_case(0.6)
    inverse = np.linalg.inv(np.moveaxis(solve(lora_case, case).hessian, -1, 0))
    arguments = [*case.arguments, search(lora_case, case).point]
    for k in range(2):
        tangents = [np.zeros(np.shape(a)) for a in arguments]
        tangents[2][k] = 1.0
        column = slopes(lora_case, arguments, tangents).point
        np.testing.assert_allclose(column, inverse[:, :, k].T, rtol=1e-6, atol=1e-8)
