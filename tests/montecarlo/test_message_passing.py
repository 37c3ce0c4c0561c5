"""Message passing at finite D: against descent, against the equations, against the replicons."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_theory import Finetuning, Pretraining, Problem, ProblemError, simulate
from lora_theory.simulation.data import run_key
from lora_theory.simulation.measure import as_matrix
from lora_theory.simulation.message_passing import message_passing
from lora_theory.simulation.passing import (
    PretrainingSystem,
    State,
    pretraining_growth,
    pretraining_step,
)
from lora_theory.simulation.pretraining import pretraining_data
from lora_theory.simulation.sizes import Sizes
from lora_theory.theory import finetuning as lora
from lora_theory.theory.branches import FinetuningNodes
from lora_theory.theory.nodes import Discretisation
from lora_theory.theory.predict import frozen_weights, pretraining_averages, solve_pretraining
from lora_theory.theory.regularizers import WeightDecay
from lora_theory.theory.roots import solve
from lora_theory.theory.stability import finetuning_stability, pretraining_stability
from lora_theory.theory.weights import Constants, weights_at

SETTINGS = Discretisation(256, 8, 0, 1e-9)


def problem(
    activation="linear", penalty=0.2, samples=3.0, penalty_on_vector=0.2, sequences="reused"
):
    return Problem(
        tokens=2,
        activation=activation,
        teacher_rank=0.5,
        label_noise=0.5,
        pretraining=Pretraining(samples=0.2, penalty=penalty),
        finetuning=Finetuning(samples=samples, penalty=penalty_on_vector, sequences=sequences),
    )


passing = functools.cache(message_passing)

#: A problem on which both stages settle, at the sizes that are small enough for either attention.
STABLE = {"penalty": 0.05, "samples": 4.0}
BOTH = pytest.mark.parametrize(
    ("activation", "dim"),
    [("linear", 60), pytest.param("softmax", 80, marks=pytest.mark.exhaustive)],
)


# -- the same minimum as the descent --------------------------------------------------------------


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("sequences", ["fresh", "reused"])
@pytest.mark.parametrize("activation", ["linear", pytest.param("softmax", marks=pytest.mark.slow)])
def test_fixed_point_is_the_minimum_of_the_descent(activation, sequences, tmp_path):
    asked = problem(activation, sequences=sequences, penalty_on_vector=0.5)
    path = tmp_path / "weights.npz"
    simulate(asked, 60, 1, starts=0, test_sequences=2, gradient_tolerance=1e-8, save=path)
    with np.load(path) as arrays:
        W, w = arrays["W"][0], arrays["w"][0]
    found = passing(asked, 60)
    for stage in (found.pretraining, found.finetuning):
        assert stage.settled
    assert relative(found.pretraining.weights, W @ W.T / np.sqrt(W.size)) < 1e-5
    assert relative(found.finetuning.weights, w) < 1e-5
    # control: other data have another minimum, and few iterations do not find this one
    assert relative(passing(asked, 60, index=1).finetuning.weights, w) > 0.1
    early = passing(asked, 60, iterations=4)
    assert not early.pretraining.settled
    assert relative(early.pretraining.weights, W @ W.T / np.sqrt(W.size)) > 1e-3


def test_weights_may_be_frozen_by_the_descent():
    by_descent = passing(problem(), 60, stage="finetuning")
    assert by_descent.pretraining is None
    both = passing(problem(), 60).finetuning.weights
    assert relative(by_descent.finetuning.weights, both) < 1e-5


def test_weights_may_be_sampled(tmp_path):
    """The minimum of the descent on the same sampled weights."""
    asked, path = problem(sequences="fresh", penalty_on_vector=0.5), tmp_path / "weights.npz"
    how = {"starts": 0, "test_sequences": 2, "gradient_tolerance": 1e-8, "pretrained": "sampled"}
    simulate(asked, 60, 1, save=path, **how)
    with np.load(path) as arrays:
        w = arrays["w"][0]
    found = passing(asked, 60, stage="finetuning", pretrained="sampled")
    assert found.pretraining is None
    assert found.finetuning.settled
    assert relative(found.finetuning.weights, w) < 1e-5
    # control: trained weights leave other fields
    assert relative(passing(asked, 60).finetuning.weights, w) > 0.01


def test_start_and_damping_do_not_move_a_stable_fixed_point():
    informed = passing(problem(), 60).finetuning
    random = passing(problem(), 60, start="random", damping=0.3).finetuning
    assert random.settled
    assert random.iterations != informed.iterations
    w = random.weights * np.sign(random.weights @ informed.weights)
    assert relative(w, informed.weights) < 1e-6


# -- state evolution, iteration by iteration ------------------------------------------------------


def evolved_pretraining(asked, first, count):
    """(Q, M, V) of the iterations from the hats of the first on."""
    with jax.enable_x64(True):
        averages, _ = pretraining_averages(asked.replace(finetuning=None), SETTINGS)
        constants, hats, rows = Constants.of(asked), np.log(first), []
        for _ in range(count):
            rows.append(weights_at(hats, constants).values[:3])
            hats = hats + np.log(1 + averages.at(hats, search=True).mean)
    return np.array(rows)


def frozen(asked):
    with jax.enable_x64(True):
        return frozen_weights(asked, solve_pretraining(asked.replace(finetuning=None), SETTINGS))


def evolved_finetuning(asked, first, count):
    """(q, m, v) of the iterations from the first on."""
    stage, point, rows = asked.finetuning, np.array(first), []
    with jax.enable_x64(True):
        nodes = FinetuningNodes(stage, frozen(asked), asked.tokens, asked.activation, SETTINGS)
        averages = nodes.averages(lora.INFORMED)
        for _ in range(count):
            rows.append(point)
            q, m, v = point
            spread = np.sqrt(max(q - m**2, 1e-20))
            at = averages.at(np.array([np.log(spread), m, np.log(v)]), search=True)
            hats = at.observables.mean(axis=0)[3:6]
            v = 1 / (2 * stage.penalty + hats[2])
            point = np.array([(hats[1] ** 2 + hats[0]) * v**2, hats[1] * v, v])
    return np.array(rows)


def traces(asked, names, dim, seeds, part):
    runs = [getattr(passing(asked, dim, index=index), part).trace for index in range(seeds)]
    return np.array([[run[name][:9] for name in names] for run in runs]).swapaxes(1, 2)


def deviations(runs, expected):
    """Mean over runs less the expected values, in its errors: of scatter, and 1 % for O(1/D)."""
    error = np.hypot(runs.std(axis=0, ddof=1) / np.sqrt(len(runs)), 0.01 * np.abs(expected))
    return np.abs(runs.mean(axis=0) - expected) / error


@BOTH
def test_order_parameters_follow_the_equations_of_pretraining(activation, dim):
    asked = problem(activation, **STABLE)
    runs = traces(asked, ("Q", "M", "V"), dim, 5, "pretraining")
    hats = traces(asked, ("Q_hat", "M_hat", "V_hat"), dim, 5, "pretraining")[:, 0].mean(axis=0)
    expected = evolved_pretraining(asked, hats, 8)
    assert deviations(runs[:, 1:], expected).max() < 5
    # control: the theory of another penalty
    other = evolved_pretraining(problem(activation, penalty=0.15), hats, 8)
    assert deviations(runs[:, 1:], other).max() > 10


@BOTH
def test_order_parameters_follow_the_equations_of_finetuning(activation, dim):
    """Overlap and v: the norm of w has an offset of order 1/√D (docs/theory.md, section 7)."""

    def observed(rows):
        q, m, v = np.moveaxis(rows, -1, 0)
        return np.stack([m / np.sqrt(q), v], axis=-1)

    asked = problem(activation, **STABLE)
    runs = traces(asked, ("q", "m", "v"), dim, 5, "finetuning")
    expected = evolved_finetuning(asked, runs[0, 0], 9)
    assert deviations(observed(runs)[:, 1:], observed(expected)[1:]).max() < 5
    # control: the theory of fewer sequences
    fewer = evolved_finetuning(asked.replace({"finetuning.samples": 1.5}), runs[0, 0], 9)
    assert deviations(observed(runs)[:, 1:], observed(fewer)[1:]).max() > 10


# -- replicons ------------------------------------------------------------------------------------


def replicons(asked):
    """Of both stages, with the informed branch of the second."""
    first = asked.replace(finetuning=None)
    with jax.enable_x64(True):
        averages, _ = pretraining_averages(first, SETTINGS)
        root, constants = solve_pretraining(first, SETTINGS), Constants.of(asked)
        pretraining = pretraining_stability(averages, root, constants, asked.tokens)
        nodes = FinetuningNodes(
            asked.finetuning, frozen(asked), asked.tokens, asked.activation, SETTINGS
        )
        averages = nodes.averages(lora.INFORMED)
        start = np.array([np.log(0.2), 0.9, np.log(0.1)])
        root = solve(averages, start, tolerance=1e-9, relaxation=lora.relaxation)
        return pretraining, finetuning_stability(averages, root, nodes.task)


@BOTH
def test_random_perturbations_grow_by_the_replicon(activation, dim):
    asked = problem(activation, **STABLE)
    stages = zip(("pretraining", "finetuning"), replicons(asked), strict=True)
    for name, theory in stages:
        runs = [getattr(passing(asked, dim, index=index), name) for index in range(5)]
        # at this size single sequences may keep one from settling
        runs = [run for run in runs if run.settled]
        assert len(runs) >= 3
        assert theory.is_stable
        growth = np.array([run.growth.mean for run in runs])
        error = np.hypot(growth.std(ddof=1) / len(runs) ** 0.5, theory.error)
        room = 3 * error + 5 / dim * theory.replicon  # scatter of the data, and O(1/D)
        assert abs(growth.mean() - theory.replicon) < room, name
        # control: half or twice as large, as with a wrong count of the fields
        assert abs(growth.mean() - 2 * theory.replicon) > room
        assert abs(growth.mean() - theory.replicon / 2) > room
        # what the data say of the formula is the same number
        on_data = np.mean([run.replicon for run in runs])
        assert abs(on_data - theory.replicon) < room


def test_perturbations_run_through_the_derivative_of_the_iteration():
    """Linear pre-training, where V and V̂ do not depend on S: finite differences of the step."""
    asked, step = problem(**STABLE), 1e-6
    sizes = Sizes.of(asked, 60)
    with jax.enable_x64(True):
        data = pretraining_data(run_key(0, 0), asked, sizes, np.float64)
        teacher = jnp.asarray(as_matrix(data.teacher))
        parts = data.sequences, data.teacher_fields, teacher, asked.label_noise
        system = PretrainingSystem.of(*parts, WeightDecay(0.05), 60, "linear")
        rng = np.random.default_rng(1)
        force = jnp.asarray(rng.normal(size=system.labels.shape))
        change = rng.normal(size=(2, 60, 60))
        S, dS = jnp.asarray(change + change.swapaxes(1, 2)) / 60**0.5
        dg = jnp.asarray(rng.normal(size=force.shape))

        def moved(sign):
            state = State(S + sign * step * dS, force + sign * step * dg, jnp.ones(()), force)
            return pretraining_step(system, state, "linear")[0]

        up, down = moved(1), moved(-1)
        response = pretraining_step(system, State(S, force, jnp.ones(()), force), "linear")[2]
        weights, forces = pretraining_growth(system, dS, dg, response, "linear")
    for name, found in (("weights", weights), ("force", forces)):
        ends = [np.asarray(getattr(end, name)) for end in (up, down)]
        expected = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_it_does_not_settle_where_the_operator_jumps():
    few = problem("linear", penalty=0.02, samples=0.6, sequences="fresh")
    unstable = replicons(few)[1]
    assert not unstable.is_stable
    assert unstable.jump_mass < -0.02
    runs = [passing(few, 60, index=index).finetuning for index in range(4)]
    assert not any(run.settled for run in runs)
    assert min(run.change[-50:].min() for run in runs) > 1e-3
    # control: the same with more sequences
    more = problem("linear", penalty=0.02, samples=6.0, sequences="fresh")
    assert replicons(more)[1].is_stable
    assert all(passing(more, 60, index=index).finetuning.settled for index in range(4))


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem": "linear"}, "problem = 'linear' must be a Problem"),
        ({"dim": 2}, "dim = 2 is not allowed"),
        ({"stage": "all"}, "stage = 'all' is not allowed: it must be \"both\""),
        ({"start": "zero"}, "start = 'zero' is not allowed"),
        ({"pretrained": "guessed"}, "pretrained = 'guessed' is not allowed: it must be"),
        ({"iterations": 0}, "iterations = 0 is not allowed"),
        ({"damping": 1.0}, "damping = 1.0 is not allowed: it must be >= 0 and < 1"),
        ({"damping": "some"}, "damping = 'some' is not allowed"),
        ({"tolerance": 0.0}, "tolerance = 0.0 is not allowed: it must be > 0 and < 1"),
        ({"seed": -1}, "seed = -1 is not allowed"),
        ({"index": -1}, "index = -1 is not allowed"),
    ],
)
def test_arguments_that_are_not_allowed_are_named(changes, message):
    with pytest.raises(ProblemError) as error:
        message_passing(**({"problem": problem(), "dim": 20} | changes))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_finetuning_alone_needs_a_problem_with_finetuning():
    with pytest.raises(ProblemError, match="no finetuning"):
        message_passing(problem().replace(finetuning=None), 20, stage="finetuning")


def test_results_are_plain_and_repeatable():
    first, again = (message_passing(problem(), 60, iterations=5) for _ in range(2))
    for stage, repeated in (
        (first.pretraining, again.pretraining),
        (first.finetuning, again.finetuning),
    ):
        for array in (stage.weights, stage.change, *stage.trace.values()):
            assert isinstance(array, np.ndarray)
            assert array.dtype == np.float64
        np.testing.assert_array_equal(stage.weights, repeated.weights)
        assert stage.iterations == len(stage.trace["v" if "v" in stage.trace else "V"]) == 5
    longer = passing(problem(), 60).pretraining
    np.testing.assert_array_equal(longer.trace["Q"][:5], first.pretraining.trace["Q"])
