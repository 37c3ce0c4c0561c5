"""S0 + δZ for any law: against closed forms, sampled matrices, and sums of both tails."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_theory.laws import GOE, Eigenvalues, PowerLaw, Wishart
from lora_theory.theory.convolution import boundary, free_convolution, quantile, tail_moment
from lora_theory.theory.spectrum import stieltjes, truncated_second_moment

LAWS = [Wishart(0.4), GOE(), PowerLaw(0.3), Eigenvalues(np.array([-1.0, 0.0, 0.5, 3.0]))]


def moment(delta, x, law, order, left=False):
    start = boundary(*jax.lax.stop_gradient((x, delta)), law)
    return tail_moment(start, x, delta, law, order=order, left=left)


_moment = jax.jit(moment, static_argnums=(3, 4))
_second = functools.partial(moment, order=2)
_all = jax.jit(
    lambda *a: (_second(*a), jax.grad(_second, (0, 1))(*a), jax.hessian(_second, (0, 1))(*a))
)
_closed = jax.jit(
    lambda *a: (
        truncated_second_moment(*a),
        jax.grad(truncated_second_moment, (0, 1))(*a),
        jax.hessian(truncated_second_moment, (0, 1))(*a),
    )
)


def test_the_wishart_law_has_its_closed_form():
    """Values and both derivatives, on and off the bulk, at large and small δ."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        for _ in range(40):
            delta, rank = 10 ** rng.uniform(-2, 1), 10 ** rng.uniform(-1, 0.7)
            upper = float(Wishart(rank).edges()[1]) + 1.8 * delta
            x = rng.uniform(0, 1) * upper
            generic = np.array(jax.tree.leaves(_all(delta, x, Wishart(rank))))
            closed = np.array(jax.tree.leaves(_closed(delta, x, rank)))
            np.testing.assert_allclose(generic, closed, rtol=1e-9, atol=1e-11 * (1 + closed[0]))


@pytest.mark.parametrize(("delta", "x"), [(0.3, 1.0), (2.0, -0.5), (0.05, 0.3)])
def test_density_and_transform_of_the_wishart_law(delta, x):
    with jax.enable_x64(True):
        found = free_convolution(x, delta, Wishart(0.4))
        np.testing.assert_allclose(found, stieltjes(x, delta, 0.4), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_both_tails_make_the_whole(law):
    with jax.enable_x64(True):
        mean, second = law.moments()
        for delta, x in [(0.5, 0.7), (0.05, 1.3), (0.2, 0.2)]:
            whole = (1.0, mean - x, second + delta**2 - 2 * x * mean + x**2)
            for order in (0, 1, 2):
                right, left = (_moment(delta, x, law, order, side) for side in (False, True))
                assert right >= -1e-13
                assert left >= -1e-13
                assert right + (-1) ** order * left == pytest.approx(whole[order], abs=1e-10)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_tails_are_those_of_sampled_matrices(law):
    rng, dim, delta, x = np.random.default_rng(1), 600, 0.4, 0.8
    rows = []
    for _ in range(4):
        Z = rng.standard_normal((dim, dim))
        Y = np.diag(law.spectrum(dim, rng)) + delta * (Z + Z.T) / np.sqrt(2 * dim)
        levels = np.maximum(np.linalg.eigvalsh(Y) - x, 0)
        rows.append([np.mean(levels > 0), np.mean(levels), np.mean(np.minimum(levels, 3) ** 2)])
    measured, error = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) / 2
    with jax.enable_x64(True):
        share, first = (float(_moment(delta, x, law, order)) for order in (0, 1))
        capped = float(_moment(delta, x, law, 2))
        # the far tail of a power law is not sampled: leave it out on both sides
        capped -= float(_moment(delta, x + 3, law, 2) + 6 * _moment(delta, x + 3, law, 1))
    predicted = np.array([share, first, capped])
    bound = 5 * error + 3 / dim
    if isinstance(law, PowerLaw):
        bound[1] += 0.01  # the largest of D eigenvalues stand for all above
    assert np.all(np.abs(predicted - measured) < bound)
    assert np.all(np.abs(1.1 * predicted - measured) > bound)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_the_quantile_has_its_share_and_its_derivative(law):
    with jax.enable_x64(True):
        of_delta = jax.jit(lambda delta: quantile(jnp.asarray(0.3), delta, law)[0])
        x = of_delta(0.5)
        assert float(_moment(0.5, x, law, 0)) == pytest.approx(0.3, abs=1e-9)
        step = 1e-4
        difference = (of_delta(0.5 + step) - of_delta(0.5 - step)) / (2 * step)
        assert float(jax.grad(of_delta)(0.5)) == pytest.approx(float(difference), rel=1e-4)
