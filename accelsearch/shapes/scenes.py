"""Captioned scenes of coloured, textured shapes: what the bundled model is trained and judged on.

A scene holds one or two objects on a flat background. Scenes live in a `Scenes` table (one row a
scene) so that a hundred thousand of them are drawn on a GPU in seconds; `draw` turns rows into
images and `caption` into text such as "a large striped blue star above a small solid red ring on a
white background". A share of the (colour, texture, shape) combinations is withheld from training,
so that held-out captions ask for objects the model has never seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 128
"""Width and height of a drawn scene, in pixels."""

SIZES = ("small", "large")
TEXTURES = ("solid", "striped", "dotted", "checkered")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 130, 30),
    "yellow": (240, 210, 40),
    "green": (40, 150, 60),
    "cyan": (40, 195, 220),
    "blue": (40, 80, 220),
    "purple": (140, 50, 190),
    "pink": (245, 120, 190),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "gray": (150, 150, 150),
    "black": (20, 20, 20),
    "beige": (235, 210, 160),
    "mint": (160, 225, 185),
    "lavender": (200, 180, 240),
}
POSITIONS = ("in the center", "at the top", "at the bottom", "on the left", "on the right")
RELATIONS = ("above", "below", "left of", "right of")
LAYOUTS = POSITIONS + RELATIONS
"""A scene's layout: the first five hold one object, the other four a pair."""

# Unit vectors from the centre of the picture to the first object of each layout; the second object
# of a relation stands opposite.
_DIRECTIONS = ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0), (0, -1), (0, 1), (-1, 0), (1, 0))
_OFFSET_SINGLE, _OFFSET_PAIR = 26.0, 31.0  # pixels from the centre
_JITTER = 4.0  # pixels, in both axes
_RADII = ((13.0, 16.0), (24.0, 28.0))  # pixels, of a small and of a large object
SHADE = 0.5
"""The second colour of a texture is the object's own, multiplied by this."""
_PERIOD = 12.0  # pixels, of stripes and dots; checks are 8 px wide
_PAIR_SHARE = 0.6  # of sampled scenes hold two objects


@dataclass(frozen=True)
class Scenes:
    """A table of N scenes; attribute columns are indices into this module's name lists.

    Shapes: `layout` and `background` [N]; `size`, `texture`, `colour`, `shape` and `radius` [N, 2];
    `centre` [N, 2, 2] (x, y in pixels). The second object of a one-object scene is not drawn.
    """

    layout: Tensor
    background: Tensor
    size: Tensor
    texture: Tensor
    colour: Tensor
    shape: Tensor
    centre: Tensor
    radius: Tensor

    def __len__(self) -> int:
        return len(self.layout)

    def __getitem__(self, rows: slice | Tensor) -> Scenes:
        return Scenes(**{name: column[rows] for name, column in vars(self).items()})

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(**{name: column.to(device) for name, column in vars(self).items()})

    @property
    def has_pair(self) -> Tensor:
        """Whether the scene holds two objects, [N] bool."""
        return self.layout >= len(POSITIONS)


def withheld(texture: Tensor, colour: Tensor, shape: Tensor) -> Tensor:
    """Whether a (texture, colour, shape) combination is kept out of training: 32 of the 256.

    A latin-square rule: every pair of two attributes is still seen with most values of the third.
    """
    return (colour + 2 * texture + 3 * shape) % 8 == 0


def sample(count: int, *, seed: int, held_out: bool = False, pairs: bool | None = None) -> Scenes:
    """Draw `count` scenes at random; with `held_out`, every object is a withheld combination.

    `pairs` forces two-object (True) or one-object (False) scenes. The same arguments give the same
    scenes on every machine.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    texture, colour, shape = (
        integers(len(names), count, 2) for names in (TEXTURES, COLOURS, SHAPES)
    )
    while bool((wrong := withheld(texture, colour, shape) != held_out).any()):
        # Redrawing all three attributes keeps the accepted combinations equally likely.
        for column, names in ((texture, TEXTURES), (colour, COLOURS), (shape, SHAPES)):
            column[wrong] = integers(len(names), int(wrong.sum()))

    single, pair = integers(len(POSITIONS), count), integers(len(RELATIONS), count)
    is_pair = torch.rand(count, generator=generator) < _PAIR_SHARE
    if pairs is not None:
        is_pair = torch.full((count,), pairs)
    layout = torch.where(is_pair, len(POSITIONS) + pair, single)

    size = integers(len(SIZES), count, 2)
    low, high = torch.tensor(_RADII)[size].unbind(-1)
    radius = low + (high - low) * torch.rand(count, 2, generator=generator)
    direction = torch.tensor(_DIRECTIONS, dtype=torch.float32)[layout]
    offset = torch.where(is_pair, _OFFSET_PAIR, _OFFSET_SINGLE)[:, None]
    centre = SIDE / 2 + torch.stack((direction * offset, -direction * offset), dim=1)
    centre = centre + _JITTER * (2 * torch.rand(count, 2, 2, generator=generator) - 1)
    background = integers(len(BACKGROUNDS), count)
    return Scenes(layout, background, size, texture, colour, shape, centre, radius)


def captions(scenes: Scenes) -> list[str]:
    """The caption of each scene: all attributes in words, objects in the layout's order."""
    colours, backgrounds = tuple(COLOURS), tuple(BACKGROUNDS)

    def words(row: int, which: int) -> str:
        return " ".join(
            (
                "a",
                SIZES[int(scenes.size[row, which])],
                TEXTURES[int(scenes.texture[row, which])],
                colours[int(scenes.colour[row, which])],
                SHAPES[int(scenes.shape[row, which])],
            )
        )

    texts = []
    for row in range(len(scenes)):
        layout = LAYOUTS[int(scenes.layout[row])]
        objects = f"{words(row, 0)} {layout}"
        if layout in RELATIONS:
            objects += f" {words(row, 1)}"
        texts.append(f"{objects} on a {backgrounds[int(scenes.background[row])]} background")
    return texts


def vocabulary() -> list[str]:
    """Every word a caption can hold, in a fixed order."""
    phrases = (
        *SIZES,
        *TEXTURES,
        *COLOURS,
        *SHAPES,
        *BACKGROUNDS,
        *LAYOUTS,
        "a",
        "on",
        "background",
    )
    return list(dict.fromkeys(word for phrase in phrases for word in phrase.split()))


def draw(scenes: Scenes) -> Tensor:
    """Draw scenes with anti-aliased edges on the device they are on.

    Returns images [N, 3, SIDE, SIDE], float32 in 0..1. Drawing takes about 2 MB a scene.
    """
    device = scenes.layout.device
    colours = torch.tensor(tuple(COLOURS.values()), device=device) / 255
    backgrounds = torch.tensor(tuple(BACKGROUNDS.values()), device=device) / 255
    axis = torch.arange(SIDE, device=device) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    images = backgrounds[scenes.background][:, :, None, None].expand(-1, -1, SIDE, SIDE).clone()
    for which in (1, 0):  # the first-named object is drawn last, on top
        radius = scenes.radius[:, which, None, None]
        dx = x - scenes.centre[:, which, 0, None, None]
        dy = y - scenes.centre[:, which, 1, None, None]
        outline = outline_distance(scenes.shape[:, which], dx / radius, dy / radius) * radius
        inside = (0.5 - outline).clamp(0, 1)
        if which == 1:
            inside = inside * scenes.has_pair[:, None, None]
        shaded = _shaded(scenes.texture[:, which], dx, dy)
        paint = colours[scenes.colour[:, which]][:, :, None, None]
        paint = paint * (1 - (1 - SHADE) * shaded[:, None])
        images += inside[:, None] * (paint - images)
    return images


def outline_distance(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Approximate signed distance to the outline of each row's shape; negative inside.

    `shape` [N] indexes SHAPES; `u`, `v` [N, H, W] are coordinates in units of the object's radius,
    v downwards.
    """
    a, b = u.abs(), v.abs()
    r = torch.hypot(u, v)
    sector = 2 * math.pi / 5
    angle = torch.atan2(u, -v)
    angle = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    # One edge of the star runs from the tip (1, 0) to the notch at angle sector / 2.
    notch_x, notch_y = 0.42 * math.cos(sector / 2), 0.42 * math.sin(sector / 2)
    edge = math.hypot(notch_x - 1, notch_y)
    star = (notch_y * (r * torch.cos(angle) - 1) - (notch_x - 1) * r * torch.sin(angle)) / edge
    # A heart: two lobes, the wedge below the points where its edges touch them, what is between.
    lobes = torch.hypot(a - 0.4, v + 0.3) - 0.52
    wedge = torch.maximum(0.754 * a + 0.657 * (v - 0.95), 0.04 - v)
    between = torch.maximum(a - 0.4, torch.maximum(-0.3 - v, v - 0.04))
    distances = {
        "circle": r - 0.95,
        "square": torch.maximum(a, b) - 0.84,
        "triangle": torch.maximum(v - 0.8, (1.8 * a - v - 1) / math.hypot(1.8, 1)),
        "diamond": (a * 1.35 + b - 1) / math.hypot(1.35, 1),
        "star": star,
        "heart": torch.minimum(lobes, torch.minimum(wedge, between)),
        "cross": torch.minimum(
            torch.maximum(a - 0.33, b - 0.95), torch.maximum(b - 0.33, a - 0.95)
        ),
        "ring": (r - 0.71).abs() - 0.24,
    }
    result = torch.zeros_like(r)
    for index, name in enumerate(SHAPES):
        result = torch.where((shape == index)[:, None, None], distances[name], result)
    return result


def _shaded(texture: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """How much of the darker shade each pixel shows, 0..1; dx, dy in pixels from the centre."""

    def wave(distance: Tensor, period: float) -> Tensor:
        """Distance in pixels to the middle of the nearest period."""
        return (torch.remainder(distance + period / 2, period) - period / 2).abs()

    patterns = {
        "striped": (wave(dy, _PERIOD) - _PERIOD / 4 + 0.5).clamp(0, 1),
        "dotted": (4.0 - torch.hypot(wave(dx, _PERIOD), wave(dy, _PERIOD))).clamp(0, 1),
        "checkered": (
            0.5 + (wave(dx, 16.0) - 4).clamp(-0.5, 0.5) * (wave(dy, 16.0) - 4).clamp(-0.5, 0.5) * 2
        ),
    }
    result = torch.zeros_like(dx)
    for name, pattern in patterns.items():
        result = torch.where((texture == TEXTURES.index(name))[:, None, None], pattern, result)
    return result
