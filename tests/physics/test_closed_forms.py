"""Closed forms and limits that the solved equations must reproduce (docs/theory.md, 2.5 and 4)."""

import jax
import numpy as np
import pytest
from scipy.optimize import fsolve

from lora_theory import Finetuning, Pretraining, Problem, ProblemError, Status, predict
from lora_theory.theory.spectrum import truncated_second_moment

BASE = Problem(
    tokens=2,
    activation="linear",
    teacher_rank=0.5,
    label_noise=0.5,
    pretraining=Pretraining(samples=0.2, penalty=0.1),
    finetuning=Finetuning(samples=3.0, penalty=0.2),
)
Q0 = 1.5


def solved(**changes):
    return predict(BASE.replace(changes), nodes=256)


def J(delta, epsilon, teacher_rank=0.5):
    """J and its derivatives in δ and ε."""
    with jax.enable_x64(True):
        value, slopes = jax.value_and_grad(truncated_second_moment, argnums=(0, 1))(
            float(delta), float(epsilon), teacher_rank
        )
        return float(value), float(slopes[0]), float(slopes[1])


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("sequences", ["fresh", "reused"])
def test_linear_errors_are_the_effective_noise_and_the_order_parameters(tokens, sequences):
    answer = solved(tokens=tokens, **{"finetuning.sequences": sequences, "finetuning.signal": 2.0})
    first, noise, lora = answer.pretraining, answer.effective_noise, answer.finetuning
    shape = (tokens + 1) / tokens
    delta = 0.25 + Q0 - 2 * first.M + first.Q
    shrink = (1 + 4 * first.V / tokens**2) ** 2
    assert noise.delta_eff == pytest.approx(delta)
    training = delta / shrink if sequences == "reused" else delta
    assert noise.delta_eff_training == pytest.approx(training)
    assert first.test_error == pytest.approx(shape * delta)
    assert first.train_error == pytest.approx(shape * delta / shrink)
    assert lora.test_error == pytest.approx(shape * (delta + 4 + lora.q**2 - 2 * lora.m**2))
    assert lora.frozen_test_error == pytest.approx(shape * (delta + 4))


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_linear_pretraining_solves_one_equation_in_delta(tokens):
    first, noise = (a := solved(tokens=tokens)).pretraining, a.effective_noise
    T, delta = tokens, np.sqrt(first.Q_hat) / first.M_hat
    assert pytest.approx(noise.delta_eff / (T * (T + 1) * delta**2)) == 0.2
    assert first.M_hat == pytest.approx(0.2 * T * (T + 1) / (first.V + T**2 / 4))
    value, slope, _ = J(delta, 0.2 / first.M_hat)
    assert pytest.approx((first.M_hat / first.V_hat) ** 2 * value) == first.Q
    assert pytest.approx(slope / (2 * delta * first.V_hat)) == first.V


@pytest.mark.parametrize("activation", ["linear", pytest.param("softmax", marks=pytest.mark.slow)])
def test_the_potential_is_the_training_loss_with_its_penalty(activation):
    answer = predict(BASE.replace(activation=activation), nodes=128)
    lora = answer.finetuning
    loss = 3.0 * lora.train_error + 0.2 * lora.q
    assert lora.potential == pytest.approx(loss, rel=1e-8)


def ridgeless(samples, channels, label_variance):
    """Q, M of the limit λ → 0⁺ below interpolation, from (2.15): equations in δ and ε alone."""

    def equations(x):
        delta, epsilon = np.exp(x)
        value, in_delta, in_epsilon = J(delta, epsilon)
        M = value - delta / 2 * in_delta - epsilon / 2 * in_epsilon
        noise = label_variance - 2 * M + value
        first = in_delta / (2 * delta) - samples * channels
        return [first, delta**2 * samples * channels - noise]

    delta, epsilon = np.exp(fsolve(equations, np.log([1.7, 1.1]), xtol=1e-12))
    value, in_delta, in_epsilon = J(delta, epsilon)
    return value, value - delta / 2 * in_delta - epsilon / 2 * in_epsilon


def test_the_ridgeless_reference_is_that_of_the_theory():
    assert ridgeless(0.1, 4, Q0 + 0.25) == pytest.approx((1.46520, 1.03738), abs=2e-5)


@pytest.mark.parametrize(
    ("activation", "channels"), [("linear", 6), pytest.param("softmax", 4, marks=pytest.mark.slow)]
)
def test_vanishing_penalty_below_interpolation_reaches_the_ridgeless_limit(activation, channels):
    Q, M = ridgeless(0.08, channels, Q0 + 0.25)
    distances = []
    for penalty in (1e-4, 1e-5, 1e-6):
        problem = BASE.replace({"pretraining.samples": 0.08, "pretraining.penalty": penalty})
        first = predict(problem.replace(activation=activation, finetuning=None)).pretraining
        assert first.status.is_solved
        distances.append(max(abs(first.Q - Q), abs(first.M - M)))
    assert distances[2] < distances[1] < distances[0]
    assert distances[2] < 0.02


def test_many_sequences_recover_the_teacher():
    many = solved(**{"pretraining.samples": 400.0}).pretraining
    more = solved(**{"pretraining.samples": 4000.0}).pretraining
    assert many.overlap > 0.999
    assert more.overlap > many.overlap
    assert pytest.approx((Q0, Q0), rel=2e-3) == (more.Q, more.M)
    assert more.test_error == pytest.approx(1.5 * 0.25, rel=2e-3)  # the label noise alone


def test_many_finetuning_sequences_recover_the_task():
    few, many = (solved(**{"finetuning.samples": n}).finetuning for n in (3.0, 300.0))
    assert few.overlap < many.overlap
    assert many.overlap > 0.9998
    assert many.m == pytest.approx(1.0, abs=2e-3)


def test_strong_penalty_on_lora_leaves_the_frozen_layer():
    errors = []
    for penalty in (1.0, 10.0, 100.0, 1000.0):
        lora = solved(**{"finetuning.penalty": penalty}).finetuning
        errors.append(abs(lora.test_error - lora.frozen_test_error))
    assert errors[-1] < 1e-3
    assert errors[0] > 0.5


def test_strong_penalty_on_the_weights_collapses_them():
    answer = solved(**{"pretraining.penalty": 10.0})
    assert answer.status is Status.COLLAPSED
    assert (answer.pretraining.Q, answer.pretraining.learned_rank) == (0.0, 0.0)
    assert answer.pretraining.test_error == pytest.approx(1.5 * (Q0 + 0.25))
    assert np.isnan(answer.effective_noise.gain)


def test_no_noise_and_much_data_leave_no_error():
    answer = solved(label_noise=0.0, **{"pretraining.samples": 50.0, "pretraining.penalty": 1e-4})
    assert answer.pretraining.test_error < 1e-5
    assert answer.finetuning.test_error < 1.1 * answer.finetuning.frozen_test_error
    assert answer.finetuning.overlap > 0.999


def test_a_weak_signal_is_not_found():
    weak = solved(**{"finetuning.signal": 0.01, "finetuning.penalty": 1.0}).finetuning
    assert weak.branch != "informed"
    assert solved(**{"finetuning.signal": 1.0}).finetuning.branch == "informed"


def test_width_and_penalty_enter_through_the_scaled_penalty():
    one = solved(**{"pretraining.rank": 1.0, "pretraining.penalty": 0.1})
    other = solved(**{"pretraining.rank": 4.0, "pretraining.penalty": 0.05})
    for name in ("Q", "M", "V", "test_error", "potential"):
        assert getattr(one.pretraining, name) == pytest.approx(getattr(other.pretraining, name))


def test_a_width_below_the_learned_rank_is_refused():
    with pytest.raises(ProblemError, match=r"pretraining.rank = 0.1 .* at least 0\.619"):
        solved(**{"pretraining.rank": 0.1})


def test_less_penalty_lowers_the_training_noise_and_raises_the_error_on_reused_sequences():
    less, more = (
        solved(**{"finetuning.sequences": "reused", "pretraining.penalty": p}) for p in (0.02, 0.2)
    )
    assert less.effective_noise.delta_eff_training < more.effective_noise.delta_eff_training
    assert less.effective_noise.delta_eff > more.effective_noise.delta_eff
    assert less.finetuning.overlap > more.finetuning.overlap + 0.002
    assert less.finetuning.test_error > more.finetuning.test_error + 0.02


def test_branches_are_ordered_by_potential_and_the_first_is_reported():
    answer = solved()
    names = [branch.branch for branch in answer.branches]
    assert names == ["informed", "uninformed"]
    assert answer.branches[0].potential < answer.branches[1].potential
    assert answer.finetuning is answer.branches[0]
