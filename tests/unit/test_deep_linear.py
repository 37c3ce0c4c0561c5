"""Deep linear networks: each inequality on random cases and attained; exact rates; refusals."""

import itertools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from lora_theory import ProblemError
from lora_theory.lowrank import merged, precondition, refreshed
from lora_theory.lowrank.deep_linear import (
    asymptotic_factor,
    envelope,
    minimum_loss,
    product_rate,
    rates,
    tangent_kernel,
    train,
)

PYRAMID, SQUARE, BULGE = (5, 7, 4, 3), (4, 4, 4), (3, 4, 6, 5, 2)


def multiplied(layers, X):
    for W in layers:
        X = W @ X
    return X


@dataclass
class Case:
    """Layers, inputs and targets, with gradients written out by hand."""

    layers: list
    X: np.ndarray
    Y: np.ndarray

    @classmethod
    def random(cls, widths, seed, samples=9, rank=None):
        rng = np.random.default_rng(seed)
        shapes = zip(widths[1:], widths[:-1], strict=True)
        layers = [rng.standard_normal(shape) / math.sqrt(shape[1]) for shape in shapes]
        X = rng.standard_normal((widths[0], samples))
        if rank is not None:
            X = rng.standard_normal((widths[0], rank)) @ X[:rank]
        return cls(layers, X, rng.standard_normal((widths[-1], samples)))

    @property
    def residual(self):
        return multiplied(self.layers, self.X) - self.Y

    @property
    def excess(self):
        return np.sum(self.residual**2) / 2 - minimum_loss(self.X, self.Y)

    @property
    def gradients(self):
        places = range(len(self.layers))
        after = [multiplied(self.layers[i + 1 :], np.eye(len(self.layers[i]))) for i in places]
        before = [multiplied(self.layers[:i], self.X) for i in places]
        return [A.T @ self.residual @ B.T for A, B in zip(after, before, strict=True)]

    @property
    def squared_gradient(self):
        return sum(np.sum(G**2) for G in self.gradients)

    def stepped(self, rate):
        moved = [W - rate * G for W, G in zip(self.layers, self.gradients, strict=True)]
        return Case(moved, self.X, self.Y)


# -- the minimum and the inequality of the gradient --------------------------------------------


@pytest.mark.parametrize("rank", [None, 2])
def test_the_minimum_is_that_of_least_squares(rank):
    case = Case.random(PYRAMID, 0, rank=rank)
    best = np.linalg.lstsq(case.X.T, case.Y.T)[0].T
    expected = np.sum((best @ case.X - case.Y) ** 2) / 2
    assert expected > 1
    assert minimum_loss(case.X, case.Y) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("widths", [PYRAMID, SQUARE, BULGE])
@pytest.mark.parametrize("rank", [None, 2])
def test_the_gradient_is_never_below_its_bounds(widths, rank):
    for seed in range(40):
        case = Case.random(widths, seed, rank=rank)
        found = rates(case.layers, case.X)
        assert 0 <= found.product <= found.layerwise * (1 + 1e-9)
        assert found.layerwise <= found.smallest * (1 + 1e-9) + 1e-12
        assert case.squared_gradient >= 2 * found.smallest * case.excess * (1 - 1e-9)
        assert case.squared_gradient <= 2 * found.largest * case.excess * (1 + 1e-9)


def test_the_smallest_eigenvalue_is_attained_by_a_residual():
    case = Case.random(PYRAMID, 1)
    Vt = np.linalg.svd(case.X, full_matrices=False)[2]
    values, vectors = np.linalg.eigh(tangent_kernel(case.layers, case.X))
    for value, vector in zip(values, vectors.T, strict=True):
        direction = vector.reshape(3, 5) @ Vt
        reached = Case(case.layers, case.X, multiplied(case.layers, case.X) - direction)
        assert reached.squared_gradient == pytest.approx(2 * value * reached.excess, rel=1e-9)
    assert rates(case.layers, case.X).smallest == pytest.approx(values[0])


def test_the_product_is_attained_and_no_larger_factor_holds():
    """First layer zero: its gradient is alone; square diagonal layers: all L terms count."""
    small, other = (0.3, 0.5, 0.7), (1.1, 1.3, 1.7)
    diagonal = [np.diag(pair) for pair in zip(small, other, strict=True)]
    X = np.diag([0.6, 1.9])
    down = np.array([[1.0, 0], [0, 0]])
    pyramid = [np.zeros((2, 2)), *diagonal[1:]]
    wide = [np.zeros((2, 3)), *diagonal[1:]]
    inputs = np.vstack([X, np.zeros((1, 2))])
    for layers, data, widths, lowest in [
        (wide, inputs, (3, 2, 2, 2), (0, *small[1:])),
        (pyramid, X, (2, 2, 2, 2), (0, *small[1:])),
        (diagonal, X, (2, 2, 2, 2), small),
    ]:
        case = Case(layers, data, multiplied(layers, data) - down)
        bound = product_rate(lowest, widths, 0.6)
        assert bound == pytest.approx(rates(layers, data).product)
        assert case.squared_gradient == pytest.approx(2 * bound * case.excess, rel=1e-12)
        # controls: one layer's factor left out, or X taken as white
        for wrong in (bound / small[1] ** 2, bound / 0.6**2):
            assert case.squared_gradient < 0.5 * 2 * wrong * case.excess


def test_which_terms_count_depends_on_the_shape():
    def terms(*widths):
        return product_rate([1.0] * (len(widths) - 1), widths, 1.0)

    assert terms(5, 4, 3, 2) == 1  # the first layer alone
    assert terms(3, 4, 3, 2) == 2  # an expanding first layer keeps the inputs for the second
    assert terms(3, 3, 3, 3) == 3
    assert terms(2, 3, 4) == 1  # the last layer alone
    assert terms(4, 2, 4) == 0  # a bottleneck


# -- one step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [PYRAMID, SQUARE])
def test_the_envelope_holds_step_by_step(widths):
    """One step at a time with the bounds of that step; the drop is a fair share of the bound's."""
    tight = []
    for seed in range(20):
        case = Case.random(widths, seed)
        X = case.X / np.linalg.norm(case.X, 2)
        teacher = [W + 0.1 * np.roll(W, 1, 0) for W in case.layers]
        case = Case(case.layers, X, multiplied(teacher, X))
        for _ in range(5):
            extremes = [np.linalg.svd(W, compute_uv=False) for W in case.layers]
            highest = max(s[0] for s in extremes)
            rate = 0.2 / (len(extremes) * highest ** (2 * len(extremes) - 2))
            bound = envelope(
                case.excess, lowest=[s[-1] for s in extremes], highest=highest, widths=widths,
                inputs=X, learning_rate=rate, steps=1,
            )  # fmt: skip
            after = case.stepped(rate)
            assert after.excess <= bound[1] * (1 + 1e-12)
            tight.append((case.excess - after.excess) / (case.excess - bound[1]))
            case = after
    assert min(tight) >= 1


def test_the_envelope_is_attained():
    """One layer, any step; equal numbers in a chain as the residual vanishes, with L terms."""
    for rate in (0.1, 1.2):
        layer = Case([np.array([[0.4, 0.0]])], np.eye(2) * 0.9, np.array([[2.0, 0.0]]))
        bounds = envelope(
            layer.excess, lowest=[0.0], highest=1.0, widths=(2, 1), inputs=layer.X,
            learning_rate=rate, steps=1,
        )  # fmt: skip
        assert layer.stepped(rate).excess == pytest.approx(bounds[1], rel=1e-12)
    for depth in (2, 3, 4):
        gaps = []
        for offset in (1e-2, 1e-3, 1e-4):
            chain = Case([np.array([[0.8]])] * depth, np.ones((1, 1)), np.ones((1, 1)))
            chain.Y = 0.8**depth * chain.X - offset
            bounds = envelope(
                chain.excess, lowest=[0.8] * depth, highest=0.8, widths=(1,) * (depth + 1),
                inputs=chain.X, learning_rate=0.3, steps=1,
            )  # fmt: skip
            gaps.append(bounds[1] / chain.excess - chain.stepped(0.3).excess / chain.excess)
        assert 0 < gaps[2] < 1e-3
        assert_allclose(gaps[1] / gaps[2], 10, rtol=0.1)  # first order in the residual


def test_the_remainder_of_a_step_is_attained():
    """‖H‖ ≤ x s^L [(1+y)^L − 1 − Ly], y = η‖∇f‖/(√L s): equality for a chain of equal numbers."""
    rng = np.random.default_rng(2)

    def both(case, rate, s):
        depth, x = len(case.layers), np.linalg.norm(case.X, 2)
        linear = case.residual.copy()
        for i, G in enumerate(case.gradients):
            swapped = [*case.layers[:i], -rate * G, *case.layers[i + 1 :]]
            linear += multiplied(swapped, case.X)
        rest = np.linalg.norm(case.stepped(rate).residual - linear)
        y = rate * math.sqrt(case.squared_gradient / depth) / s
        return rest, x * s**depth * ((1 + y) ** depth - 1 - depth * y)

    for depth in (2, 3, 5):
        case = Case([np.array([[0.9]])] * depth, np.full((1, 1), 1.3), np.full((1, 1), 4.0))
        assert_allclose(*both(case, 0.05, 0.9), rtol=1e-9)
    for seed in range(20):
        case = Case.random(PYRAMID, seed)
        s = max(np.linalg.norm(W, 2) for W in case.layers)
        rest, bound = both(case, rng.uniform(0.001, 0.1), s)
        assert rest <= bound


# -- exact rates -------------------------------------------------------------------------------


def start(widths, seed, spread):
    """Layers and X with singular values from 1 to 1/spread, a noisy teacher."""
    rng = np.random.default_rng(seed)

    def matrix(rows, columns, least):
        U, s, Vt = np.linalg.svd(rng.standard_normal((rows, columns)), full_matrices=False)
        return U * np.geomspace(1, least, len(s)) @ Vt

    layers = [matrix(m, n, 1 / spread) for n, m in itertools.pairwise(widths)]
    X = matrix(widths[0], 20, 0.5)
    Y = matrix(widths[-1], widths[0], 0.3) @ X + 0.02 * rng.standard_normal((widths[-1], 20))
    return layers, X, Y


@pytest.mark.parametrize(("degree", "train_gain"), [(None, True), (1, True), (5, True), (9, False)])
def test_the_residual_shrinks_by_the_predicted_factor(degree, train_gain):
    layers, X, Y = start((4, 4, 3), 3, 4.0)
    settings = {"learning_rate": 0.1, "degree": degree, "train_gain": train_gain}
    found = train(layers, X, Y, steps=6000, every=20, **settings)
    factor = asymptotic_factor(found.final(0), X, 0.1, train_gain=train_gain)
    residual = np.sqrt(found.excess[0])
    late = np.flatnonzero((residual < 1e-7 * residual[0]) & (residual > 1e-12 * residual[0]))
    assert len(late) > 5
    measured = np.log(residual[late[-1]] / residual[late[0]]) / (20 * (late[-1] - late[0]))
    assert measured == pytest.approx(math.log(factor), rel=3e-3)
    # controls: without the layers, and with X taken as white
    smallest = np.linalg.svd(X, compute_uv=False)[-1]
    white = np.linalg.svd(X, full_matrices=False)[0]
    wrong = asymptotic_factor(found.final(0), white, 0.1, train_gain=train_gain)
    for control in (1 - 0.1 * smallest**2, wrong):
        assert abs(math.log(control) / measured - 1) > 0.05


def test_the_kernel_is_that_of_differences_of_whole_steps():
    """A small step of training, power iteration included, moves E by −ηK[E]."""
    layers, X, Y = start((4, 4, 3), 4, 3.0)
    for degree in (None, 1, 9):
        moved = []
        for rate in (1e-5, 2e-5):
            run = train(layers, X, Y, learning_rate=rate, steps=1, degree=degree, rounds=3000)
            with jax.enable_x64(True):
                acting = run.final(0) if degree is None else merged(run.final(0))
            moved.append(multiplied([np.asarray(W) for W in acting], X))
        velocity = (4 * moved[0] - moved[1]) / 2e-5  # less 3·f(0)/2e-5, below
        model = layers
        if degree is not None:
            with jax.enable_x64(True):
                model = [precondition(jnp.asarray(W), degree=degree, rounds=3000) for W in layers]
                velocity -= 3 * multiplied([np.asarray(W) for W in merged(model)], X) / 2e-5
                output = multiplied([np.asarray(W) for W in merged(model)], X)
        else:
            output = multiplied(layers, X)
            velocity -= 3 * output / 2e-5
        Vt = np.linalg.svd(X, full_matrices=False)[2]
        E = (output - Y) @ Vt.T
        kernel = tangent_kernel(model, X)
        assert_allclose((kernel @ E.ravel()).reshape(E.shape), -velocity @ Vt.T, atol=2e-4)
        assert (np.abs(kernel - kernel.T).max() > 1e-3) == (degree is not None)


# -- training ----------------------------------------------------------------------------------


def test_training_is_gradient_descent():
    case = Case.random(PYRAMID, 5, rank=4)
    found = train(case.layers, case.X, case.Y, learning_rate=0.01, steps=6, every=2)
    for _ in range(6):
        case = case.stepped(0.01)
    assert found.steps.tolist() == [0, 2, 4, 6]
    assert found.excess[0, -1] == pytest.approx(case.excess, rel=1e-9)
    for W, layer, spectrum in zip(case.layers, found.final(0), found.spectra, strict=True):
        assert_allclose(layer, W, rtol=1e-9)
        assert_allclose(spectrum[0, -1], np.linalg.svd(W, compute_uv=False), rtol=1e-9)
    assert found.conditions.shape == (1, 4)
    assert found.minimum[0] > 0.1


def test_preconditioned_training_is_that_of_the_module():
    layers, X, Y = start((4, 4, 3), 6, 3.0)
    found = train(layers, X, Y, learning_rate=0.05, steps=3, degree=7, gains=[0.9, 1.1], decay=0.01)

    def loss(model):
        return jnp.sum((model[1].effective @ model[0].effective @ X - Y) ** 2) / 2

    with jax.enable_x64(True):
        model = [
            precondition(jnp.asarray(W), degree=7, gain=gain)
            for W, gain in zip(layers, (0.9, 1.1), strict=True)
        ]
        for _ in range(3):
            gradients = jax.grad(loss)(model)
            model = [
                type(one)(
                    one.weight - 0.05 * (g.weight + 0.02 * one.weight),
                    one.gain - 0.05 * g.gain, one.left, one.right, 7,
                )
                for one, g in zip(model, gradients, strict=True)
            ]  # fmt: skip
            model = refreshed(model)
        expected = float(loss(model)) - minimum_loss(X, Y)
    assert found.excess[0, -1] == pytest.approx(expected, rel=1e-9)
    assert_allclose(found.final(0)[1].gain, model[1].gain, rtol=1e-12)


def test_seeds_together_are_seeds_alone():
    starts = [start((4, 4, 3), seed, 3.0) for seed in (0, 1)]
    stacked = [np.stack(arrays) for arrays in zip(*(one[0] for one in starts), strict=True)]
    X, Y = (np.stack([one[i] for one in starts]) for i in (1, 2))
    together = train(stacked, X, Y, learning_rate=0.1, steps=30, degree=5, every=10)
    alone = train(*starts[1], learning_rate=0.1, steps=30, degree=5, every=10)
    assert_allclose(together.excess[1], alone.excess[0], rtol=1e-9)
    assert_allclose(together.spectra[0][1], alone.spectra[0][0], rtol=1e-9)
    assert_allclose(together.minimum, [minimum_loss(x, y) for x, y in zip(X, Y, strict=True)])


def test_a_run_that_diverges_says_so():
    case = Case.random(SQUARE, 0)
    found = train(case.layers, case.X, case.Y, learning_rate=5.0, steps=40)
    assert np.isposinf(found.excess[0, -1])
    assert not np.any(np.isnan(found.excess))


def test_orthogonal_layers_learn_rotations_and_hardly_singular_values():
    """K at W = 1: 1 for rotations, g′(1) of the polynomial for the rest; bounded, yet at rest."""
    slopes = {3: -0.014, 5: -0.046, 7: 0.096, 9: -0.12}
    for degree, slope in slopes.items():
        with jax.enable_x64(True):
            layer = precondition(jnp.eye(3), degree=degree)
        eigenvalues = np.sort(np.linalg.eigvals(tangent_kernel([layer], np.eye(3))).real)
        assert_allclose(eigenvalues[:5], slope**2, rtol=0.1)  # symmetric changes of trace 0
        assert_allclose(eigenvalues[5:8], 1, atol=1e-5)  # rotations
        assert eigenvalues[8] > 2  # γ
    layers, Y = [np.eye(3), np.eye(3)], np.diag([1.2, 0.8, 0.5])
    runs = {
        degree: train(layers, np.eye(3), Y, learning_rate=0.1, steps=300, degree=degree)
        for degree in (None, 9)
    }
    share = {degree: run.excess[0, -1] / run.excess[0, 0] for degree, run in runs.items()}
    assert share[None] < 1e-10
    assert share[9] > 0.1
    assert min(spectrum.min() for spectrum in runs[9].spectra) > 0.7
    assert asymptotic_factor(runs[9].final(0), np.eye(3), 0.1) > 0.99


def test_the_stop_gradient_can_make_every_step_go_up():
    """One layer, γ held, g′(z)(1 + z²) < z g(z): the loss rises by the factor of K, however small
    the step; γ trained makes it fall.
    """
    with jax.enable_x64(True):
        layer = precondition(jnp.diag(jnp.array([1.0, 0.7])), degree=5, rounds=1000)
        acting = np.asarray(layer.merge())
    c = np.array([2.083, -1.643, 0.560])
    g = c @ 0.7 ** np.array([1, 3, 5])
    slope = c @ (np.array([1, 3, 5]) * 0.7 ** np.array([0, 2, 4]))
    expected = slope**2 * (1 + 0.7**2) - slope * 0.7 * g
    values, vectors = np.linalg.eig(tangent_kernel([layer], np.eye(2), train_gain=False))
    lowest = np.argmin(values.real)
    assert values[lowest] == pytest.approx(expected, rel=1e-5)
    assert expected < -0.05
    Y = acting + 1e-5 * vectors[:, lowest].real.reshape(2, 2)
    weights = [np.diag([1.0, 0.7])]
    for rate, steps in ((0.1, 100), (0.01, 1000)):
        held = train(weights, np.eye(2), Y, learning_rate=rate, steps=steps, degree=5,
                     every=steps, rounds=100, train_gain=False)  # fmt: skip
        growth = np.sqrt(held.excess[0, 1] / held.excess[0, 0])
        assert growth == pytest.approx((1 - rate * expected) ** steps, rel=0.01)
    trained = train(weights, np.eye(2), Y, learning_rate=0.1, steps=100, degree=5, every=100)
    assert trained.excess[0, 1] < trained.excess[0, 0]


def test_decay_leaves_preconditioned_layers_nothing_but_zero():
    """The gradient is orthogonal to W, so ‖W‖ falls by 1 − 2ηλ a step once the rest is at rest."""
    layers, X, Y = start((4, 4, 3), 7, 3.0)
    shrink = 1 - 2 * 0.1 * 0.05
    norms = []
    for degree in (None, 5):
        found = train(
            layers, X, Y, learning_rate=0.1, steps=1000, every=500, decay=0.05, degree=degree,
            train_gain=False,
        )  # fmt: skip
        norms.append(found.scales[0])
    plain, lifted = norms
    assert_allclose(plain[2], plain[1], rtol=1e-4)
    assert np.all(plain[2] > 0.1)
    assert_allclose(np.log(lifted[2, 0] / lifted[1, 0]) / 500, math.log(shrink), rtol=1e-3)


# -- bad input ---------------------------------------------------------------------------------

W, X, Y = np.eye(2), np.ones((2, 3)), np.ones((2, 3))
RUN = {"learning_rate": 0.1, "steps": 4}
BOUND = {
    "lowest": [1.0, 1.0], "highest": 1.0, "widths": [2, 2, 2], "inputs": X,
    "learning_rate": 0.01, "steps": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("layers is empty", lambda: rates([], X)),
        ("layers = 3", lambda: rates(3, X)),
        ("layers[0] of shape (2,)", lambda: rates(W, X)),
        ("layers is empty", lambda: train([], X, Y, **RUN)),
        ("lowest = 1.0", lambda: envelope(1.0, **BOUND | {"lowest": 1.0})),
        ("train_gain = 1", lambda: train([W], X, Y, **RUN, train_gain=1)),
        ("layers[1] of shape (2, 3)", lambda: rates([W, np.ones((2, 3))], X)),
        ("layers[0] is preconditioned", lambda: rates([precondition(jnp.eye(2))], X)),
        ("inputs has 3 rows", lambda: tangent_kernel([W], np.ones((3, 3)))),
        ("inputs is zero", lambda: tangent_kernel([W], 0 * X)),
        ("entries that are not finite", lambda: tangent_kernel([W * np.nan], X)),
        ("learning_rate = 0", lambda: asymptotic_factor([W], X, 0)),
        ("targets has 2 columns", lambda: minimum_loss(X, np.ones((2, 2)))),
        ("widths has 2 entries", lambda: product_rate([1.0, 1.0], [2, 2], 1.0)),
        ("lowest[0] = -1", lambda: product_rate([-1.0], [2, 2], 1.0)),
        ("widths[0] = 0", lambda: product_rate([1.0], [0, 2], 1.0)),
        ("it must be ≤ 2/β", lambda: envelope(1.0, **BOUND | {"learning_rate": 1.0})),
        ("highest = 0.5", lambda: envelope(1.0, **BOUND | {"highest": 0.5})),
        ("steps = -1", lambda: envelope(1.0, **BOUND | {"steps": -1})),
        ("start = -1", lambda: envelope(-1, **BOUND)),
        ("multiple of every", lambda: train([W], X, Y, **RUN, every=3)),
        ("degree = 4", lambda: train([W], X, Y, **RUN, degree=4)),
        ("gains must be", lambda: train([W], X, Y, **RUN, degree=3, gains=[1, 2])),
        ("gains has entries", lambda: train([W], X, Y, **RUN, degree=3, gains=np.inf)),
        ("decay = -1", lambda: train([W], X, Y, **RUN, decay=-1)),
        ("targets has 3 rows", lambda: train([W], X, np.ones((3, 3)), **RUN)),
        ("inputs has 2 seeds", lambda: train([np.ones((3, 2, 2))], np.ones((2, 2, 3)), Y, **RUN)),
        ("none must be below", lambda: train([np.ones((1, 2)), np.ones((2, 1))], np.eye(2),
                                             np.eye(2), **RUN)),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(words, call):
    with pytest.raises(ProblemError) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
