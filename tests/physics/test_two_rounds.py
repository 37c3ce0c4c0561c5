"""What a second batch chosen by the current vector is worth: the figure `rounds` and its claims."""

import math
from pathlib import Path

import pandas as pd
import pytest
import rounds
from figure_tools import limit

from lora_theory import second_round

TABLE = Path(__file__).resolve().parents[2] / "figures" / "rounds.csv"
NOT_THE_SAME = 4  # errors


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.read_csv(TABLE)


@pytest.fixture
def found(table):
    """Value and error of a difference at the largest pool, or another; simulations as D → ∞."""

    def found(source, activation, by, score, observable, pool=None) -> tuple[float, float]:
        rows = rounds.pick(table, activation, rounds.Choice(by, score), f"{observable}_difference")
        rows = rows[rows["second_pool"] == (pool or max(rounds.SIMULATED[activation]))]
        rows = rows[rows["source"] == source]
        if source == "theory":
            return tuple(rows[["value", "error"]].iloc[0])
        return limit(rows)

    return found


@pytest.mark.parametrize("activation", rounds.SETS)
@pytest.mark.parametrize("observable", rounds.OBSERVED)
def test_trained_systems_differ_as_the_theory_says(found, activation, observable):
    for pool in rounds.SIMULATED[activation]:
        for choice in rounds.CHOICES:
            value, error = found("simulation", activation, *choice, observable, pool)
            expected, uncertainty = found("theory", activation, *choice, observable, pool)
            off = abs(value - expected) / math.hypot(error, uncertainty)
            assert off < NOT_THE_SAME, (choice, pool)


@pytest.mark.parametrize("source", ["theory", "simulation"])
def test_linear_attention_gains_by_its_own_first_vector_alone(found, source):
    """Large cross-token logits with w₁ help, low variance harms; frozen logits do neither."""
    helped = found(source, "linear", "current", "cross_token", "test_error")
    harmed = found(source, "linear", "current", "low_variance", "test_error")
    assert helped[0] / helped[1] < -NOT_THE_SAME
    assert harmed[0] / harmed[1] > NOT_THE_SAME
    for score in rounds.TEXTS:
        value, error = found(source, "linear", "frozen", score, "test_error")
        assert abs(value) < NOT_THE_SAME * error
        assert abs(value) < abs(helped[0]) / 2  # and that is not for want of precision


def test_a_point_of_the_table_is_what_second_round_finds(table):
    choice, pool = rounds.Choice("current", "cross_token"), 60.0
    samples = rounds.SETS["linear"]["samples"]
    asked = rounds.problem("linear")
    fresh = second_round(asked, samples=samples, **choice.settings(pool), nodes=256, seed=3)
    for observable in rounds.OBSERVED:
        rows = rounds.pick(table, "linear", choice, observable)
        row = rows[(rows["source"] == "theory") & (rows["second_pool"] == pool)].iloc[0]
        error = math.hypot(fresh.quadrature_error[observable], row["error"])
        assert abs(getattr(fresh, observable) - row["value"]) < NOT_THE_SAME * error
