"""The explorer in Chromium: what a researcher does with it, by mouse and by keyboard."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

import pandas as pd
import pytest
from playwright.sync_api import expect, sync_playwright

from lora_theory import Problem, predict
from lora_theory.explorer.controls import ON, values_of
from lora_theory.explorer.exports import address
from lora_theory.explorer.presets import PRESETS
from lora_theory.explorer.requests import VIEWS
from lora_theory.spelling import problem_of_texts

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: `make browser`"),
]
#: Solved in a moment, and the same for all tests, which share compiled programs.
START = PRESETS["Published Fig 1, linear"].problem.replace({"tokens": 2})
PATIENCE = 120_000  # ms; programs may have to be compiled


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, "-m", "lora_theory.cli", "explore", "--no_browser", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said = process.stdout.readline()
    yield re.search(r"http://127\.0\.0\.1:\d+/", said).group()
    process.terminate()
    process.communicate(timeout=30)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(server, browser):
    """Open pages; in the end nothing was asked of other hosts, and no console had an error."""
    contexts, hosts, errors = [], set(), []

    def open_page(problem=START, *, width=1280, height=800, view="spectrum", **options):
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.on("console", lambda told: errors.append(told.text) if told.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{server}?{urlencode({**address(problem), 'view': view, **options})}")
        refined(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert hosts - {""} == {urlsplit(server).netloc}  # "" are pictures within the page
    assert errors == []


def refined(page):
    """Wait until the readouts are refined."""
    page.locator("section.readouts[data-state=refined]").wait_for()


@contextlib.contextmanager
def moving(page):
    """Wait until what is done inside has led to refined readouts of another problem."""
    section = page.locator("section.readouts")
    before = section.get_attribute("data-problem")
    yield
    expect(section).not_to_have_attribute("data-problem", before, timeout=PATIENCE)
    refined(page)


def asked(page):
    """The problem of the readouts."""
    text = page.locator("section.readouts").get_attribute("data-problem")
    return problem_of_texts(dict(parse_qsl(text)))


def slider(page, field):
    return page.get_by_role("slider", name=f"{field} ")


def readouts(page):
    cells = page.locator("section.readouts td").all()
    return {c.get_attribute("data-name"): float(c.get_attribute("data-value")) for c in cells}


def assert_is_predicted(page):
    """All digits of the readouts against predict for the problem in the address."""
    expected = predict(asked(page))
    for name, value in readouts(page).items():
        stage, _, observable = name.partition(".")
        assert value == pytest.approx(getattr(getattr(expected, stage), observable), rel=1e-9)


def test_sliders_move_the_readouts(visit):
    page = visit()
    assert asked(page) == START
    assert_is_predicted(page)
    before = readouts(page)
    for field, key in (("pretraining.penalty", "ArrowRight"), ("label_noise", "Home")):
        with moving(page):
            slider(page, field).press(key)
    typed = page.get_by_role("textbox", name="finetuning.samples ")
    typed.fill("4.123456789")
    with moving(page):
        typed.press("Enter")
    problem = asked(page)
    assert problem.label_noise == 0
    assert problem.finetuning.samples == 4.123456789
    assert problem.pretraining.penalty > START.pretraining.penalty
    assert_is_predicted(page)
    after = readouts(page)
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)
    page.reload()  # the address brings it back
    refined(page)
    assert asked(page) == problem
    assert readouts(page) == after


def test_menus_and_switches_show_the_fields_that_apply(visit):
    page = visit()
    expect(slider(page, "teacher.exponent")).to_be_hidden()
    with moving(page):
        page.get_by_role("combobox", name="teacher.law ").select_option("power_law")
    expect(slider(page, "teacher.exponent")).to_be_visible()
    expect(slider(page, "teacher_rank")).to_be_hidden()
    assert asked(page).teacher.law == "power_law"
    assert_is_predicted(page)
    with moving(page):
        page.get_by_role("checkbox", name="finetuning Fine-tuning").uncheck()
    assert asked(page).finetuning is None
    expect(slider(page, "finetuning.samples")).to_be_hidden()
    assert not any(name.startswith("finetuning") for name in readouts(page))
    page.get_by_role("checkbox", name="covariance ").check()
    refusal = "teacher.law = 'power_law' is not allowed with covariance"
    expect(page.get_by_role("status").filter(has_text=refusal)).to_be_visible()
    expect(page.get_by_role("alert").filter(has_text=refusal).first).to_contain_text(refusal)


def test_each_view_is_a_picture_with_a_caption(visit):
    page = visit()
    for view in VIEWS.keys() - {"trial"}:
        page.get_by_role("radio", name=VIEWS[view]).check()
        picture = page.locator(f"figure[data-view={view}] img")
        picture.wait_for()
        assert picture.evaluate("picture => picture.naturalWidth") > 800
        assert picture.bounding_box()["width"] > 600
        caption = page.locator("figure.view figcaption").inner_text()
        assert len(caption) > 60
        assert picture.get_attribute("alt") in caption


def test_keyboard_alone_is_enough(visit):
    page = visit()
    page.get_by_role("combobox", name="activation ").focus()
    page.keyboard.press("Tab")  # on to the slider below
    focused = "document.activeElement"
    name = page.evaluate_handle(
        f"() => {{ let e = {focused}; while (e.shadowRoot) e = e.shadowRoot.activeElement;"
        " return e.getAttribute('aria-label'); }"
    ).json_value()
    assert name.startswith("teacher_rank ")
    with moving(page):
        page.keyboard.press("ArrowLeft")
    assert asked(page).teacher_rank < START.teacher_rank
    page.get_by_role("radio", name="Spectrum").focus()
    page.keyboard.press("ArrowRight")
    page.locator("figure[data-view=noise] img").wait_for()
    assert "view=noise" in page.url


def test_a_malformed_file_is_refused_and_a_good_one_shown(visit, tmp_path):
    page = visit()
    bad, good = tmp_path / "bad.toml", tmp_path / "good.toml"
    bad.write_text(START.to_toml().replace("label_noise = 0.5", "label_noise = -0.5"))
    imported = START.replace({"pretraining.penalty": 0.1 + 0.2})
    imported.to_toml(good)
    chooser = page.locator("input[type=file]").first
    chooser.set_input_files(bad)
    expect(page.get_by_role("alert").first).to_contain_text(
        "bad.toml is not shown: label_noise = -0.5 is not allowed: it must be ≥ 0"
    )
    assert asked(page) == START
    assert_is_predicted(page)
    with moving(page):
        chooser.set_input_files(good)
    assert asked(page) == imported
    assert_is_predicted(page)


def test_presets_fill_the_controls(visit):
    page = visit()
    with moving(page):
        page.get_by_role("combobox", name="Begin with").select_option("Truncated weights")
    assert asked(page) == PRESETS["Truncated weights"].problem
    expect(page.get_by_role("checkbox", name="compression ")).to_be_checked()
    page.locator("figure[data-view=curve] img").wait_for()


def test_what_is_shown_can_be_taken_away(visit, tmp_path):
    page = visit(view="spectrum")
    page.locator("figure[data-view=spectrum] img").wait_for()
    found = {}
    for label in ("Figure (PDF)", "Figure (PNG)", "Table (CSV)", "Problem (TOML)"):
        with page.expect_download() as download:
            page.get_by_role("link", name=label).click()
        found[label] = Path(download.value.path()).read_bytes()
    assert found["Figure (PDF)"].startswith(b"%PDF")
    assert found["Figure (PNG)"].startswith(b"\x89PNG")
    assert Problem.from_dict(tomllib.loads(found["Problem (TOML)"].decode())) == START
    (tmp_path / "table.csv").write_bytes(found["Table (CSV)"])
    assert len(pd.read_csv(tmp_path / "table.csv")) > 50
    page.get_by_text("Command", exact=True).click()
    expect(page.locator("pre:visible")).to_contain_text("lora-theory spectrum --tokens 2")


def test_two_sessions_do_not_disturb_each_other(visit):
    one, other = visit(), visit()
    before = readouts(other)
    with moving(one):
        slider(one, "label_noise").press("Home")
    assert asked(other) == START
    assert readouts(other) == before
    with moving(other):
        slider(other, "label_noise").press("End")
    assert asked(one).label_noise == 0
    assert asked(other).label_noise == 2
    assert_is_predicted(one)
    assert_is_predicted(other)


def children(process_name):
    """Processes of the simulation."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode()
        except OSError:
            continue
        if process_name in command:
            found.append(folder.name)
    return found


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc to see processes")
def test_a_long_simulation_leaves_the_page_alive_and_can_be_cancelled(visit):
    page = visit(view="trial", dims="200", seeds="32")
    expect(page.locator("p.sentence")).to_contain_text("press Simulate")
    page.get_by_role("button", name="Simulate").click()
    words = page.locator("p.trial")
    expect(words).to_contain_text("trains its first run")
    with moving(page):
        slider(page, "label_noise").press("Home")
    assert_is_predicted(page)
    assert children("lora_theory.explorer.trial")
    page.get_by_role("button", name="Cancel").click()
    expect(words).to_contain_text("Cancelled")
    page.wait_for_timeout(1000)
    assert not children("lora_theory.explorer.trial")


@pytest.mark.exhaustive  # the server forgets a page half a minute after it is closed
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc to see processes")
def test_a_simulation_ends_with_its_page(visit):
    page = visit(view="trial", dims="200", seeds="32")
    page.get_by_role("button", name="Simulate").click()
    expect(page.locator("p.trial")).to_contain_text("trains its first run")
    end = time.monotonic() + 90
    while not children("lora_theory.explorer.trial"):
        assert time.monotonic() < end
    page.close()
    while children("lora_theory.explorer.trial"):
        assert time.monotonic() < end
        time.sleep(1)


def test_simulation_stands_beside_theory(visit):
    page = visit(view="trial", dims="12, 16", seeds="3")
    page.get_by_role("button", name="Simulate").click()
    expect(page.locator("p.trial")).to_contain_text("6 of 6 runs have ended", timeout=PATIENCE)
    picture = page.locator("figure[data-view=trial] img")
    picture.wait_for()
    expect(page.locator("figcaption")).to_contain_text("z")
    page.get_by_role("radio", name="Curve").check()
    expect(page.locator("figure[data-view=curve] figcaption")).to_contain_text("simul")


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (400, 800)])
def test_the_page_fits_its_window(visit, width, height):
    page = visit(width=width, height=height, view="curve")
    picture = page.locator("figure[data-view=curve]")  # scrolls where it is too narrow to read
    picture.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = picture.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    if width < 600:  # the controls are behind a button
        page.get_by_role("button").first.click()
    with moving(page):
        slider(page, "pretraining.samples").press("ArrowRight")
    assert asked(page).pretraining.samples > START.pretraining.samples
    assert values_of(asked(page))["finetuning"] == ON
