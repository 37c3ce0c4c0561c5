"""Sphinx: the pages of the repository as HTML, with links and pictures as they are on GitHub.

The root of the sources is the repository, so that links out of docs/ are right in both places.
"""

import re
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from docutils import nodes

project = "lora_theory"
author = "The lora_theory developers"
version = release = version_of("lora-theory")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_parser",
    "sphinx-mathjax-offline",
]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "docs/**.rst", "figures/*.md", "paper/*.md"]
include_patterns += ["tests/reference/*.md"]
exclude_patterns = [".*", "docs/_build", "figures/quick", "figures/*-runs"]

myst_enable_extensions = ["dollarmath", "html_image"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4
mathjax3_config = {"chtml": {"scale": 0.9}}

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"ArrayLike": "ArrayLike"}
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_google_docstring, napoleon_numpy_docstring = True, False

html_theme = "furo"
html_static_path, html_css_files = ["static"], ["pages.css"]
html_title = f"{project} {version}"
html_copy_source = html_show_copyright = html_show_sphinx = False


def _figure_page(app: Any, name: str, source: list[str]) -> None:
    """Captions in figures/ are pages here, with the picture they belong to."""
    if name.startswith("figures/"):
        stem = Path(name).name
        title = re.sub(r"^(figure)?", lambda word: "Figure " if word[1] else "Figure: ", stem)
        picture = f"# {title.replace('_', ' ')}\n\n![{title}]({stem}.png)\n"
        files = f"Table: [{stem}.csv]({stem}.csv); for print: [{stem}.pdf]({stem}.pdf).\n"
        source[0] = "\n".join([picture, source[0], files])


def _plain_display(app: Any, tree: Any) -> None:
    """Equations as written: Sphinx's own wrapping of those with ``\\\\`` allows no ``\\tag``."""
    for equation in tree.findall(nodes.math_block):
        equation["no-wrap"] = True
        equation[:] = [nodes.Text(f"\\[{equation.astext()}\\]")]


def _short_types(app: Any, *described: Any) -> tuple[str | None, ...]:
    """Types of arrays in signatures by the names that the package imports."""
    long = re.compile(r"jaxlib\._jax\.|TypeAliasForwardRef\('(\w+)'\)")
    return tuple(part and long.sub(r"\1", part) for part in described[-2:])


def _plain_text(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings write formulas as plain text: their *, | and _ are no markup."""
    in_example = False
    for place, line in enumerate(lines):
        in_example = bool(line.strip()) and (in_example or line.lstrip().startswith(">>>"))
        if not in_example:
            parts = re.split(r"(``.+?``|`.+?`)", line)
            parts[::2] = [re.sub(r"[*|]|_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
            lines[place] = "".join(parts)


def setup(app: Any) -> None:
    """Connect them."""
    app.connect("autodoc-process-docstring", _plain_text, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", _short_types)
    app.connect("source-read", _figure_page)
    app.connect("doctree-read", _plain_display)
