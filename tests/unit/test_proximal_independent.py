"""Proximal operators of softmax attention against mpmath and a search from very many starts.

Two questions per node.  Is the answer a stationary point to rounding, with the right derivative?
mpmath polishes it at 30 digits, at the given center and at centers beside it.  Is it the global
minimum?  Descents from the best of thousands of points, at all scales around the center, say so.
"""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from mpmath import mp, mpf
from scipy import optimize

from lora_theory.theory.fields import field_basis
from lora_theory.theory.proximal import (
    softmax_field_minima,
    softmax_field_proximal,
    softmax_lora_minima,
    softmax_lora_proximal,
)

# -- the operators: (arrays of the nodes, variance) to a Proximal ----------------------------------


def field_operator(labels, label, center, variance):
    found = softmax_field_minima(labels, center, variance, jnp.stack([center, label]))
    return softmax_field_proximal(labels, center, variance, found.point)


def lora_operator(labels, signal, frozen, center, variance):
    norm = jnp.asarray(NORM)
    starts = jnp.stack([center, signal, -signal])
    found = softmax_lora_minima(frozen, labels, center, variance, norm, starts)
    return softmax_lora_proximal(frozen, labels, center, variance, norm, found.point)


NORM = 0.8
VARIANCES = [1e-9, 1e-4, 1e-2, 0.3, 3.0, 1e2, 1e4]


@pytest.fixture(autouse=True)
def _many_digits():
    with mpmath.workdps(30):
        yield


# -- one node ----------------------------------------------------------------------------------


def softmax(fields):
    shifted = np.exp(fields - fields.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


class Node:
    """‖u − ω‖²/(2v) + ‖y − σ(h(u))‖²; h linear in u, or frozen + uuᵀ − qI."""

    def __init__(self, labels, center, variance, frozen=None):
        self.labels, self.center, self.variance = labels, center, variance
        tokens = labels.shape[0]
        self.basis = None if frozen is not None else field_basis(tokens, "softmax")
        self.frozen = None if frozen is None else frozen - NORM * np.eye(tokens)

    def fields(self, u):
        if self.basis is not None:
            return np.tensordot(self.basis, u, 1)
        return self.frozen.reshape(self.frozen.shape + (1,) * (u.ndim - 1)) + u[:, None] * u

    def value(self, u):
        labels, center = (
            a.reshape(a.shape + (1,) * (u.ndim - 1)) for a in (self.labels, self.center)
        )
        pull = ((u - center) ** 2).sum(axis=0) / (2 * self.variance)
        return pull + ((softmax(self.fields(u)) - labels) ** 2).sum(axis=(0, 1))

    def slope(self, u):
        p = softmax(self.fields(u))
        d = p - self.labels
        rows = 2 * p * (d - np.sum(p * d, axis=1, keepdims=True))
        if self.basis is not None:
            loss = np.tensordot(self.basis, rows, ((0, 1), (0, 1)))
        else:
            loss = (rows + rows.T) @ u
        return (u - self.center) / self.variance + loss

    def precise(self, u, center):
        """Loss and slope of the loss from the definition, and the slope of the objective."""
        tokens = range(self.labels.shape[0])
        loss, slope = mpf(0), [mpf(0)] * len(u)
        for a in tokens:
            if self.basis is not None:
                row = [mp.fdot(map(mpf, self.basis[a, b]), u) for b in tokens]
            else:
                row = [mpf(self.frozen[a, b]) + u[a] * u[b] for b in tokens]
            weights = [mp.exp(entry - max(row)) for entry in row]
            p = [weight / mp.fsum(weights) for weight in weights]
            d = [p[b] - mpf(self.labels[a, b]) for b in tokens]
            loss += mp.fdot(d, d)
            for b in tokens:
                by_logit = 2 * mp.fsum(d[e] * p[e] * ((e == b) - p[b]) for e in tokens)
                if self.basis is not None:
                    for i, entry in enumerate(self.basis[a, b]):
                        slope[i] += mpf(entry) * by_logit
                else:
                    slope[a] += by_logit * u[b]
                    slope[b] += by_logit * u[a]
        whole = [(x - w) / mpf(self.variance) + s for x, w, s in zip(u, center, slope, strict=True)]
        return loss, slope, whole

    def polished(self, u, center=None):
        """The stationary point that Newton's method at 30 digits reaches from u."""
        center = list(map(mpf, self.center)) if center is None else center
        return list(
            mp.findroot(
                lambda *u: self.precise(u, center)[2],
                list(map(mpf, u)),
                tol=mpf(10) ** -24,
                maxsteps=50,
            )
        )

    def derivative(self, u) -> np.ndarray:
        """∂u/∂ω by differences at 30 digits."""
        step, columns = mpf(10) ** -11, []
        for k in range(len(u)):
            center = list(map(mpf, self.center))
            center[k] += step
            moved = self.polished(u, center)
            columns.append([float((a - b) / step) for a, b in zip(moved, u, strict=True)])
        return np.array(columns).T

    def lowest(self, starts, rng) -> float:
        """The least value met by descents from ``starts`` and from the best of many points."""
        size, count = self.center.size, 3000
        radius = np.sqrt(2 * self.variance * self.value(self.center)) + 1e-12
        directions = rng.standard_normal((size, count))
        directions /= np.linalg.norm(directions, axis=0)
        lengths = min(radius, 100.0) * 10 ** (-3 * rng.random(count) ** 2)
        points = [self.center[:, None] + directions * lengths]
        for start in starts:
            spread = max(0.5, np.abs(start).max())
            points.append(start[:, None] + spread * rng.standard_normal((size, count // 4)))
        cloud = np.concatenate(points, axis=1)
        chosen = []
        for i in np.argsort(self.value(cloud))[:300]:
            if all(np.linalg.norm(cloud[:, i] - c) > 0.3 * min(radius, 1) for c in chosen):
                chosen.append(cloud[:, i])
            if len(chosen) == 4:
                break
        found = [
            optimize.minimize(self.value, start, jac=self.slope, method="BFGS").fun
            for start in (*starts, *chosen)
        ]
        return min(found)


# -- batches of nodes ------------------------------------------------------------------------------


class Batch:
    """Nodes for one operator; ``arrays`` ends with the center."""

    def __init__(self, operator, arrays, names):
        self.arrays, self.names = [np.stack(column, axis=-1) for column in arrays], names

        def solve(*arguments):
            *others, center, variance = arguments
            answer, push = jax.linearize(lambda c: operator(*others, c, variance), center)
            unit = jnp.broadcast_to(jnp.eye(len(center))[:, :, None], (len(center), *center.shape))
            return answer, jax.vmap(push)(unit).point

        self.solve = jax.jit(solve)

    @functools.cache  # noqa: B019 - few batches, all kept anyway
    def at(self, variance: float):
        """The answer of the package and ∂u_i/∂ω_k in (k, i, nodes)."""
        with jax.enable_x64(True):
            arguments = *map(jnp.asarray, self.arrays), jnp.asarray(variance)
            return jax.tree.map(np.asarray, self.solve(*arguments))

    def node(self, i: int, variance: float) -> Node:
        labels, center = self.arrays[0][..., i], self.arrays[-1][..., i]
        frozen = self.arrays[2][..., i] if len(self.arrays) == 4 else None
        return Node(labels, center, variance, frozen)

    def starts(self, i: int) -> list[np.ndarray]:
        """Center, the logits of the label or ±χ*, and next to the origin."""
        center, other = self.arrays[-1][:, i], self.arrays[1][:, i]
        return [center, other, -other, np.full_like(center, 1e-3)]


@functools.cache
def field_batch(tokens: int) -> Batch:
    """Centers of size 10⁻³ to 30; labels near them, exactly uniform, nearly one-hot, opposite."""
    rng, basis = np.random.default_rng(11), field_basis(tokens, "softmax")
    rows, names = [], []
    for size in (1e-3, 1.0, 5.0, 30.0) if tokens == 2 else (1.0, 30.0):
        center = size * rng.standard_normal(basis.shape[-1])
        near = 0.7 * center + 0.7 * size * rng.standard_normal(center.size)
        logits = {
            "near": near,
            "uniform": np.zeros_like(center),
            "one-hot": 30 * rng.standard_normal(center.size),
            "opposite": -center,
        }
        for name, label in logits.items():
            rows.append((softmax(np.tensordot(basis, label, 1)), label, center))
            names.append((size, name))
    return Batch(field_operator, zip(*rows, strict=True), names)


@functools.cache
def lora_batch(tokens: int) -> Batch:
    """Frozen fields of size 10⁻³ to 30; labels of the task and others; ω or χ* zero."""
    rng, basis = np.random.default_rng(12), field_basis(tokens, "softmax")
    rows, names = [], []
    for size in (1e-3, 1.0, 5.0, 30.0) if tokens == 2 else (1.0, 30.0):
        for name in ("task", "strong", "uniform", "one-hot", "ω = 0", "χ* = 0"):
            frozen, residual = rng.standard_normal((2, basis.shape[-1]))
            frozen = np.tensordot(basis, size * frozen, 1)
            star = (3 if name == "strong" else 1) * rng.standard_normal(tokens)
            center = 0.9 * star + 0.4 * rng.standard_normal(tokens)
            center, star = center * (name != "ω = 0"), star * (name != "χ* = 0")
            logits = frozen + 0.7 * np.tensordot(basis, residual, 1) + np.outer(star, star)
            labels = softmax(logits - np.eye(tokens))
            if name == "uniform":
                labels = np.full_like(labels, 1 / tokens)
            if name == "one-hot":
                labels = softmax(30 * rng.standard_normal(labels.shape))
            rows.append((labels, star, frozen, center))
            names.append((size, name))
    return Batch(lora_operator, zip(*rows, strict=True), names)


def errors(batch: Batch, variance: float, factor: float = 1.0) -> np.ndarray:
    """Of point, force, loss, and the derivative twice; of a variance wrong by ``factor``."""
    answer, slopes = batch.at(variance)
    rows = []
    for i in range(len(batch.names)):
        node = batch.node(i, variance * factor)
        exact = node.polished(answer.point[:, i])
        loss, slope, _ = node.precise(exact, list(map(mpf, node.center)))
        derivative = node.derivative(exact)
        size = 1 + max(map(abs, exact))
        scale = max(1.0, np.abs(derivative).max())
        inverse = np.linalg.inv(answer.hessian[..., i])
        rows.append(
            [
                max(abs(a - mpf(b)) for a, b in zip(exact, answer.point[:, i], strict=True)) / size,
                max(abs(a + mpf(b)) for a, b in zip(slope, answer.force[:, i], strict=True)),
                abs(loss - mpf(answer.loss[i])),
                np.abs(derivative - slopes[..., i].T).max() / scale,
                np.abs(derivative - inverse).max() / scale,
            ]
        )
    return np.array(rows, dtype=float)


def excess(batch: Batch, variance: float) -> np.ndarray:
    """How far the package is above the least value met."""
    answer, _ = batch.at(variance)
    rows = []
    for i in range(len(batch.names)):
        node, point = batch.node(i, variance), answer.point[:, i]
        lowest = node.lowest(batch.starts(i), np.random.default_rng(i))
        rows.append(node.value(point) - lowest)
    return np.array(rows)


BATCHES = [
    pytest.param(field_batch, 2, id="fields, T = 2"),
    pytest.param(field_batch, 3, id="fields, T = 3", marks=pytest.mark.slow),
    pytest.param(lora_batch, 2, id="LoRA, T = 2"),
    pytest.param(lora_batch, 3, id="LoRA, T = 3", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("batch", "tokens"), BATCHES)
def test_answers_are_stationary_to_rounding_with_the_right_derivative(batch, tokens):
    """Reached: point 2·10⁻¹² at v = 10⁴, else 2·10⁻¹⁴; force, loss 5·10⁻¹⁵; derivative 7·10⁻¹¹."""
    nodes = batch(tokens)
    for variance in VARIANCES[::2] if tokens == 2 else VARIANCES[::3]:
        point, *values, derivative, inverse = errors(nodes, variance).max(axis=0)
        assert point < (1e-11 if variance > 1e3 else 1e-13)
        assert max(values) < 3e-14
        assert max(derivative, inverse) < 1e-9
    assert errors(nodes, 0.3, factor=1 + 1e-7)[:, 0].max() > 1e-10


def by_the_model(name: tuple[float, str]) -> bool:
    """Fields up to 5, labels that some teacher makes of them."""
    size, label = name
    return size <= 5 and label in ("near", "opposite", "task", "strong", "ω = 0")


@pytest.mark.parametrize(("batch", "tokens"), BATCHES)
def test_no_start_leads_lower(batch, tokens):
    """Nowhere at v ≤ .3; at larger v not for fields and labels that belong together.

    Beyond that the few starts of the package do miss: at v ≥ 3 labels that no task makes, and at
    v ≥ 100 fields of size 30, up to a third of them.
    """
    nodes = batch(tokens)
    for variance in VARIANCES[:-1]:
        above = excess(nodes, variance)
        checked = [variance < 1 or by_the_model(name) for name in nodes.names]
        assert np.sum(checked) >= 2
        assert above[checked].max() < 1e-12


def test_the_search_finds_what_single_descents_miss():
    """Negative control of the comparison: descents from −ω at a large variance."""
    for nodes in (field_batch(2), lora_batch(2)):
        trapped = 0
        for i in range(len(nodes.names)):
            node = nodes.node(i, 1e2)
            descent = optimize.minimize(node.value, -node.center, jac=node.slope).fun
            trapped += descent > node.lowest(nodes.starts(i), np.random.default_rng(i)) + 1e-6
        assert trapped >= 3
