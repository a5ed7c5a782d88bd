"""Recording a grid for the replay benchmark: its calls, and what a second command goes on from."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from accelsearch import pipelines

PROMPTS, PAIRS, CALLS = 6, 2, 3
GRID = [{"cache_interval": interval, "mode": mode} for interval in (2, 3) for mode in ("a", "b")]
META = {
    "parameters": [
        {"name": "cache_interval", "values": [2, 3]},
        {"name": "mode", "values": ["a", "b"]},
    ],
    "calls": CALLS,
    "images": 2,
    "configuration": {"scheduler": "DDIMScheduler"},
    "environment": {"device": "a GPU"},
}

MakeConfiguration = Callable[..., Any]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import record as module

    yield module
    sys.modules.pop("record", None)


def recorder_of() -> Any:
    return SimpleNamespace(
        pairs=PAIRS,
        calls=CALLS,
        images=2,
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


class Indifferent:
    """Stands for the scoring model, whose images are of another size than a tiny pipeline's."""

    def __init__(self, *_: Any) -> None:
        pass

    def score(self, images: torch.Tensor, _: slice) -> torch.Tensor:
        return torch.full((len(images),), 30.0)

    def check(self, _: torch.Tensor) -> float:
        return 0.0


@pytest.fixture
def configuration(
    record: Any, make_configuration: MakeConfiguration, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Four prompts, in calls of two with two images of each."""
    monkeypatch.setattr(record, "Clip", Indifferent)
    prompts = ("a red circle", "a blue square", "two green stars", "a red star")
    return make_configuration(prompts=prompts, batch_size=4)


def test_a_recorded_call_makes_the_images_of_a_search_without_reading_prompts(
    record: Any, configuration: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = record.Recorder(configuration, pairs=1, images=2)
    expected = [
        pipelines.generate(
            recorder.pipeline, configuration, [prompt], [configuration.seed + place]
        )[0]
        for place, prompt in enumerate(configuration.prompts)
    ]
    monkeypatch.delattr(recorder.pipeline, "tokenizer")
    made = torch.cat([recorder._time({}, batch)[1] for batch in range(2)])
    assert made.shape[0] == 4
    difference = (made[:, None].float() - torch.stack(expected).float()).abs().mean((2, 3, 4))
    assert difference.argmin(1).tolist() == [0, 1, 2, 3]
    assert difference.diagonal().max() < 0.1
    params = {"cache_interval": 2, "cache_branch_id": 0}
    found = recorder.record(params, visited=0)
    assert (len(found.baseline_s), len(found.accelerated_s)) == (2, 2)  # both batches
    assert {name: len(values) for name, values in found.scores.items()} == dict.fromkeys(
        record.METRICS, 4
    )
    assert max(found.scores["ssim"]) < 1


def test_nothing_is_recorded_of_other_images_than_those_of_a_search(
    record: Any, configuration: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = record.randn_tensor
    monkeypatch.setattr(record, "randn_tensor", lambda *of: draw(*of).flip(0))
    with pytest.raises(SystemExit, match=r"images must be those that .*pipelines\.call makes"):
        record.Recorder(configuration, pairs=1)


def test_a_second_command_has_what_the_first_has_recorded(
    record: Any, rows: dict[int, Any], tmp_path: Path
) -> None:
    path = tmp_path / "table.npz"
    record.write(path, META | {"format": record.FORMAT}, recorder_of(), GRID, rows)
    second = recorder_of()
    second.pairs, second.calls = 9, 9  # a table has as many of each setting
    before = record.recorded_before(path, GRID, second, META | {"format": record.FORMAT})
    assert (second.pairs, second.calls) == (PAIRS, CALLS)
    assert before.keys() == rows.keys()
    assert [before[row] for row in (0, 3)] == [rows[row] for row in (0, 3)]
    assert (before[1].visited, before[1].failure) == (2, "images are black")
    record.write(tmp_path / "again.npz", META | {"format": record.FORMAT}, second, GRID, before)
    meta, arrays = record.read(path)
    meta_again, arrays_again = record.read(tmp_path / "again.npz")
    assert meta_again == meta
    assert arrays_again.keys() == arrays.keys()
    for name, values in arrays.items():
        np.testing.assert_array_equal(arrays_again[name], values)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"format": 1}, "format 2, got 1; record it without"),  # its calls read their prompts
        ({"images": 1}, "images 2, got 1"),
        ({"configuration": {"scheduler": "Other"}}, "configuration.scheduler 'DDIM.*, got 'Other'"),
        ({"configuration": {}}, "configuration.scheduler 'DDIMScheduler', got None"),
        ({"environment": {"device": "another"}}, "environment.device 'a GPU', got 'another'"),
    ],
)
def test_a_table_is_gone_on_with_as_it_was_begun(
    record: Any, rows: dict[int, Any], tmp_path: Path, other: dict[str, Any], told: str
) -> None:
    path, now = tmp_path / "table.npz", META | {"format": record.FORMAT}
    record.write(path, now | other, recorder_of(), GRID, rows)
    with pytest.raises(SystemExit, match=f"table.npz must have been recorded with {told}"):
        record.recorded_before(path, GRID, recorder_of(), now)
