"""Draws what each block of a model is worth."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cmdgen.compression.importance import Importance
from cmdgen.files import replace_with

# of what a clip loses, and of the time that is saved
HARM, SAVED = "#180e42", "#289880"
_LINE, _NAME, _BAR, _MARGIN = 22, 230, 260, 24


def draw_importance(path: Path, importance: Importance) -> None:
    """Write a PNG with a line for each block: how far the clips move without it, and what that saves."""
    rows = importance.rows
    size = _NAME + 2 * (_BAR + 90) + 2 * _MARGIN, (len(rows) + 2) * _LINE + 2 * _MARGIN
    image = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    titles = f"{importance.model} without", "distance of the probe's features", "per cent saved of its part's time"
    lefts = [_MARGIN, _MARGIN + _NAME, _MARGIN + _NAME + _BAR + 90]
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left, _MARGIN), title, "black", font)
    columns = [row.distance for row in rows], [100 * max(row.share, 0) for row in rows]
    for i, row in enumerate(rows, 2):
        top = _MARGIN + i * _LINE
        draw.text((lefts[0], top), row.unit, "black", font)
        for left, values, color in zip(lefts[1:], columns, (HARM, SAVED), strict=True):
            value = values[i - 2]
            width = round(_BAR * value / (max(values) or 1))
            draw.rectangle((left, top + 3, left + width, top + _LINE - 6), color)
            draw.text((left + width + 6, top), f"{value:.3g}", "black", font)
    with replace_with(path) as temporary:
        image.save(temporary, format="PNG")
