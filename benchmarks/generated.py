"""What generated scripts say of themselves, beside what was measured.

    accelsearch run studies/shapes-demo.toml --out demo
    python benchmarks/generated.py demo

Each stored setting that a task of the folder was answered with is run once, by its first script,
with --benchmark. Exit code 1 if a script's speedup lies outside the measured interval, widened on
both sides by the given tolerance.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def main() -> int:
    parser = argparse.ArgumentParser(description="Run generated scripts with --benchmark.")
    parser.add_argument("folder", type=Path, help="of codegen_report.json and search_params.json")
    parser.add_argument("--pairs", type=int, default=10, help="of calls, of each script")
    parser.add_argument("--tolerance", type=float, default=0.05, help="as a share")
    given = parser.parse_args()
    report = json.loads((given.folder / "codegen_report.json").read_text("utf-8"))
    params = json.loads((given.folder / "search_params.json").read_text("utf-8"))
    scripts: dict[str, str] = {}
    for one in report:
        if "file" in one:
            scripts.setdefault(one["key"], one["file"])

    table = Table(box=SIMPLE_HEAD)
    for name in ("script", "measured", "95 %", "by the script", "of its pairs", ""):
        table.add_column(name, overflow="fold")
    outside = 0
    for key, file in scripts.items():
        speedup, low, high = benchmarked(given.folder / file, given.pairs)
        inside = is_inside(speedup, params[key], given.tolerance)
        outside += not inside
        interval = params[key].get("speedup_interval")
        table.add_row(
            file,
            f"{params[key]['speedup']:.3f}x",
            "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}",
            f"{speedup:.3f}x",
            f"{low:.3f} to {high:.3f}",
            "" if inside else "outside",
        )
    Console().print(table)
    return 1 if outside or not scripts else 0


def benchmarked(script: Path, pairs: int) -> tuple[float, float, float]:
    """The speedup that a script prints, and the smallest and largest of its pairs."""
    done = subprocess.run(
        [sys.executable, script.name, "--benchmark", str(pairs)],
        cwd=script.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    found = re.search(r"^speedup +([\d.]+)x, ([\d.]+) to ([\d.]+)", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    speedup, low, high = map(float, found.groups())
    return speedup, low, high


def is_inside(speedup: float, entry: dict[str, Any], tolerance: float) -> bool:
    low, high = entry.get("speedup_interval") or [entry["speedup"]] * 2
    return bool(low * (1 - tolerance) <= speedup <= high * (1 + tolerance))


if __name__ == "__main__":
    raise SystemExit(main())
