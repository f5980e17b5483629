"""Layers that look along time, of UNets and VAEs whose other layers see single frames.

    AnimateDiff   motion modules between the layers of a Stable Diffusion UNet, which stays as it is
                  (Guo et al. 2023, arXiv:2307.04725)
    blended       of Stable Video Diffusion: beside a layer of one frame, one along time; a learned
                  share of either is the result (Blattmann et al. 2023, arXiv:2311.15127)

Frames are rows: a feature map is (B T, C, H, W), channels_last. Seen as (B, C, T, H W) it is a
channels_last map, too, of whose sides one is time: its norm takes the moments of a whole clip, and
a convolution along time has a filter of 3x1. Seen as (B, T, H W, C) it holds tokens. Both are
views: nothing is transposed in memory.

Parameter names equal diffusers' `MotionAdapter` and `UNetSpatioTemporalConditionModel`.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cmdgen.config import MotionConfig, UNetConfig
from cmdgen.models.layers import (
    Attention,
    FeedForward,
    ResnetBlock,
    TimeEmbedding,
    add_normalised,
    normalise,
    normalise_tokens,
)
from cmdgen.models.pretrained import Pretrained
from cmdgen.models.transformer import Conditions, Layers, SpatialTransformer
from cmdgen_kernels import time_attention

# what the authors call it, and diffusers
_OLD_NAMES = {
    ".temporal_transformer.": ".",
    ".attention_blocks.0.pos_encoder.": ".pos_embed.",
    ".attention_blocks.0.": ".attn1.",
    ".attention_blocks.1.": ".attn2.",
    ".norms.0.": ".norm1.",
    ".norms.1.": ".norm2.",
    ".ff_norm.": ".norm3.",
}


def positions(length: int, width: int) -> Tensor:
    """() -> (1, length, width) float32: sines and cosines of each position, in turn.

    Sec. 3.5 of Vaswani et al. 2017 (arXiv:1706.03762), in the paper's order.
    """
    rates = torch.exp(torch.arange(0, width, 2) * (-torch.log(torch.tensor(10000.0)) / width))
    angle = torch.arange(length)[:, None] * rates
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[None]


class TimeAttention(Attention):
    """Attention of each position to itself at all times."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, width, heads, bias=False)

    def forward(self, x: Tensor, context: object = None) -> Tensor:
        """(B, T, P, D) -> (B, T, P, D)."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in self.split(x))
        return self.to_out[0](time_attention(q, k, v).flatten(-2))


class PositionEmbedding(nn.Module):
    """Sinusoids of the frames' indices, a buffer that files hold."""

    pe: Tensor

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("pe", positions(length, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, P, D) -> (B, T, P, D)."""
        return x + self.pe[0, : x.shape[1], None].to(x.dtype)


class MotionBlock(Layers):
    """Attention along time, twice, and feed-forward, each around a skip."""

    def __init__(self, width: int, config: MotionConfig) -> None:
        heads = config.motion_num_attention_heads
        super().__init__(width, TimeAttention(width, heads), TimeAttention(width, heads))
        # positions join what attention reads, not what is passed on
        self.pos_embed = PositionEmbedding(config.motion_max_seq_length, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, P, D) -> (B, T, P, D)."""
        h = self.pos_embed(normalise_tokens(self.norm1, x))
        x, h = add_normalised(self.norm2, x, self.attn1(h))
        h = self.pos_embed(h)
        x, h = add_normalised(self.norm3, x, self.attn2(h))
        return x + self.ff(h)


class MotionModule(nn.Module):
    """AnimateDiff's: a transformer along time, around a skip."""

    def __init__(self, channels: int, config: MotionConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.motion_norm_num_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([MotionBlock(channels, config)])
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, clips: int) -> Tensor:
        """(B T, C, H, W), B -> (B T, C, H, W)."""
        clip = normalise(self.norm, clip_view(x, clips), activation="none")
        added = self.transform(rearrange(clip, "b c t p -> b t p c"))
        return x + rearrange(added, "b t (h w) c -> (b t) c h w", h=x.shape[2])

    def transform(self, tokens: Tensor) -> Tensor:
        """(B, T, P, C), normalised -> (B, T, P, C): what is added."""
        return self.proj_out(self.transformer_blocks[0](self.proj_in(tokens)))


def clip_view(x: Tensor, clips: int) -> Tensor:
    """(B T, C, H, W), B -> (B, C, T, H W): the same memory."""
    return rearrange(x, "(b t) c h w -> b c t (h w)", b=clips)


class MotionModules(nn.Module):
    """The motion modules of one stage of a UNet."""

    def __init__(self, channels: int, layers: int, config: MotionConfig) -> None:
        super().__init__()
        self.motion_modules = nn.ModuleList(MotionModule(channels, config) for _ in range(layers))


class MotionAdapter(Pretrained[MotionConfig]):
    """The motion modules of a whole UNet, which `UNet.attach` puts into their places."""

    config_type = MotionConfig

    def __init__(self, config: MotionConfig) -> None:
        super().__init__(config)
        widths, levels = config.block_out_channels, list(zip(config.block_out_channels, config.layers, strict=True))
        self.down_blocks = nn.ModuleList(MotionModules(*level, config) for level in levels)
        if config.use_motion_mid_block:
            self.mid_block = MotionModules(widths[-1], 1, config)
        self.up_blocks = nn.ModuleList(MotionModules(width, layers + 1, config) for width, layers in reversed(levels))

    @staticmethod
    def rename_stored(name: str) -> str | None:
        """Map the names of the authors' files to diffusers'; skip what is not of motion modules.

        A UNet that was saved with them has them in its file.
        """
        if ".motion_modules." not in name or name.endswith("attention_blocks.1.pos_encoder.pe"):
            return None
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
        return name


class TemporalConv(nn.Conv3d):
    """A convolution along time, of a map seen as (B, C, T, P)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, P) -> (B, C, T, P)."""
        return F.conv2d(x, self.weight[..., 0], self.bias, padding=(1, 0))


class TemporalResnet(ResnetBlock):
    """A residual block along time, without its skip, of a map seen as (B, C, T, P)."""

    def __init__(self, channels: int, groups: int, eps: float, time_width: int = 0) -> None:
        super().__init__(channels, channels, groups, eps, time_width)
        # in place of convolutions of a frame
        self.conv1, self.conv2 = TemporalConv(channels), TemporalConv(channels)  # type: ignore[assignment]

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """(B, C, T, P), (B, C) -> (B, C, T, P)."""
        return self.conv2(normalise(self.norm2, self.conv1(normalise(self.norm1, x)), shift=shift))


class Mixer(nn.Module):
    """A learned share, the sigmoid of `mix_factor`."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.zeros(1))

    def forward(self) -> Tensor:
        """() -> (1,)."""
        return self.mix_factor.sigmoid()


class BlendedResnet(nn.Module):
    """A residual block of each frame, then one along time, of which a share counts.

    The share that is learned is the frames', in the UNet, or time's, in the VAE.
    """

    def __init__(self, inputs: int, channels: int, groups: int, eps: tuple[float, float], time_width: int = 0) -> None:
        super().__init__()
        self.spatial_res_block = ResnetBlock(inputs, channels, groups, eps[0], time_width)
        self.temporal_res_block = TemporalResnet(channels, groups, eps[1], time_width)
        self.time_mixer = Mixer()
        self.learns_time = not time_width

    def blocks(self) -> tuple[ResnetBlock, ResnetBlock]:
        """Return both blocks, which the time reaches in turn."""
        return self.spatial_res_block, self.temporal_res_block

    def forward(self, x: Tensor, clips: int = 1, shift: Tensor | None = None, later: Tensor | None = None) -> Tensor:
        """(B T, C, H, W), B, the shifts (B, C') of both blocks -> (B T, C', H, W)."""
        x = self.spatial_res_block(x, shift)
        added = self.temporal_res_block(clip_view(x, clips), later)
        return x + self.share() * rearrange(added, "b c t (h w) -> (b t) c h w", h=x.shape[2])

    def share(self) -> Tensor:
        """() -> (1,): time's."""
        return self.time_mixer() if self.learns_time else 1 - self.time_mixer()


class FrameBlock(Layers):
    """Feed-forward, attention along time, to the image, feed-forward, each around a skip."""

    def __init__(self, width: int, heads: int, config: UNetConfig) -> None:
        # of one token: neither its norm nor its queries and keys matter
        reader = Attention(width, config.cross_attention_dim, heads, bias=False)
        super().__init__(width, TimeAttention(width, heads), reader)
        self.norm_in, self.ff_in = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        """(B, T, P, D), (B, 1, D) -> (B, T, P, D)."""
        x, h = add_normalised(self.norm1, x, self.ff_in(normalise_tokens(self.norm_in, x)))
        x = x + self.attn1(h) + token[:, None]
        # the feed-forward is where memory peaks
        del h
        return x + self.ff(normalise_tokens(self.norm3, x))


class BlendedTransformer(SpatialTransformer):
    """A transformer block of each frame, then one along time; a learned share of either."""

    def __init__(self, channels: int, heads: int, config: UNetConfig) -> None:
        super().__init__(channels, heads, config)
        self.temporal_transformer_blocks = nn.ModuleList([FrameBlock(channels, heads, config)])
        self.time_pos_embed = TimeEmbedding(channels, 4 * channels, channels)
        self.time_mixer = Mixer()

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        """(B T, C, H, W) -> (B T, C, H, W)."""
        still = self.transform(x, conditions).unflatten(0, (conditions.clips, -1))  # (B, T, P, C)
        added = self.leave(self.move(still, conditions))
        return x + rearrange(added, "b t (h w) c -> (b t) c h w", h=x.shape[2])

    def move(self, still: Tensor, conditions: Conditions) -> Tensor:
        """(B, T, P, C) -> (B, T, P, C): along time, a share of each."""
        (block,) = self._frame_blocks()
        index = self.time_pos_embed(torch.arange(still.shape[1], device=still.device))  # (T, C)
        token = conditions.text[block.attn2]
        assert isinstance(token, Tensor), "the image is one token"
        moving = block(still + index[:, None], token)
        return moving.lerp(still, self.time_mixer())

    def readers(self) -> list[Attention]:
        """List the attentions to the image."""
        return super().readers() + [block.attn2 for block in self._frame_blocks()]

    def _frame_blocks(self) -> list[FrameBlock]:
        return [block for block in self.temporal_transformer_blocks if isinstance(block, FrameBlock)]
