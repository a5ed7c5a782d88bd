"""Pictures for people to judge by: baseline beside accelerated, kept as artifacts of trials."""

from __future__ import annotations

import tempfile
from bisect import bisect
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact
from optuna.storages import BaseStorage
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    import torch

__all__ = ["PICTURED", "comparison", "keep_picture", "kept_picture"]

PICTURED = 8
"""Prompts shown in a comparison."""

_GAP, _MARGIN, _SIDE = 8, 16, 256
_INK, _FAINT, _PAPER = (30, 30, 30), (110, 110, 110), (255, 255, 255)
_NAME = "comparison.png"


def comparison(
    baseline: torch.Tensor, accelerated: torch.Tensor, prompts: Sequence[str], *, title: str
) -> Image.Image:
    """Pairs of baseline (left) and accelerated (right) images, two pairs a row, under a title.

    Both are uint8 [N, 3, H, W] of the same N prompts; small images are enlarged, and large ones
    reduced, to 256 px.
    """
    pair = 2 * _SIDE + _GAP // 2
    columns = min(2, len(prompts))
    rows = -(-len(prompts) // columns)
    heading, text = ImageFont.load_default(22), ImageFont.load_default(14)
    caption = 44
    top = 84
    width = 2 * _MARGIN + columns * pair + (columns - 1) * 3 * _GAP
    height = top + rows * (_SIDE + caption + _GAP) + _MARGIN
    canvas = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((_MARGIN, 18), title, _INK, heading)
    for column in range(columns):
        left = _MARGIN + column * (pair + 3 * _GAP)
        pen.text((left, top - 24), "baseline", _FAINT, text)
        pen.text((left + _SIDE + _GAP // 2, top - 24), "accelerated", _FAINT, text)
    for index, prompt in enumerate(prompts):
        row, column = divmod(index, columns)
        left = _MARGIN + column * (pair + 3 * _GAP)
        upper = top + row * (_SIDE + caption + _GAP)
        for shift, images in ((0, baseline), (_SIDE + _GAP // 2, accelerated)):
            pixels = Image.fromarray(images[index].permute(1, 2, 0).contiguous().numpy())
            pixels.thumbnail((_SIDE, _SIDE))
            if max(pixels.size) < _SIDE:
                scale = _SIDE // max(pixels.size)
                size = (pixels.width * scale, pixels.height * scale)
                pixels = pixels.resize(size, Image.Resampling.NEAREST)
            canvas.paste(pixels, (left + shift, upper))
        for line, words in enumerate(_wrapped(pen, text, prompt, pair)[:2]):
            pen.text((left, upper + _SIDE + 4 + 18 * line), words, _INK, text)
    return canvas


def keep_picture(folder: Path, trial: optuna.Trial, picture: Image.Image) -> None:
    """Store a comparison among a running trial's artifacts, where optuna-dashboard shows it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / _NAME
        picture.save(file)
        upload_artifact(
            artifact_store=FileSystemArtifactStore(folder),
            file_path=str(file),
            study_or_trial=trial,
            mimetype="image/png",
        )


def kept_picture(folder: Path, storage: BaseStorage, study: str, number: int) -> bytes | None:
    """The PNG of a trial's comparison; None where there is none in this folder."""
    study_id = storage.get_study_id_from_name(study)
    trial = storage.get_trial(storage.get_trial_id_from_study_id_trial_number(study_id, number))
    store = FileSystemArtifactStore(folder)
    for meta in get_all_artifact_meta(trial, storage=storage):
        if meta.filename == _NAME and (folder / meta.artifact_id).is_file():
            with store.open_reader(meta.artifact_id) as file:
                return bytes(file.read())
    return None


def _wrapped(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    text: str,
    width: int,
) -> list[str]:
    """The text in lines of at most `width` pixels."""

    def width_of(words: str) -> float:
        return pen.textlength(words, font)

    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and width_of(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
        # A word that is too long: a link, or a language that writes no spaces.
        while len(lines[-1]) > 1 and width_of(lines[-1]) > width:
            rest = lines[-1]
            more = bisect(range(2, len(rest)), width, key=lambda n: ceil(width_of(rest[:n])))
            lines[-1:] = [rest[: more + 1], rest[more + 1 :]]
    return lines
