"""Each channel's moments of a channels_last map, in parts of its positions.

GroupNorm reads a map for its moments, then again to apply them. Where a kernel has just written the
map, the moments come from what it held in registers, and the first of the two reads falls away.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cmdgen_kernels.language import program, row, tile_options, tl, triton

# to fill a GPU: four for each of some 130 multiprocessors
PROGRAMS = 512


class Tiles(NamedTuple):
    """How programs share a map: tiles of it, and parts of the positions of several tiles each."""

    options: dict[str, int]
    # of channels, and of positions
    blocks: int
    tiles: int
    # the positions of one part, a multiple of the tile's, and the number of parts
    part: int
    parts: int


class Moments(NamedTuple):
    """Means, and sums of squared deviations from them: (B, S, C) each, of S parts of so many positions."""

    mean: Tensor
    square: Tensor
    part: int


def share(x: Tensor, vectors: int) -> Tiles:
    """(B, C, H, W) -> tiles in which each thread holds so many times 16 bytes."""
    batch, channels, height, width = x.shape
    options = tile_options(channels, x.element_size(), vectors)
    block_p = options["BLOCK_P"]
    blocks, tiles = triton.cdiv(channels, options["BLOCK_C"]), triton.cdiv(height * width, block_p)
    part = triton.cdiv(tiles, triton.cdiv(PROGRAMS, batch * blocks)) * block_p
    return Tiles(options, blocks, tiles, part, triton.cdiv(height * width, part))


@triton.jit
def _moments_kernel(
    x_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    mean_ptr,
    square_ptr,
    C,
    P,
    part,
    parts,
    width,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # one program: BLOCK_C channels of one sample, at the positions of one part
    i_row, o_c = program(C, BLOCK_C)
    i_b = i_row // parts
    first = (i_row % parts) * part
    last = tl.minimum(first + part, P)
    o_p = tl.arange(0, BLOCK_P)
    m_c = o_c < C
    if bias_ptr is not None:
        b_bias = row(bias_ptr, o_c, m_c)

    # Welford's recurrence in each place of the tile, so that the loop needs no exchange of threads
    b_mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    b_square = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    b_count = tl.zeros([BLOCK_P, 1], tl.float32)
    n_tiles = 0.0
    for start in range(first, last, BLOCK_P):
        n_tiles += 1.0
        m_p = (start + o_p < last)[:, None]
        o_out = i_b * P * C + (start + o_p)[:, None] * C + o_c[None, :]
        o_x = o_out
        if width is not None:
            # of `doubled_convolution`: the four phases of each position of a map of half the size, and one more
            o_h, o_w = (start + o_p) // width, (start + o_p) % width
            o_row = i_b * (P // width // 2 + 1) + o_h // 2 + o_h % 2
            o_phase = (o_row * (width // 2 + 1) + o_w // 2 + o_w % 2) * 4 + o_h % 2 * 2 + o_w % 2
            o_x = o_phase[:, None] * C + o_c[None, :]
        b_x = tl.load(x_ptr + o_x, mask=m_p & m_c[None, :], other=0.0).to(tl.float32)
        if out_ptr is not None:
            b_x += b_bias
            if residual_ptr is not None:
                b_x += tl.load(residual_ptr + o_out, mask=m_p & m_c[None, :], other=0.0).to(tl.float32)
            b_out = b_x.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + o_out, b_out, mask=m_p & m_c[None, :])
            # of the map as it is read
            b_x = b_out.to(tl.float32)
        b_delta = tl.where(m_p, b_x - b_mean, 0.0)
        # CUDA's division is approximate, also of 1 by 1: the first value is a mean as it is
        b_mean += b_delta * tl.where(n_tiles > 1.0, 1.0 / n_tiles, 1.0)
        b_square += b_delta * (b_x - b_mean)
        b_count += tl.where(m_p, 1.0, 0.0)

    # then the places of each channel, by Chan et al. 1979's rule, from the first place's mean: where
    # all are equal nothing is rounded, which a deviation near 0 would magnify
    b_first = tl.sum(tl.where(o_p[:, None] == 0, b_mean, 0.0), axis=0)
    b_delta = b_mean - b_first[None, :]
    b_rest = tl.sum(b_count * b_delta, axis=0) / (last - first)
    b_delta -= b_rest[None, :]
    b_square = tl.sum(b_square + b_count * b_delta * b_delta, axis=0)
    tl.store(mean_ptr + i_row * C + o_c, b_first + b_rest, mask=m_c)
    tl.store(square_ptr + i_row * C + o_c, b_square, mask=m_c)


def moments(x: Tensor) -> Moments:
    """(B, C, H, W) -> its moments: those kept with it, or else from a read of it."""
    found, version = getattr(x, "_moments", (None, None))
    return found if found is not None and version == _version(x) else _launch(x, None, None, None)


def add(x: Tensor, bias: Tensor, residual: Tensor | None, *, phases: bool = False) -> Tensor:
    """(B, C, H, W), (C), (B, C, H, W) -> x + bias + residual, channels_last; with it its moments are kept.

    Of `phases`, (B, 4 C, H / 2 + 1, W / 2 + 1), x is what `doubled_convolution` makes of them.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    shape = (batch, channels // 4, 2 * height - 2, 2 * width - 2) if phases else x.shape
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if out.numel():
        found = _launch(x, bias.contiguous(), residual, out)
        # a compiled graph has no attributes
        if not torch.compiler.is_compiling():
            vars(out)["_moments"] = found, _version(out)
    return out


def _version(x: Tensor) -> int | None:
    """Return what a write to the tensor changes; under `torch.inference_mode` no one counts them."""
    return None if x.is_inference() else x._version


def _launch(x: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor | None) -> Moments:
    # of a second map there is as much to hold
    made = x if out is None else out
    tiles, (batch, channels, height, width) = share(made, 4 if out is None else 2), made.shape
    mean, square = x.new_empty((2, batch, tiles.parts, channels), dtype=torch.float32)
    _moments_kernel[(batch * tiles.parts * tiles.blocks,)](
        *(x, bias, residual, out, mean, square, channels, height * width, tiles.part, tiles.parts),
        None if x.shape == made.shape else width,
        **tiles.options,
    )
    return Moments(mean, square, tiles.part)
