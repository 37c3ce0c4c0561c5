"""The explorer in Chromium: from the press of a key to the numbers and the picture; memory."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from common import Column, Part, Row, fresh

NOTES = """
Wall seconds from the press of an arrow key on the slider of λ to the readouts or picture on the
page, which runs on the same cores: medians of 5 (3 for softmax), after a first move that compiles.
coarse: readouts on few nodes, over one prediction on as many nodes without a page; refined: those
that predict gives by default, which begin .25 s after the last move, after the first picture;
picture: the first, coarse curve of a field that was not shown before.

Memory of the server, resident, after 100 and after 500 moves of the slider, each awaited, to values
that were not shown before, while the curve is shown.
"""
COLUMNS = (
    Column("case", "case"),
    Column("coarse_s", "coarse s", ".2f"),
    Column("over_predict", "over predict", ".2f"),
    Column("refined_s", "refined s", ".2f"),
    Column("picture_s", "curve s", ".2f"),
    Column("after_100_mib", "MiB at 100", ".0f"),
    Column("after_500_mib", "MiB at 500", ".0f"),
)
COMMAND = [sys.executable, "-m", "lora_theory.cli", "explore", "--no_browser", "--port", "0"]
PATIENCE = 300_000  # ms


def _resident(process_id: int) -> float:
    status = Path(f"/proc/{process_id}/status").read_text(encoding="utf-8")
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024  # type: ignore[union-attr]


class Page:
    """The page of a problem, driven by keys."""

    def __init__(self, chromium: Any, url: str, query: dict[str, str]) -> None:
        self.page = chromium.new_page(viewport={"width": 1280, "height": 800})
        self.page.set_default_timeout(PATIENCE)
        self.page.goto(f"{url}?{urlencode(query)}")
        self.until("refined")

    def until(self, *states: str, than: str = "") -> float:
        """Seconds until the readouts are in one of these states, and of another problem."""
        start = time.perf_counter()
        self.page.wait_for_function(
            """([states, than]) => {
              const at = document.querySelector("section.readouts");
              return at && states.includes(at.dataset.state) && at.dataset.problem !== than;
            }""",
            arg=[states, than],
            polling=10,
        )
        return time.perf_counter() - start

    def press(self, key: str = "ArrowRight") -> str:
        """Move λ; the problem that was shown."""
        before = self.shown()
        self.page.get_by_role("slider", name="pretraining.penalty ").press(key)
        return before

    def shown(self) -> str:
        """The problem of the readouts."""
        return str(self.page.locator("section.readouts").get_attribute("data-problem"))

    def picture(self, field: str) -> float:
        """Seconds until the curve along a field is there."""
        start = time.perf_counter()
        self.page.get_by_role("combobox", name="along ").select_option(field)
        self.page.locator(f"figure[data-along='{field}']").wait_for()
        return time.perf_counter() - start


def moves(activation: str, presses: int, count: int) -> Row:
    """To be called in a fresh process."""
    from playwright.sync_api import sync_playwright

    from lora_theory import predict
    from lora_theory.explorer.answers import COARSE
    from lora_theory.explorer.exports import address
    from lora_theory.explorer.presets import PRESETS

    problem = PRESETS["Published Fig 1, linear"].problem.replace(
        {"tokens": 2, "activation": activation}
    )
    settings = {"nodes": COARSE.nodes, "blocks": COARSE.blocks}
    predict(problem, **settings)
    start = time.perf_counter()
    for index in range(5):
        predict(problem.replace({"pretraining.penalty": 0.1 + 0.01 * (index + 1)}), **settings)
    alone = (time.perf_counter() - start) / 5
    server = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True)
    row: Row = {"case": f"{activation} T=2"}
    try:
        assert server.stdout is not None
        url = re.search(r"http://\S+", server.stdout.readline()).group()  # type: ignore[union-attr]
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            page = Page(chromium, url, {**address(problem), "view": "spectrum"})
            page.until("refined", than=page.press())
            coarse, refined = [], []
            for _ in range(count):
                before = page.press()
                coarse.append(page.until("coarse", "refined", than=before))
                refined.append(coarse[-1] + page.until("refined"))
            row |= {
                "coarse_s": statistics.median(coarse),
                "over_predict": statistics.median(coarse) / alone,
                "refined_s": statistics.median(refined),
            }
            page.page.get_by_role("radio", name="Curve").check()
            page.page.locator("figure[data-view=curve]").wait_for()
            row["picture_s"] = page.picture("finetuning.samples")
            if presses:
                row |= _memory(page, server.pid, presses)
            chromium.close()
    finally:
        server.terminate()
        server.communicate()
    return row


def _memory(page: Page, process_id: int, presses: int) -> Row:
    """Resident memory while λ goes up and down and the penalty of LoRA a step with each turn."""
    row: Row = {}
    typed = page.page.get_by_role("textbox", name="finetuning.penalty ")
    for index in range(presses):
        if index and index % 50 == 0:
            before = page.shown()
            typed.fill(f"{0.5 + index / 1000}")
            typed.press("Enter")
            page.until("coarse", "refined", than=before)
        before = page.press("ArrowLeft" if index // 50 % 2 else "ArrowRight")
        page.until("coarse", "refined", than=before)
        if index + 1 in (presses // 5, presses):
            page.until("refined")
            row[f"after_{500 * (index + 1) // presses}_mib"] = _resident(process_id)
    return row


def measure(toy: bool = False) -> Part:
    """The part; a toy moves less often."""
    if shutil.which("chromium") is None:
        return Part(NOTES, COLUMNS, [], skipped="Chromium is not installed: make browser")
    rows = [
        fresh(
            "explorer.moves", activation="linear", presses=20 if toy else 500, count=2 if toy else 5
        ),
        fresh("explorer.moves", activation="softmax", presses=0, count=1 if toy else 3),
    ]
    return Part(NOTES, COLUMNS, rows)
