"""TAESD: a VAE that is small by design, distilled from a large one (Ollin Boer Bohan 2023).

Three 3x3 convolutions around a skip, rectified; no norm, no attention. Parameter names equal
diffusers' `AutoencoderTiny`: its files load here, ours load there.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cmdgen.config import TinyConfig
from cmdgen.models.pretrained import Pretrained

# latents are squashed into this range
_LARGEST = 3


class Block(nn.Module):
    """Three convolutions around a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return (self.conv(x) + x).relu_()


class Half(nn.Module):
    """Encoder or decoder: layers one after another."""

    def __init__(self, layers: Iterator[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)


class TinyVae(Pretrained[TinyConfig]):
    """Frames to scaled latents, without noise, and back."""

    config_type = TinyConfig

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        halves = {
            "encoder": (config.encoder_block_out_channels, config.num_encoder_blocks),
            "decoder": (config.decoder_block_out_channels, config.num_decoder_blocks),
        }
        for name, (widths, blocks) in halves.items():
            # as diffusers has it, a level begins with as many channels as it ends with
            if len(widths) != len(blocks) or len(set(widths)) != 1:
                raise ValueError(
                    f"{name} of widths {widths} and {blocks} blocks: one width, in all levels, is supported"
                )
        self.encoder = Half(_encoder(config))
        self.decoder = Half(_decoder(config))

    def encode(self, frames: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, c, h, w)."""
        return self.encoder.layers(frames.contiguous(memory_format=torch.channels_last).add(1).div(2))

    def decode(self, z: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, 3, H, W), about [-1, 1]."""
        z = torch.tanh(z.contiguous(memory_format=torch.channels_last) / _LARGEST) * _LARGEST
        return self.decoder.layers(z).mul(2).sub(1)

    def from_latents(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) scaled -> (B, 3, H, W), about [-1, 1]."""
        return self.decode(latents / self.config.scaling_factor)


def _encoder(config: TinyConfig) -> Iterator[nn.Module]:
    width = config.encoder_block_out_channels[0]
    for i, blocks in enumerate(config.num_encoder_blocks):
        inputs, stride = (width, 2) if i else (config.in_channels, 1)
        yield nn.Conv2d(inputs, width, 3, padding=1, stride=stride, bias=i == 0)
        yield from (Block(width) for _ in range(blocks))
    yield nn.Conv2d(width, config.latent_channels, 3, padding=1)


def _decoder(config: TinyConfig) -> Iterator[nn.Module]:
    width, last = config.decoder_block_out_channels[0], len(config.num_decoder_blocks) - 1
    yield nn.Conv2d(config.latent_channels, width, 3, padding=1)
    yield nn.ReLU()
    for i, blocks in enumerate(config.num_decoder_blocks):
        yield from (Block(width) for _ in range(blocks))
        if i < last:
            yield nn.Upsample(scale_factor=2)
        yield nn.Conv2d(width, config.out_channels if i == last else width, 3, padding=1, bias=i == last)
