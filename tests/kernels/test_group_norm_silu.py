import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cmdgen_kernels import group_norm_silu, moments
from cmdgen_kernels.group_norm_silu import group_norm_silu_obstacle, group_norm_silu_reference

# the package gives the function that name
MODULE = sys.modules[group_norm_silu.__module__]
SETTINGS = {"groups": 2, "eps": 1e-5}


def inputs(shape, dtype, device, *, mean=1.0, seed=0):
    """x channels_last, weight, bias, shift."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) + mean
    weight, bias, shift = (torch.randn(size, generator=generator) for size in (shape[1], shape[1], shape[:2]))
    x = x.to(device, dtype).contiguous(memory_format=torch.channels_last)
    return x, weight.to(device, dtype), bias.to(device, dtype), shift.to(device, dtype)


def op(x, weight, bias, shift=None, **settings):
    """The op, which has to take a kernel."""
    assert group_norm_silu_obstacle(x, weight, bias, shift) is None
    out = group_norm_silu(x, weight, bias, shift, eps=1e-5, **settings)
    assert out.is_contiguous(memory_format=torch.channels_last)
    return out


@pytest.fixture
def check(assert_parity):
    """The op gives what the reference gives, for these settings and tensors."""

    def check(*tensors, **settings):
        reference = partial(group_norm_silu_reference, eps=1e-5, **settings)
        assert_parity(partial(op, **settings), reference, *tensors)

    return check


@pytest.fixture(params=["whole", "parts"])
def way(request, monkeypatch):
    """Groups in one program's registers, or in a few parts of several tiles each."""
    if request.param == "parts":
        monkeypatch.setattr(MODULE, "LARGEST_WHOLE", 0)
        monkeypatch.setattr(moments, "PROGRAMS", 6)


# groups of 10 and of 3 channels, of 1, one position, tails of positions and of channels
SHAPES = [((2, 40, 7, 9), 4), ((5, 6, 11, 13), 2), ((3, 6, 9, 5), 6), ((9, 48, 1, 1), 4)]
SHAPES += [((1, 24, 33, 19), 2), ((1, 72, 17, 11), 3), ((1, 3, 101, 61), 1)]


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_group_norm_silu_matches_the_reference(way, shape, groups, dtype, device, check):
    x, weight, bias, shift = inputs(shape, dtype, device)
    check(x, weight, bias, groups=groups)
    check(x, weight, bias, shift, groups=groups)


# the second has more parts than `combine` takes at once
@pytest.mark.parametrize(("shape", "groups"), [((1, 24, 61, 46), 2), ((1, 72, 25, 25), 1)])
def test_large_groups_are_taken_in_parts(shape, groups, dtype, device, check):
    assert shape[1] // groups * shape[2] * shape[3] > MODULE.LARGEST_WHOLE
    check(*inputs(shape, dtype, device), groups=groups)


def test_without_activation_it_is_group_norm(way, dtype, device, check):
    x, weight, bias, shift = inputs((2, 32, 9, 11), dtype, device)
    check(x, weight, bias, shift, groups=2, activation="none")
    x, weight, bias = x.double(), weight.double(), bias.double()
    torch.testing.assert_close(
        group_norm_silu_reference(x, weight, bias, **SETTINGS, activation="none"),
        F.group_norm(x, 2, weight, bias, eps=1e-5),
    )


def test_a_large_mean_does_not_cancel_the_deviations(way, device, check):
    x, weight, bias, _ = inputs((1, 8, 64, 32), torch.float32, device, mean=3000.0)
    check(x, weight, bias, groups=2)
    # nor where the first positions say little of the others
    x[:, :, 5:] -= 6000.0
    check(x, weight, bias, groups=2)


# a rounded mean, or a 1 / 1 in Welford's first step, would be magnified by 1 / sqrt(eps)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("ulps", [-2, 2])
def test_a_constant_map_of_large_mean_is_the_bias_whatever_division_errs(ulps, device, monkeypatch):
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    monkeypatch.setattr(MODULE, "LARGEST_WHOLE", 0)
    divide, factor = interpreter.InterpreterBuilder.create_fdiv, np.float32(1 + ulps * 2.0**-23)

    def approximate(self, left, right):
        quotient = divide(self, left, right)
        return interpreter.TensorHandle(quotient.data * factor, quotient.dtype)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fdiv", approximate)
    _, weight, bias, _ = inputs((1, 8, 60, 90), torch.float32, device)
    x = torch.full((1, 8, 60, 90), 500.3, device=device).contiguous(memory_format=torch.channels_last)
    out = op(x, weight, bias, groups=2, activation="none")
    assert torch.equal(out, bias[:, None, None].expand_as(out))


# where a tile ends, positions that are not there overflow in the interpreter
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_a_constant_map_is_the_activation_of_the_bias(way, dtype, device, check):
    _, weight, bias, _ = inputs((2, 8, 6, 10), dtype, device)
    x = torch.ones((2, 8, 6, 10), device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    out = op(0 * x, weight, bias, groups=2)
    expected = F.silu(bias)[:, None, None].expand(out.shape)
    torch.testing.assert_close(out, expected.contiguous(memory_format=torch.channels_last))
    # 1 / sqrt(eps) magnifies the rounding of the mean, here as in torch
    check(500.3 * x, weight, bias, groups=2)


def test_extreme_values_stay_finite(way, dtype, device, check):
    x, weight, bias, _ = inputs((1, 4, 25, 26), dtype, device, mean=0.0)
    x = x.sign() * torch.finfo(torch.float16).max
    check(x, 60 * weight, bias, groups=2)


def test_a_batch_of_two_is_two_batches_of_one(way, device):
    x, weight, bias, shift = inputs((2, 32, 13, 11), torch.float32, device)
    both = op(x, weight, bias, shift, groups=2)
    each = [op(x[i : i + 1], weight, bias, shift[i : i + 1], groups=2) for i in range(2)]
    torch.testing.assert_close(both, torch.cat(each), rtol=1e-5, atol=1e-5)
    assert torch.equal(both, op(x, weight, bias, shift, groups=2))


def test_the_reference_runs_where_there_is_no_kernel(device):
    x, weight, bias, shift = inputs((1, 8, 4, 4), torch.float32, device)
    contiguous = x.contiguous()
    assert group_norm_silu_obstacle(contiguous, weight, bias) == "the input is not channels_last"
    out = group_norm_silu(contiguous, weight, bias, shift, **SETTINGS)
    assert torch.equal(out, group_norm_silu_reference(contiguous, weight, bias, shift, **SETTINGS))


def test_gradients_keep_the_layout_and_the_dtypes(way, device):
    """As under autocast: a map in half precision, parameters in float32."""
    x, weight, bias, shift = inputs((2, 32, 9, 11), torch.float16, device)
    leaves = [each.requires_grad_() for each in (x, weight.float(), bias.float(), shift)]
    out = group_norm_silu(*leaves, **SETTINGS)
    assert out.dtype == torch.float16
    # of a gradient in any layout
    grads = torch.autograd.grad(out, leaves, torch.randn(out.shape, device=device, dtype=out.dtype))
    assert grads[0].is_contiguous(memory_format=torch.channels_last)
    assert [grad.dtype for grad in grads] == [each.dtype for each in leaves]


def test_a_shift_may_be_a_row_of_a_wider_tensor(way, device):
    x, weight, bias, shift = inputs((3, 8, 9, 11), torch.float32, device)
    for wide in (shift.repeat(1, 3)[:, 8:16], shift[:1].expand(3, -1)):
        assert torch.equal(op(x, weight, bias, wide, groups=2), op(x, weight, bias, wide.contiguous(), groups=2))


def test_an_empty_map_has_gradients_of_nothing(device):
    x, weight, bias, _ = inputs((0, 8, 4, 4), torch.float32, device)
    weight.requires_grad_()
    (grad,) = torch.autograd.grad(op(x, weight, bias, groups=2).sum(), weight)
    assert torch.equal(grad, torch.zeros_like(weight))


def test_arguments_that_do_not_agree_are_refused(device):
    x, weight, bias, shift = inputs((2, 8, 4, 4), torch.float32, device)
    with pytest.raises(ValueError, match=r"x \(2, 8, 4, 4\), weight \(7,\) and bias \(8,\)"):
        group_norm_silu(x, weight[:7], bias, **SETTINGS)
    with pytest.raises(ValueError, match=r"shift \(1, 8\) is not \(B, C\) of x \(2, 8, 4, 4\)"):
        group_norm_silu(x, weight, bias, shift[:1], **SETTINGS)
    with pytest.raises(ValueError, match="channels 8 are not a multiple of groups 3"):
        group_norm_silu(x, weight, bias, groups=3, eps=1e-5)
    with pytest.raises(ValueError, match="activation 'gelu' is not one of silu, none"):
        group_norm_silu(x, weight, bias, **SETTINGS, activation="gelu")
