"""Saddle points by differentiation against the equations of docs/theory.md, sections 2 and 3."""

import pytest
import sympy as sp

from lora_theory.symbolic import (
    lora_conjugates,
    lora_potential,
    pretraining_conjugates,
    pretraining_potential,
)
from lora_theory.symbolic import (
    notation as n,
)
from lora_theory.symbolic.linear import linear_potential, training_error
from lora_theory.symbolic.moments import gaussian_mean
from lora_theory.symbolic.potentials import frobenius_weights
from lora_theory.symbolic.ridge import saddle_point

DELTA, EPSILON = sp.sqrt(n.Q_hat) / n.M_hat, 2 * n.scaled_penalty / n.M_hat
J, BY_DELTA, BY_EPSILON = (f(DELTA, EPSILON) for f in (n.J, n.J_delta, n.J_epsilon))
STIFFNESS = 2 * n.lora_penalty + n.v_hat

ORDER = {
    "weight decay": (
        pretraining_potential(),
        {
            n.Q: (n.M_hat / n.V_hat) ** 2 * J,
            n.M: n.M_hat / n.V_hat * J
            - sp.sqrt(n.Q_hat) / (2 * n.V_hat) * BY_DELTA
            - n.scaled_penalty / n.V_hat * BY_EPSILON,
            n.V: n.M_hat * BY_DELTA / (2 * sp.sqrt(n.Q_hat) * n.V_hat),
        },
    ),
    "Frobenius": (
        pretraining_potential(weights=frobenius_weights()),
        {
            n.Q: (n.M_hat**2 * n.teacher_norm + n.Q_hat) / (n.V_hat + 2 * n.penalty) ** 2,
            n.M: n.M_hat * n.teacher_norm / (n.V_hat + 2 * n.penalty),
            n.V: 1 / (n.V_hat + 2 * n.penalty),
        },
    ),
    "LoRA": (
        lora_potential(),
        {
            n.q: (n.signal * n.m_hat**2 + n.q_hat) / STIFFNESS**2,
            n.m: n.signal * n.m_hat / STIFFNESS,
            n.v: 1 / STIFFNESS,
        },
    ),
}


def same(first, second) -> bool:
    assert first.keys() == second.keys()
    return all(sp.simplify(first[symbol] - second[symbol]) == 0 for symbol in first)


@pytest.mark.parametrize("name", ORDER)
def test_order_parameters_are_those_of_the_theory(name):
    potential, expected = ORDER[name]
    assert same(potential.order_equations(), expected)


@pytest.mark.parametrize("name", ORDER)
def test_all_six_slopes_vanish_on_the_equations(name):
    potential, _ = ORDER[name]
    for equations in (potential.conjugate_equations(), potential.order_equations()):
        wrong = {key: 2 * entry for key, entry in equations.items()}
        for symbol in {*potential.order, *potential.conjugates} - equations.keys():
            slope = potential.expression.diff(symbol)
            assert sp.simplify(slope.subs(equations)) == 0
            assert sp.simplify(slope.subs(wrong)) != 0


# -- conjugates as averages ------------------------------------------------------------------------

SPREAD, LORA_SPREAD = sp.sqrt(n.Q - n.M**2 / n.label_variance), sp.sqrt(n.q - n.m**2 / n.signal)


def test_pretraining_conjugates_are_the_weighted_forms():
    V_hat = -2 * n.alpha / SPREAD * n.force_noise
    assert same(
        pretraining_conjugates(),
        {
            n.Q_hat: 2 * n.alpha * n.force_square,
            n.M_hat: (2 * n.alpha * n.force_label + n.M * V_hat) / n.label_variance,
            n.V_hat: V_hat,
        },
    )


def test_lora_conjugates_are_the_weighted_forms_with_the_centring():
    response = -n.alpha_prime / LORA_SPREAD * n.lora_force_noise
    assert same(
        lora_conjugates(),
        {
            n.q_hat: n.alpha_prime * n.lora_force_square,
            n.m_hat: (n.alpha_prime * n.lora_force_signal + n.m * response) / n.signal,
            n.v_hat: response + 2 * n.alpha_prime * n.norm_slope,
        },
    )


def test_weighted_forms_in_terms_of_the_fields():
    """−2αE G·(Q_y z − M z^y)/(Q_y Q − M²), with z^y or with the noiseless z* and Q0."""
    hats, y, zero = pretraining_conjugates(), n.label_variance, n.teacher_norm
    force_field = n.M / y * n.force_label + SPREAD * n.force_noise  # E G·z
    # G depends on z* through z^y and z only: E[z*|z^y, z], Cov(z*, z^y) = Q0, Cov(z*, z) = M
    share = sp.Matrix([[y, n.M], [n.M, n.Q]]).inv() * sp.Matrix([zero, n.M])
    force_star = share[0] * n.force_label + share[1] * force_field
    for variance, force in ((y, n.force_label), (zero, force_star)):
        scale = 2 * n.alpha / (variance * n.Q - n.M**2)
        V_hat = -scale * (variance * force_field - n.M * force)
        M_hat = scale * (n.Q * force - n.M * force_field)
        assert sp.simplify(hats[n.V_hat] - V_hat) == 0
        assert sp.simplify(hats[n.M_hat] - M_hat) == 0


def test_lora_forms_in_terms_of_the_fields():
    hats = lora_conjugates()
    force_omega = n.m / n.signal * n.lora_force_signal + LORA_SPREAD * n.lora_force_noise
    scale = n.alpha_prime / (n.signal * n.q - n.m**2)
    response = -scale * (n.signal * force_omega - n.m * n.lora_force_signal)
    m_hat = scale * (n.q * n.lora_force_signal - n.m * force_omega)
    assert sp.simplify(hats[n.m_hat] - m_hat) == 0
    assert sp.simplify(hats[n.v_hat] - response - 2 * n.alpha_prime * n.norm_slope) == 0


def test_linear_conjugates_by_averages_of_the_force():
    """(2.5) for the Gaussian force (z^y − z)/(V + T²/4), and (2.6), against ∂𝓜 in closed form."""
    label, g = sp.symbols("label g")
    law = {(label, label): n.label_variance, (g, g): sp.Integer(1)}
    z = n.M / n.label_variance * label + SPREAD * g
    stiff, fields = n.V + n.tokens**2 / 4, n.tokens * (n.tokens + 1) / 2
    force = (label - z) / stiff
    averages = {
        n.force_square: fields * gaussian_mean(force**2, law),
        n.force_noise: fields * gaussian_mean(force * g, law),
        n.force_label: fields * gaussian_mean(force * label, law),
    }
    hats = {key: entry.subs(averages) for key, entry in pretraining_conjugates().items()}
    closed = linear_potential().conjugate_equations()
    assert same(hats, closed)
    assert same(
        closed,
        {
            n.Q_hat: n.alpha * 2 * fields * (n.label_variance - 2 * n.M + n.Q) / stiff**2,
            n.M_hat: n.alpha * 2 * fields / stiff,
            n.V_hat: n.alpha * 2 * fields / stiff,
        },
    )
    stein = 2 * n.alpha / n.V * fields * (1 - (n.tokens**2 / 4) / stiff)
    assert sp.simplify(closed[n.V_hat] - stein) == 0


# -- value at the solution -------------------------------------------------------------------------


def test_pretraining_potential_is_the_training_loss():
    """Φ = αEℓ + λ̃∫s with ∫s = −(M̂/2V̂)∂_εJ: conjugate terms cancel, whatever J is."""
    potential, loss = linear_potential(), sp.Symbol("loss")
    # α𝓜 = αEℓ + αE‖u − z‖²/2V and the last is VQ̂/4
    value = potential.coupling + n.alpha * loss + n.V * n.Q_hat / 4 - potential.weights
    trace = -n.M_hat / (2 * n.V_hat) * BY_EPSILON
    value = value.subs(potential.order_equations())
    assert sp.simplify(value - n.alpha * loss - n.scaled_penalty * trace) == 0
    hats = potential.conjugate_equations()
    eff = {n.delta_eff: n.label_variance - 2 * n.M + n.Q}
    split = potential.output - n.alpha * training_error().subs(eff) - n.V * hats[n.Q_hat] / 4
    assert sp.simplify(split) == 0


def test_frobenius_potential_is_the_training_loss():
    """Φ = αEℓ + (λ/2)Q."""
    potential, loss = linear_potential(weights=frobenius_weights()), sp.Symbol("loss")
    value = potential.coupling + n.alpha * loss + n.V * n.Q_hat / 4 - potential.weights
    value = (value - n.alpha * loss - n.penalty / 2 * n.Q).subs(potential.order_equations())
    assert sp.simplify(value) == 0
    assert set(saddle_point()) == {n.Q, n.M, n.V, n.Q_hat, n.M_hat, n.V_hat}


def test_lora_potential_is_the_training_loss():
    """φ = α'Eℓ + λ'q, with α'E‖χ − ω‖²/2v = vq̂/2."""
    potential, loss = lora_potential(), sp.Symbol("loss")
    value = potential.coupling + n.alpha_prime * loss + n.v * n.q_hat / 2 - potential.weights
    value = value.subs(potential.order_equations()) - n.alpha_prime * loss
    q = potential.order_equations()[n.q]
    assert sp.simplify(value - n.lora_penalty * q) == 0
