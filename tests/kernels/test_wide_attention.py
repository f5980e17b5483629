import sys

import pytest
import torch

from cmdgen_kernels import wide_attention
from cmdgen_kernels.gated_attention import softmax_attention
from cmdgen_kernels.wide_attention import wide_attention_obstacle, wide_attention_reference

# the package gives the function that name
MODULE = sys.modules[wide_attention.__module__]


def inputs(batch, length, width, dtype, device):
    """q, k, v as views of linear layers' results."""
    generator = torch.Generator().manual_seed(0)
    shape = batch, length, 1, width
    return tuple(torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2) for _ in range(3))


def op(*tensors):
    """The op, which has to take the kernel."""
    assert wide_attention_obstacle(*tensors) is None
    return wide_attention(*tensors)


@pytest.mark.parametrize("rows", [2048, 7])
@pytest.mark.parametrize(("batch", "length", "width"), [(2, 33, 264), (1, 1, 300), (1, 20, 512)])
def test_wide_attention_matches_the_reference(batch, length, width, rows, dtype, device, monkeypatch, assert_parity):
    monkeypatch.setattr(MODULE, "ROWS", rows)
    assert_parity(op, wide_attention_reference, *inputs(batch, length, width, dtype, device), gradients=False)


def test_scores_far_apart_choose_one_value(dtype, device):
    q, k, v = inputs(1, 9, 264, dtype, device)
    q = 100 * k
    torch.testing.assert_close(op(q, k, v), v)


def test_other_heads_and_gradients_take_fused_attention(device):
    q, k, v = inputs(2, 9, 264, torch.float32, device)
    narrow = q[..., :256], k[..., :256], v[..., :256]
    assert "width 256" in (wide_attention_obstacle(*narrow) or "")
    assert torch.equal(wide_attention(*narrow), softmax_attention(*narrow))
    assert "gradient" in (wide_attention_obstacle(q.requires_grad_(), k, v) or "")
    (grad,) = torch.autograd.grad(wide_attention(q, k, v).sum(), q)
    assert grad.any()


def test_several_heads_are_refused(device):
    q, k, v = inputs(2, 9, 264, torch.float32, device)
    with pytest.raises(ValueError, match=r"\(2, 2, 9, 132\).* are not all \(B, 1, L, D\)"):
        wide_attention(*(each.unflatten(3, (2, -1))[:, 0].transpose(1, 2) for each in (q, k, v)))
