"""μ_δ and its tail integrals against mpmath at 50 digits: roots, density, quadrature, rounding.

Three routes: the cubic by polynomial roots, the tails by quadrature of the density between the
edges, and the tails by antiderivatives in the plane of g, right to all digits, for wide grids.
"""

import functools
import math
from itertools import pairwise, product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from mpmath import mp, mpf

from lora_theory.laws import Wishart
from lora_theory.theory.regularizers import WeightDecay
from lora_theory.theory.spectrum import learned_rank, stieltjes, truncated_second_moment
from lora_theory.theory.weights import Constants, weight_side

DIGITS = 50
TEACHER_RANKS = [0.05, 0.2, 0.5, 1.0, 3.0, 20.0]
DELTAS = [1e-4, 1e-2, 0.3, 1.0, 30.0, 1e3]
EPSILON = np.finfo(float).eps


@pytest.fixture(autouse=True)
def _many_digits():
    with mpmath.workdps(DIGITS):
        yield


# -- the law in mpmath -----------------------------------------------------------------------------


class Law(NamedTuple):
    """law(S0) ⊞ semicircle(δ²)."""

    delta: mpf
    teacher_rank: mpf

    @property
    def c(self) -> mpf:
        return 1 / mp.sqrt(self.teacher_rank)

    def inverse(self, g):
        return sum(self.terms(g))

    def terms(self, g):
        """1/g, the R-transform of the teacher and that of the semicircle."""
        return 1 / g, 1 / (self.c * (1 - self.c * g)), self.delta**2 * g

    def slope(self, g):
        """x′(g)."""
        return -1 / g**2 + 1 / (1 - self.c * g) ** 2 + self.delta**2

    def roots(self, x) -> list:
        c, d = self.c, self.delta**2
        cubic = [c * d, -(c * x + d), x + c - 1 / c, -1]
        return mp.polyroots(cubic, maxsteps=300, extraprec=mp.prec)

    def transform(self, x):
        """G(x + i0)."""
        return self.choose(self.roots(x))

    def choose(self, roots: list):
        """In the lower half plane; outside the support the one where x(g) decreases."""
        lowest = min(roots, key=mp.im)
        if -mp.im(lowest) > mpf(10) ** (-mp.dps // 2) * abs(lowest):
            return lowest
        return mpmath.mpc(min(map(mp.re, roots), key=self.slope))

    @functools.lru_cache  # noqa: B019 - a Law is a small immutable key
    def edges(self) -> list:
        """x(g) at the real zeros of g²(1 − cg)² x′(g)."""
        c, d = self.c, self.delta**2
        zeros = mp.polyroots(
            [d * c**2, -2 * c * d, d - c**2 + 1, 2 * c, -1], maxsteps=500, extraprec=6 * mp.prec
        )
        real = [mp.re(g) for g in zeros if abs(mp.im(g)) < mpf(10) ** (-mp.dps // 2) * abs(g)]
        return sorted(self.inverse(g) for g in real)


class Tail(NamedTuple):
    J: mpf
    by_delta: mpf
    by_epsilon: mpf
    rank: mpf


def tail_by_quadrature(law: Law, epsilon) -> Tail:
    """The four integrals of (2.10) over the density, bulk by bulk."""
    total = [mpf(0)] * 4
    for bottom, top in zip(law.edges()[::2], law.edges()[1::2], strict=True):
        if top <= epsilon:
            continue
        transform = functools.cache(law.transform)
        integrands = [
            lambda x, G: (x - epsilon) ** 2,
            lambda x, G: 4 * law.delta * (x - epsilon) * mp.re(G),
            lambda x, G: -2 * (x - epsilon),
            lambda x, G: 1,
        ]
        for i, integrand in enumerate(integrands):

            def weighted(x, integrand=integrand, transform=transform):
                G = transform(x)
                return -mp.im(G) / mp.pi * integrand(x, G)

            total[i] += mp.quad(weighted, [max(bottom, epsilon), top])
    return Tail(*total)


def antiderivative(law: Law, epsilon, g):
    """(p, r) ↦ ∫(x(g) − ε)^p g^r dg, by partial fractions in g and u = 1 − cg.

    The logarithms are those that are real on the small positive axis and continued below it.
    """
    c, u = law.c, 1 - law.c * g
    log_g = mp.log(abs(g)) + 1j * (mp.atan2(mp.im(g), mp.re(g)) if mp.im(g) else below(g))
    log_u = mp.log(abs(u)) + 1j * (mp.atan2(mp.im(u), mp.re(u)) if mp.im(u) else -below(u))

    @functools.cache
    def basic(i: int, j: int):
        """∫ g^i u^(−j) dg."""
        if j == 0:
            return log_g if i == -1 else g ** (i + 1) / (i + 1)
        if i < 0:
            return basic(i, j - 1) + c * basic(i + 1, j)
        if i > 0:
            return (basic(i - 1, j) - basic(i - 1, j - 1)) / c
        return -log_u / c if j == 1 else u ** (1 - j) / (c * (j - 1))

    def integral(p: int, r: int):
        total = mpf(0)
        for pole, teacher, semicircle, constant in exponents(p):
            count = math.factorial(p) // math.prod(
                map(math.factorial, (pole, teacher, semicircle, constant))
            )
            weight = c**-teacher * law.delta ** (2 * semicircle) * (-epsilon) ** constant
            total += count * weight * basic(r + semicircle - pole, teacher)
        return total

    return integral


@functools.cache
def exponents(p: int) -> list[tuple[int, ...]]:
    """Four powers of sum p."""
    return [powers for powers in product(range(p + 1), repeat=4) if sum(powers) == p]


def below(z):
    """Argument of a real number reached from the lower half plane."""
    return -mp.pi if mp.re(z) < 0 else mpf(0)


def tail(law: Law, epsilon) -> Tail:
    """The same without quadrature; the cancellation costs some 30 of 80 digits."""
    with mpmath.workdps(80):
        integral = antiderivative(law, epsilon, law.transform(epsilon))
        return Tail(
            -mp.im(integral(3, 0)) / (3 * mp.pi),
            -2 * law.delta * mp.im(integral(2, 1)) / mp.pi,
            mp.im(integral(2, 0)) / mp.pi,
            -mp.im(integral(1, 0)) / mp.pi,
        )


# -- the package -----------------------------------------------------------------------------------


@jax.jit
@jax.vmap
def _tail(delta, epsilon, teacher_rank):
    value = jax.value_and_grad(truncated_second_moment, argnums=(0, 1))
    J, slopes = value(delta, epsilon, teacher_rank)
    return J, *slopes, learned_rank(delta, epsilon, teacher_rank)


_stieltjes, _weight_side = jax.jit(jax.vmap(stieltjes)), jax.jit(weight_side)


def computed(function, *arguments) -> np.ndarray:
    """``function`` of the package in 64 bits, outputs last; one size, so that it compiles once."""
    arrays = np.broadcast_arrays(*map(np.float64, arguments))
    count = arrays[0].size
    with jax.enable_x64(True):
        padded = (jnp.asarray(np.resize(array, 40)) for array in arrays)
        return np.stack(function(*padded), axis=-1)[:count]


def exact(delta: float, teacher_rank: float) -> Law:
    return Law(mpf(delta), mpf(teacher_rank))


def thresholds(law: Law) -> np.ndarray:
    """ε deep below the support, through bulks and gap, at each edge and 10⁻⁶ of a width from it."""
    edges = np.array([float(x) for x in law.edges()])
    far = (1 + float(law.delta)) * np.array([-10.0, -0.1])
    parts = np.array([0, 1e-6, 1e-3, 0.05, 0.5, 0.95, 0.999, 1 - 1e-6])
    through = np.concatenate([a + (b - a) * parts for a, b in pairwise(edges)])
    zero = [0.0] if edges[0] < 0 < edges[-1] else []
    return np.concatenate([edges[0] + far, through, edges[-1] * np.array([1, 1 + 1e-6, 2]), zero])


# -- the transform ---------------------------------------------------------------------------------


def branch_and_rounding(delta: float, teacher_rank: float, conjugate: bool = False) -> np.ndarray:
    """Per point: distance to G over that to the nearest root; |x(g) − x| over its terms in ε."""
    law = exact(delta, teacher_rank)
    x, rows = thresholds(law), []
    for real, density, point in zip(
        *computed(_stieltjes, x, delta, teacher_rank).T, x, strict=True
    ):
        g = mpmath.mpc(real, mp.pi * density * (1 if conjugate else -1))
        roots = law.roots(mpf(point))
        nearest = max(min(abs(g - root) for root in roots), 1e-7 * abs(g))
        wrong = abs(g - law.choose(roots)) / nearest
        size = sum(map(abs, law.terms(g))) + abs(mpf(point))
        rows.append([float(wrong), float(abs(law.inverse(g) - mpf(point)) / size / EPSILON)])
    return np.array(rows)


@pytest.mark.parametrize("teacher_rank", TEACHER_RANKS)
def test_transform_is_the_right_root_to_rounding(teacher_rank):
    """Backward error: G itself loses half of the digits at an edge, where G′ is infinite."""
    for delta in DELTAS:
        ratio, rounding = branch_and_rounding(delta, teacher_rank).T
        assert ratio.max() < 3
        assert rounding.max() < 100
    assert branch_and_rounding(0.3, teacher_rank, conjugate=True)[:, 0].max() > 1e3


# -- the tails -------------------------------------------------------------------------------------

QUADRATURES = [
    (0.3, 0.5, 0.5),  # inside the only bulk
    (0.01, 0.15, 0.2),  # in the gap between the mass near zero and the bulk
    (1e-3, 1.0, 0.05),
    (0.01, 3.9, 1.0),
    (1.0, 0.0, 1.0),
    (20.0, 5.0, 3.0),
    (1e3, 1990.0, 0.5),
    (1e-4, 5.0, 20.0),
    (0.3, -3.0, 20.0),
]


@pytest.mark.parametrize(("delta", "epsilon", "teacher_rank"), QUADRATURES)
def test_antiderivatives_are_integrals_of_the_density(delta, epsilon, teacher_rank):
    """The reference of the wide grids is itself right to 18 digits."""
    law = exact(delta, teacher_rank)
    with mpmath.workdps(20):
        integrals = tail_by_quadrature(law, mpf(epsilon))
    closed = tail(law, mpf(epsilon))
    for value, expected in zip(closed, integrals, strict=True):
        assert abs(value / expected - 1) < mpf(10) ** -17
    changed = tail(exact(delta, teacher_rank * (1 + 1e-12)), mpf(epsilon))
    assert abs(changed.J / integrals.J - 1) > mpf(10) ** -16


# Next to the top edge, with s = top − ε, the density at ε is a difference of numbers of order one
# whose square falls as s, hence known to ε_machine/s; s goes as rank^{2/3}.
LOSS = np.array([2 / 3, 2 / 3, 2 / 3, 2 / 3])


def rounding_in_units_of_the_law(delta: float, teacher_rank: float, factors=1.0) -> np.ndarray:
    """Relative errors over ε·max(1, κ0)·(1, for J and ∂_δJ: δ√κ0)·rank^−p, per threshold."""
    law = exact(delta, teacher_rank)
    epsilon = thresholds(law)
    values, rows = computed(_tail, delta, epsilon, teacher_rank) * factors, []
    size = max(1.0, teacher_rank)
    steep = max(1.0, delta * teacher_rank**0.5)
    for value, threshold in zip(values, epsilon, strict=True):
        expected = tail(law, mpf(threshold))
        if expected.rank > 1e-9:
            error = [float(abs(mpf(a) / b - 1)) for a, b in zip(value, expected, strict=True)]
            unit = EPSILON * size * np.array([steep, steep, 1, 1]) * float(expected.rank) ** -LOSS
            rows.append(error / unit)
    return np.array(rows)


@pytest.mark.parametrize("teacher_rank", TEACHER_RANKS)
@pytest.mark.parametrize("delta", DELTAS)
def test_tails_are_exact_up_to_a_known_rounding(delta, teacher_rank):
    """For κ0, δ ≤ 1: 13 digits at rank ≥ .1, 12 at 10⁻³, ten at 10⁻⁶."""
    assert rounding_in_units_of_the_law(delta, teacher_rank).max() < 10


def test_small_wrong_factors_in_the_tails_are_seen():
    for i in range(4):
        factors = np.ones(4)
        factors[i] += 1e-11
        assert rounding_in_units_of_the_law(0.3, 0.5, factors)[:, i].max() > 1e4


@pytest.mark.parametrize("teacher_rank", TEACHER_RANKS)
def test_above_the_top_edge_nothing_is_left(teacher_rank):
    for delta in DELTAS:
        law = exact(delta, teacher_rank)
        top = float(law.edges()[-1])
        above = top * (1 + np.array([1e-12, 1e-6, 1.0, 1e6]))
        np.testing.assert_array_equal(computed(_tail, delta, above, teacher_rank), 0.0)
        just_below = computed(_tail, delta, [top * (1 - 1e-3)], teacher_rank)
        assert just_below[0, -1] > 0


# -- the weight side -------------------------------------------------------------------------------

HATS = [
    (Q_hat, M_hat, V_hat, penalty, teacher_rank)
    for Q_hat, M_hat, V_hat, penalty in [
        (5e-4, 0.013, 0.017, 0.01),
        (0.6, 4.6, 5.3, 0.01),
        (1e-8, 1e-3, 1e-4, 1e-4),
        (1e4, 30.0, 1e3, 5.0),
        (1e-4, 1e3, 1e3, 1e-3),
    ]
    for teacher_rank in (0.05, 1.0, 20.0)
]


def weight_side_error(hats: tuple[float, ...], wrong: tuple[float, ...] = (1, 1, 1)) -> np.ndarray:
    """Relative errors of Q, M, V against (2.8) with the tails of mpmath."""
    Q_hat, M_hat, V_hat, penalty, teacher_rank = map(mpf, hats)
    law = Law(mp.sqrt(Q_hat) / M_hat, teacher_rank)
    at = tail(law, 2 * penalty / M_hat)
    Q = (M_hat / V_hat) ** 2 * at.J
    M = M_hat / V_hat * at.J - mp.sqrt(Q_hat) / (2 * V_hat) * at.by_delta
    M -= penalty / V_hat * at.by_epsilon
    V = M_hat * at.by_delta / (2 * mp.sqrt(Q_hat) * V_hat)
    constants = Constants(1.0, 1.5, Wishart(hats[4]), 1.0, WeightDecay(hats[3]))
    with jax.enable_x64(True):
        values = _weight_side(*(jnp.float64(hat) for hat in hats[:3]), constants)
    pairs = zip(values, (Q, M, V), wrong, strict=True)
    return np.array([float(abs(mpf(float(a)) * f / b - 1)) for a, b, f in pairs])


@pytest.mark.parametrize("hats", HATS)
def test_order_parameters_of_the_weights(hats):
    assert weight_side_error(hats).max() < 1e-11
    assert weight_side_error(hats, (1, 1, 1 + 1e-9)).max() > 5e-10
