"""LoRA on fresh sequences is the same for all pre-trainings of one effective noise."""

import math
from pathlib import Path

import collapse
import numpy as np
import pandas as pd
import pytest
from figure_tools import Profile
from scipy import stats

from lora_theory import EffectiveNoise, Finetuning, finetune, predict

SEEN = ("test_error", "overlap", "q", "m", "v", "potential")
#: What is asked of curves that are to be one, where the same nodes serve both.
SAME = 1e-6
FEW = Profile("quick", nodes=64, blocks=8, points=0, dim=0, seeds=0)
LAWS = {
    "Wishart, weight decay": {},
    "Wishart, Frobenius": {"pretraining.regularizer": "frobenius"},
    "Gaussian, Frobenius": {
        "pretraining.regularizer": "frobenius", "teacher.law": "goe", "teacher_rank": None,
    },
}  # fmt: skip


def drawn(rng, law):
    """A random pre-training of this law of teacher and penalty."""
    fields = {
        "teacher_rank": rng.uniform(0.1, 1.0),
        "label_noise": rng.uniform(0.2, 1.0),
        "pretraining.samples": math.exp(rng.uniform(math.log(0.1), 0.0)),
        "pretraining.penalty": math.exp(rng.uniform(math.log(0.02), math.log(0.3))),
    }
    return collapse.STANDARD.replace(fields | LAWS[law])


#: Quadrature errors, of blocks, between curves that are not one; by chance with p = 1 %.
APART = stats.t(FEW.blocks - 1).isf(0.005)


def most_by_chance():
    """Mean + 4 standard deviations of χ² if simulation and theory agree.

    Every point is a t-variable; its degrees of freedom are at least those of the D with the fewest
    seeds.
    """
    levels = {level: name for name, part in collapse.SIMULATED.items() for level in part}
    fewest = [min(collapse.SEEDS[levels[level]]["full"].values()) - 1 for level in collapse.LEVELS]
    squares = stats.f(1, np.repeat(fewest, len(collapse.NAMES)))
    return squares.mean().sum() + 4 * math.sqrt(squares.var().sum())


def off(one, other, name):
    """Difference of two predictions in quadrature errors."""
    error = math.hypot(*(stage.quadrature_error[name] for stage in (one, other)))
    return abs(getattr(one, name) - getattr(other, name)) / error


@pytest.mark.parametrize("seed", [0, 1])
def test_linear_random_pairs_of_equal_effective_noise_have_one_curve(seed):
    """The second is rescaled to the Δ_eff of the first, which is above the least it can have."""
    rng = np.random.default_rng(seed)
    pair = [drawn(rng, law) for law in rng.permutation(list(LAWS))[:2]]
    pair.sort(key=lambda p: -collapse.Summary.of(p, FEW).to_dict()["delta_eff"])
    first, second = (collapse.Summary.of(problem, FEW) for problem in pair)
    target, noise = first.to_dict()["delta_eff"], second.to_dict()
    sign = rng.choice([-1, 1])
    beta = noise["gain"] + sign * math.sqrt((target - noise["variance"]) / second.Q)
    task = {"finetuning.samples": rng.uniform(3, 10), "finetuning.rescaling": beta}
    changes = {
        "matched": task,
        "not rescaled": task | {"finetuning.rescaling": 1.0},
        "re-used": task | collapse.REUSED,
    }
    one = predict(pair[0].replace(task | {"finetuning.rescaling": 1.0}), nodes=256)
    others = {name: predict(pair[1].replace(c), nodes=256) for name, c in changes.items()}
    assert pytest.approx(second.Q, rel=0.02) != one.pretraining.Q  # another pre-training
    for name in SEEN:
        value = getattr(one.finetuning, name)
        found = {key: getattr(other.finetuning, name) for key, other in others.items()}
        assert found["matched"] == pytest.approx(value, rel=SAME), name
    for name in ("test_error", "overlap"):
        assert off(one.finetuning, others["not rescaled"].finetuning, name) > APART, name
        value, control = (getattr(p.finetuning, name) for p in (one, others["re-used"]))
        assert abs(control / value - 1) > 100 * SAME, name


@pytest.mark.slow
def test_softmax_of_equal_gain_and_variance_has_one_curve_and_of_equal_delta_eff_not():
    task = Finetuning(samples=5.5, penalty=0.5)
    found = {}
    for name in ("A", "C", "other gain"):
        summary = collapse.family("softmax", name, FEW)[1].to_dict()
        noise = EffectiveNoise(**{key: summary[key] for key in ("gain", "variance", "Q")})
        found[name] = summary, finetune(
            noise, task, tokens=2, activation="softmax", nodes=512
        )[0]  # fmt: skip
    (first, one), (_, same), (control, other) = found.values()
    for name in SEEN:
        assert getattr(same, name) == pytest.approx(getattr(one, name), rel=SAME), name
    assert control["delta_eff"] == pytest.approx(first["delta_eff"], rel=1e-7)
    for name in ("test_error", "overlap"):
        assert off(one, other, name) > APART, name


@pytest.fixture(scope="module")
def table():
    return pd.read_csv(Path(__file__).resolve().parents[2] / "figures" / "collapse.csv")


@pytest.mark.parametrize("activation", collapse.ACTIVATIONS)
@pytest.mark.parametrize("observable", collapse.LABELS)
def test_simulations_of_all_families_are_on_the_one_line_and_off_those_of_controls(
    table, activation, observable
):
    """Also against the line of A alone, and the controls each on a line of its own."""
    own, count = collapse.chi_square(table, activation, observable)
    one = collapse.chi_square(table, activation, observable, "A")[0]
    assert count == len(collapse.NAMES) * len(collapse.LEVELS)
    assert max(own, one) < most_by_chance()
    for control in collapse.CONTROLS[activation]:
        assert collapse.chi_square(table, activation, observable, control)[0] > most_by_chance(), (
            control
        )


@pytest.mark.parametrize("name", ["C", "F"])
def test_the_table_of_linear_attention_is_that_of_the_theory(table, name):
    """Of the stored fields; the curves of all families coincide."""
    asked, _ = collapse.family("linear", name, FEW)
    prediction = predict(asked.replace({collapse.SEQUENCES: 5.2}), nodes=512)
    for observable in collapse.LABELS:
        stored = collapse.pick(table, "linear", name, observable).loc[5.2, "value"]
        assert getattr(prediction.finetuning, observable) == pytest.approx(stored, rel=SAME)
        assert collapse.spread(table, "linear", observable) < SAME


def test_softmax_curves_coincide_within_their_quadrature_error(table):
    for observable in collapse.LABELS:
        first = collapse.pick(table, "softmax", "A", observable)
        for name in collapse.NAMES:
            rows = collapse.pick(table, "softmax", name, observable)
            assert (abs(rows["value"] - first["value"]) < first["error"]).all()
        for name in collapse.CONTROLS["softmax"]:
            rows = collapse.pick(table, "softmax", name, observable)
            assert (abs(rows["value"] - first["value"]) > APART * first["error"]).all()
