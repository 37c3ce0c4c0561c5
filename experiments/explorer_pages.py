"""The pictures of the explorer in the README, taken of its page in Chromium (make browser).

    python experiments/explorer_pages.py

Each is a problem of the menu in one of the views, at 1280 × 800, when its refinement is done.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import sync_playwright

from lora_theory.explorer.exports import address
from lora_theory.explorer.presets import PRESETS

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "images"
COMMAND = [sys.executable, "-m", "lora_theory.cli", "explore", "--no_browser", "--port", "0"]
#: picture: (problem of the menu, options of the view)
PAGES = {
    "curve": ("Published Fig 1, linear", {"along": "finetuning.samples", "from": "1", "to": "30"}),
    "trajectory": ("Published Fig 3, re-used", {"along": "pretraining.penalty"}),
    "spectrum": ("Truncated weights", {}),
    "noise": ("Published Fig 3, re-used", {}),
    "map": ("LoRA worse than frozen", {"x": "finetuning.penalty", "y": "finetuning.samples"}),
    "trial": ("Published Fig 1, linear", {"dims": "40, 80", "seeds": "8"}),
}  # fmt: skip
PATIENCE = 600_000  # ms


def main() -> None:
    chosen = sys.argv[1:] or list(PAGES)
    FOLDER.mkdir(exist_ok=True)
    server = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True)
    url = re.search(r"http://\S+", server.stdout.readline()).group()
    try:
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            for view in chosen:
                name, options = PAGES[view]
                page = chromium.new_page(viewport={"width": 1280, "height": 800})
                page.set_default_timeout(PATIENCE)
                query = {**address(PRESETS[name].problem), "view": view, **options}
                page.goto(f"{url}?{urlencode(query)}")
                page.locator("section.readouts[data-state=refined]").wait_for()
                if view == "trial":
                    page.get_by_role("button", name="Simulate").click()
                    page.get_by_text("16 of 16 runs have ended").wait_for()
                page.locator(f"figure[data-view={view}][data-done='1.000']").wait_for()
                page.wait_for_timeout(1000)
                page.screenshot(path=FOLDER / f"explorer-{view}.png")
                page.close()
                print(view, flush=True)
            chromium.close()
    finally:
        server.terminate()
        server.communicate()


if __name__ == "__main__":
    main()
