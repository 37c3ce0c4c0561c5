"""The learned spectrum: sums, closed forms, edges, outliers and sampled matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_theory import Problem, ProblemError, predict, sample_pretrained, simulate, spectrum
from lora_theory.laws import GOE, Eigenvalues, PowerLaw, Wishart, law_of
from lora_theory.simulation.data import run_key
from lora_theory.simulation.measure import as_matrix
from lora_theory.simulation.sizes import Sizes
from lora_theory.simulation.teacher import draw_teacher
from lora_theory.sweeps import kept_simulations
from lora_theory.theory.bands import detached, real_bands
from lora_theory.theory.convolution import free_convolution
from lora_theory.theory.merged import merged_outlier

BASE = Problem.from_dict(
    {
        "tokens": 2,
        "activation": "linear",
        "teacher_rank": 0.5,
        "label_noise": 0.5,
        "teacher": {"spikes": [4.0, -3.0]},
        "pretraining": {"samples": 0.5, "penalty": 0.1},
        "finetuning": {"samples": 4.0, "penalty": 0.2},
    }
)
GOE_LAW = {"teacher_rank": None, "teacher.law": "goe"}
LEVELS = {
    "teacher_rank": None,
    "teacher.law": "eigenvalues",
    "teacher.eigenvalues": [0.0, 0.0, 3.0, 6.0],
    "pretraining.samples": 2.0,
}
CASES = {
    "weight decay": {},
    "narrow factor": {"pretraining.rank": 0.3},
    "frobenius": GOE_LAW | {"pretraining.regularizer": "frobenius"},
    "nuclear norm": GOE_LAW | {"pretraining.regularizer": "nuclear_norm"},
    "power law": {"teacher_rank": None, "teacher.law": "power_law", "teacher.exponent": 0.3},
    "three bands": LEVELS,
    "temperatures": {"inverse_temperature": 1.5, "teacher.inverse_temperature": 0.8},
}


@pytest.mark.parametrize("name", CASES)
def test_sums_over_the_density_are_those_of_the_equations(name):
    """Rank, Q = ∫s², and M M̂ = ∫ys − V Q̂ (docs/theory.md, (2.9)): y is affine in s on a band."""
    problem = BASE.replace(CASES[name])
    found, solved = spectrum(problem), predict(problem).pretraining
    beyond = 1e-6 if name == "power law" else 0.0
    assert found.shares.sum() == pytest.approx(solved.learned_rank - beyond, abs=1e-10)
    assert found.second_moment == pytest.approx(solved.Q, rel=1e-8)
    assert abs(found.moment_gap) < 1e-8
    assert found.second_moment != pytest.approx(1.001 * solved.Q, rel=1e-8)  # control
    stage, stiffness = problem.pretraining, solved.V_hat
    if stage.regularizer == "frobenius":
        y_s = (stiffness + 2 * stage.penalty) * solved.Q
    else:  # y = V̂s + 2λ̃ sign s
        absolute = np.sum(found.shares * np.abs(found.eigenvalues))
        if name == "power law":
            absolute = found.mean
        threshold = stage.penalty
        if stage.regularizer == "weight_decay":
            threshold *= np.sqrt(stage.rank)
        y_s = stiffness * solved.Q + 2 * threshold * absolute
    M = (y_s - solved.V * solved.Q_hat) / solved.M_hat
    assert pytest.approx(solved.M, rel=1e-8) == M
    assert found.mass_at_zero == pytest.approx(1 - found.rank)
    assert found.distribution(np.inf) == pytest.approx(1, abs=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_density_and_bands_describe_the_same_function(name):
    found = spectrum(BASE.replace(CASES[name]))
    trapezoid = np.trapezoid(found.density, found.eigenvalues)
    gaps = [(a[1], b[0]) for a, b in zip(found.bands[:-1], found.bands[1:], strict=True)]
    assert all(left <= right for left, right in gaps)
    # between bands that do not touch a straight line is not the density
    at = np.isin(found.eigenvalues, [end for gap in gaps if gap[0] < gap[1] for end in gap])
    bridges = sum(
        (right - left) * np.sum(found.density[at & np.isin(found.eigenvalues, [left, right])]) / 2
        for left, right in gaps
    )
    assert trapezoid - bridges == pytest.approx(found.rank, abs=2e-4)
    assert np.all(found.density >= 0)
    ends = np.array(found.bands)
    inside = (found.eigenvalues[:, None] >= ends[:, 0]) & (found.eigenvalues[:, None] <= ends[:, 1])
    assert inside.any(axis=1).all()


def test_ridge_on_a_semicircle_is_a_semicircle():
    """Var = (M̂² + Q̂)/(V̂ + 2λ)²; outliers of its spikes as those of any semicircle."""
    problem = BASE.replace(CASES["frobenius"])
    found, solved = spectrum(problem), predict(problem).pretraining
    gain = solved.V_hat + 2 * problem.pretraining.penalty
    radius = 2 * np.sqrt(solved.M_hat**2 + solved.Q_hat) / gain
    (band,) = found.bands
    np.testing.assert_allclose(band, [-radius, radius], rtol=1e-10)
    s = found.eigenvalues
    exact = 2 / (np.pi * radius**2) * np.sqrt(np.maximum(radius**2 - s**2, 0))
    np.testing.assert_allclose(found.density, exact, atol=1e-8)
    assert np.abs(found.density - 1.01 * exact).max() > 1e-3
    variance = 1 + solved.Q_hat / solved.M_hat**2
    for outlier in found.outliers:
        theta = outlier.spike
        expected = (theta + variance / theta) * solved.M_hat / gain
        assert outlier.eigenvalue == pytest.approx(expected, rel=1e-9)
        assert outlier.squared_overlap == pytest.approx(1 - variance / theta**2, rel=1e-9)
    np.testing.assert_allclose(found.visible_spikes, [-np.sqrt(variance), np.sqrt(variance)])


@pytest.mark.parametrize(
    ("law", "count"),
    [(Wishart(0.3), 2), (Wishart(2.0), 1), (GOE(), 1), (PowerLaw(0.3), 1),
     (Eigenvalues(np.array([0.0, 1.0, 5.0])), 3)],
    ids=str,
)  # fmt: skip
def test_edges_separate_density_from_none(law, count):
    delta = 0.15
    with jax.enable_x64(True):
        bands = real_bands(delta, law)
        assert len(bands) == count
        assert len(real_bands(8.0, law)) == 1  # much noise closes every gap
        ends = np.array([end for band in bands for end in band if np.isfinite(end)])
        w = jnp.asarray(ends, dtype=complex)
        edges = (w + delta**2 * law.stieltjes(w)).real
        outward = np.array([-1, 1] * count)[: len(ends)]
        step = 1e-3 * outward
        density = jax.vmap(lambda x: free_convolution(x, jnp.asarray(delta), law)[1])
        assert np.all(np.asarray(density(edges + step)) == 0)
        assert np.all(np.asarray(density(edges - step)) > 1e-3)


def test_one_spike_pulls_an_eigenvalue_out_of_every_gap_that_is_wide_enough():
    law, delta, dim, spike = Eigenvalues(np.array([0.0, 3.0, 6.0])), 0.3, 900, 4.0
    with jax.enable_x64(True):
        found = detached(spike, delta, law, real_bands(delta, law))
    assert len(found) == 3
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((dim, dim))
    v = rng.standard_normal(dim)
    v /= np.linalg.norm(v)
    matrix = np.diag(law.spectrum(dim, rng)) + delta * (Z + Z.T) / np.sqrt(2 * dim)
    levels, vectors = np.linalg.eigh(matrix + spike * np.outer(v, v))
    overlaps = (v @ vectors) ** 2
    for x, squared in found:
        nearest = np.argmin(np.abs(levels - x))
        assert levels[nearest] == pytest.approx(x, abs=0.1)
        assert overlaps[nearest] == pytest.approx(squared, abs=0.05)
        assert overlaps[nearest] > 20 / dim  # control: far from that of a vector of the bulk


def test_spikes_below_the_threshold_are_not_seen():
    threshold = spectrum(BASE).visible_spikes[1]
    for factor, count in ((0.99, 0), (1.01, 1)):
        found = spectrum(BASE.replace({"teacher.spikes": [factor * threshold]}))
        assert len(found.outliers) == count
    assert found.outliers[0].eigenvalue == pytest.approx(found.bands[-1][1], rel=1e-3)
    assert found.outliers[0].squared_overlap < 0.1
    assert spectrum(BASE).visible_spikes[0] is None  # S ⪰ 0 has no negative outliers


def test_merged_outlier_of_a_semicircle():
    """x = t + σ²/t and 1 − σ²/t² for t = q√D above σ = 1."""
    angle = np.pi * (np.arange(400) + 0.5) / 400
    s, shares = 2 * np.cos(angle), 2 / 400 * np.sin(angle) ** 2
    found = merged_outlier(s, shares, 0.0, 2.0, q=0.5, overlap=0.8, dim=16)
    assert found.strength == 2.0
    assert found.eigenvalue == pytest.approx(2.5, abs=1e-9)
    assert found.squared_overlap == pytest.approx(0.75, abs=1e-9)
    assert found.task_overlap == pytest.approx(0.64 * 0.75, abs=1e-9)
    assert found.threshold == pytest.approx(1, abs=1e-2)
    hidden = merged_outlier(s, shares, 0.0, 2.0, q=0.5, overlap=0.8, dim=3)
    assert (hidden.eigenvalue, hidden.squared_overlap, hidden.task_overlap) == (None, None, None)


def test_merged_outlier_of_a_problem():
    found = spectrum(BASE, dim=100).merged
    assert found.eigenvalue > found.strength > found.threshold
    at_threshold = spectrum(BASE, dim=int(found.smallest_dim)).merged
    assert at_threshold.eigenvalue is None
    assert at_threshold.smallest_dim == pytest.approx(found.smallest_dim)
    assert spectrum(BASE).merged is None


def test_nothing_learnt_is_all_at_zero():
    found = spectrum(BASE.replace({"pretraining.penalty": 50.0, "teacher.spikes": None}))
    assert found.status.value == "collapsed"
    assert (found.mass_at_zero, found.bands, found.outliers) == (1.0, (), ())
    assert found.eigenvalues.size == 0
    np.testing.assert_array_equal(found.distribution([-1.0, 0.0, 1.0]), [0, 1, 1])


def test_error_of_the_softmax_spectrum_is_its_spread_over_seeds():
    problem = BASE.replace({"activation": "softmax", "finetuning": None})
    runs = [spectrum(problem, nodes=64, blocks=4, seed=seed, points=50) for seed in range(5)]
    for name in ("rank", "effective_rank", "mean"):
        spread = np.std([getattr(run, name) for run in runs], ddof=1)
        error = np.mean([run.quadrature_error[name] for run in runs])
        assert 0.2 < spread / error < 4, name
    assert all(run.quadrature_error["outliers"] > 0 for run in runs)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"points": 7}, "points = 7 is not allowed: it must be an integer ≥ 8"),
        ({"dim": 0}, "dim = 0 is not allowed: it must be an integer ≥ 1"),
        ({"dim": 2.5}, "dim = 2.5"),
        ({"blocks": 1}, "blocks = 1"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ProblemError, match=words):
        spectrum(BASE, **settings)


def test_plain_values_hold_everything():
    plain = spectrum(BASE, dim=50, points=20).to_dict()
    assert plain["merged"]["dim"] == 50
    assert plain["outliers"][0]["spike"] == 4.0
    assert len(plain["density"]) == len(plain["eigenvalues"]) == 20


# -- the sampler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_sampled_matrices_have_the_order_parameters_and_the_spectrum(name):
    # of a heavier tail the largest eigenvalues, 1/D apart in rank, would leave an offset in Q
    tail = {"teacher.exponent": 0.15} if name == "power law" else {}
    problem = BASE.replace({"teacher.spikes": None, **CASES[name], **tail})
    solved, learned, dim = predict(problem).pretraining, spectrum(problem), 300
    draws = [sample_pretrained(problem, dim, index=index) for index in range(3)]
    Q = np.mean([np.sum(S * S) for S, _ in draws]) / dim
    M = np.mean([np.sum(S * S0) for S, S0 in draws]) / dim
    assert pytest.approx(solved.Q, rel=0.04) == Q
    assert pytest.approx(solved.M, rel=0.04) == M
    levels = np.sort(np.concatenate([np.linalg.eigvalsh(S) for S, _ in draws]))
    levels[np.abs(levels) < 1e-9] = 0.0

    def distance(scale):
        empirical = np.arange(1, levels.size + 1) / levels.size
        beyond = levels != 0
        return np.abs(empirical - learned.distribution(scale * levels))[beyond].max()

    assert distance(1.0) < 0.015
    assert distance(1.1) > 0.015  # control


def test_sampled_teacher_is_that_of_the_simulation():
    problem, key = BASE.replace(finetuning=None), run_key(3, 2)
    _, S0 = sample_pretrained(problem, 24, seed=3, index=2)
    with jax.enable_x64(True):
        drawn = as_matrix(draw_teacher(key, problem, Sizes.of(problem, 24), np.float64))
    np.testing.assert_array_equal(S0, drawn)
    other, _ = sample_pretrained(problem, 24, seed=3, index=1)
    assert np.abs(sample_pretrained(problem, 24, seed=3, index=2)[0] - other).max() > 0.1
    assert float(law_of(problem).moments()[1]) == 1.5


def test_sampled_runs_take_the_place_of_trained_ones(tmp_path):
    run = simulate(BASE, 24, 2, starts=0, pretrained="sampled", test_sequences=200,
                   save=tmp_path / "weights.npz")  # fmt: skip
    assert run.status.value == "converged"
    assert np.isnan(run.pretraining.train_error.mean)
    assert np.isnan(run.pretraining.objective.mean)
    assert [row["pretraining.iterations"] for row in run.runs] == [0, 0]
    assert run.environment["pretrained"] == "sampled"
    assert run.to_dict()["pretraining"]["train_error"]["mean"] is None
    S, _ = sample_pretrained(BASE, 24, index=1)
    np.testing.assert_allclose(np.load(tmp_path / "weights.npz")["S"][1], S, atol=1e-12)
    assert run.finetuning.q.mean > 0.1


def test_sampled_weights_are_refused_for_reused_sequences():
    reused = BASE.replace({"finetuning.sequences": "reused"})
    with pytest.raises(ProblemError, match='"reused" is not allowed with pretrained = "sampled"'):
        simulate(reused, 24, 1, pretrained="sampled")
    with pytest.raises(ProblemError, match="pretrained = 'guessed' is not allowed"):
        simulate(BASE, 24, 1, pretrained="guessed")


def test_a_narrow_factor_samples_no_larger_rank():
    S, _ = sample_pretrained(BASE.replace({"pretraining.rank": 0.25}), 40)
    assert np.linalg.matrix_rank(S, tol=1e-9) == 10


def test_kept_runs_of_sampled_weights_come_back(tmp_path):
    kept = [
        kept_simulations(BASE, [16], 2, tmp_path, pretrained="sampled", starts=0,
                         test_sequences=100)[0]
        for _ in range(2)
    ]  # fmt: skip
    fresh = simulate(BASE, 16, 2, pretrained="sampled", starts=0, test_sequences=100)
    for run in kept:
        assert np.isnan(run.pretraining.train_error.mean)
        assert run.pretraining.Q == fresh.pretraining.Q
        assert run.finetuning.overlap == fresh.finetuning.overlap
