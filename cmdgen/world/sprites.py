"""The pictures of subjects: emoji, or shapes where there is no font."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from cmdgen.world.config import WorldConfig
from cmdgen.world.tables import Subject

# side of a sprite in the atlas, and the fonts' own bitmap size, the only one they can be drawn at
_SIDE = 128
_FONT_SIZE = 109
_FONT_FILE = "NotoColorEmoji.ttf"
_FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
)


def find_font(path: str | None = None) -> Path:
    """The Noto Color Emoji file: `path`, or the first in the usual folders.

    FileNotFoundError says where to get it.
    """
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"font {path} does not exist")
        return Path(path)
    for folder in _FONT_FOLDERS:
        for found in sorted(Path(folder).expanduser().rglob(_FONT_FILE)):
            return found
    raise FileNotFoundError(
        f"{_FONT_FILE} not found: install the Debian package fonts-noto-color-emoji, or pass --font"
    )


def load_sprites(subjects: tuple[Subject, ...], config: WorldConfig) -> Tensor:
    """-> (S, 4, 128, 128) float32, premultiplied; the longer side fills the square."""
    if config.sprites == "shapes":
        return torch.stack([_draw_shape(i) for i in range(len(subjects))])
    font = str(find_font(config.font))
    return torch.stack([_draw_glyph(subject.glyph, font) for subject in subjects])


def build_mipmaps(sprites: Tensor, smallest: int = 8) -> list[Tensor]:
    """(S, 4, N, N) -> levels of side N, N/√2, N/2, ...: area averages, never of one another."""
    side, levels = sprites.shape[-1], []
    while side >= smallest:
        levels.append(F.interpolate(sprites, size=(side, side), mode="area"))
        side = round(sprites.shape[-1] / 2 ** (len(levels) / 2))
    return levels


@cache
def _draw_glyph(glyph: str, font: str) -> Tensor:
    """-> (4, 128, 128) premultiplied."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    try:
        typeface = ImageFont.truetype(font, _FONT_SIZE)
    except OSError as error:
        raise ValueError(f"font {font}: {error}; a colour bitmap font is needed") from None
    page = Image.new("RGBA", (192, 192))
    ImageDraw.Draw(page).text((20, 20), glyph, font=typeface, embedded_color=True)
    box = page.getbbox()
    if box is None:
        raise ValueError(f"font {font} has no picture of {glyph}")
    picture = page.crop(box)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    pixels[:3] *= pixels[3:]
    scale = (_SIDE - 2) / max(picture.size)
    height, width = (max(1, round(side * scale)) for side in (picture.height, picture.width))
    pixels = F.interpolate(pixels[None], size=(height, width), mode="bicubic", antialias=True)
    return _centre(pixels[0].clamp(0, 1))


def _centre(pixels: Tensor) -> Tensor:
    """(4, h, w) -> (4, 128, 128)."""
    height, width = pixels.shape[1:]
    top, left = (_SIDE - height) // 2, (_SIDE - width) // 2
    return F.pad(pixels, (left, _SIDE - width - left, top, _SIDE - height - top))


def _draw_shape(number: int) -> Tensor:
    """-> (4, 128, 128): a two-coloured star or polygon, another for every number."""
    x = torch.linspace(-1, 1, _SIDE)
    y = x[:, None]
    x, y = x.expand(_SIDE, _SIDE), y.expand(_SIDE, _SIDE)
    radius, angle = torch.hypot(x, y), torch.atan2(y, x)
    points = 2 + number % 5
    edge = 0.75 + 0.2 * torch.cos(points * angle)
    alpha = ((edge - radius) * 32 + 0.5).clamp(0, 1)
    hue = torch.tensor([0.0, 2.1, 4.2]) + 2.4 * number
    colour = 0.5 + 0.45 * torch.cos(hue)[:, None, None]
    inner = (radius < 0.35).float() * (x > -0.1).float()
    return torch.cat([(colour * (1 - inner) + (1 - colour) * inner) * alpha, alpha[None]])
