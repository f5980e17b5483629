"""Clips in slices: the Feature Slicer and Operator Grouping of Zhan et al. 2024 (arXiv:2411.01171).

Consecutive operators that look at one axis alone are a group: spatial ones see single frames,
temporal ones single positions. A slice of the other axis goes through all of a group before the
next one starts, and its result takes the slice's place, so that only what one slice needs is there
beside the clip. Nothing is approximated.

The VAE's operators are all spatial: frames go through one after another. Of a single frame it is
GroupNorm that forbids slices, as it takes its moments of all positions. Here they are added up
while a convolution writes its strips of rows, and the next one normalises strip by strip what it
reads, with a row of the neighbours on either side. Strips that nobody needs any more are let go.
Where maps are smallest, in the middle, they are whole: attention needs all of them.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmdgen.acceleration.moments import GONE, Affine, Moments
from cmdgen.acceleration.video import decode_frames
from cmdgen.models.autoencoder import Block, CmdAutoencoder
from cmdgen.models.layers import Downsample, ResnetBlock, Upsample, normalise
from cmdgen.models.tiny_vae import TinyVae
from cmdgen.models.vae import KlVae
from cmdgen.request import Slices


def encode_clip(autoencoder: CmdAutoencoder, frames: Tensor, slices: Slices) -> tuple[Tensor, Tensor]:
    """(B, C, T, H, W) -> content (B, C, H, W), motion (B, K, T, W' + H'): `encode`, no gradients.

    What is before and after the blocks is a small part of them, and is not cut.
    """
    tokens = autoencoder.embed_clip(frames)
    rows = frames.shape[-2] // autoencoder.config.patch
    _transform(autoencoder, autoencoder.encoder, tokens, rows, slices)
    return autoencoder.summarise(frames, tokens)


def decode_clip(autoencoder: CmdAutoencoder, content: Tensor, motion: Tensor, slices: Slices) -> Tensor:
    """(B, C, H, W), (B, K, T, W' + H') -> (B, C, T, H, W): `decode`, without gradients."""
    patch, width = autoencoder.config.patch, autoencoder.config.width
    rows, columns = (side // patch for side in content.shape[-2:])
    batch, _, frames, _ = motion.shape
    tokens = content.new_empty(frames, batch, rows * columns, width)
    together = max(1, slices.frames // batch)
    for part, moves in zip(_slices(tokens, together, dim=0), _slices(motion, together, dim=2), strict=True):
        part.copy_(autoencoder.embed(content, moves))
    _transform(autoencoder, autoencoder.decoder, tokens, rows, slices)
    return autoencoder.output(tokens, rows).to(content.dtype)


def _transform(autoencoder: CmdAutoencoder, blocks: nn.ModuleList, tokens: Tensor, rows: int, slices: Slices) -> None:
    """(T, B, N, D), in place: the blocks' operators, of one axis after those of the other."""
    time, space = autoencoder.rotations(tokens, rows)
    by_position, by_frame = tokens.flatten(1, 2), tokens.flatten(0, 1)
    for block in blocks:
        assert isinstance(block, Block)
        for part in _slices(by_position, slices.positions, dim=1):
            part.copy_(block.mix_time(part, time))
        for part in _slices(by_frame, slices.frames, dim=0):
            part.copy_(block.mix_space(part, space))


def _slices(tokens: Tensor, size: int, *, dim: int) -> Sequence[Tensor]:
    """(...) -> parts of it; the first and largest alone where there are no values."""
    parts = tokens.split(size, dim)
    return parts[:1] if tokens.is_meta else parts


def encode_pictures(vae: KlVae, pictures: Tensor, strips: int) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, c, h, w) scaled: `to_latents`, the rows in so many strips.

    Raises ValueError where a side is not a multiple of the VAE's stride.
    """
    if strips == 1:
        return vae.to_latents(pictures)
    vae.check_size(pictures)
    encoder, stride = vae.encoder, vae.config.stride
    # so that halves of their rows are rows, at every level
    rows = pictures[:, :, ::stride]
    coarse = rows.tensor_split(min(strips, rows.shape[2]), dim=2)
    parts = list(pictures.split([stride * part.shape[2] for part in coarse], dim=2))
    moments, windows = Moments(), _windows(parts)
    parts = [moments.add(_convolve(encoder.conv_in, next(windows))) for _ in range(len(parts))]
    _run_blocks(encoder.down_blocks, parts, moments)
    x = torch.cat(parts, dim=2)
    parts.clear()
    x = encoder.conv_out(normalise(encoder.conv_norm_out, encoder.mid_block(x)))
    mean, _ = vae.quant_conv(x).chunk(2, dim=1)
    return mean * vae.config.scaling_factor


def decode_pictures(vae: KlVae | TinyVae, latents: Tensor, strips: int) -> Tensor:
    """(B, c, h, w) scaled -> (B, 3, H, W): `from_latents`, the rows of h in so many strips.

    A decoder that looks along time has its frames apart instead: each is let go of as it is read.
    """
    if isinstance(vae, KlVae) and vae.config.temporal == "blend":
        return decode_frames(vae, latents)
    if strips == 1 or isinstance(vae, TinyVae):
        return vae.from_latents(latents)
    decoder = vae.decoder
    latents = (latents / vae.config.scaling_factor).contiguous(memory_format=torch.channels_last)
    moments = Moments()
    x = moments.add(decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents))))
    parts = list(x.tensor_split(min(strips, x.shape[2]), dim=2))
    # they alone keep it from here on
    del x
    moments = _run_blocks(decoder.up_blocks, parts, moments)
    windows = _windows(parts, moments.affine(decoder.conv_norm_out), consume=True)
    return torch.cat([_convolve(decoder.conv_out, next(windows)) for _ in range(len(parts))], dim=2)


# strips of one feature map, from its top: (B, C, R, W) each, channels_last
Strips = list[Tensor]


def _run_blocks(blocks: nn.ModuleList, x: Strips, moments: Moments) -> Moments:
    """Strips, in place, and their moments -> the result's moments."""
    for layer in (layer for block in blocks for part in block.children() for layer in part.children()):
        if isinstance(layer, ResnetBlock):
            moments = _run_resnet(layer, x, moments)
        else:
            assert isinstance(layer, Downsample | Upsample)
            resample = _run_downsampler if isinstance(layer, Downsample) else _run_upsampler
            moments = resample(layer.conv, x)
    return moments


def _run_resnet(block: ResnetBlock, x: Strips, moments: Moments) -> Moments:
    """Strips, in place, and their moments -> the result's moments."""
    windows, moments = _windows(x, moments.affine(block.norm1)), Moments()
    hidden: Strips = []
    for i in range(len(x)):
        hidden.append(moments.add(_convolve(block.conv1, next(windows))))
        if block.conv_shortcut is not None:
            x[i] = block.conv_shortcut(x[i])
    windows, moments = _windows(hidden, moments.affine(block.norm2), consume=True), Moments()
    for strip in x:
        strip += _convolve(block.conv2, next(windows))
        moments.add(strip)
    return moments


def _run_downsampler(conv: nn.Conv2d, x: Strips) -> Moments:
    """Strips of even rows, in place, to half the rows and columns -> their moments."""
    moments = Moments()
    for i in range(len(x)):
        # a column of zeros to the right; below, the neighbour's first row, or zeros too
        window = F.pad(x[i], (0, 1, 0, 1))
        if i + 1 < len(x):
            window[:, :, -1:, :-1] = x[i + 1][:, :, :1]
        x[i] = F.conv2d(window, conv.weight, conv.bias, stride=2)
        del window
        moments.add(x[i])
    return moments


def _run_upsampler(conv: nn.Conv2d, x: Strips) -> Moments:
    """Strips, in place, to twice the rows and columns -> their moments."""
    windows, moments = _windows(x), Moments()
    for i in range(len(x)):
        # of a neighbour's row, doubled, one is the neighbour
        doubled = F.interpolate(next(windows), scale_factor=2.0)[:, :, 1:-1]
        x[i] = _convolve(conv, doubled)
        del doubled
        moments.add(x[i])
    return moments


def _windows(strips: Strips, affine: Affine | None = None, *, consume: bool = False) -> Iterator[Tensor]:
    """Yield each strip with a row of its neighbours, normalised and activated.

    A strip may change once its window is there; windows may also `consume` the strips.
    """
    above: Tensor | None = None
    for i in range(len(strips)):
        last_row = strips[i][:, :, -1:].clone()
        # a window that had a name here would live until the next one
        yield _window(strips, i, above, affine, consume)
        above = last_row


def _window(strips: Strips, i: int, above: Tensor | None, affine: Affine | None, consume: bool) -> Tensor:
    """(B, C, R, W) -> (B, C, R + 2, W) of strip i; beyond the map there are zeros."""
    # padded in channels_last
    window = F.pad(strips[i].permute(0, 2, 3, 1), (0, 0, 0, 0, 1, 1)).permute(0, 3, 1, 2)
    if consume:
        strips[i] = GONE
    first, last = int(above is None), window.shape[2] - (i + 1 == len(strips))
    if above is not None:
        window[:, :, :1] = above
    if i + 1 < len(strips):
        window[:, :, -1:] = strips[i + 1][:, :, :1]
    if affine is not None:
        scale, offset = affine
        inside = window[:, :, first:last]
        F.silu(torch.addcmul(offset, inside, scale, out=inside), inplace=True)
    return window


def _convolve(conv: nn.Conv2d, window: Tensor) -> Tensor:
    """(B, C, R + 2, W) -> (B, C', R, W)."""
    return F.conv2d(window, conv.weight, conv.bias, padding=(0, 1))
