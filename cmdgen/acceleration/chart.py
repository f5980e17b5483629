"""Draws how alike the features of sampling steps are."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cmdgen.acceleration.calibration import Calibration, Rows
from cmdgen.files import replace_with

# dark to bright, so that it reads in grey too: the least similar to the most
_COLOURS = ((24, 14, 66), (38, 84, 132), (40, 152, 128), (148, 204, 74), (252, 238, 120))
_SIDE, _MARGIN, _BAR, _TEXT, _TICK = 480, 64, 20, 16, 6
_PAPER, _INK = (255, 255, 255), (32, 32, 32)


def draw_similarity(path: Path, calibrations: Sequence[Calibration], title: str) -> None:
    """Write a PNG: a map of steps by steps for each calibration, and its colours in numbers."""
    width = _SIDE + 3 * _MARGIN + _BAR
    image = Image.new("RGB", (width * len(calibrations), _SIDE + 3 * _MARGIN), _PAPER)
    for i, each in enumerate(calibrations):
        name = f"{title}: {each.part}, {each.sampler}, {each.steps} steps"
        if each.cut is not None:
            name += f", cut {each.cut}"
        _draw_map(image, (i * width + _MARGIN, _MARGIN), each.similarity, name)
    with replace_with(path) as temporary:
        image.save(temporary, format="PNG")


def colour(share: np.ndarray) -> np.ndarray:
    """(...) in [0, 1] -> uint8 (..., 3)."""
    stops = np.linspace(0, 1, len(_COLOURS))
    channels = [np.interp(share, stops, channel) for channel in zip(*_COLOURS, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _draw_map(image: Image.Image, corner: tuple[int, int], rows: Rows, title: str) -> None:
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(_TEXT)
    left, top = corner
    values = np.array(rows)
    steps = len(values)
    # the diagonal is 1 whatever is measured
    low, high = values.min(), max(values[~np.eye(steps, dtype=bool)].max(), values.min() + 1e-6)
    cells = Image.fromarray(colour((values.clip(low, high) - low) / (high - low)))
    image.paste(cells.resize((_SIDE, _SIDE), Image.Resampling.NEAREST), corner)
    draw.text((left, top - 2 * _TEXT), title, _INK, font)
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200) if steps / n <= 12)
    for step in range(0, steps, every):
        at = (step + 0.5) * _SIDE / steps
        bottom = top + _SIDE
        draw.line((left + at, bottom, left + at, bottom + _TICK), _INK)
        draw.text((left + at, bottom + _TICK), str(step), _INK, font, anchor="ma")
        draw.line((left - _TICK, top + at, left, top + at), _INK)
        draw.text((left - 2 * _TICK, top + at), str(step), _INK, font, anchor="rm")
    draw.text((left + _SIDE / 2, top + _SIDE + 2 * _TEXT), "step", _INK, font, anchor="ma")
    _draw_bar(image, (left + _SIDE + _MARGIN // 2, top), float(low), float(high))


def _draw_bar(image: Image.Image, corner: tuple[int, int], low: float, high: float) -> None:
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(_TEXT)
    left, top = corner
    ramp = colour(np.linspace(1, 0, _SIDE))[:, None].repeat(_BAR, axis=1)
    image.paste(Image.fromarray(ramp), corner)
    # enough digits to tell neighbours apart
    digits = max(2, math.ceil(-math.log10((high - low) / 5)) + 1)
    for share in np.linspace(0, 1, 6):
        y = top + (1 - share) * (_SIDE - 1)
        draw.line((left + _BAR, y, left + _BAR + _TICK, y), _INK)
        value = f"{low + share * (high - low):.{digits}f}"
        draw.text((left + _BAR + 2 * _TICK, y), value, _INK, font, anchor="lm")
    draw.text((left, top - 2 * _TEXT), "cosine", _INK, font)
