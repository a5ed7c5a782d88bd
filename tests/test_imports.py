"""The import direction is a design decision; this keeps it one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_imports_point_downwards_only() -> None:
    pytest.importorskip("importlinter", reason="import-linter comes with the dev extra")
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", ["accelsearch", "accelsearch.cli", "accelsearch.configuration"])
def test_what_every_command_imports_loads_neither_torch_nor_optuna(module: str) -> None:
    heavy = {"torch", "optuna", "diffusers"}
    code = f"import sys, {module}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
