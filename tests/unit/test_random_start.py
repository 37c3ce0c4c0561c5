"""The random-start threshold: the fit, what moves it, what is refused."""

import numpy as np
import pytest
from scipy.special import expit

from lora_theory import (
    Finetuning,
    Pretraining,
    Problem,
    ProblemError,
    random_start_threshold,
    thresholds,
)
from lora_theory.simulation.random_start import RandomStart, _fitted

PROBLEM = Problem(
    tokens=2,
    activation="linear",
    teacher_rank=0.5,
    label_noise=0.1,
    pretraining=Pretraining(samples=1.0, penalty=0.1),
    finetuning=Finetuning(samples=1.0, penalty=0.2),
)


def rows(counts: dict[float, int], runs: int = 16) -> list[RandomStart]:
    return [RandomStart(samples, successes, runs, 0) for samples, successes in counts.items()]


def test_the_fit_finds_the_centre_of_a_logistic_law():
    """z-scores over many draws; taken for another centre, they are far from 0."""
    random, centre, logs = np.random.default_rng(0), 0.3, np.linspace(-0.5, 1.0, 7)
    shares = expit((logs - centre) / 0.25)
    fits = []
    for _ in range(200):
        draw = random.binomial(16, shares)
        fits.append(_fitted(rows(dict(zip(np.exp(logs).tolist(), draw.tolist(), strict=True)))))
    found, errors = np.array(fits).T
    z = (found - centre) / errors
    assert abs(z.mean()) < 0.25
    assert 0.8 < z.std() < 1.2
    assert abs(((found - centre - 0.1) / errors).mean()) > 0.5, "the control is off by 0.1"


@pytest.mark.parametrize(
    ("counts", "value", "error"),
    [
        ({1.0: 0, 2.0: 16}, np.log(2) / 2, np.log(2) / 2),
        ({1.0: 0, 2.0: 5, 4.0: 16}, np.log(2), np.log(2)),
        ({1.0: 5, 4.0: 16}, np.log(2), np.log(2)),
    ],
)
def test_runs_that_separate_give_their_bracket(counts, value, error):
    assert _fitted(rows(counts)) == pytest.approx((value, error))


def test_shares_that_fall_are_no_threshold():
    assert _fitted(rows({1.0: 12, 2.0: 9, 4.0: 8, 8.0: 2})) is None


@pytest.mark.exhaustive
def test_more_label_noise_needs_more_samples():
    """Same seed, same table; the control, ten times the noise, lies clearly higher."""
    found, again, noisy = (
        random_start_threshold(PROBLEM.replace(label_noise=noise), dim=24, seeds=12, seed=3)
        for noise in (0.1, 0.1, 3.0)
    )
    assert found.to_dict() == again.to_dict()
    assert 0.5 < found.value < 2.0
    gap = np.log(noisy.value / found.value)
    assert gap > 2 * np.hypot(found.error / found.value, noisy.error / noisy.value)
    assert [row.samples for row in found.table] == sorted(row.samples for row in found.table)
    assert found.table[0].successes < found.table[-1].successes


@pytest.mark.exhaustive
def test_reused_sequences_bound_the_samples():
    """Two pre-training sequences are all that can be re-used, and leave most of w unseen."""
    changes = {"finetuning.sequences": "reused", "finetuning.samples": 0.025}
    changes |= {"pretraining.samples": 2 / 40**2}
    found = random_start_threshold(PROBLEM.replace(changes), dim=40, seeds=2)
    assert found.value is None
    assert found.error is None
    assert [row.samples for row in found.table] == [1 / 40, 2 / 40]
    assert found.reason.startswith("fewer than half of the random starts succeed")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dim": 8}, "dim = 8 is not allowed: it must be an integer ≥ 16"),
        ({"seeds": 1}, "seeds = 1 is not allowed: it must be an integer ≥ 2"),
        ({"starts": 0}, "starts = 0 is not allowed: it must be an integer ≥ 1"),
        ({"problem": PROBLEM.replace(finetuning=None)}, "finetuning = None is not allowed"),
        ({"problem": 3}, "problem = 3 must be a Problem"),
        ({"pretrained": "given"}, "pretrained = 'given' is not allowed"),
    ],
)
def test_bad_input_is_refused_by_name(changes, text):
    with pytest.raises(ProblemError, match=text.replace("(", r"\(")):
        random_start_threshold(**({"problem": PROBLEM, "dim": 16, "seeds": 2} | changes))


@pytest.mark.parametrize("given", [{"dim": 20}, {"seeds": 4}])
def test_thresholds_takes_dim_and_seeds_together(given):
    ((name, value),) = given.items()
    with pytest.raises(ProblemError, match=f"with {name} = {value}: give both or neither"):
        thresholds(PROBLEM, **given)
