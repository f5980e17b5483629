"""The Stable Diffusion UNet (Rombach et al. 2022, arXiv:2112.10752), also with layers along time.

Timestep and text are projected apart from the rest. A sampler knows its timesteps beforehand and
its text stays: it projects all of them once (`project_time`, `project_text`) and passes the part of
each step to `denoise`. `forward` does one after the other.

Of a video, frames are rows of the samples, (B T, C, h, w), and clips, B, are rows of all else: T is
told from these. The layers along time are AnimateDiff's, which `attach` adds, or Stable Video
Diffusion's, where the configuration has `temporal` "blend": that one reads an image, one token.

Parameter names equal diffusers' `UNet2DConditionModel`, `UNetMotionModel` and
`UNetSpatioTemporalConditionModel`: its files load here, ours load there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmdgen.config import UNetConfig
from cmdgen.models.layers import Attention, Conv2d, Downsample, ResnetBlock, TimeEmbedding, Upsample, normalise
from cmdgen.models.pretrained import Pretrained
from cmdgen.models.temporal import BlendedResnet, BlendedTransformer, MotionAdapter, MotionModule
from cmdgen.models.transformer import Conditions, SpatialTransformer

_EPS, _SMALL_EPS = 1e-5, 1e-6
# of a layer: residual block, attention, motion module
WHOLE = range(3)


class Stage(nn.Module):
    """The layers at one resolution: residual blocks, each with attention where `heads` > 0."""

    def __init__(self, in_channels: tuple[int, ...], channels: int, heads: int, config: UNetConfig) -> None:
        super().__init__()
        groups, time_width = config.norm_num_groups, 4 * config.block_out_channels[0]
        blends = config.temporal == "blend"
        # as diffusers has it: the stages that train with a smaller one
        eps = _SMALL_EPS if blends and (isinstance(self, UpStage) or heads) else _EPS
        self.resnets = nn.ModuleList(
            BlendedResnet(before, channels, groups, (eps, eps), time_width)
            if blends
            else ResnetBlock(before, channels, groups, eps, time_width)
            for before in in_channels
        )
        if heads:
            self.add_attention(len(in_channels), channels, heads, config)

    def add_attention(self, layers: int, channels: int, heads: int, config: UNetConfig) -> None:
        """Add a transformer for each of so many layers."""
        kind = BlendedTransformer if config.temporal == "blend" else SpatialTransformer
        self.attentions = nn.ModuleList(kind(channels, heads, config) for _ in range(layers))

    def layer(self, i: int, x: Tensor, conditions: Conditions, part: range = WHOLE) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W): a `part` of the three operators of a layer."""
        attention, motion = self.readers(i)
        if 0 in part:
            x = self.residual(i, x, conditions)
        if 1 in part and attention is not None:
            x = attention(x, conditions)
        # a still is what Stable Diffusion makes, without it
        return motion(x, conditions.clips) if 2 in part and motion is not None and len(x) > conditions.clips else x

    def readers(self, i: int) -> tuple[SpatialTransformer | None, MotionModule | None]:
        """Return what follows a layer's residual block, where there is such."""
        layers: list[Any] = [getattr(self, name, None) for name in ("attentions", "motion_modules")]
        attention, motion = (None if each is None or i >= len(each) else each[i] for each in layers)
        return attention, motion

    def residual(self, i: int, x: Tensor, conditions: Conditions) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W): a layer's residual block."""
        resnet = self.resnets[i]
        if isinstance(resnet, BlendedResnet):
            blocks = resnet.spatial_res_block, resnet.temporal_res_block
            return resnet(x, conditions.clips, *(conditions.shifts[block] for block in blocks))
        return resnet(x, conditions.shifts[resnet])


class DownStage(Stage):
    """Layers, then halving except in the last stage; every intermediate result is a skip."""

    def __init__(self, inputs: tuple[int, ...], channels: int, heads: int, config: UNetConfig, *, last: bool) -> None:
        super().__init__(inputs, channels, heads, config)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(channels, padding=1)])

    def forward(self, x: Tensor, conditions: Conditions) -> list[Tensor]:
        """(B, C, H, W) -> the skips, the last of which goes on down."""
        skips = []
        for i in range(len(self.resnets)):
            x = self.layer(i, x, conditions)
            skips.append(x)
        return [*skips, *(down(x) for down in self.downsamplers)]


class MidStage(Stage):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, heads: int, config: UNetConfig) -> None:
        super().__init__((channels, channels), channels, 0, config)
        self.add_attention(1, channels, heads, config)

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.layer(1, self.layer(0, x, conditions), conditions)


class UpStage(Stage):
    """Layers that each take one skip, then doubling except in the last stage."""

    def __init__(self, inputs: tuple[int, ...], channels: int, heads: int, config: UNetConfig, *, last: bool) -> None:
        super().__init__(inputs, channels, heads, config)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(channels)])

    def forward(self, x: Tensor, skips: list[Tensor], conditions: Conditions) -> Tensor:
        """(B, C, H, W) -> (B, C', 2H, 2W); takes its skips off the end of the list.

        The first skip of all stays there, and so the last layer of the last stage does not run.
        """
        for i in range(min(len(self.resnets), len(skips) - 1)):
            x = self.layer(i, torch.cat([x, skips.pop()], dim=1), conditions)
        for up in self.upsamplers:
            # an odd side is not twice its half
            x = up(x, size=skips[-1].shape[2:])
        return x


class UNet(Pretrained[UNetConfig]):
    """Text-conditional UNet; whether it predicts noise or velocity is the schedule's to say."""

    config_type = UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        widths, levels = config.block_out_channels, len(config.block_out_channels)
        for name in ("down_block_types", "up_block_types", "attention_head_dim"):
            value = getattr(config, name)
            if not isinstance(value, int) and len(value) != levels:
                raise ValueError(f"{name} has {len(value)} entries, block_out_channels {levels}")
        heads = config.attention_head_dim
        heads = (heads,) * levels if isinstance(heads, int) else heads

        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0], 4 * widths[0])
        if config.projection_class_embeddings_input_dim is not None:
            self.add_embedding = TimeEmbedding(
                config.projection_class_embeddings_input_dim, 4 * widths[0], 4 * widths[0]
            )
        self.down_blocks, skips = nn.ModuleList(), [widths[0]]
        for i, kind in enumerate(config.down_block_types):
            last, width = i == levels - 1, widths[i]
            n = heads[i] if kind.startswith("CrossAttn") else 0
            inputs = (skips[-1], *(width,) * (config.layers[i] - 1))
            self.down_blocks.append(DownStage(inputs, width, n, config, last=last))
            skips += [width] * (config.layers[i] + (not last))
        self.mid_block = None if config.mid_block_type is None else MidStage(widths[-1], heads[-1], config)
        self.up_blocks, before = nn.ModuleList(), widths[-1]
        for i, kind in zip(reversed(range(levels)), config.up_block_types, strict=True):
            width = widths[i]
            n = heads[i] if kind.startswith("CrossAttn") else 0
            inputs = (before, *(width,) * config.layers[i])
            inputs = tuple(channels + skips.pop() for channels in inputs)
            self.up_blocks.append(UpStage(inputs, width, n, config, last=i == 0))
            before = width
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=_EPS)
        self.conv_out = Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, numbers: Tensor | None = None
    ) -> Tensor:
        """(B, C, h, w), (B,), (B, L, D) -> (B, C, h, w); of clips, samples are (B T, C, h, w)."""
        time = self.project_time(timestep.expand(len(encoder_hidden_states)), numbers)
        return self.denoise(sample, time, *self.project_text(encoder_hidden_states))

    def project_time(self, timestep: Tensor, numbers: Tensor | None = None) -> Tensor:
        """(B,), (B, n) where the UNet reads n numbers -> (B, P): the shifts of all residual blocks."""
        time = self.time_embedding(timestep)  # (B, D)
        if numbers is not None:
            time = time + self.add_embedding(numbers)
        time = F.silu(time)
        return torch.cat([resnet.time_emb_proj(time) for resnet in self._resnets()], dim=-1)

    def project_text(self, states: Tensor) -> tuple[Tensor, ...]:
        """(B, L, D) -> keys, values of each attention to the text, (B, N, L, D / N) each.

        Where that is one token, (B, 1, D) -> what each attention to it is, (B, 1, D').
        """
        if self.config.temporal == "blend":
            return tuple(reader.read_token(states) for reader in self._readers())
        return tuple(part for reader in self._readers() for part in reader.project(states))

    def denoise(self, sample: Tensor, time: Tensor, *text: Tensor) -> Tensor:
        """(B, C, h, w), (B, P), the projected text -> (B, C, h, w)."""
        conditions = self.hand_out(time, text)
        x = self.embed(sample)
        return self.tail(self.trunk(x, conditions), x, conditions)

    def hand_out(self, time: Tensor, text: tuple[Tensor, ...]) -> Conditions:
        """(B, P), the projected text -> both by layer."""
        resnets, readers = self._resnets(), self._readers()
        shifts = time.split([resnet.conv1.out_channels for resnet in resnets], dim=-1)
        parts = text if self.config.temporal == "blend" else zip(text[::2], text[1::2], strict=True)
        return Conditions(
            len(time), dict(zip(resnets, shifts, strict=True)), text=dict(zip(readers, parts, strict=True))
        )

    def attach(self, adapter: MotionAdapter) -> None:
        """Add motion modules; ValueError where they are those of another UNet."""
        config, other = self.config, adapter.config
        pairs = {
            "block_out_channels": (other.block_out_channels, config.block_out_channels),
            "layers": (other.layers, config.layers),
            "mid blocks": (other.use_motion_mid_block and self.mid_block is None, False),
        }
        for name, (got, expected) in pairs.items():
            if got != expected:
                raise ValueError(f"{name} {got} of the motion modules are not the UNet's, {expected}")
        for ours, theirs in zip(self.down_blocks, adapter.down_blocks, strict=True):
            ours.motion_modules = theirs.motion_modules
        if self.mid_block is not None and other.use_motion_mid_block:
            self.mid_block.motion_modules = adapter.mid_block.motion_modules
        for ours, theirs in zip(self.up_blocks, adapter.up_blocks, strict=True):
            ours.motion_modules = theirs.motion_modules

    @staticmethod
    def rename_stored(name: str) -> str | None:
        """Skip motion modules, which `MotionAdapter` reads, in the file of a UNet that has them."""
        return None if ".motion_modules." in name else name

    def _stages(self) -> tuple[Any, ...]:
        return (*self.down_blocks, *filter(None, [self.mid_block]), *self.up_blocks)

    def _resnets(self) -> list[ResnetBlock]:
        # at every step: `modules` would take 2 % of it
        layers = (layer for stage in self._stages() for layer in stage.resnets)
        return [block for layer in layers for block in (layer.blocks() if hasattr(layer, "blocks") else (layer,))]

    def _readers(self) -> list[Attention]:
        """List the attentions to the text."""
        parts = (part for stage in self._stages() for part in getattr(stage, "attentions", ()))
        return [reader for part in parts for reader in part.readers()]

    def embed(self, sample: Tensor) -> Tensor:
        """(B, C, h, w) -> the first skip (B, C', h, w)."""
        return self.conv_in(sample.contiguous(memory_format=torch.channels_last))

    def trunk(self, x: Tensor, conditions: Conditions) -> Tensor:
        """(B, C, h, w) -> the feature (B, C, h, w) that goes into the last layer."""
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], conditions)
        x = skips[-1] if self.mid_block is None else self.mid_block(skips[-1], conditions)
        for block in self.up_blocks:
            x = block(x, skips, conditions)
        return x

    def deepen(self, feature: Tensor, first: Tensor, conditions: Conditions, cut: int) -> Tensor:
        """(B, C, h, w) x 2 -> (B, C', h, w): a feature, after so many operators of the last layer."""
        return feature if cut == 0 else self._last(torch.cat([feature, first], dim=1), conditions, range(cut))

    def tail(self, feature: Tensor, first: Tensor | None, conditions: Conditions, cut: int = 0) -> Tensor:
        """(B, C, h, w) x 2 -> (B, C', h, w): what is left of the last layer; without a `cut`, the first skip joins."""
        x = feature if cut or first is None else torch.cat([feature, first], dim=1)
        x = self._last(x, conditions, range(cut, len(WHOLE)))
        return self.conv_out(normalise(self.conv_norm_out, x))

    def _last(self, x: Tensor, conditions: Conditions, part: range) -> Tensor:
        last = self.up_blocks[-1]
        assert isinstance(last, UpStage)
        return last.layer(len(last.resnets) - 1, x, conditions, part)
