"""Laws of the teacher's eigenvalues: transforms, moments, edges and draws agree with each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from lora_theory import Problem
from lora_theory.laws import GOE, LAWS, Eigenvalues, PowerLaw, Wishart

GIVEN = np.array([-1.0, 0.0, 0.5, 0.5, 3.0])
SMOOTH = [Wishart(0.4), Wishart(1.0), Wishart(3.0), GOE(), PowerLaw(0.1), PowerLaw(0.45)]
ALL = [*SMOOTH, Eigenvalues(GIVEN)]


def transform(law, points) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(law.stieltjes(jnp.asarray(points, dtype=complex)))


@pytest.mark.parametrize("law", ALL, ids=str)
def test_the_transform_is_that_of_the_eigenvalues_drawn(law):
    """At a distance from the spectrum where single eigenvalues do not show."""
    points = np.array([0.3 + 1.0j, -2.0 + 0.5j, 3.0 + 1.0j])
    levels = law.spectrum(2000, np.random.default_rng(0))
    drawn = np.mean(1 / (points[:, None] - levels), axis=1)
    assert np.abs(transform(law, points) - drawn).max() < 3e-3
    assert np.abs(transform(law, points) - 1.02 * drawn).max() > 3e-3


@pytest.mark.parametrize("law", ALL, ids=str)
def test_moments_are_those_of_the_transform(law):
    """∮w^n G0(w) dw/2πi; for the power law, which is not bounded, ∫s^n ρ(ds) by its quantiles."""
    if isinstance(law, PowerLaw):
        gamma = law.exponent
        found = [
            scipy.integrate.quad(
                lambda x, n=n: (1 - 2 * gamma) ** (n / 2) * x ** (-n * gamma), 0, 1
            )[0]
            for n in (1, 2)
        ]
    else:
        angles = 2 * np.pi * (np.arange(200) + 0.5) / 200
        points = 9 * np.exp(1j * angles[angles < np.pi])
        values = transform(law, points)  # the lower half plane has the conjugates
        found = [np.sum((points ** (n + 1) * values).real) * 2 / 200 for n in (1, 2)]
    np.testing.assert_allclose(found, law.moments(), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("law", SMOOTH, ids=str)
def test_the_density_lives_between_the_edges(law):
    lower, upper = (float(edge) for edge in law.edges())
    inside = [lower + 0.3, min(upper, 3.0) - 0.1]
    outside = [lower - 0.05] + ([upper + 0.05] if np.isfinite(upper) else [])
    assert np.all(-transform(law, np.array(inside) + 1e-12j).imag > 1e-6)
    assert np.all(np.abs(transform(law, np.array(outside) + 1e-12j).imag) < 1e-6)


def test_the_density_of_a_power_law():
    """ρ(s) = (c^{1/γ}/γ) s^{−1/γ−1} above c = √(1 − 2γ)."""
    gamma, s = 0.3, np.array([0.7, 1.0, 2.0, 10.0])
    c = np.sqrt(1 - 2 * gamma)
    exact = c ** (1 / gamma) / gamma * s ** (-1 / gamma - 1)
    density = -transform(PowerLaw(gamma), s + 0j).imag / np.pi
    np.testing.assert_allclose(density, exact, rtol=1e-8)


def test_every_choice_has_a_law():
    (spec,) = (spec for spec in Problem.specs() if spec.name == "teacher.law")
    assert tuple(LAWS) == spec.choices
