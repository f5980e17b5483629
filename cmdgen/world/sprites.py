"""Pictures of the subjects: emoji of a font or of a file made from it, or shapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F

from cmdgen.files import check_file, replace_with, user_folder
from cmdgen.world.tables import Subject

# side of a sprite in the atlas, its smallest copy, and the only size that the font can be drawn at
_SIDE = 128
_SMALLEST = 8
_FONT_SIZE = 109
_FONT = "NotoColorEmoji.ttf"
# side of the page that a glyph is drawn on
_PAGE = 192


@dataclass(frozen=True)
class Sprites:
    """Pictures of some subjects, premultiplied; the longer side fills the square."""

    # sides N, N/√2, N/2, ...: (S, 4, N, N) each, area averages of the first
    levels: tuple[Tensor, ...]
    extents: Tensor  # (S, 2): width and height as a share of the square
    facing: Tensor  # (S,): 1 right, -1 left


@lru_cache(maxsize=8)
def load_sprites(subjects: tuple[Subject, ...], kind: str, font: str | None, device: str) -> Sprites:
    """Draw the pictures of subjects, "emoji" or "shapes".

    FileNotFoundError says where to get the font; without `font` it is where fonts usually are.
    """
    if kind == "shapes":
        sprites = torch.stack([_draw_shape(i) for i in range(len(subjects))])
    else:
        sprites = torch.stack([_draw_glyph(subject.glyph, font) for subject in subjects])
    cover = sprites[:, 3] > 0.1
    extents = torch.stack([cover.any(1).sum(1), cover.any(2).sum(1)], 1) / _SIDE
    levels, side = [], _SIDE
    while side >= _SMALLEST:
        levels.append(F.interpolate(sprites.to(device), size=(side, side), mode="area"))
        side = round(_SIDE / 2 ** (len(levels) / 2))
    return Sprites(tuple(levels), extents, torch.tensor([subject.facing for subject in subjects]))


@cache
def _open_font(path: str | None) -> ImageFont.FreeTypeFont:
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"font {path} does not exist")
    try:
        # Pillow looks for a name without a folder where fonts usually are
        return ImageFont.truetype(path or _FONT, _FONT_SIZE)
    except OSError as error:
        if path is not None:
            raise ValueError(f"font {path}: {error}; a colour bitmap font is needed") from None
    raise FileNotFoundError(
        f"{_FONT} not found: install it (Debian: fonts-noto-color-emoji), or train on --data shapes"
    )


def write_sprites(path: Path, subjects: Sequence[Subject], font: str | None) -> None:
    """Write the font's pictures of subjects as a PNG that stands for the font."""
    sheet, names = Image.new("RGBA", (_PAGE, _PAGE * len(subjects))), PngInfo()
    for i, subject in enumerate(subjects):
        sheet.paste(_draw_page(subject.glyph, font), (0, _PAGE * i))
    names.add_itxt("glyphs", " ".join(subject.glyph for subject in subjects))
    with replace_with(path) as temporary:
        sheet.save(temporary, "PNG", pnginfo=names)


@cache
def _read_sprites(path: Path) -> dict[str, Image.Image]:
    """Return pages by glyph; ValueError for what `write_sprites` did not write."""
    try:
        check_file(path)
        with Image.open(path, formats=["PNG"]) as sheet:
            glyphs = str(sheet.info["glyphs"]).split()
            if sheet.mode != "RGBA" or sheet.size != (_PAGE, _PAGE * len(glyphs)):
                raise ValueError(f"{len(glyphs)} pictures of another size")
            return {glyph: sheet.crop((0, _PAGE * i, _PAGE, _PAGE * (i + 1))) for i, glyph in enumerate(glyphs)}
    except (OSError, SyntaxError, ValueError, KeyError) as error:
        raise ValueError(f"sprites {path}: not written by `cmdgen data preview --sprites` ({error})") from error


@cache
def _find_sprites(font: str | None) -> Path | None:
    """Return the sprites that stand for a font: those named, or the user's where no font is found."""
    if font is not None:
        return Path(font) if font.endswith(".png") and Path(font).exists() else None
    try:
        _open_font(None)
    except FileNotFoundError:
        if (place := user_folder("data") / "sprites.png").exists():
            return place
    return None


def _draw_page(glyph: str, font: str | None) -> Image.Image:
    """-> RGBA (192, 192)."""
    place = _find_sprites(font)
    if place is None:
        page = Image.new("RGBA", (_PAGE, _PAGE))
        ImageDraw.Draw(page).text((20, 20), glyph, font=_open_font(font), embedded_color=True)
        return page
    if glyph not in (pages := _read_sprites(place)):
        raise ValueError(f"sprites {place} have no picture of {glyph}")
    return pages[glyph]


@cache
def _draw_glyph(glyph: str, font: str | None) -> Tensor:
    """-> (4, 128, 128) premultiplied."""
    page = _draw_page(glyph, font)
    box = page.getbbox()
    if box is None:
        raise ValueError(f"font {font or _FONT} has no picture of {glyph}")
    picture = page.crop(box)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    pixels[:3] *= pixels[3:]
    scale = (_SIDE - 2) / max(picture.size)
    height, width = (max(1, round(side * scale)) for side in (picture.height, picture.width))
    pixels = F.interpolate(pixels[None], size=(height, width), mode="bicubic", antialias=True)
    top, left = (_SIDE - height) // 2, (_SIDE - width) // 2
    margins = (left, _SIDE - width - left, top, _SIDE - height - top)
    return F.pad(pixels[0].clamp(0, 1), margins)


def _draw_shape(number: int) -> Tensor:
    """-> (4, 128, 128): a two-coloured star or polygon, another for every number."""
    y, x = torch.meshgrid(*2 * [torch.linspace(-1, 1, _SIDE)], indexing="ij")
    radius, angle = torch.hypot(x, y), torch.atan2(y, x)
    edge = 0.75 + 0.2 * torch.cos((2 + number % 5) * angle)
    alpha = ((edge - radius) * 32 + 0.5).clamp(0, 1)
    hue = torch.tensor([0.0, 2.1, 4.2]) + 2.4 * number
    colour = 0.5 + 0.45 * torch.cos(hue)[:, None, None]
    inner = (radius < 0.35).float() * (x > -0.1).float()
    return torch.cat([(colour * (1 - inner) + (1 - colour) * inner) * alpha, alpha[None]])
