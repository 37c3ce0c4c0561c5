"""The secular equation of linear attention against mpmath: magnitudes, degenerate levels, zeros.

The reference knows nothing of the secular equation: descents from many starts on the objective,
polished at 40 digits.  Where minima tie, values are compared instead of points.
"""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from mpmath import mp, mpf
from scipy import optimize

from lora_theory.theory.proximal import linear_lora_proximal

VARIANCES = [1e-9, 0.3, 1e2, 1e4]
SIZES = [1e-3, 1.0, 30.0]


def solve(levels, center, variance):
    """The point, the force, the loss and I + v∇²ℓ of one node."""
    with jax.enable_x64(True):
        arrays = (jnp.asarray(array)[:, None] for array in (levels, center))
        answer = _solve(*arrays, jnp.asarray(variance))
        return tuple(
            np.asarray(getattr(answer, name))[..., 0]
            for name in ("point", "force", "loss", "hessian")
        )


_solve = jax.jit(linear_lora_proximal)


@pytest.fixture(autouse=True)
def _many_digits():
    with mpmath.workdps(40):
        yield


def loss(chi, levels):
    """‖diag(b) − χχᵀ‖²/T², for floats and mpf."""
    tokens = len(levels)
    total = sum((b - x * x) ** 2 for b, x in zip(levels, chi, strict=True))
    total += 2 * sum((chi[i] * chi[j]) ** 2 for i in range(tokens) for j in range(i))
    return total / tokens**2


def loss_slope(chi, levels):
    norm = sum(x * x for x in chi)
    return [4 * (norm - b) * x / len(levels) ** 2 for x, b in zip(chi, levels, strict=True)]


def value(chi, levels, center, variance):
    pull = sum((x - w) ** 2 for x, w in zip(chi, center, strict=True))
    return pull / (2 * variance) + loss(chi, levels)


def slope(chi, levels, center, variance):
    parts = zip(chi, center, loss_slope(chi, levels), strict=True)
    return [(x - w) / variance + s for x, w, s in parts]


def reference(levels, center, variance) -> list:
    """The global minimum: the best of descents along every axis and in random directions."""
    tokens, rng = len(levels), np.random.default_rng(0)
    reach = np.sqrt(max(levels.max(), 0)) + np.abs(center).max()
    starts = [center, *(center + sign * reach * e for sign in (1, -1) for e in np.eye(tokens))]
    starts += list(reach * rng.standard_normal((6, tokens)))
    scale = min(variance, 1.0)  # so that the tolerance of the descents means the same at every v
    found = [
        optimize.minimize(
            lambda chi: scale * value(chi, levels, center, variance),
            start,
            jac=lambda chi: scale * np.array(slope(chi, levels, center, variance)),
            method="BFGS",
            options={"gtol": 1e-10},
        )
        for start in starts
    ]
    exact = [*map(mpf, levels)], [*map(mpf, center)], mpf(variance)
    start = [*map(mpf, min(found, key=lambda result: result.fun).x)]
    return list(
        mp.findroot(lambda *chi: slope(chi, *exact), start, tol=mpf(10) ** -28, maxsteps=60)
    )


def case(kind: str, tokens: int, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Levels in ascending order and ω."""
    rng = np.random.default_rng(tokens)
    levels = np.sort(size * rng.standard_normal(tokens))
    levels[-1] = np.abs(levels[-1])
    center = 0.8 * rng.standard_normal(tokens)
    if kind in ("two equal", "two equal, ω_T = 0") and tokens > 1:
        levels[-2] = levels[-1]
    if kind == "all equal":
        levels[:] = size
    if kind == "no level":
        levels[:] = 0.0
    center[-1] = {
        "two equal, ω_T = 0": 0.0,
        "ω_T = 0": 0.0,
        "ω_T = 10⁻¹⁴": 1e-14,
        "ω_T = 10⁻⁵": 1e-5,
    }.get(kind, center[-1])
    return levels, center * (kind != "ω = 0")


def errors(levels, center, variance, factor: float = 1.0) -> np.ndarray:
    """Excess of the value, and of the point (up to a tied sign), force, loss, ∂χ/∂ω."""
    point, force, at_point, hessian = solve(levels, center, variance * factor)
    assert np.all(np.isfinite(point)), "no answer"
    exact = reference(levels, center, variance)
    b, omega, v = [*map(mpf, levels)], [*map(mpf, center)], mpf(variance)
    mine = [*map(mpf, point)]
    lowest = value(exact, b, omega, v)
    excess = (value(mine, b, omega, v) - lowest) / (1 + lowest)
    tied = [x if w else abs(x) for x, w in zip(exact, omega, strict=True)]
    mine = [x if w else abs(x) for x, w in zip(mine, omega, strict=True)]
    size = 1 + max(map(abs, exact))
    distance = max(abs(x - y) for x, y in zip(tied, mine, strict=True)) / size
    pulls = [-s for s in loss_slope([mpf(x) for x in point], b)]
    scale = size * (1 + max(map(abs, b)))
    forces = max(abs(x - mpf(y)) for x, y in zip(pulls, force, strict=True)) / scale
    losses = abs(loss(exact, b) - mpf(float(at_point))) / (1 + loss(exact, b))
    moved = []
    for k in range(len(center)):
        beside = omega.copy()
        beside[k] += mpf(10) ** -14
        start = [mpf(x) for x in point]
        there, here = (
            mp.findroot(lambda *chi, w=w: slope(chi, b, w, v), start, tol=mpf(10) ** -28)
            for w in (beside, omega)
        )
        moved.append([float(x) for x in (there - here) * mpf(10) ** 14])
    moved = np.array(moved).T
    response = np.abs(np.linalg.inv(hessian) - moved).max() / max(1, np.abs(moved).max())
    return np.array([excess, distance, forces, losses, response], dtype=float)


KINDS = ["generic", "two equal", "all equal", "no level", "ω_T = 10⁻⁵"]


@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_global_minimum_to_rounding(kind, tokens):
    for size in SIZES:
        levels, center = case(kind, tokens, size)
        for variance in VARIANCES:
            excess, *others, response = errors(levels, center, variance)
            assert abs(excess) < 1e-13
            assert max(others) < 1e-11
            assert response < 1e-6  # of a Hessian that is nearly singular at equal levels
    assert errors(levels, center, 0.3, factor=1 + 1e-7)[1] > 1e-11


# With ω orthogonal to the top eigenvector, exactly or up to 10⁻¹⁴, the top component of χ is the
# root of what the other components leave, of either sign.
@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("kind", ["ω_T = 0", "ω_T = 10⁻¹⁴", "two equal, ω_T = 0", "ω = 0"])
def test_global_minimum_where_the_center_misses_the_top_eigenvector(kind, tokens):
    for size in SIZES:
        levels, center = case(kind, tokens, size)
        for variance in VARIANCES:
            assert abs(errors(levels, center, variance)[0]) < 1e-13
