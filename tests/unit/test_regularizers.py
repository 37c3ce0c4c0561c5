"""What a penalty makes of the spectrum: against matrices that minimise it, and differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_theory.laws import GOE, Wishart
from lora_theory.theory.regularizers import Frobenius, NarrowFactor, NuclearNorm, WeightDecay

HATS, PENALTY, RANK = (1.3, 2.0, 2.5), 0.3, 0.2
SHRUNK = [  # NamedTuples of equal numbers are equal: no dictionary
    (WeightDecay(PENALTY), lambda y, V: np.maximum(y - 2 * PENALTY, 0) / V),
    (
        NarrowFactor(WeightDecay(PENALTY), RANK),
        lambda y, V: np.maximum(y - 2 * PENALTY, 0) / V * (y > np.quantile(y, 1 - RANK)),
    ),
    (
        NuclearNorm(PENALTY),
        lambda y, V: np.sign(y) * np.maximum(np.abs(y) - 2 * PENALTY, 0) / V,
    ),
    (Frobenius(PENALTY), lambda y, V: y / (V + 2 * PENALTY)),
]
NAMES = [type(kind).__name__ for kind, _ in SHRUNK]
LAWS = [Wishart(0.5), GOE()]


def overlaps(regularizer, hats, law):
    """Q, M and V."""
    by_Q, by_M, by_V = jax.grad(regularizer.potential, (0, 1, 2))(*hats, law)
    return jnp.stack([-4 * by_V, 2 * by_M, 4 * by_Q])


_overlaps = jax.jit(overlaps)
_jacobian = jax.jit(jax.jacfwd(overlaps, argnums=1))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
@pytest.mark.parametrize(("regularizer", "shrunk"), SHRUNK, ids=NAMES)
def test_order_parameters_are_those_of_the_minimiser(regularizer, shrunk, law):
    """Q, M and V = Tr Ŝ Z/(√Q̂ D), by parts, of S minimising V̂S²/4 − YS/2 + R(S)."""
    rng, dim, rows = np.random.default_rng(3), 400, []
    Q_hat, M_hat, V_hat = HATS
    for _ in range(6):
        Z = rng.standard_normal((dim, dim))
        Z = (Z + Z.T) / np.sqrt(2 * dim)
        S0 = np.diag(law.spectrum(dim, rng))
        levels, vectors = np.linalg.eigh(M_hat * S0 + np.sqrt(Q_hat) * Z)
        S = (vectors * shrunk(levels, V_hat)) @ vectors.T
        rows.append([np.sum(S * S), np.sum(S * S0), np.sum(S * Z) / np.sqrt(Q_hat)])
    measured = np.mean(rows, axis=0) / dim
    error = np.std(rows, axis=0, ddof=1) / np.sqrt(len(rows)) / dim
    with jax.enable_x64(True):
        hats = tuple(map(jnp.float64, HATS))
        predicted = np.asarray(_overlaps(regularizer, hats, law))
        rank = float(regularizer.learned_rank(hats[0], hats[1], law))
    assert np.all(np.abs(predicted - measured) < 5 * error + 2 / dim)
    assert np.all(np.abs(1.1 * predicted - measured) > 5 * error + 2 / dim)
    kept = np.mean(shrunk(levels, V_hat) != 0)
    assert rank == pytest.approx(kept, abs=4 / dim)


@pytest.mark.parametrize("regularizer", [kind for kind, _ in SHRUNK], ids=NAMES)
def test_jacobian_is_that_of_differences(regularizer):
    law, step = GOE(), 1e-5
    with jax.enable_x64(True):
        hats = jnp.array(HATS)
        exact = np.stack(_jacobian(regularizer, tuple(hats), law))
        rows = []
        for direction in np.eye(3):
            ends = [
                _overlaps(regularizer, tuple(hats + sign * step * direction), law)
                for sign in (1, -1)
            ]
            rows.append((ends[0] - ends[1]) / (2 * step))
    np.testing.assert_allclose(exact, np.array(rows), atol=1e-7)
    assert np.abs(exact).max() > 0.01
