"""Triton for the kernels' files, or, where nothing could launch a kernel, stand-ins that define.

A PyTorch built without CUDA launches nothing, and there is no Triton for macOS and Windows: there,
importing an op costs nothing and the reference runs. `TRITON_INTERPRET` in the environment asks for
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

__all__ = ["INSTALLED", "LOADED", "power_of_two", "tl", "triton"]


def power_of_two(least: int) -> int:
    """The smallest that is not less, by comparisons: dynamo traces them for unknown sizes."""
    power = 1
    while power < least:
        power *= 2
    return power
