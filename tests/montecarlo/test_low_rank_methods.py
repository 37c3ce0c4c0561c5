"""Truncated, decayed and preconditioned weights, really trained, against the theory."""

import jax
import numpy as np
import pandas as pd
import pytest

from lora_theory import Compression, Finetuning, Pretraining, Problem, predict, simulate
from lora_theory.attention import attention
from lora_theory.compare import extrapolate
from lora_theory.observables import Estimate
from lora_theory.simulation.compression import compressed
from lora_theory.simulation.data import run_key
from lora_theory.simulation.fields import centred_fields
from lora_theory.simulation.measure import as_matrix
from lora_theory.simulation.run import Effort, pretrained_weights
from lora_theory.simulation.sizes import Sizes
from lora_theory.theory.nodes import Discretisation, gaussian_blocks
from lora_theory.theory.predict import frozen_weights, solve_pretraining
from lora_theory.theory.training_fields import Reuse, Task, node_dimension, softmax_fields

pytestmark = pytest.mark.slow
SETTINGS = Discretisation.checked(512, 8, 0, 1e-8)
EFFORT = Effort(np.float64, 0, 1, 2, 1e-5, 20_000)


def asked(activation, **stage):
    return Problem(
        tokens=2, activation=activation, teacher_rank=0.5, label_noise=0.5,
        pretraining=Pretraining(**{"samples": 0.4, "penalty": 0.05} | stage),
    )  # fmt: skip


def on_training_sequences(problem, measure, dims, seeds):
    """A number of every run with truncated weights, extrapolated in 1/D."""
    estimates = []
    for dim in dims:
        sizes = Sizes.of(problem, dim)
        with jax.enable_x64(True):
            keys = [run_key(5, index) for index in range(seeds)]
            data, _, weights = pretrained_weights(problem, sizes, EFFORT, keys)
            found = [
                measure(run, compressed(one, problem, sizes))
                for run, one in zip(data, weights, strict=True)
            ]
        estimates.append(Estimate.of(found))
    return extrapolate(estimates, dims, 1.0)


@pytest.mark.exhaustive
def test_linear_noise_of_reused_sequences_is_that_of_training_ones():
    problem = asked("linear", penalty=0.02).replace(
        compression=Compression(rank=0.2),
        finetuning=Finetuning(samples=3.0, penalty=0.2, sequences="reused"),
    )
    predicted = predict(problem, nodes=64).effective_noise.delta_eff_training
    with jax.enable_x64(True):
        weights = frozen_weights(problem, solve_pretraining(problem.alone, SETTINGS))
        fresh = float(weights.effective_noise()[0])
        # as if S' itself had been trained
        alone = float(weights._replace(before=None).training_noise(2, redrawn=False)[0])

    def measure(run, weights):
        """The mean of (z^y − z')² on training sequences over that on fresh ones, in one run."""
        gap = np.asarray(run.teacher_fields - centred_fields(run.sequences, weights))
        # over three pairs: h² off the diagonal, h²/2 on it
        noise = (2 * gap[:, 0, 1] ** 2 + gap[:, 0, 0] ** 2 + gap[:, 1, 1] ** 2).mean() / 6
        gap = as_matrix(run.teacher) - as_matrix(weights)
        return noise / (problem.label_noise / 2 + (gap**2).sum() / len(gap))

    found = on_training_sequences(problem, measure, (24, 48), 6)
    assert abs(found.mean - predicted / fresh) < 4 * found.error
    for wrong in (fresh, alone):
        assert abs(found.mean - wrong / fresh) > 6 * found.error


@pytest.mark.exhaustive
def test_softmax_fields_of_reused_sequences_are_those_of_training_ones():
    """Their mean loss under the truncated weights."""
    problem = asked("softmax").replace(compression=Compression(rank=0.2))
    with jax.enable_x64(True):
        weights = frozen_weights(problem, solve_pretraining(problem.alone, SETTINGS))
        task = Task(1.0, 1.0, 1e-12, weights.label_variance)
        nodes = gaussian_blocks(node_dimension(2, "softmax", compressed=True), 1024, 4, 3)
        nodes = np.concatenate(nodes, axis=1)

        def loss(before, reuse):
            own = nodes if before else nodes[: node_dimension(2, "softmax")]
            Q, M, V = (np.full(own.shape[1], part.mean()) for part in weights[:3])
            if before:
                before = type(weights.trained)(
                    *(np.full(own.shape[1], part.mean()) for part in weights.trained)
                )
            fields = softmax_fields(own, Q, M, V, task, tokens=2, reuse=reuse, before=before)
            fitted = attention(fields.training, "softmax", row_axis=0)
            return float(((fitted - fields.labels) ** 2).sum(axis=(0, 1)).mean())

        predicted = loss(True, Reuse(1.0))
        fresh, alone = loss(None, Reuse(0.0)), loss(None, Reuse(1.0))

    def measure(run, weights):
        frozen = centred_fields(run.sequences, weights)
        gap = attention(run.teacher_fields, "softmax") - attention(frozen, "softmax")
        return float((gap**2).sum(axis=(1, 2)).mean())

    found = on_training_sequences(problem, measure, (24, 48), 8)
    assert abs(found.mean - predicted) < 4 * found.error
    for wrong in (fresh, alone):
        assert abs(found.mean - wrong) > 5 * found.error


def differences(problem, other, names, dims, seeds=6):
    """Observables of pre-training less those of another problem on the same data, D → ∞."""
    samples = []
    for dim in dims:
        runs = [
            pd.DataFrame(simulate(one, dim, seeds, test_sequences=5000).runs)
            for one in (problem, other)
        ]
        columns = [f"pretraining.{name}" for name in names]
        samples.append(runs[0][columns] - runs[1][columns])
    return [
        extrapolate([Estimate.of(sample.iloc[:, i]) for sample in samples], dims, 1.0)
        for i in range(len(names))
    ]


@pytest.mark.exhaustive
def test_preconditioned_weights_learn_what_is_predicted():
    """Less, than where their polynomial were its slope at 0."""
    # eigenvalues that do not fluctuate: the cap is felt by the largest ones
    teacher = {"teacher_rank": None, "teacher.law": "eigenvalues"}
    teacher["teacher.eigenvalues"] = (3.0, 2.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0)
    polynomial = {"regularizer": "preconditioned", "degree": 9, "scale": 2.0}
    problem = asked("linear", penalty=0.3, **polynomial).replace(teacher)
    straight = asked("linear", penalty=0.3 / 3.625**2).replace(teacher)
    theory, other = predict(problem), predict(straight).pretraining
    assert theory.status.value == "converged"
    names = "train_error", "test_error", "Q"
    for name, found in zip(names, differences(problem, straight, names, (24, 48), 6), strict=True):
        value = getattr(theory.pretraining, name) - getattr(other, name)
        assert abs(found.mean - value) < 4 * found.error, name
        assert abs(found.mean) > 5 * found.error, name


def test_low_rank_decay_reaches_the_predicted_loss_and_a_lower_rank():
    """The loss is that of the unstable theory, the rank below that of weight decay as strong.

    By how much is on figure decay.
    """
    problem, plain = asked("linear", penalty=0.1, regularizer="low_rank_decay"), asked("linear")
    theory, other = predict(problem).pretraining, predict(plain).pretraining
    loss, rank = differences(problem, plain, ("objective", "learned_rank"), (24, 48))
    assert abs(loss.mean - (theory.potential - other.potential)) < 4 * loss.error
    assert loss.mean > 5 * loss.error
    assert rank.mean > theory.learned_rank - other.learned_rank - 4 * rank.error
    assert rank.mean < -4 * rank.error
