from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmdgen.config import AutoencoderConfig
from cmdgen.models import autoencoder
from cmdgen.models.autoencoder import CmdAutoencoder, Unpatch, axial_rotation
from cmdgen_kernels import rotate
from cmdgen_kernels.gated_attention import softmax_attention

SMALL = AutoencoderConfig(channels=3, width=24, heads=2, depth=1, motion_channels=5)
# no blocks: what the heads and the embeddings do on their own
BARE = replace(SMALL, depth=0)


def build(config: AutoencoderConfig = SMALL) -> CmdAutoencoder:
    torch.manual_seed(0)
    return CmdAutoencoder(config).double()


def clip(batch: int = 2, frames: int = 5, height: int = 6, width: int = 10) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, frames, height, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("channels", "count"), [(4, 47_365_656), (3, 47_359_510)])
def test_paper_configuration_has_the_papers_parameter_count(channels: int, count: int) -> None:
    with torch.device("meta"):
        model = CmdAutoencoder(AutoencoderConfig(channels=channels))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("frames", [1, 5, 16])
@pytest.mark.parametrize(("height", "width"), [(6, 10), (10, 6), (2, 2)])
def test_any_length_and_rectangle_goes_through(frames: int, height: int, width: int) -> None:
    model, x = build(), clip(2, frames, height, width)
    content, motion = model.encode(x)
    assert content.shape == (2, 3, height, width)
    assert motion.shape == (2, 5, frames, width // 2 + height // 2)
    assert model.decode(content, motion).shape == x.shape


def test_attention_over_time_in_several_calls_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(), clip()
    whole = model.decode(*model.encode(x))
    monkeypatch.setattr(autoencoder, "MOST_ROWS", 7)
    torch.testing.assert_close(model.decode(*model.encode(x)), whole, rtol=1e-12, atol=1e-12)


def test_smooth_importance_is_one_map_that_sums_to_one_over_time() -> None:
    model = build(replace(SMALL, importance="patch"))
    tokens = 10 * torch.randn(5, 2, 15, 24, dtype=torch.float64)
    weights = model.smooth_weights(tokens, 3)
    assert weights.shape == (2, 1, 5, 6, 10)
    assert (weights >= 0).all() and weights.std() > 0.01
    torch.testing.assert_close(weights.sum(dim=2), torch.ones_like(weights[:, :, 0]))


@pytest.mark.parametrize("importance", ["pixel", "patch"])
def test_content_frame_of_constant_video_is_the_frame(importance: str) -> None:
    frame = clip(frames=1)
    content, _ = build(replace(SMALL, importance=importance)).encode(frame.repeat(1, 1, 7, 1, 1))
    torch.testing.assert_close(content, frame[:, :, 0])


@pytest.mark.parametrize("importance", ["pixel", "patch"])
def test_content_frame_lies_within_the_range_of_each_pixel_over_time(importance: str) -> None:
    x = clip()
    content, _ = build(replace(SMALL, importance=importance)).encode(x)
    assert (content >= x.amin(dim=2) - 1e-12).all() and (content <= x.amax(dim=2) + 1e-12).all()


def test_content_frame_equals_its_definition() -> None:
    model, x = build(BARE), clip()
    # a token in its (channel, row, column) order, as convolutions have it
    kernel = model.embed_frames.weight.view(24, 2, 2, 3).permute(0, 3, 1, 2)
    assert isinstance(model.importance, Unpatch)
    up = model.importance.linear.weight.view(2, 2, 3, 24).permute(3, 2, 0, 1)
    logits = torch.stack(
        [
            F.conv_transpose2d(
                F.conv2d(frame, kernel, model.embed_frames.bias, stride=2), up, model.importance.bias, stride=2
            )
            for frame in x.unbind(2)
        ],
        dim=2,
    )
    total = torch.zeros_like(x[:, :, 0])
    for t in range(x.shape[2]):
        total += x[:, :, t] * logits[:, :, t].exp() / logits.exp().sum(dim=2)
    torch.testing.assert_close(model.encode(x)[0], total)


def test_motion_is_bounded_with_tanh_and_free_without() -> None:
    x = 100 * clip()
    assert build().encode(x)[1].abs().max() <= 1
    assert build(replace(BARE, motion_activation="linear")).encode(x)[1].abs().max() > 1


def test_first_part_of_the_motion_is_indexed_by_width_the_second_by_height() -> None:
    model, x = build(BARE), clip(1)
    moved = x.clone()
    # one patch: frame 3, rows 2 and 3 (the second of 3), columns 8 and 9 (the last of 5)
    moved[:, :, 3, 2:4, 8:10] += 1
    changed = (model.encode(moved)[1] - model.encode(x)[1]).abs().amax(dim=(0, 1)) > 1e-9
    assert changed.nonzero().tolist() == [[3, 4], [3, 5 + 1]]


def test_motion_equals_its_definition() -> None:
    model, x = build(BARE), clip(1)
    _, motion = model.encode(x)
    patch = x[0].unfold(2, 2, 2).unfold(3, 2, 2)  # (C, T, H', W', 2, 2)
    u = model.embed_frames(patch.permute(1, 2, 3, 4, 5, 0).flatten(3))  # (T, H', W', D)
    for w in range(5):
        mean = sum(u[:, h, w] for h in range(3)) / 3
        torch.testing.assert_close(motion[0, :, :, w].T, model.motion_width(mean).tanh())
    for h in range(3):
        mean = sum(u[:, h, w] for w in range(5)) / 5
        torch.testing.assert_close(motion[0, :, :, 5 + h].T, model.motion_height(mean).tanh())


def test_decoder_input_is_the_three_way_broadcast_sum() -> None:
    model = build()
    content, motion = model.encode(clip(1))
    tokens = model.embed(content, motion)
    assert tokens.dtype == torch.float64
    for t, h, w in ((0, 0, 0), (1, 2, 0), (4, 1, 3), (3, 2, 4)):
        pixels = content[0, :, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].permute(1, 2, 0).flatten()
        total = model.embed_content(pixels)
        total = total + model.embed_motion_width(motion[0, :, t, w])
        total = total + model.embed_motion_height(motion[0, :, t, 5 + h])
        torch.testing.assert_close(tokens[t, 0, 5 * h + w], total)


def test_swapped_parts_of_the_motion_are_noticed() -> None:
    model = build()
    content, motion = model.encode(clip())
    across, down = motion.split((5, 3), dim=-1)
    frames = model.decode(content, motion)
    swapped = model.decode(content, torch.cat((down, across), dim=-1))
    assert (frames - swapped).abs().mean() > 0.01 * frames.abs().mean()


def test_sizes_that_do_not_fit_are_rejected() -> None:
    model = build()
    with pytest.raises(ValueError, match="frames 6x7 are not multiples of the patch 2"):
        model.encode(clip(width=7))
    content, motion = model.encode(clip())
    with pytest.raises(ValueError, match=r"motion of 7 positions .* 5 \+ 3"):
        model.decode(content, motion[..., :7])


@pytest.mark.parametrize(
    "change", [{"heads": 5}, {"width": 22, "heads": 22}, {"importance": "x"}, {"motion_activation": "x"}]
)
def test_impossible_configurations_are_rejected(change: dict[str, int | str]) -> None:
    with pytest.raises(ValueError):
        CmdAutoencoder(replace(SMALL, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("importance", ["pixel", "patch"])
def test_batch_of_two_equals_two_batches_of_one(importance: str) -> None:
    model, x = build(replace(SMALL, importance=importance)), clip(2)
    content, motion = model.encode(x)
    frames = model.decode(content, motion)
    for i in (0, 1):
        one = model.encode(x[i : i + 1])
        torch.testing.assert_close((content[i : i + 1], motion[i : i + 1]), one)
        torch.testing.assert_close(frames[i : i + 1], model.decode(*one))


@pytest.mark.parametrize("dim", [2, 3, 4])
def test_encoder_knows_positions_in_time_and_space(dim: int) -> None:
    model, x = build(replace(SMALL, heads=1)), clip(1)
    # frames, or whole rows or columns of patches, in reverse
    order = torch.arange(x.shape[dim]).view(-1, 1 if dim == 2 else 2).flip(0).flatten()
    content, _ = model.encode(x)
    reversed_content, _ = model.encode(x.index_select(dim, order))
    if dim > 2:
        reversed_content = reversed_content.index_select(dim - 1, order)
    assert (content - reversed_content).abs().max() > 1e-4


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 20, dtype=torch.float64)
    rotation = axial_rotation((4, 6), 20, q)
    assert rotation.shape == (24, 10)
    turned_q, turned_k = (rotate(x.expand(24, -1), rotation).view(4, 6, 20) for x in (q, k))
    scores = torch.einsum("abd,hwd->abhw", turned_q, turned_k)
    torch.testing.assert_close(scores[0, 1, 2, 2], scores[1, 4, 3, 5])
    assert abs(scores[0, 1, 2, 2] - scores[0, 1, 1, 2]) > 1e-3
    assert abs(scores[0, 1, 2, 2] - scores[0, 1, 2, 3]) > 1e-3


@pytest.mark.parametrize("length", [1, 16, 32])
def test_attention_over_short_rows_is_exact_to_the_rounding_of_its_dtype(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, length, 8, generator=generator, dtype=torch.float64)
    exact = (q @ k.mT / 8**0.5).softmax(dim=-1) @ v
    for dtype in (torch.float32, torch.bfloat16):
        error = softmax_attention(q.to(dtype), k.to(dtype), v.to(dtype)) - exact
        assert error.norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


def test_attention_over_long_rows_is_pytorchs() -> None:
    q, k, v = torch.randn(3, 2, 3, 300, 8)
    assert torch.equal(softmax_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_autocast_keeps_importance_and_results_close() -> None:
    model = build(replace(SMALL, importance="pixel")).float()
    x = clip().float()
    content, motion = model.encode(x)
    frames = model.decode(content, motion)
    constant = x[:, :, :1].repeat(1, 1, 5, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        low_content, low_motion = model.encode(x)
        low_frames = model.decode(content, motion)
        # the weights are float32, so they sum to one much closer than bfloat16 could
        torch.testing.assert_close(model.encode(constant)[0], constant[:, :, 0])
    assert low_content.dtype == low_motion.dtype == low_frames.dtype == torch.float32
    for low, high in ((low_content, content), (low_motion, motion), (low_frames, frames)):
        assert (low - high).norm() < 0.02 * high.norm()


@pytest.mark.parametrize("importance", ["pixel", "patch"])
def test_reconstruction_error_reaches_every_parameter(importance: str) -> None:
    model, x = build(replace(SMALL, importance=importance)), clip()
    (model.decode(*model.encode(x)) - x).square().mean().backward()
    for name, parameter in model.named_parameters():
        # one bias for all frames cancels in the softmax over time
        if name != "importance.bias":
            assert parameter.grad is not None and parameter.grad.abs().max() > 1e-12, name


def test_standardised_motion_has_the_recorded_statistics_removed() -> None:
    mean, std = (1.0, -2.0, 0.0, 3.0, 5.0), (2.0, 1.0, 0.5, 1.0, 4.0)
    model = build(replace(SMALL, motion_mean=mean, motion_std=std))
    motion = torch.randn(2, 5, 4, 8)
    raw = motion * torch.tensor(std).view(5, 1, 1) + torch.tensor(mean).view(5, 1, 1)
    torch.testing.assert_close(model.standardise(raw), motion)
    torch.testing.assert_close(model.destandardise(motion), raw)
    assert torch.equal(build().standardise(motion), motion)
    assert torch.equal(build().destandardise(motion), motion)


def test_saved_autoencoder_comes_back_exactly(tmp_path: Path) -> None:
    config = replace(SMALL, motion_mean=(0.0,) * 5, motion_std=(1.0,) * 5)
    model = build(config).float()
    model.save_pretrained(tmp_path)
    again = CmdAutoencoder.from_pretrained(tmp_path)
    assert again.config == config
    x = clip().float()
    torch.testing.assert_close(again.encode(x), model.encode(x), rtol=0, atol=0)
