"""Compiled equations equal the numerical maps of lora_theory.theory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_theory import Finetuning, Pretraining, Problem
from lora_theory.symbolic import (
    SecondMoment,
    compiled,
    lora_conjugates,
    lora_potential,
    pretraining_potential,
    wishart_moment,
)
from lora_theory.symbolic import (
    notation as n,
)
from lora_theory.symbolic.linear import linear_potential, lora_error
from lora_theory.symbolic.wishart import inverse_transform
from lora_theory.theory import finetuning, pretraining, weights
from lora_theory.theory.errors import Errors, OrderParameters
from lora_theory.theory.spectrum import stieltjes, truncated_second_moment

PROBLEM = Problem(
    tokens=3,
    activation="linear",
    teacher_rank=0.5,
    label_noise=0.4,
    pretraining=Pretraining(samples=0.3, penalty=0.1, rank=0.8),
    finetuning=Finetuning(samples=2.5, penalty=0.15, signal=1.3),
)
CONSTANTS = weights.Constants.of(PROBLEM)
PENALTY = 0.8**0.5 * 0.1
HATS = list(itertools.product((0.02, 0.5), (0.4, 3.0), (0.7, 3.2)))


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


_moment = jax.jit(jax.value_and_grad(truncated_second_moment, argnums=(0, 1)))
_stieltjes = jax.jit(stieltjes)
_weight_side = jax.jit(weights.weight_side)


def package_moment(teacher_rank: float) -> SecondMoment:
    def part(index: int):
        def at(delta, epsilon):
            value, slopes = _moment(float(delta), float(epsilon), teacher_rank)
            return float((value, *slopes)[index])

        return at

    return SecondMoment(*map(part, range(3)))


def close(first, second, rel=1e-12):
    return np.asarray(first, float) == pytest.approx(np.asarray(second, float), rel=rel, abs=1e-300)


def test_weight_side_with_the_moment_of_the_package():
    arguments = (n.Q_hat, n.M_hat, n.V_hat, n.scaled_penalty)
    potential = pretraining_potential()
    symbolic = compiled(
        [*potential.order_equations().values(), potential.weights],
        arguments,
        moment=package_moment(0.5),
    )
    of_package = jax.jit(weights.weight_potential)
    for hats in HATS:
        *order, term = symbolic(*hats, PENALTY)
        assert close(order, _weight_side(*hats, CONSTANTS))
        assert close(term, of_package(*hats, CONSTANTS))


def test_weight_side_with_the_closed_form():
    arguments = (n.Q_hat, n.M_hat, n.V_hat, n.scaled_penalty)
    order = pretraining_potential().order_equations().values()
    symbolic = compiled(order, arguments, moment=wishart_moment(0.5))
    hats = np.array(HATS).T
    expected = np.array([_weight_side(*point, CONSTANTS) for point in HATS]).T
    assert close(symbolic(*hats, PENALTY), expected, rel=1e-11)


@pytest.mark.parametrize("teacher_rank", [0.2, 1.0, 3.0])
def test_closed_form_of_the_moment(teacher_rank):
    """Below the spectrum, in the bulk and in the gap; relative to the size of what cancels."""
    moment, package = wishart_moment(teacher_rank), package_moment(teacher_rank)
    for delta, epsilon in itertools.product((0.1, 0.5, 2.0), (-6.0, -0.3, 0.0, 0.4, 1.1)):
        ours = [float(part(delta, epsilon)) for part in moment]
        theirs = [float(part(delta, epsilon)) for part in package]
        assert ours == pytest.approx(theirs, rel=1e-11, abs=1e-13)
    above = moment.value(0.5, 50.0)
    assert above == pytest.approx(0, abs=1e-9)


def test_inverse_transform_is_the_inverse():
    x = compiled([inverse_transform()], [n.transform, n.delta, n.teacher_rank])
    for point in (-0.5, 0.3, 1.2):
        real, density = _stieltjes(point, 0.6, 0.5)
        assert density > 0
        g = complex(real, -np.pi * density)
        assert x(g, 0.6, 0.5)[0] == pytest.approx(point, abs=1e-12)


def test_linear_output_side():
    hats = linear_potential().conjugate_equations()
    arguments = (n.Q, n.M, n.V, n.alpha, n.tokens, n.label_variance)
    symbolic = compiled(hats.values(), arguments)
    output = jax.jit(pretraining._linear_output, static_argnums=4)
    for Q, M, V in ((1.2, 0.9, 0.3), (0.1, 0.3, 4.0), (1.5, 1.45, 0.01)):
        new = output(jnp.float64(Q), jnp.float64(M), jnp.float64(V), CONSTANTS, 3)
        expected = [part[0] for part in (new.Q_hat, new.M_hat, new.V_hat)]
        assert close(symbolic(Q, M, V, 0.3, 3, 1.7), expected)


AVERAGES = (n.lora_force_square, n.lora_force_noise, n.lora_force_signal, n.norm_slope)


@pytest.mark.parametrize(
    ("s", "gain", "v", "averages"),
    [
        (0.4, 0.7, 0.6, (0.8, -0.5, 0.9, 0.11)),
        (1.1, 0.0, 0.2, (2.0, -1.4, 0.0, -0.2)),
        (0.05, 0.98, 1.3, (0.1, -0.02, 0.4, 0.03)),
    ],
)
def test_lora_equations_at_given_averages(s, gain, v, averages):
    """finetuning._rows: hats, potential and the three residuals, with the averages put in."""
    samples, penalty, signal = 2.5, 0.15, 1.3
    task = finetuning.Task(samples, penalty, signal, 1.7)
    square, noise, star, slope = averages
    output = finetuning._Output(*(jnp.array([entry]) for entry in (*averages[:4], 0.3, 0.21)))
    at = jnp.array([np.log(s), gain, np.log(v)])
    free = np.array([False, False])
    row = np.asarray(finetuning._rows(at, lambda point: output, task, free))[0]
    shown = dict(zip(finetuning.OBSERVABLES, row[3:], strict=True))

    m = gain * signal
    q = s**2 + m**2 / signal
    constants = {n.alpha_prime: samples, n.lora_penalty: penalty, n.signal: signal}
    order = (n.q, n.m, n.v)
    to_hats = compiled(
        [entry.subs(constants) for entry in lora_conjugates().values()], (*order, *AVERAGES)
    )
    hats = to_hats(q, m, v, square, noise, star, slope)
    assert close(hats, [shown["q_hat"], shown["m_hat"], shown["v_hat"]])
    potential = lora_potential()
    to_order = compiled(
        [entry.subs(constants) for entry in potential.order_equations().values()],
        (n.q_hat, n.m_hat, n.v_hat),
    )
    new_q, new_m, new_v = to_order(*hats)
    # the residuals in terms of new order parameters: R = 1/new_v
    expected = [
        (new_q - new_m**2 / signal) * (v / new_v) ** 2 / s**2 - 1,
        new_m / signal * v / new_v - gain,
        1 - v / new_v,
    ]
    assert close(row[:3], expected, rel=1e-10)


def test_lora_potential_at_a_solution():
    """φ as the package writes it, conjugates eliminated, equals φ on the saddle point."""
    samples, penalty, signal, s, gain, v = 2.5, 0.15, 1.3, 0.4, 0.7, 0.6
    m = gain * signal
    q = s**2 + m**2 / signal
    # averages that make (q, m, v) a solution
    q_hat, m_hat, v_hat = s**2 / v**2, gain / v, 1 / v - 2 * penalty
    slope, loss = 0.05, 0.4
    noise = -(v_hat - 2 * samples * slope) * s / samples
    star = (m_hat - m / signal * (v_hat - 2 * samples * slope)) * signal / samples
    averages = (q_hat / samples, noise, star, slope, 0.0, loss)
    output = finetuning._Output(*(jnp.array([entry]) for entry in averages))
    task = finetuning.Task(samples, penalty, signal, 1.7)
    at = jnp.array([np.log(s), gain, np.log(v)])
    row = np.asarray(finetuning._rows(at, lambda point: output, task, np.array([False, False])))[0]
    assert row[:3] == pytest.approx([0, 0, 0], abs=1e-12)
    least = loss + v * averages[0] / 2  # E min = E ℓ + vE‖G‖²/2
    potential = lora_potential()
    value = potential.expression.subs(n.lora_moreau(n.v, n.m, n.q), least).subs(
        {
            n.q: q, n.m: m, n.v: v, n.q_hat: q_hat, n.m_hat: m_hat, n.v_hat: v_hat,
            n.alpha_prime: samples, n.lora_penalty: penalty, n.signal: signal,
        }
    )  # fmt: skip
    shown = dict(zip(finetuning.OBSERVABLES, row[3:], strict=True))
    assert close(shown["potential"], float(value))


def test_linear_errors_of_the_package():
    errors = Errors("linear", 3, 1.7, blocks=1, seed=0)
    at = OrderParameters.same(1.2, 0.9, 0.8, 0.7, 1)
    values = {n.tokens: 3, n.signal: 1.3, n.q: 0.8, n.m: 0.7, n.delta_eff: 1.7 - 1.8 + 1.2}
    assert close(errors.at(at, 1.3), [float(lora_error().subs(values))])


def test_what_has_no_value_is_named():
    weights = pretraining_potential().order_equations()
    with pytest.raises(ValueError, match="J, M_hat, V_hat, scaled_penalty must be"):
        compiled([weights[n.Q]], [n.Q_hat])
