"""Predicted frames beside real ones, and what needs no model: the last frame again, a blend."""

import torch
from torch import Tensor


def clip_psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """(N, ...) x2 in [-1, 1] -> (N,) decibels of each clip's mean squared error, as MCVD takes them.

    8 bits cannot show an error below 1e-6 of the squared range.
    """
    error = ((prediction.clamp(-1, 1) - target) / 2).square().flatten(1).mean(dim=1)
    return -10 * error.clamp(min=1e-6).log10()


def repeat_last(past: Tensor, count: int) -> Tensor:
    """(N, C, T, H, W) -> (N, C, count, H, W): the last frame, again and again."""
    return past[:, :, -1:].expand(-1, -1, count, -1, -1)


def blend(past: Tensor, future: Tensor, count: int) -> Tensor:
    """(N, C, T, H, W) x2 -> (N, C, count, H, W): evenly from the last of `past` to the first of `future`."""
    shares = torch.linspace(0, 1, count + 2, device=past.device)[1:-1, None, None]
    return torch.lerp(past[:, :, -1:], future[:, :, :1], shares)
