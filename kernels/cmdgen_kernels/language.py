"""Triton, or stand-ins for it where no kernel can be launched; and what all kernels share.

A PyTorch without CUDA launches no kernel, and Triton does not exist for macOS and Windows. There an
op imports no Triton and its reference runs. The environment variable `TRITON_INTERPRET` loads
Triton all the same: 1 for its interpreter, 0 to compile ahead of time.
"""

import os
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

INSTALLED = find_spec("triton") is not None
LOADED = INSTALLED and (torch.version.cuda is not None or "TRITON_INTERPRET" in os.environ)

if TYPE_CHECKING or LOADED:
    import triton
    import triton.language as tl
else:
    triton = SimpleNamespace(jit=lambda kernel: kernel)
    tl = SimpleNamespace(constexpr=lambda value: value)

__all__ = ["INSTALLED", "LOADED", "power_of_two", "program", "row", "tile", "tile_options", "tl", "triton"]


@triton.jit
def program(size, BLOCK: tl.constexpr):
    """() -> this program's row, in int64, and the offsets of its BLOCK of `size` elements."""
    n_blocks = tl.cdiv(size, BLOCK)
    i_row = (tl.program_id(0) // n_blocks).to(tl.int64)
    return i_row, (tl.program_id(0) % n_blocks) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def tile(C, P, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """() -> this program's part of a map (B, P, C): sample, channels, their mask, offsets, their mask."""
    i_row, o_c = program(C, BLOCK_C)
    n_tiles = tl.cdiv(P, BLOCK_P)
    i_b, o_p = i_row // n_tiles, i_row % n_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    m_c = o_c < C
    return i_b, o_c, m_c, i_b * P * C + o_p[:, None] * C + o_c[None, :], (o_p < P)[:, None] & m_c[None, :]


@triton.jit
def row(pointer, o_c, m_c):
    """() -> a row of a tile, in float32."""
    return tl.load(pointer + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]


def tile_options(channels: int, itemsize: int, vectors: int) -> dict[str, int]:
    """Return tiles, at most 64 channels wide, of which 128 threads hold so many times 16 bytes each."""
    block_c = min(64, power_of_two(channels))
    return {"BLOCK_P": 128 * vectors * 16 // itemsize // block_c, "BLOCK_C": block_c, "num_warps": 4}


def power_of_two(least: int) -> int:
    """Return the smallest power of two that is not less than `least`.

    It compares and doubles, because dynamo can trace that for sizes that it does not know.
    """
    power = 1
    while power < least:
        power *= 2
    return power
