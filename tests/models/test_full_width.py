"""AnimateDiff and Stable Video Diffusion at their published widths, block by block, in float64.

Both sides of a block share one set of random weights: whole models in float64 would fill the memory
of the machines that run tests. That all blocks are there, in their order, is what narrow models show.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLTemporalDecoder, UNetMotionModel, UNetSpatioTemporalConditionModel
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from cmdgen.config import ANIMATEDIFF_LIGHTNING, SVD, ModelConfig, UNetConfig
from cmdgen.models.temporal import MotionAdapter
from cmdgen.models.transformer import Conditions
from cmdgen.models.unet import DownStage, Stage, UNet, UpStage
from cmdgen.models.vae import KlVae
from cmdgen.models.vision import ClipVisionModel
from cmdgen.weights import build_empty
from tests.video_unets import blocks

CLIPS, FRAMES = 2, 3
# of the first level, halved by each other one
SIZE = 8, 16
# of the largest value
TOLERANCE = 1e-12
# the largest block has 489 M weights, of 8 bytes
NEEDED = 8 * 2**30
WIDTHS = 320, 640, 1280, 1280
WHOLE = {"block_out_channels": WIDTHS, "sample_size": 96}
LEVELS = {f"down_blocks.{i}": i for i in range(4)} | {"mid_block": 3} | {f"up_blocks.{i}": 3 - i for i in range(4)}
KINDS = {
    name: (*kinds[:1], *kinds) if name.startswith("down") else (*kinds, *kinds[-1:])
    for name, kinds in blocks("").items()
}


def available() -> int:
    """Bytes of memory that a process can get; where the system does not say, enough."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    values = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")]
    return values[0] if values else NEEDED


pytestmark = pytest.mark.skipif(available() < NEEDED, reason="needs 8 GiB of memory")
_DRAWN = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fill(shape: torch.Size, name: str) -> Tensor:
    """Weights that keep what passes through at unit size, none at a value of its birth."""
    tensor = torch.empty(shape, dtype=torch.float64)
    for part in tensor.view(-1).split(len(_DRAWN)):
        part.copy_(_DRAWN[: len(part)])
    if tensor.ndim > 1:
        return tensor.mul_(tensor[0].numel() ** -0.5)
    return tensor.add_(0.3) if "mix_factor" in name else tensor.mul_(0.1).add_(name.endswith("weight"))


def share(ours: nn.Module, theirs: nn.Module) -> None:
    """Give modules without memory the same random weights."""
    state = {name: fill(tensor.shape, name) for name, tensor in theirs.state_dict().items() if tensor.ndim}
    for module in (theirs, ours):
        module.load_state_dict(state, assign=True)
        module.eval()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype == torch.float64 and theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * float(theirs.abs().max()))


def build(model: ModelConfig) -> tuple[UNet, nn.Module]:
    """A whole UNet of ours and of diffusers, without memory for weights."""
    assert isinstance(model.content, UNetConfig)
    ours = build_empty(UNet, model.content)
    with torch.device("meta"):
        if model.adapter is None:
            types = {name: tuple(f"{kind}SpatioTemporal" for kind in kinds) for name, kinds in KINDS.items()}
            return ours, UNetSpatioTemporalConditionModel(**WHOLE, **types, num_attention_heads=(5, 10, 20, 20))
        ours.attach(build_empty(MotionAdapter, model.adapter))
        types = {name: tuple(f"{kind}Motion" for kind in kinds) for name, kinds in KINDS.items()}
        return ours, UNetMotionModel(
            **{**WHOLE, **types, "cross_attention_dim": 768, "num_attention_heads": 8},
            **{"use_motion_mid_block": True, "motion_num_attention_heads": 8, "motion_max_seq_length": 32},
        )


def read(stage: Stage, time: Tensor, states: Tensor, *, blends: bool) -> Conditions:
    """What the layers of one stage of ours read."""
    layers = [layer.blocks() if hasattr(layer, "blocks") else (layer,) for layer in stage.resnets]
    shifts = {block: block.time_emb_proj(F.silu(time)) for both in layers for block in both}
    readers = [reader for part in getattr(stage, "attentions", ()) for reader in part.readers()]
    return Conditions(
        CLIPS, shifts, {each: each.read_token(states) if blends else each.project(states) for each in readers}
    )


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("model", [ANIMATEDIFF_LIGHTNING, SVD], ids=["animatediff", "svd"])
@torch.no_grad()
def test_a_block_is_diffusers(model: ModelConfig, name: str) -> None:
    whole, peer = build(model)
    ours, theirs = whole.get_submodule(name), peer.get_submodule(name)
    assert isinstance(ours, Stage) and isinstance(model.content, UNetConfig)
    share(ours, theirs)
    blends, width, level = model.vision is not None, model.content.cross_attention_dim, LEVELS[name]
    time, states = draw(CLIPS, 1280, seed=1), draw(CLIPS, 1 if blends else 7, width, seed=2)
    conditions = read(ours, time, states, blends=blends)
    settings: dict[str, Any] = {"temb": time.repeat_interleave(FRAMES, dim=0)}
    settings |= {"image_only_indicator": torch.zeros(CLIPS, FRAMES)} if blends else {"num_frames": FRAMES}
    if hasattr(ours, "attentions"):
        settings["encoder_hidden_states"] = states.repeat_interleave(FRAMES, dim=0)
    height, width = (side >> level for side in SIZE)

    def features(channels: int, seed: int) -> Tensor:
        return draw(CLIPS * FRAMES, channels, height, width, seed=seed)

    if isinstance(ours, UpStage):
        before, *others = (WIDTHS[min(level + 1, 3)], WIDTHS[level], WIDTHS[level])
        inputs = [layer.spatial_res_block if blends else layer for layer in theirs.resnets]
        joined = [layer.in_channels - own for layer, own in zip(inputs, (before, *others), strict=True)]
        x, skips = features(before, 3), [features(channels, 4 + i) for i, channels in enumerate(reversed(joined))]
        # below them, a skip of the next level gives the size
        got = [ours(x, [torch.empty(1, 1, 2 * height, 2 * width), *skips], conditions)]
        expected = [theirs(x, tuple(skips), **settings)]
    elif isinstance(ours, DownStage):
        x = features(WIDTHS[max(level - 1, 0)], 3)
        got, (_, expected) = ours(x, conditions), theirs(x, **settings)
    else:
        x = features(WIDTHS[-1], 3)
        got, expected = [ours(x, conditions)], [theirs(x, **settings)]
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other)


@torch.no_grad()
def test_the_temporal_vae_is_diffusers() -> None:
    assert SVD.vae is not None
    ours = build_empty(KlVae, SVD.vae)
    with torch.device("meta"):
        theirs = AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512), layers_per_block=2
        )
    share(ours, theirs)
    latents = draw(FRAMES, 4, 2, 3)
    expected = theirs.decode(latents, num_frames=FRAMES).sample
    assert_close(ours.decode(latents), expected)
    for got, same in zip(ours.encode(expected), moments(theirs, expected), strict=True):
        assert_close(got, same)


def moments(vae: AutoencoderKLTemporalDecoder, pictures: Tensor) -> Iterator[Tensor]:
    distribution = vae.encode(pictures).latent_dist
    yield from (distribution.mean, distribution.logvar)


@torch.no_grad()
def test_layers_of_the_vision_encoder_are_transformers() -> None:
    """Two of its 32, which are alike."""
    assert SVD.vision is not None
    config = replace(SVD.vision, num_hidden_layers=2)
    ours = build_empty(ClipVisionModel, config)
    with torch.device("meta"):
        theirs = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                **{"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 2, "num_attention_heads": 16},
                **{"patch_size": 14, "image_size": 224, "projection_dim": 1024, "hidden_act": "gelu"},
            )
        )
    share(ours, theirs)
    # the only buffer counts positions
    theirs.vision_model.embeddings.position_ids = torch.arange(257)[None]
    pictures = draw(1, 3, 224, 224)
    assert_close(ours(pictures), theirs(pictures).image_embeds)
