"""The VAE is diffusers' AutoencoderKL: same names, same numbers, either way round."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import nn

from cmdgen.config import MINI, VaeConfig
from cmdgen.models.vae import KlVae

TINY = VaeConfig(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=2)
assert MINI.vae is not None


def peer(config: VaeConfig) -> AutoencoderKL:
    levels = len(config.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        latent_channels=config.latent_channels,
    ).eval()


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def assert_same(ours: KlVae, theirs: AutoencoderKL) -> None:
    frames = torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, logvar = ours.encode(frames)
        expected = theirs.encode(frames).latent_dist
        torch.testing.assert_close(mean, expected.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(logvar, expected.logvar, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.decode(mean), theirs.decode(mean).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, MINI.vae])
def test_weights_go_both_ways_and_give_the_same_numbers(config: VaeConfig) -> None:
    ours, theirs = KlVae(config), peer(config)
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs)
    theirs.load_state_dict(KlVae(config).state_dict())


def test_stable_diffusion_names_and_shapes_are_diffusers() -> None:
    with torch.device("meta"):
        assert shapes(KlVae(VaeConfig())) == shapes(peer(VaeConfig()))


def test_diffusers_opens_what_we_save_and_we_open_what_it_saves(tmp_path) -> None:
    ours = KlVae(TINY)
    ours.save_pretrained(tmp_path / "ours")
    theirs = AutoencoderKL.from_pretrained(tmp_path / "ours")
    assert_same(ours, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    again = KlVae.from_pretrained(tmp_path / "theirs")
    assert again.config == TINY
    assert_same(again, theirs)


def test_old_names_of_attention_are_read(tmp_path) -> None:
    ours = KlVae(TINY)
    ours.save_pretrained(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(tmp_path / KlVae.filename)
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    assert any("proj_attn" in key for key in state)
    save_file(state, tmp_path / KlVae.filename)
    again = KlVae.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in ours.state_dict().items())


def test_float64_in_is_float64_throughout() -> None:
    vae = KlVae(TINY).double()
    frames = torch.rand(1, 3, 16, 8, dtype=torch.float64)
    assert vae.from_latents(vae.to_latents(frames)).dtype == torch.float64


def test_latents_are_the_scaled_mean() -> None:
    vae, frames = KlVae(TINY), torch.rand(1, 3, 8, 8)
    assert torch.equal(vae.to_latents(frames), vae.encode(frames)[0] * TINY.scaling_factor)


def test_a_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="9x8 is not a multiple of 2"):
        KlVae(TINY).encode(torch.zeros(1, 3, 9, 8))
