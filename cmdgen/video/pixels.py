"""Pixel values in [-1, 1], as networks see them, to levels of 8 bits and back, on any device."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cmdgen.video.formats import Pixels

# shares of red, green and blue in luma: ITU-R BT.709
_RED, _GREEN, _BLUE = 0.2126, 0.7152, 0.0722
# half of a symmetric cubic (Keys' with a = -0.6) at twice its width: rows from 7/4 to 1/4 away
_TAPS = (-0.0140625, -0.0421875, 0.1203125, 0.4359375)


def to_levels(pixels: Tensor) -> Tensor:
    """(...) in [-1, 1] -> the same in uint8, 0 to 255; what is beyond is clipped."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_unit(levels: Tensor) -> Tensor:
    """(...) uint8 -> the same in [-1, 1]."""
    return levels.float() / 127.5 - 1


def to_rgb24(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    return rearrange(to_levels(pixels), "b c h w -> b h w c").contiguous()


def to_grey(pixels: Tensor) -> Tensor:
    """(..., 3, H, W) -> (..., 1, H, W): luma."""
    red, green, blue = pixels.split(1, dim=-3)
    return _RED * red + _GREEN * green + _BLUE * blue


def to_yuv420p(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 3 * H // 2, W) uint8: planes of Y, U and V, one after another.

    The matrix is BT.709's, the range limited: Y from 16 to 235. Chroma lies in the middle of four
    pixels and is filtered as swscale does it: the mean of two columns, a cubic over eight rows.
    Raises ValueError for odd sides.
    """
    height, width = pixels.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"size {width}x{height} is odd: yuv420p needs even sides")
    # rounded once, at the end: from 8 bits of red, green and blue the error would be larger
    red, green, blue = pixels.float().clamp(-1, 1).unbind(1)  # (B, H, W)
    grey = _RED * red + _GREEN * green + _BLUE * blue
    luma = (109.5 * grey + 125.5).round().to(torch.uint8)
    # up to 112 levels on either side of 128, of two columns together
    chroma = torch.stack(
        (56 / 2 / (1 - _BLUE) * (blue - grey), 56 / 2 / (1 - _RED) * (red - grey)), dim=1
    )  # (B, 2, H, W)
    chroma = chroma[..., ::2] + chroma[..., 1::2]  # (B, 2, H, W / 2)
    chroma = F.pad(chroma, (0, 0, 3, 3), mode="replicate")
    rows = [chroma[:, :, i : i + height - 1 : 2] for i in range(8)]  # (B, 2, H / 2, W / 2) each
    pairs = (tap * (rows[i] + rows[7 - i]) for i, tap in enumerate(_TAPS))
    # the cubic overshoots to 3 and 253 at most
    levels = sum(pairs, torch.tensor(128.0)).round().to(torch.uint8)
    planes = torch.cat((luma.flatten(1), levels.flatten(1)), dim=1)
    return planes.view(-1, 3 * height // 2, width)


# (B, 3, H, W) in [-1, 1] to frames
CONVERT: dict[Pixels, Callable[[Tensor], Tensor]] = {"rgb24": to_rgb24, "yuv420p": to_yuv420p}
