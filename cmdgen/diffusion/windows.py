"""Clips longer than their denoiser knows: windows over the frames, whose predictions are averaged.

Neighbouring windows share frames, each of which counts by how far it is from its window's ends. So
memory does not grow with the length. Noise of later frames is that of the first window in another
order, so that all windows begin alike (FreeNoise: Qiu et al. 2023, arXiv:2310.15169).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def denoise_windows(
    predicts: Sequence[Callable[..., Tensor]],
    windows: Sequence[Sequence[int]],
    x: Tensor,
    time: Tensor,
    *conditions: Tensor,
) -> Tensor:
    """(B T, C, h, w), (B, P), conditions with a row for each clip -> (B T, C, h, w), in float32 at least.

    Each window, frames of a clip, has a denoiser of its own, which may keep features.
    """
    clips = x.unflatten(0, (len(time), -1))  # (B, T, C, h, w)
    total = torch.zeros_like(clips, dtype=torch.promote_types(x.dtype, torch.float32))
    weights = total.new_zeros(clips.shape[1])
    for predict, frames in zip(predicts, windows, strict=True):
        index = torch.tensor(frames, device=x.device)
        part = clips[:, index].flatten(0, 1).contiguous(memory_format=torch.channels_last)
        place = torch.arange(len(frames), device=x.device)
        weight = torch.minimum(place + 1, len(frames) - place).to(total.dtype)
        made = predict(part, time, *conditions).unflatten(0, (len(time), -1))
        total[:, index] += weight[:, None, None, None] * made
        weights[index] += weight
    return (total / weights[:, None, None, None]).flatten(0, 1)


def order_noise(frames: int, window: int, stride: int, generator: torch.Generator) -> list[int]:
    """() -> for each frame, the one of the first window whose noise it has; in no window is one there twice."""
    order = list(range(min(window, frames)))
    while len(order) < frames:
        # those that the next window leaves behind
        block = order[len(order) - window :][:stride]
        order += [block[i] for i in torch.randperm(len(block), generator=generator).tolist()]
    return order[:frames]
