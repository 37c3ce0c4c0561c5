"""Deep linear networks: what the table of `deep_linear` says, with wrong rates rejected."""

import itertools
from pathlib import Path

import deep_linear_rows as figure
import numpy as np
import pandas as pd
import pytest

from lora_theory.lowrank.deep_linear import asymptotic_factor
from lora_theory.lowrank.polynomials import PRECONDITIONING

TABLE = Path(__file__).resolve().parents[2] / "figures" / "deep_linear.csv"
APART = 4  # errors


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.read_csv(TABLE)


def chosen(table, panel, observable, **fields):
    rows = table[(table["panel"] == panel) & (table["observable"] == observable)]
    for name, value in fields.items():
        rows = rows[rows[name] == value]
    assert len(rows)
    return rows


def one(table, panel, observable, **fields):
    (_, row), = chosen(table, panel, observable, **fields).iterrows()  # fmt: skip
    return row


def logarithm(row):
    """Of the value, with its error."""
    return np.log(row["value"]), row["error"] / row["value"]


# -- the bound ---------------------------------------------------------------------------------


def test_plain_runs_stay_below_the_bound_and_bounded_preconditioned_ones_do_not(table):
    share = chosen(table, "loss", "share_of_envelope").set_index("arm")
    assert share.loc["plain", "highest"] < 1
    for arm in ("plain", "degree 9", "degree 9, orthogonal"):
        assert chosen(table, "loss", "least_singular_value", arm=arm)["lowest"].min() > 0.01
    # the spectra of orthogonal layers hardly move, and the loss stays
    orthogonal = chosen(table, "loss", "least_singular_value", arm="degree 9, orthogonal")
    assert orthogonal["lowest"].min() > 0.95
    assert share.loc["degree 9, orthogonal", "lowest"] > 1e10
    last = one(table, "loss", "excess", arm="degree 9, orthogonal", step=1200)
    assert last["value"] - APART * last["error"] > 0.1
    assert one(table, "loss", "excess", arm="plain", step=1200)["highest"] < 1e-6


# -- rates -------------------------------------------------------------------------------------


def test_measured_rates_are_the_exact_ones(table):
    ratios = chosen(table, "rates", "rate_ratio", kind="exact")
    assert len(ratios) >= 24
    assert set(ratios["arm"]) == {"plain", "degree 5", "degree 9"}
    assert (ratios["value"] - 1).abs().max() < 0.01
    assert ((ratios["value"] - 1).abs() / (ratios["error"] + 1e-5)).max() < APART
    # where the second rate is far enough from the first, every single run
    alone = chosen(table, "rates", "rate_ratio_resolved")
    assert alone["seeds"].sum() > 150
    assert alone["highest"].max() < 1.0002
    assert alone["lowest"].min() > 0.9998


def test_wrong_rates_are_rejected_and_bounds_are_bounds(table):
    for kind in ("without layers", "white inputs"):
        ratios = chosen(table, "rates", "rate_ratio", kind=kind, arm="plain")
        assert len(ratios) == len(figure.DEPTHS) * len(figure.SPREADS)
        assert ((1 - ratios["value"]) / ratios["error"]).min() > APART
        assert ratios["value"].max() < 0.6
    products = {}
    for kind in ("layerwise", "product"):
        ratios = chosen(table, "rates", "rate_ratio", kind=kind)
        assert ratios["lowest"].min() > 1
        products[kind] = ratios.groupby("depth")["value"].max()
    assert (products["layerwise"] < 2.5).all()
    assert products["product"].is_monotonic_increasing  # the looser the deeper
    assert products["product"].loc[4] > 100


def test_a_row_of_the_rates_is_that_of_a_fresh_run(table):
    """Depth 2, four seeds: the smallest of the rates in the table's range, both ways."""
    start = figure.Start.of(4, lambda rng: figure.far(rng, 2, 4.0))
    found = start.trained(figure.PLAIN, 6000, every=20)
    row = one(table, "rates", "rate", arm="plain", depth=2, spread=4.0, source="simulation")
    for seed in range(4):
        slope = figure.last_slope(found.excess[seed], 20)
        assert row["lowest"] * 0.999 <= slope <= row["highest"] * 1.001
        factor = asymptotic_factor(found.final(seed), start.inputs[seed], figure.RATE)
        assert -np.log(factor) == pytest.approx(slope, rel=0.01)


# -- spectra at equal gain ---------------------------------------------------------------------


def test_at_equal_gain_the_polynomials_lift_early_and_not_at_the_end(table):
    def smallest(arm, step):
        return logarithm(one(table, "spectrum", "smallest", arm=arm, step=step))

    for arm in ("degree 1", "degree 5", "degree 9"):
        norms = [one(table, "spectrum", "norm", arm=of, step=0)["value"] for of in (arm, "plain")]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for arm in ("degree 5", "degree 9"):
        for other in ("plain", "degree 1"):
            (high, error), (low, spread) = smallest(arm, 100), smallest(other, 100)
            assert high - low > APART * np.hypot(error, spread)
    # the target decides in the end: no lower condition than that of degree 1
    (last, error), (control, spread) = (
        logarithm(one(table, "spectrum", "gmcn", arm=arm, step=4000))
        for arm in ("degree 9", "degree 1")
    )
    assert last - control > APART * np.hypot(error, spread)
    middle = {arm: logarithm(one(table, "spectrum", "gmcn", arm=arm, step=100))
              for arm in ("plain", "degree 1", "degree 9")}  # fmt: skip
    for arm in ("plain", "degree 1"):
        (high, error), (low, spread) = middle[arm], middle["degree 9"]
        assert high - low > APART * np.hypot(error, spread)


def test_at_its_best_learning_rate_degree_5_needs_fewest_steps_and_9_gains_nothing(table):
    """Against plain layers, enlarged or not, and degree 1, whose gradient alone is changed."""
    steps = {
        arm: logarithm(one(table, "speed", "steps_to_fit", arm=arm))
        for arm in ("plain", "plain, enlarged", "degree 1", "degree 5", "degree 9")
    }
    ratio = {arm: one(table, "speed", "steps_ratio", arm=arm) for arm in steps if arm != "plain"}
    assert ratio["degree 5"]["value"] + APART * ratio["degree 5"]["error"] < 1
    for control in ("plain, enlarged", "degree 1"):
        assert ratio[control]["value"] + APART * ratio[control]["error"] > 0.9
        assert steps["degree 5"][0] < steps[control][0]
    nine = ratio["degree 9"]
    assert nine["value"] + nine["error"] > 1
    rates = np.array(figure.LEARNING_RATES)
    for arm in steps:  # the best is no end of the list
        best = one(table, "speed", "steps_to_fit", arm=arm)["learning_rate"]
        assert rates[0] < best < 0.99 * rates[-1]


# -- what is not prevented ---------------------------------------------------------------------


def test_on_a_target_of_lower_rank_singular_values_fall_by_the_slope(table):
    for degree in (None, 1, 3, 9):
        arm = figure.name(degree)
        growth = one(table, "rank", "growth_ratio", arm=arm)
        assert growth["value"] == pytest.approx(1, abs=3e-4)  # of second order in η, 1.5 ln 2 / T
        slope = 1 if degree is None else PRECONDITIONING[degree][0]
        wrong = one(table, "rank", "growth_ratio_without_slope", arm=arm)
        assert wrong["value"] == pytest.approx(slope**2, rel=1e-3)
        simulated = chosen(table, "rank", "smallest", arm=arm, source="simulation")
        late = simulated[simulated["step"] > 1000].sort_values("step")
        for (_, first), (_, second) in itertools.pairwise(late.iterrows()):
            power = np.log(second["value"] / first["value"]) / np.log(
                second["step"] / first["step"]
            )
            assert -0.505 < power < -0.3
        assert late["value"].iloc[-1] < 0.02
    for arm in ("degree 3", "degree 9"):
        assert one(table, "rank", "growth_ratio_without_slope", arm=arm)["value"] > 2


def test_decay_shrinks_preconditioned_layers_by_its_factor_and_plain_ones_not(table):
    lifted = one(table, "decay", "decay_ratio", arm="degree 9")
    plain = one(table, "decay", "decay_ratio", arm="plain")
    assert lifted["value"] == pytest.approx(1, abs=5e-5)  # W still turns a little
    assert abs(plain["value"]) < 1e-3  # control: the same test on plain layers
    trained = one(table, "decay", "runs_finite", arm="degree 9, γ trained")
    assert trained["value"] < trained["seeds"]
    assert one(table, "decay", "runs_finite", arm="degree 9")["value"] == trained["seeds"]
