"""reproduce.py --check: green on the committed tables, red under wrong equations and numbers."""

import check
import contraction
import decay
import published
import pytest
import reproduce
from mutants import mutant

FIGURES = reproduce.FIGURES

#: the mistake: table, fields and values of the rows that show it, file, right, wrong
WRONG = {
    "output stiffness V̂ of pre-training doubled": (
        "figure1", {"activation": "linear"}, "pretraining.py",
        "V_hat = channel.samples * T * (T + 1) / stiff",
        "V_hat = 2 * channel.samples * T * (T + 1) / stiff",
    ),
    "T²/4 in the response of linear attention halved": (
        "figure1", {"activation": "linear"}, "pretraining.py",
        "stiff = V + T**2 / 4", "stiff = V + T**2 / 8",
    ),
    "effective noise without the norm of the weights": (
        "figure1", {"activation": "linear"}, "errors.py",
        "label_variance - 2 * M + Q", "label_variance - 2 * M",
    ),
    "threshold of weight decay halved": (
        "figure1", {"activation": "linear"}, "regularizers.py",
        "return jnp.sqrt(Q_hat) / M_hat, 2 * self.scaled_penalty / M_hat",
        "return jnp.sqrt(Q_hat) / M_hat, self.scaled_penalty / M_hat",
    ),
    "S-transform of the teacher left out": (
        "figure1", {"activation": "linear"}, "spectrum.py",
        "x + c - 1.0 / c", "x + c",
    ),
    "force square q̂ of LoRA doubled": (
        "figure1", {"activation": "linear"}, "finetuning.py",
        "q_hat = alpha * out.force_square", "q_hat = 2 * alpha * out.force_square",
    ),
    "sign of the response (Onsager) term of LoRA": (
        "figure1", {"activation": "linear"}, "finetuning.py",
        "response = -alpha / s * out.force_noise", "response = alpha / s * out.force_noise",
    ),
    "centring −q left out": (
        "figure1", {"activation": "linear"}, "finetuning.py",
        "levels = fields.levels + q", "levels = fields.levels",
    ),
    "overlap of the task left out of the test error": (
        "figure1", {"activation": "linear"}, "errors.py",
        "noise + signal**2 + point.q**2 - 2 * point.m**2", "noise + signal**2 + point.q**2",
    ),
    "∂_qℓ dropped": (
        "contraction", {"column": "LoRA, softmax"}, "finetuning.py",
        "v_hat = response + 2 * alpha * out.norm_slope", "v_hat = response",
    ),
    "signal M̂ without its Onsager part": (
        "published", {"tokens": "2"}, "pretraining.py",
        "M_hat = (signal + M * V_hat) / channel.label_variance",
        "M_hat = signal / channel.label_variance",
    ),
    "replicon with V̂ for V̂²": (
        "contraction", {"column": "pre-training, linear"}, "stability.py",
        "weight * V_hat**2 / (constants", "weight * V_hat / (constants",
    ),
    "half threshold at another height": (
        "decay", {"curve": "least"}, "parametrised.py",
        "3 * jnp.cbrt(V_hat", "2.5 * jnp.cbrt(V_hat",
    ),
    "re-used sequences without their share of T²/4 + V": (
        "figure3", {"activation": "linear", "finetuning.sequences": "reused"}, "branches.py",
        "self.V / (before.V + tokens**2 / 4)", "self.V / (before.V + tokens**2)",
    ),
}  # fmt: skip


def verdict(table, fields):
    """That of the first recipe on the first rows with these fields."""
    rows = check.theory_of(FIGURES / f"{table}.csv")
    for name, value in fields.items():
        rows = rows[rows[name] == value]
    return check.checked(table, check.RECIPES[table][0], rows, 1)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_equations_are_red(mistake, tmp_path, monkeypatch):
    table, fields, *replacement = WRONG[mistake]
    theory = mutant(tmp_path, *replacement)
    for module in (check, contraction, decay, published):
        monkeypatch.setattr(module, "predict", theory.predict)
    assert verdict(table, fields).deviations


@pytest.mark.slow
def test_an_unchanged_copy_is_green(tmp_path, monkeypatch):
    same = "stiff = V + T**2 / 4"
    monkeypatch.setattr(check, "predict", mutant(tmp_path, "pretraining.py", same, same).predict)
    found = verdict("figure1", {"activation": "linear"})
    assert not found.deviations
    assert found.numbers == 3


def test_a_changed_number_is_red():
    rows = check.theory_of(FIGURES / "decay.csv")
    rows = rows[rows["curve"] == "weight_decay"].copy()
    first = rows.index[0]
    rows.loc[first, "value"] = f"{1.0001 * float(rows.loc[first, 'value']):.8g}"
    found = check.checked("decay", check.RECIPES["decay"][0], rows, 1)
    (deviation,) = found.deviations
    assert "learned_rank" in deviation.where
    assert found.numbers == 8  # four observables, each with the replicon


def test_every_row_of_every_committed_table_is_checked():
    tables = {path.stem for path in FIGURES.glob("*.csv")} - {"validation_runs"}
    assert tables == set(check.RECIPES) == set(reproduce.EXPERIMENTS)
    for name, recipes in check.RECIPES.items():
        rows = check.theory_of(FIGURES / f"{name}.csv")
        covered = [rows if one.rows is None else rows[one.rows(rows)] for one in recipes]
        assert all(map(len, covered)), name
        assert set().union(*(part.index for part in covered)) == set(rows.index), name
