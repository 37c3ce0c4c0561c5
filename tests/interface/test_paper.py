"""The paper: every number comes from a committed table, and LaTeX takes it without a warning."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import paper_numbers as parts
import pytest
import write_paper
from paper_rows import MissingError, Number, Tables, in_digits, printed
from paper_tables import TABLES

from lora_theory.symbolic.catalogue import equations
from lora_theory.symbolic.latex import macro_name

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "paper" / "main.tex").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tables():
    return Tables(ROOT)


@pytest.fixture(scope="module")
def found(tables):
    return parts.numbers(tables)


def read(name):
    return pd.read_csv(ROOT / name)


# -- the text --------------------------------------------------------------------------------------

NAMES = r"\\(?:ref|eqref|label|cite|figureof|texttt|begin|end)\{[^}]*\}"
FORMULAS = r"\$([^$]*)\$|\\begin\{((?:equation|align|gather)\*?)\}(.*?)\\end\{\2\}"
GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"
NUMBER_WORDS = (
    r"\b(?:three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|\w+ty(?=-)|twenty|thirty"
    r"|forty|fifty|sixty|hundred|thousand|million|dozen|twice|thrice|percent|half|quarter)\b"
)
RELATION = r"(?:=|<|>|\\(?:leq?|geq?|ll|gg|approx|simeq|sim|propto)(?![a-z]))"


def own_numbers(source):
    r"""What is a number in the body of a text, and not of a macro.

    Left out: comments, names (\ref, \cite, …), the bibliography, "section~9" of another document.
    In text no digit and no number word above two; in formulas only the integers 0, 1, 2 and 4 as
    constants, after a relation 0 and 1 alone; subscripts and exponents are free.
    """
    body = source.split(r"\begin{document}")[1].split(r"\begin{thebibliography}")[0]
    body = re.sub(r"(?<!\\)%.*|section~\d+", " ", body)
    formulas = [inline or display for inline, _, display in re.findall(FORMULAS, body, re.DOTALL)]
    text = re.sub(NAMES, " ", re.sub(FORMULAS, " ", body, flags=re.DOTALL))
    found = re.findall(r"\S*\d\S*", text) + re.findall(NUMBER_WORDS, text, re.IGNORECASE)
    for formula in formulas:
        bare = re.sub(rf"{NAMES}|[_^](?:{GROUP}|\\[a-zA-Z]+|.)", " ", formula)
        constants = re.findall(r"\d*\.\d+|\d+", bare)
        found += [constant for constant in constants if constant not in {"0", "1", "2", "4"}]
        found += re.findall(rf"{RELATION}\s*[-+]?\s*[24](?!\s*\\?[a-zA-Z(])", bare)
    return found


def test_no_number_is_typed_into_the_text():
    assert own_numbers(TEXT) == []


@pytest.mark.parametrize(
    "typed",
    [
        "the error is 0.23", "at $D=100$", r"$\lambda=.1$", "all of twelve problems", "99 cells",
        r"$\chi^2\le 2$", "$E'=0.5$", "half of the gain", r"a rank of $3D$", r"within 4\,\%",
        "\n\\begin{equation}\nE'=0.7\n\\end{equation}\n",
    ],
)  # fmt: skip
def test_a_typed_number_is_found(typed):
    assert own_numbers(TEXT.replace(r"\section{Results}", rf"\section{{Results}} {typed} ")) != []


@pytest.mark.parametrize(
    "innocent", [r"$Q_0=1+\kappa_0$", r"$e=1$", r"$D^{-1/2}$", "section~7", r"$P_0D/2$", "% 17"]
)
def test_what_belongs_to_the_model_is_no_number_of_its_own(innocent):
    assert own_numbers(TEXT.replace(r"\maketitle", f"\\maketitle {innocent}\n")) == []


def used(prefix):
    return set(re.findall(rf"\\({prefix}[A-Z][A-Za-z]*)", TEXT))


def test_every_macro_is_generated_and_every_number_is_used(found):
    assert used("(?:num|par)") == set(found)
    assert used("tab") == set(TABLES)
    exported = {macro_name(name) for name in equations()}
    assert used("eq") <= exported
    assert len(used("eq")) > 20


def test_what_is_installed_for_it_is_told_alike():
    for page in ("README.md", "paper/README.md"):
        assert write_paper.PACKAGES in (ROOT / page).read_text(encoding="utf-8"), page


# -- the numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.22871, 0.00112, "0.2287(11)"), (0.0344, 0.00032, "0.0344(3)"), (1.5, 0.2, "1.5(2)"),
        (0.5, 0.0197, "0.50(2)"), (0.5, 0.0194, "0.500(19)"), (104.9, 1.04, "104.9(1.0)"),
        (1284.2, 35.0, "1284(35)"), (-0.0498, 0.0033, "-0.050(3)"), (0.23, 0.0096, "0.23(1)"),
        (0.23, 0.0995, "0.23(10)"), (0.573148, 0.0, "0.5731"), (12.0, 0.0, "12.00"),
    ],
)  # fmt: skip
def test_a_number_is_printed_with_its_error(value, error, text):
    assert printed(Number(value, error)) == rf"\ensuremath{{{text}}}"


def test_an_error_below_the_digits_shown_is_left_out():
    assert in_digits(Number(0.0270460, 2e-7)) == r"\ensuremath{0.0270}"
    assert in_digits(Number(0.0281, 0.0005)) == r"\ensuremath{0.0281(5)}"


@pytest.mark.parametrize("error", [np.nan, np.inf, -0.1])
def test_a_number_without_an_error_is_refused(error):
    with pytest.raises(MissingError, match="no number with an error"):
        printed(Number(1.0, error))


def digits(text):
    """The value and the error of what is printed."""
    value, error = re.fullmatch(r"\\ensuremath\{(-?[\d.]+)(?:\(([\d.]+)\))?\}.*", text).groups()
    decimals = len(value.partition(".")[2])
    scaled = 0 if error is None else float(error) * (1 if "." in error else 10.0**-decimals)
    return float(value), scaled, 0.5001 * 10.0**-decimals


def test_numbers_are_those_of_the_tables_by_another_route(found):
    collapse = read("figures/collapse.csv").query("activation == 'linear'")
    here = collapse[collapse["observable"].eq("overlap") & collapse["family"].isin([*"ABCDEF"])]
    keys = ["family", "finetuning.samples"]
    limits = here[np.isinf(here["dim"])].set_index(keys)
    line = here[here["source"] == "theory"].set_index(keys).loc[limits.index]
    z = (limits["value"] - line["value"]) / np.hypot(limits["error"], line["error"])
    expected = {"numCollapseLinearOverlap": (z**2).sum(), "numCollapsePoints": len(z)}

    low = read("figures/lowrank.csv").query("row == 'softmax' and kind == 'fresh'")
    low = low.query("source == 'theory' and method == 'truncation'")
    values = low.pivot(index="strength", columns="observable", values="value").sort_values("rank")
    expected["numLowrankTruncated"] = np.interp(0.2, values["rank"], values["variance"])

    reused = read("figures/mismatch.csv").query("activation == 'linear' and source == 'simulation'")
    reused = reused[reused["observable"].eq("test_error_difference")]
    reused = reused[reused["part"].eq("along pretraining.penalty")]
    reused = reused[reused["finetuning.sequences"].eq("reused")]
    reused = reused[np.isclose(reused["pretraining.penalty"], 0.02)]
    expected["numLessReusedError"] = reused["value"].item()

    best = read("figures/optimal.csv").query("activation == 'softmax' and source == 'simulation'")
    best = best[best["observable"].eq("log_ratio") & best["objective"].eq("effective_noise")]
    small, large = (
        best[best["dim"].eq(dim) & np.isclose(best["pretraining.samples"], 0.2)].iloc[0]
        for dim in (50, 100)
    )
    expected["numRatioSoftmax"] = 2 * large["value"] - small["value"]
    error = np.hypot(2 * large["error"], small["error"])
    assert abs(digits(found["numRatioSoftmax"])[1] / error - 1) < 0.1

    cells = read("figures/validation.csv").dropna(subset="z")
    expected |= {"numCells": len(cells), "numChi": np.mean(cells["z"] ** 2)}
    expected["numLargestZ"] = cells["z"].abs().max()
    for name, value in expected.items():
        shown, _, rounding = digits(found[name])
        assert abs(shown - value) <= rounding * (10 if shown >= 10 else 1), name


def test_the_negative_result_is_in_the_table():
    """No method leaves less noise than the best weight decay, whatever its strength."""
    rows = read("figures/lowrank.csv").query("kind == 'fresh' and source == 'theory'")
    rows = rows[rows["status"] != "not_converged"]
    for activation, noise in (("linear", "delta_eff"), ("softmax", "variance")):
        here = rows[(rows["row"] == activation) & (rows["observable"] == noise)]
        least = here.groupby("method")["value"].min()
        assert len(least) == 4
        assert (least.drop("weight_decay") > least["weight_decay"]).all()


def test_what_the_text_says_of_the_small_starts_is_so():
    rows = read("figures/decay.csv").query("curve == 'small' and source == 'simulation'")
    assert (rows["status"] == "not_converged").any()


# -- tables that lack something --------------------------------------------------------------------

#: Of each part of the numbers, a table and the rows that it loses.
LOST = (
    (parts.validation, "figures/validation.csv", {}),
    (parts.validation, "figures/published.csv", {"source": "published"}),
    (parts.effective_noise, "figures/collapse.csv", {"family": "D", "source": "simulation"}),
    (parts.optimal, "figures/optimal.csv", {"objective": "effective_noise", "dim": 50.0}),
    (parts.figure3, "figures/figure3.csv", {"observable": "overlap_best_penalty"}),
    (parts.mismatched, "figures/mismatch.csv", {"observable": "test_error_difference"}),
    (parts.price, "figures/price.csv", {"observable": "line_overlap", "dim": 50.0}),
    (parts.active, "figures/figure4.csv", {"finetuning.selection.score": "cross_token"}),
    (parts.active, "figures/selection.csv", {"observable": "best_c"}),
    (parts.active, "figures/rounds.csv", {"choice": "current cross_token", "dim": 240.0}),
    (parts.low_rank, "figures/lowrank.csv", {"method": "truncation"}),
    (parts.low_rank, "figures/decay.csv", {"curve": "metastable"}),
    (parts.low_rank, "figures/covariance.csv", {"method": "anchored"}),
    (parts.deep_linear, "figures/deep_linear.csv", {"arm": "degree 5"}),
)


def test_every_part_of_the_numbers_is_tried():
    assert {part for part, *_ in LOST} == set(parts.PARTS)


@pytest.mark.parametrize(("part", "name", "rows"), LOST)
def test_a_missing_row_is_named(tables, part, name, rows):
    table = tables.all(name)
    lost = pd.Series(True, index=table.index)
    for column, value in rows.items():
        lost &= table[column] == value
    assert lost.any()
    poorer = Tables(ROOT, {name: table[~lost]})
    with pytest.raises(MissingError, match=re.escape(name)):
        dict(part(poorer))


def test_a_missing_table_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(MissingError, match="is not there: the paper takes numbers from it"):
        write_paper.generate(tmp_path, tmp_path / "generated")
    assert list(tmp_path.iterdir()) == []


# -- LaTeX -----------------------------------------------------------------------------------------


def test_complaints_of_latex_are_found():
    log = (
        "LaTeX Warning: Reference `fig:none' on page 1 undefined on input line 7.\n"
        "Overfull \\hbox (3.5pt too wide) in paragraph at lines 4--5\n"
        "Overfull \\hbox (1.5pt too wide) in paragraph at lines 6--7\n"
        "Underfull \\hbox (badness 10000) in paragraph at lines 8--9\n"
        "Package hyperref Warning: Token not allowed in a PDF string\n"
    )
    assert [line[:13] for line in write_paper.complaints(log)] == [
        "LaTeX Warning", "Package hyper", "Overfull \\hbo",
    ]  # fmt: skip


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A copy of the paper beside the tables and figures of the project."""
    for name in ("figures", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "main.tex").write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(write_paper, "ROOT", tmp_path)
    monkeypatch.setattr(write_paper, "PAPER", tmp_path / "paper")
    return tmp_path / "paper"


@pytest.mark.slow
def test_without_latex_everything_else_is_written(workshop, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(workshop))
    (workshop / "lora_theory.pdf").write_text("as it was")
    assert write_paper.main() == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert write_paper.PACKAGES in said[1]
    written = {path.name for path in (workshop / "generated").iterdir()}
    assert written == {"equations.tex", "numbers.tex", "tables.tex"}
    assert (workshop / "lora_theory.pdf").read_text() == "as it was"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("latexmk") is None, reason=f"needs LaTeX: {write_paper.PACKAGES}")
def test_latex_takes_the_paper_and_writes_the_same_bytes_twice(workshop, capsys):
    assert write_paper.main() == 0, capsys.readouterr().err
    first = (workshop / "lora_theory.pdf").read_bytes()
    assert first.startswith(b"%PDF")
    assert str(workshop).encode() not in first
    write_paper.build(workshop, workshop / "lora_theory.pdf")
    assert (workshop / "lora_theory.pdf").read_bytes() == first
    text = TEXT.replace(r"\section{Results}", r"\section{Results} \ref{nothing}")
    (workshop / "main.tex").write_text(text, encoding="utf-8")
    with pytest.raises(write_paper.BuildError, match="nothing"):
        write_paper.build(workshop, workshop / "lora_theory.pdf")
    (workshop / "main.tex").write_text(TEXT + r"\undefined", encoding="utf-8")
    assert (workshop / "lora_theory.pdf").read_bytes() == first
    assert sorted(path.name for path in workshop.iterdir()) == [
        "build", "generated", "lora_theory.pdf", "main.tex",
    ]  # fmt: skip
