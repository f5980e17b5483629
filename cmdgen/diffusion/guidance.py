"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) as one batched forward."""

from collections.abc import Callable

import torch
from torch import Tensor

from cmdgen.diffusion.samplers import Denoise
from cmdgen.diffusion.schedule import split_sigma


def guide(
    predict: Callable[..., Tensor],
    scale: float,
    positive: tuple[Tensor, ...],
    negative: tuple[Tensor, ...],
) -> Denoise:
    """`predict(x, t, *conditions)`, its conditions -> a denoiser guided from negative to positive.

    The result is `negative + scale (positive - negative)` on every predicted channel; a learned
    variance is the positive branch's. What both tuples share, such as the content frame of the
    motion model, is kept in both branches. Scale 1 runs the positive branch alone.
    """
    if scale == 1:
        return lambda x, t: predict(x, t, *positive)
    if len(positive) != len(negative):
        raise ValueError(f"{len(positive)} positive conditions, {len(negative)} negative ones")
    both = tuple(torch.cat(pair) for pair in zip(negative, positive, strict=True))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        output = predict(torch.cat((x, x)), torch.cat((t, t)), *both)
        prediction, sigma = split_sigma(output, x.shape[1])
        # the scale magnifies rounding: combine in the dtype of the sample, not of the network
        without, given = prediction.to(x.dtype).chunk(2)
        guided = without + scale * (given - without)
        if sigma is None:
            return guided
        return torch.cat((guided, sigma.to(x.dtype).chunk(2)[1]), dim=1)

    return denoise
