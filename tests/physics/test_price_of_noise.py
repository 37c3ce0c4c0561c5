"""What noise costs in fine-tuning sequences, and how a budget is best split: the figure `price`."""

import itertools
import math
from pathlib import Path

import pandas as pd
import price_rows as price
import pytest
from figure_tools import limit

from lora_theory import gradient, predict

TABLE = Path(__file__).resolve().parents[2] / "figures" / "price.csv"
PRETRAINED = ("pretraining.samples", "pretraining.penalty")
SAMPLES, OVERLAP = "finetuning.samples", "finetuning.overlap"
APART = 4  # errors


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.read_csv(TABLE)


def worth(found, field: str) -> float:
    """Fine-tuning samples that one unit of a field takes at equal overlap."""
    slopes = found.slopes[OVERLAP]
    return -slopes[field] / slopes[SAMPLES]


def test_linear_attention_pays_one_price_for_noise_whatever_made_it(problem):
    """Differences of LoRA on given noise against derivatives through all of pre-training."""
    problem = problem.replace({"pretraining.penalty": 0.04})
    fields = [*PRETRAINED, "teacher_rank", "label_noise", SAMPLES]
    paid = {}
    for sequences in ("fresh", "reused"):
        asked = problem.replace({"finetuning.sequences": sequences})
        found = gradient(asked, fields, nodes=512)
        by_noise = found.slopes["effective_noise.delta_eff"]
        paid[sequences] = [worth(found, field) / by_noise[field] for field in fields[:-1]]
    noise = price.Noise("linear", 1.0, found.values["effective_noise.delta_eff"])
    expected = noise.price("variance", "overlap", 0.0, problem.finetuning.samples, nodes=512)
    assert 4 < expected < 5
    assert paid["fresh"] == pytest.approx([expected] * 4, rel=0.06)
    # control: re-used sequences feel another noise, which more samples or penalty do not lower
    assert max(paid["reused"][:2]) < -2


def test_softmax_pays_two_prices_and_not_one(problem):
    changes = {"pretraining.samples": 0.4, "pretraining.penalty": 0.03}
    found = gradient(
        problem.replace(changes, activation="softmax"), [*PRETRAINED, SAMPLES], nodes=64
    )
    seen = {of: f"effective_noise.{of}" for of in ("variance", "gain")}
    noise = price.Noise("softmax", *(found.values[seen[of]] for of in ("gain", "variance")))
    prices = {of: noise.price(of, "overlap", 0.0, 3.0, nodes=64) for of in seen}
    both, one = {}, {}
    for field in PRETRAINED:
        parts = {of: prices[of] * found.slopes[seen[of]][field] for of in seen}
        both[field] = sum(parts.values()) / worth(found, field)
        one[field] = parts["variance"] / worth(found, field)
    assert both == pytest.approx(dict.fromkeys(both, 1.0), abs=0.2)
    assert max(abs(ratio - 1) for ratio in one.values()) > 0.7  # control: the variance alone


def line(table, activation, name, level):
    """α′ and price along a line of gain 1, by the noise."""
    here = (table["activation"] == activation) & (table["equal"] == name) & (table["gain"] == 1)
    rows = table[here & (table["level"] == level)].sort_values("variance")
    return (rows[rows["observable"] == seen] for seen in ("needed", "price_of_variance"))


def test_a_better_alignment_costs_more_per_noise_and_an_error_ever_more(table):
    """For o the lines are almost straight; for E′ = 1 the noise alone is soon too much."""
    means = []
    for level in (0.9, 0.95, 0.98):
        needed, paid = line(table, "linear", "overlap", level)
        assert needed["value"].is_monotonic_increasing
        means.append(paid["value"].mean())
        assert paid["value"].max() / paid["value"].min() < 1.4
    for low, high in itertools.pairwise(means):
        assert high / low > 1.5
    _, paid = line(table, "linear", "test_error", 1.0)
    assert paid["value"].iloc[-1] / paid["value"].iloc[0] > 10


@pytest.mark.parametrize("activation", price.ACTIVATIONS)
def test_a_line_of_the_table_gives_its_level_and_its_slope(table, activation):
    """LoRA on other nodes with the α′ of the table; the price is the slope of the line."""
    level = price.TRAINED[activation][0]
    needed, paid = (rows.reset_index() for rows in line(table, activation, "overlap", level))
    row = needed.iloc[1]
    stage = price.Noise(activation, 1.0, row["variance"]).finetuned(row["value"], nodes=256, seed=5)
    by_samples = stage.quadrature_error["overlap"]
    assert abs(stage.overlap - level) < APART * by_samples
    for (_, low), (_, high) in itertools.pairwise(needed.iterrows()):
        slope = (high["value"] - low["value"]) / (high["variance"] - low["variance"])
        ends = paid["value"][paid["variance"].between(low["variance"], high["variance"])]
        error = math.hypot(low["error"], high["error"]) / (high["variance"] - low["variance"])
        error += paid["error"].max()
        assert ends.min() - APART * error < slope < ends.max() + APART * error


@pytest.mark.parametrize("activation", price.ACTIVATIONS)
def test_trained_systems_on_the_line_have_one_overlap_and_others_not(table, activation):
    """Extrapolated in D; at the largest D the ends of the line agree, those of one α′ do not."""
    level = price.TRAINED[activation][0]
    part = table[(table["activation"] == activation) & (table["source"] == "simulation")]
    line, control = (part[part["observable"] == f"{kind}_overlap"] for kind in ("line", "control"))
    limits = [limit(rows) for _, rows in line.groupby("variance")]
    assert len(limits) == len(price.TRAINED[activation][1])
    for value, error in limits:
        assert abs(value - level) < APART * error
    ends = []
    for rows in (line, control):
        rows = rows[rows["dim"] == rows["dim"].max()].sort_values("variance")
        first, last = (rows.iloc[place][["value", "error"]] for place in (0, -1))
        ends.append((first["value"] - last["value"]) / math.hypot(first["error"], last["error"]))
    assert abs(ends[0]) < APART
    assert ends[1] > APART


@pytest.mark.parametrize("activation", price.ACTIVATIONS)
def test_trained_systems_have_their_least_error_at_the_best_split(table, activation):
    part = table[(table["activation"] == activation) & table["share"].notna()]
    theory = part[(part["source"] == "theory") & (part["observable"] == "test_error")]
    theory = theory.set_index("share")
    power = 1.0 if activation == "linear" else 0.5  # docs/theory.md, section 7
    for share, rows in part[part["observable"] == "test_error_difference"].groupby("share"):
        value, error = limit(rows, power)
        largest = rows.loc[rows["dim"].idxmax()]
        here, best = theory.loc[share], theory.loc[price.SHARES[0]]
        if here["status"] != "converged":
            continue
        uncertainty = math.hypot(error, here["error"], best["error"])
        assert abs(value - (here["value"] - best["value"])) < APART * uncertainty, share
        if abs(share - price.SHARES[0]) > 0.2:
            assert largest["value"] > APART * largest["error"], share


def test_the_more_one_can_spend_the_less_of_it_goes_to_lora(table):
    """And the more, the dearer its sequences are; in α′ they are always more."""
    rows = table[(table["activation"] == "linear") & (table["observable"] == "best_share")]
    shares = rows.pivot(index="budget", columns="cost", values="value")
    error = rows["error"].max()
    for _, part in shares.items():
        assert (-part.dropna().diff().dropna() > APART * error).all()
    for _, part in shares.iterrows():
        assert (part.dropna().diff().dropna() > APART * error).all()


@pytest.mark.exhaustive
def test_a_budget_that_buys_little_is_better_spent_without_lora():
    """c = .3, B = .4: whatever the share, LoRA is worse than weights trained with all of it."""
    whole = predict(price.problem("linear", 0.4, 1.0, 0.1)).finetuning.frozen_test_error
    for share in (0.2, 0.4, 0.6, 0.7, 0.8):
        tuned = predict(price.divided("linear", 0.4, 0.3, share, 0.1)).finetuning
        assert tuned.test_error > whole
    paid = predict(price.divided("linear", 0.8, 0.3, 0.57, 0.13)).finetuning
    assert paid.test_error < whole / 2
