"""Pictures for people to judge by: baseline beside accelerated, kept as artifacts of trials.

A feasible trial keeps two: a comparison of its first prompts in one JPEG, and the images themselves
of its worst prompts and of a few others, in one archive.

A GPU waits for all this, so it is drawn and compressed by what is quickest.
"""

from __future__ import annotations

import io
import tempfile
import unicodedata
import zipfile
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact
from optuna.storages import BaseStorage
from PIL import Image, ImageDraw, ImageFont

from accelsearch.configuration import Configuration
from accelsearch.measurement import Measurement, score_losses

if TYPE_CHECKING:
    import torch

__all__ = [
    "AMPLIFIED",
    "PICTURED",
    "Pair",
    "comparison",
    "hand_on",
    "keep_pairs",
    "keep_picture",
    "kept_pairs",
    "kept_picture",
    "telling",
]

PICTURED = 8
"""Prompts shown in a comparison."""

AMPLIFIED = 4
"""How many times brighter than it is a difference is shown."""

_WORST, _OTHERS = 8, 4  # prompts whose images are kept
_LARGEST, _LOSSLESS = 768, 256  # px of the longer side: kept at most, and kept to the last bit
_GAP, _MARGIN, _SIDE, _TITLED = 8, 16, 256, 56
_INK, _FAINT, _PAPER = (30, 30, 30), (110, 110, 110), (255, 255, 255)
_NAME, _PAIRS = "comparison.jpg", "images.zip"
_EARLIER = "comparison.png"  # as earlier versions kept it
_PLAIN = str.maketrans("−–—‘’“”", "---''\"\"")
_NO_CHARACTER = "\uffff"  # what a font draws for it, it draws for all that it lacks


@dataclass(frozen=True)
class Pair:
    """One prompt's images as WebP files; `prompt` is its place in the configuration's list.

    `difference` is the largest of the three channels' differences, `AMPLIFIED` times, in grey: of
    the images as they were made, before anything was compressed.
    """

    prompt: int
    baseline: bytes
    accelerated: bytes
    difference: bytes


def comparison(
    baseline: torch.Tensor, accelerated: torch.Tensor, prompts: Sequence[str], *, title: str
) -> Image.Image:
    """Pairs of baseline (left) and accelerated (right) images, two pairs a row, under a title.

    Both are uint8 [N, 3, H, W] of the same N prompts. Large images are reduced to 256 px, and small
    ones enlarged by the largest whole factor that keeps them within.
    """
    pair = 2 * _SIDE + _GAP // 2
    columns = min(2, len(prompts))
    rows = -(-len(prompts) // columns)
    text = ImageFont.load_default(14)
    caption = 44
    top = _TITLED + 28
    width = 2 * _MARGIN + columns * pair + (columns - 1) * 3 * _GAP
    height = top + rows * (_SIDE + caption + _GAP) + _MARGIN
    canvas = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(canvas)
    _title(pen, title)
    for column in range(columns):
        left = _MARGIN + column * (pair + 3 * _GAP)
        pen.text((left, top - 24), "baseline", _FAINT, text)
        pen.text((left + _SIDE + _GAP // 2, top - 24), "accelerated", _FAINT, text)
    for index, prompt in enumerate(prompts):
        row, column = divmod(index, columns)
        left = _MARGIN + column * (pair + 3 * _GAP)
        upper = top + row * (_SIDE + caption + _GAP)
        for shift, images in ((0, baseline), (_SIDE + _GAP // 2, accelerated)):
            pixels = _image(images[index])
            pixels.thumbnail((_SIDE, _SIDE))
            if max(pixels.size) < _SIDE:
                scale = _SIDE // max(pixels.size)
                size = (pixels.width * scale, pixels.height * scale)
                pixels = pixels.resize(size, Image.Resampling.NEAREST)
            canvas.paste(pixels, (left + shift, upper))
        for line, words in enumerate(_captions(prompt, pair)):
            pen.text((left, upper + _SIDE + 4 + 18 * line), words, _INK, text)
    return canvas


def telling(measurement: Measurement, configuration: Configuration, images: int) -> list[int]:
    """Which of the first `images` to keep, by places in the order of scoring: the worst ones first.

    Worst by the first budget's loss. A few others follow, the first in the random order: a fair
    sample of what is usual.
    """
    budget = configuration.budgets[0]
    (scores,) = (one for one in measurement.scores if one.metric == budget.metric)
    losses = score_losses(scores, budget.floor_db)[:images]
    ranked = sorted(range(len(losses)), key=lambda place: -losses[place])
    worst, rest = ranked[:_WORST], sorted(ranked[_WORST:])
    return worst + rest[:_OTHERS]


def keep_picture(folder: Path, trial: optuna.Trial, picture: Image.Image) -> None:
    """Store a comparison among a running trial's artifacts, where optuna-dashboard shows it."""
    # Seven times as quick as a PNG. Nobody sees what is lost, and the archive loses less.
    write = partial(picture.save, quality=95, subsampling=0)
    _keep(folder, trial, _NAME, "image/jpeg", write)


def keep_pairs(
    folder: Path,
    trial: optuna.Trial,
    baseline: torch.Tensor,
    accelerated: torch.Tensor,
    prompts: Sequence[int],
) -> None:
    """Store the images of some prompts, given by their places in the configuration's list.

    Both are uint8 [N, 3, H, W] of the same N prompts.
    """

    def write(file: Path) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for index, prompt in enumerate(prompts):
                one, other = baseline[index].int(), accelerated[index].int()
                apart = (one - other).abs().amax(dim=0) * AMPLIFIED
                for name, image in (
                    ("baseline", _image(baseline[index])),
                    ("accelerated", _image(accelerated[index])),
                    ("difference", Image.fromarray(apart.clamp(max=255).byte().numpy())),
                ):
                    archive.writestr(f"{prompt}/{name}.webp", _webp(image))

    _keep(folder, trial, _PAIRS, "application/zip", write)


def hand_on(folder: Path, trial: optuna.Trial, earlier: int, *, title: str) -> bool:
    """Give a trial the pictures of an earlier one with its params; whether there was a comparison.

    `earlier` is the number of a trial of the same study. The comparison gets a `title` of its own;
    without one nothing is given, not even the images of single prompts.
    """
    storage, study = trial.study._storage, trial.study.study_name
    canvas = _kept_picture(folder, storage, study, earlier)
    pairs = _kept(folder, storage, study, earlier, _PAIRS)
    if canvas is None:
        return False
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((0, 0, canvas.width, _TITLED - 1), _PAPER)
    _title(pen, title)
    keep_picture(folder, trial, canvas)
    if pairs is not None:
        _keep(folder, trial, _PAIRS, "application/zip", lambda file: _write(file, pairs))
    return True


def kept_picture(folder: Path, storage: BaseStorage, study: str, number: int) -> bytes | None:
    """A trial's comparison as a PNG; None where there is none in this folder."""
    picture = _kept_picture(folder, storage, study, number)
    if picture is None:
        return None
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def kept_pairs(folder: Path, storage: BaseStorage, study: str, number: int) -> tuple[Pair, ...]:
    """The images that a trial has kept, the worst prompt first; none where none are readable."""
    data = _kept(folder, storage, study, number, _PAIRS)
    if data is None:
        return ()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            places = dict.fromkeys(name.partition("/")[0] for name in archive.namelist())
            return tuple(
                Pair(
                    int(place),
                    *(
                        archive.read(f"{place}/{name}.webp")
                        for name in ("baseline", "accelerated", "difference")
                    ),
                )
                for place in places
            )
    except (zipfile.BadZipFile, KeyError, ValueError):  # cut off, or somebody else's
        return ()


def _keep(
    folder: Path, trial: optuna.Trial, name: str, kind: str, write: Callable[[Path], None]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / name
        write(file)
        upload_artifact(
            artifact_store=FileSystemArtifactStore(folder),
            file_path=str(file),
            study_or_trial=trial,
            mimetype=kind,
        )


def _kept_picture(
    folder: Path, storage: BaseStorage, study: str, number: int
) -> Image.Image | None:
    for name in (_NAME, _EARLIER):
        data = _kept(folder, storage, study, number, name)
        if data is not None:
            try:
                with Image.open(io.BytesIO(data)) as kept:
                    return kept.convert("RGB")
            except OSError:  # cut off, or somebody else's
                continue
    return None


def _kept(folder: Path, storage: BaseStorage, study: str, number: int, name: str) -> bytes | None:
    study_id = storage.get_study_id_from_name(study)
    trial = storage.get_trial(storage.get_trial_id_from_study_id_trial_number(study_id, number))
    store = FileSystemArtifactStore(folder)
    for meta in get_all_artifact_meta(trial, storage=storage):
        if meta.filename == name and (folder / meta.artifact_id).is_file():
            with store.open_reader(meta.artifact_id) as file:
                return bytes(file.read())
    return None


def _title(pen: ImageDraw.ImageDraw, title: str) -> None:
    font = ImageFont.load_default(22)
    pen.text((_MARGIN, 18), _drawable(title, font), _INK, font)


def _drawable(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text in characters that the font has; Pillow's own has few beyond ASCII."""
    lacking = bytes(font.getmask(_NO_CHARACTER))

    def drawn(character: str) -> str:
        # Without its accents, where only they are lacking.
        for one in (character, unicodedata.normalize("NFKD", character)[0]):
            if one.isspace() or bytes(font.getmask(one)) != lacking:
                return one
        return "?"

    plain = text.translate(_PLAIN)
    known = {character: drawn(character) for character in set(plain)}
    return "".join(known[character] for character in plain)


def _write(file: Path, data: bytes) -> None:
    file.write_bytes(data)


def _image(pixels: torch.Tensor) -> Image.Image:
    """One image, uint8 [3, H, W]."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _webp(image: Image.Image) -> bytes:
    """Small images to the last bit; large ones reduced, and compressed so that nobody sees it.

    The quickest method is 4 to 15 times as quick as the usual one, for small files that are a
    quarter larger and large ones that are not.
    """
    small = max(image.size) <= _LOSSLESS
    image.thumbnail((_LARGEST, _LARGEST))
    file = io.BytesIO()
    # Of lossless files the quality is the effort, for which nothing is gained here.
    image.save(file, "WEBP", lossless=small, quality=0 if small else 88, method=0)
    return file.getvalue()


@lru_cache(maxsize=1024)  # all trials of a study show the same prompts
def _captions(prompt: str, width: int) -> tuple[str, ...]:
    """What is written under a pair, two lines at most."""
    font = ImageFont.load_default(14)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return tuple(_wrapped(pen, font, _drawable(prompt, font), width)[:2])


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
