"""The loss, its gradient and its minimisation: against NumPy, finite differences and SciPy."""

import jax
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from lora_theory.simulation.minimise import Task, minimise, training_loss

CASES = [("softmax", 5), ("softmax", 1), ("linear", 5), ("linear", 1)]


def numpy_loss(task: Task, W: np.ndarray, activation: str) -> float:
    """The training loss with D×D matrices, written from the model alone."""
    X, frozen, targets = (np.asarray(part) for part in task[:3])
    (dim, rank), tokens = W.shape, X.shape[1]
    S = W @ W.T / np.sqrt(rank * dim)
    fields = frozen + (X @ S @ X.swapaxes(1, 2) - np.trace(S) * np.eye(tokens)) / np.sqrt(dim)
    student = scipy.special.softmax(fields, axis=2) if activation == "softmax" else fields / tokens
    return float(np.sum((targets - student) ** 2) + task.penalty * np.sum(W**2))


def random_task(rank: int, dtype: type = np.float64, count: int = 40, dim: int = 6):
    rng = np.random.default_rng(rank)
    frozen, targets = rng.normal(size=(2, count, 3, 3))
    arrays = rng.normal(size=(count, 3, dim)), frozen + frozen.swapaxes(1, 2), targets
    return Task(*(array.astype(dtype) for array in arrays), dtype(0.3)), rng.normal(
        size=(dim, rank)
    ).astype(dtype)


@pytest.mark.parametrize(("activation", "rank"), CASES)
def test_loss_is_the_definition(activation, rank):
    task, W = random_task(rank)
    with jax.enable_x64(True):
        loss = float(training_loss(task, W, activation))
    assert loss == pytest.approx(numpy_loss(task, W, activation), rel=1e-12)


@pytest.mark.parametrize(("activation", "rank"), CASES)
def test_gradient_is_that_of_the_definition_with_its_centring(activation, rank):
    task, W = random_task(rank)
    with jax.enable_x64(True):
        gradient = jax.grad(training_loss, argnums=1)(task, W, activation)
    numeric, step = np.zeros_like(W), 1e-5
    for place in np.ndindex(*W.shape):
        shift = np.zeros_like(W)
        shift[place] = step
        rise = numpy_loss(task, W + shift, activation) - numpy_loss(task, W - shift, activation)
        numeric[place] = rise / (2 * step)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-7 * np.abs(numeric).max())


@pytest.mark.parametrize("activation", ["softmax", "linear"])
def test_minimum_is_the_one_scipy_finds_on_the_definition(activation):
    task, W = random_task(6, count=60, dim=6)
    with jax.enable_x64(True):
        found = minimise(task, W, 1e-9, 5000, activation=activation)
    assert found.converged
    other = scipy.optimize.minimize(
        lambda flat: numpy_loss(task, flat.reshape(W.shape), activation),
        np.asarray(found.weights).ravel() + 0.05 * np.random.default_rng(9).normal(size=W.size),
        method="BFGS",
        options={"gtol": 1e-5},
    )
    assert float(found.objective) == pytest.approx(other.fun, rel=1e-8)
    W_other = other.x.reshape(W.shape)
    gram = np.asarray(found.weights) @ np.asarray(found.weights).T
    np.testing.assert_allclose(gram, W_other @ W_other.T, atol=2e-4 * np.abs(gram).max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 1e-4)])
def test_reported_gradient_is_that_of_the_reported_weights(dtype, tolerance):
    task, W = random_task(5, dtype)
    with jax.enable_x64(True):
        found = minimise(task, W, tolerance, 5000, activation="softmax")
        weights = found.weights
        assert weights.dtype == dtype
        gradient = jax.grad(training_loss, argnums=1)(task, weights, "softmax")
    ratio = np.linalg.norm(gradient) / np.linalg.norm(2 * 0.3 * np.asarray(weights))
    assert found.converged
    # Rounding depends on how the compiler orders the sums: percents of a gradient this small.
    assert float(found.relative_gradient) == pytest.approx(ratio, rel=0.05)
    assert float(found.relative_gradient) <= tolerance


def test_too_few_iterations_do_not_count_as_converged():
    task, W = random_task(5)
    with jax.enable_x64(True):
        found = minimise(task, W, 1e-9, 3, activation="softmax")
    assert int(found.iterations) == 3
    assert not found.converged


def test_a_minimum_at_zero_is_recognised():
    task, W = random_task(5)
    with jax.enable_x64(True):
        found = minimise(task._replace(penalty=np.float64(1e4)), W, 1e-6, 100, activation="softmax")
    assert found.converged
    assert np.abs(found.weights).max() < 1e-6
