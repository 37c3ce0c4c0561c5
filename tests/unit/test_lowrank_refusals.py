"""Bad input of the low-rank methods: one sentence of argument, value and what is allowed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_theory import ProblemError
from lora_theory.lowrank import (
    Gram,
    aa_svd,
    allocate_ranks,
    asvd,
    fwsvd,
    gmcn,
    low_rank_decay,
    obd,
    obd_spectrum,
    polar_factor,
    precondition,
    rank_of_ratio,
    shrink,
    svd,
    svd_llm,
)

RNG = np.random.default_rng(0)
W, X, G = RNG.standard_normal((4, 3)), RNG.standard_normal((3, 20)), RNG.standard_normal((4, 20))
GRAM, OUTPUT = X @ X.T, G @ G.T
FEW = X[:, :2] @ X[:, :2].T
HOLES = np.where(np.arange(12).reshape(4, 3) == 5, np.nan, W)
UNEVEN = GRAM + np.triu(np.ones((3, 3)))
NO_GRAM = -GRAM
BAD_GRAM = np.where(np.eye(3) > 0, np.inf, GRAM)
J = jnp.asarray(W, jnp.float32)

COMPRESSIONS = {
    "svd": svd,
    "fwsvd": partial(fwsvd, row_weights=np.ones(4)),
    "asvd": partial(asvd, input_scale=np.ones(3)),
    "svd_llm": partial(svd_llm, input_gram=GRAM),
    "obd": partial(obd, input_gram=GRAM, output_gram=OUTPUT),
    "aa_svd": partial(aa_svd, input_gram=GRAM, cross_gram=GRAM),
}


def refused(words, call, *arguments, **named):
    with pytest.raises(ProblemError) as caught:
        call(*arguments, **named)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("method", COMPRESSIONS)
def test_weights_and_ranks(method):
    compress = COMPRESSIONS[method]
    for rank in (0, 4, -1, 2.0, True, None):
        refused(
            f"rank = {rank!r} is not allowed: it must be an integer from 1 to 3", compress, W, rank
        )
    refused("weights has 1 entries that are not finite", compress, HOLES, 1)
    refused("weights of shape (4,) is not allowed: it must be a matrix", compress, W[:, 0], 1)
    refused("weights of shape (0, 3) is not allowed", compress, W[:0], 1)
    refused("weights is no array of numbers", compress, "weights", 1)
    refused("weights is no array of numbers", compress, 1j * W, 1)
    refused("weights is traced by JAX", jax.jit(lambda V: compress(V, 1)), J)


@pytest.mark.parametrize(
    ("gram", "words"),
    [
        (GRAM[:2], "of shape (2, 3) is not allowed: it must be (3, 3)"),
        (np.eye(4), "of shape (4, 4) is not allowed: it must be (3, 3)"),
        (UNEVEN, "is not symmetric: it must be, and differs from its transpose by"),
        (BAD_GRAM, "has 3 entries that are not finite: all must be"),
        (FEW, "is singular with damping = 0: its eigenvalues go from"),
        (NO_GRAM, "as a Gram matrix it must have no negative one"),
        (np.zeros((3, 3)), "as a Gram matrix it must have no negative one, and not only zeros"),
        (Gram.empty(3).add(X[:, :2].T), "tokens = 2 are too few for a Gram matrix of size 3"),
        (Gram.empty(4).add(G.T), "of shape (4, 4) is not allowed"),
    ],
)
def test_gram_matrices(gram, words):
    options = {"damping": 0}
    refused(words, svd_llm, W, 2, input_gram=gram, **options)
    refused(words, aa_svd, W, 2, input_gram=gram, cross_gram=GRAM, **options)
    refused(words, obd, W, 2, input_gram=gram, output_gram=OUTPUT, **options)
    refused(words, obd_spectrum, W, input_gram=gram, **options)
    refused(words, obd, W.T, 2, input_gram=OUTPUT, output_gram=gram, **options)


def test_which_gram_matrix_is_named_and_damping_helps_a_singular_one():
    refused("output_gram of shape (3, 3)", obd, W, 2, input_gram=GRAM, output_gram=GRAM)
    refused("cross_gram of shape (3, 4)", aa_svd, W, 2, input_gram=GRAM, cross_gram=X @ G.T)
    refused("cross_gram has 3 entries", aa_svd, W, 2, input_gram=GRAM, cross_gram=BAD_GRAM)
    damped = svd_llm(W, 2, input_gram=FEW, damping=1e-3)
    assert np.all(np.isfinite(damped))
    assert np.sum(((W - damped) @ X[:, :2]) ** 2) < 1e-4
    for damping in (-1, np.nan, "some", None):
        words = f"damping = {damping!r} is not allowed: it must be ≥ 0 and finite"
        refused(words, obd, W, 2, input_gram=GRAM, output_gram=OUTPUT, damping=damping)


def test_weights_of_rows_and_columns():
    refused(
        "row_weights of shape (3,) is not allowed: it must be (4,)",
        fwsvd,
        W,
        2,
        row_weights=np.ones(3),
    )
    refused("row_weights must be ≥ 0, and not all 0", fwsvd, W, 2, row_weights=[1, 1, -1, 1])
    refused("input_scale must be ≥ 0, and not all 0", asvd, W, 2, input_scale=np.zeros(3))
    refused("input_scale has 1 entries", asvd, W, 2, input_scale=[1, np.nan, 1])
    refused("alpha = -1 is not allowed", asvd, W, 2, input_scale=np.ones(3), alpha=-1)


def test_numbers_beyond_double_precision_are_refused_in_words():
    large = 1e308 * np.eye(3)
    refused("too large for double", aa_svd, 1e5 * W, 2, input_gram=GRAM, cross_gram=large)
    refused("too large for double", obd_spectrum, 1e300 * W, input_gram=large, damping=0)
    refused("alpha = 2.0 is not allowed", asvd, W, 2, input_scale=[1e200] * 3, alpha=2.0)


def test_calibration_tokens():
    gram = Gram.empty(3)
    refused("tokens of shape (20, 4) are not allowed: they must be (…, 3)", gram.add, G.T)
    refused("tokens has 1 entries that are not finite", gram.add, HOLES)
    refused("others has 19 vectors and tokens 20", gram.add, X.T, X.T[1:])
    refused("others is missing: this Gram matrix is 3 × 4", Gram.empty(3, 4).add, X.T)
    refused("tokens are too large", gram.add, 1e200 * X.T)
    refused("size = 0 is not allowed", Gram.empty, 0)
    refused("calibrate on at least 100", gram.add(X.T).mean, at_least=100)
    refused("tokens = 0 are too few", gram.mean)


def test_ratios_and_budgets():
    for ratio in (0, -0.1, 1.1, np.nan, "half"):
        refused(
            f"ratio = {ratio!r} is not allowed: it must be > 0 and ≤ 1", rank_of_ratio, 4, 4, ratio
        )
    refused(
        "ratio = 0.1 leaves no rank to a matrix of 4 × 4: it must be ≥ 0.5",
        rank_of_ratio,
        4,
        4,
        0.1,
    )
    refused("m = 0 is not allowed", rank_of_ratio, 0, 4, 0.5)
    two = [[2.0, 1.0]]
    refused(
        "parameters = 3 is not allowed: it must be an integer ≥ 4", allocate_ranks, two, [(2, 2)], 3
    )
    refused("there are 1 spectra and 2 shapes", allocate_ranks, two, [(2, 2), (2, 2)], 9)
    refused("there are 0 spectra", allocate_ranks, [], [], 9)
    refused(
        "spectra[0] is not allowed: it must be ≥ 0, the largest",
        allocate_ranks,
        [[1, 2]],
        [(2, 2)],
        9,
    )
    refused(
        "spectra[0] of shape (2,) is not allowed: it must be (3,)", allocate_ranks, two, [(3, 4)], 9
    )
    refused("shapes[0] = 4 is not allowed: it must be (m, n)", allocate_ranks, two, [4], 9)


def test_preconditioning():
    for degree in (0, 2, 11, "9", True, 9.5, [9]):
        refused(
            f"degree = {degree!r} is not allowed: it must be one of 1, 3, 5, 7, 9",
            precondition,
            J,
            degree=degree,
        )
    refused(
        "weight has 1 entries that are not finite", precondition, jnp.asarray(HOLES, jnp.float32)
    )
    refused("weight of shape (3,) and type float32", precondition, J[0])
    refused(
        "weight of shape (2, 4, 3) is not allowed: it must be a matrix",
        precondition,
        jnp.stack([J, J]),
    )
    refused("weight of shape (4, 3) and type int32", precondition, jnp.ones((4, 3), int))
    for gain in (np.nan, "one", None, True):
        words = f"gain = {gain!r} is not allowed: it must be a finite number"
        refused(words, precondition, J, gain=gain)
    refused("rounds = 0 is not allowed", precondition, J, rounds=0)
    refused("rounds = 2.5 is not allowed", precondition(J).update, 2.5)
    refused("matrices is empty", gmcn, [])
    refused("matrices[1] is zero", gmcn, [W, 0 * W])
    refused("matrices[0] has 1 entries", gmcn, [HOLES])
    refused("fraction = 0 is not allowed: it must be > 0 and ≤ 1", gmcn, [W], fraction=0)


def test_decay():
    for strength in (-1, np.inf, np.nan, "much", None, True, jnp.array(-1.0)):
        refused(
            f"strength = {strength!r} is not allowed: it must be finite and ≥ 0, or",
            low_rank_decay,
            strength,
        )
    refused("learning_rate = -0.1 is not allowed", low_rank_decay, 0.1, learning_rate=-0.1)
    refused(
        "adaptive = 1 is not allowed: it must be True or False", low_rank_decay, 0.1, adaptive=1
    )
    refused(
        "method = 'qr' is not allowed: it must be one of \"svd\", ",
        low_rank_decay,
        0.1,
        method="qr",
    )
    refused("steps = 5 is not allowed with method = 'svd'", low_rank_decay, 0.1, steps=5)
    refused("steps = 0 is not allowed", polar_factor, J, method="newton_schulz", steps=0)
    refused("step = -1 is not allowed: it must be finite and ≥ 0", shrink, J, -1)
    refused("step of shape (2,) is not allowed", shrink, jnp.stack([J] * 3), jnp.ones(2))
    refused("matrix of shape (3,) and type float32 is not allowed", polar_factor, J[0])
    refused("weights of shape (4, 3) and type complex64", shrink, 1j * J, 0.1)
    decay = low_rank_decay(0.1)
    refused("params is missing", decay.update, {"w": J}, decay.init({"w": J}))
    everything = low_rank_decay(0.1, mask={"b": True})
    tree = {"b": jnp.ones(3)}
    refused(
        "leaf ['b'], chosen by mask, of shape (3,)",
        everything.update,
        tree,
        everything.init(tree),
        tree,
    )
