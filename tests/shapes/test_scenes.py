"""Scenes: what is drawn, what their captions say, and what is kept out of training."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
import torch

from accelsearch import pipelines
from accelsearch.shapes import scenes
from accelsearch.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    LAYOUTS,
    POSITIONS,
    RELATIONS,
    SHADE,
    SHAPES,
    SIDE,
    SIZES,
    TEXTURES,
    Scenes,
    captions,
    draw,
    sample,
    vocabulary,
    withheld,
)

HALF = SIDE / 2


def scene(
    layout: str = "in the center",
    background: str = "white",
    first: tuple[str, str, str, str] = ("large", "solid", "red", "circle"),
    second: tuple[str, str, str, str] = ("large", "solid", "red", "circle"),
    centres: tuple[tuple[float, float], tuple[float, float]] = ((HALF, HALF), (HALF, HALF)),
    radius: float = 26.0,
) -> Scenes:
    """One scene by the names of its attributes; objects are (size, texture, colour, shape)."""
    both = (first, second)
    return Scenes(
        layout=torch.tensor([LAYOUTS.index(layout)]),
        background=torch.tensor([tuple(BACKGROUNDS).index(background)]),
        size=torch.tensor([[SIZES.index(one[0]) for one in both]]),
        texture=torch.tensor([[TEXTURES.index(one[1]) for one in both]]),
        colour=torch.tensor([[tuple(COLOURS).index(one[2]) for one in both]]),
        shape=torch.tensor([[SHAPES.index(one[3]) for one in both]]),
        centre=torch.tensor([centres]),
        radius=torch.full((1, 2), radius),
    )


def rgb(colour: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(colour) / 255


def same(one: Scenes, other: Scenes) -> bool:
    columns = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(torch.equal(a, b) for a, b in columns)


def drawn_objects(table: Scenes) -> torch.Tensor:
    """Which objects are drawn, [N, 2]."""
    return torch.stack((torch.ones_like(table.has_pair), table.has_pair), dim=1)


def test_a_seed_gives_the_same_scenes_and_another_seed_others() -> None:
    assert same(sample(50, seed=3), sample(50, seed=3))
    assert not same(sample(50, seed=3), sample(50, seed=4))


def test_sampling_leaves_the_global_random_numbers_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    sample(5, seed=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("chunk", [1, 5])
def test_scenes_are_equal_in_chunks(chunk: int) -> None:
    table = sample(12, seed=8)
    parts = [table[start : start + chunk] for start in range(0, len(table), chunk)]
    assert torch.equal(torch.cat([draw(part) for part in parts]), draw(table))
    assert [text for part in parts for text in captions(part)] == captions(table)


@pytest.mark.parametrize("pairs", [True, False])
def test_pairs_forces_the_number_of_objects(pairs: bool) -> None:
    assert sample(200, seed=5, pairs=pairs).has_pair.eq(pairs).all()


def test_samples_mix_all_values_of_all_attributes() -> None:
    table = sample(4000, seed=6)
    assert 0.55 < table.has_pair.float().mean() < 0.65
    for column, names in (
        (table.background, BACKGROUNDS),
        (table.size, SIZES),
        (table.texture, TEXTURES),
        (table.colour, COLOURS),
        (table.shape, SHAPES),
    ):
        shares = torch.bincount(column.ravel(), minlength=len(names)) / column.numel()
        assert len(shares) == len(names)
        assert (shares * len(names) - 1).abs().max() < 0.15
    assert set(table.layout.tolist()) == set(range(len(LAYOUTS)))


def test_withheld_combinations_are_never_in_training_and_always_in_held_out_scenes() -> None:
    def of(table: Scenes) -> torch.Tensor:
        return withheld(table.texture, table.colour, table.shape)

    assert not of(sample(20_000, seed=1)).any()
    assert of(sample(2000, seed=1, held_out=True)).all()
    kept = {text.split(" on a ")[0] for text in captions(sample(3000, seed=1, pairs=False))}
    out = captions(sample(500, seed=2, held_out=True, pairs=False))
    assert kept.isdisjoint(text.split(" on a ")[0] for text in out)


def test_an_eighth_is_withheld_and_every_two_attributes_are_still_seen_together() -> None:
    shape = (len(TEXTURES), len(COLOURS), len(SHAPES))
    out = withheld(*torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij"))
    assert out.sum() * 8 == out.numel()
    for axis in range(3):
        assert not out.all(dim=axis).any()
        assert (~out).sum(dim=axis).min() >= shape[axis] - 1


def test_a_caption_names_every_attribute_in_words() -> None:
    table = scene(
        "above",
        "white",
        ("large", "striped", "blue", "star"),
        ("small", "solid", "red", "ring"),
    )
    assert captions(table) == [
        "a large striped blue star above a small solid red ring on a white background"
    ]
    table = scene("on the left", "mint", ("small", "checkered", "pink", "cross"))
    assert captions(table) == [
        "a small checkered pink cross on the left on a mint background",
    ]


def test_the_words_of_captions_are_the_attributes_of_their_scenes() -> None:
    def any_of(names: tuple[str, ...]) -> str:
        return "(" + "|".join(names) + ")"

    one = "a " + " ".join(any_of(tuple(names)) for names in (SIZES, TEXTURES, COLOURS, SHAPES))
    ground = f"on a {any_of(tuple(BACKGROUNDS))} background"
    single = re.compile(f"{one} {any_of(POSITIONS)} {ground}")
    pair = re.compile(f"{one} {any_of(RELATIONS)} {one} {ground}")
    table = sample(300, seed=9)
    for row, text in enumerate(captions(table)):
        has_pair = bool(table.has_pair[row])
        found = (pair if has_pair else single).fullmatch(text)
        assert found, text
        words = list(found.groups())
        assert tuple(BACKGROUNDS)[table.background[row]] == words.pop()
        assert LAYOUTS[table.layout[row]] == words.pop(4)
        for which in range(1 + has_pair):
            assert words[4 * which : 4 * which + 4] == [
                SIZES[table.size[row, which]],
                TEXTURES[table.texture[row, which]],
                tuple(COLOURS)[table.colour[row, which]],
                SHAPES[table.shape[row, which]],
            ]


def test_the_vocabulary_is_exactly_the_words_of_captions() -> None:
    words = {word for text in captions(sample(2000, seed=10)) for word in text.split()}
    assert words == set(vocabulary())
    assert len(vocabulary()) == len(words)


def test_the_built_in_prompts_are_what_scenes_generate() -> None:
    file = pipelines.BUNDLED.parents[1] / "prompts" / "shapes.txt"
    header, *prompts = file.read_text("utf-8").splitlines()
    assert header.startswith("#")
    assert prompts == list(dict.fromkeys(captions(sample(660, seed=640))))[:640]
    assert len(prompts) == 640


def test_objects_lie_inside_the_picture() -> None:
    table = sample(20_000, seed=11)
    reach = table.radius[..., None]
    inside = (table.centre - reach >= 0) & (table.centre + reach <= SIDE)
    assert inside.all(dim=-1)[drawn_objects(table)].all()


def test_no_object_touches_the_frame() -> None:
    table = sample(200, seed=12)
    images = draw(table)
    frames = torch.stack((images[:, :, 0], images[:, :, -1], images[..., 0], images[..., -1]), -1)
    grounds = torch.stack([rgb(value) for value in BACKGROUNDS.values()])[table.background]
    assert torch.equal(frames, grounds[:, :, None, None].expand_as(frames))


def test_relations_are_as_their_words_say() -> None:
    table = sample(3000, seed=13, pairs=True)
    apart = table.centre[:, 1] - table.centre[:, 0]  # from the first to the second, y downwards
    for relation, axis, sign in (
        ("above", 1, 1),
        ("below", 1, -1),
        ("left of", 0, 1),
        ("right of", 0, -1),
    ):
        rows = table.layout == LAYOUTS.index(relation)
        assert rows.sum() > 500
        along, across = sign * apart[rows, axis], apart[rows, 1 - axis].abs()
        assert (along > 5 * across).all()
        # Each object keeps to its side of the middle, and they hardly overlap.
        assert (sign * (table.centre[rows, 0, axis] - HALF) < 0).all()
        assert (sign * (table.centre[rows, 1, axis] - HALF) > 0).all()
        assert (table.radius[rows].sum(1) - along).max() < 3


def test_positions_are_as_their_words_say() -> None:
    table = sample(2000, seed=14, pairs=False)
    offset = table.centre[:, 0] - HALF
    for position, direction in (
        ("in the center", (0, 0)),
        ("at the top", (0, -1)),
        ("at the bottom", (0, 1)),
        ("on the left", (-1, 0)),
        ("on the right", (1, 0)),
    ):
        rows = table.layout == LAYOUTS.index(position)
        assert rows.sum() > 250
        assert ((offset[rows] / 13).round().sign() == torch.tensor(direction)).all()


def test_images_are_floats_in_0_to_1() -> None:
    images = draw(sample(20, seed=15))
    assert images.shape == (20, 3, SIDE, SIDE)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize("colour", COLOURS)
def test_a_solid_object_has_its_colour_on_its_background(colour: str) -> None:
    image = draw(scene(background="gray", first=("large", "solid", colour, "square")))[0]
    assert torch.allclose(image[:, 64, 64], rgb(COLOURS[colour]), atol=1e-6)
    assert torch.equal(image[:, 2, 2], rgb(BACKGROUNDS["gray"]))


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_mix_the_colour_with_its_shade(texture: str) -> None:
    image = draw(scene(first=("large", texture, "cyan", "square")))[0]
    inner = image[:, 46:82, 46:82].flatten(1).T
    plain, dark = rgb(COLOURS["cyan"]), SHADE * rgb(COLOURS["cyan"])
    lit = (inner - plain).abs().amax(1) < 0.01
    shaded = (inner - dark).abs().amax(1) < 0.01
    if texture == "solid":
        assert lit.all()
    else:
        assert 0.35 < lit.float().mean() < 0.8
        assert 0.15 < shaded.float().mean() < 0.65


def test_textures_and_shapes_look_different_from_each_other() -> None:
    textures = [draw(scene(first=("large", name, "red", "square")))[0] for name in TEXTURES]
    for one, other in combinations(textures, 2):
        assert ((one - other).abs().amax(0) > 0.2).sum() > 300
    shapes = [draw(scene(first=("large", "solid", "red", name)))[0] for name in SHAPES]
    for one, other in combinations(shapes, 2):
        covers = [
            (image - rgb(BACKGROUNDS["white"])[:, None, None]).abs().amax(0) > 0.1
            for image in (one, other)
        ]
        assert (covers[0] & covers[1]).sum() < 0.85 * (covers[0] | covers[1]).sum()


def test_large_objects_are_larger_than_small_ones() -> None:
    table = sample(5000, seed=16)
    small, large = (table.radius[table.size == SIZES.index(name)] for name in ("small", "large"))
    assert large.min() > 1.4 * small.max()


def test_the_radius_is_the_reach_of_every_shape() -> None:
    for name in SHAPES:
        image = draw(scene(first=("large", "solid", "red", name), radius=25.0))[0]
        covered = (image - rgb(BACKGROUNDS["white"])[:, None, None]).abs().amax(0) > 0.5
        for axis in (0, 1):
            filled = covered.any(dim=axis).nonzero()
            assert 0.7 * 50 < filled.max() - filled.min() + 1 <= 51, name


def test_the_second_object_of_a_one_object_scene_is_not_drawn() -> None:
    one = scene(second=("large", "solid", "blue", "square"), centres=((64, 64), (30, 30)))
    other = scene(second=("small", "dotted", "green", "star"), centres=((64, 64), (90, 90)))
    assert torch.equal(draw(one), draw(other))


def test_the_first_object_lies_on_top_of_the_second() -> None:
    table = scene(
        "left of",
        first=("large", "solid", "red", "square"),
        second=("large", "solid", "blue", "square"),
        centres=((54, 64), (74, 64)),
    )
    image = draw(table)[0]
    assert torch.allclose(image[:, 64, 64], rgb(COLOURS["red"]), atol=1e-6)
    assert torch.allclose(image[:, 64, 90], rgb(COLOURS["blue"]), atol=1e-6)


def test_rows_are_taken_from_every_column() -> None:
    table = sample(10, seed=17)
    rows = torch.tensor([7, 2])
    picked = table[rows]
    assert len(picked) == 2
    assert captions(picked) == [captions(table)[7], captions(table)[2]]
    assert all(len(column) == 2 for column in vars(picked).values())
    assert same(table.to("cpu"), table)
    assert scenes.LAYOUTS[: len(POSITIONS)] == POSITIONS
