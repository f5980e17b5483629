"""Slices change what is held in memory, and nothing else."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cmdgen.acceleration.slicer import Moments, decode_clip, decode_pictures, encode_clip, encode_pictures
from cmdgen.config import AutoencoderConfig, VaeConfig
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.vae import KlVae
from cmdgen.request import Slices

AUTOENCODER = AutoencoderConfig(channels=3, width=24, heads=2, depth=2, motion_channels=5)
VAE = VaeConfig(block_out_channels=(8, 16, 24), norm_num_groups=4, layers_per_block=1)


def assert_exact(result: Tensor, expected: Tensor) -> None:
    assert result.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@pytest.fixture(scope="module")
def vae() -> KlVae:
    torch.manual_seed(0)
    model = KlVae(VAE).double().requires_grad_(False)
    # large means and unequal deviations, which the moments have to tell
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=1.0 if "bias" in name or "norm" in name else 0.3)
    return model


@pytest.mark.parametrize("attention", ["softmax", "gated"])
@pytest.mark.parametrize("importance", ["pixel", "patch"])
# whole, one at a time, and slices of which the last is smaller and that are of two clips
@pytest.mark.parametrize(("frames", "positions"), [(10, 30), (1, 1), (3, 4), (7, 29)])
@torch.no_grad()
def test_sliced_autoencoder_equals_the_whole(frames: int, positions: int, importance: str, attention: str) -> None:
    torch.manual_seed(0)
    # at this threshold rows of 15 tokens are long: spatial attention is linear, temporal is not
    config = replace(AUTOENCODER, importance=importance, attention=attention, attention_threshold=1.0)
    model = CmdAutoencoder(config).double()
    clips = torch.randn(2, 3, 5, 6, 10, dtype=torch.float64)
    before = clips.clone()
    slices = Slices(frames, positions, pictures=1)
    content, motion = model.encode(clips)
    sliced_content, sliced_motion = encode_clip(model, clips, slices)
    assert_exact(sliced_content, content)
    assert_exact(sliced_motion, motion)
    assert_exact(decode_clip(model, content, motion, slices), model.decode(content, motion))
    assert torch.equal(clips, before)


@torch.no_grad()
def test_a_group_sees_slices_and_never_the_whole() -> None:
    model = CmdAutoencoder(AUTOENCODER).double()
    shapes: dict[str, set[tuple[int, ...]]] = {"time": set(), "space": set(), "feed": set()}
    for block in model.decoder:
        for name, layer in (*(("time", block.time), ("space", block.space)), ("feed", block.feed_forward)):
            layer.register_forward_pre_hook(lambda _, given, name=name: shapes[name].add(tuple(given[0].shape)))
    content, motion = model.encode(torch.randn(2, 3, 5, 6, 10, dtype=torch.float64))
    for seen in shapes.values():
        seen.clear()
    decode_clip(model, content, motion, Slices(frames=4, positions=8, pictures=1))
    # ten frames of 15 tokens, thirty positions of 5 frames
    assert shapes["space"] == shapes["feed"] == {(4, 15, 24), (2, 15, 24)}
    assert shapes["time"] == {(5, 8, 24), (5, 6, 24)}


def test_motion_that_does_not_fit_is_rejected_in_slices_too() -> None:
    model = CmdAutoencoder(AUTOENCODER)
    with torch.no_grad(), pytest.raises(ValueError, match=r"motion of 7 positions .* 5 \+ 3"):
        decode_clip(model, torch.randn(1, 3, 6, 10), torch.randn(1, 5, 4, 7), Slices(1, 1, 1))


@pytest.mark.parametrize("strips", [1, 2, 3, 5, 7, 100])
@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_pictures_in_strips_equal_whole_ones(vae: KlVae, strips: int, layers: int) -> None:
    if layers > 1:
        # a shortcut in the first block of a level alone
        torch.manual_seed(0)
        vae = KlVae(replace(VAE, layers_per_block=layers, block_out_channels=(8, 8, 24))).double()
    latents = torch.randn(3, 4, 7, 5, dtype=torch.float64)
    before = latents.clone()
    assert_exact(decode_pictures(vae, latents, strips), vae.from_latents(latents))
    assert torch.equal(latents, before)


@pytest.mark.parametrize("strips", [1, 2, 3, 5, 7, 100])
@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_pictures_are_encoded_in_strips_as_whole(vae: KlVae, strips: int, layers: int) -> None:
    if layers > 1:
        torch.manual_seed(0)
        vae = KlVae(replace(VAE, layers_per_block=layers, block_out_channels=(8, 8, 24))).double()
    # seven rows of latents: of every number of strips, some are higher than others
    pictures = torch.randn(3, 3, 28, 20, dtype=torch.float64)
    before = pictures.clone()
    assert_exact(encode_pictures(vae, pictures, strips), vae.to_latents(pictures))
    assert torch.equal(pictures, before)
    with pytest.raises(ValueError, match="frame size 28x18 is not a multiple of 4"):
        encode_pictures(vae, pictures[..., :18], strips)


@torch.no_grad()
def test_strips_are_encoded_as_exactly_as_the_whole_under_autocast(vae: KlVae) -> None:
    pictures = torch.randn(2, 3, 32, 24, dtype=torch.float64)
    exact = vae.to_latents(pictures)
    single = KlVae(VAE)
    single.load_state_dict(vae.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        errors = [(encode_pictures(single, pictures.float(), strips).double() - exact).norm() for strips in (1, 4)]
    assert 0 < errors[1] <= 1.2 * errors[0]


@torch.no_grad()
def test_strips_are_as_exact_as_the_whole_in_half_precision(vae: KlVae) -> None:
    latents = torch.randn(2, 4, 8, 6, dtype=torch.float64)
    exact = vae.from_latents(latents)
    half = KlVae(VAE)
    half.load_state_dict(vae.state_dict())
    half = half.bfloat16()
    errors = [(decode_pictures(half, latents.bfloat16(), strips).double() - exact).norm() for strips in (1, 4)]
    assert errors[1] <= 1.2 * errors[0]


def test_moments_of_strips_are_those_of_group_norm_even_beside_a_large_mean() -> None:
    torch.manual_seed(0)
    x = 1e4 + torch.randn(2, 12, 10, 6)
    norm = nn.GroupNorm(3, 12, eps=1e-6).requires_grad_(False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    moments = Moments()
    for part in x.split((4, 1, 5), dim=2):
        moments.add(part)
    scale, offset = moments.affine(norm)
    deviation = x.double().view(2, 3, -1).std(dim=-1, correction=0)
    expected = norm.weight / deviation.repeat_interleave(4, dim=1)
    # a difference of the mean square and the squared mean, 1e8, would keep no digit of it
    torch.testing.assert_close(scale[:, :, 0, 0], expected.float(), rtol=1e-3, atol=0)
    # 1e4 in float32 is rounded by up to 5e-4
    torch.testing.assert_close(x * scale + offset, norm(x.double().float()), rtol=0, atol=1e-2)
