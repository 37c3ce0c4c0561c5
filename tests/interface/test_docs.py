"""The pages of docs/ are true: blocks run, names are there, links lead somewhere."""

import contextlib
import importlib
import importlib.util
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_theory
from lora_theory import Problem
from lora_theory.laws import GOE, LAWS, Law
from lora_theory.theory.predict import solve_pretraining

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]  # README: test_readme.py
MANY_LINES = re.DOTALL | re.MULTILINE
API = sorted((DOCS / "api").glob("*.rst"))
PUBLIC = (
    "lora_theory", "lora_theory.theory", "lora_theory.simulation", "lora_theory.sweeps",
    "lora_theory.simulation.message_passing", "lora_theory.symbolic", "lora_theory.lowrank",
    "lora_theory.lowrank.deep_linear", "lora_theory.lowrank.spectral", "lora_theory.lowrank.tied",
)  # fmt: skip


# -- blocks ------------------------------------------------------------------------------------


def run_blocks(text: str) -> tuple[dict, list[tuple[str, str]]]:
    """The names that the blocks of Python leave, and what was printed beside what is shown."""
    names: dict = {"__name__": "__main__"}
    printed, pairs = "", []
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=MANY_LINES):
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(block, names)
            printed = out.getvalue()
        elif language == "text":
            pairs.append((printed, block))
    return names, pairs


def assert_alike(printed: str, shown: str) -> None:
    """Equal words; numbers equal within three units of the last digit shown."""
    words, expected = printed.split(), shown.split()
    assert len(words) == len(expected), f"{printed}\nis not\n{shown}"
    number = re.compile(r"(.*?)(-?\d+\.(\d+))(\D*)")
    for word, wanted in zip(words, expected, strict=True):
        parts, target = number.fullmatch(word), number.fullmatch(wanted)
        if target is None or parts is None:
            assert word == wanted, f"{printed}\nis not\n{shown}"
        else:
            assert (parts[1], parts[4]) == (target[1], target[4])
            assert abs(float(parts[2]) - float(target[2])) <= 3.01 * 10.0 ** -len(target[3])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tutorial", "index"])
def test_the_blocks_run_and_print_what_is_shown(name):
    _, pairs = run_blocks((DOCS / f"{name}.md").read_text(encoding="utf-8"))
    assert pairs
    for printed, shown in pairs:
        assert_alike(printed, shown)


@pytest.mark.slow
def test_the_guides_run_and_their_numbers_are_right():
    names, pairs = run_blocks((DOCS / "extending.md").read_text(encoding="utf-8"))
    assert len(pairs) == 3
    for printed, shown in pairs:
        assert_alike(printed, shown)

    law, drawn = names["Even"](), np.random.default_rng(0).uniform(0, 3**0.5, 100_000)
    assert isinstance(law, Law)
    with jax.enable_x64(True):
        found = complex(law.stieltjes(jnp.asarray(1.0 + 0.5j)))
    assert abs(found - np.mean(1 / (1.0 + 0.5j - drawn))) < 0.01
    np.testing.assert_allclose(law.moments(), [drawn.mean(), (drawn**2).mean()], rtol=0.01)
    other = names["predict"](Problem(teacher_rank=0.5, **names["shared"])).pretraining
    for name in ("Q", "M", "test_error"):
        value = getattr(names["new"], name)
        assert getattr(names["check"], name) == pytest.approx(value, rel=2e-3)
        assert getattr(other, name) != pytest.approx(value, rel=2e-2)  # the law matters
    solve_pretraining.cache_clear()  # of the law that stood in the place of another
    assert LAWS["goe"](None) == GOE()

    table = names["table"]
    row = table[(table["source"] == "theory") & (table["observable"] == "overlap")].iloc[1]
    beta = row["finetuning.rescaling"]
    quick = {"nodes": names["QUICK"].nodes, "blocks": names["QUICK"].blocks}
    stage = names["predict"](names["problem"](beta), **quick).finetuning
    assert row["value"] == pytest.approx(stage.overlap, rel=1e-7)
    assert set(table["source"]) == {"theory", "simulation"}
    assert "D = 24, mean ± standard error of 2 seeds" in names["caption"](table)


def test_another_number_is_no_match():
    assert_alike("overlap 0.964 ± 0.001", "overlap 0.962 ± 0.001")
    for other in ("overlap 0.968 ± 0.001", "error 0.962 ± 0.001", "overlap 0.962"):
        with pytest.raises(AssertionError):
            assert_alike(other, "overlap 0.962 ± 0.001")


def test_the_page_of_the_commands_is_what_they_say():
    spec = importlib.util.spec_from_file_location("commands_page", DOCS / "commands_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    again = "it is out of date: python docs/commands_page.py"
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), again


# -- names -------------------------------------------------------------------------------------


def resolved(path: str) -> object:
    """What a dotted path names."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_every_public_name_is_on_an_api_page():
    text = "".join(path.read_text(encoding="utf-8") for path in API)
    documented = re.findall(r"^\.\. auto(?:function|class|exception)::\s+(\S+)$", text, re.M)
    assert len(documented) == len(set(documented)) > 80
    things = {id(resolved(path)) for path in documented}
    for name in PUBLIC:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            thing = getattr(module, public)
            assert id(thing) in things or public in ("deep_linear", "spectral"), f"{name}.{public}"
    assert id(lora_theory.predict) in things
    assert id(test_another_number_is_no_match) not in things


# -- links and order ---------------------------------------------------------------------------


def without_blocks(path: Path) -> str:
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=MANY_LINES)


def slugs(path: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a file."""
    headings = re.findall(r"^#+ +(.*)$", without_blocks(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", LINKING, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_exist(page):
    text = re.sub(r"`[^`\n]*`", "", without_blocks(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert not anchor or anchor in slugs(linked), target


def listed(page: Path) -> set[Path]:
    """The pages in the tables of contents of a page, and in those of these."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        blocks = re.findall(r"^```\{toctree\}\n(.*?)^```$", text, flags=MANY_LINES)
    else:
        blocks = re.findall(r"^\.\. toctree::\n((?:\s*\n|   .*\n)*)", text, flags=re.MULTILINE)
    entries = [line.strip() for block in blocks for line in block.splitlines()]
    found: set[Path] = set()
    for entry in entries:
        if not entry or entry.startswith(":"):
            continue
        entry = re.sub(r".* <(.*)>", r"\1", entry)
        named = [page.parent.glob(entry + kind) for kind in (".md", ".rst")]
        here = [path.resolve() for paths in named for path in paths]
        assert here, entry
        for path in here:
            found |= {path} | (listed(path) if path.suffix == ".rst" or path != page else set())
    return found


def test_every_page_is_in_a_table_of_contents():
    wanted = {*PAGES, *API, *LINKING, ROOT / "README.md", *(ROOT / "figures").glob("*.md")}
    assert wanted - listed(DOCS / "index.md") == {DOCS / "index.md"}


# -- the pages themselves ----------------------------------------------------------------------


class Page(HTMLParser):
    """What a page loads, where it links, and its equations."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.equations = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag in ("img", "script") and given.get("src"):
            self.loaded.append(str(given["src"]))
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(str(given["href"]))
        if tag == "a" and given.get("href"):
            self.linked.append(str(given["href"]))
        self.equations += tag in ("div", "span") and "math" in str(given.get("class")).split()


@pytest.mark.slow
def test_the_pages_are_built_without_a_warning_and_without_a_network(tmp_path):
    out = tmp_path / "html"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", DOCS]
    command += ["-d", tmp_path / "doctrees", ROOT, out]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert not built.stderr
    pages = {path: Page() for path in out.rglob("*.html")}
    assert len(pages) > len(PAGES)
    for path, page in pages.items():
        page.feed(path.read_text(encoding="utf-8"))
        for target in page.loaded:
            assert (path.parent / re.split(r"[?#]", target)[0]).is_file(), (path.name, target)
        for target in page.linked:
            if not re.match(r"https?://|mailto:|#", target):
                assert (path.parent / re.split(r"[?#]", target)[0]).exists(), (path.name, target)
    assert pages[out / "docs" / "theory.html"].equations > 500
