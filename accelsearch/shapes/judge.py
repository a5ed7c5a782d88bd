"""Reads colour, shape and background off a picture of one object, without any learnt model.

The scoring model is trained on the same scenes as the generator, so it must not be the only judge
of it. Here the background is the colour of the frame, the object is the largest region that
differs from it, its colour is a vote of its pixels over the palette, and its shape is the drawn
outline that overlaps it most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from accelsearch.shapes import scenes

Name = TypeVar("Name")

_DIFFERENT = 0.1  # largest channel difference, of 1, up to which a pixel is background
_GRID = 48  # side of the grid on which outlines are compared


@dataclass(frozen=True)
class Reading:
    """What a picture shows: names from `scenes`, or None where there is no object."""

    background: str
    colour: str | None
    shape: str | None


def read(image: Tensor) -> Reading:
    """Read one picture [3, H, W] in 0..1."""
    pixels = image.permute(1, 2, 0).double().numpy()
    frame = np.concatenate((pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)))
    frame = np.concatenate((frame, pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)))
    ground = np.median(frame, axis=0)
    background = _nearest(ground[None], scenes.BACKGROUNDS)[0]

    labelled, count = ndimage.label((np.abs(pixels - ground) > _DIFFERENT).any(axis=-1))
    if count == 0:
        return Reading(background, None, None)
    sizes = np.bincount(labelled.ravel())[1:]
    region = labelled == 1 + int(sizes.argmax())
    palette = {
        (name, shade): tuple(channel * shade for channel in value)
        for name, value in scenes.COLOURS.items()
        for shade in (1.0, scenes.SHADE)
    }
    votes = [name for name, _ in _nearest(pixels[region], palette)]
    colour = max(scenes.COLOURS, key=votes.count)
    return Reading(background, colour, _shape(region))


def _nearest(pixels: NDArray[np.float64], palette: Mapping[Name, tuple[float, ...]]) -> list[Name]:
    names = list(palette)
    values = np.array([palette[name] for name in names]) / 255
    distances = ((pixels[:, None] - values[None]) ** 2).sum(axis=-1)
    return [names[index] for index in distances.argmin(axis=1)]


def _shape(region: NDArray[np.bool_]) -> str:
    """The shape whose outline, scaled to the same bounding square, overlaps the region most."""
    resampled = _squared(region)
    overlaps = {
        name: (resampled & outline).sum() / (resampled | outline).sum()
        for name, outline in _outlines().items()
    }
    return max(overlaps, key=lambda name: float(overlaps[name]))


@cache
def _outlines() -> dict[str, NDArray[np.bool_]]:
    axis = torch.linspace(-1.2, 1.2, 241)
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    indices = torch.arange(len(scenes.SHAPES))
    grid = (len(indices), -1, -1)
    distances = scenes.outline_distance(indices, u.expand(grid), v.expand(grid))
    return {
        name: _squared((distance <= 0).numpy())
        for name, distance in zip(scenes.SHAPES, distances, strict=True)
    }


def _squared(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The region's bounding box, centred in its bounding square, on the comparison grid."""
    rows, columns = np.nonzero(region.any(axis=1))[0], np.nonzero(region.any(axis=0))[0]
    side = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    steps = (np.arange(_GRID) + 0.5) / _GRID * side - side / 2
    ys = np.floor((rows[0] + rows[-1] + 1) / 2 + steps).astype(int)
    xs = np.floor((columns[0] + columns[-1] + 1) / 2 + steps).astype(int)
    height, width = region.shape
    inside = ((ys >= 0) & (ys < height))[:, None] & ((xs >= 0) & (xs < width))[None]
    found: NDArray[np.bool_] = region[np.ix_(ys.clip(0, height - 1), xs.clip(0, width - 1))]
    kept: NDArray[np.bool_] = np.logical_and(found, inside)
    return kept
