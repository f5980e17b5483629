"""EVDM, EVDM-L (Zhang et al. 2023, ACM MM) and MCVD (Voleti et al. 2022, arXiv:2205.09853).

A UNet in pixels denoises some frames of a clip, given frames before and after them. Time is folded
into channels: it sees a clip as one picture with many of them.

EVDM's residual block squeezes the channels to a quarter, where a 3x3 convolution is cheap, twice:

    half(x) = [3x3(z), 1x1(z)],  z = norm(1x1(act(norm(x, t))), t)       out = half(half(x)) + shortcut

EVDM-L lets half of the channels pass by each half, and groups and shuffles the shortcuts. MCVD's
block is the usual one, two 3x3 convolutions. What the paper's text leaves open is chosen so that
its published counts come out, or as MCVD has it.
"""

from functools import reduce
from math import sqrt

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cmdgen.config import EvdmConfig
from cmdgen.models.attention import self_attention
from cmdgen.models.layers import Attention
from cmdgen.models.pretrained import Pretrained
from cmdgen.models.unet import TimeEmbedding

# of EVDM-L's shortcuts and of its shuffles
GROUPS = 4
# a sum of two independent terms keeps its variance
_RESCALE = sqrt(0.5)
# what a mask's logits start below 0: at first a fiftieth of a picture is new
_KEPT = 4.0
# frames from a known one that something is followed at most
_AHEAD = 3


def norm_groups(channels: int) -> int:
    """Return the largest divisor of `channels` that is at most 32 and leaves groups of 4."""
    most = max(1, min(channels // 4, 32))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


def resample(x: Tensor, how: str | None) -> Tensor:
    """(B, C, H, W) -> the same, or at twice ("up") or half ("down") the size, by 1-3-3-1 filters."""
    if how == "up":
        # bilinear interpolation at twice the size is that filter
        return F.interpolate(x, scale_factor=2, mode="bilinear")
    if how == "down":
        # 1331 = (1111 + 0220) / 2 along each side; beyond the border lies 0
        for side in ((2, 1), (1, 2)):
            wide, padding = tuple(2 * s if s == 2 else 1 for s in side), tuple(s - 1 for s in side)
            x = (F.avg_pool2d(x, wide, side, padding) + F.avg_pool2d(x, side, side)) / 2
    return x


def shuffle(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H, W): channels of all groups take turns."""
    return rearrange(x, "b (g c) h w -> b (c g) h w", g=GROUPS)


class Pointwise(nn.Linear):
    """1x1 convolution, as a matrix product on channels_last memory."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class AdaptiveNorm(nn.Module):
    """Group normalisation whose scale and shift, or shift alone, follow from the time."""

    def __init__(self, channels: int, config: EvdmConfig) -> None:
        super().__init__()
        self.groups, self.terms = norm_groups(channels), 2 if config.modulation == "full" else 1
        self.linear = nn.Linear(4 * config.width, self.terms * channels)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, C, H, W), (B, D) -> (B, C, H, W)."""
        shift, *scale = self.linear(time)[..., None, None].chunk(self.terms, dim=1)
        x = F.group_norm(x, self.groups, eps=1e-5)
        return torch.addcmul(shift, x, 1 + scale[0]) if scale else x + shift


class Bottleneck(nn.Module):
    """Half of EVDM's block (eq. 9 and 10); with the split, some channels pass by."""

    def __init__(self, inputs: int, outputs: int, config: EvdmConfig, how: str | None = None) -> None:
        super().__init__()
        self.config, self.how, self.grows = config, how, inputs < outputs
        width = outputs // config.reduction
        self.kept, squeezed, made = 0, inputs, outputs
        if config.split and self.grows:
            self.kept, made = inputs, outputs - inputs
        elif config.split:
            self.kept, squeezed, made = outputs // 2, inputs - outputs // 2, outputs // 2
        self.norm1 = AdaptiveNorm(inputs, config)
        self.squeeze = Pointwise(squeezed, width)
        self.norm2 = AdaptiveNorm(width, config)
        self.wide, self.point = nn.Conv2d(width, made // 2, 3, padding=1), Pointwise(width, made // 2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, C, H, W), (B, D) -> (B, C', H', W')."""
        smooth = self.config.activation == "silu"
        y = self.norm1(x, time)
        y = resample(F.silu(y) if smooth else F.relu(y), self.how)
        if not self.grows:
            y = y[:, self.kept :]
        z = self.norm2(self.squeeze(y), time)
        z = F.dropout(F.silu(z) if smooth else z, self.config.dropout, self.training)
        made = [self.wide(z), self.point(z)]
        if not self.config.split:
            return torch.cat(made, dim=1)
        return shuffle(torch.cat([resample(x[:, : self.kept], self.how), *made], dim=1))


class EvdmBlock(nn.Module):
    """Two bottlenecks around a shortcut."""

    def __init__(self, inputs: int, outputs: int, config: EvdmConfig, how: str | None = None) -> None:
        super().__init__()
        self.how, self.split = how, config.split
        self.first = Bottleneck(inputs, outputs, config, how)
        self.second = Bottleneck(outputs, outputs, config)
        self.shortcut: nn.Module | None = None
        if inputs != outputs or how:
            grouped = nn.Conv2d(inputs, outputs, 1, groups=GROUPS) if config.split else None
            self.shortcut = grouped or Pointwise(inputs, outputs)
        if not config.split:
            clear(self.second.wide, self.second.point)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, C, H, W), (B, D) -> (B, C', H', W')."""
        h = self.second(self.first(x, time), time)
        x = resample(x, self.how)
        if self.shortcut is not None:
            x = self.shortcut(x)
            x = shuffle(x) if self.split else x
        return (x + h) * _RESCALE


class McvdBlock(nn.Module):
    """MCVD's: two 3x3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, config: EvdmConfig, how: str | None = None) -> None:
        super().__init__()
        self.how, self.dropout = how, config.dropout
        self.norm1, self.conv1 = AdaptiveNorm(inputs, config), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = AdaptiveNorm(outputs, config), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = Pointwise(inputs, outputs) if inputs != outputs or how else nn.Identity()
        clear(self.conv2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, C, H, W), (B, D) -> (B, C', H', W')."""
        h = self.conv1(resample(F.silu(self.norm1(x, time)), self.how))
        h = F.dropout(F.silu(self.norm2(h, time)), self.dropout, self.training)
        return (self.shortcut(resample(x, self.how)) + self.conv2(h)) * _RESCALE


class SelfAttention(nn.Module):
    """MSM: attention of all positions, softmax or linear by the gate, in heads of the first width."""

    def __init__(self, channels: int, config: EvdmConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups(channels), channels, eps=1e-6)
        heads, attend = channels // config.width, self_attention(config, config.width)
        self.attention = Attention(channels, channels, heads, bias=True, attend=attend)
        clear(self.attention.to_out[0])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        h = rearrange(self.attention(tokens), "b (h w) c -> b c h w", h=x.shape[2])
        return (x + h) * _RESCALE


class Layer(nn.Module):
    """A residual block, and attention after it at some places."""

    def __init__(
        self, inputs: int, outputs: int, config: EvdmConfig, *, how: str | None = None, attends: bool = False
    ) -> None:
        super().__init__()
        self.how = how
        block = EvdmBlock if config.block == "evdm" else McvdBlock
        self.block = block(inputs, outputs, config, how)
        self.attention = SelfAttention(outputs, config) if attends else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, C, H, W), (B, D) -> (B, C', H', W')."""
        return self.attention(self.block(x, time))


def clear(*layers: nn.Module) -> None:
    """Set weights and biases to 0: what a fresh network adds here is nothing."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


class Evdm(Pretrained[EvdmConfig]):
    """Frames of a clip from noise, given others; what it predicts is the schedule's to say."""

    config_type = EvdmConfig

    def __init__(self, config: EvdmConfig) -> None:
        super().__init__(config)
        width, last = config.width, len(config.multipliers) - 1
        widths = [width * multiplier for multiplier in config.multipliers]
        if width % 8 or width // config.reduction < 2:
            raise ValueError(f"width {width} is not a multiple of 8, and of twice the reduction {config.reduction}")
        if config.reach and not config.mask:
            raise ValueError(f"reach {config.reach} is of what a mask keeps, and there is no mask")
        channels = config.channels * config.patch**2
        self.time_embedding = TimeEmbedding(width, 4 * width, 4 * width)
        # what moved on is seen as well
        seen = config.frames + config.current * (config.reach > 0)
        self.conv_in = nn.Conv2d(channels * seen, width, 3, padding=1)
        self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), [width]
        for i, wide in enumerate(widths):
            for _ in range(config.layers_per_block):
                self.down.append(Layer(skips[-1], wide, config, attends=i > 0))
                skips.append(wide)
            if i < last:
                self.down.append(Layer(wide, wide, config, how="down"))
                skips.append(wide)
        before = widths[-1]
        self.mid = nn.ModuleList(Layer(before, before, config, attends=attends) for attends in (True, False))
        for i, wide in reversed(list(enumerate(widths))):
            for j in range(config.layers_per_block + 1):
                attends = i > 0 and j == config.layers_per_block
                self.up.append(Layer(before + skips.pop(), wide, config, attends=attends))
                before = wide
            if i > 0:
                self.up.append(Layer(wide, wide, config, how="up"))
        self.norm_out = nn.GroupNorm(norm_groups(width), width, eps=1e-5)
        # of each frame, and of its mask
        out = channels + config.mask * config.patch**2
        self.conv_out = nn.Conv2d(width, out * config.current, 3, padding=1)
        clear(self.conv_out)

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """(B, C, T, H, W), (B,), (B, C, T', H, W) -> (B, C, T, H, W).

        `context` holds the past and then the future frames in [-1, 1]; frames of 0 are unknown.
        """
        patch = self.config.patch
        time = F.silu(self.time_embedding(timestep))  # (B, D)
        moved = [follow(context, self.config)] if self.config.reach else []
        x = rearrange(torch.cat([sample, context, *moved], dim=2), "b c t h w -> b (t c) h w")
        x = F.pixel_unshuffle(x, patch)  # (B, T'' C p p, H / p, W / p)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for layer in self.down:
            skips.append(layer(skips[-1], time))
        x = skips[-1]
        for layer in self.mid:
            x = layer(x, time)
        for layer in self.up:
            x = layer(x if layer.how else torch.cat([x, skips.pop()], dim=1), time)
        x = self.conv_out(F.silu(self.norm_out(x)))
        x = rearrange(F.pixel_shuffle(x, patch), "b (t c) h w -> b c t h w", t=self.config.current)
        if not self.config.mask:
            return x
        # known frames stay in their own precision
        kept = moved[0] if moved else between(context, self.config)
        new, share = x[:, :-1], (x[:, -1:] - _KEPT).sigmoid()
        return kept + share * (new - kept)


def between(context: Tensor, config: EvdmConfig) -> Tensor:
    """(B, C, T', H, W) -> (B, C, T, H, W): the last past and first future frame blended linearly, or the known one."""
    nearest = context[:, :, max(0, config.past - 1) : config.past + 1]  # (B, C, 1 or 2, H, W)
    known = nearest.ne(0).any(dim=4).any(dim=3).any(dim=1).to(context.dtype)  # (B, 1 or 2)
    share = torch.arange(1, config.current + 1, dtype=context.dtype, device=context.device) / (config.current + 1)
    sides = [*[1 - share] * (config.past > 0), *[share] * (config.future > 0)]
    weights = torch.stack(sides) * known[:, :, None]  # (B, 1 or 2, T)
    # where neither is known, 0 stays 0
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=0.5 / (config.current + 1))
    return (nearest[:, :, :, None] * weights[:, None, :, :, None, None]).sum(dim=2)


@torch.no_grad()
def follow(context: Tensor, config: EvdmConfig) -> Tensor:
    """(B, C, T', H, W) -> (B, C, T, H, W): what the nearest known frames show, moved on in straight lines.

    As a video codec does, it looks at each patch for the motion that best explains the patch's
    surroundings in the two nearest frames of one side, and prefers what is not black. A single known
    frame rests; more than `_AHEAD` frames from all that are known, all is black.
    """
    last = len(context[0, 0]) - 1
    known = context.ne(0).any(dim=4).any(dim=3).any(dim=1)  # (B, T')
    precise = context.to(torch.promote_types(context.dtype, torch.float32))
    frames = (precise + 1) / 2 * known[:, None, :, None, None]
    # of each side the nearest frame, the next one, and how far the first frame to make is from them
    past = [(config.past - 1, max(0, config.past - 2), range(1, config.current + 1))] * (config.past > 0)
    future = [(config.past, min(config.past + 1, last), range(config.current, 0, -1))] * (config.future > 0)
    made = []
    for t in range(config.current):
        motions, chances = [], []
        for near, next_one, distances in (*past, *future):
            if (distance := distances[t]) > _AHEAD:
                continue
            before = torch.where(known[:, next_one, None, None, None], frames[:, :, next_one], frames[:, :, near])
            here = shift(frames[:, :, near], distance, config)
            there = shift(before, distance + 1, config)
            # its memory is in order, which makes sums fast
            buffer = frames.new_empty(here[0].shape)
            error = _around([_energy(torch.sub(a, b, out=buffer)) for a, b in zip(here, there, strict=True)])
            bright = _around([_energy(buffer.copy_(a)) for a in here])
            # tuned on moving digits
            chance = 20 * bright - 60 * error / (bright + 0.05) - 8 * distance
            motions += here
            chances.append(chance.masked_fill(~known[:, near], -1e4))
        if not motions:
            made.append(torch.full_like(frames[:, :, 0], -1))
            continue
        weights = torch.cat(chances).softmax(dim=0)
        total = weights.new_zeros(motions[0].shape)
        for motion, weight in zip(motions, weights, strict=True):
            total.addcmul_(motion, weight)
        made.append(rearrange(2 * total - 1, "c i j h w b -> b c (h i) (w j)"))
    return torch.stack(made, dim=2).to(context.dtype)


def shift(frame: Tensor, step: int, config: EvdmConfig) -> list[Tensor]:
    """(B, C, H, W) -> for each motion (C, p, p, H / p, W / p, B): the frame moved `step` times; beyond the border 0.

    They are views, with clips last, where memory is contiguous.
    """
    padded = F.pad(frame, (step * config.reach,) * 4).permute(1, 2, 3, 0).contiguous()
    span = 2 * step * config.reach + 1
    shifted = padded.unfold(1, span, 1).unfold(2, span, 1)[..., ::step, ::step]  # (C, H, W, B, v, v)
    shifted = rearrange(shifted, "c (h i) (w j) b y x -> y x c i j h w b", i=config.patch, j=config.patch)
    return [moved for row in shifted for moved in row]


def _energy(x: Tensor) -> Tensor:
    """(C, p, p, h, w, B) -> (h, w, B): mean square of each patch; `x` is squared in place."""
    return x.square_().flatten(0, 2).mean(dim=0)


def _around(patches: list[Tensor]) -> Tensor:
    """V x (h, w, B) -> (V, h, w, B): the mean of 5 x 5 patches around each, 0 beyond the border."""
    x = F.pad(torch.stack(patches), (0, 0, 2, 2, 2, 2))
    for axis in (1, 2):
        x = reduce(torch.add, [x.narrow(axis, i, x.shape[axis] - 4) for i in range(5)])
    return x / 25
