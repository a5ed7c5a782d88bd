"""Takes the pictures of the report and of the dashboard that README.md shows, from a real storage.

    python docs/scripts/screenshot.py [--storage URL] [--artifacts DIR]

It takes Chromium, playwright, optuna-dashboard and a finished `make demo`. Look at what it makes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from generated import DOCS
from playwright.sync_api import sync_playwright

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
SETTLE_MS = 5000  # until plots are drawn
ACCELSEARCH = [sys.executable, "-m", "accelsearch"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--storage", default="sqlite:///storage/accelsearch.db")
    parser.add_argument("--artifacts", default="storage/artifacts")
    options = parser.parse_args()
    where = ["--storage", options.storage, "--artifacts", options.artifacts]
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        file = Path(folder) / "report.html"
        subprocess.run([*ACCELSEARCH, "report", "--out", str(file), *where], check=True)
        browser = started.chromium.launch(executable_path=chromium, args=QUIET)
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.goto(file.as_uri())
        page.wait_for_timeout(SETTLE_MS)
        page.screenshot(path=DOCS / "images" / "report.png")
        with served(where) as url:
            page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
            page.goto(f"{url}/studies/1")
            figure = page.get_by_text("Speedup against score loss", exact=False).first
            figure.wait_for()
            page.wait_for_timeout(SETTLE_MS)
            figure.evaluate("one => one.scrollIntoView()")
            page.mouse.wheel(0, -80)  # from under the bar at the top
            page.wait_for_timeout(1000)
            page.screenshot(path=DOCS / "images" / "dashboard.png")
        browser.close()
    return 0


@contextmanager
def served(where: Sequence[str]) -> Iterator[str]:
    """A dashboard on a free port of this machine, and its URL."""
    command = [*ACCELSEARCH, "dashboard", "--port", "0", *where]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        words = (word for line in server.stdout for word in line.split())
        url = next((word for word in words if "://" in word), None)
        assert url is not None, "the dashboard did not start"
        yield url
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    raise SystemExit(main())
