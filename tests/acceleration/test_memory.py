"""Counts on shapes are held to what the operators make, counted tensor by tensor."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cmdgen.acceleration.memory import (
    LiveBytes,
    choose_encoding_slices,
    choose_slices,
    decoding_peak,
    peak_bytes,
)
from cmdgen.acceleration.slicer import decode_clip, decode_pictures, encode_clip, encode_pictures
from cmdgen.config import CMD_SD21, MINI, ModelConfig
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.vae import KlVae
from cmdgen.request import Slices

CPU = torch.device("cpu")
WIDE_MINI = replace(MINI, height=128, width=192)
PAPER = replace(CMD_SD21, height=512, width=1024)
assert MINI.autoencoder is not None and MINI.vae is not None
GATED = replace(
    WIDE_MINI,
    autoencoder=replace(
        MINI.autoencoder, depth=1, attention="gated", attention_features=64, attention_threshold=2.0
    ),
)


def count(model: ModelConfig, slices: Slices, dtype: torch.dtype, batch: int) -> tuple[int, int]:
    """() -> bytes of the autoencoder and of the VAE, with the latents and frames beside it."""
    assert model.vae is not None and model.autoencoder is not None
    height, width = (side // model.vae.stride for side in (model.height, model.width))
    patch, channels = model.autoencoder.patch, model.autoencoder.channels
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():
            # depth is only time: a block holds nothing when it has ended
            autoencoder = CmdAutoencoder(replace(model.autoencoder, depth=1))
            vae = KlVae(model.vae)
            content = torch.randn(batch, channels, height, width)
            positions = width // patch + height // patch
            motion = torch.randn(batch, model.autoencoder.motion_channels, model.frames, positions)
            pictures = torch.randn(slices.pictures, channels, height, width)

            def decode() -> None:
                clip = [torch.empty(batch, model.frames, channels, height, width) for _ in "12"]
                frames = torch.empty(
                    (batch, model.frames, model.height, model.width, 3), dtype=torch.uint8
                )
                decode_pictures(vae, pictures, slices.strips)
                del clip, frames

            return (
                peak_bytes(partial(decode_clip, autoencoder, content, motion, slices)),
                peak_bytes(decode),
            )
    finally:
        torch.set_default_dtype(before)


def count_encoding(
    model: ModelConfig, slices: Slices, dtype: torch.dtype, batch: int
) -> tuple[int, int]:
    """() -> bytes of the autoencoder and of the VAE, with the latents and frames beside it."""
    assert model.vae is not None and model.autoencoder is not None
    height, width = (side // model.vae.stride for side in (model.height, model.width))
    shape = batch, model.autoencoder.channels, model.frames, height, width
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():
            autoencoder = CmdAutoencoder(replace(model.autoencoder, depth=1))
            vae = KlVae(model.vae)

            def summarise() -> None:
                encode_clip(autoencoder, torch.empty(shape), slices)

            def encode() -> None:
                frames = torch.empty(
                    (batch * model.frames, 3, model.height, model.width), dtype=torch.uint8
                )
                latents = [torch.empty(shape) for _ in "12"]
                pictures = (frames[: slices.pictures].float() / 127.5 - 1).to(dtype)
                encode_pictures(vae, pictures, slices.strips)
                del frames, latents

            return peak_bytes(summarise), peak_bytes(encode)
    finally:
        torch.set_default_dtype(before)


CASES = pytest.mark.parametrize(
    ("model", "dtype", "batch", "slices"),
    [
        (MINI, torch.float32, 1, Slices(16, 64, 8)),
        (MINI, torch.bfloat16, 1, Slices(16, 64, 16)),
        (MINI, torch.float64, 2, Slices(6, 25, 3, strips=4)),
        (WIDE_MINI, torch.float32, 3, Slices(1, 16, 1, strips=8)),
        (WIDE_MINI, torch.bfloat16, 1, Slices(5, 7, 2, strips=5)),
        (GATED, torch.float32, 1, Slices(16, 384, 1)),
        (GATED, torch.bfloat16, 2, Slices(3, 50, 1, strips=2)),
        (PAPER, torch.float32, 1, Slices(16, 2048, 1)),
        (PAPER, torch.bfloat16, 1, Slices(16, 2048, 1)),
        (PAPER, torch.bfloat16, 1, Slices(2, 42, 1, strips=3)),
    ],
)


@CASES
def test_prediction_is_no_less_than_what_is_held_and_not_much_more(
    model: ModelConfig, dtype: torch.dtype, batch: int, slices: Slices
) -> None:
    clip, vae = count(model, slices, dtype, batch)
    predicted_clip = frame_decoding_peak(model, slices, dtype, batch=batch)
    predicted_vae = vae_decoding_peak(model, slices, dtype, batch=batch)
    assert clip <= predicted_clip <= 1.4 * clip
    assert vae <= predicted_vae <= 1.2 * vae


@CASES
def test_so_is_that_of_encoding(
    model: ModelConfig, dtype: torch.dtype, batch: int, slices: Slices
) -> None:
    clip, vae = count_encoding(model, slices, dtype, batch)
    assert clip <= frame_encoding_peak(model, slices, dtype, batch) <= 1.4 * clip
    assert vae <= vae_encoding_peak(model, slices, dtype, batch) <= 1.2 * vae


def test_paper_size_fits_in_40_percent_of_whole_clips_and_frames() -> None:
    whole = decoding_peak(PAPER, Slices(16, 2048, 1), torch.float32)
    slices = choose_slices(PAPER, torch.float32, CPU, max_memory=int(0.4 * whole))
    assert slices.pictures == 1 and slices.strips > 1
    assert max(count(PAPER, slices, torch.float32, 1)) <= 0.4 * whole
    # a larger budget leaves frames whole: strips are slower
    assert choose_slices(PAPER, torch.float32, CPU, max_memory=4 * 10**9).strips == 1


def test_encoding_paper_size_fits_in_half_of_whole_clips_and_frames() -> None:
    whole = max(count_encoding(PAPER, Slices(16, 2048, 1), torch.float32, 1))
    slices = choose_encoding_slices(PAPER, torch.float32, CPU, max_memory=whole // 2)
    assert slices.pictures == 1 and slices.strips > 1
    assert max(count_encoding(PAPER, slices, torch.float32, 1)) <= whole // 2
    assert choose_encoding_slices(PAPER, torch.float32, CPU).strips == 1


@pytest.mark.parametrize("model", [MINI, WIDE_MINI, PAPER, replace(MINI, frames=1)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("verb", ["decode", "encode"])
def test_every_budget_is_kept_or_refused_with_the_least_that_will_do(
    model: ModelConfig, batch: int, verb: str
) -> None:
    if verb == "decode":
        plan, *peaks = choose_slices, frame_decoding_peak, vae_decoding_peak
    else:
        plan, *peaks = choose_encoding_slices, frame_encoding_peak, vae_encoding_peak

    def choose(max_memory: int | None) -> Slices:
        return plan(model, torch.float32, CPU, batch=batch, max_memory=max_memory)

    def peak(slices: Slices) -> int:
        # a still has nothing that goes through the autoencoder
        used = peaks if model.frames > 1 else peaks[1:]
        return max(each(model, slices, torch.float32, batch) for each in used)

    free = choose(None)
    most = peak(free)
    assert choose(most) == free
    with pytest.raises(ValueError, match="takes at least") as caught:
        choose(10**6)
    start = f"max memory 1 MB: to {verb} {batch * model.frames} frames of "
    assert str(caught.value).startswith(start)
    least = int(str(caught.value).split()[-2]) * 10**6
    choose(least)
    with pytest.raises(ValueError, match="takes at least"):
        choose(least - 10**6)
    for budget in range(least, most, max(1, (most - least) // 7)):
        assert peak(choose(budget)) <= budget


def test_without_a_budget_frames_are_whole_and_a_gpu_is_given_whole_clips() -> None:
    on_cpu = choose_slices(PAPER, torch.float32, CPU, batch=2)
    # as many as before there were slices: one frame of all clips
    assert (on_cpu.pictures, on_cpu.strips) == (2, 1)
    on_gpu = choose_slices(PAPER, torch.bfloat16, torch.device("cuda"), batch=2)
    assert on_gpu == Slices(frames=32, positions=2 * 2048, pictures=2)
    # small frames in one go
    assert choose_slices(MINI, torch.float32, CPU).pictures == 8


def test_live_bytes_follow_tensors_that_come_and_go() -> None:
    outer = torch.ones(1000)
    with LiveBytes() as counter:
        a = torch.ones(1000)
        view = a[::2]
        del a
        # the view keeps all of it
        assert (counter.now, counter.peak) == (4000, 4000)
        view += 1
        outer += 1
        both = torch.cat((view, view))
        assert (counter.now, counter.peak) == (8000, 8000)
        del view, both
        assert (counter.now, counter.peak) == (0, 8000)


def test_shapes_alone_are_counted_like_numbers() -> None:
    def run() -> None:
        torch.manual_seed(0)
        vae = KlVae(replace(MINI.vae, block_out_channels=(8, 16)))  # type: ignore[type-var]
        decode_pictures(vae, torch.randn(2, 8, 6, 4), 3)

    with FakeTensorMode():
        shapes = peak_bytes(run)
    assert shapes == peak_bytes(run)
