"""The figures that the bundled model is shipped with, and how they are made."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from accelsearch.configuration import BUNDLED
from accelsearch.shapes import evaluate, scenes
from accelsearch.shapes.pictures import save_grid

GOOD: dict[str, Any] = {
    "clip_score_ratio": 0.8,
    "right": {"colour": 0.95, "shape": 0.95, "background": 0.95, "all": 0.9},
}


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((BUNDLED.parent / "evaluation.json").read_text("utf-8"))
    return figures


def test_held_out_scenes_are_withheld_ones_and_half_hold_one_object() -> None:
    table = evaluate.held_out(50)
    assert table.has_pair.tolist() == [False] * 25 + [True] * 25
    assert scenes.withheld(table.texture, table.colour, table.shape).all()
    assert scenes.captions(evaluate.held_out(50)) == scenes.captions(table)
    assert len(evaluate.held_out(7)) == 7


def test_drawn_pictures_are_all_right() -> None:
    table = evaluate.held_out(40)
    right = evaluate.accuracies(scenes.draw(table), table)
    assert right == {"colour": 1, "shape": 1, "background": 1, "all": 1}


@pytest.mark.parametrize("attribute", ["colour", "shape", "background"])
def test_wrong_pictures_lower_their_attribute_and_all(attribute: str) -> None:
    table = evaluate.held_out(40)
    column = getattr(table, attribute).clone()
    column[:5] = (column[:5] + 1) % (6 if attribute == "background" else 8)
    images = scenes.draw(replace(table, **{attribute: column}))
    right = evaluate.accuracies(images, table)
    assert right == dict.fromkeys(right, 1.0) | {attribute: 0.75, "all": 0.75}


def test_pictures_of_two_objects_are_not_judged() -> None:
    table = evaluate.held_out(8)
    images = scenes.draw(table)
    images[table.has_pair] = 0
    assert evaluate.accuracies(images, table)["all"] == 1


def test_empty_pictures_hold_neither_the_colour_nor_the_shape() -> None:
    table = evaluate.held_out(8)
    images = scenes.draw(table)[:, :, :1, :1].expand(-1, -1, scenes.SIDE, scenes.SIDE)
    right = evaluate.accuracies(images, table)
    assert right == {"colour": 0, "shape": 0, "background": 1, "all": 0}


def test_a_picture_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = scenes.captions(evaluate.held_out(3))
    folder = BUNDLED / "pipeline"
    whole = evaluate.generate(folder, prompts, steps=2, guidance_scale=3.0)
    monkeypatch.setattr(evaluate, "_BATCH", 2)
    parts = evaluate.generate(folder, prompts, steps=2, guidance_scale=3.0)
    assert whole.shape == (3, 3, scenes.SIDE, scenes.SIDE)
    assert torch.allclose(whole, parts, atol=1e-3)


def test_the_clip_score_is_higher_for_the_right_captions() -> None:
    table = evaluate.held_out(12)
    images, prompts = scenes.draw(table), scenes.captions(table)
    own = evaluate.clip_score(BUNDLED / "clip", images, prompts)
    assert own > 60 > evaluate.clip_score(BUNDLED / "clip", images, prompts[1:] + prompts[:1])


@pytest.mark.parametrize("count", [4, 8])
def test_figures_are_json_and_the_grid_shows_drawn_beside_generated(
    tmp_path: Path, count: int
) -> None:
    figures = evaluate.evaluate(
        BUNDLED, count=count, steps=1, guidance_scale=3.0, grid=tmp_path / "docs" / "grid.png"
    )
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["captions"] == 2 * figures["single_object_scenes"] == count
    assert figures["steps"] == 1
    assert figures["clip_score_ratio"] == pytest.approx(
        figures["clip_score_generated"] / figures["clip_score_drawn"], abs=1e-3
    )
    with Image.open(tmp_path / "docs" / "grid.png") as grid:
        assert grid.size == (8 * scenes.SIDE, 4 * scenes.SIDE)
        corner = grid.getpixel((64, 64)), grid.getpixel((2, 2))
    drawn = (scenes.draw(evaluate.held_out(count)[:1])[0] * 255).round()
    assert corner == tuple(tuple(int(value) for value in drawn[:, at, at]) for at in (64, 2))


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({}, 0),
        ({"clip_score_ratio": 0.79}, 1),
        ({"clip_score_ratio": math.nan}, 1),
        ({"right": GOOD["right"] | {"all": 0.89}}, 1),
    ],
)
def test_the_exit_code_says_whether_the_model_is_good_enough(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    changed: dict[str, Any],
    code: int,
) -> None:
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: GOOD | changed)
    out = tmp_path / "figures.json"
    assert evaluate.main(["--out", str(out)]) == code
    printed = capsys.readouterr().out
    assert out.read_text("utf-8") == printed
    assert set(json.loads(printed)) == set(GOOD)


def test_the_committed_figures_are_those_of_a_model_that_is_good_enough(
    committed: dict[str, Any],
) -> None:
    assert committed["captions"] == 256
    assert committed["single_object_scenes"] == 128
    assert (committed["scheduler"], committed["steps"]) == ("DDIMScheduler", 50)
    assert committed["clip_score_ratio"] >= 0.8
    assert committed["clip_score_ratio"] == pytest.approx(
        committed["clip_score_generated"] / committed["clip_score_drawn"], abs=1e-3
    )
    assert set(committed["right"]) == {"colour", "shape", "background", "all"}
    assert min(committed["right"].values()) >= 0.9
    assert min(committed["right_in_drawn"].values()) >= 0.99


def test_the_committed_figures_are_those_of_these_weights(committed: dict[str, Any]) -> None:
    """As far as can be seen without generating: the score of the drawn originals."""
    table = evaluate.held_out(committed["captions"])
    images, prompts = scenes.draw(table), scenes.captions(table)
    score = evaluate.clip_score(BUNDLED / "clip", images, prompts)
    assert score == pytest.approx(committed["clip_score_drawn"], abs=0.02)
    assert evaluate.accuracies(images, table) == pytest.approx(
        committed["right_in_drawn"], abs=1e-4
    )


@pytest.mark.slow
def test_a_fresh_evaluation_agrees_with_the_committed_figures(committed: dict[str, Any]) -> None:
    """On 32 captions instead of 256: minutes instead of a quarter of an hour on one core."""
    figures = evaluate.evaluate(
        BUNDLED,
        count=32,
        steps=committed["steps"],
        guidance_scale=committed["guidance_scale"],
        grid=None,
    )
    assert figures["clip_score_ratio"] == pytest.approx(committed["clip_score_ratio"], abs=0.05)
    assert figures["right"]["all"] >= 0.9


def test_a_grid_fills_its_last_row_with_white(tmp_path: Path) -> None:
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1.5]])
    save_grid(tmp_path / "grid.png", colours[:, :, None, None].expand(3, 3, 4, 6), columns=2)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (12, 8)
        corners = [grid.getpixel(at) for at in ((0, 0), (11, 0), (0, 7), (11, 7))]
    assert corners == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
