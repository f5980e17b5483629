from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cmdgen.models.layers import Upsample, fuse_weights
from cmdgen_kernels import convolution, doubled_convolution
from cmdgen_kernels.convolution import (
    convolution_obstacle,
    convolution_reference,
    doubled_convolution_reference,
    fold_doubling,
)


def inputs(shape, channels, dtype, device, *, kernel=3, size=None):
    """x in channels_last, weight, bias, and a residual of the result's size."""
    generator = torch.Generator().manual_seed(0)
    shapes = shape, (channels, shape[1], kernel, kernel), (channels,), (shape[0], channels, *(size or shape[2:]))
    x, weight, bias, residual = (torch.randn(each, generator=generator).to(device, dtype) for each in shapes)
    x = x.contiguous(memory_format=torch.channels_last)
    return x, weight / (shape[1] * kernel**2) ** 0.5, bias, residual


def op(*tensors, **settings):
    """The op, which has to take the kernel."""
    assert convolution_obstacle(*tensors) is None
    out = convolution(*tensors, **settings)
    assert out.is_contiguous(memory_format=torch.channels_last)
    return out


# tails of channels and of positions, pictures' three channels, a stride
SHAPES = [
    ((2, 5, 7, 9), 40, {"padding": (1, 1)}, None),
    ((1, 72, 33, 19), 3, {"padding": (1, 1)}, None),
    ((1, 8, 6, 10), 130, {"stride": (2, 2), "padding": (1, 1)}, (3, 5)),
    ((3, 4, 1, 1), 4, {"padding": (1, 1)}, None),
]


@pytest.mark.parametrize(("shape", "channels", "settings", "size"), SHAPES)
def test_bias_and_residual_are_added_to_the_convolution(shape, channels, settings, size, dtype, device, assert_parity):
    tensors = inputs(shape, channels, dtype, device, size=size)
    for count in (3, 4):
        check = partial(op, **settings), partial(convolution_reference, **settings)
        assert_parity(*check, *tensors[:count], gradients=False)


def test_the_reference_is_torchs_convolution_and_a_sum(device):
    x, weight, bias, residual = inputs((2, 5, 7, 9), 6, torch.float64, device)
    expected = F.conv2d(x, weight, bias, padding=1) + residual
    # no kernel computes in float64
    assert torch.equal(convolution(x, weight, bias, residual, padding=(1, 1)), expected)


def test_gradients_come_from_the_reference(device):
    tensors = [each.requires_grad_() for each in inputs((2, 5, 7, 9), 6, torch.float32, device)]
    assert "gradient" in (convolution_obstacle(*tensors) or "")
    grads = torch.autograd.grad(convolution(*tensors, padding=(1, 1)).sum(), tensors)
    assert torch.equal(grads[3], torch.ones_like(grads[3])) and all(grad.any() for grad in grads)


def test_a_residual_of_another_size_is_refused(device):
    x, weight, bias, residual = inputs((2, 5, 7, 9), 6, torch.float32, device)
    with pytest.raises(ValueError, match=r"residual \(2, 6, 7, 9\) is not \(2, 6, 5, 7\)"):
        convolution(x, weight, bias, residual)


@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (1, 40, 1, 1), (1, 24, 33, 6)])
def test_a_doubled_map_is_convolved_as_it_was(shape, dtype, device, assert_parity):
    x, weight, bias, _ = inputs(shape, 40, torch.float64, device)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)
    folded = fold_doubling(weight)
    torch.testing.assert_close(doubled_convolution_reference(x, folded, bias), expected, rtol=1e-12, atol=1e-12)
    rounded = [each.to(dtype) for each in (x, folded, bias)]
    assert doubled_convolution(*rounded).is_contiguous(memory_format=torch.channels_last)
    assert_parity(doubled_convolution, doubled_convolution_reference, *rounded, gradients=False)


def test_upsampling_folds_what_it_has_and_only_for_twice_the_size(device):
    with torch.no_grad():
        layer = Upsample(24).to(device)
        x = torch.randn(2, 24, 5, 7, device=device).contiguous(memory_format=torch.channels_last)
        plain, odd = layer(x), layer(x, size=(9, 13))
        state = layer.state_dict().keys()
        fuse_weights(layer)
        assert layer.folded is not None and layer.state_dict().keys() == state
        torch.testing.assert_close(layer(x), plain, rtol=1e-4, atol=1e-5)
        assert torch.equal(layer(x, size=(9, 13)), odd)
