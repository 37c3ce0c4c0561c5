"""Tokens with a covariance: trained systems against theory, extrapolated in D."""

import math

import jax
import numpy as np
import pytest

from lora_theory import Covariance, Finetuning, Pretraining, Problem
from lora_theory.compilation import double_precision
from lora_theory.simulation.data import run_key
from lora_theory.simulation.run import Effort, finetuned_runs, pretrained_weights
from lora_theory.simulation.sizes import Sizes
from lora_theory.theory import correlated
from lora_theory.theory.predict import predict, solve_pretraining

C = (0.2, 0.5, 1.0, 2.3)
BASE = Problem(
    tokens=2,
    activation="linear",
    teacher_rank=0.5,
    label_noise=0.5,
    covariance=Covariance(eigenvalues=C),
    pretraining=Pretraining(samples=0.4, penalty=0.1),
    finetuning=Finetuning(samples=4.0, penalty=0.2),
)
SHIFT = {"covariance.shifted": C[::-1]}
CASES = {
    "plain": BASE,
    "re-used": BASE.replace({"finetuning.sequences": "reused"}),
    "two-sided": BASE.replace(compression={"rank": 0.1}),
    "one-sided": BASE.replace(compression={"rank": 0.1, "whitening": "one_sided"}),
    "none": BASE.replace(compression={"rank": 0.1, "whitening": "none"}),
    "shifted": BASE.replace(SHIFT),
    "calibrated": BASE.replace(SHIFT, compression={"rank": 0.1, "calibration": "finetuning"}),
    "anchored": BASE.replace(SHIFT, compression={"rank": 0.1, "calibration": "anchored"}),
}
DIMS, SEEDS = (40, 80), 10


@pytest.fixture(scope="module")
def measured():
    """Of every case, D and run: the numbers over those of the teacher that it drew."""
    effort = Effort(np.float64, 0, 1, 2, 1e-5, 20_000)
    found = {name: {} for name in CASES}
    with double_precision():
        for dim in DIMS:
            keys = [run_key(7, index) for index in range(SEEDS)]
            trained = [pretrained_weights(BASE, Sizes.of(BASE, dim), effort, [key]) for key in keys]
            for name, problem in CASES.items():
                sizes = Sizes.of(problem, dim)
                found[name][dim] = [
                    numbers(problem, finetuned_runs(problem, sizes, effort, [key], first)[0][0])
                    for key, first in zip(keys, trained, strict=True)
                ]
    assert not jax.config.jax_enable_x64
    return found


def numbers(problem, record):
    """Squares over those of the teacher, whose draw is most of the scatter."""
    first, noise, (second,) = record.pretraining, record.effective_noise, record.finetuning
    assert first["converged"]
    assert second["converged"]
    square = first["Q0"]
    return {
        "Q": first["Q"] / square,
        "M": first["M"] / square,
        "train": first["train_error"],
        "rank": first["learned_rank"],
        "objective": first["objective"],
        "gain": noise["gain"],
        "overlap": second["overlap"],
        "loss": second["objective"],
    }


def predicted(problem, seed=0):
    found = predict(problem, nodes=256, seed=seed)
    first, noise, second = found.pretraining, found.effective_noise, found.finetuning
    square = 0.5 * np.mean(np.square(C)) + np.mean(C) ** 2
    values = {
        "Q": (first.Q / square, 0.0),
        "M": (first.M / square, 0.0),
        "train": (first.train_error, 0.0),
        "rank": (first.learned_rank, 0.0),
        "objective": (first.potential, 0.0),
        "gain": (noise.gain, noise.quadrature_error["gain"]),
        "overlap": (second.overlap, second.quadrature_error["overlap"]),
        "loss": (second.potential, second.quadrature_error["potential"]),
    }
    assert found.status.is_solved
    return values


def scores(runs, theory):
    """z of the straight line in 1/D at D → ∞."""
    small, large = DIMS
    weights = {small: -small / (large - small), large: large / (large - small)}
    found = {}
    for name, (value, error) in theory.items():
        mean, square = 0.0, error**2
        for dim, weight in weights.items():
            column = np.array([run[name] for run in runs[dim]])
            mean += weight * column.mean()
            square += weight**2 * column.var(ddof=1) / SEEDS
        found[name] = (mean - value) / math.sqrt(square)
    return found


@pytest.mark.parametrize("name", CASES)
def test_trained_systems_have_the_theory_as_their_limit(measured, name):
    found = scores(measured[name], predicted(CASES[name]))
    assert max(map(abs, found.values())) < 4, found


def test_controls_are_rejected(measured, monkeypatch):
    # tokens without a covariance
    plain = predicted(BASE.replace(covariance={"eigenvalues": (1.0,) * 4}))
    assert max(map(abs, scores(measured["plain"], plain).values())) > 8
    # one method for another
    for one, other in (("one-sided", "none"), ("calibrated", "anchored"), ("plain", "re-used")):
        found = scores(measured[one], predicted(CASES[other]))
        assert max(map(abs, found.values())) > 8, (one, other)
    # a penalty on S̃ itself, which would be spectral
    made = correlated._Equations.__init__

    def spectral(self, Q_hat, M_hat, kind):
        made(self, Q_hat, M_hat, kind)
        self.pull = np.full_like(self.pull, 2 * kind.scaled_penalty)

    monkeypatch.setattr(correlated._Equations, "__init__", spectral)
    wrong = predicted(BASE, seed=1)  # what is solved is kept
    solve_pretraining.cache_clear()
    assert max(map(abs, scores(measured["plain"], wrong).values())) > 8
