"""A contact sheet: one row a clip, some of its frames across, its caption above them."""

from PIL import Image, ImageDraw
from torch import Tensor

from cmdgen.data.clips import Clips

_CAPTION_HEIGHT = 14
_GAP = 2
_INK, _PAPER = "#e8e8e8", "#101014"


def draw_sheet(clips: Clips, columns: int = 8) -> Image.Image:
    """-> a picture of `columns` frames of every clip, evenly over its time."""
    count, frames, _, height, width = clips.frames.shape
    columns = min(columns, frames)
    shown = [i * frames // columns for i in range(columns)]
    row = height + _CAPTION_HEIGHT + _GAP
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, count * row), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (clip, caption) in enumerate(zip(clips.frames.cpu(), clips.captions, strict=True)):
        pen.text((2, number * row + 1), caption, fill=_INK)
        for column, frame in enumerate(shown):
            sheet.paste(
                _picture(clip[frame]), (column * (width + _GAP), number * row + _CAPTION_HEIGHT)
            )
    return sheet


def _picture(frame: Tensor) -> Image.Image:
    """(3, H, W) uint8 -> the same as an image."""
    return Image.fromarray(frame.permute(1, 2, 0).numpy())
