"""Launches and bytes of the models' parts at cmd-sd21's size, by references and by kernels."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

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
    block, x, shift = ResnetBlock(320, 320, 32, 1e-5, 1280), feature_map(8, 320, 64, 64), feature_map(8, 320, 1, 1)

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(x.requires_grad_(), shift.flatten(1))
        torch.autograd.grad(y, [x, *block.parameters()], torch.empty_like(y), allow_unused=True)

    return run


# ops in use; launches and megabytes without and with them, products aside
CASES = [(training, ("group_norm_silu",), (36, 1825), (26, 612))]


@pytest.mark.parametrize(("make", "ops", "before", "after"), CASES)
def test_kernels_launch_and_move_less(
    make: Callable[[], Run], ops: tuple[str, ...], before: tuple[int, int], after: tuple[int, int]
) -> None:
    plain, ours = count(make, without=ops), count(make)
    assert [(found.launches, found.bytes // 10**6) for found in (plain, ours)] == [before, after]
    assert plain.products == ours.products
