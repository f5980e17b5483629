"""Memory and time of decoding a clip: in slices, beside whole clips and the VAE frame by frame."""

from dataclasses import asdict
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from cmdgen.acceleration.graphs import fastest_libraries
from cmdgen.acceleration.memory import FusedAttention, Work, choose_slices, peak_bytes
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


class _Decoder:
    """The networks that decode, with random weights, and one clip for them."""

    def __init__(self, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        assert model.autoencoder is not None and model.vae is not None
        self.device = device
        with device:
            self.autoencoder = CmdAutoencoder(model.autoencoder).to(dtype)
            vae: Any = KlVae(model.vae)
            self.vae: KlVae = vae.to(dtype=dtype, memory_format=torch.channels_last)
            content, motion = (torch.randn(1, *shape).to(dtype) for shape in latent_shapes(model))
        self.halves = content, motion

    def decode(self, slices: Slices | None) -> Stopwatch:
        """() -> seconds of "clip", the autoencoder, and "vae"; those of its first slice scaled."""
        together, strips = (1, 1) if slices is None else (slices.pictures, slices.strips)
        watch = Stopwatch(self.device)
        with fastest_libraries(self.device):
            with watch.stage("clip"):
                if slices is None:
                    latents: Tensor = self.autoencoder.decode(*self.halves)
                else:
                    latents = decode_clip(self.autoencoder, *self.halves, slices)
                latents = rearrange(latents, "1 c t h w -> t c h w").contiguous()
            height, width = (side * self.vae.config.stride for side in latents.shape[2:])
            with watch.stage("vae"):
                # the frames of a GPU go to the CPU
                place = "meta" if latents.is_meta else "cpu"
                frames = torch.empty(len(latents), height, width, 3, dtype=torch.uint8, device=place)
                pictures = decode_pictures(self.vae, latents[:together], strips)
                frames[:together] = to_rgb24(pictures)
        watch.seconds["vae"] *= len(latents) / together
        return watch

    def measure_memory(self, slices: Slices | None) -> dict[str, int]:
        """Return the highest bytes beside the weights; on the meta device, counted."""
        if self.device.type == "meta":
            with FusedAttention():
                return {"live": peak_bytes(lambda: self.decode(slices))}
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self.device)
        peaks = highest(self.decode(slices).memory.values())
        return {"allocated": peaks["allocated"] - before, "reserved": peaks["reserved"]}


@torch.no_grad()
def compare_decoding(
    model: ModelConfig, device: torch.device, dtype: torch.dtype, *, runs: int, show: Show
) -> dict[str, dict[str, Any]]:
    """Decode a clip whole, in the fastest slices, and in `TARGET` of the whole's memory.

    Seconds are the least of `runs`, in turns. Memory is the highest of tensors beside the weights:
    on a CPU counted on shapes, on a GPU what PyTorch allocated; "reserved" is with the
    weights. Raises ValueError where the target cannot be met.
    """
    decoder, work = _Decoder(model, device, dtype), Work(model, dtype)
    # of a CPU's memory, other things are a part; of Apple's, PyTorch does not tell the peak
    counter = decoder if device.type == "cuda" else _Decoder(model, torch.device("meta"), dtype)
    whole = counter.measure_memory(None)
    ways = {
        "whole": None,
        "default": choose_slices(work, device),
        "least": choose_slices(work, device, int(TARGET * next(iter(whole.values())))),
    }
    memory = {name: counter.measure_memory(slices) for name, slices in ways.items()}
    watches: dict[str, list[Stopwatch]] = {name: [] for name in ways}
    turns = list(ways) * runs
    for i, name in enumerate(turns):
        show("decode", i, len(turns))
        watches[name].append(decoder.decode(ways[name]))
    show("decode", len(turns), len(turns))
    records = {}
    for name, slices in ways.items():
        clip, vae = (min(w.seconds[stage] for w in watches[name]) for stage in ("clip", "vae"))
        records[name] = {
            "slices": None if slices is None else asdict(slices),
            "memory": memory[name],
            "predicted": None if slices is None else work.peak(slices),
            **{"clip_seconds": clip, "vae_seconds": vae, "seconds": clip + vae},
        }
    return records
