"""A report as one picture: each study's trials, speedup against loss, for slides and chats."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from math import ceil, floor, log10

from PIL import Image, ImageDraw, ImageFont

from accelsearch.budget import loss_told
from accelsearch.figures import loss_axis
from accelsearch.measurement import settings_told
from accelsearch.queries import fastest_feasible, is_unconfirmed, pareto_front
from accelsearch.report.findings import name_of
from accelsearch.storage import Outcome, StoredStudy

__all__ = ["png_picture"]

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _RIGHT = 1200, 640, 110, 130, 90, 50
_INK, _FAINT, _GRID, _PAPER = (28, 33, 39), (92, 101, 112), (226, 229, 234), (255, 255, 255)
_ACCENT, _WARM, _GREY = (47, 129, 196), (217, 98, 43), (138, 145, 156)
_COLOURS = {Outcome.FEASIBLE: _ACCENT, Outcome.OVER_BUDGET: _WARM}


def png_picture(studies: Sequence[StoredStudy]) -> bytes:
    """One panel below the other, 1200 px wide."""
    canvas = Image.new("RGB", (_WIDTH, _HEIGHT * len(studies)), _PAPER)
    for index, study in enumerate(studies):
        canvas.paste(_panel(study), (0, _HEIGHT * index))
    file = io.BytesIO()
    canvas.save(file, "PNG", optimize=True)
    return file.getvalue()


def _panel(study: StoredStudy) -> Image.Image:
    panel = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    pen = ImageDraw.Draw(panel)
    heading, text, small = (ImageFont.load_default(size) for size in (30, 20, 17))
    budget, best = study.configuration.budgets[0], fastest_feasible(study)
    axis = loss_axis(budget)
    pen.text((40, 28), _short(name_of(study.configuration), 70), _INK, heading)
    told = "Nothing measured keeps its budget."
    if best is not None:
        loss = best.loss(budget)
        cost = "" if loss is None else f", {loss_told(loss, budget)}"
        sure = ", not verified on held-out prompts" if is_unconfirmed(study, best) else ""
        told = f"Best {best.speedup:.2f}x{cost}{sure}: {settings_told(best.params)}"
    pen.text((40, 74), _short(told, 110), _FAINT, text)
    points = [
        (loss * axis.scale, one.speedup, one)
        for one in study.current
        if one.speedup is not None and (loss := one.loss(budget)) is not None
    ]
    limit = budget.max_loss * axis.scale
    xs, ys = _ticks([limit, *(x for x, _, _ in points)]), _ticks([1, *(y for _, y, _ in points)])
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (right - _LEFT),
            bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (bottom - _TOP),
        )

    for x in xs:
        pen.line([at(x, ys[0]), at(x, ys[-1])], _GRID)
        pen.text((at(x, 0)[0], bottom + 8), f"{x:g}", _FAINT, small, anchor="mt")
    for y in ys:
        pen.line([at(xs[0], y), at(xs[-1], y)], _GRID)
        pen.text((_LEFT - 12, at(0, y)[1]), f"{y:g}x", _FAINT, small, anchor="rm")
    pen.text(((_LEFT + right) / 2, _HEIGHT - 44), axis.title, _INK, text, anchor="mt")
    pen.line([at(limit, ys[0]), at(limit, ys[-1])], _WARM, 2)
    pen.text((at(limit, 0)[0] + 8, _TOP + 4), "budget", _WARM, small)
    front = [
        at((one.loss(budget) or 0) * axis.scale, one.speedup or 0) for one in pareto_front(study)
    ]
    for (x0, y0), (x1, y1) in pairwise(front):
        pen.line([(x0, y0), (x1, y0), (x1, y1)], _GREY, 1)
    for x, y, one in points:
        (u, v), colour = at(x, y), _COLOURS.get(one.outcome, _GREY)
        if one.outcome is Outcome.FEASIBLE:
            pen.ellipse([u - 6, v - 6, u + 6, v + 6], colour)
        else:
            pen.line([u - 5, v - 5, u + 5, v + 5], colour, 2)
            pen.line([u - 5, v + 5, u + 5, v - 5], colour, 2)
        if best is not None and one.number == best.number:
            pen.ellipse([u - 11, v - 11, u + 11, v + 11], outline=colour, width=2)
    return panel


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers from below the smallest to above the largest value."""
    low, high = min(values), max(values)
    raw = max(high - low, 1e-9 + abs(high) / 10) / 5
    size = 10 ** floor(log10(raw))
    step = next(size * one for one in (1, 2, 5, 10) if size * one >= raw)
    first, last = floor(low / step - 0.2), ceil(high / step + 0.2)
    return [round(step * count, 10) for count in range(first, last + 1)]


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
