import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from cmdgen_kernels import dispatch, gated_attention
from cmdgen_kernels.gated_attention import (
    gated_attention_obstacle,
    gated_attention_reference,
    linear_attention_reference,
    orthogonal_features,
    pays_cudnn,
    softmax_attention,
)
from cmdgen_kernels.samples import FLOAT32_ULPS, results


def inputs(batch, heads, length, width, features, dtype, device, *, scale=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, length, width, generator=generator) for _ in range(3))
    projection = orthogonal_features(features, width, generator=generator)
    return *(x.to(device, dtype) for x in (scale * q, scale * k, v)), projection.to(device)


def linear(projection):
    """The op and its reference, both through the features, as functions of q, k and v."""
    return tuple(
        lambda q, k, v, op=op: op(q, k, v, projection.to(q.dtype), threshold=0)
        for op in (gated_attention, gated_attention_reference)
    )


@pytest.mark.parametrize(
    ("batch", "heads", "length", "width", "features"),
    [(1, 2, 64, 16, 64), (5, 1, 70, 24, 40), (2, 1, 3, 8, 16), (1, 1, 600, 32, 100)],
)
def test_linear_attention_and_its_gradients_match_the_reference(
    batch, heads, length, width, features, dtype, device, assert_parity
):
    q, k, v, projection = inputs(batch, heads, length, width, features, dtype, device)
    assert_parity(*linear(projection), q, k, v)


def test_a_mean_of_the_values_costs_the_gradients_no_more_than_plain_pytorchs(dtype, device):
    if dtype == torch.float32:
        pytest.skip("nothing is rounded in between")
    q, k, v, projection = inputs(32, 2, 3, 8, 16, dtype, device)
    tensors = q, k, v + 8
    # those of q and k, which no mean changes
    ours, plain = (results(op, tensors, 2)[1:] for op in linear(projection))
    exact = results(linear(projection)[1], tuple(x.double() for x in tensors), 2, dtype=dtype)[1:]
    for x, y, z in zip(ours, plain, exact, strict=True):
        assert (x - z).norm() <= (y - z).norm()


def test_strided_inputs(dtype, device, assert_parity):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 37, 3, 2, 16, generator=generator).to(device, dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    projection = orthogonal_features(32, 16, generator=generator).to(device)
    assert_parity(*linear(projection), q, k, v)
    turned = v.transpose(2, 3).contiguous().transpose(2, 3)
    assert_parity(*linear(projection), q, k, turned)


@pytest.mark.parametrize("scale", [20.0, 200.0])
def test_large_queries_and_keys_stay_finite(scale, dtype, device, assert_parity):
    q, k, v, projection = inputs(1, 1, 80, 16, 32, dtype, device, scale=scale)
    out = gated_attention(q, k, v, projection, threshold=0)
    assert out.isfinite().all()
    # a weighted mean of the values, whatever the weights
    assert out.abs().max() <= v.abs().max() * 1.01


def test_a_single_token_attends_to_itself(dtype, device):
    q, k, v, projection = inputs(2, 2, 1, 16, 32, dtype, device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = gated_attention(*leaves, projection, threshold=0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, v, rtol=4 * eps, atol=0)
    grad_q, grad_k, grad_v = torch.autograd.grad(out, leaves, torch.ones_like(out))
    torch.testing.assert_close(grad_v, torch.ones_like(v), rtol=4 * eps, atol=0)
    # softmaxes of one term do not move; products of 16 terms of order 1 cancel
    assert max(grad_q.abs().max(), grad_k.abs().max()) < 16 * eps


def test_equal_tokens_return_their_value(dtype, device):
    q, k, v, projection = inputs(1, 2, 1, 16, 32, dtype, device)
    same = [x.expand(-1, -1, 90, -1) for x in (q, k, v)]
    out = gated_attention(*same, projection, threshold=0)
    # in float32 a GPU's exp2 and division are approximate
    ulps = FLOAT32_ULPS if dtype == torch.float32 else 8
    torch.testing.assert_close(out, same[2], rtol=ulps * torch.finfo(dtype).eps, atol=0)


def test_two_softmaxes_are_the_fraction_of_positive_features():
    q, k, v, projection = inputs(2, 3, 50, 16, 40, torch.float64, "cpu")
    projection = projection.double()

    def phi(x):
        x = x * 16**-0.25
        return torch.exp(x @ projection.T - x.square().sum(dim=-1, keepdim=True) / 2)

    fraction = phi(q) @ (phi(k).transpose(-1, -2) @ v)
    fraction /= phi(q) @ phi(k).sum(dim=-2).unsqueeze(-1)
    torch.testing.assert_close(linear_attention_reference(q, k, v, projection), fraction)


def test_features_estimate_the_softmax_kernel_without_bias():
    generator = torch.Generator().manual_seed(1)
    x, y = 0.25 * torch.randn(2, 16, generator=generator, dtype=torch.float64)
    # blocks of 16 rows are draws of their own
    draws = orthogonal_features(16 * 40_000, 16, generator=generator).double().unflatten(0, (-1, 16))
    exact = math.exp(x @ y)
    products = torch.exp(draws @ (x + y) - (x @ x + y @ y) / 2).mean(dim=1)
    error = 4 * float(products.std()) / len(draws) ** 0.5
    assert abs(float(products.mean()) - exact) < error < 0.03 * exact


def test_error_falls_with_the_square_root_of_the_number_of_features():
    q, k, v, _ = inputs(1, 1, 64, 16, 16, torch.float64, "cpu", scale=0.4)
    exact = F.scaled_dot_product_attention(q, k, v)
    generator = torch.Generator().manual_seed(0)

    def error(features):
        draws = orthogonal_features(features * 60, 16, generator=generator).double()
        squares = [
            (linear_attention_reference(q, k, v, draw) - exact).square().mean() for draw in draws.split(features)
        ]
        return float(torch.stack(squares).mean()) ** 0.5

    small, large = error(32), error(512)
    # 16 times as many features: a quarter of the error
    assert 3 < small / large < 5
    assert large < 0.5 * float((exact - v.mean(dim=2, keepdim=True)).square().mean()) ** 0.5


def test_features_are_orthogonal_in_blocks_and_as_long_as_gaussian_ones():
    generator = torch.Generator().manual_seed(0)
    rows = orthogonal_features(20, 8, generator=generator).double()
    for block in rows.split(8):
        products = block @ block.T
        assert (products - products.diagonal().diag()).abs().max() < 1e-5
    lengths = orthogonal_features(4096, 8, generator=generator).square().sum(dim=1)
    # chi squared with 8 degrees of freedom: mean 8, variance 16
    assert abs(float(lengths.mean()) - 8) < 0.25
    assert abs(float(lengths.var()) - 16) < 2


def test_the_gate_is_strict_and_asks_for_shapes_alone(device):
    q, k, v, projection = inputs(1, 1, 33, 16, 32, torch.float32, device)
    many, few, one = ([x[:, :, :length] for x in (q, k, v)] for length in (33, 32, 1))
    for tokens, threshold in ((many, 2.0), (one, 0.0)):
        assert gated_attention_obstacle(*tokens, projection, threshold=threshold) is None
        torch.testing.assert_close(
            gated_attention(*tokens, projection, threshold=threshold), linear_attention_reference(*tokens, projection)
        )
    for tokens, threshold in ((few, 2.0), (many, math.inf)):
        reason = gated_attention_obstacle(*tokens, projection, threshold=threshold)
        assert reason == "softmax attention is PyTorch's"
        ours = gated_attention(*tokens, projection, threshold=threshold)
        assert torch.equal(ours, softmax_attention(*tokens))


def test_what_cannot_be_is_refused(device):
    q, k, v, projection = inputs(1, 1, 8, 16, 32, torch.float32, device)
    with pytest.raises(ValueError, match=r"projection \(32, 8\) are not"):
        gated_attention(q, k, v, projection[:, :8])
    with pytest.raises(ValueError, match=r"k \(1, 1, 7, 16\)"):
        gated_attention(q, k[:, :, :7], v, projection)


@pytest.mark.parametrize(
    ("shape", "keys", "newest", "pays"),
    [
        ((2, 5, 8192, 64), 8192, (9, 0), True),
        ((2, 5, 8192, 64), 77, (9, 0), True),
        ((1, 16, 512, 72), 512, (10, 0), True),
        ((2, 20, 512, 64), 77, (9, 0), False),
        ((2, 20, 128, 64), 128, (9, 0), False),
        ((32, 8, 256, 160), 256, (9, 0), False),
        ((2, 5, 8192, 64), 8192, (8, 9), False),
    ],
)
def test_cudnn_attends_on_hopper_where_there_is_much_to_do(monkeypatch, shape, keys, newest, pays) -> None:
    monkeypatch.setattr(dispatch, "capability", lambda device: newest)
    # a tensor of a GPU without one: shapes alone
    with FakeTensorMode(), torch.no_grad():
        q, k = torch.empty(shape, device="cuda"), torch.empty(*shape[:2], keys, shape[3], device="cuda")
        assert pays_cudnn(q, k) == pays
        with torch.enable_grad():
            assert not pays_cudnn(q, k)
        assert not pays_cudnn(torch.empty(shape), torch.empty(shape))
