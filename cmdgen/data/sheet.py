"""A contact sheet: one row a clip, some of its frames across, its caption above them."""

from collections.abc import Sequence

import torch
from einops import rearrange
from PIL import Image, ImageDraw

from cmdgen.data.clips import Clips

_CAPTION_HEIGHT = 14
_GAP = 2
_INK, _PAPER = "#e8e8e8", (16, 16, 20)


def draw_sheet(clips: Clips, captions: Sequence[str], columns: int) -> Image.Image:
    """-> a picture of `columns` frames of every clip, evenly over its time."""
    count, frames, _, height, width = clips.frames.shape
    columns = min(columns, frames)
    shown = [i * frames // columns for i in range(columns)]
    cells = torch.tensor(_PAPER, dtype=torch.uint8)[:, None, None].repeat(
        count, columns, 1, height + _CAPTION_HEIGHT + _GAP, width + _GAP
    )
    cells[..., _CAPTION_HEIGHT:-_GAP, :-_GAP] = clips.frames[:, shown].cpu()
    sheet = rearrange(cells, "b t c h w -> (b h) (t w) c")
    picture = Image.fromarray(sheet[:, :-_GAP].contiguous().numpy())
    pen = ImageDraw.Draw(picture)
    for number, caption in enumerate(captions):
        pen.text((2, number * cells.shape[3] + 1), caption, fill=_INK)
    return picture
