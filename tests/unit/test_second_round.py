"""Two rounds: what they must equal, the moments that are exact, units, refusals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from lora_theory import (
    Finetuning,
    Pretraining,
    Problem,
    ProblemError,
    Selection,
    predict,
    second_round,
    simulate,
    simulate_second_round,
)
from lora_theory.theory.averages import Averages
from lora_theory.theory.nodes import Discretisation
from lora_theory.theory.predict import frozen_weights, solve_pretraining
from lora_theory.theory.roots import refine
from lora_theory.theory.round_equations import OBSERVABLES, _point, _proximal
from lora_theory.theory.second_round import _averages, checked_second

SAME = ("q", "m", "v", "overlap", "test_error", "train_error")
CROSS = Selection(pool=30.0, score="cross_token")


def problem(activation="linear", **changes):
    softmax = activation == "softmax"
    return Problem(
        tokens=2,
        activation=activation,
        teacher_rank=0.5,
        label_noise=0.5,
        pretraining=Pretraining(samples=0.2, penalty=0.05),
        finetuning=Finetuning(
            samples=3.0 if softmax else 1.5, penalty=0.5 if softmax else 0.2, **changes
        ),
    )


def scores(found, expected, names=SAME):
    """Differences in errors of the one that is not shared: both see the same weights."""
    return {
        name: abs(getattr(found, name) - getattr(expected, name))
        / math.hypot(*(one.quadrature_error[name] for one in (found, expected)))
        for name in names
    }


@pytest.mark.parametrize(
    "activation", ["linear", pytest.param("softmax", marks=pytest.mark.exhaustive)]
)
def test_any_second_batch_is_one_round_with_all_sequences(activation):
    first = problem(activation)
    samples = first.finetuning.samples
    found = second_round(first, samples=samples, nodes=256)
    at_once = predict(first.replace({"finetuning.samples": 2 * samples}), nodes=256).finetuning
    assert found.status.is_solved
    assert found.residual < 1e-10
    assert max(scores(found, at_once).values()) < 4.5
    assert abs(found.choice) < 4.5 * found.quadrature_error["choice"]
    assert found.first == predict(first, nodes=256)
    if activation == "linear":  # control: a batch that was chosen by w₁
        chosen = second_round(first, samples=samples, selection=CROSS, nodes=256)
        assert min(scores(chosen, at_once, ["overlap", "test_error"]).values()) > 8


def test_two_choices_by_the_frozen_logits_are_one_from_both_pools():
    first = problem(selection=CROSS)
    found = second_round(first, samples=1.5, selection=CROSS, by="frozen", nodes=256)
    both = {"finetuning.samples": 3.0, "finetuning.selection.pool": 60.0}
    at_once = predict(first.replace(both), nodes=256).finetuning
    assert max(scores(found, at_once).values()) < 4.5
    assert abs(found.choice) < 4.5 * found.quadrature_error["choice"]


@pytest.mark.parametrize(
    "activation", ["linear", pytest.param("softmax", marks=pytest.mark.exhaustive)]
)
def test_moments_at_the_root_are_those_of_a_stationary_fit(activation):
    """(2λ' + 2⟨∂_qℓ⟩)(m₂, p, q₂) = ⟨(χ*, χ₁, χ₂)·G₂⟩ on the nodes; not with ω₁ for χ₁."""
    asked, settings = problem(activation), Discretisation(256, 2, 0, 1e-10)
    found = second_round(asked, samples=1.5, selection=CROSS, nodes=256, blocks=2)
    with jax.enable_x64(True):
        weights = frozen_weights(asked, solve_pretraining(asked.replace(finetuning=None), settings))
        second, first = checked_second(asked, 1.5, CROSS, "current"), found.first.finetuning
        both = _averages(asked, second, "current", first, weights, settings)
        averages = Averages(both.equations, both.chunks[:1], 1)
        log_s = 0.5 * math.log(found.q - found.m**2) - 0.4
        start = np.array([log_s, found.m, 0.5, math.log(found.v), found.choice])
        root = refine(averages, start, tolerance=1e-10)
        assert root.residual < 1e-10

        def moments(chunk, minima):
            at = _point(jnp.asarray(root.unknowns), chunk, 1.0)
            prox, slope = _proximal(at, chunk, None if minima is None else minima[0])
            parts = [chunk.frozen.signal, chunk.first + chunk.push, prox.point, chunk.first]
            rows = [jnp.sum(part * prox.force, axis=0) for part in parts] + [slope]
            return jnp.stack([jnp.mean(chunk.frozen.share * row) for row in rows])[None]

        *sides, wrong, slope = averages.of(moments)[0]
    values = dict(zip(OBSERVABLES, root.observables, strict=True))
    ridge = 2 * asked.finetuning.penalty + 2 * slope
    assert_allclose([ridge * values[name] for name in "mpq"], sides, rtol=1e-8)
    assert abs(ridge * values["p"] / wrong - 1) > 0.02


def test_two_ridges_that_share_a_batch():
    """Tr H₂⁻¹H₁⁻¹/D = v₁v₂/(1 − α₁Ta²v₁v₂/((1 + av₁)(1 + av₂))), behind ĉ of section 3.7."""
    rng, dim, a, both = np.random.default_rng(0), 1500, 0.7, []
    shared, own = (rng.standard_normal((count, dim)) for count in (1800, 2400))
    H_1 = 0.4 * np.eye(dim) + a * shared.T @ shared / dim
    H_2 = H_1 + a * own.T @ own / dim
    both = [np.linalg.inv(H) for H in (H_1, H_2)]
    v_1, v_2 = (np.trace(inverse) / dim for inverse in both)
    measured = np.sum(both[0] * both[1]) / dim
    feedback = shared.shape[0] / dim * a**2 * v_1 * v_2 / ((1 + a * v_1) * (1 + a * v_2))
    assert_allclose(measured, v_1 * v_2 / (1 - feedback), rtol=5e-3)
    assert abs(measured / (v_1 * v_2) - 1) > 0.1


def test_temperatures_are_units():
    hot = problem().replace({"inverse_temperature": 2.0, "teacher.inverse_temperature": 1.5})
    plain = problem().replace(
        {
            "pretraining.penalty": 0.05 / 2,
            "finetuning.penalty": 0.2 / 2,
            "finetuning.signal": 1.5,
            "label_noise": 0.5 * 1.5**2,
            "teacher.law": "eigenvalues",
            "teacher_rank": None,
            "teacher.eigenvalues": (1.5, -0.75),
        }
    )
    hot = hot.replace(
        {"teacher.law": "eigenvalues", "teacher_rank": None, "teacher.eigenvalues": (1.0, -0.5)}
    )
    asked = {"samples": 1.5, "selection": CROSS, "nodes": 256, "blocks": 2}
    one, other = (second_round(case, **asked) for case in (hot, plain))
    factors = {"q": 2.0, "v": 2.0, "p": 2.0, "m": math.sqrt(3.0)}
    for name in ("q", "m", "v", "p", "choice", "overlap", "test_error", "train_error"):
        assert_allclose(
            getattr(one, name) * factors.get(name, 1.0), getattr(other, name), rtol=1e-6
        )


BAD = {
    "problem": (lambda ask: ask("x"), "problem = 'x' must be a Problem"),
    "stage": (lambda ask: ask(problem().replace(finetuning=None)), "must have a first one"),
    "reused": (
        lambda ask: ask(problem(sequences="reused")), 'finetuning, with sequences = "fresh"',
    ),
    "by": (lambda ask: ask(problem(), by="labels"), "by = 'labels' is not allowed: it must be"),
    "samples": (lambda ask: ask(problem(), samples=-1), "finetuning.samples = -1 is not allowed"),
    "pool": (
        lambda ask: ask(problem(), samples=31, selection=CROSS),
        "of the second round, finetuning.selection.pool = 30.0 is not allowed with",
    ),
    "score": (
        lambda ask: ask(problem(), selection=Selection(pool=9.0, score=lambda h: h[:, 0])),
        "of the second round, finetuning.selection.score = <lambda> is not allowed: for logits",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_second_rounds_are_refused_by_name(case):
    call, words = BAD[case]
    for function, own in ((second_round, {"nodes": 32}), (simulate_second_round, {"dim": 16})):

        def ask(asked, function=function, own=own, **changes):
            rest = {"seeds": 1} if "dim" in own else {}
            return function(asked, **{"samples": 1.5} | own | rest | changes)

        with pytest.raises(ProblemError) as caught:
            call(ask)
        assert words in str(caught.value)


def test_a_first_round_that_has_not_found_the_task_is_refused():
    with pytest.raises(ProblemError, match=r"samples = 0.2 is not allowed in the first of two"):
        second_round(
            problem().replace({"finetuning.samples": 0.2}), samples=1.5, nodes=256, blocks=2
        )


def test_a_pool_beyond_memory_is_refused():
    with pytest.raises(ProblemError, match="in the theory of score = 'cross_token'"):
        second_round(
            problem(), samples=1.5, selection=Selection(pool=1e9, score="cross_token"), nodes=256
        )


@pytest.mark.slow
def test_a_run_is_that_of_simulate_up_to_its_second_batch():
    asked, sampled = problem(), {"pretrained": "sampled", "test_sequences": 200}
    found = simulate_second_round(asked, 24, 2, samples=1.5, selection=CROSS, **sampled)
    alone = simulate(asked, 24, 2, starts=0, **sampled)
    assert found.first.finetuning == alone.finetuning
    any_taken = simulate_second_round(asked, 24, 2, samples=1.5, **sampled)
    assert any_taken.first.finetuning == alone.finetuning
    assert any_taken.second.overlap != found.second.overlap
