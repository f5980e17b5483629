import pytest
import torch

from cmdgen_kernels import content_frame
from cmdgen_kernels.content_frame import content_frame_reference


def inputs(shape, dtype, device, *, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    frames, logits = (torch.randn(shape, generator=generator) for _ in range(2))
    return frames.to(device, dtype), (scale * logits).to(device, dtype)


@pytest.mark.parametrize(
    "shape", [(1, 3, 16, 8, 16), (5, 1, 7, 9, 5), (2, 4, 1, 6, 3), (1, 2, 128, 4, 4), (1, 1, 9, 40, 53)]
)
def test_content_frame_and_its_gradients_match_the_reference(shape, dtype, device, assert_parity):
    frames, logits = inputs(shape, dtype, device)
    assert_parity(content_frame, content_frame_reference, frames, logits)


def test_strided_inputs(dtype, device, assert_parity):
    frames, logits = inputs((2, 5, 3, 6, 8), dtype, device)
    # time before channels, as video readers have it; one map of weights for all channels; a crop
    by_time = frames.transpose(1, 2).contiguous().transpose(1, 2)
    shared = logits[:, :1].expand(-1, 5, -1, -1, -1)
    crop = logits[..., :6, 1:7]
    assert_parity(content_frame, content_frame_reference, by_time, shared)
    assert_parity(content_frame, content_frame_reference, frames[..., 2:], crop)


def test_content_frame_of_a_constant_video_is_the_frame(dtype, device):
    frames, logits = inputs((2, 3, 6, 5, 7), dtype, device, scale=30.0)
    still = frames[:, :, :1].expand(-1, -1, 6, -1, -1)
    torch.testing.assert_close(content_frame(still, logits), frames[:, :, 0], rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_equal_logits_give_the_mean_frame(device, assert_parity):
    frames, _ = inputs((1, 2, 10, 4, 4), torch.float32, device)
    mean = content_frame(frames, torch.full_like(frames, -300.0))
    torch.testing.assert_close(mean, frames.mean(dim=2))


def test_extreme_logits_choose_frames_and_stay_finite(dtype, device, assert_parity):
    frames, logits = inputs((1, 2, 20, 3, 5), dtype, device)
    excluded = logits.clone()
    excluded[:, :, :17] = float("-inf")
    assert_parity(content_frame, content_frame_reference, frames, excluded)
    huge = logits.sign() * torch.finfo(torch.float16).max
    assert_parity(content_frame, content_frame_reference, frames, huge)
    one = torch.full_like(logits, float("-inf"))
    one[:, :, 11] = 5.0
    torch.testing.assert_close(content_frame(frames, one), frames[:, :, 11])


def test_shapes_that_differ_are_refused(device):
    frames, logits = inputs((1, 2, 3, 4, 4), torch.float32, device)
    with pytest.raises(ValueError, match=r"frames \(1, 2, 3, 4, 4\) and logits \(1, 2, 3, 4, 3\)"):
        content_frame(frames, logits[..., :3])
