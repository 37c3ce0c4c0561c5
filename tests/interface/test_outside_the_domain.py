"""Requests outside of a domain: one sentence that says which condition fails and what to change."""

import numpy as np
import pytest

from lora_theory import (
    EffectiveNoise,
    Finetuning,
    Pretraining,
    Problem,
    ProblemError,
    Status,
    Teacher,
    compare,
    continuation,
    finetune,
    measure_noise,
    predict,
    predict_many,
    sample_pretrained,
    simulate,
    spectrum,
    thresholds,
)
from lora_theory.simulation.message_passing import message_passing
from lora_theory.symbolic import wishart_moment, write_latex
from lora_theory.symbolic.expansions import ridge_many_samples, weight_decay_many_samples
from lora_theory.symbolic.thresholds import collapse_at_few_samples, visible_directions

TASK = Finetuning(samples=3.0, penalty=0.2)
ALONE = Problem(
    tokens=2,
    activation="linear",
    teacher_rank=0.5,
    label_noise=0.5,
    pretraining=Pretraining(samples=0.2, penalty=0.02),
)
BOTH = ALONE.replace(finetuning=TASK)
REUSED = BOTH.replace({"finetuning.sequences": "reused"})
LONG = ALONE.replace(tokens=9, activation="softmax")


def tuned(gain=1.0, variance=0.3, Q=1.2, task=TASK):
    noise = EffectiveNoise(gain=gain, variance=variance, Q=Q)
    return finetune(noise, task, tokens=2, activation="linear", nodes=32, blocks=2)


REFUSED = {
    # what is no problem, or several
    "predict": (lambda: predict("x"), ["problem = 'x' must be a Problem"]),
    "predict_many": (lambda: predict_many(ALONE), ["problems = Problem(", "several Problems"]),
    "predict_many of names": (lambda: predict_many(["x"]), ["problem = 'x' must be a Problem"]),
    "spectrum": (lambda: spectrum("x"), ["problem = 'x' must be a Problem"]),
    "thresholds": (lambda: thresholds("x"), ["problem = 'x' must be a Problem"]),
    "continuation": (
        lambda: continuation("x", "label_noise", within=(0.1, 1.0)),
        ["problem = 'x' must be a Problem"],
    ),
    "compare": (lambda: compare("x", 8, 2), ["problem = 'x' must be a Problem"]),
    "dims by name": (lambda: compare(ALONE, "60", 2), ["dim = '60'", "an integer ≥ 4"]),
    # settings
    "nodes": (lambda: predict(ALONE, nodes="64"), ["nodes = '64'", "a power of two ≥ 16"]),
    "nodes of floats": (lambda: predict(ALONE, nodes=64.0), ["nodes = 64.0", "power of two"]),
    "too many nodes": (
        lambda: predict(ALONE, nodes=2**40), ["nodes = 1099511627776 with blocks = 8", "at most"],
    ),
    "too many blocks": (lambda: predict(ALONE, blocks=10**9), ["blocks = 1000000000", "at most"]),
    "blocks": (lambda: predict(ALONE, blocks=2.5), ["blocks = 2.5", "an integer ≥ 2"]),
    "seed": (lambda: predict(ALONE, seed=1.5), ["seed = 1.5", "an integer ≥ 0"]),
    "tolerance": (lambda: predict(ALONE, tolerance="x"), ["tolerance = 'x'", "in (0, 1)"]),
    "tokens": (lambda: predict(LONG), ["tokens = 9", "at most 8"]),
    # the second stage alone
    "no task": (lambda: tuned(task=None), ["finetuning = None must be a Finetuning"]),
    "no noise": (
        lambda: finetune("x", TASK, tokens=2, activation="linear"),
        ["noise = 'x' must be an EffectiveNoise"],
    ),
    "gain": (lambda: tuned(gain=np.inf), ["noise.gain = inf", "must be finite"]),
    "gain by name": (lambda: tuned(gain="1"), ["noise.gain = '1'", "must be finite"]),
    "variance": (lambda: tuned(variance=-0.1), ["noise.variance = -0.1", "≥ 0 and finite"]),
    "no labels": (
        lambda: tuned(variance=0.0, Q=0.0),
        ["noise.variance = 0.0 with noise.gain = 1.0 and noise.Q = 0.0", "must be > 0"],
    ),
    "huge labels": (lambda: tuned(gain=1e200), ["noise.gain = 1e+200", "finite"]),
    "rescaled": (
        lambda: tuned(task=Finetuning(samples=3.0, penalty=0.2, rescaling=2.0)),
        ["finetuning.rescaling = 2.0", "weights as they are used", "it must be 1"],
    ),
    "label_noise": (
        lambda: measure_noise(teacher=np.eye(4), matrix=np.eye(4), label_noise="a"),
        ["label_noise = 'a'", "≥ 0 and finite"],
    ),
    "matrix of words": (
        lambda: measure_noise(teacher="abc", matrix=np.eye(4)), ["teacher", "real numbers"],
    ),
    "complex matrix": (
        lambda: measure_noise(teacher=np.eye(4), matrix=1j * np.eye(4)),
        ["matrix", "real numbers"],
    ),
    "ragged weights": (
        lambda: measure_noise(teacher=np.eye(2), weights=[[1, 2], [3]]),
        ["weights", "real numbers"],
    ),
    "huge matrix": (
        lambda: measure_noise(teacher=np.eye(4), matrix=1e200 * np.eye(4)),
        ["too large", "eigenvalues of order one"],
    ),
    "tiny matrix": (
        lambda: measure_noise(teacher=np.eye(4), matrix=1e-200 * np.eye(4)), ["zero"],
    ),
    # weights without training, message passing, runs
    "merged without LoRA": (
        lambda: spectrum(ALONE, dim=100), ["dim = 100", "without finetuning", "leave it out"],
    ),
    "sampled, long": (lambda: sample_pretrained(LONG, 20), ["tokens = 9", "at most 8"]),
    "sampled runs, long": (
        lambda: simulate(LONG, 20, 1, pretrained="sampled"), ["tokens = 9", "at most 8"],
    ),
    "sampled, index": (lambda: sample_pretrained(ALONE, 8, index=2**32), ["index = 4294967296"]),
    "first run": (lambda: simulate(ALONE, 8, 2, first=2**32 - 1), ["first = 4294967295"]),
    "passing, index": (lambda: message_passing(ALONE, 8, index=2**32), ["index = 4294967296"]),
    "passing, nothing to sample for": (
        lambda: message_passing(BOTH, 20, pretrained="sampled"),
        ['stage = "both"', 'pretrained = "sampled"', '"finetuning"'],
    ),
    "passing, re-used": (
        lambda: message_passing(REUSED, 20, stage="finetuning", pretrained="sampled"),
        ['finetuning.sequences = "reused"', '"fresh"'],
    ),
    "passing, no second stage": (
        lambda: message_passing(ALONE, 20, stage="finetuning"),
        ['stage = "finetuning"', "no finetuning", '"pretraining"'],
    ),
    # symbols
    "order": (lambda: ridge_many_samples(0), ["order = 0", "≥ 1"]),
    "order of a root": (lambda: collapse_at_few_samples(1.5), ["order = 1.5", "≥ 1"]),
    "order beyond": (lambda: weight_decay_many_samples(8), ["order = 8", "from 1 to 7"]),
    "rank": (lambda: wishart_moment(0.0), ["teacher_rank = 0.0", "> 0"]),
    "delta": (lambda: wishart_moment(0.5).value(0.0, 0.1), ["delta = 0.0", "> 0"]),
    "activation": (lambda: visible_directions("relu"), ["activation = 'relu'", '"softmax"']),
    "folder": (lambda: write_latex("/nonexistent/x.tex"), ["path = ", "does not exist"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_outside_its_domain_says_what_fails_and_what_is_allowed(name):
    request, mentioned = REFUSED[name]
    with pytest.raises(ProblemError) as error:
        request()
    assert "\n" not in str(error.value)
    for words in mentioned:
        assert words in str(error.value)


def test_the_same_requests_inside_their_domain_are_answered():
    """The control."""
    assert predict(ALONE, nodes=32, blocks=2).status is Status.CONVERGED
    assert tuned(variance=0.0)[0].overlap > 0.9
    # weights that vanish have no gain: labels of pure noise
    assert tuned(gain=np.nan, variance=0.3, Q=0.0)[0].branch == "informed"
    assert measure_noise(teacher=np.eye(4), weights=np.ones((4, 2))).Q > 0
    assert ridge_many_samples(1)
    assert float(wishart_moment(0.5).value(0.5, 0.1)) > 0


def test_nothing_learnt_is_all_at_zero_and_no_spike_shows():
    asked = ALONE.replace({"teacher.spikes": [3.0], "pretraining.penalty": 1e3})
    learned = spectrum(asked, nodes=32, blocks=2)
    assert learned.status is Status.COLLAPSED
    assert (learned.mass_at_zero, learned.bands, learned.outliers) == (1.0, (), ())
    assert learned.visible_spikes[1] > 3.0
    S, _ = sample_pretrained(asked, 20)
    assert not np.any(S)


def test_a_spike_that_does_not_show_is_below_the_stated_threshold():
    asked = ALONE.replace(teacher=Teacher(spikes=(1.0, 4.0)))
    learned = spectrum(asked, nodes=32, blocks=2)
    assert [outlier.spike for outlier in learned.outliers] == [4.0]
    assert 1.0 < learned.visible_spikes[1] < 4.0
