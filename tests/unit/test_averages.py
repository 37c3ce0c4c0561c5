"""Averages over chunks of nodes: any layout, minima searched or followed, threads in 64 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_theory.laws import Wishart
from lora_theory.theory import finetuning as lora
from lora_theory.theory import pretraining as pre
from lora_theory.theory import training_fields as training
from lora_theory.theory.averages import Averages, BlockValues, Equations
from lora_theory.theory.fields import field_count
from lora_theory.theory.nodes import gaussian_blocks
from lora_theory.theory.regularizers import WeightDecay
from lora_theory.theory.roots import solve
from lora_theory.theory.weights import Constants

BLOCKS, POINTS, TOKENS = 4, 32, 2
#: Blocks are halved, one chunk each, in pairs, and all together.
LAYOUTS = [(2 * BLOCKS, 1), (BLOCKS, 1), (BLOCKS // 2, 2), (1, BLOCKS)]
TASK = training.Task(samples=3.0, penalty=0.2, signal=1.3, label_variance=1.75)
CONSTANTS = Constants(
    samples=0.5,
    label_variance=1.75,
    law=Wishart(0.5),
    teacher_scale=1.0,
    regularizer=WeightDecay(0.05),
)


class Remembering(Equations):
    """Means of functions of the nodes; minima count how often they have been followed."""

    further = 2

    def __init__(self, together: int) -> None:
        self.together, self.types = together, set()

    def likely(self, unknowns, chunk):
        return jnp.zeros((2, 1, 2 * chunk.shape[1]))

    def minima(self, unknowns, chunk, starts):
        return starts[:2] + 1

    def values(self, unknowns, chunk, minima):
        self.types.add(jnp.zeros(()).dtype.name)
        x, y = unknowns
        nodes = chunk.reshape(2, self.together, -1)
        rows = [np.sin(x * nodes[0]) - y, y * nodes[1] ** 2 - 1, nodes[0] * nodes[1] + x]
        slopes = np.array(
            [
                [np.mean(nodes[0] * np.cos(x * nodes[0])), -1],
                [0, np.mean(nodes[1] ** 2)],
                [1, 0],
            ]
        )
        rows = np.stack([row.mean(axis=-1) for row in rows], axis=1)
        return BlockValues.of(rows, slopes)


def whole_nodes(dimension: int) -> np.ndarray:
    return np.concatenate(gaussian_blocks(dimension, POINTS, BLOCKS, 5), axis=1)


def remembering(chunks: int, together: int) -> Averages:
    parts = np.split(whole_nodes(2), chunks, axis=1)
    return Averages(Remembering(together), parts, BLOCKS)


def pretraining(chunks: int, together: int) -> Averages:
    n = field_count(TOKENS, "softmax")
    parts = np.split(whole_nodes(2 * n), chunks, axis=1)
    labels = [pre.Labels(jnp.asarray(part[:n]), jnp.asarray(part[n:])) for part in parts]
    return Averages(
        pre.SoftmaxPretraining(CONSTANTS, tokens=TOKENS, blocks=together), labels, BLOCKS
    )


def linear_finetuning(chunks: int, together: int) -> Averages:
    parts = np.split(whole_nodes(training.node_dimension(TOKENS, "linear")), chunks, axis=1)
    fields = [training.linear_fields(part, 0.4, TASK.signal, tokens=TOKENS) for part in parts]
    return Averages(lora.LinearFinetuning(TASK, lora.INFORMED, blocks=together), fields, BLOCKS)


def softmax_finetuning(chunks: int, together: int) -> Averages:
    """Every block of frozen weights of its own."""
    dimension = training.node_dimension(TOKENS, "softmax")
    parts = np.split(whole_nodes(dimension), chunks, axis=1)
    Q, M, V = (np.repeat(x * np.linspace(0.95, 1.05, BLOCKS), POINTS) for x in (1.2, 1.1, 2.0))
    values = zip(*(np.split(x, chunks) for x in (Q, M, V)), strict=True)
    fields = [
        training.softmax_fields(part, *value, TASK, tokens=TOKENS, reuse=training.Reuse(1.0))
        for part, value in zip(parts, values, strict=True)
    ]
    return Averages(lora.SoftmaxFinetuning(TASK, lora.INFORMED, blocks=together), fields, BLOCKS)


PRETRAINING_POINT = np.log([0.3, 0.35, 0.4])
FINETUNING_POINT = np.array([np.log(0.3), 0.9, np.log(0.15)])
STAGES = [
    pytest.param(remembering, np.array([0.7, 0.2]), id="means"),
    pytest.param(linear_finetuning, FINETUNING_POINT, id="linear fine-tuning"),
    pytest.param(pretraining, PRETRAINING_POINT, id="softmax pre-training", marks=pytest.mark.slow),
    pytest.param(
        softmax_finetuning, FINETUNING_POINT, id="softmax fine-tuning", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("stage", "point"), STAGES)
def test_the_layout_of_the_chunks_changes_nothing(stage, point):
    with jax.enable_x64(True):
        first, *others = (stage(*layout).at(point, search=True) for layout in LAYOUTS)
    assert first.residual.shape == (BLOCKS, point.size)
    assert first.jacobian.shape == (point.size + first.observables.shape[1], point.size)
    assert np.all(np.ptp(first.residual, axis=0) > 1e-4), "blocks differ"
    for other in others:
        for part, same in zip(first, other, strict=True):
            np.testing.assert_allclose(part, same, rtol=1e-8, atol=1e-9 * np.abs(part).max())


@pytest.mark.parametrize(("stage", "point"), STAGES)
def test_the_jacobian_is_that_of_the_mean(stage, point):
    """By differences; the minima are followed."""
    step = 1e-5
    with jax.enable_x64(True):
        averages = stage(*LAYOUTS[-1])
        exact = averages.at(point, search=True).jacobian
        for k, direction in enumerate(np.eye(point.size)):
            rows = []
            for sign in (1, -1):
                values = averages.at(point + sign * step * direction, search=False)
                rows.append(np.concatenate([values.residual, values.observables], axis=1).mean(0))
            difference = (rows[0] - rows[1]) / (2 * step)
            # all but the measure of jumps, whose Stein form is not differentiated
            smooth = np.ones(len(difference), bool)
            if stage in (pretraining, linear_finetuning, softmax_finetuning):
                first = stage is pretraining
                names = pre.OBSERVABLES if first else lora.OBSERVABLES
                jumps = names.index("jump_mass" if first else "jumps")
                smooth[point.size + jumps] = False
            np.testing.assert_allclose(exact[smooth, k], difference[smooth], rtol=2e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "point", "relaxation"),
    [
        (pretraining, PRETRAINING_POINT, pre.relaxation),
        (softmax_finetuning, FINETUNING_POINT, lora.relaxation),
    ],
)
def test_minima_followed_to_a_root_are_those_of_a_search(stage, point, relaxation):
    with jax.enable_x64(True):
        averages = stage(*LAYOUTS[1])
        root = solve(averages, point, tolerance=1e-10, relaxation=relaxation)
        assert root.residual < 1e-10
        followed = averages.at(root.unknowns, search=False)
        searched = averages.at(root.unknowns, search=True)
        fresh = stage(*LAYOUTS[1]).at(root.unknowns, search=True)
    for other in (searched, fresh):
        for part, same in zip(followed, other, strict=True):
            np.testing.assert_allclose(part, same, rtol=1e-8, atol=1e-9 * np.abs(part).max())
    np.testing.assert_allclose(
        followed.observables.mean(axis=0), root.observables, rtol=1e-9, atol=1e-12
    )


def test_minima_are_remembered_between_evaluations():
    averages, point = remembering(2, 2), np.array([0.7, 0.2])
    averages.at(point, search=False)
    averages.at(point, search=True)
    averages.at(point + 0.1, search=False)
    assert [np.unique(minima).tolist() for minima in averages._minima] == [[3]] * 2
    averages.at(point + 0.2, search=False, remember=False)
    assert [np.unique(minima).tolist() for minima in averages._minima] == [[3]] * 2
    assert averages.first(1)._minima == [None], "others of their own"


def test_starts_are_the_known_minima_and_further_ones():
    """Likely ones, the same again where minima are followed, or of other nodes, each time anew."""
    seen = []

    class Noting(Remembering):
        def likely(self, unknowns, chunk):
            own = jnp.arange(2.0 * chunk.shape[1])
            return jnp.stack([own, -own])[:, None]

        def minima(self, unknowns, chunk, starts):
            seen.append(np.asarray(starts[:, 0]))
            return starts[:2]

    averages = Averages(Noting(BLOCKS), [whole_nodes(2)], BLOCKS)
    point = np.array([0.7, 0.2])
    averages.at(point, search=False)
    averages.at(point, search=True)
    averages.at(point, search=False)
    for _ in range(2):
        averages.at(point, search=True, elsewhere=True)
    own = np.arange(seen[0].shape[1])
    for starts in seen:
        np.testing.assert_array_equal(starts[:2], [own, -own])
    for starts, further in zip(seen[:3], ([own, -own], [own, -own], [own, own]), strict=True):
        np.testing.assert_array_equal(starts[2:], further)
    away = [int(start[0]) for starts in seen[3:] for start in starts[2:]]
    assert len({0, *away}) == 5
    for start, shift in zip(np.concatenate([seen[3][2:], seen[4][2:]]), away, strict=True):
        np.testing.assert_array_equal(start, np.roll(own, -shift))


@pytest.mark.slow
def test_minima_of_other_nodes_lead_to_lower_ones():
    """A long w and a soft proximal operator: its own starts miss minima of many nodes."""
    moreau = lora.OBSERVABLES.index("potential")  # plus what the minima do not change
    point = np.log([5.0, 1.0, 3.0]) * [1, 0, 1]
    parts = np.split(whole_nodes(training.node_dimension(2, "softmax")), 2, axis=1)
    nothing = np.zeros(parts[0].shape[1])
    with jax.enable_x64(True):
        fields = [training.softmax_fields(part, *[nothing] * 3, TASK, tokens=2) for part in parts]
        averages = Averages(lora.SoftmaxFinetuning(TASK, lora.UNINFORMED, blocks=1), fields, 2)
        values = [averages.at(point, search=True)]
        values += [averages.at(point, search=True, elsewhere=True) for _ in range(24)]
    potentials = np.stack([value.observables[:, moreau] for value in values])
    assert np.all(np.diff(potentials, axis=0) < 1e-10)
    assert np.all(potentials[0] - potentials[12] > 1e-3)
    assert np.all(potentials[12] - potentials[24] < 0.5 * (potentials[0] - potentials[12]))


def test_the_first_chunks_are_one_block():
    point = np.array([0.7, 0.2])
    averages = remembering(BLOCKS, 1)
    values, part = averages.at(point, search=True), averages.first(2).at(point, search=True)
    np.testing.assert_allclose(part.residual, values.residual[:2].mean(axis=0)[None])
    np.testing.assert_allclose(part.observables, values.observables[:2].mean(axis=0)[None])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_thread_computes_in_64_bits(layout):
    averages = remembering(*layout)
    with jax.enable_x64(True):
        averages.at(np.array([0.7, 0.2]), search=True)
    assert averages.equations.types == {"float64"}


def test_the_size_is_that_of_the_mean_residual():
    rows = np.array([[1.0, -0.5, 7.0], [-1.0, -0.1, 9.0]])
    values = BlockValues.of(rows, np.zeros((3, 2)))
    assert values.size == pytest.approx(0.3)
    assert values.observables.tolist() == [[7.0], [9.0]]
    rows[0, 1] = np.nan
    assert BlockValues.of(rows, np.zeros((3, 2))).size == np.inf
