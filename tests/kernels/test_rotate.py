import pytest
import torch

from cmdgen_kernels import rotate
from cmdgen_kernels.rotate import rotate_obstacle, rotate_reference


def inputs(shape, dtype, device, *, rows=None):
    """x as the first part of wider rows, angles of each place or of `rows`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape[:2], 2 * shape[2], generator=generator).to(device, dtype)[..., : shape[2]]
    angles = torch.randn(*(rows or shape[:2]), shape[2] // 2, generator=generator).to(device)
    return x, angles


def turn(function):
    """The function of x and angles: those of float64 for x in float64."""

    def run(x, angles):
        angles = angles.to(torch.promote_types(x.dtype, torch.float32))
        return function(x, torch.polar(torch.ones_like(angles), angles))

    return run


def op(x, rotation):
    """The op, which has to take the kernel."""
    assert rotate_obstacle(x, rotation) is None
    return rotate(x, rotation)


# of each place, of each column, of each row; rows longer than a program's
@pytest.mark.parametrize("rows", [None, (5,), (3, 1)])
@pytest.mark.parametrize("width", [2, 24, 2 * 770])
def test_rotate_matches_the_reference(width, rows, dtype, device, assert_parity):
    x, angles = inputs((3, 5, width), dtype, device, rows=rows)
    # the same angles for all
    angles = angles.to(dtype).float()
    run, reference = turn(op), turn(rotate_reference)
    assert_parity(lambda x: run(x, angles), lambda x: reference(x, angles), x, gradients=False)


def test_a_quarter_turn_swaps_the_pair(dtype, device):
    x, _ = inputs((2, 3, 4), dtype, device)
    quarter = torch.full((2,), 1j, dtype=torch.complex64, device=device)
    expected = torch.stack((-x[..., 1], x[..., 0], -x[..., 3], x[..., 2]), dim=-1)
    assert torch.equal(op(x, quarter), expected)


def test_gradients_come_from_the_reference(device):
    x, angles = inputs((2, 3, 4), torch.float32, device)
    rotation = torch.polar(torch.ones_like(angles), angles)
    x = x.detach().requires_grad_()
    assert "gradient" in (rotate_obstacle(x, rotation) or "")
    (grad,) = torch.autograd.grad(rotate(x, rotation).sum(), x)
    assert grad.any()


def test_another_width_is_refused(device):
    x, angles = inputs((2, 3, 4), torch.float32, device)
    with pytest.raises(ValueError, match=r"rotation \(2, 3, 1\) does not have half the width of x \(2, 3, 4\)"):
        rotate(x, torch.polar(angles, angles)[..., :1])
