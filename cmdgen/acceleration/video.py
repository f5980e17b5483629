"""UNets and decoders that look along time, in slices: Streamlined Inference (Zhan et al. 2024, arXiv:2411.01171).

    AnimateDiff's layer    space  up-sampling and skip, if any; residual block, attention
                           time   motion module
    SVD's residual layer   space  up-sampling and skip, if any; residual block of a frame
                           time   norm, convolution
                           time   norm, convolution, share
    SVD's transformer      space  norm, projection, block of a frame
                           time   block along time, share, projection

Each line is an operator group: a slice of it, frames in space, positions in time, goes through all
of its operators before the next one starts, and takes its place in the result. A norm of a whole
clip is a scale and an offset for each channel, whose moments the group before adds up. Nothing is
approximated. A doubled map, or one joined with its skip, exists within a slice alone, and a layer
writes into its skip's memory where that has its channels. In the decoder frames lie apart, and each
is let go of as it is read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils._pytree import tree_map

from cmdgen.acceleration.moments import GONE, Affine, FrameMoments, Moments, gather, scatter
from cmdgen.acceleration.overlap import run_slices
from cmdgen.models.layers import normalise
from cmdgen.models.temporal import BlendedResnet, BlendedTransformer, clip_view
from cmdgen.models.transformer import Conditions
from cmdgen.models.unet import WHOLE, UNet
from cmdgen.models.vae import KlVae
from cmdgen.request import Slices

# some frames of a layer's input; and with what they read of time and text, the frames of its result
Read = Callable[[slice], Tensor]
Space = Callable[[slice, Conditions], Tensor]


@dataclass(frozen=True)
class SlicedUNet:
    """A UNet that looks along time, in slices; `denoise` and its pieces are the UNet's own, exactly."""

    unet: UNet
    # of the widest map that a group reads: in a slice, or in all slices that run at a time
    bytes: int
    # of a GPU, on which slices run by turns
    streams: int = 1

    def denoise(self, sample: Tensor, time: Tensor, *text: Tensor) -> Tensor:
        """(B T, C, h, w), (B, P), the projected text -> (B T, C, h, w)."""
        conditions = self.hand_out(time, text)
        first = self.embed(sample)
        return self.tail(self.trunk(first, conditions), first, conditions)

    def hand_out(self, time: Tensor, text: tuple[Tensor, ...]) -> Conditions:
        """(B, P), the projected text -> both by layer."""
        return self.unet.hand_out(time, text)

    def groups(self, conditions: Conditions) -> "_Groups":
        """Return what runs operator groups in these slices."""
        return _Groups(conditions, Cut(self.bytes, self.streams))

    def embed(self, sample: Tensor) -> Tensor:
        """(B T, C, h, w) -> the first skip (B T, C', h, w)."""
        groups = self.groups(Conditions(1, {}, {}))
        out = _map(sample, self.unet.conv_in.out_channels, sample)
        groups.space(lambda rows, _: self.unet.embed(sample[rows]), out, out[0].numel())
        return out

    def trunk(self, x: Tensor, conditions: Conditions) -> Tensor:
        """(B T, C, h, w) -> the feature (B T, C, h, w) that goes into the last layer."""
        groups, skips = self.groups(conditions), [x]
        unet: Any = self.unet
        for stage in unet.down_blocks:
            for i in range(len(stage.resnets)):
                skips.append(groups.layer(stage, i, _whole(x := skips[-1]), x))
            for down in stage.downsamplers:
                skips.append(groups.halve(down, skips[-1]))
        x = skips[-1]
        if unet.mid_block is not None:
            x = groups.layer(unet.mid_block, 0, _whole(x), x)
            x = groups.layer(unet.mid_block, 1, _whole(x), x, reuse=True)
        up: Any = None
        for stage in unet.up_blocks:
            for i in range(min(len(stage.resnets), len(skips) - 1)):
                skip = skips.pop()
                x = groups.layer(stage, i, _joined(x, skip, up), skip, reuse=True)
                up = None
            up = next(iter(stage.upsamplers), None)
        return x

    def deepen(self, feature: Tensor, first: Tensor, conditions: Conditions, cut: int) -> Tensor:
        """(B T, C, h, w) x 2 -> (B T, C', h, w): `UNet.deepen`; overwrites the first skip where there is a cut."""
        return feature if cut == 0 else self._last(feature, first, conditions, range(cut))

    def tail(self, feature: Tensor, first: Tensor | None, conditions: Conditions, cut: int = 0) -> Tensor:
        """(B T, C, h, w) x 2 -> (B T, C', h, w): `UNet.tail`; overwrites the first skip."""
        groups = self.groups(conditions)
        unet: Any = self.unet
        x = feature if cut == len(WHOLE) else self._last(feature, first, conditions, range(cut, len(WHOLE)))
        out = _map(x, unet.conv_out.out_channels, x)
        groups.space(lambda rows, _: unet.conv_out(normalise(unet.conv_norm_out, x[rows])), out, x[0].numel())
        return out

    def _last(self, x: Tensor, first: Tensor | None, conditions: Conditions, part: range) -> Tensor:
        last: Any = self.unet.up_blocks[-1]
        # a feature that is kept is not written into
        read, skip = (_whole(x), x) if first is None or 0 not in part else (_joined(x, first, None), first)
        groups = self.groups(conditions)
        return groups.layer(last, len(last.resnets) - 1, read, skip, part, reuse=0 in part)


def _map(like: Tensor, channels: int, sized: Tensor) -> Tensor:
    """() -> (B T, C, H, W), channels_last, not written yet; of one's rows and dtype, another's sides."""
    shape = len(like), channels, *sized.shape[2:]
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _whole(x: Tensor) -> Read:
    return lambda rows: x[rows]


def _joined(x: Tensor, skip: Tensor, up: Any) -> Read:
    """Read frames of a map, doubled if there is what doubles it, with those of the skip."""

    def read(rows: slice) -> Tensor:
        part = x[rows] if up is None else up(x[rows], size=skip.shape[2:])
        return torch.cat([part, skip[rows]], dim=1)

    return read


def in_slices(unet: UNet, slices: Slices) -> UNet | SlicedUNet:
    """Return what stands for a UNet that runs in these slices."""
    return unet if slices.bytes is None else SlicedUNet(unet, slices.bytes, slices.streams)


def in_turn(function: Callable[..., Any], slices: Slices) -> Callable[..., Any]:
    """Return a function of a batch, rows of clips and rows of their frames, that runs clip by clip if these say so.

    The two branches of guidance are clips, too: they share nothing.
    """

    def run(*tensors: Tensor) -> Any:
        clips = min(map(len, tensors))
        parts = zip(*(tensor.split(len(tensor) // clips) for tensor in tensors), strict=True)
        return tree_map(lambda *made: torch.cat(made), *[function(*part) for part in parts])

    return run if slices.in_turn else function


@dataclass(frozen=True)
class Cut:
    """How maps are cut: bytes of all slices that run at a time, and the streams that they run on."""

    bytes: int
    streams: int = 1

    def run(self, work: Callable[[slice, int], None], like: Tensor, unit: int, length: int, clips: int = 1) -> None:
        """Call work(slice, stream) for slices of `length` units of each clip, of so many bytes each.

        A slice is whole clips, or a part of one, all parts alike. Of a map without values it is the
        first and largest, of one stream.
        """
        count, step = clips * length, _even(max(1, self.bytes // unit), length)
        # where all fit, and where there is not one for each stream, a slice runs alone
        streams = self.streams if self.streams <= step < count and not like.is_meta else 1
        # of all streams together no more than of one, which is what is counted
        step = _even(step // streams, length)
        wide = max(step, length)
        slices = [
            slice(i, min(i + step, start + wide, count))
            for start in range(0, count, wide)
            for i in range(start, min(start + wide, count), step)
        ]
        run_slices(work, slices[:1] if like.is_meta else slices, like.device, streams)


def _even(most: int, length: int) -> int:
    """Return the most units, at most so many, that are whole clips of a length, or one of the alike parts of one."""
    return most // length * length or ceil(length / ceil(length / most))


class _Groups:
    """Runs the operator groups of a UNet's layers."""

    def __init__(self, conditions: Conditions, cut: Cut) -> None:
        self.conditions, self.clips, self.cut = conditions, conditions.clips, cut
        self.conditions_of = lru_cache(None)(lambda start, stop: conditions.of(slice(start, stop)))

    def layer(
        self, stage: Any, i: int, read: Read, skip: Tensor, part: range = WHOLE, *, reuse: bool = False
    ) -> Tensor:
        """(B T, C, H, W) -> (B T, C', H, W): a layer of a stage, into the skip's memory where it may `reuse` it."""
        resnet, (attention, motion) = stage.resnets[i], stage.readers(i)
        blends = isinstance(resnet, BlendedResnet)
        spatial = resnet.spatial_res_block if blends else resnet
        channels, inputs = spatial.conv1.out_channels, spatial.conv1.in_channels
        out = skip if reuse and skip.shape[1] == channels else _map(skip, channels, skip)
        widest = max(channels, inputs) * skip[0, 0].numel()

        def frames(rows: slice, conditions: Conditions) -> Tensor:
            x = read(rows)
            if 0 in part:
                x = spatial(x, conditions.shifts[spatial])
            return attention(x, conditions) if 1 in part and attention is not None and not blends else x

        moments = FrameMoments(len(out), channels, out)
        self.space(frames, out, widest, moments)
        if blends and 0 in part:
            affine = moments.of_clips(self.clips).affine(resnet.temporal_res_block.norm1)
            shift = self.conditions.shifts[resnet.temporal_res_block]
            blend(resnet, [out], self.clips, affine, self.cut, shift)
        if blends and 1 in part and attention is not None:
            self.move(attention, out)
        if 2 in part and motion is not None and len(out) > self.clips:
            affine = moments.of_clips(self.clips).affine(motion.norm)

            def move(at: slice, stream: int) -> None:
                tokens = rearrange(gather([out], self.clips, at, affine, activate=False), "b c t p -> b t p c")
                scatter([out], self.clips, at, rearrange(motion.transform(tokens), "b t p c -> b c t p"))

            _run_positions(move, [out], self.cut)
        return out

    def move(self, attention: BlendedTransformer, x: Tensor) -> None:
        """(B T, C, H, W), in place: SVD's transformer."""
        tokens = x.new_empty(len(x), x[0, 0].numel(), x.shape[1])
        self.space(lambda rows, conditions: attention.transform(x[rows], conditions), tokens, x[0].numel())
        still = tokens.unflatten(0, (self.clips, -1))

        def run(at: slice, stream: int) -> None:
            added = attention.leave(attention.move(still[:, :, at], self.conditions))
            scatter([x], self.clips, at, rearrange(added, "b t p c -> b c t p"))

        _run_positions(run, [x], self.cut)

    def halve(self, down: Any, x: Tensor) -> Tensor:
        """(B T, C, H, W) -> (B T, C, H / 2, W / 2)."""
        height, width = (ceil(side / 2) for side in x.shape[2:])
        out = _map(x, x.shape[1], x[:1, :1, :height, :width])
        self.space(lambda rows, _: down(x[rows]), out, x[0].numel())
        return out

    def space(self, make: Space, out: Tensor, widest: int, moments: FrameMoments | None = None) -> None:
        """Write all frames, and their moments; `widest` has the numbers of one frame of the widest map."""
        length = len(out) // self.clips

        def run(part: slice, stream: int) -> None:
            made = make(part, self.conditions_of(part.start // length, ceil(part.stop / length)))
            out[part] = made if moments is None else moments.add(made, part)

        self.cut.run(run, out, widest * out.element_size(), length, self.clips)


def blend(
    layer: BlendedResnet,
    parts: Sequence[Tensor],
    clips: int,
    affine: Affine,
    cut: Cut,
    shift: Tensor | None = None,
    *,
    again: bool = False,
) -> None:
    """(F, C, H, W) each, in place: the half of a residual layer that looks along time.

    With `again` its first convolution runs twice, and what it makes is never there as a whole.
    """
    temporal, share = layer.temporal_res_block, layer.share()
    # one for each stream, of its own slices
    moments = [Moments() for _ in range(cut.streams)]
    hidden: Tensor | None = None
    if not again:
        frames = sum(map(len, parts)) // clips
        hidden = parts[0].new_empty(clips, frames, parts[0][0, 0].numel(), temporal.conv1.out_channels)  # (B, T, P, C)

    def first(at: slice) -> Tensor:
        x = temporal.conv1(gather(parts, clips, at, affine, activate=True))
        return x if shift is None else x.add_(shift[:, :, None, None])

    def measure(at: slice, stream: int) -> None:
        x = moments[stream].add(first(at))
        if hidden is not None:
            hidden[:, :, at] = rearrange(x, "b c t p -> b t p c")

    _run_positions(measure, parts, cut)
    for others in moments[1:]:
        moments[0].join(others)
    scale, offset = moments[0].affine(temporal.norm2)

    def finish(at: slice, stream: int) -> None:
        x = first(at) if hidden is None else rearrange(hidden[:, :, at], "b t p c -> b c t p")
        x = F.silu(torch.addcmul(offset, x, scale, out=torch.empty_like(x)), inplace=True)
        scatter(parts, clips, at, temporal.conv2(x).mul_(share))

    _run_positions(finish, parts, cut)


def _run_positions(work: Callable[[slice, int], None], parts: Sequence[Tensor], cut: Cut) -> None:
    """Call work(slice, stream) for slices of the positions of a map, (F, C, H, W) in parts, each at all times."""
    column = sum(len(part) for part in parts) * parts[0][0, :, 0, 0].nbytes
    cut.run(work, parts[0], column, parts[0][0, 0].numel())


def decode_frames(vae: KlVae, latents: Tensor, size: int | None = None) -> Tensor:
    """(T, c, h, w) scaled -> (T, 3, H, W): `from_latents` of a decoder that looks along time, all frames together.

    A slice of positions has `size` bytes, or half of what a frame has where it is largest.
    """
    decoder: Any = vae.decoder
    latents = (latents / vae.config.scaling_factor).contiguous(memory_format=torch.channels_last)
    frames = [decoder.conv_in(latent[None]) for latent in latents]
    # smaller ones would leave the peak as it is, and launch more
    cut = Cut(size or vae.config.block_out_channels[0] * vae.config.stride**2 * latents[0, 0].nbytes // 2)

    def run(layer: Any, up: Any = None) -> None:
        moments = FrameMoments(len(frames), layer.spatial_res_block.conv2.out_channels, latents)
        for i in range(len(frames)):
            if latents.is_meta and 0 < i < len(frames) - 1:
                # the last is made beside all others
                frames[i] = torch.empty_like(frames[0])
                continue
            x, frames[i] = frames[i], GONE
            x = x if up is None else up(x)
            x = layer.spatial_res_block(x)
            frames[i] = moments.add(x, slice(i, i + 1))
            del x
        affine = moments.of_clips(1).affine(layer.temporal_res_block.norm1)
        blend(layer, frames, 1, affine, cut, again=True)

    first, *others = decoder.mid_block.resnets
    run(first)
    for attention, layer in zip(decoder.mid_block.attentions, others, strict=False):
        for i in range(len(frames)):
            frames[i] = attention(frames[i])
        run(layer)
    up: Any = None
    for block in decoder.up_blocks:
        for layer in block.resnets:
            run(layer, up)
            up = None
        up = next(iter(block.upsamplers), None)
    for i in range(len(frames)):
        frames[i] = decoder.conv_out(normalise(decoder.conv_norm_out, frames[i]))
    out = decoder.time_conv_out(clip_view(torch.cat(frames), 1))
    return rearrange(out, "1 c t (h w) -> t c h w", h=frames[0].shape[2])
