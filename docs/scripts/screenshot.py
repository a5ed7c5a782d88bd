"""Takes the picture of the report that README.md shows, from a real storage.

    python docs/scripts/screenshot.py [--storage URL] [--artifacts DIR]

It takes Chromium, playwright and a finished `make demo`. Look at what it makes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from generated import DOCS
from playwright.sync_api import sync_playwright

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
SETTLE_MS = 5000  # until plots are drawn


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--storage", default="sqlite:///storage/accelsearch.db")
    parser.add_argument("--artifacts", default="storage/artifacts")
    options = parser.parse_args()
    where = ["--storage", options.storage, "--artifacts", options.artifacts]
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        file = Path(folder) / "report.html"
        command = [sys.executable, "-m", "accelsearch", "report", "--out", str(file), *where]
        subprocess.run(command, check=True)
        browser = started.chromium.launch(executable_path=chromium, args=QUIET)
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.goto(file.as_uri())
        page.wait_for_timeout(SETTLE_MS)
        page.screenshot(path=DOCS / "images" / "report.png")
        browser.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
