"""What is installed: all that the tool needs, away from its source, and nothing else."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from accelsearch.contract import Key

ROOT = Path(__file__).parents[1]
MOST_BYTES = 30_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="the wheel is built with hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run(
        [*command, "--no-index", "--wheel-dir", folder, ROOT],
        check=True,
        timeout=300,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as packed:
        return {name for name in packed.namelist() if not name.endswith("/")}


def test_every_file_of_the_package_is_packed_and_none_beside(wheel: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "accelsearch"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    if listed.returncode:
        pytest.skip("what belongs to the package is known from git alone, and this is no clone")
    packed = {name for name in files(wheel) if ".dist-info/" not in name}
    assert set(listed.stdout.split()) <= packed
    assert all(name.startswith("accelsearch/") for name in packed)
    assert not any("test" in Path(name).name or "__pycache__" in name for name in packed)


def test_what_is_no_code_is_packed_too(wheel: Path) -> None:
    packed = files(wheel)
    for wanted in (
        "accelsearch/py.typed",
        "accelsearch/codegen/templates/script.py.j2",
        "accelsearch/schemas/tasks.schema.json",
        "accelsearch/schemas/search_params.schema.json",
        "accelsearch/schemas/speedup_bounds.schema.json",
        "accelsearch/schemas/codegen_report.schema.json",
        "accelsearch/prompts/photo.txt",
        "accelsearch/hooks/deepcache.py",
        "accelsearch/shapes/weights/clip/model.safetensors",
        "accelsearch/shapes/weights/pipeline/model_index.json",
    ):
        assert wanted in packed
    assert not any(name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")) for name in packed)


def test_it_is_no_larger_than_its_weights_make_it(wheel: Path) -> None:
    assert wheel.stat().st_size < MOST_BYTES


def test_what_is_installed_writes_code_away_from_its_source(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(place)
    exports = tmp_path / "exports"
    exports.mkdir()
    key = Key("StableDiffusionPipeline", "DDIMScheduler", 20, 2.0, 0.1, ("deepcache",))
    found = {"cache_interval": 2, "cache_branch_id": 0, "model": "some/model"}
    entry = {"speedup": 2.0, "score_loss": 0.01, **found}
    (exports / "search_params.json").write_text(json.dumps({str(key): entry}))
    # Not the folder of the sources, which Python would look into first.
    script = (
        "import sys, accelsearch; from accelsearch.cli import main\n"
        f"assert accelsearch.__file__.startswith({str(place)!r}), accelsearch.__file__\n"
        "main()"
    )
    arguments = ["codegen", "--task", "SD1.5, DDIM, 20 steps, DeepCache, 1.5x, loss 0.1"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--exports", exports, "--out", "scripts"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "scripts").glob("*.py")
    text = written.read_text()
    ast.parse(text)
    assert "accelsearch" not in "".join(
        line for line in text.splitlines() if line.startswith(("import ", "from "))
    )
