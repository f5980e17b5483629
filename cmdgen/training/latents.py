"""Clips as the later stages see them: latents, and (content, motion) pairs, from the cache."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from cmdgen.acceleration.memory import Work, choose_slices
from cmdgen.acceleration.slicer import encode_clip, encode_pictures
from cmdgen.config import AutoencoderConfig, ModelConfig, VaeConfig
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.vae import KlVae
from cmdgen.request import Slices
from cmdgen.schema import read_config
from cmdgen.training.cache import Rows, fill, fingerprint, read, remove_others
from cmdgen.training.data import TrainingData
from cmdgen.training.loop import Report
from cmdgen.video.pixels import to_levels, to_unit
from cmdgen.weights import weight_paths

# pixels that go through the VAE's decoder at once: 64 frames of 64x64, one of 512x512 or more
VAE_PIXELS = 2**18
# clips, at most, that are drawn or read, or go through the autoencoder, at once
CLIPS = 16


@dataclass(frozen=True)
class Codec:
    """Frames to what the autoencoder works on, and back: scaled latents; pixels without a VAE."""

    # of the VAE, which is read when first needed
    folder: Path | None
    model: ModelConfig
    device: torch.device
    bf16: bool
    # bytes that encoding may hold beside the weights; None: what is fastest
    max_memory: int | None = None

    @cached_property
    def vae(self) -> KlVae | None:
        """The VAE, frozen."""
        if self.folder is None:
            return None
        return KlVae.from_pretrained(self.folder, device=self.device).requires_grad_(False)

    @cached_property
    def key(self) -> str:
        """Tells what this VAE makes of frames from what others do."""
        if self.folder is None or self.config is None:
            return fingerprint([])
        scale = self.config.scaling_factor
        return fingerprint(weight_paths(self.folder, KlVae.filename), str(scale))

    @cached_property
    def config(self) -> VaeConfig | None:
        """Of the VAE."""
        return None if self.folder is None else read_config(self.folder, VaeConfig)

    def autocast(self) -> torch.autocast:
        """The precision that encoders and decoders run in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """(B, T, 3, H, W) uint8 -> (B, C, T, h, w) float32, posterior means.

        Raises ValueError, saying how much memory would do, where `max_memory` is too little.
        """
        count, length, _, *size = frames.shape
        slices = self.slices(count, length, size)
        parts = frames.flatten(0, 1).split(slices.pictures)
        with self.autocast():
            latents = torch.cat(
                [self._encode(to_unit(part.to(self.device)), slices.strips) for part in parts]
            )
        return rearrange(latents, "(b t) c h w -> b c t h w", b=count)

    def slices(
        self,
        batch: int,
        frames: int,
        size: Sequence[int],
        autoencoder: AutoencoderConfig | None = None,
    ) -> Slices:
        """How to encode clips of (H, W), by this autoencoder or the model's own."""
        height, width = size
        model = replace(self.model, vae=self.config, frames=frames, height=height, width=width)
        if autoencoder is not None:
            model = replace(model, autoencoder=autoencoder)
        # weights are float32; in bf16 the convolutions alone run, and others hold no more than that
        work = Work(model, torch.float32, batch, "encode")
        return choose_slices(work, self.device, self.max_memory)

    def _encode(self, frames: Tensor, strips: int) -> Tensor:
        return frames if self.vae is None else encode_pictures(self.vae, frames, strips).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, T, h, w) -> (B, T, 3, H, W) uint8."""
        count = len(latents)
        stride = 1 if self.vae is None else self.vae.config.stride
        parts = rearrange(latents, "b c t h w -> (b t) c h w").split(_at_once(latents, stride))
        with self.autocast():
            frames = torch.cat([to_levels(self._decode(part)) for part in parts])
        return frames.unflatten(0, (count, -1))

    def _decode(self, latents: Tensor) -> Tensor:
        return latents if self.vae is None else self.vae.from_latents(latents)


def _at_once(frames: Tensor, stride: int = 1) -> int:
    return max(1, VAE_PIXELS // (frames.shape[-2] * frames.shape[-1] * stride**2))


@dataclass(frozen=True)
class Encodings:
    """The clips of a run, encoded; shards live in `folder`, latents maybe in one for many runs."""

    data: TrainingData
    codec: Codec
    folder: Path
    report: Report
    # of latents that were encoded before, see `precompute`; nothing is written there
    shared: Path | None = None

    @property
    def key(self) -> str:
        """Tells the latents of these clips from others."""
        return fingerprint([], self.codec.key, self.data.key)

    def latents(self) -> Rows:
        """() -> (N, C, T, h, w) float16, of the clips to learn from."""
        return self._latents("latents", self.data.training)

    def held_out(self, count: int) -> Tensor:
        """() -> (at most `count`, C, T, h, w) float32, of clips that training never sees."""
        latents = self._latents("held-out", self.data.held_out(count))
        return latents[torch.arange(len(latents))].to(self.codec.device).float()

    def _latents(self, kind: str, indices: Tensor) -> Rows:
        if self.shared is None:
            place = self.folder / f"{kind}-{self.key}"
            remove_others(place)
            self._encode(place, indices)
            return read(place, ("latents",), len(indices))["latents"]
        height, width = self.data.size
        wanted = f"{self.data.frames} frames of {width}x{height} of this data and VAE"
        try:
            return read(self.shared / f"{kind}-{self.key}", ("latents",), len(indices))["latents"]
        except ValueError as error:
            raise ValueError(
                f"{error}, {wanted}: first run `cmdgen data precompute -o {self.shared}` for them"
            ) from error

    def precompute(self, held_out: int) -> None:
        """Encodes what `folder` lacks of the clips to learn from and of those to evaluate on.

        It may serve many runs: encodings of other data, sizes and VAEs stay.
        """
        self._encode(self.folder / f"held-out-{self.key}", self.data.held_out(held_out))
        self._encode(self.folder / f"latents-{self.key}", self.data.training)

    @property
    def at_once(self) -> int:
        """Clips to encode together: 16 of 64x64, one of 512x512 or more."""
        height, width = self.data.size
        return min(CLIPS, max(1, VAE_PIXELS * CLIPS // (self.data.frames * height * width)))

    def _encode(self, place: Path, indices: Tensor) -> None:
        def encode(rows: range) -> dict[str, Tensor]:
            frames = self.data.clips(indices[rows.start : rows.stop]).frames
            return {"latents": self.codec.encode(frames)}

        fill(place, len(indices), encode, self.report, step=self.at_once)

    def pairs(self, autoencoder: CmdAutoencoder, folder: Path) -> dict[str, Rows]:
        """() -> content (N, C, h, w) and raw motion (N, D, T, w' + h'), float16.

        `folder` is where the autoencoder was read from.
        """
        weights = weight_paths(folder, CmdAutoencoder.filename)
        place = self.folder / f"pairs-{fingerprint(weights, self.key)}"
        remove_others(place)
        latents: list[Rows] = []

        @torch.no_grad()
        def encode(rows: range) -> dict[str, Tensor]:
            if not latents:
                latents.append(self.latents())
            part = latents[0][torch.arange(rows.start, rows.stop)]
            slices = self.codec.slices(
                len(part), self.data.frames, self.data.size, autoencoder.config
            )
            with self.codec.autocast():
                content, motion = encode_clip(
                    autoencoder, part.to(self.codec.device).float(), slices
                )
            return {"content": content, "motion": motion}

        count = len(self.data.training)
        fill(place, count, encode, self.report, step=self.at_once)
        return read(place, ("content", "motion"), count)
