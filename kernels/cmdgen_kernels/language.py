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

__all__ = ["INSTALLED", "LOADED", "power_of_two", "program", "tl", "triton"]


@triton.jit
def program(size, BLOCK: tl.constexpr):
    """() -> this program's row, in int64, and the offsets of its BLOCK of `size` elements."""
    n_blocks = tl.cdiv(size, BLOCK)
    i_row = (tl.program_id(0) // n_blocks).to(tl.int64)
    return i_row, (tl.program_id(0) % n_blocks) * BLOCK + tl.arange(0, BLOCK)


def power_of_two(least: int) -> int:
    """Return the smallest power of two that is not less than `least`.

    It compares and doubles, because dynamo can trace that for sizes that it does not know.
    """
    power = 1
    while power < least:
        power *= 2
    return power
