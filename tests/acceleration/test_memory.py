"""Counts on shapes are held to what the operators make of numbers, tensor by tensor."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cmdgen.acceleration.memory import LiveBytes, Work, choose_slices, count_peak, peak_bytes
from cmdgen.acceleration.slicer import decode_clip, decode_pictures, encode_clip, encode_pictures
from cmdgen.config import CMD_SD21, MINI, ModelConfig
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.vae import KlVae
from cmdgen.request import Slices

CPU = torch.device("cpu")
assert MINI.autoencoder is not None and MINI.vae is not None and CMD_SD21.autoencoder is not None
# depth takes time and no memory
SHALLOW = replace(MINI.autoencoder, patch=2, depth=1, decoder_depth=1)
WIDE_MINI = replace(MINI, height=128, width=192, autoencoder=SHALLOW)
PAPER = replace(CMD_SD21, height=512, width=1024, autoencoder=replace(CMD_SD21.autoencoder, depth=1))
GATED = replace(
    WIDE_MINI, autoencoder=replace(SHALLOW, attention="gated", attention_features=64, attention_threshold=2.0)
)


def measure(work: Work, slices: Slices) -> tuple[int, int]:
    """() -> bytes of the VAE, with all frames and latents, and of the autoencoder, on a CPU."""
    model, batch, dtype = work.model, work.batch, work.dtype
    assert model.vae is not None and model.autoencoder is not None
    height, width = (side // model.vae.stride for side in (model.height, model.width))
    patch, channels = model.autoencoder.patch, model.autoencoder.channels
    size = batch * model.frames, 3, model.height, model.width
    autoencoder, vae = CmdAutoencoder(model.autoencoder), KlVae(model.vae)
    if dtype != torch.float32:
        autoencoder, vae = autoencoder.to(dtype), vae.to(dtype)
    clip = torch.randn(batch, channels, model.frames, height, width, dtype=dtype)
    positions = width // patch + height // patch
    motion = torch.randn(batch, model.autoencoder.motion_channels, model.frames, positions, dtype=dtype)

    def decode() -> None:
        latents = clip.transpose(1, 2).flatten(0, 1).clone(), clip.clone()
        frames = torch.empty(size, dtype=torch.uint8)
        decode_pictures(vae, latents[0][: slices.pictures], slices.strips)
        del latents, frames

    def encode() -> None:
        latents = clip.clone(), clip.clone()
        frames = torch.empty(size, dtype=torch.uint8)
        unit = frames[: slices.pictures].float() / 127.5 - 1
        encode_pictures(vae, unit.to(dtype), slices.strips)
        del latents, frames

    if work.verb == "decode":
        content = clip[:, :, 0].contiguous()
        return peak_bytes(decode), peak_bytes(partial(decode_clip, autoencoder, content, motion, slices))
    return peak_bytes(encode), peak_bytes(lambda: encode_clip(autoencoder, clip.clone(), slices))


@pytest.mark.parametrize(
    ("model", "dtype", "batch", "slices"),
    [
        (MINI, torch.float32, 1, Slices(16, 64, 8)),
        (MINI, torch.bfloat16, 1, Slices(16, 64, 16)),
        (MINI, torch.float64, 2, Slices(6, 25, 3, strips=4)),
        (WIDE_MINI, torch.float32, 3, Slices(1, 100, 1, strips=8)),
        (WIDE_MINI, torch.bfloat16, 1, Slices(5, 21, 2, strips=5)),
        (GATED, torch.float32, 1, Slices(16, 384, 1)),
        (GATED, torch.bfloat16, 2, Slices(3, 50, 1, strips=2)),
        (PAPER, torch.float32, 1, Slices(16, 2048, 1)),
        (PAPER, torch.float32, 1, Slices(2, 210, 1, strips=3)),
    ],
)
@pytest.mark.parametrize("verb", ["decode", "encode"])
def test_a_count_on_shapes_is_what_a_run_holds(
    model: ModelConfig, dtype: torch.dtype, batch: int, slices: Slices, verb: str
) -> None:
    work = Work(model, dtype, batch, verb)
    # a run of the paper's size takes minutes: the CPU's own operators, on shapes
    with FakeTensorMode() if model is PAPER else nullcontext():
        measured = measure(work, slices)
    for run, held in zip(work.runs, measured, strict=True):
        assert held <= count_peak(run, work, slices) <= 1.02 * held
    assert held <= work.peak(slices)


def test_counting_imports_no_compiler_and_without_a_limit_nothing_is_counted() -> None:
    code = (
        "import sys, torch\n"
        "from cmdgen.acceleration.memory import Work, choose_slices, count_peak\n"
        "from cmdgen.config import MINI\n"
        "for verb in ('decode', 'encode'):\n"
        "    for limit in (None, 6_000_000):\n"
        "        choose_slices(Work(MINI, torch.float32, 1, verb), torch.device('cpu'), limit)\n"
        "        assert (count_peak.cache_info().misses > 0) == (limit is not None)\n"
        "    count_peak.cache_clear()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# activations in place leave 1.1 GB of a whole clip to encode, and no less of its smallest slices
@pytest.mark.parametrize(("verb", "share"), [("decode", 0.4), ("encode", 0.52)])
def test_paper_size_fits_in_half_of_whole_clips_and_frames(verb: str, share: float) -> None:
    work = Work(PAPER, torch.float32, 1, verb)
    whole = work.peak(Slices(16, 2048, 1))
    slices = choose_slices(work, CPU, int(share * whole))
    assert slices.pictures == 1 and slices.strips > 1
    with FakeTensorMode():
        assert max(measure(work, slices)) <= share * whole
    # a larger limit leaves frames whole: strips are slower
    assert choose_slices(work, CPU, 4 * 10**9).strips == choose_slices(work, CPU).strips == 1


@pytest.mark.parametrize("model", [MINI, replace(MINI, height=48, width=96), replace(MINI, frames=1)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("verb", ["decode", "encode"])
def test_every_limit_is_kept_or_refused_with_the_least_that_will_do(model: ModelConfig, batch: int, verb: str) -> None:
    work = Work(model, torch.float32, batch, verb)
    choose: Callable[[int | None], Slices] = partial(choose_slices, work, CPU)
    fastest = choose(None)
    most = work.peak(fastest)
    assert choose(most) == fastest
    with pytest.raises(ValueError, match="takes at least") as caught:
        choose(10**6)
    start = f"max memory 1 MB: to {verb} {batch * model.frames} frames of "
    assert str(caught.value).startswith(start)
    least = int(str(caught.value).split()[-2]) * 10**6
    choose(least)
    with pytest.raises(ValueError, match="takes at least"):
        choose(least - 10**6)
    for limit in range(least, most, max(1, (most - least) // 7)):
        assert work.peak(choose(limit)) <= limit


def test_without_a_limit_frames_are_whole_and_a_gpu_is_given_whole_clips() -> None:
    on_cpu = choose_slices(Work(PAPER, torch.float32, 2), CPU)
    # as many as before there were slices: one frame of all clips
    assert (on_cpu.pictures, on_cpu.strips) == (2, 1)
    on_gpu = choose_slices(Work(PAPER, torch.bfloat16, 2), torch.device("cuda"))
    assert on_gpu == Slices(frames=32, positions=2 * 2048, pictures=2)
    # CUDA's attention fails where it has 65,536 rows or more, a row for each position
    many = choose_slices(Work(PAPER, torch.bfloat16, 32), torch.device("cuda"))
    assert many == Slices(frames=512, positions=32768, pictures=32)
    # two small frames in one go
    assert choose_slices(Work(MINI, torch.float32), CPU).pictures == 2


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


SHAPE = (2, 8, 6, 4)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x / 3 + y * x.to(torch.float64) - 1,
        lambda x, y: torch.cat((x, y), dim=-2) + torch.stack((x[0], y[0])).mean(dim=2)[:, :, None],
        lambda x, y: torch.nn.functional.linear(x, y[0, 0, :, :], y[0, 0, :, 0]),
        lambda x, y: torch.polar(x, y) * torch.polar(y, x) / 2,
        lambda x, y: torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda x, y: torch.nn.functional.layer_norm(x, (4,)) + torch.arange(4, device=x.device),
        lambda x, y: torch.nn.functional.group_norm(x, 4).contiguous(),
        lambda x, y: (x > y).float() * x.sign(),
        lambda x, y: x.add_(1).clamp_(0, 1) + y.transpose(2, 3).transpose(3, 2),
    ],
)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_an_operator_that_stands_in_makes_the_same_tensor(function, order) -> None:
    values = [torch.rand(SHAPE).to(memory_format=order) for _ in range(2)]
    shapes = [value.to("meta") for value in values]
    results = []
    for tensors in (values, shapes):
        with torch.no_grad(), LiveBytes():
            results.append(function(*tensors))
    real, shape = results
    assert (shape.shape, shape.dtype, shape.stride()) == (real.shape, real.dtype, real.stride())
    assert shape.is_meta
