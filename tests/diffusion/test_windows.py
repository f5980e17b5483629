"""Clips in windows: as good as one that is seen at once, without a jump where windows meet."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cmdgen.config import ANIMATEDIFF
from cmdgen.diffusion.samplers import Sampling, ddim
from cmdgen.diffusion.schedule import alphas_cumprod
from cmdgen.diffusion.windows import denoise_windows, order_noise
from cmdgen.request import Plan, Request, resolve

SIDE, SPEED = 8, 0.3


def plan(**options: object) -> Plan:
    return resolve(Request(**options), ANIMATEDIFF)


@pytest.mark.parametrize("frames", [17, 28, 40, 64, 100])
@pytest.mark.parametrize(("window", "overlap"), [(16, 4), (16, 0), (8, 7), (5, 2)])
@pytest.mark.parametrize("seamless", [False, True])
def test_windows_cover_a_clip_and_share_what_they_are_to(
    frames: int, window: int, overlap: int, seamless: bool
) -> None:
    windows = plan(frames=frames, window=window, overlap=overlap, seamless=seamless).windows
    assert {frame for each in windows for frame in each} == set(range(frames))
    assert all(len(set(each)) == window for each in windows)
    pairs = [*pairwise(windows), *([(windows[-1], windows[0])] if seamless else [])]
    assert all(len(set(a) & set(b)) >= overlap for a, b in pairs)
    if not seamless:
        assert windows[0][0] == 0 and windows[-1][-1] == frames - 1


def test_without_asking_a_clip_is_one_window_up_to_what_motion_modules_know() -> None:
    assert plan().windows == [list(range(16))] and plan(frames=32).windows == [list(range(32))]
    assert plan(frames=1).windows == [[0]]
    long = plan(frames=64)
    assert (long.window, long.overlap) == (16, 4)
    # as much work as 16 frames more: a quarter
    assert sum(map(len, long.windows)) == 80 <= 1.3 * 64


def test_noise_of_a_window_is_that_of_the_first_in_another_order() -> None:
    for frames, window, overlap in ((64, 16, 4), (64, 16, 0), (50, 12, 7)):
        order = order_noise(frames, window, window - overlap, torch.Generator().manual_seed(1))
        assert order[:window] == list(range(window)) and len(order) == frames
        for start in range(0, frames - window + 1, window - overlap):
            assert sorted(order[start : start + window]) == list(range(window))
        assert order[window : 2 * window] != order[:window]


def test_what_windows_agree_on_is_kept_and_each_frame_counts_by_its_place() -> None:
    x = torch.randn(2 * 6, 4, 3, 3, dtype=torch.float64)
    windows, time = [[0, 1, 2, 3], [2, 3, 4, 5]], torch.zeros(2, 1, dtype=torch.float64)
    double = denoise_windows([lambda x, *_: 2 * x] * 2, windows, x, time)
    torch.testing.assert_close(double, 2 * x, rtol=1e-14, atol=1e-14)
    made = denoise_windows([lambda x, *_: torch.zeros_like(x), lambda x, *_: torch.ones_like(x)], windows, x, time)
    shares = made.unflatten(0, (2, 6))[0, :, 0, 0, 0]
    # weights 1 2 2 1 of either
    torch.testing.assert_close(shares, torch.tensor([0, 0, 1 / 3, 2 / 3, 1, 1], dtype=torch.float64))


def moving(frames: int, phase: float) -> Tensor:
    """() -> (T, 1, S, S): a wave that moves by SPEED a frame."""
    angle = 2 * math.pi * torch.arange(SIDE) / SIDE - SPEED * torch.arange(frames)[:, None, None] + phase
    return angle.cos().expand(-1, SIDE, -1)[:, None]


def sample(frames: int, overlap: int, *, seamless: bool = False) -> Tensor:
    """() -> (T, S S): by a denoiser that knows the wave, not where it is: each window guesses that from its noise."""
    windows = plan(frames=frames, window=16, overlap=overlap, seamless=seamless).windows
    noise_config, powers = ANIMATEDIFF.noise, alphas_cumprod(ANIMATEDIFF.noise)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha = float(powers[int(t[0])])

        def predict(x: Tensor, *_: Tensor) -> Tensor:
            cosine, sine = (float((x * moving(len(x), shift)).sum()) for shift in (0.0, math.pi / 2))
            clean = moving(len(x), math.atan2(sine, cosine))
            return (x - alpha**0.5 * clean) / (1 - alpha) ** 0.5

        return denoise_windows([predict] * len(windows), windows, x, t[:1, None])

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(16, 1, SIDE, SIDE, generator=generator)
    noise = noise[order_noise(frames, 16, 16 - overlap, generator)]
    return ddim(denoise, noise, Sampling(noise_config, 25)).flatten(1)


def jumps(frames: int, overlap: int, *, seamless: bool) -> float:
    """() -> the largest difference of neighbours at a seam, in deviations of all others from their mean."""
    clip = sample(frames, overlap, seamless=seamless)
    steps = torch.cat([clip, clip[:1]]).diff(dim=0).norm(dim=1)
    steps = steps if seamless else steps[:-1]
    starts = [window[0] for window in plan(frames=frames, window=16, overlap=overlap, seamless=seamless).windows]
    # where a window begins, and where the one before it ends
    seams = {(start + place) % frames for start in starts[not seamless :] for place in (-1, overlap - 1)}
    others = torch.stack([steps[i] for i in range(len(steps)) if i not in seams])
    return float((steps[sorted(seams)] - others.mean()).abs().max() / others.std())


@pytest.mark.parametrize("seamless", [False, True])
def test_windows_meet_without_a_jump(seamless: bool) -> None:
    # within the spread of the others
    assert jumps(64, 4, seamless=seamless) < 3
    # windows that share nothing do jump
    assert jumps(64, 0, seamless=seamless) > 10
