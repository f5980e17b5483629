from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cmdgen.models.layers import add_normalised, normalise_tokens
from cmdgen_kernels import dispatch, layer_norm
from cmdgen_kernels.layer_norm import layer_norm_obstacle, layer_norm_reference

EPS = 1e-6


def inputs(shape, dtype, device, *, mean=0.0):
    """x, weight, bias, branch, gate; weight, bias and gate are a condition's."""
    generator = torch.Generator().manual_seed(0)
    batch, _, width = shape
    x, branch = (torch.randn(shape, generator=generator).add(mean).to(device, dtype) for _ in range(2))
    condition = torch.randn(batch, 1, 3 * width, generator=generator).to(device, dtype)
    weight, bias, gate = condition.chunk(3, dim=-1)
    return x, weight, bias, branch, gate


def op(*tensors, part):
    """A result of the op, which has to take the kernel."""
    assert layer_norm_obstacle(*tensors) is None
    return layer_norm(*tensors, eps=EPS)[part]


def reference(*tensors, part):
    return layer_norm_reference(*tensors, eps=EPS)[part]


@pytest.fixture(params=[0, 1], ids=["sum", "norm"])
def check(request, assert_parity):
    runs = (partial(run, part=request.param) for run in (op, reference))
    return partial(assert_parity, *runs, gradients=False)


# tails, several rows in one program across samples, rows wider than a program's others
@pytest.mark.parametrize("shape", [(3, 5, 24), (1, 1, 1), (2, 3, 1152), (5, 7, 4)])
def test_layer_norm_matches_the_reference(shape, dtype, device, check):
    x, weight, bias, branch, gate = inputs(shape, dtype, device)
    check(x, weight, bias)
    check(x, weight, bias, branch)
    check(x, weight, bias, branch, gate)
    check(x, weight[0, 0], bias[0, 0])
    check(x, weight[0, 0], bias[0, 0], branch)


def test_a_large_mean_does_not_cancel_the_deviations(dtype, device, check):
    check(*inputs((2, 5, 96), dtype, device, mean=300.0))


def test_the_first_tokens_of_each_sample_are_read_where_they_lie(device, check):
    x, weight, bias, *_ = inputs((3, 7, 24), torch.float32, device)
    assert not x[:, :4].is_contiguous()
    check(x[:, :4], weight, bias)


def test_the_norms_of_models_are_torchs_of_any_axes_and_parts(device):
    norm = nn.LayerNorm(24).to(device).requires_grad_(False)
    x, weight, _, branch, _ = inputs((6, 14, 24), torch.float32, device)
    norm.weight.copy_(weight[0, 0])
    for shape, rows in [((6, 14), 14), ((6, 14), 3), ((2, 3, 2, 7), 3)]:
        part, added = (each.view(*shape, 24)[:, :rows] for each in (x, branch))
        torch.testing.assert_close(normalise_tokens(norm, part), norm(part))
        torch.testing.assert_close(add_normalised(norm, part, added), (part + added, norm(part + added)))
        with patch.object(dispatch, "_interpreting", False):
            if device == "cpu":
                assert torch.equal(normalise_tokens(norm, part), norm(part))


def test_the_references_are_torchs_layers(device):
    x, weight, bias, branch, gate = inputs((2, 5, 24), torch.float64, device)
    y, out = layer_norm(x, weight[0, 0], bias[0, 0], branch, eps=EPS)
    assert torch.equal(y, x + branch)
    assert torch.equal(out, F.layer_norm(y, (24,), weight[0, 0], bias[0, 0], EPS))
    y, out = layer_norm(x, weight, bias, branch, gate, eps=EPS)
    assert torch.equal(y, x + gate * branch)
    assert torch.equal(out, F.layer_norm(y, (24,), eps=EPS) * (1 + weight) + bias)


def test_without_a_branch_x_is_returned(device):
    x, weight, bias, *_ = inputs((2, 5, 24), torch.float32, device)
    assert layer_norm(x, weight, bias, eps=EPS)[0] is x


def test_the_reference_runs_where_there_is_no_kernel(device):
    x, weight, bias, *_ = inputs((2, 5, 24), torch.float32, device)
    assert "gradient" in (layer_norm_obstacle(x.requires_grad_(), weight, bias) or "")
    (grad,) = torch.autograd.grad(layer_norm(x, weight, bias, eps=EPS)[1].square().sum(), x)
    assert grad.any()
    assert "rows" in (layer_norm_obstacle(x.detach().mT.contiguous().mT, weight, bias) or "")


def test_arguments_that_do_not_agree_are_refused(device):
    x, weight, bias, branch, gate = inputs((2, 5, 24), torch.float32, device)
    with pytest.raises(ValueError, match=r"weight \(1, 1, 24\) does not fit x \(2, 5, 24\)"):
        layer_norm(x, weight[:1], bias, eps=EPS)
    with pytest.raises(ValueError, match=r"bias \(24,\) does not fit"):
        layer_norm(x, weight, bias[0, 0], eps=EPS)
    with pytest.raises(ValueError, match=r"branch \(2, 4, 24\) does not fit"):
        layer_norm(x, weight, bias, branch[:, :4], gate, eps=EPS)
