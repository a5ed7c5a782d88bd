"""Writes many small images as one PNG."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image
from torch import Tensor, ones


def save_grid(path: Path, images: Tensor, columns: int) -> None:
    """Write images [N, 3, H, W] in 0..1 as one PNG, row by row; the last row is padded in white."""
    count, _, height, width = images.shape
    rows = math.ceil(count / columns)
    canvas = ones(rows * columns, 3, height, width)
    canvas[:count] = images.float().cpu().clamp(0, 1)
    canvas = canvas.reshape(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    pixels = (canvas.reshape(rows * height, columns * width, 3) * 255).round().byte()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.contiguous().numpy()).save(path)
