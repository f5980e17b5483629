"""The Stable Diffusion UNet (Rombach et al. 2022, arXiv:2112.10752): denoises the content frame.

Timestep and text are projected apart from the rest. A sampler knows its timesteps beforehand and
its text stays: it projects all of them once (`project_time`, `project_text`) and passes the part of
each step to `denoise`. `forward` does one after the other.

Parameter names equal diffusers' `UNet2DConditionModel`: its files load here, ours load there.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cmdgen.config import UNetConfig
from cmdgen.models.attention import self_attention
from cmdgen.models.layers import (
    Attention,
    Conv2d,
    Downsample,
    KeysValues,
    ResnetBlock,
    Upsample,
    add_normalised,
    normalise,
    timestep_embedding,
)
from cmdgen.models.pretrained import Pretrained
from cmdgen_kernels import geglu

_EPS = 1e-5


class Conditions(NamedTuple):
    """Timestep and text as the layers read them, by layer."""

    shifts: dict[nn.Module, Tensor]
    text: dict[nn.Module, KeysValues]


class TimeEmbedding(nn.Module):
    """Two linear layers on the sinusoids of the timestep."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, time_width)
        self.linear_2 = nn.Linear(time_width, time_width)

    def forward(self, timestep: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        weight = self.linear_1.weight
        # Stable Diffusion's are float32 whatever the weights are, also where these are float64
        sinusoids = timestep_embedding(timestep, weight.shape[1]).to(weight.dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class GatedLinear(nn.Module):
    """GEGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner_width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D')."""
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # diffusers has a dropout between the two
        self.net = nn.ModuleList([GatedLinear(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Attention among positions, attention to the text, feed-forward, each around a skip."""

    def __init__(self, width: int, heads: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        attend = self_attention(config, width // heads)
        self.attn1 = Attention(width, width, heads, bias=False, attend=attend)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, config.cross_attention_dim, heads, bias=False)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        """(B, H*W, D) -> (B, H*W, D)."""
        x, h = add_normalised(self.norm2, x, self.attn1(self.norm1(x)))
        x, h = add_normalised(self.norm3, x, self.attn2(h, conditions.text[self.attn2]))
        return x + self.ff(h)


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a feature map, around a skip."""

    def __init__(self, channels: int, heads: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        # the same map either way: Stable Diffusion 1 stores it as a 1x1 convolution, 2 as a matrix
        linear = config.use_linear_projection
        self.proj_in, self.proj_out = (
            nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1) for _ in range(2)
        )
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, config)])

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        tokens = rearrange(normalise(self.norm, x, activation="none"), "b c h w -> b (h w) c")
        tokens = F.linear(tokens, self.proj_in.weight.flatten(1), self.proj_in.bias)
        tokens = self.transformer_blocks[0](tokens, conditions)  # (B, H*W, C)
        tokens = F.linear(tokens, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2])


class Stage(nn.Module):
    """The layers at one resolution: residual blocks, each with attention where `heads` > 0."""

    def __init__(self, in_channels: tuple[int, ...], channels: int, heads: int, config: UNetConfig) -> None:
        super().__init__()
        groups, time_width = config.norm_num_groups, 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(ResnetBlock(before, channels, groups, _EPS, time_width) for before in in_channels)
        if heads:
            self.attentions = nn.ModuleList(SpatialTransformer(channels, heads, config) for _ in in_channels)

    def layer(self, i: int, x: Tensor, conditions: Conditions) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        x = self.resnets[i](x, conditions.shifts[self.resnets[i]])
        return self.attentions[i](x, conditions) if hasattr(self, "attentions") else x


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
        self.attentions = nn.ModuleList([SpatialTransformer(channels, heads, config)])

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        last = self.resnets[1]
        return last(self.layer(0, x, conditions), conditions.shifts[last])


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
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0])
        self.down_blocks, skips = nn.ModuleList(), [widths[0]]
        for i, kind in enumerate(config.down_block_types):
            last, width = i == levels - 1, widths[i]
            n = heads[i] if kind.startswith("CrossAttn") else 0
            inputs = (skips[-1], *(width,) * (config.layers_per_block - 1))
            self.down_blocks.append(DownStage(inputs, width, n, config, last=last))
            skips += [width] * (config.layers_per_block + (not last))
        self.mid_block = MidStage(widths[-1], heads[-1], config)
        self.up_blocks, before = nn.ModuleList(), widths[-1]
        for i, kind in zip(reversed(range(levels)), config.up_block_types, strict=True):
            width = widths[i]
            n = heads[i] if kind.startswith("CrossAttn") else 0
            inputs = (before, *(width,) * config.layers_per_block)
            inputs = tuple(channels + skips.pop() for channels in inputs)
            self.up_blocks.append(UpStage(inputs, width, n, config, last=i == 0))
            before = width
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=_EPS)
        self.conv_out = Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """(B, C, h, w), (B,), (B, L, D) -> (B, C, h, w)."""
        time = self.project_time(timestep.expand(sample.shape[0]))
        return self.denoise(sample, time, *self.project_text(encoder_hidden_states))

    def project_time(self, timestep: Tensor) -> Tensor:
        """(B,) -> (B, P): the shifts of all residual blocks."""
        time = F.silu(self.time_embedding(timestep))  # (B, D)
        return torch.cat([resnet.time_emb_proj(time) for resnet in self._resnets()], dim=-1)

    def project_text(self, states: Tensor) -> tuple[Tensor, ...]:
        """(B, L, D) -> keys, values of each attention to the text, (B, N, L, D / N) each."""
        return tuple(part for reader in self._readers() for part in reader.project(states))

    def denoise(self, sample: Tensor, time: Tensor, *text: Tensor) -> Tensor:
        """(B, C, h, w), (B, P), the projected text -> (B, C, h, w)."""
        conditions = self.hand_out(time, text)
        x = self.embed(sample)
        return self.tail(self.trunk(x, conditions), x, conditions)

    def hand_out(self, time: Tensor, text: tuple[Tensor, ...]) -> Conditions:
        """(B, P), the projected text -> both by layer."""
        resnets = self._resnets()
        shifts = time.split([resnet.conv1.out_channels for resnet in resnets], dim=-1)
        pairs = zip(text[::2], text[1::2], strict=True)
        return Conditions(
            shifts=dict(zip(resnets, shifts, strict=True)), text=dict(zip(self._readers(), pairs, strict=True))
        )

    def _stages(self) -> tuple[Any, ...]:
        return (*self.down_blocks, self.mid_block, *self.up_blocks)

    def _resnets(self) -> list[ResnetBlock]:
        return [resnet for stage in self._stages() for resnet in stage.resnets]

    def _readers(self) -> list[Attention]:
        """List the attentions to the text."""
        readers = (getattr(stage, "attentions", ()) for stage in self._stages())
        return [part.transformer_blocks[0].attn2 for parts in readers for part in parts]

    def embed(self, sample: Tensor) -> Tensor:
        """(B, C, h, w) -> the first skip (B, C', h, w)."""
        return self.conv_in(sample.contiguous(memory_format=torch.channels_last))

    def trunk(self, x: Tensor, conditions: Conditions) -> Tensor:
        """(B, C, h, w) -> the feature (B, C, h, w) that goes into the last layer."""
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], conditions)
        x = self.mid_block(skips[-1], conditions)
        for block in self.up_blocks:
            x = block(x, skips, conditions)
        return x

    def tail(self, feature: Tensor, first: Tensor, conditions: Conditions) -> Tensor:
        """(B, C, h, w) x 2 -> (B, C', h, w): the last layer, on a feature and the first skip."""
        last = self.up_blocks[-1]
        assert isinstance(last, UpStage)
        x = last.layer(len(last.resnets) - 1, torch.cat([feature, first], dim=1), conditions)
        return self.conv_out(normalise(self.conv_norm_out, x))
