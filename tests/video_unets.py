"""Narrow video UNets: diffusers', random in everything, and models of ours."""

from dataclasses import replace

import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from torch import nn

from cmdgen.config import ModelConfig, UNetConfig

WIDTHS = (32, 64, 64)
DOWN = ("CrossAttnDownBlock", "CrossAttnDownBlock", "DownBlock")
UP = ("UpBlock", "CrossAttnUpBlock", "CrossAttnUpBlock")


def blocks(kind: str) -> dict[str, tuple[str, ...]]:
    """The types of a UNet's blocks, as diffusers calls those of a kind."""
    return {
        name: tuple(f"{each}{kind}" for each in names)
        for name, names in (("down_block_types", DOWN), ("up_block_types", UP))
    }


SHAPE = {"block_out_channels": WIDTHS, "cross_attention_dim": 16, "sample_size": 16}
STILL = {**SHAPE, **blocks("2D"), "attention_head_dim": 4, "norm_num_groups": 8}
MOTION = {"block_out_channels": WIDTHS, "motion_num_attention_heads": 4, "motion_norm_num_groups": 8}
NUMBERS = {"addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 96}
BLEND = {**SHAPE, **blocks("SpatioTemporal"), **NUMBERS, "num_attention_heads": (2, 4, 4), "num_frames": 5}
VAE = {"down_block_types": ("DownEncoderBlock2D",) * 3, "block_out_channels": WIDTHS}


def randomise(module: nn.Module) -> nn.Module:
    """Weights that keep what passes through at unit size, and none at a value of its birth."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                draw = draw * parameter[0].numel() ** -0.5
            elif "mix_factor" in name:
                draw = draw + 0.3
            else:
                draw = 0.1 * draw + name.endswith("weight")
            parameter.copy_(draw)
    return module.eval()


def still() -> UNet2DConditionModel:
    return randomise(UNet2DConditionModel(**STILL))


def adapter(*, mid: bool = True) -> MotionAdapter:
    return randomise(MotionAdapter(**MOTION, use_motion_mid_block=mid))


def motion(*, mid: bool = True) -> UNetMotionModel:
    return UNetMotionModel.from_unet2d(still(), adapter(mid=mid)).eval()


def blend() -> UNetSpatioTemporalConditionModel:
    return randomise(UNetSpatioTemporalConditionModel(**BLEND))


def vae(layers: int = 2) -> AutoencoderKLTemporalDecoder:
    return randomise(AutoencoderKLTemporalDecoder(**VAE, layers_per_block=layers))


def tiny(preset: ModelConfig) -> ModelConfig:
    """A preset of ours at widths that sample in a moment, its kinds of layers as they are."""
    assert isinstance(preset.content, UNetConfig) and preset.vae is not None
    content = replace(
        preset.content,
        **{"block_out_channels": WIDTHS, "cross_attention_dim": 16, "attention_head_dim": 4, "sample_size": 8},
        down_block_types=blocks("2D")["down_block_types"],
        up_block_types=blocks("2D")["up_block_types"],
    )
    text = preset.text and replace(
        preset.text,
        **{"vocab_size": 560, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "max_position_embeddings": 16, "eos_token_id": 1},
    )
    if content.temporal == "blend":
        content = replace(content, addition_time_embed_dim=32, projection_class_embeddings_input_dim=96, num_frames=4)
    return replace(
        preset,
        text=text,
        content=content,
        vae=replace(preset.vae, block_out_channels=(32,) * 4, layers_per_block=1, sample_size=64),
        adapter=preset.adapter and replace(preset.adapter, block_out_channels=WIDTHS),
        vision=preset.vision
        and replace(
            preset.vision,
            **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
            **{"patch_size": 112, "projection_dim": 16},
        ),
        **{"frames": 4, "height": 64, "width": 64, "steps": 2},
    )
