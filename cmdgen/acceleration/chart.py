"""Draws how similar the features of sampling steps are."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cmdgen.acceleration.calibration import Calibration
from cmdgen.files import replace_with

# so that it reads in grey too: the least similar to the most
DARK, MIDDLE, BRIGHT = "#180e42", "#289880", "#fcee78"
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
        shares = ((values - low) / max(high - low, 1e-6)).clip(0, 1)
        cells = ImageOps.colorize(Image.fromarray((255 * shares).round().astype(np.uint8)), DARK, BRIGHT, MIDDLE)
        image.paste(cells.resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (left, _MARGIN))
        name = f"{title}: {each.part}, {each.sampler}, steps 0 to {each.steps - 1}"
        draw.text((left, _MARGIN // 2), name, "black", font)
        scale = f"cosine of two steps' features: {low:.3f} dark, {high:.3f} bright"
        draw.text((left, _SIDE + _MARGIN * 5 // 4), scale, "black", font)
    with replace_with(path) as temporary:
        image.save(temporary, format="PNG")
