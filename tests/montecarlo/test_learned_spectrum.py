"""Learned spectra: theory against trained systems, sampled matrices and merged LoRA vectors."""

import numpy as np
import pytest

from lora_theory import Estimate, Problem, sample_pretrained, simulate, spectrum

BASE = Problem.from_dict(
    {
        "tokens": 2,
        "activation": "linear",
        "teacher_rank": 0.5,
        "label_noise": 0.5,
        "pretraining": {"samples": 0.5, "penalty": 0.1},
        "finetuning": {"samples": 4.0, "penalty": 0.2},
    }
)
SPIKES = [6.0, 4.0]
#: Allowed offset of the merged eigenvalue, times D.
OFFSET = 8.0
CASES = {
    "linear": {},
    "softmax": {"activation": "softmax", "pretraining.penalty": 0.02},
    "nuclear norm": {
        "teacher_rank": None,
        "teacher.law": "goe",
        "pretraining.regularizer": "nuclear_norm",
    },
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Eigenvalues of trained matrices, (seeds, D), and the runs, by case and D."""
    kept = {}

    def run(name, dim, seeds=4):
        key = name, dim, seeds
        if key not in kept:
            path = tmp_path_factory.mktemp("runs") / "weights.npz"
            result = simulate(
                BASE.replace({**CASES[name], "finetuning": None}), dim, seeds, save=path,
                dtype="float32", gradient_tolerance=5e-3, test_sequences=4000,
            )  # fmt: skip
            weights = np.load(path)
            matrices = weights["S"] if "S" in weights else [
                W @ W.T / np.sqrt(W.size) for W in weights["W"]
            ]  # fmt: skip
            kept[key] = np.linalg.eigvalsh(matrices), result
        return kept[key]

    return run


def distances(levels, learned, scale=1.0):
    """Of each run the largest distance between the distributions, apart from the jump at 0."""
    dim = levels.shape[1]
    middle = (np.arange(dim) + 0.5) / dim
    return [
        np.abs(middle - learned.distribution(scale * row))[np.abs(row) > 1e-3].max()
        for row in levels
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_trained_eigenvalues_follow_the_predicted_law(trained, name):
    """The distance is O(1/D), eigenvalues being rigid: it shrinks, and is below 3/D at D = 80."""
    learned = spectrum(BASE.replace({**CASES[name], "finetuning": None}), nodes=512)
    small, large = (np.mean(distances(trained(name, dim)[0], learned)) for dim in (32, 80))
    assert large < 3 / 80
    assert large < 0.7 * small
    # controls: eigenvalues off by a fifth, and the law of another number of samples
    assert np.mean(distances(trained(name, 80)[0], learned, scale=1.2)) > 3 / 80
    other = {**CASES[name], "finetuning": None, "pretraining.samples": 0.3}
    assert np.mean(distances(trained(name, 80)[0], spectrum(BASE.replace(other), nodes=512))) > (
        3 / 80
    )


@pytest.mark.slow
def test_sampled_matrices_stand_in_for_trained_ones(trained):
    """Q, M, overlap and E, paired by teacher; the distributions of eigenvalues."""
    problem = BASE.replace(finetuning=None)
    levels, real = trained("linear", 80)
    drawn = simulate(problem, 80, 4, pretrained="sampled", test_sequences=4000)
    for name, offset in (("Q", 3), ("M", 3), ("overlap", 1), ("test_error", 1)):
        pairs = [(a[f"pretraining.{name}"], b[f"pretraining.{name}"])
                 for a, b in zip(real.runs, drawn.runs, strict=True)]  # fmt: skip
        difference = Estimate.of([a - b for a, b in pairs])
        allowed = 4 * difference.error + offset / 80
        assert abs(difference.mean) < allowed, name
        control = Estimate.of([a - 1.15 * b for a, b in pairs])
        assert abs(control.mean) > 4 * control.error + offset / 80, name
    sampled = [np.linalg.eigvalsh(sample_pretrained(problem, 80, index=i)[0]) for i in range(4)]
    apart = np.abs(np.sort(np.concatenate(sampled)) - np.sort(levels.ravel()))
    assert apart.mean() < 0.05
    assert np.abs(np.sort(np.concatenate(sampled)) - 1.1 * np.sort(levels.ravel())).mean() > 0.05


def overlaps_with_spikes(problem, dim, seeds):
    """The largest eigenvalues of sampled matrices and their squared overlaps with the spikes."""
    plain = problem.replace({"teacher.spikes": None})
    rows = []
    for index in range(seeds):
        S, S0 = sample_pretrained(problem, dim, index=index)
        added = S0 - sample_pretrained(plain, dim, index=index)[1]  # Σ θvvᵀ alone
        _, directions = np.linalg.eigh(added)
        levels, vectors = np.linalg.eigh(S)
        count = len(SPIKES)
        overlap = np.sum(vectors[:, -count:] * directions[:, -count:], axis=0) ** 2
        rows.append([levels[-count:], overlap])
    return np.array(rows)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [150, 300, 500])
def test_outliers_are_where_spikes_put_them(dim):
    problem = BASE.replace({"teacher.spikes": SPIKES, "finetuning": None})
    predicted = spectrum(problem).outliers
    rows = overlaps_with_spikes(problem, dim, 10 if dim < 400 else 5)
    mean = rows.mean(axis=0)
    error = rows.std(axis=0, ddof=1) / np.sqrt(len(rows))
    expected = np.array([[o.eigenvalue for o in predicted], [o.squared_overlap for o in predicted]])
    assert np.all(np.abs(mean - expected) < 4 * error + 3 / dim)
    shifted = np.array([[o.spike for o in predicted], [1.0, 1.0]])  # control: S0's own
    assert np.all(np.abs(mean - shifted) > 4 * error + 3 / dim)


@pytest.mark.slow
@pytest.mark.parametrize(
    "pretrained", [pytest.param("trained", marks=pytest.mark.exhaustive), "sampled"]
)
def test_merged_vector_is_an_outlier_in_generic_position(pretrained, tmp_path):
    problem, dims = BASE, {"trained": (64,), "sampled": (100, 250)}[pretrained]
    for dim in dims:
        simulate(problem, dim, 6, starts=0, pretrained=pretrained, test_sequences=100,
                 dtype="float32", save=tmp_path / f"{dim}.npz")  # fmt: skip
        weights, rows = np.load(tmp_path / f"{dim}.npz"), []
        for run in range(6):
            w, w_star = weights["w"][run], weights["w_star"][run]
            S = weights["S"][run] if pretrained == "sampled" else (
                weights["W"][run] @ weights["W"][run].T / np.sqrt(weights["W"][run].size)
            )  # fmt: skip
            levels, vectors = np.linalg.eigh(S + np.outer(w, w) / np.sqrt(dim))
            top = vectors[:, -1]
            rows.append([levels[-1] - w @ w / np.sqrt(dim), (top @ w) ** 2 / (w @ w),
                         (top @ w_star) ** 2 / (w_star @ w_star)])  # fmt: skip
        found = spectrum(problem, dim=dim).merged
        expected = [found.eigenvalue - found.strength, found.squared_overlap, found.task_overlap]
        mean, error = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) / np.sqrt(6)
        allowed = 4 * error + np.array([OFFSET, 2.0, 2.0]) / dim
        assert np.all(np.abs(mean - expected) < allowed)
        assert abs(mean[0]) > allowed[0]  # control: the vector's own norm alone


def test_merged_vector_below_the_threshold_stays_in_the_bulk():
    """Weak vectors in generic position: the overlap of the top eigenvector vanishes."""
    problem, dim, rows = BASE.replace(finetuning=None), 200, []
    learned = spectrum(BASE, dim=dim)
    rng = np.random.default_rng(1)
    for index in range(6):
        S, _ = sample_pretrained(problem, dim, index=index)
        unit = rng.standard_normal(dim)
        unit /= np.linalg.norm(unit)
        for factor in (0.5, 2.0):
            strength = factor * learned.merged.threshold
            _, vectors = np.linalg.eigh(S + strength * np.outer(unit, unit))
            rows.append((vectors[:, -1] @ unit) ** 2)
    weak, strong = np.mean(np.reshape(rows, (-1, 2)), axis=0)
    assert weak < 0.1
    assert strong > 0.5
