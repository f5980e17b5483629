"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) as one batched forward."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cmdgen.diffusion.schedule import split_sigma

# samples (B, C, ...), timesteps (B,) -> the network's output (B, C or 2 C, ...)
Denoise = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Guided:
    """A denoiser guided from negative to positive conditions; its two branches are one batch."""

    predict: Callable[..., Tensor]
    # one for all rows, or one for each: (B, 1, ...)
    scale: float | Tensor
    positive: tuple[Tensor, ...]
    negative: tuple[Tensor, ...]
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        counts = len(self.positive), len(self.negative)
        if counts[0] != counts[1]:
            raise ValueError(f"{counts[0]} positive conditions, {counts[1]} negative ones")
        self.both = tuple(map(torch.cat, zip(self.negative, self.positive, strict=True)))

    def at(self, t: float) -> Denoise:
        """Return the denoiser of a timestep: out of the interval, the positive branch alone."""
        if self.interval is None or self.interval[0] <= t <= self.interval[1]:
            return self
        return lambda x, t: self.predict(x, t, *self.positive)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, C, ...), (B,) -> (B, C or 2 C, ...), in the dtype of x."""
        output = self.predict(torch.cat((x, x)), torch.cat((t, t)), *self.both)  # (2 B, C or 2 C, ...)
        prediction, sigma = split_sigma(output, x.shape[1])
        # the scale magnifies rounding: combine in the dtype of the sample, not of the network
        negative, positive = prediction.to(x.dtype).chunk(2)
        guided = negative + self.scale * (positive - negative)
        if sigma is None:
            return guided
        return torch.cat((guided, sigma.to(x.dtype).chunk(2)[1]), dim=1)


def guide(
    predict: Callable[..., Tensor],
    scale: float | Tensor,
    positive: tuple[Tensor, ...],
    negative: tuple[Tensor, ...],
    *,
    interval: tuple[float, float] | None = None,
) -> Denoise:
    """`predict(x, t, *conditions)`, its conditions -> a denoiser guided from negative to positive.

    The result is `negative + scale (positive - negative)` on every predicted channel; a learned
    variance is the positive branch's. What both tuples share, such as the content frame of the
    motion model, is kept in both branches. Scale 1 runs the positive branch alone; so do timesteps
    outside of `interval`, its ends within (Kynkäänniemi et al. 2024, arXiv:2404.07724).
    """
    if isinstance(scale, float | int) and scale == 1:
        return lambda x, t: predict(x, t, *positive)
    return Guided(predict, scale, positive, negative, interval)
