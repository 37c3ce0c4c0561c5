"""In which metric to truncate where tokens have a covariance: what the committed table says."""

import math
from itertools import pairwise
from pathlib import Path

import covariance
import jax
import numpy as np
import pandas as pd
import pytest

from lora_theory.theory.nodes import Discretisation
from lora_theory.theory.predict import frozen_weights, solve_pretraining

TABLE = pd.read_csv(Path(__file__).resolve().parents[2] / "figures" / "covariance.csv")
BOTH = pytest.mark.parametrize("activation", ["linear", "softmax"])
SOURCES = ("theory", "simulation")
WAYS = ("two_sided", "one_sided", "none")
CONDITIONS = (10.0, 30.0, 100.0)


def value(source, activation, method, observable, **at):
    return covariance.value_of(TABLE, source, activation, method, observable, **at)


def gap(source, activation, one, other, observable, **at):
    """log of the ratio of two methods, and its error as if they were independent."""
    (a, da), (b, db) = (value(source, activation, m, observable, **at) for m in (one, other))
    return math.log(b / a), math.hypot(da / a, db / b)


@BOTH
@pytest.mark.parametrize("observable", ["distortion", "test_error"])
def test_two_sided_is_best_then_one_sided_then_none(activation, observable):
    for source, condition in [(s, c) for s in SOURCES for c in CONDITIONS]:
        for one, other in pairwise(WAYS):
            difference, _ = gap(source, activation, one, other, observable, condition=condition)
            assert difference > 0, (source, condition, one)
    # the gaps grow with the spread of C, up to a size
    sizes = [
        gap("theory", activation, "two_sided", "none", observable, condition=c)[0]
        for c in (1.0, *CONDITIONS)
    ]
    assert sizes == sorted(sizes)
    assert abs(sizes[0]) < 0.01
    least = {"distortion": 0.4, "test_error": 0.2}[observable]
    assert least < sizes[-1] < 0.6
    simulated, error = gap(
        "simulation", activation, "two_sided", "none", observable, condition=100.0
    )
    assert abs(simulated - sizes[-1]) < 4 * error
    # control: the simulation rejects that the metric does not matter
    assert simulated > 8 * error


@BOTH
def test_distortions_are_predicted(activation):
    def off(method, predicted, **at):
        simulated, _ = value("simulation", activation, method, "distortion", **at)
        return abs(math.log(simulated / predicted))

    for condition in (1.0, *CONDITIONS):
        for method in WAYS:
            predicted, _ = value("theory", activation, method, "distortion", condition=condition)
            assert off(method, predicted, condition=condition) < 0.03
    # controls: tokens without a covariance; another method
    white, _ = value("theory", activation, "two_sided", "distortion", condition=1.0)
    assert off("two_sided", white, condition=100.0) > 0.3
    other, _ = value("theory", activation, "one_sided", "distortion", condition=100.0)
    assert off("two_sided", other, condition=100.0) > 0.07


def test_drawn_distortions_are_the_exact_ones():
    settings = Discretisation.checked(64, 2, 0, 1e-10)
    for condition in CONDITIONS:
        asked = covariance.problem(
            "linear", "two_sided", covariance.BASE | {"condition": condition}
        )
        with jax.enable_x64(True):
            root = solve_pretraining(asked.alone, settings)
            weights = frozen_weights(asked, root, settings)
        exact = 1.5 * float(weights.trained.Q[0] - weights.Q[0])  # (T + 1)/T
        drawn, error = value("theory", "linear", "two_sided", "distortion", condition=condition)
        assert abs(drawn - exact) < 4 * math.hypot(error, 0.003 * exact)


@BOTH
def test_compression_gains_with_whitening_at_every_rank(activation):
    for rank in (0.02, 0.1, 0.2):
        for source in SOURCES:
            one, _ = gap(source, activation, "two_sided", "none", "test_error", rank=rank)
            assert 0.03 < one < 0.25
    errors = [
        value("theory", activation, "two_sided", "test_error", rank=rank)[0]
        for rank in covariance.VARIED["rank"][1]
    ]
    whole, _ = value("theory", activation, "whole", "test_error")
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > whole


@BOTH
def test_under_a_shift_the_claimed_order_is_that_of_the_old_outputs(activation):
    for source in SOURCES:
        old = [
            value(source, activation, method, "anchored_distortion", power=0.5)[0]
            for method in ("anchored", "two_sided", "shifted", "none")
        ]
        assert old == sorted(old)
        assert old[-1] > 1.6 * old[0]
        # what has moved with the tokens wants their own covariance, and no anchor
        new = [
            value(source, activation, method, "distortion", power=0.5)[0]
            for method in ("shifted", "two_sided", "none", "anchored")
        ]
        assert new == sorted(new)
        errors = {
            method: value(source, activation, method, "test_error", power=0.5)[0]
            for method in covariance.OBJECTIVES
        }
        assert max(errors, key=errors.get) == "anchored"
        assert errors["none"] > max(errors["two_sided"], errors["shifted"])
    # with white tokens afterwards ③ is ①
    for name in ("test_error", "distortion"):
        one, other = (
            value("theory", activation, m, name, power=0.0)[0] for m in ("none", "shifted")
        )
        assert one == pytest.approx(other, rel=1e-6)


def test_old_statistics_can_be_worse_than_none():
    for source in SOURCES:
        difference, error = gap(source, "linear", "none", "two_sided", "test_error", power=-1.0)
        assert difference > 3 * error
    assert np.isfinite(TABLE["value"]).all()
    assert (TABLE["missed"].fillna(0) == 0).all()
