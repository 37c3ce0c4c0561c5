"""The catalogue of equations and its LaTeX."""

import re

import pytest
from matplotlib.mathtext import MathTextParser

from lora_theory.symbolic import equations, latex_equations, write_latex
from lora_theory.symbolic import notation as n
from lora_theory.symbolic.series import PowerSeries


def test_every_equation_is_there_in_latex():
    latex = latex_equations()
    assert list(latex) == list(equations())
    assert len(latex) >= 80
    for name, text in latex.items():
        assert re.fullmatch(r"\S.* = \S.*", text), name


@pytest.mark.parametrize(("opening", "closing"), [("{", "}"), ("(", ")"), (r"\left", r"\right")])
def test_brackets_are_balanced(opening, closing):
    for name, text in latex_equations().items():
        assert text.count(opening) == text.count(closing), name


def test_matplotlib_can_set_every_equation():
    """A parser of its own: unknown commands and unbalanced groups raise."""
    parser = MathTextParser("path")
    for text in latex_equations().values():
        parser.parse(f"${text}$")
    with pytest.raises(ValueError, match="Expected"):
        parser.parse(r"$\frac{a}{$")


def test_no_internal_name_is_left_in_the_latex():
    """Words of three letters and more are commands, or set upright on purpose."""
    for name, text in latex_equations().items():
        upright = re.sub(r"\\mathrm\{\w+\}", "", text)
        words = set(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", upright))
        assert not words, name


def test_equations_have_no_free_symbol_without_meaning():
    internal = {"small", "gain", "product", "h", "H", "new", "zeros", "c", "pole", "zero"}
    for name, equation in equations().items():
        right = equation.right
        expression = right.expression if isinstance(right, PowerSeries) else right
        assert not {str(symbol) for symbol in expression.free_symbols} & internal, name


def test_known_equations_as_they_are_printed():
    latex = latex_equations()
    assert latex["weight_decay_norm"] == r"Q = \frac{\hat{M}^{2} J}{\hat{V}^{2}}"
    assert latex["lora_response"] == r"v = \frac{1}{2 \lambda' + \hat{v}}"
    assert latex["scaled_penalty"] == r"\tilde{\lambda} = \lambda \sqrt{\kappa}"
    assert latex["best_ridge_penalty"] == r"\lambda^{\star} = \frac{\Delta}{Q_0 T^{2}}"
    assert latex["ridge_many_effective_noise"].endswith(
        r"\mathcal{O}\left(\frac{1}{\alpha^{3}}\right)"
    )
    assert n.LATEX[n.teacher_rank] in latex["inverse_transform"]


def test_file_of_macros(tmp_path):
    path = write_latex(tmp_path / "equations.tex")
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    assert [path] == list(tmp_path.iterdir())
    pattern = re.compile(r"\\newcommand\{\\(eq[A-Za-z]+)\}\{(.+)\}% \S.*")
    found = [pattern.fullmatch(line) for line in lines]
    assert all(found)
    names = [match[1] for match in found]
    assert len(set(names)) == len(names) == len(equations())
    assert [match[2] for match in found] == list(latex_equations().values())
