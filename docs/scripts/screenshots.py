"""Takes the pictures of the dashboard and of the report that README.md shows, from a real storage.

    python docs/scripts/screenshots.py [--storage URL] [--artifacts DIR]

It takes Chromium, playwright and a finished `make demo`. Look at what it makes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from generated import DOCS
from playwright.sync_api import sync_playwright

IMAGES = DOCS / "images"
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
SETTLE_MS = 5000  # until plots are drawn
TO_OUR_FIGURES = {"x": 0, "y": 0, "width": 1440, "height": 1715}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--storage", default="sqlite:///storage/accelsearch.db")
    parser.add_argument("--artifacts", default="storage/artifacts")
    options = parser.parse_args()
    where = ["--storage", options.storage, "--artifacts", options.artifacts]
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=QUIET)
        page = browser.new_page(viewport={"width": 1440, "height": 1000}, color_scheme="light")
        dashboard(page, where)
        report(page, where)
        browser.close()
    return 0


def dashboard(page: Any, where: list[str]) -> None:
    """The first study, where our figures are."""
    command = [sys.executable, "-m", "accelsearch", "dashboard", "--port", "0", *where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            page.goto(address)
            # By its address: what is known of a study that was clicked at in the list is less.
            page.wait_for_selector("a[href*='/studies/']")
            study = page.eval_on_selector("a[href*='/studies/']", "link => link.href")
            page.goto(study)
            page.wait_for_timeout(SETTLE_MS)
            page.screenshot(path=IMAGES / "dashboard.png", full_page=True, clip=TO_OUR_FIGURES)
        finally:
            server.terminate()


def report(page: Any, where: list[str]) -> None:
    """The first screens of the report of all studies."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.html"
        command = [sys.executable, "-m", "accelsearch", "report", "--out", str(file), *where]
        subprocess.run(command, check=True)
        page.goto(file.as_uri())
        page.wait_for_timeout(SETTLE_MS)
        page.screenshot(path=IMAGES / "report.png")


if __name__ == "__main__":
    raise SystemExit(main())
