"""The views of the explorer: what their tables hold, what they say, and that they can be drawn."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar

from lora_theory import (
    Compression,
    Covariance,
    Finetuning,
    Pretraining,
    Problem,
    ProblemError,
    Selection,
    optimize,
    predict,
    simulate,
)
from lora_theory.compare import agreements
from lora_theory.explorer import points, views
from lora_theory.explorer.answers import COARSE, FINE, answer, tried
from lora_theory.explorer.draw_curve import draw_curve
from lora_theory.explorer.noise_view import best_rescaling, parts_of
from lora_theory.explorer.stretches import stretches

TASK = Finetuning(samples=3.0, penalty=0.2)
PENALTY, RESCALING = "pretraining.penalty", "finetuning.rescaling"


def problem(**changes) -> Problem:
    given = {
        "tokens": 2, "activation": "linear", "teacher_rank": 0.5, "label_noise": 0.5,
        "pretraining": Pretraining(samples=0.2, penalty=0.02), "finetuning": TASK,
    }  # fmt: skip
    return Problem(**(given | changes))


@pytest.fixture(scope="module")
def runs() -> pd.DataFrame:
    return pd.DataFrame(simulate(problem(), 16, 3).runs)


@pytest.fixture
def quick(monkeypatch):
    """Coarse predictions in the place of fine ones, and fewer points."""
    from lora_theory.explorer import curve_view, noise_view

    for module in (curve_view, noise_view):
        monkeypatch.setattr(module, "FINE", COARSE)
    for name, count in (("_COUNT", 11), ("_SOLVED", 5)):
        monkeypatch.setattr(noise_view, name, count)


def last(generator):
    shown = list(generator)
    assert [one.done for one in shown] == sorted(one.done for one in shown)
    assert shown[-1].done == 1
    figure = shown[-1].draw()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    for one in (shown[0], shown[-1]):
        assert one.caption[0].isupper()
        assert one.caption.endswith((".", ")"))
        assert "nan" not in one.caption
    return shown[-1]


def test_answers_are_predictions_and_kept():
    bare = problem(finetuning=None)
    assert answer(bare) == predict(bare)
    assert answer(bare) is answer(bare, FINE)
    assert answer(bare, COARSE) is answer(bare, COARSE)
    refused = problem(covariance=Covariance(eigenvalues=(0.5, 1.5)), tokens=9)
    with pytest.raises(ProblemError, match="tokens = 9"):
        answer(refused)
    with pytest.raises(ProblemError, match="tokens = 9"):
        answer(refused, COARSE)
    good, bad = (tried(one, COARSE) for one in (bare, refused))
    assert good is answer(bare, COARSE)
    assert "tokens = 9" in str(bad)


def test_a_curve_is_what_predict_says():
    bare = problem(finetuning=None)
    shown = last(views.curve(bare, PENALTY, (0.002, 2.0), points=9))
    theory = shown.table[shown.table["observable"] == "pretraining.test_error"]
    assert len(theory) == 10  # the own value beside the nine
    assert theory.loc[theory["chosen"], "x"].tolist() == [0.02]
    assert (theory["precision"] == "fine").all()
    for x, value in theory[["x", "value"]].to_numpy()[::4]:
        assert value == predict(bare.replace({PENALTY: x})).pretraining.test_error
    assert (theory[PENALTY] == theory["x"]).all()
    np.testing.assert_allclose(np.diff(np.log(theory["x"].drop(theory.index[theory["chosen"]]))),
                               np.log(1000) / 8)  # fmt: skip


def test_coarse_points_come_first_and_are_refined_from_the_own_value(monkeypatch):
    monkeypatch.setattr(points, "FIRST_PATIENCE", 0.0)
    monkeypatch.setattr(points, "PATIENCE", 0.0)
    bare = problem(finetuning=None)
    tables = [one.table for one in views.curve(bare, PENALTY, (0.002, 2.0), points=7)]
    fine = [
        t.loc[(t["precision"] == "fine") & (t["observable"] == "pretraining.test_error"), "x"]
        for t in tables
    ]
    counts = [len(x) for x in fine]
    assert counts == [0] * 4 + list(range(1, 8))
    assert fine[4].tolist() == [0.02]
    figures = [draw_curve(tables[i]) for i in (0, 5)]  # with points to come
    figures[1].draw_without_rendering()
    everywhere = tables[0]["x"].unique()
    for x in fine[4:]:  # without holes
        assert len(everywhere[(everywhere >= x.min()) & (everywhere <= x.max())]) == len(x)


def test_outside_of_the_theory_is_a_gap_with_its_reason(quick):
    truncated = problem(finetuning=None, compression=Compression(rank=0.5))
    shown = last(views.curve(truncated, "compression.rank", (0.3, 1.4), points=4))
    rows = shown.table[shown.table["observable"] == "pretraining.test_error"].set_index("x")
    beyond = rows.index > 1
    assert rows["value"].isna().tolist() == beyond.tolist()
    assert rows.loc[beyond, "status"].str.startswith("refused: compression.rank = 1.").all()
    assert f"{beyond.sum()} points (compression.rank = 1." in shown.caption
    with pytest.raises(ProblemError, match="field of one number"):
        next(views.curve(problem(), "activation", (0, 1)))
    with pytest.raises(ProblemError, match="two numbers that rise"):
        next(views.curve(problem(), PENALTY, (1.0, 0.1)))


def test_measured_problems_that_differ_in_the_field_alone_are_drawn(quick, runs):
    bare = problem(finetuning=None)
    found = agreements(answer(bare, COARSE), {16: runs})
    here = views.Measured(bare.replace({PENALTY: 0.1}), (16,), found)
    elsewhere = views.Measured(bare.replace({PENALTY: 0.1}, label_noise=0.1), (16,), found)
    shown = last(views.curve(bare, PENALTY, (0.01, 1.0), 3, measured=[here, elsewhere]))
    rows = shown.table[shown.table["source"] == "simulation"].set_index("observable")
    assert set(rows.index) == {"pretraining.test_error", "pretraining.overlap"}
    error = runs["pretraining.test_error"]
    assert rows.loc["pretraining.test_error", "value"] == pytest.approx(error.mean())
    assert rows.loc["pretraining.test_error", "error"] == pytest.approx(error.sem())
    assert "D = 16, 3 runs" in shown.caption


def test_the_mismatch_of_reused_sequences_and_none_of_fresh_ones():
    """docs/results/mismatch.md: below the λ of least E', .097 here, and nowhere above."""
    reused = Finetuning(samples=3.0, penalty=0.2, sequences="reused")
    shown = last(views.trajectory(problem(finetuning=reused), PENALTY, (0.005, 0.6), points=5))
    found = [one for one in stretches(shown.table) if one.mismatch and one.decided]
    assert len(found) == 1
    assert found[0].start == 0.005
    assert 0.05 < found[0].end < 0.2
    assert "Mismatch" in shown.caption
    fresh = last(views.trajectory(problem(), PENALTY, (0.005, 0.6), points=5))
    assert not any(one.mismatch and one.decided for one in stretches(fresh.table))
    assert "No mismatch" in fresh.caption
    with pytest.raises(ProblemError, match="a trajectory shows"):
        next(views.trajectory(problem(finetuning=None), PENALTY, (0.1, 1.0)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"inverse_temperature": 1.7},
        {"finetuning": Finetuning(samples=3.0, penalty=0.2, rescaling=0.6)},
        {"compression": Compression(rank=0.2)},
        {"covariance": Covariance(eigenvalues=(0.5, 1.5))},
        {"pretraining": Pretraining(samples=0.2, penalty=9.0)},  # nothing is learned
    ],
)
def test_the_parts_add_up_to_the_effective_noise(changes):
    found = answer(problem(**changes), COARSE)
    parts = parts_of(found)
    total = sum(parts[name][0] for name in ("label_noise", "not_learned", "wrong_scale"))
    assert total == pytest.approx(found.effective_noise.delta_eff, abs=1e-9)
    assert parts["total"][0] == pytest.approx(total, abs=1e-12)
    assert parts["label_noise"][0] == 0.25
    # other rescalings, from the same prediction
    for beta in (0.5, 1.3):
        stage = found.problem.finetuning
        assert stage is not None
        other = answer(found.problem.replace({RESCALING: beta}), COARSE)
        assert parts_of(found, beta)["total"][0] == pytest.approx(
            other.effective_noise.delta_eff, abs=1e-9
        )


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_the_best_rescaling_is_the_minimum(temperature):
    asking = problem(inverse_temperature=temperature).replace({RESCALING: 0.7})

    def noise_at(beta: float) -> float:
        found = predict(asking.replace({RESCALING: beta}), nodes=16, blocks=2)
        delta = found.effective_noise.delta_eff
        assert delta is not None
        return delta

    least = minimize_scalar(noise_at, bounds=(0.3, 2.0), method="bounded", options={"xatol": 1e-6})
    assert best_rescaling(answer(asking, COARSE))[0] == pytest.approx(least.x, abs=1e-4)
    assert abs(best_rescaling(answer(asking, COARSE))[0] - 1) > 0.05  # it is no trivial one


def test_noise_against_penalty_and_rescaling(quick):
    shown = last(views.noise(problem()))
    table = shown.table
    best = table[table["observable"] == "best"].set_index("field")["x"]
    expected = optimize(problem(finetuning=None), [PENALTY], "effective_noise")
    assert best[PENALTY] == pytest.approx(expected.optimum[PENALTY], rel=1e-6)
    for field, low, high in ((PENALTY, 1e-3, 1.0), (RESCALING, 0.5, 1.9)):
        total = table[(table["field"] == field) & (table["observable"] == "total")]
        least = total.loc[total["value"].idxmin(), "x"]
        assert 0.5 < least / best[field] < 2  # up to the spacing
        assert total["x"].min() < low
        assert total["x"].max() > high
    assert (table["observable"] == "finetuning.test_error").any()
    # β* is that of weights without rescaling, and the optimum of the penalty is not known there
    rescaled = problem(finetuning=Finetuning(samples=3.0, penalty=0.2, rescaling=0.7))
    assert "the least of what is shown" in last(views.noise(rescaled)).caption


def test_noise_of_other_training_sequences(quick):
    reused = Finetuning(samples=3.0, penalty=0.2, sequences="reused")
    table = last(views.noise(problem(finetuning=reused))).table
    training = table[(table["observable"] == "training") & (table["field"] == PENALTY)]
    total = table[(table["observable"] == "total") & (table["field"] == PENALTY)]
    both = training.merge(total, on="x")
    assert len(both) == len(total)
    assert (both["value_x"] < both["value_y"]).all()  # docs/theory.md, (4.3)
    noise = answer(problem(finetuning=reused), COARSE).effective_noise
    assert training.loc[training["chosen"], "value"].item() == noise.delta_eff_training
    chosen = Finetuning(samples=3.0, penalty=0.2, selection=Selection(pool=60.0))
    assert (last(views.noise(problem(finetuning=chosen))).table["observable"] == "training").any()


def test_a_map_fills_in_and_names_its_gaps(monkeypatch):
    monkeypatch.setattr(points, "FIRST_PATIENCE", 0.0)
    monkeypatch.setattr(points, "PATIENCE", 0.0)
    narrow = problem(finetuning=None, compression=Compression(rank=0.5))
    axes = (PENALTY, (0.01, 1.0), "compression.rank", (0.2, 1.2))
    shown = list(views.phase_map(narrow, *axes, "effective_noise.variance", points=5))
    waiting = [int(points.pending(one.table).sum()) for one in shown]
    assert waiting == list(range(24, -1, -1))
    first = {(row["x"], row["y"]) for _, row in shown[3].table.iterrows() if row["value"] > 0}
    assert len(first) + sum(shown[3].table["y"] > 1) >= 4
    assert {x for x, _ in first} == {0.01, 1.0}  # corners first
    shown[5].draw().draw_without_rendering()
    end = last(iter(shown))
    refused = end.table["status"].str.startswith("refused")
    assert refused.sum() == 5
    assert (end.table.loc[refused, "y"] > 1).all()
    assert "5 cells (compression.rank = 1.2" in end.caption
    cell = end.table.iloc[7]
    asking = narrow.replace({PENALTY: cell["x"], "compression.rank": cell["y"]})
    assert cell["value"] == answer(asking, COARSE).effective_noise.variance


def test_the_gain_is_negative_where_lora_does_harm():
    """Little data, much noise: E' is above that of the frozen weights."""
    weak = problem(finetuning=Finetuning(samples=0.7, penalty=0.2))
    fields = ("finetuning.samples", (0.7, 6.0), "label_noise", (0.1, 3.0))
    shown = last(views.phase_map(weak, *fields, "gain", points=2))
    table = shown.table.set_index(["x", "y"])["value"]
    found = answer(weak.replace(label_noise=3.0), COARSE).finetuning
    assert found is not None
    assert table[0.7, 3.0] == found.frozen_test_error - found.test_error < 0 < table[6.0, 0.1]
    assert f"in {(table < 0).sum()} of 4 cells" in shown.caption
    for wrong, reason in (
        (lambda: views.phase_map(problem(finetuning=None), *fields, "gain"), "without fine-tuning"),
        (lambda: views.phase_map(weak, *fields[:2], *fields[:2], "gain"), "two different fields"),
        (lambda: views.phase_map(weak, *fields, "loss"), "must be one of"),
    ):
        with pytest.raises(ProblemError, match=reason):
            next(wrong())


def test_the_learned_spectrum_holds_its_moments():
    shown = last(views.learned_spectrum(problem()))
    rows = shown.table.groupby("observable")
    density = rows.get_group("density").sort_values("eigenvalue")
    rank = rows.get_group("rank")["value"].item()
    assert np.trapezoid(density["value"], density["eigenvalue"]) == pytest.approx(rank, abs=1e-3)
    assert rank == pytest.approx(answer(problem()).pretraining.learned_rank, abs=1e-9)
    assert rows.get_group("mass_at_zero")["value"].item() == pytest.approx(1 - rank)
    correlated = problem(covariance=Covariance(eigenvalues=(0.5, 1.5)))
    with pytest.raises(ProblemError, match="covariance is not allowed"):
        next(views.learned_spectrum(correlated))


def test_comparison_is_that_of_compare(runs):
    asking = problem()
    both = {16: runs, 24: runs.select_dtypes("number") * 1.01}
    expected = agreements(answer(asking), both)
    for used in (both, {16: runs}):
        shown = views.comparison(asking, used)
        shown.draw().draw_without_rendering()
        assert shown.done == 1
        judged = shown.table[shown.table["z"].notna()]
        found = agreements(answer(asking), used)
        assert judged["z"].tolist() == [one.z for one in found]
        worst = max(abs(one.z) for one in found if one.z is not None)
        assert f"|z| = {worst:.1f}" in shown.caption
    limits = views.comparison(asking, both).table.query("source == 'limit'")
    assert limits["value"].tolist() == [one.simulation.mean for one in expected]
    assert "offset of finite D" in shown.caption
    with pytest.raises(ProblemError, match="no runs"):
        views.comparison(asking, {})


def test_no_answer_anywhere_is_a_sentence():
    many = problem(tokens=9)
    shown = last(views.trajectory(many, PENALTY, (0.01, 1.0), points=3))
    assert shown.table["value"].isna().all()
    assert "mismatch" not in shown.caption
    assert "left out: 4 points (tokens = 9 is not allowed" in shown.caption
    for view in (views.noise(many), views.learned_spectrum(many)):
        with pytest.raises(ProblemError, match="tokens = 9"):
            next(view)


def test_weights_that_learn_nothing(quick):
    nothing = problem(finetuning=None, pretraining=Pretraining(samples=0.2, penalty=9.0))
    shown = last(views.noise(nothing))
    own = shown.table[shown.table["chosen"] & (shown.table["field"] == PENALTY)]
    values = own.set_index("observable")["value"]
    assert values["wrong_scale"] == 0
    assert values["total"] == pytest.approx(1.5 + 0.25)  # Q0 + Δ/2
    assert "Collapsed" in shown.caption


@pytest.mark.parametrize("field", ["tokens", "pretraining.degree"])
def test_integers_stay_integers(field):
    values = points.grid(field, (1, 5), 25)
    assert all(isinstance(value, int) for value in values)
    assert values == {"tokens": [1, 2, 3, 4, 5], "pretraining.degree": [1, 3, 5]}[field]


def test_every_field_of_a_number_has_a_name():
    fields = [spec.name for spec in Problem.specs() if not spec.text]
    names = [points.named(field) for field in fields]
    assert all(a != b for a, b in itertools.combinations(names, 2))
