"""Pictures that people judge by: what must stand where, pixel by pixel."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from numpy.typing import NDArray
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage
from PIL import Image, ImageDraw, ImageFont
from stored import ENVIRONMENT, configured, measured, new_database

from accelsearch.measurement import Scores
from accelsearch.pictures import (
    AMPLIFIED,
    PICTURED,
    comparison,
    hand_on,
    keep_pairs,
    keep_picture,
    kept_pairs,
    kept_picture,
    telling,
)
from accelsearch.storage import create_study, open_storage

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")

SIDE = 256
Box = tuple[int, int, int, int]  # left, upper, right, lower: the last two outside


def baseline_colour(index: int) -> tuple[int, int, int]:
    return (200, 20 * index, 0)


def accelerated_colour(index: int) -> tuple[int, int, int]:
    return (0, 20 * index, 200)


def plain(colours: list[tuple[int, int, int]], height: int, width: int) -> torch.Tensor:
    """Images of one colour each, uint8 [N, 3, H, W]."""
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, height, width)


def compared(
    count: int, *, height: int = 32, width: int = 32, prompts: list[str] | None = None
) -> NDArray[np.uint8]:
    picture = comparison(
        plain([baseline_colour(index) for index in range(count)], height, width),
        plain([accelerated_colour(index) for index in range(count)], height, width),
        prompts or [f"prompt {index}" for index in range(count)],
        title="2.00x: clip_score loss 1 % of 2 %",
    )
    assert picture.mode == "RGB"
    return np.asarray(picture)


def box_of(pixels: NDArray[np.uint8], colour: tuple[int, int, int]) -> Box:
    """Where a colour is; it must fill its box."""
    rows, columns = np.nonzero((pixels == colour).all(axis=2))
    left, upper, right, lower = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert len(rows) == (right - left) * (lower - upper), f"{colour} is cut into"
    return int(left), int(upper), int(right), int(lower)


def inked(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    ink: NDArray[np.bool_] = (pixels != 255).any(axis=2)
    return ink


@pytest.mark.parametrize("count", range(1, PICTURED + 1))
def test_every_prompt_has_its_baseline_left_and_its_accelerated_image_right(count: int) -> None:
    pixels = compared(count)
    height, width, _ = pixels.shape
    boxes = []
    for index in range(count):
        left = box_of(pixels, baseline_colour(index))
        right = box_of(pixels, accelerated_colour(index))
        for box in (left, right):
            assert (box[2] - box[0], box[3] - box[1]) == (SIDE, SIDE)
            assert box[2] < width
            assert box[3] < height
        assert left[2] <= right[0] <= left[2] + 8, "a pair stands close together"
        assert left[1] == right[1]
        boxes.append((left[1], left[0], right[2]))
    # In reading order, two pairs a row, and no pair touches the next.
    assert boxes == sorted(boxes)
    for index, (upper, start, _) in enumerate(boxes):
        if index % 2:
            assert upper == boxes[index - 1][0]
            assert start > boxes[index - 1][2] + 8
        elif index:
            assert upper > boxes[index - 1][0] + SIDE
            assert start == boxes[index - 2][1]


def test_the_picture_grows_with_the_rows_and_fits_a_screen() -> None:
    sizes = [compared(count).shape[:2] for count in range(1, PICTURED + 1)]
    assert sizes[0][1] < sizes[1][1]  # one pair needs half of the width
    assert len({width for _, width in sizes[1:]}) == 1
    heights = [height for height, _ in sizes]
    assert heights[0] == heights[1] < heights[2] == heights[3] < heights[4] == heights[5]
    assert sizes[-1][1] <= 1200
    assert sizes[-1][0] <= 1400


def test_title_column_heads_and_captions_are_written() -> None:
    pixels = compared(2)
    left, upper, _, lower = box_of(pixels, baseline_colour(0))
    right = box_of(pixels, accelerated_colour(0))[0]
    ink = inked(pixels)
    assert ink[:50].any()  # the title
    assert ink[50:upper, left : left + SIDE].any()  # "baseline"
    assert ink[50:upper, right : right + SIDE].any()  # "accelerated"
    assert ink[lower:, left : left + 2 * SIDE].any()  # the prompt


@pytest.mark.parametrize("size", [(8, 8), (128, 128), (256, 256), (1024, 1024), (2048, 2048)])
def test_small_images_are_enlarged_and_large_ones_reduced(size: tuple[int, int]) -> None:
    pixels = compared(2, height=size[0], width=size[1])
    assert pixels.shape == compared(2).shape
    for colour in (baseline_colour(1), accelerated_colour(1)):
        left, upper, right, lower = box_of(pixels, colour)
        assert (right - left, lower - upper) == (SIDE, SIDE)


@pytest.mark.parametrize(
    ("height", "width", "box"), [(1024, 512, (128, 256)), (32, 64, (256, 128))]
)
def test_images_keep_their_shape(height: int, width: int, box: tuple[int, int]) -> None:
    left, upper, right, lower = box_of(compared(1, height=height, width=width), (200, 0, 0))
    assert (right - left, lower - upper) == box


def test_an_image_is_neither_turned_nor_mirrored_and_small_ones_stay_sharp() -> None:
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    image[0, 0] = 200  # red all over, but for
    image[0, :, :2, 4:] = torch.tensor([0, 255, 0], dtype=torch.uint8)[:, None, None]
    picture = comparison(image, plain([(0, 0, 200)], 8, 8), ["p"], title="t")
    pixels = np.asarray(picture)
    right, upper, _, _ = box_of(pixels, (0, 0, 200))
    rows, columns = np.nonzero((pixels == (0, 255, 0)).all(axis=2))
    assert (rows.min() - upper, rows.max() + 1 - upper) == (0, 64)
    left = right - 4 - SIDE
    assert (columns.min() - left, columns.max() + 1 - left) == (128, 256)
    assert len(rows) == 64 * 128  # no blurred edge


LONG = [
    "a very detailed photograph of " + "a cat on a mat, " * 40,
    "https://example.org/" + "x" * 400,
    "一只戴着帽子的猫坐在垫子上" * 30,
]


@pytest.mark.parametrize("prompt", LONG, ids=["words", "link", "no spaces"])
def test_a_long_prompt_stays_under_its_own_pair(prompt: str) -> None:
    short = compared(4, prompts=["", "", "", ""])
    long = compared(4, prompts=[prompt, "", "", ""])
    assert long.shape == short.shape
    rows, columns = np.nonzero((long != short).any(axis=2))
    left, _, _, lower = box_of(short, baseline_colour(0))
    right = box_of(short, accelerated_colour(0))[2]
    below = box_of(short, baseline_colour(2))[1]
    assert left - 1 <= columns.min()
    assert columns.max() <= right
    assert columns.max() > right - 60, "the caption uses its width"
    assert lower <= rows.min()
    assert rows.max() < below
    assert rows.max() - rows.min() > 18, "two lines"


def test_prompts_with_line_breaks_and_odd_letters_are_drawn() -> None:
    odd = compared(3, prompts=["one\n\ntwo\tthree", "\U0001f600 émoji – 猫", " "])
    plain = compared(3, prompts=["one two three", "? emoji - ?", ""])
    assert (odd == plain).all()


def test_no_box_of_a_missing_letter_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    draw = ImageDraw.ImageDraw.text

    def text(pen: ImageDraw.ImageDraw, at: Any, words: str, *rest: Any) -> None:
        drawn.append(words)
        draw(pen, at, words, *rest)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    image = plain([(0, 0, 0)], 32, 32)
    comparison(image, image, ["ein Kätzchen, 一只猫 …"], title="1.5x: 1 − mean SSIM 0.02, 1–2 %")
    assert "1.5x: 1 - mean SSIM 0.02, 1-2 %" in drawn
    font = ImageFont.load_default(14)
    box = bytes(font.getmask("\uffff"))
    letters = set("".join(drawn)) - {" "}
    assert {one for one in letters if bytes(font.getmask(one)) == box} == set()


# Kept pictures


@pytest.fixture
def database(tmp_path: Path) -> BaseStorage:
    return open_storage(new_database(tmp_path))


@pytest.fixture
def study(database: BaseStorage) -> optuna.Study:
    return create_study(database, configured(), ENVIRONMENT, RandomSampler(seed=0))


def test_a_kept_picture_comes_back_for_its_own_trial_alone(
    study: optuna.Study, database: BaseStorage, tmp_path: Path
) -> None:
    folder = tmp_path / "artifacts" / "new"
    for colour in ("red", "blue"):
        trial = study.ask()
        keep_picture(folder, trial, Image.new("RGB", (6, 4), colour))
        study.tell(trial, 1.0)
    study.tell(study.ask(), 1.0)
    reopened = open_storage(f"sqlite:///{tmp_path}/trials.db")
    for number, pixel in enumerate([(255, 0, 0), (0, 0, 255)]):
        png = kept_picture(folder, reopened, study.study_name, number)
        assert png is not None
        (tmp_path / "back.png").write_bytes(png)
        with Image.open(tmp_path / "back.png") as picture:
            assert picture.format == "PNG"
            assert picture.size == (6, 4)
            ((count, colour),) = picture.convert("RGB").getcolors()
            assert (count, colour) == (24, pytest.approx(pixel, abs=3))
    assert kept_picture(folder, reopened, study.study_name, 2) is None


def test_a_picture_that_an_earlier_version_kept_is_read_and_handed_on(
    study: optuna.Study, database: BaseStorage, tmp_path: Path
) -> None:
    trial, later = study.ask(), study.ask()
    folder = tmp_path / "artifacts"
    folder.mkdir()
    Image.new("RGB", (600, 400), (1, 2, 3)).save(tmp_path / "comparison.png")
    upload_artifact(
        artifact_store=FileSystemArtifactStore(folder),
        file_path=str(tmp_path / "comparison.png"),
        study_or_trial=trial,
        mimetype="image/png",
    )
    assert hand_on(folder, later, trial.number, title="3.10x: later")
    for one in (trial, later):
        png = kept_picture(folder, database, study.study_name, one.number)
        assert png is not None
        with Image.open(io.BytesIO(png)) as picture:
            assert picture.getpixel((300, 300)) == pytest.approx((1, 2, 3), abs=2)


@pytest.mark.parametrize("length", [0, 40, 400])
def test_a_picture_that_is_cut_off_is_none(
    study: optuna.Study, database: BaseStorage, tmp_path: Path, length: int
) -> None:
    keep_picture(tmp_path / "there", study.ask(), Image.new("RGB", (64, 64), "red"))
    (file,) = (tmp_path / "there").iterdir()
    file.write_bytes(file.read_bytes()[:length])
    assert kept_picture(tmp_path / "there", database, study.study_name, 0) is None
    later = study.ask()
    assert not hand_on(tmp_path / "there", later, 0, title="3.10x: later")


def test_a_picture_kept_in_another_folder_is_none(
    study: optuna.Study, database: BaseStorage, tmp_path: Path
) -> None:
    keep_picture(tmp_path / "there", study.ask(), Image.new("RGB", (4, 4)))
    assert kept_picture(tmp_path / "here", database, study.study_name, 0) is None
    assert not (tmp_path / "here").exists()
    assert kept_picture(tmp_path / "there", database, study.study_name, 0) is not None


def test_other_artifacts_of_a_trial_are_not_taken_for_its_picture(
    study: optuna.Study, database: BaseStorage, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    trial = study.ask()
    store = FileSystemArtifactStore(tmp_path)
    upload_artifact(
        artifact_store=store, file_path=str(tmp_path / "notes.txt"), study_or_trial=trial
    )
    assert kept_picture(tmp_path, database, study.study_name, 0) is None
    keep_picture(tmp_path, trial, Image.new("RGB", (4, 4)))
    png = kept_picture(tmp_path, database, study.study_name, 0)
    assert png is not None
    assert png.startswith(b"\x89PNG")


# Kept images


def images_of(*shades: int, side: int = 16) -> torch.Tensor:
    """One image of each shade of grey, with one red pixel, uint8 [N, 3, side, side]."""
    found = torch.stack([torch.full((3, side, side), shade) for shade in shades]).byte()
    found[:, :, 0, 0] = torch.tensor([250, 0, 0], dtype=torch.uint8)
    return found


def pixels_of(webp: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(webp)) as image:
        return np.asarray(image.convert("RGB"))


def test_kept_images_come_back_bit_by_bit_with_their_difference(
    study: optuna.Study, database: BaseStorage, tmp_path: Path
) -> None:
    trial = study.ask()
    baseline, accelerated = images_of(10, 20), images_of(13, 120)
    keep_pairs(tmp_path / "a", trial, baseline, accelerated, [7, 3])
    first, second = kept_pairs(tmp_path / "a", database, study.study_name, 0)
    assert (first.prompt, second.prompt) == (7, 3)
    assert (pixels_of(first.baseline) == baseline[0].permute(1, 2, 0).numpy()).all()
    assert (pixels_of(second.accelerated) == accelerated[1].permute(1, 2, 0).numpy()).all()
    shades = pixels_of(first.difference)
    assert shades[0, 0].tolist() == [0, 0, 0]  # the same in both
    assert shades[5, 5].tolist() == [3 * AMPLIFIED] * 3
    assert pixels_of(second.difference)[5, 5].tolist() == [255] * 3  # and no more


def test_a_trial_that_goes_on_with_another_has_its_pictures_under_a_title_of_its_own(
    study: optuna.Study, database: BaseStorage, tmp_path: Path
) -> None:
    first, second, third = study.ask(), study.ask(), study.ask()
    images, others = images_of(10, 200), images_of(20, 100)
    keep_picture(tmp_path, first, comparison(images, others, ["one", "two"], title="3.00x: first"))
    keep_pairs(tmp_path, first, images, others, [4, 7])
    assert hand_on(tmp_path, second, first.number, title="3.10x: second")
    assert not hand_on(tmp_path, third, third.number, title="none")
    name = study.study_name
    before, after = (kept_picture(tmp_path, database, name, one.number) for one in (first, second))
    assert before is not None
    assert after is not None
    was, now = (np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in (before, after))
    told = comparison(images, others, ["one", "two"], title="3.10x: second")
    apart = np.abs(now.astype(int) - np.asarray(told).astype(int))
    assert apart.mean() < 0.06
    assert np.quantile(apart, 0.999) < 10  # at the edges of letters
    assert np.abs(now.astype(int) - was)[:56].max() > 200  # the title
    kept = kept_pairs(tmp_path, database, name, first.number)
    assert [one.prompt for one in kept] == [4, 7]
    assert kept_pairs(tmp_path, database, name, second.number) == kept
    assert kept_picture(tmp_path, database, name, third.number) is None


def test_large_images_are_reduced(
    study: optuna.Study, database: BaseStorage, tmp_path: Path
) -> None:
    large = images_of(10, side=1024)
    keep_pairs(tmp_path, study.ask(), large, large, [0])
    (kept,) = kept_pairs(tmp_path, database, study.study_name, 0)
    assert pixels_of(kept.baseline).shape == (768, 768, 3)


@pytest.mark.parametrize("content", [b"", b"PK no archive", b"x" * 100], ids=["empty", "cut", "x"])
def test_an_archive_that_cannot_be_read_holds_no_images(
    study: optuna.Study, database: BaseStorage, tmp_path: Path, content: bytes
) -> None:
    folder = tmp_path / "artifacts"
    keep_pairs(folder, study.ask(), images_of(1), images_of(2), [0])
    (file,) = folder.iterdir()
    file.write_bytes(content)
    assert kept_pairs(folder, database, study.study_name, 0) == ()
    assert kept_pairs(tmp_path / "elsewhere", database, study.study_name, 0) == ()


def test_the_worst_prompts_are_kept_first_and_a_fair_sample_of_the_rest() -> None:
    images = 20
    configuration = configured(prompts=tuple(f"prompt {number}" for number in range(images)))
    losses = [0.001] * images
    losses[17], losses[4] = 0.5, 0.3
    scores = Scores("clip_score", (1.0,) * images, tuple(1 - loss for loss in losses))
    found = telling(replace(measured(), scores=(scores,)), configuration, images)
    assert found[:2] == [17, 4]
    assert len(found) == len(set(found)) == 12
    # Of the others, those that come first in the random order.
    rest = [place for place in range(images) if place not in found[:8]]
    assert found[8:] == rest[:4]
    assert telling(replace(measured(), scores=(scores,)), configuration, 3) == [0, 1, 2]
