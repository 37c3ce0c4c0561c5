"""The weight side of pre-training where tokens have a covariance C (docs/theory.md, section 2.9).

In the coordinates g of x = C^{1/2}g the weights are S̃ = C^{1/2}SC^{1/2} and weight decay is
λ̃D tr(C⁻¹S̃): Ŝ̃ = Y'₊/V̂ with Y' = M̂S̃0 + √Q̂Z − 2λ̃C⁻¹.  The resolvent of Y' at the eigenvalue c is

    G_c(z) = 1/(z + 2λ̃/c − Q̂G − uc),  u = bκ0/(1 − be),  b = M̂/√κ0,  G = ∫G_c,  e = ∫cG_c,

and integrals over the positive eigenvalues are contour integrals of it, along a path from 0 through
the upper half plane to beyond the spectrum: no edge has to be known, and slopes are exact.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Complex, Float

__all__ = [
    "CorrelatedTokens", "Tail", "correlated_divergence", "correlated_tail",
    "correlated_weights", "teacher_square", "threshold_of",
]  # fmt: skip

# double-exponential rule along the paths: its parameter ends within 1e-12 of the ends
_LONGEST, _POINTS = 3.2, 112
# of a path this many times the width √Q̂ that noise gives the spectrum, beyond which it has more
_RESOLVED, _MOST_POINTS = 100.0, 1000
# of Newton's method at a node, and of the halvings of a step along a path
_STEPS, _HALVINGS, _ACCURACY = 12, 40, 1e-14
# a path ends this far beyond the bounds of the spectrum
_BEYOND = 1.3
_BISECTIONS = 60


class CorrelatedTokens(NamedTuple):
    """Weight decay on the factor under tokens of covariance C, which is not spectral in S̃."""

    scaled_penalty: float  # λ̃
    rank: float  # κ0
    levels: tuple[float, ...]  # c


def teacher_square(rank: float, levels: tuple[float, ...]) -> float:
    """Q0 = Tr (CS0)²/D = κ0 tr C² + (tr C)² of the Wishart law, tr = Tr/D."""
    c = np.array(levels)
    return rank * float((c**2).mean()) + float(c.mean()) ** 2


class Tail(NamedTuple):
    """Integrals over the eigenvalues of Y' beyond some point."""

    share: float
    Q: float
    M: float
    V: float


class _Path(NamedTuple):
    """G and e on the nodes of a path, with what their derivatives are made of."""

    z: Complex[np.ndarray, " n"]
    weights: Complex[np.ndarray, " n"]
    G: Complex[np.ndarray, " n"]
    e: Complex[np.ndarray, " n"]

    def integral(self, values: Complex[np.ndarray, " n"]) -> float:
        """−Im ∫ values dz/π: the integral over the spectrum of what has this transform."""
        return float(-np.sum(self.weights * values).imag / np.pi)


class _Equations:
    """G and e of Y' at (Q̂, M̂)."""

    def __init__(self, Q_hat: float, M_hat: float, kind: CorrelatedTokens) -> None:
        self.c, self.kappa = np.array(kind.levels), kind.rank
        self.Q_hat, self.b = Q_hat, M_hat / math.sqrt(kind.rank)
        self.pull = 2 * kind.scaled_penalty / self.c
        wide = self.b * float(self.c.max()) * (1 + math.sqrt(kind.rank)) ** 2
        self.top = _BEYOND * (wide + 2 * math.sqrt(Q_hat))
        self.bottom = -_BEYOND * (float(self.pull.max()) + 2 * math.sqrt(Q_hat))

    def jacobian(self, z: complex, G: complex, e: complex) -> tuple[complex, ...]:
        """∫G_c, ∫cG_c, then ∫c^kG_c² for k = 0, 1, 2, u and ∂u/∂e."""
        left = 1 / (1 - self.b * e)
        u = self.b * self.kappa * left
        at = 1 / (z + self.pull - self.Q_hat * G - self.c * u)
        square, n = at * at, len(at)
        weighted = self.c * square
        return (
            at.sum() / n, self.c.dot(at) / n, square.sum() / n, weighted.sum() / n,
            self.c.dot(weighted) / n, u, self.b * left * u,
        )  # fmt: skip

    def newton(self, z: complex, G: complex, e: complex) -> tuple[complex, complex] | None:
        """The solution near (G, e); None where Newton's method does not find one of a law."""
        for _ in range(_STEPS):
            new_G, new_e, s0, s1, s2, _, slope = self.jacobian(z, G, e)
            a11, a12, a21, a22 = 1 - self.Q_hat * s0, -slope * s1, -self.Q_hat * s1, 1 - slope * s2
            r1, r2, det = new_G - G, new_e - e, a11 * a22 - a12 * a21
            dG, de = (a22 * r1 - a12 * r2) / det, (a11 * r2 - a21 * r1) / det
            G, e = G + dG, e + de
            if not abs(dG) + abs(de) < math.inf:
                return None
            if abs(dG) < _ACCURACY * abs(G) and abs(de) < _ACCURACY * abs(e):
                break
        else:
            if abs(dG) > 1e-9 * abs(G) or abs(de) > 1e-9 * abs(e):
                return None
        within = 1e-9 * abs(G), 1e-9 * abs(e)  # real outside of the spectrum, up to rounding
        return (G, e) if G.imag < within[0] and e.imag < within[1] else None

    def solved(
        self, z: Complex[np.ndarray, " n"]
    ) -> tuple[Complex[np.ndarray, " n"], Complex[np.ndarray, " n"]]:
        """G and e on points, the first of which is far from the spectrum, followed along them."""
        last, G, e = complex(z[0]), 0j, 0j
        for _ in range(400):  # far away the iteration of the equations converges
            G, e = self.jacobian(last, G, e)[:2]
        found = []
        for end in z:
            point, halvings = complex(end), 0
            while True:
                step = self.newton(point, G, e)
                if step is not None and abs(step[0] - G) < 0.5 * abs(step[0]):
                    last, (G, e) = point, step
                    if point == end:
                        break
                    point = complex(end)
                    continue
                halvings += 1
                if halvings > _HALVINGS:
                    raise ArithmeticError(f"the resolvent was lost between {last} and {point}")
                point = (last + point) / 2
            found.append((G, e))
        both = np.array(found).T
        return both[0], both[1]

    def path(self, start: float, *, left: bool = False) -> _Path:
        """From a point of the real axis to beyond the spectrum, through the upper half plane."""
        end = min(self.bottom, start) if left else max(self.top, start)
        length = end - start or self.top
        finer = math.log(abs(length) / math.sqrt(self.Q_hat)) / math.log(_RESOLVED)
        points = min(int(_POINTS * max(1.0, finer**2)), _MOST_POINTS)
        t = np.linspace(-_LONGEST, _LONGEST, points)
        inner, slope = np.pi / 2 * np.sinh(t), np.pi / 2 * np.cosh(t) * (t[1] - t[0])
        # s from 1 to 0 on an arc that leaves both ends at 45°
        s, rest = 1 / (1 + np.exp(2 * inner)), 1 / (1 + np.exp(-2 * inner))
        up = abs(length) * 1j
        z = start + length * s + up * s * rest
        weights = (length + up * (rest - s)) * 2 * s * rest * slope
        return _Path(z, weights, *self.solved(z))


def _at(unknowns: Float[np.ndarray, " 3"], scale: float, kind: CorrelatedTokens) -> _Equations:
    Q_hat, M_hat, _ = np.exp(unknowns)
    return _Equations(float(Q_hat), scale * float(M_hat), kind)


def correlated_weights(
    unknowns: Float[np.ndarray, " 3"], scale: float, kind: CorrelatedTokens
) -> tuple[Float[np.ndarray, " 4"], Float[np.ndarray, "4 3"]]:
    """(Q, M, V, Ψ) at log(Q̂, M̂, V̂) and their slopes, (4,) and (4, 3).

    Args:
        unknowns: log(Q̂, M̂, V̂). scale: of the teacher. kind: λ̃, κ0 and the levels of C.

    Example:
        >>> import jax
        >>> kind = CorrelatedTokens(0.1, 0.5, (1.0,))  # C = I: J of the package
        >>> from lora_theory.theory.spectrum import truncated_second_moment
        >>> values, slopes = correlated_weights(np.zeros(3), 1.0, kind)
        >>> with jax.enable_x64(True):
        ...     J = float(truncated_second_moment(1.0, 0.2, 0.5))
        >>> abs(float(values[0] - J)) < 1e-6
        True
    """
    V_hat = float(np.exp(unknowns[2]))
    equations = _at(unknowns, scale, kind)
    path = equations.path(0.0)
    z, G, e = path.z, path.G, path.e
    b, Q_hat, root = equations.b, equations.Q_hat, scale * math.sqrt(kind.rank)
    at = np.array([equations.jacobian(*point) for point in zip(z, G, e, strict=True)]).T
    s0, s1, s2, slope = at[2], at[3], at[4], at[6]
    left = 1 / (1 - b * e)
    a11, a12, a21, a22 = 1 - Q_hat * s0, -slope * s1, -Q_hat * s1, 1 - slope * s2
    det = a11 * a22 - a12 * a21
    # right-hand sides at fixed G, e: along log Q̂, and along log M̂, that is log b
    along = b * kind.rank * left**2
    sides = [(Q_hat * G * s0, Q_hat * G * s1), (along * s1, along * s2)]
    moves = [((a22 * x - a12 * y) / det, (a11 * y - a21 * x) / det) for x, y in sides]
    second = path.integral(z**2 * G)
    values = np.array([
        second / V_hat**2,
        root * path.integral(z * e * left) / V_hat,
        path.integral(z * G**2) / V_hat,
        second / (4 * V_hat),
    ])  # fmt: skip
    slopes = np.empty((4, 3))
    slopes[:, 2] = values * (-2, -1, -1, -1)
    for column, (dG, de) in enumerate(moves):
        explicit = b * e**2 * left**2 if column else 0.0
        slope_of_square = path.integral(z**2 * dG)
        slopes[:, column] = (
            slope_of_square / V_hat**2,
            root * path.integral(z * (de * left**2 + explicit)) / V_hat,
            2 * path.integral(z * G * dG) / V_hat,
            slope_of_square / (4 * V_hat),
        )
    return values, slopes


def correlated_tail(
    unknowns: Float[np.ndarray, " 3"], scale: float, kind: CorrelatedTokens, start: float = 0.0
) -> Tail:
    """Of the eigenvalues beyond ``start`` ≥ 0: their share, and Q, M and V of Ŝ̃ cut there.

    V = (2/V̂)∫ y Re G, the divergence of the cut map, its jump included.
    """
    V_hat = float(np.exp(unknowns[2]))
    equations = _at(unknowns, scale, kind)
    path = equations.path(start)
    z, G, e = path.z, path.G, path.e
    return Tail(
        path.integral(G),
        path.integral(z**2 * G) / V_hat**2,
        scale * math.sqrt(kind.rank) * path.integral(z * e / (1 - equations.b * e)) / V_hat,
        path.integral(z * G**2) / V_hat,
    )


def threshold_of(
    unknowns: Float[np.ndarray, " 3"], scale: float, kind: CorrelatedTokens, share: float
) -> float:
    """The y ≥ 0 beyond which this share of the eigenvalues of Y' lies; 0 where fewer are."""
    low, high = 0.0, _at(unknowns, scale, kind).top / _BEYOND
    if correlated_tail(unknowns, scale, kind).share <= share:
        return 0.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        above = correlated_tail(unknowns, scale, kind, middle).share > share
        low, high = (middle, high) if above else (low, middle)
        if high - low < 1e-13 * high:
            break
    return (low + high) / 2


def correlated_divergence(
    unknowns: Float[np.ndarray, " 3"], scale: float, kind: CorrelatedTokens
) -> float:
    """∬((x₊ − y₊)/(x − y))²μ(dx)μ(dy)/V̂² over the law μ of Y' (docs/theory.md, section 6).

    (kept share)² and twice the mean of (x/(x − y))² over kept x and dropped y, both on paths that
    leave 0 at 45° and so never meet.
    """
    V_hat = float(np.exp(unknowns[2]))
    equations = _at(unknowns, scale, kind)
    right, left = equations.path(0.0), equations.path(0.0, left=True)
    share = right.integral(right.G)
    x, y = right.z[:, None], left.z[None]
    # of a function that is not real on the path x, both boundary values of the law of y count
    over = left.weights * left.G
    inner = (over / (x - y) ** 2).sum(axis=1) - (over.conj() / (x - y.conj()) ** 2).sum(axis=1)
    crossed = right.integral(right.G * right.z**2 * inner / (2j * np.pi))
    return float((share**2 + 2 * crossed) / V_hat**2)
