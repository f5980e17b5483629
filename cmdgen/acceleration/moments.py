"""GroupNorm of maps in parts: the moments of each channel, added up part by part, and what is left of the norm.

A norm is a scale and an offset for each channel, once the moments of all positions are known.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmdgen.models.temporal import clip_view

# scale and offset (B, C, 1, 1) of a norm
Affine = tuple[Tensor, Tensor]
# in the place of a part that nobody needs any more
GONE = torch.empty(0)


class Moments:
    """Mean and deviation of each channel, of the parts of a map that were added."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        # the sum of squared deviations from it
        self.squares: Tensor | float = 0.0

    def add(self, x: Tensor) -> Tensor:
        """(B, C, R, W) -> the same, by Chan et al. 1979: no difference of large sums."""
        self._join(x.shape[2] * x.shape[3], *_measure(x))
        return x

    def join(self, other: "Moments") -> None:
        """Add those of other parts of the map, if there are any."""
        if other.count:
            self._join(other.count, other.mean, other.squares)

    def _join(self, count: int, mean: Tensor | float, squares: Tensor | float) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.squares = self.squares + squares + delta**2 * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def affine(self, norm: nn.GroupNorm) -> Affine:
        """() -> scale and offset (B, C, 1, 1), in float32 at least: all that is left of `norm`."""
        assert isinstance(self.mean, Tensor) and isinstance(self.squares, Tensor)
        means = self.mean.unflatten(1, (norm.num_groups, -1))  # (B, G, C / G, 1, 1)
        mean = means.mean(dim=2, keepdim=True)
        variances = self.squares.unflatten(1, (norm.num_groups, -1)) / self.count
        variance = (variances + (means - mean) ** 2).mean(dim=2, keepdim=True)
        weight, bias = (each.unflatten(0, (norm.num_groups, -1))[:, :, None, None] for each in (norm.weight, norm.bias))
        scale = weight / (variance + norm.eps).sqrt()
        return scale.flatten(1, 2), (bias - mean * scale).flatten(1, 2)


class FrameMoments:
    """Mean and deviation of each channel of each frame, of which those of whole clips are made."""

    def __init__(self, frames: int, channels: int, like: Tensor) -> None:
        self.positions = 0
        # each (B T, C, 1, 1), as a whole from the start: frames come in no order, on any stream
        wide = torch.promote_types(like.dtype, torch.float32)
        self.values = [like.new_empty(frames, channels, 1, 1, dtype=wide) for _ in range(2)]

    def add(self, x: Tensor, rows: slice) -> Tensor:
        """(F, C, H, W), the frames that these are -> the same."""
        parts, self.positions = _measure(x), x.shape[2] * x.shape[3]
        for value, part in zip(self.values, parts, strict=True):
            value[rows] = part
        return x

    def of_clips(self, clips: int) -> Moments:
        """Return those of clips, rows (B, C, 1, 1)."""
        means, squares = (value.unflatten(0, (clips, -1)) for value in self.values)  # (B, T, C, 1, 1)
        whole, mean = Moments(), means.mean(dim=1)
        whole.count, whole.mean = means.shape[1] * self.positions, mean
        whole.squares = squares.sum(dim=1) + self.positions * ((means - mean[:, None]) ** 2).sum(dim=1)
        return whole


def _measure(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, R, W) -> mean and squared deviations, (B, C, 1, 1), in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(dim=(2, 3), keepdim=True)
    # on a CPU in a tenth of the time of var_mean
    return mean, (wide - mean).square_().sum(dim=(2, 3), keepdim=True)


def gather(parts: Sequence[Tensor], clips: int, positions: slice, affine: Affine, *, activate: bool) -> Tensor:
    """(F, C, H, W) each -> (B, C, T, P), normalised: some positions at all times.

    The parts are B clips, or frames of one.
    """
    views = [clip_view(part, clips)[..., positions] for part in parts]
    shape = *views[0].shape[:2], sum(view.shape[2] for view in views), views[0].shape[3]
    first, (scale, offset) = views[0], affine
    out = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=torch.channels_last)
    for view, place in zip(views, out.split([view.shape[2] for view in views], dim=2), strict=True):
        torch.addcmul(offset, view, scale, out=place)
    return F.silu(out, inplace=True) if activate else out


def scatter(parts: Sequence[Tensor], clips: int, positions: slice, added: Tensor) -> None:
    """(B, C, T, P) is added to these positions of the parts, where `gather` read them."""
    views = [clip_view(part, clips)[..., positions] for part in parts]
    for view, part in zip(views, added.split([view.shape[2] for view in views], dim=2), strict=True):
        view.add_(part)
