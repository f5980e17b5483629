"""Pixels to the planes of yuv420p, as a video's encoder takes them.

    Y = 125.5 + 109.5 grey,  U = 128 + k_u filter(blue - grey),  V = 128 + k_v filter(red - grey)

where grey is BT.709's sum of red, green and blue (ITU-R BT.709-6) and the range is limited: Y from 16
to 235. Chroma lies in the middle of four pixels and is filtered as swscale does it: the mean of two
columns, a cubic over eight rows. Values are rounded once, at the end: from 8 bits of red, green and
blue the error would be larger.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cmdgen_kernels.dispatch import inference_obstacle
from cmdgen_kernels.language import power_of_two, program, tl, triton

# shares of red, green and blue in grey
LUMA = (0.2126, 0.7152, 0.0722)
RED, GREEN, BLUE = (tl.constexpr(share) for share in LUMA)
# up to 112 levels on either side of 128, of two columns together
U_SCALE, V_SCALE = tl.constexpr(56 / 2 / (1 - LUMA[2])), tl.constexpr(56 / 2 / (1 - LUMA[0]))
# half of a symmetric cubic (Keys' with a = -0.6) at twice its width: rows from 7/4 to 1/4 away
TAPS = (-0.0140625, -0.0421875, 0.1203125, 0.4359375)
# added to a float32 and taken away, it rounds to a whole number, halves to the even one
ROUND = tl.constexpr(12582912.0)


def yuv420p_reference(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 3 H / 2, W) uint8: the definition, in float32 at least."""
    height, width = pixels.shape[-2:]
    wide = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    red, green, blue = wide.clamp(-1, 1).unbind(1)  # (B, H, W)
    grey = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    luma = (109.5 * grey + 125.5).round().to(torch.uint8)
    chroma = torch.stack(
        (56 / 2 / (1 - LUMA[2]) * (blue - grey), 56 / 2 / (1 - LUMA[0]) * (red - grey)), dim=1
    )  # (B, 2, H, W)
    chroma = chroma[..., ::2] + chroma[..., 1::2]  # (B, 2, H, W / 2)
    chroma = F.pad(chroma, (0, 0, 3, 3), mode="replicate")
    rows = [chroma[:, :, i : i + height - 1 : 2] for i in range(8)]  # (B, 2, H / 2, W / 2) each
    pairs = (tap * (rows[i] + rows[7 - i]) for i, tap in enumerate(TAPS))
    # the cubic overshoots to 3 and 253 at most
    levels = sum(pairs, torch.tensor(128.0)).round().to(torch.uint8)
    planes = torch.cat((luma.flatten(1), levels.flatten(1)), dim=1)
    return planes.view(-1, 3 * height // 2, width)


@triton.jit
def _level(b_x):
    return ((b_x + ROUND) - ROUND).to(tl.int32).to(tl.uint8)


@triton.jit
def _yuv420p_fwd_kernel(x_ptr, out_ptr, H, W, x_b, x_c, x_h, x_w, TAP_0, TAP_1, TAP_2, TAP_3, BLOCK: tl.constexpr):
    # one program: BLOCK columns of two rows of luma, and of the row of chroma between them
    i_row, o_w = program(W, BLOCK)
    i_b, i_h = i_row // (H // 2), i_row % (H // 2)
    m_w = o_w < W
    x_ptr += i_b * x_b + o_w * x_w
    out_ptr += i_b * (H * W + H * W // 2)
    b_u = tl.zeros([BLOCK], tl.float32)
    b_v = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(8):
        o_h = tl.minimum(tl.maximum(2 * i_h + i - 3, 0), H - 1) * x_h
        b_red = tl.load(x_ptr + o_h, mask=m_w, other=0.0).to(tl.float32)
        b_green = tl.load(x_ptr + x_c + o_h, mask=m_w, other=0.0).to(tl.float32)
        b_blue = tl.load(x_ptr + 2 * x_c + o_h, mask=m_w, other=0.0).to(tl.float32)
        b_red = tl.minimum(tl.maximum(b_red, -1.0), 1.0)
        b_green = tl.minimum(tl.maximum(b_green, -1.0), 1.0)
        b_blue = tl.minimum(tl.maximum(b_blue, -1.0), 1.0)
        b_grey = RED * b_red + GREEN * b_green + BLUE * b_blue
        if i == 3 or i == 4:
            tl.store(out_ptr + (2 * i_h + i - 3) * W + o_w, _level(109.5 * b_grey + 125.5), mask=m_w)
        if i == 0 or i == 7:
            tap = TAP_0
        elif i == 1 or i == 6:
            tap = TAP_1
        elif i == 2 or i == 5:
            tap = TAP_2
        else:
            tap = TAP_3
        b_u += tap * (b_blue - b_grey)
        b_v += tap * (b_red - b_grey)
    # a sum for each two columns
    b_u = 128.0 + U_SCALE * tl.sum(tl.reshape(b_u, (BLOCK // 2, 2)), axis=1)
    b_v = 128.0 + V_SCALE * tl.sum(tl.reshape(b_v, (BLOCK // 2, 2)), axis=1)
    o_half = (tl.program_id(0) % tl.cdiv(W, BLOCK)) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    m_half = o_half < W // 2
    out_ptr += H * W + i_h * (W // 2) + o_half
    tl.store(out_ptr, _level(b_u), mask=m_half)
    tl.store(out_ptr + H * W // 4, _level(b_v), mask=m_half)


def yuv420p_obstacle(pixels: Tensor) -> str | None:
    """Say why `yuv420p` runs the reference for this tensor; None where it does not."""
    return inference_obstacle(pixels)


def yuv420p(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 3 H / 2, W) uint8: planes of Y, U and V, one after another.

    What is beyond [-1, 1] is clipped. Raises ValueError for odd sides.
    """
    height, width = pixels.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"size {width}x{height} is odd: yuv420p needs even sides")
    if yuv420p_obstacle(pixels) is not None:
        return yuv420p_reference(pixels)
    out = pixels.new_empty((len(pixels), 3 * height // 2, width), dtype=torch.uint8)
    if out.numel():
        block = min(1024, power_of_two(width))
        programs = len(pixels) * height // 2 * triton.cdiv(width, block)
        _yuv420p_fwd_kernel[(programs,)](
            pixels, out, height, width, *pixels.stride(), *TAPS, BLOCK=block, num_warps=max(block // 256, 1)
        )
    return out
