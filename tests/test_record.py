"""Recording a grid for the replay benchmark: what a second command goes on from."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

PROMPTS, PAIRS, CALLS = 6, 2, 3
GRID = [{"cache_interval": interval, "mode": mode} for interval in (2, 3) for mode in ("a", "b")]
META = {
    "parameters": [
        {"name": "cache_interval", "values": [2, 3]},
        {"name": "mode", "values": ["a", "b"]},
    ],
    "calls": CALLS,
    "images": 2,
}


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import record as module

    yield module
    sys.modules.pop("record", None)


def recorder_of(images: int) -> Any:
    return SimpleNamespace(
        pairs=PAIRS,
        calls=CALLS,
        images=images,
        batches=[slice(0, PROMPTS)],
        prompts=["a red circle"] * PROMPTS,
        baseline_clip_score=[30.0] * PROMPTS,
        baseline_image_s=[1.0],
        baseline_score_s=[0.1],
    )


@pytest.fixture
def rows(record: Any) -> dict[int, Any]:
    """Three of four settings, by their place in the grid; one of them failed."""
    rng = np.random.default_rng(0)
    found = {
        row: record.Recorded(
            visited=visited,
            warmup_s=float(rng.random()),
            baseline_s=rng.random(PAIRS).tolist(),
            accelerated_s=rng.random(PAIRS * CALLS).tolist(),
            score_s=[0.1],
            scores={name: [0.5 * row] * PROMPTS for name in record.METRICS},
        )
        for visited, row in enumerate((3, 0))
    }
    return found | {1: record.Recorded(visited=2, failure="images are black")}


def test_a_second_command_has_what_the_first_has_recorded(
    record: Any, rows: dict[int, Any], tmp_path: Path
) -> None:
    path = tmp_path / "table.npz"
    record.write(path, META, recorder_of(2), GRID, rows)
    second = recorder_of(2)
    second.pairs, second.calls = 9, 9  # a table has as many of each setting
    before = record.recorded_before(path, GRID, second)
    assert (second.pairs, second.calls) == (PAIRS, CALLS)
    assert before.keys() == rows.keys()
    assert [before[row] for row in (0, 3)] == [rows[row] for row in (0, 3)]
    assert (before[1].visited, before[1].failure) == (2, "images are black")
    record.write(tmp_path / "again.npz", META, second, GRID, before)
    meta, arrays = record.read(path)
    meta_again, arrays_again = record.read(tmp_path / "again.npz")
    assert meta_again == meta
    assert arrays_again.keys() == arrays.keys()
    for name, values in arrays.items():
        np.testing.assert_array_equal(arrays_again[name], values)


def test_a_table_has_as_many_images_of_a_prompt_in_every_call(
    record: Any, rows: dict[int, Any], tmp_path: Path
) -> None:
    path = tmp_path / "table.npz"
    record.write(path, META, recorder_of(2), GRID, rows)
    with pytest.raises(SystemExit, match=r"--images must be what .*table.npz .* with, 2, got 1"):
        record.recorded_before(path, GRID, recorder_of(1))
