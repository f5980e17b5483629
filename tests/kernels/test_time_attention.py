import pytest
import torch

from cmdgen_kernels import time_attention
from cmdgen_kernels.gated_attention import softmax_attention
from cmdgen_kernels.time_attention import time_attention_obstacle, time_attention_reference


def inputs(*shape, dtype, device):
    """q, k, v."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))


def op(*tensors):
    """The op, which has to take the kernel."""
    assert time_attention_obstacle(*tensors) is None
    return time_attention(*tensors)


# frames, positions and widths that no block divides; one of each; AnimateDiff's heads; SVD-XT's
SHAPES = [
    *((2, 5, 7, 3, 40), (1, 32, 1, 2, 17), (1, 1, 1, 1, 1)),
    *((1, 16, 4, 2, 80), (2, 14, 3, 1, 160), (1, 25, 5, 5, 64)),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_time_attention_matches_the_reference(shape, dtype, device, assert_parity):
    tensors = inputs(*shape, dtype=dtype, device=device)
    assert_parity(op, time_attention_reference, *tensors, gradients=False)
    assert op(*tensors).is_contiguous()


@pytest.mark.parametrize("scale", [0.0, 30.0])
def test_equal_scores_average_and_scores_far_apart_choose(scale, dtype, device, assert_parity):
    q, k, v = inputs(2, 6, 5, 2, 24, dtype=dtype, device=device)
    q = scale * k
    assert_parity(op, time_attention_reference, q, k, v, gradients=False)
    torch.testing.assert_close(op(q, k, v), v if scale else v.mean(1, keepdim=True).expand_as(v))


def test_of_one_frame_it_is_the_value(dtype, device):
    q, k, v = inputs(2, 1, 5, 2, 40, dtype=dtype, device=device)
    # on a GPU 1 / 1 is approximate
    torch.testing.assert_close(op(100 * q, k, v), v, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_positions_and_clips_share_nothing(dtype, device):
    tensors = inputs(2, 6, 9, 3, 24, dtype=dtype, device=device)
    # parts of a map, not in one piece
    parts = [x[1:, :, 3:6] for x in tensors]
    assert not parts[0].is_contiguous()
    assert torch.equal(op(*parts), op(*tensors)[1:, :, 3:6])


def test_parts_of_one_product_are_read_where_they_lie(dtype, device, monkeypatch):
    (product,) = inputs(2, 6, 5, 3 * 48, dtype=dtype, device=device)[:1]
    parts = [part.unflatten(-1, (2, 24)) for part in product.chunk(3, dim=-1)]
    expected = op(*(part.contiguous() for part in parts))
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    assert torch.equal(op(*parts), expected)


def test_the_reference_is_softmax_attention_of_each_position(device):
    q, k, v = inputs(2, 6, 5, 2, 24, dtype=torch.float64, device=device)
    plain = softmax_attention(*(x[1, :, 4].transpose(0, 1) for x in (q, k, v)))
    out = time_attention(q, k, v)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out[1, :, 4].transpose(0, 1), plain)


def test_more_frames_and_gradients_take_the_reference(device):
    q, k, v = inputs(1, 33, 2, 2, 8, dtype=torch.float32, device=device)
    assert time_attention_obstacle(q, k, v) == "33 frames are more than 32"
    assert torch.equal(time_attention(q, k, v), time_attention_reference(q, k, v))
    q = q[:, :5].requires_grad_()
    assert "gradient" in (time_attention_obstacle(q, k[:, :5], v[:, :5]) or "")
    (grad,) = torch.autograd.grad(time_attention(q, k[:, :5], v[:, :5]).square().sum(), q)
    assert grad.any()


def test_tensors_of_other_shapes_are_refused(device):
    q, k, v = inputs(1, 4, 2, 2, 8, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 2, 8\), \(1, 3, 2, 2, 8\), .* are not all \(B, T, P, N, D\)"):
        time_attention(q, k[:, :3], v)
