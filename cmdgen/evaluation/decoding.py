"""Memory and time of decoding a clip: in slices, beside whole clips and the VAE frame by frame."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cmdgen.acceleration.memory import Work, choose_slices, peak_bytes
from cmdgen.acceleration.slicer import decode_clip, decode_pictures
from cmdgen.config import ModelConfig
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.vae import KlVae
from cmdgen.request import Slices
from cmdgen.video.pixels import to_rgb24

# of the peak of whole clips: what decoding in slices is to stay below
TARGET = 0.4
C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Decoding:
    """One way to decode a clip, and what it took."""

    # None: the whole clip through the autoencoder, single frames through the VAE
    slices: Slices | None
    # highest bytes of tensors beside the weights; "reserved" of a GPU is with the weights
    memory: dict[str, int]
    # the same by the memory model, of slices
    predicted: int | None
    # of the autoencoder; of the VAE, all frames
    clip_seconds: float
    vae_seconds: float

    @property
    def seconds(self) -> float:
        """Of all of it."""
        return self.clip_seconds + self.vae_seconds


class _Decoder:
    """The networks that decode, their weights random, and one clip for them."""

    def __init__(self, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        assert model.vae is not None and model.autoencoder is not None
        self.model, self.device = model, device
        height, width = (side // model.vae.stride for side in (model.height, model.width))
        patch = model.autoencoder.patch
        positions = width // patch + height // patch
        self.autoencoder = _build(CmdAutoencoder, model.autoencoder, device, dtype)
        self.vae = _build(KlVae, model.vae, device, dtype)
        with device:
            content = torch.randn(1, model.autoencoder.channels, height, width)
            motion = torch.randn(1, model.autoencoder.motion_channels, model.frames, positions)
        self.content, self.motion = content.to(dtype), motion.to(dtype)

    def decode_clip(self, slices: Slices | None) -> Tensor:
        """() -> (1, C, T, h, w)."""
        if slices is None:
            latents: Tensor = self.autoencoder.decode(self.content, self.motion)
            return latents
        return decode_clip(self.autoencoder, self.content, self.motion, slices)

    def decode_slice(self, latents: Tensor, slices: Slices | None) -> Tensor:
        """(N, C, h, w) -> uint8 (N, H, W, 3)."""
        strips = 1 if slices is None else slices.strips
        return to_rgb24(decode_pictures(self.vae, latents, strips))

    def decode(self, slices: Slices | None) -> tuple[float, float]:
        """() -> seconds of the autoencoder and of the VAE, the latter from its first slice."""
        started = self._now()
        latents = rearrange(self.decode_clip(slices), "1 c t h w -> t c h w").contiguous()
        between = self._now()
        frames = torch.empty(
            (len(latents), self.model.height, self.model.width, 3), dtype=torch.uint8
        )
        together = 1 if slices is None else slices.pictures
        frames[:together] = self.decode_slice(latents[:together], slices)
        seconds = (self._now() - between) * len(latents) / together
        return between - started, seconds

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _build(build: Callable[[C], M], config: C, device: torch.device, dtype: torch.dtype) -> M:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return build(config)
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def compare_decoding(
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    runs: int = 1,
    on_progress: OnProgress | None = None,
) -> list[Decoding]:
    """Decode a clip whole, in the slices that are fastest, and in `TARGET` of the whole's memory.

    Seconds are the least of `runs`, in turns. On a CPU, bytes are those of the same run on shapes
    alone, on a GPU what PyTorch allocated. Raises ValueError where the target cannot be met.
    """
    report = on_progress or (lambda stage, done, total: None)
    with FakeTensorMode() if device.type == "cpu" else nullcontext():
        decoder = _Decoder(model, device, dtype)
        whole = _measure_memory(decoder, None)
        budget = int(TARGET * max(whole["live" if device.type == "cpu" else "allocated"], 1))
        ways = [
            None,
            choose_slices(Work(model, dtype), device),
            choose_slices(Work(model, dtype), device, budget),
        ]
        memory = [whole, *(_measure_memory(decoder, slices) for slices in ways[1:])]
    if device.type == "cpu":
        decoder = _Decoder(model, device, dtype)
    seconds: list[list[tuple[float, float]]] = [[] for _ in ways]
    total = runs * len(ways)
    for i in range(total):
        report("decode", i, total)
        seconds[i % len(ways)].append(decoder.decode(ways[i % len(ways)]))
    report("decode", total, total)
    return [
        Decoding(
            slices=slices,
            memory=taken,
            predicted=None if slices is None else Work(model, dtype).peak(slices),
            clip_seconds=min(clip for clip, _ in each),
            vae_seconds=min(vae for _, vae in each),
        )
        for slices, taken, each in zip(ways, memory, seconds, strict=True)
    ]


def _measure_memory(decoder: _Decoder, slices: Slices | None) -> dict[str, int]:
    if decoder.device.type == "cpu":
        return {"live": peak_bytes(lambda: decoder.decode(slices))}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(decoder.device)
    before = torch.cuda.memory_allocated(decoder.device)
    decoder.decode(slices)
    return {
        "allocated": torch.cuda.max_memory_allocated(decoder.device) - before,
        "reserved": torch.cuda.max_memory_reserved(decoder.device),
    }
