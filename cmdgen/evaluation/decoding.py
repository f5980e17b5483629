"""Memory and time of decoding a clip: in slices, beside whole clips and the VAE frame by frame."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cmdgen.acceleration.memory import Work, choose_slices, peak_bytes
from cmdgen.acceleration.slicer import decode_clip, decode_pictures
from cmdgen.config import ModelConfig
from cmdgen.evaluation.profile import Show, Stopwatch, highest
from cmdgen.latents import latent_shapes
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.vae import KlVae
from cmdgen.request import Slices
from cmdgen.video.pixels import to_rgb24

# decoding in slices is to stay below this share of the peak of whole clips
TARGET = 0.4


@dataclass(frozen=True)
class Decoding:
    """One way to decode a clip, and what it took."""

    # None: the whole clip through the autoencoder, single frames through the VAE
    slices: Slices | None
    # highest bytes of tensors beside the weights; "reserved" of a GPU is with the weights
    memory: dict[str, int]
    # the same as planned, of slices
    predicted: int | None
    # of the autoencoder; of the VAE, all frames
    clip_seconds: float
    vae_seconds: float

    @property
    def seconds(self) -> float:
        """Return those of all of it."""
        return self.clip_seconds + self.vae_seconds


class _Decoder:
    """The networks that decode, with random weights, and one clip for them."""

    def __init__(self, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        assert model.autoencoder is not None and model.vae is not None
        self.device = device
        before = torch.get_default_dtype()
        # fake tensors change neither their dtype nor their device
        torch.set_default_dtype(dtype)
        try:
            with device:
                self.autoencoder = CmdAutoencoder(model.autoencoder)
                self.vae = KlVae(model.vae)
                content, motion = (torch.randn(1, *shape) for shape in latent_shapes(model))
        finally:
            torch.set_default_dtype(before)
        self.halves = content, motion

    def decode(self, slices: Slices | None) -> Stopwatch:
        """() -> seconds of "clip", the autoencoder, and "vae"; those of its first slice scaled."""
        watch = Stopwatch(self.device)
        with watch.stage("clip"):
            if slices is None:
                latents: Tensor = self.autoencoder.decode(*self.halves)
            else:
                latents = decode_clip(self.autoencoder, *self.halves, slices)
            latents = rearrange(latents, "1 c t h w -> t c h w").contiguous()
        together, strips = (1, 1) if slices is None else (slices.pictures, slices.strips)
        height, width = (side * self.vae.config.stride for side in latents.shape[2:])
        with watch.stage("vae"):
            frames = torch.empty(len(latents), height, width, 3, dtype=torch.uint8)
            pictures = decode_pictures(self.vae, latents[:together], strips)
            frames[:together] = to_rgb24(pictures)
        watch.seconds["vae"] *= len(latents) / together
        return watch

    def measure_memory(self, slices: Slices | None) -> dict[str, int]:
        """Return the highest bytes beside the weights: on a CPU, with fake tensors, counted."""
        if self.device.type == "cpu":
            return {"live": peak_bytes(lambda: self.decode(slices))}
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self.device)
        peaks = highest(self.decode(slices).memory.values())
        return {"allocated": peaks["allocated"] - before, "reserved": peaks["reserved"]}


@torch.no_grad()
def compare_decoding(
    model: ModelConfig, device: torch.device, dtype: torch.dtype, *, runs: int, show: Show
) -> dict[str, Decoding]:
    """Decode a clip whole, in the fastest slices, and in `TARGET` of the whole's memory.

    Seconds are the least of `runs`, in turns. On a CPU, bytes are those of the same run on shapes
    alone, on a GPU what PyTorch allocated. Raises ValueError where the target cannot be met.
    """
    fake = FakeTensorMode() if device.type == "cpu" else nullcontext()
    with fake:
        decoder = _Decoder(model, device, dtype)
        whole = decoder.measure_memory(None)
    work, budget = Work(model, dtype), int(TARGET * next(iter(whole.values())))
    ways = {
        "whole": None,
        "default": choose_slices(work, device),
        "least": choose_slices(work, device, budget),
    }
    with fake:
        memory = {name: decoder.measure_memory(slices) for name, slices in ways.items()}
    if device.type == "cpu":
        decoder = _Decoder(model, device, dtype)
    watches: dict[str, list[Stopwatch]] = {name: [] for name in ways}
    turns = list(ways) * runs
    for i, name in enumerate(turns):
        show("decode", i, len(turns))
        watches[name].append(decoder.decode(ways[name]))
    show("decode", len(turns), len(turns))
    return {
        name: Decoding(
            *(slices, memory[name], None if slices is None else work.peak(slices)),
            *(min(watch.seconds[stage] for watch in watches[name]) for stage in ("clip", "vae")),
        )
        for name, slices in ways.items()
    }
