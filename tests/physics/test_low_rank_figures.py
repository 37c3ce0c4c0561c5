"""What the figures of low-rank methods say: sign and size, with controls that are rejected."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lora_theory import predict

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "experiments"))

import decay  # noqa: E402
import lowrank  # noqa: E402
from figure_tools import limit  # noqa: E402

NOISE = {"linear": "delta_eff", "softmax": "variance"}


@pytest.fixture(scope="module")
def table():
    return pd.read_csv(ROOT / "figures" / "lowrank.csv")


@pytest.fixture(scope="module")
def ranks():
    return pd.read_csv(ROOT / "figures" / "decay.csv")


def curve(table, method, row, kind="fresh", source="theory"):
    return lowrank.wide(table, source=source, row=row, method=method, kind=kind)


# -- the joint figure ------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["linear", "softmax"])
def test_simulations_lie_on_the_lines(table, row):
    """Noise and gain to 3 % or four errors; those of another method do not."""
    found = {method.name: curve(table, method.name, row) for method in lowrank.METHODS}
    for method in lowrank.METHODS:
        lines, points = found[method.name], curve(table, method.name, row, source="simulation")
        if method.name == "low_rank_decay":
            continue  # its ranks are those of another branch, below
        assert len(points) == 3
        for strength, point in points.iterrows():
            at = min(strength, point["rank"]) if method.truncates else strength
            at = point["rank"] if method.truncates else at
            for name in (NOISE[row], "gain"):
                expected = np.interp(np.log(at), np.log(lines.index), lines[name])
                assert abs(point[name] - expected) < 4 * point[f"{name}.error"] + 0.03 * expected
    decayed, cut = found["weight_decay"], curve(table, "truncation", row, source="simulation")
    lowest = decayed["rank"].min()
    for _, point in cut[cut["rank"] > lowest].iterrows():
        wrong = lowrank.at_rank(decayed, NOISE[row], point["rank"])
        assert wrong > 1.1 * point[NOISE[row]] + 4 * point[f"{NOISE[row]}.error"]


def test_linear_attention_feels_one_number(table):
    """E' against noise is one curve for all methods; of softmax attention it is not."""
    apart = {}
    for row in ("linear", "softmax"):
        base = curve(table, "weight_decay", row)
        base = base.loc[base[NOISE[row]].idxmin() :]
        gaps = []
        for method in lowrank.METHODS[1:]:
            lines = curve(table, method.name, row)
            inside = lines[lines[NOISE[row]].between(*base[NOISE[row]].iloc[[0, -1]])]
            expected = np.interp(inside[NOISE[row]], base[NOISE[row]], base["test_error"])
            gaps.append(np.abs(inside["test_error"] / expected - 1).max())
        apart[row] = max(gaps)
    assert apart["linear"] < 0.01
    assert apart["softmax"] > 0.1


@pytest.mark.parametrize("row", ["linear", "softmax"])
def test_no_method_beats_the_best_weight_decay(table, row):
    least = {m.name: curve(table, m.name, row)[NOISE[row]].min() for m in lowrank.METHODS}
    best = least.pop("weight_decay")
    assert min(least.values()) > best
    assert min(least.values()) < 1.05 * best


def test_at_a_given_rank_truncation_leaves_least(table):
    for rank in (0.1, 0.2, 0.3):
        noise = {
            name: lowrank.at_rank(curve(table, name, "softmax"), "variance", rank)
            for name in ("truncation", "low_rank_decay", "weight_decay")
        }
        assert noise["truncation"] < 0.97 * noise["low_rank_decay"]
        assert noise["low_rank_decay"] < 0.95 * noise["weight_decay"]
    linear = {
        name: lowrank.at_rank(curve(table, name, "linear"), "delta_eff", 0.33)
        for name in ("truncation", "low_rank_decay", "weight_decay")
    }
    assert linear["truncation"] == pytest.approx(linear["low_rank_decay"], rel=0.02)
    assert linear["weight_decay"] > 1.4 * linear["truncation"]


@pytest.mark.parametrize("row", ["linear", "softmax"])
def test_half_of_the_rank_is_free(table, row):
    lines = curve(table, "truncation", row)
    whole, learned = lines[NOISE[row]].iloc[-1], lines["rank"].iloc[-1]
    assert lowrank.at_rank(lines, NOISE[row], 0.61 * learned) < 1.04 * whole
    size = {"linear": 1.8, "softmax": 1.5}[row]
    assert lowrank.at_rank(lines, NOISE[row], 0.15) == pytest.approx(size * whole, rel=0.03)


def test_reuse_loses_its_advantage_with_the_rank(table):
    fresh, reused = (
        curve(table, "truncation", "linear", kind)["test_error"] for kind in ("fresh", "reused")
    )
    advantage = 1 - reused / fresh
    assert advantage.iloc[-1] == pytest.approx(0.073, abs=0.005)
    assert abs(np.interp(0.08, advantage.index, advantage)) < 0.01


@pytest.mark.parametrize("row", ["linear", "softmax"])
def test_a_polynomial_is_a_weaker_decay_and_a_cap(table, row):
    lines = curve(table, "preconditioned", row)
    noise, top = lines[NOISE[row]], lines[NOISE[row]].iloc[-1]
    assert noise.min() > 0.98 * top
    assert noise.iloc[0] > 1.2 * top
    # and not a lower rank
    assert lines["rank"].min() > 0.95 * lines["rank"].max()
    weak = lowrank.asked(row, lowrank.METHODS[0], "fresh", 0.3 / 3.625**2)
    found = predict(weak, nodes=64).effective_noise
    assert top == pytest.approx(getattr(found, NOISE[row]), rel=0.02)


def test_metrics_order_the_noise(table):
    """OBD < SVD-LLM < SVD on the same tokens, apart by more than the errors of simulations."""
    for rank in (0.1, 0.2):
        noise = [
            lowrank.at_rank(curve(table, name, "metrics", "same"), "delta_eff", rank)
            for name in ("obd", "svd_llm", "svd")
        ]
        assert noise[0] < 0.98 * noise[1]
        assert noise[1] < 0.9 * noise[2]
    points = [
        curve(table, name, "metrics", "same", "simulation") for name in ("obd", "svd_llm", "svd")
    ]
    for better, worse in itertools.pairwise(points):
        assert (better["delta_eff"] < worse["delta_eff"]).all()


# -- the rank of low-rank decay --------------------------------------------------------------------


def theory_at(ranks, name, observable, penalty):
    rows = ranks[(ranks["curve"] == name) & (ranks["source"] == "theory")]
    rows = rows[rows["observable"] == observable].sort_values("pretraining.penalty")
    logs = np.log(rows["pretraining.penalty"])
    return float(np.interp(np.log(penalty), logs, rows["value"]))


def measured(ranks, name, observable, penalty):
    rows = ranks[(ranks["curve"] == name) & (ranks["source"] == "simulation")]
    rows = rows[(rows["observable"] == observable) & (rows["pretraining.penalty"] == penalty)]
    return rows


@pytest.mark.parametrize("penalty", decay.RUNS[1].penalties)
def test_descents_from_order_one_end_on_the_metastable_branch(ranks, penalty):
    for observable in ("learned_rank", "test_error", "objective"):
        value, error = limit(measured(ranks, "order_one", observable, penalty))
        expected = theory_at(ranks, "metastable", observable, penalty)
        assert abs(value - expected) < 4 * error, observable
    if penalty >= 0.1:
        value, error = limit(measured(ranks, "order_one", "learned_rank", penalty))
        assert value - theory_at(ranks, "least", "learned_rank", penalty) > 4 * error


def test_weight_decay_has_its_rank_and_a_finite_replicon(ranks):
    for penalty in decay.RUNS[0].penalties:
        value, error = limit(measured(ranks, "weight_decay", "learned_rank", penalty))
        expected = theory_at(ranks, "weight_decay", "learned_rank", penalty)
        assert abs(value - expected) < 4 * error + 0.01  # eigenvalues near 0 are cut at 1e-3
    replicons = ranks[ranks["source"] == "theory"].groupby("curve")["replicon"]
    assert replicons.max()["weight_decay"] < 0.5
    assert np.isinf(replicons.min()["least"])


def test_small_starts_collapse(ranks):
    for penalty in decay.RUNS[2].penalties:
        (low, small), (high, other) = (
            measured(ranks, name, "learned_rank", penalty).nlargest(1, "dim")[["value", "error"]]
            .iloc[0]
            for name in ("small", "order_one")
        )  # fmt: skip
        assert high - low > 4 * np.hypot(small, other)
        losses = [
            measured(ranks, name, "objective", penalty).nlargest(1, "dim")["value"].iloc[0]
            for name in ("small", "order_one")
        ]
        assert losses[0] > losses[1]


def test_the_lines_are_computed(ranks):
    penalty = 0.8
    values, replicon = decay.metastable(decay.asked("low_rank_decay", penalty))
    least = predict(decay.asked("low_rank_decay", penalty)).pretraining
    assert np.isinf(replicon)
    for observable in decay.OBSERVED[:2]:
        at = theory_at(ranks, "metastable", observable, penalty)
        assert values[observable] == pytest.approx(at, rel=1e-6)
        at = theory_at(ranks, "least", observable, penalty)
        assert getattr(least, observable) == pytest.approx(at, rel=1e-6)
