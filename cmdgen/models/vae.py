"""The KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752).

Where its configuration has `temporal` "blend", as in Stable Video Diffusion, the decoder looks along
time, too: all frames of a clip are decoded together, (T, c, h, w).

Parameter names equal diffusers' `AutoencoderKL` and `AutoencoderKLTemporalDecoder`: its files load
here, ours load there.
"""

from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn

from cmdgen.config import VaeConfig
from cmdgen.models.layers import Attention, Conv2d, Downsample, KeysValues, ResnetBlock, Upsample, normalise
from cmdgen.models.pretrained import Pretrained
from cmdgen.models.temporal import BlendedResnet, TemporalConv, clip_view
from cmdgen_kernels import wide_attention

_EPS, _TIME_EPS = 1e-6, 1e-5
_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class SpatialAttention(Attention):
    """Single-head attention over the positions of a feature map, around a skip."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__(channels, channels, heads=1, bias=True, attend=wide_attention)
        self.group_norm = nn.GroupNorm(groups, channels, eps=_EPS)

    def forward(self, x: Tensor, context: KeysValues | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        tokens = normalise(self.group_norm, x, activation="none")
        tokens = rearrange(tokens, "b c h w -> b (h w) c")
        return x + rearrange(super().forward(tokens), "b (h w) c -> b c h w", h=x.shape[2])


def _resnet(inputs: int, channels: int, groups: int, *, blends: bool) -> nn.Module:
    eps = _EPS, _TIME_EPS
    return BlendedResnet(inputs, channels, groups, eps) if blends else ResnetBlock(inputs, channels, groups, _EPS)


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, *, groups: int, layers: int = 2, blends: bool = False) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups=groups)])
        self.resnets = nn.ModuleList(_resnet(channels, channels, groups, blends=blends) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.resnets[0](x)
        # diffusers' decoder of clips has as many residual blocks here as layers, and uses two
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=False):
            x = resnet(attention(x))
        return x


class Level(nn.Module):
    """Residual blocks, then another resolution except in the last level."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, *, blends: bool = False) -> None:
        super().__init__()
        inputs = (in_channels, *(out_channels,) * (layers - 1))
        self.resnets = nn.ModuleList(_resnet(n, out_channels, groups, blends=blends) for n in inputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H/2, W/2) or (B, C', 2H, 2W)."""
        for layers in self.children():
            for layer in layers.children():
                x = layer(x)
        return x


class DownBlock(Level):
    """A level of the encoder: halves the resolution."""

    def __init__(self, before: int, width: int, config: VaeConfig, *, last: bool) -> None:
        super().__init__(before, width, config.layers_per_block, config.norm_num_groups)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(width, padding=0)])


class UpBlock(Level):
    """A level of the decoder: doubles the resolution."""

    def __init__(self, before: int, width: int, config: VaeConfig, *, last: bool) -> None:
        layers, blends = config.layers_per_block + 1, config.temporal == "blend"
        super().__init__(before, width, layers, config.norm_num_groups, blends=blends)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(width)])


def _levels(kind: type[DownBlock | UpBlock], widths: tuple[int, ...], config: VaeConfig) -> nn.ModuleList:
    pairs = enumerate(pairwise((widths[0], *widths)), 1)
    return nn.ModuleList(kind(before, width, config, last=i == len(widths)) for i, (before, width) in pairs)


class Encoder(nn.Module):
    """Pixels to the moments of the latent distribution, before `quant_conv`."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = _levels(DownBlock, widths, config)
        self.mid_block = MidBlock(widths[-1], groups=groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2c, h, w)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(normalise(self.conv_norm_out, self.mid_block(x)))


class Decoder(nn.Module):
    """Latents, after `post_quant_conv`, to pixels."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        blends = config.temporal == "blend"
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        layers = config.layers_per_block if blends else 2
        self.mid_block = MidBlock(widths[0], groups=groups, layers=layers, blends=blends)
        self.up_blocks = _levels(UpBlock, widths, config)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1)
        self.time_conv_out = TemporalConv(config.out_channels) if blends else None

    def forward(self, z: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, 3, H, W)."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        x = self.conv_out(normalise(self.conv_norm_out, x))
        if self.time_conv_out is None:
            return x
        return rearrange(self.time_conv_out(clip_view(x, 1)), "1 c t (h w) -> t c h w", h=x.shape[2])


class KlVae(Pretrained[VaeConfig]):
    """Frames to latents, `config.stride` times smaller along each side, and back."""

    config_type = VaeConfig

    def __init__(self, config: VaeConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        if config.temporal == "none":
            self.post_quant_conv = Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and log variance, each (B, c, h, w), unscaled."""
        self.check_size(x)
        x = x.contiguous(memory_format=torch.channels_last)
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def check_size(self, x: Tensor) -> None:
        """(B, 3, H, W) -> (): ValueError where a side is not a multiple of the stride."""
        stride = self.config.stride
        if x.shape[2] % stride or x.shape[3] % stride:
            height, width = x.shape[2:]
            raise ValueError(f"frame size {height}x{width} is not a multiple of {stride}")

    def decode(self, z: Tensor) -> Tensor:
        """(B, c, h, w) unscaled -> (B, 3, H, W), about [-1, 1]."""
        z = z.contiguous(memory_format=torch.channels_last)
        return self.decoder(z if self.config.temporal == "blend" else self.post_quant_conv(z))

    def to_latents(self, frames: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, c, h, w) scaled: the posterior's mean."""
        return self.encode(frames)[0] * self.config.scaling_factor

    def from_latents(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) scaled -> (B, 3, H, W), about [-1, 1]."""
        return self.decode(latents / self.config.scaling_factor)

    @staticmethod
    def rename_stored(name: str) -> str:
        """Map the names of attention before diffusers 0.17, as in stock files, to today's."""
        for old, new in _OLD_NAMES.items():
            if "attentions" in name:
                name = name.replace(old, new)
        return name
