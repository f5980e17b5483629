"""Draws how similar the features of sampling steps are."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cmdgen.acceleration.calibration import Calibration
from cmdgen.files import replace_with

# dark to bright, so that it reads in grey too: the least similar to the most
_COLOURS = ((24, 14, 66), (38, 84, 132), (40, 152, 128), (148, 204, 74), (252, 238, 120))
_SIDE, _MARGIN = 480, 64


def draw_similarity(path: Path, calibrations: Sequence[Calibration], title: str) -> None:
    """Write a PNG with a map of steps by steps for each calibration, beside one another."""
    size = (_SIDE + 2 * _MARGIN) * len(calibrations), _SIDE + 2 * _MARGIN
    image = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for i, each in enumerate(calibrations):
        left = i * (_SIDE + 2 * _MARGIN) + _MARGIN
        values = np.array(each.similarity_map())
        low, high = values.min(), values[~np.eye(each.steps, dtype=bool)].max()
        # the diagonal is 1 whatever is measured
        cells = Image.fromarray(colour((values - low).clip(0) / max(high - low, 1e-6)))
        image.paste(cells.resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (left, _MARGIN))
        name = f"{title}: {each.part}, {each.sampler}, steps 0 to {each.steps - 1}"
        draw.text((left, _MARGIN // 2), name, "black", font)
        scale = f"cosine of two steps' features: {low:.3f} dark, {high:.3f} bright"
        draw.text((left, _SIDE + _MARGIN * 5 // 4), scale, "black", font)
    with replace_with(path) as temporary:
        image.save(temporary, format="PNG")


def colour(share: np.ndarray) -> np.ndarray:
    """(...) in [0, 1] -> uint8 (..., 3); what is beyond is clipped."""
    stops = np.linspace(0, 1, len(_COLOURS))
    channels = [np.interp(share, stops, channel) for channel in zip(*_COLOURS, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
