"""Pixel values in [-1, 1], as networks see them, to levels of 8 bits and back, on any device."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from cmdgen.video.formats import Pixels
from cmdgen_kernels.yuv420p import LUMA
from cmdgen_kernels.yuv420p import yuv420p as to_yuv420p


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
    red, green, blue = (share * pixels for share, pixels in zip(LUMA, pixels.split(1, dim=-3), strict=True))
    return red + green + blue


# (B, 3, H, W) in [-1, 1] to frames
CONVERT: dict[Pixels, Callable[[Tensor], Tensor]] = {"rgb24": to_rgb24, "yuv420p": to_yuv420p}
