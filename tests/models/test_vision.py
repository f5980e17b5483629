"""The vision encoder is transformers' CLIPVisionModelWithProjection; its picture is diffusers'."""

from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from cmdgen.config import VisionConfig
from cmdgen.models.vision import _MEAN, _STD, ClipVisionModel, prepare_picture
from cmdgen.weights import build_empty

TINY = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"patch_size": 32, "projection_dim": 16, "hidden_act": "gelu"},
}


@torch.no_grad()
def test_folders_go_both_ways_and_give_the_same_numbers(tmp_path: Path) -> None:
    theirs = CLIPVisionModelWithProjection(CLIPVisionConfig(**TINY)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ClipVisionModel.from_pretrained(tmp_path / "theirs")
    assert ours.config == VisionConfig(**TINY)
    pictures = torch.randn(2, 3, 224, 224).double()
    expected = theirs.double()(pictures).image_embeds
    torch.testing.assert_close(ours.double()(pictures), expected, rtol=0, atol=1e-12)
    ours.save_pretrained(tmp_path / "ours")
    again = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "ours").eval().double()
    torch.testing.assert_close(again(pictures).image_embeds, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(90, 200), (576, 1024), (700, 300), (224, 224)])
def test_a_picture_is_blurred_and_resized_as_diffusers_does(size: tuple[int, int]) -> None:
    picture = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    mean, std = (torch.tensor(values).double()[:, None, None] for values in (_MEAN, _STD))
    seen = 2 * (prepare_picture(picture, 224) * std + mean) - 1
    # theirs has the blur in float32
    torch.testing.assert_close(seen, _resize_with_antialiasing(picture, (224, 224)), rtol=0, atol=5e-7)


def test_the_published_model_has_its_published_size() -> None:
    model = build_empty(ClipVisionModel, VisionConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 632_076_800
    assert len(model.state_dict()) == 520
