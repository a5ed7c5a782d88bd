"""What a search of the bundled model costs beside its measurements."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_search_spends_its_time_on_measuring() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/overhead.py", "--device", "cpu", "--trials", "1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shares = {
        cells[1].strip(): float(cells[3].removesuffix(" % "))
        for line in done.stdout.splitlines()
        if len(cells := line.split("|")) == 5 and "%" in cells[3]
    }
    assert shares["**everything else**"] <= 2
    parts = [value for name, value in shares.items() if not name.startswith(("-", "the study"))]
    assert min(shares.values()) >= 0
    assert sum(parts) == pytest.approx(100, abs=0.1)
    assert shares["calls that are timed, or warm up for it"] > 10
