"""The best pre-training penalty differs with the objective: the figure `optimal` and its claims."""

import itertools
import math
from pathlib import Path

import numpy as np
import optimal
import pandas as pd
import pytest
from figure_tools import limit

from lora_theory import optimize, predict

TABLE = Path(__file__).resolve().parents[2] / "figures" / "optimal.csv"
PENALTY, SAMPLES = "pretraining.penalty", "pretraining.samples"
ERROR, NOISE = "pretraining.test_error", "effective_noise"
TUNED, OVERLAP = "finetuning.test_error", "finetuning.overlap"


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.read_csv(TABLE)


@pytest.fixture
def found(table):
    """Value and error of an observable at the base, or at another α; simulations as D → ∞."""

    def found(source, activation, objective, observable, samples=0.2) -> tuple[float, float]:
        part = optimal.along(table, activation, SAMPLES)
        part = part[(part["source"] == source) & np.isclose(part[SAMPLES], samples)]
        rows = part[(part["objective"] == objective) & (part["observable"] == observable)]
        if source == "theory":
            return tuple(rows[["value", "error"]].iloc[0])
        return limit(rows)

    return found


def ratio(found, activation, objective, samples=0.2) -> tuple[float, float]:
    """ln(λ*/λ*_E') of the theory, with its error."""
    (own, own_error), (other, error) = (
        found("theory", activation, name, "best_penalty", samples) for name in (TUNED, objective)
    )
    return math.log(other / own), math.hypot(error / other, own_error / own)


def test_softmax_orders_the_penalties_and_more_samples_exchange_two(found):
    ordered = {0.2: (NOISE, ERROR, TUNED, OVERLAP), 0.8: (ERROR, NOISE, TUNED, OVERLAP)}
    for samples, objectives in ordered.items():
        best = [found("theory", "softmax", o, "best_penalty", samples) for o in objectives]
        for (low, low_error), (high, high_error) in itertools.pairwise(best):
            assert (high - low) / math.hypot(low_error, high_error) > 2.5, (samples, best)


def test_linear_attention_with_reused_sequences_has_three(found):
    noise, error = (found("theory", "linear", o, "best_penalty")[0] for o in (NOISE, ERROR))
    assert noise == pytest.approx(error, rel=1e-5)  # Δ_eff and E are one
    for samples in (0.2, 0.4, 0.8):
        distance, uncertainty = ratio(found, "linear", ERROR, samples)
        assert distance > max(0.02, 5 * uncertainty)
        assert found("theory", "linear", OVERLAP, "best_penalty", samples)[0] == 0.002  # the end
    assert ratio(found, "linear", ERROR)[0] == pytest.approx(0.0684, abs=0.002)


def test_a_row_of_the_table_is_what_optimize_finds(found):
    for objective in (ERROR, NOISE):
        asked = optimal.problem("linear", {SAMPLES: 0.4})
        best = optimize(asked, [PENALTY], objective)
        expected = found("theory", "linear", objective, "best_penalty", 0.4)[0]
        assert best.optimum[PENALTY] == pytest.approx(expected, rel=1e-4)


def test_fresh_sequences_are_the_control():
    """Linear attention with fresh ones has one λ*: what the others cost is nothing."""
    fresh = optimal.problem("linear", {"finetuning.sequences": "fresh"})
    rows = pd.DataFrame(optimal.optima(fresh, {"nodes": 64}))
    best = rows[rows["observable"] == "best_penalty"]["value"]
    assert best.max() / best.min() == pytest.approx(1, abs=2e-3)
    assert rows[rows["observable"].str.startswith("excess")]["value"].abs().max() < 1e-4


@pytest.mark.parametrize("samples", [0.2, 0.4, 0.8])
def test_trained_systems_show_the_same_penalties(found, samples):
    """Extrapolated in D, within 4 errors; those at α = .2 of softmax are none of another α."""
    for activation, others in {
        "linear": (ERROR, NOISE),
        "softmax": (ERROR, NOISE, OVERLAP),
    }.items():
        for objective in (*others, TUNED):
            value, error = found("simulation", activation, objective, "best_penalty", samples)
            expected, uncertainty = found("theory", activation, objective, "best_penalty", samples)
            assert abs(value - expected) < 4 * math.hypot(error, uncertainty), objective
        for objective in others:
            value, error = found("simulation", activation, objective, "log_ratio", samples)
            expected, uncertainty = ratio(found, activation, objective, samples)
            assert abs(value - expected) < 4 * math.hypot(error, uncertainty), objective
    if samples == 0.8:
        value, error = found("simulation", "softmax", NOISE, "log_ratio", 0.2)
        assert (ratio(found, "softmax", NOISE, samples)[0] - value) / error > 4


def test_trained_systems_reject_one_penalty_for_all(found):
    """λ* of E or of the noise is not that of E'; where softmax says they are close, they are."""
    rejected = {
        (activation, objective, samples): value / error
        for activation, objective, samples in (
            ("linear", ERROR, 0.2), ("linear", NOISE, 0.2), ("softmax", NOISE, 0.2),
            ("softmax", ERROR, 0.4), ("softmax", ERROR, 0.8), ("softmax", NOISE, 0.8),
        )
        for value, error in [found("simulation", activation, objective, "log_ratio", samples)]
    }  # fmt: skip
    *apart, close = rejected.values()
    assert min(apart[:2]) > 4
    assert max(apart[2:]) < -4
    assert abs(close) < 4


def test_a_polynomial_through_the_simulated_penalties_finds_the_best():
    """Exact errors in place of measured ones: the fit itself moves λ* by less than .2 %."""
    for samples, ends in optimal.SIMULATED["linear"].items():
        penalties = np.geomspace(*ends, 7)
        asked = optimal.problem("linear", {SAMPLES: samples}).replace(finetuning=None)
        errors = [predict(asked.replace({PENALTY: p})).pretraining.test_error for p in penalties]
        runs = np.tile(np.array(errors)[:, None], (1, 3))
        fits = optimal.fitted(penalties, {name: list(runs) for name in optimal.OBJECTIVES})
        (_, _, estimate), *_ = fits
        best = optimize(asked, [PENALTY], ERROR).optimum[PENALTY]
        assert estimate.mean == pytest.approx(best, rel=2e-3)
        assert estimate.error == pytest.approx(0, abs=1e-9)


def test_the_jackknife_is_the_standard_error_of_a_mean():
    values = np.random.default_rng(0).normal(size=50)
    (estimate,) = optimal.jackknife(lambda runs: np.array([values[runs].mean()]), 50)
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.error == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert math.isnan(optimal.lowest(np.polynomial.Polynomial([0, 1, 0, 1]), -1, 1))
