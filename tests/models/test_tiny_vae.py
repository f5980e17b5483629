"""The small VAE is diffusers' AutoencoderTiny: same names, same numbers, either way round."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

from cmdgen.config import TinyConfig
from cmdgen.models.tiny_vae import TinyVae
from cmdgen.weights import build_empty
from tests.video_unets import randomise

SMALL = TinyConfig(
    latent_channels=6,
    encoder_block_out_channels=(8, 8, 8),
    decoder_block_out_channels=(12, 12, 12),
    num_encoder_blocks=(1, 2, 1),
    num_decoder_blocks=(2, 1, 1),
)


@torch.no_grad()
def test_folders_go_both_ways_and_give_the_same_numbers(tmp_path: Path) -> None:
    ours = randomise(TinyVae(SMALL))
    ours.save_pretrained(tmp_path / "ours")
    theirs = AutoencoderTiny.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = TinyVae.from_pretrained(tmp_path / "theirs").double()
    assert again.config == SMALL
    theirs = theirs.double()
    frames = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    latents = again.encode(frames)
    torch.testing.assert_close(latents, theirs.encode(frames).latents, rtol=0, atol=1e-12)
    torch.testing.assert_close(again.from_latents(latents), theirs.decode(latents).sample, rtol=0, atol=1e-12)


def test_the_defaults_are_taesd() -> None:
    with torch.device("meta"):
        theirs = AutoencoderTiny()
    ours = build_empty(TinyVae, TinyConfig())
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    assert sum(parameter.numel() for parameter in ours.decoder.parameters()) == 1_222_531


def test_levels_of_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"decoder of widths \(8, 16, 8\) and \(2, 1, 1\) blocks: one width"):
        TinyVae(replace(SMALL, decoder_block_out_channels=(8, 16, 8)))
