"""The reader of pictures that does not use the scoring model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from accelsearch.shapes import scenes
from accelsearch.shapes.judge import Reading, read

COLOURS, BACKGROUNDS = tuple(scenes.COLOURS), tuple(scenes.BACKGROUNDS)
COUNT = 200


@pytest.fixture(scope="module")
def table() -> scenes.Scenes:
    """One-object scenes, half of them of combinations kept out of training."""
    seen = scenes.sample(COUNT // 2, seed=21, pairs=False)
    unseen = scenes.sample(COUNT // 2, seed=22, held_out=True, pairs=False)
    columns = zip(vars(seen).items(), vars(unseen).values(), strict=True)
    return scenes.Scenes(**{name: torch.cat((a, b)) for (name, a), b in columns})


@pytest.fixture(scope="module")
def drawn(table: scenes.Scenes) -> torch.Tensor:
    return scenes.draw(table)


def asked(table: scenes.Scenes) -> list[Reading]:
    return [
        Reading(BACKGROUNDS[background], COLOURS[colour], scenes.SHAPES[shape])
        for background, colour, shape in zip(
            table.background, table.colour[:, 0], table.shape[:, 0], strict=True
        )
    ]


def share_right(images: torch.Tensor, expected: Sequence[Reading]) -> float:
    right = [read(image) == one for image, one in zip(images, expected, strict=True)]
    return sum(right) / len(right)


def test_drawn_scenes_are_read_right(table: scenes.Scenes, drawn: torch.Tensor) -> None:
    # Of every colour, shape, background, texture and size, or the share would say little.
    assert len(set(asked(table))) > 100
    assert len(set(zip(table.shape[:, 0].tolist(), table.texture[:, 0].tolist()))) == 32  # noqa: B905
    assert share_right(drawn, asked(table)) >= 0.99


def test_a_little_noise_does_not_disturb(table: scenes.Scenes, drawn: torch.Tensor) -> None:
    noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0))
    assert share_right((drawn + 0.02 * noise).clamp(0, 1)[:50], asked(table[:50])) >= 0.95


@pytest.mark.parametrize(
    ("attribute", "values"),
    [("colour", len(COLOURS)), ("shape", len(scenes.SHAPES)), ("background", len(BACKGROUNDS))],
)
def test_a_wrong_attribute_is_noticed(table: scenes.Scenes, attribute: str, values: int) -> None:
    table = table[torch.arange(0, COUNT, 4)]
    shift = 1 + torch.arange(len(table)) % (values - 1)
    column = getattr(table, attribute)
    wrong = (column + (shift if column.ndim == 1 else shift[:, None])) % values
    images = scenes.draw(replace(table, **{attribute: wrong}))
    for image, one in zip(images, asked(table), strict=True):
        seen = read(image)
        differing = {name for name in vars(one) if getattr(seen, name) != getattr(one, name)}
        assert attribute in differing
        assert differing == {attribute}


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_picture_holds_no_object(background: str) -> None:
    image = (torch.tensor(scenes.BACKGROUNDS[background]) / 255)[:, None, None]
    noise = 0.01 * torch.randn(3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert read(image.expand(3, 128, 128)) == Reading(background, None, None)
    assert read(image + noise) == Reading(background, None, None)


def test_the_largest_object_is_read_and_specks_are_not(
    table: scenes.Scenes, drawn: torch.Tensor
) -> None:
    images = drawn[:40].clone()
    images[:, :, 5:9, 5:9] = (torch.tensor([0.0, 1.0, 0.0]))[:, None, None]
    assert share_right(images, asked(table[:40])) == 1


def test_a_blob_is_not_read_as_the_shape_it_hides() -> None:
    """A star so blurred that it is a disc must not pass for a star."""
    table = scenes.sample(400, seed=23, pairs=False)
    star = (table.shape[:, 0] == scenes.SHAPES.index("star")) & (table.size[:, 0] == 0)
    table = table[star.nonzero().ravel()[:10]]
    kernel = torch.ones(3, 1, 15, 15) / 225
    images = torch.nn.functional.pad(scenes.draw(table), (7,) * 4, mode="replicate")
    blurred = torch.nn.functional.conv2d(images, kernel, groups=3)
    assert sum(read(image).shape == "star" for image in blurred) <= 1
