import pytest
import torch

from cmdgen_kernels import yuv420p
from cmdgen_kernels.yuv420p import yuv420p_obstacle, yuv420p_reference


def op(pixels):
    """The op, which has to take the kernel."""
    assert yuv420p_obstacle(pixels) is None
    return yuv420p(pixels)


# fewer rows than the filter has, tails, rows longer than a program's; pixels beyond [-1, 1]
@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 3, 10, 22), (1, 3, 4, 1040)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_levels_are_the_references(shape, layout, dtype, device, assert_parity):
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    pixels = pixels.contiguous(memory_format=layout)
    assert_parity(op, yuv420p_reference, pixels, gradients=False)
    # a level off only where float32 and float64 round a half apart
    off = op(pixels) != yuv420p_reference(pixels.double())
    assert off.float().mean() <= 1e-3


def test_colours_have_the_levels_of_bt_709(device):
    colours = [(-1, -1, -1), (1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)]
    pixels = torch.tensor(colours, dtype=torch.float32, device=device)[:, :, None, None].expand(-1, -1, 4, 4)
    expected = [(16, 128, 128), (235, 128, 128), (63, 102, 240), (173, 42, 26), (32, 240, 118)]
    planes = op(pixels).flatten(1)
    assert [(int(y), int(u), int(v)) for y, u, v in planes[:, [0, 16, 20]]] == expected
    assert torch.equal(planes[:, :16], planes[:, :1].expand(-1, 16))


def test_odd_sides_are_refused(device):
    with pytest.raises(ValueError, match="size 4x3 is odd"):
        yuv420p(torch.zeros(1, 3, 3, 4, device=device))
