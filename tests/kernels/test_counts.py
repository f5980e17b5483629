"""Launches and bytes of the models' parts at cmd-sd21's size, by references and by kernels."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cmdgen.models.layers import ResnetBlock
from tests.kernels.counting import count

Run = Callable[[], object]


@pytest.fixture(autouse=True)
def kernels() -> None:
    """In place of the interpreter."""


def feature_map(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)


def training() -> Run:
    """A residual block of the UNet, forward and backward, under autocast."""
    block, x, shift = ResnetBlock(320, 320, 32, 1e-5), feature_map(8, 320, 64, 64), feature_map(8, 320, 1, 1)

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(x.requires_grad_(), shift.flatten(1))
        torch.autograd.grad(y, [x, *block.parameters()], torch.empty_like(y), allow_unused=True)

    return run


def inference(module: Callable[[], nn.Module]) -> nn.Module:
    """A module as a pipeline holds it."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        return module().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def decoding() -> Run:
    """A picture's last level of the VAE: two residual blocks, one of which changes the channels."""
    blocks = inference(lambda: nn.Sequential(*(ResnetBlock(channels, 128, 32, 1e-6) for channels in (256, 128))))
    x = feature_map(1, 256, 512, 1024)
    return lambda: blocks(x)


FOLDED = "group_norm_silu of cmdgen.models.layers"
# what is turned off before; launches and megabytes without and with them, products aside
CASES = [
    (training, ("group_norm_silu", FOLDED), (36, 1825), (24, 549)),
    (decoding, ("convolution", FOLDED), (19, 4162), (15, 3089)),
]


@pytest.mark.parametrize(("make", "ops", "before", "after"), CASES)
def test_kernels_launch_and_move_less(
    make: Callable[[], Run], ops: tuple[str, ...], before: tuple[int, int], after: tuple[int, int]
) -> None:
    plain, ours = count(make, without=ops), count(make)
    assert [(found.launches, found.bytes // 10**6) for found in (plain, ours)] == [before, after]
    assert plain.products == ours.products
