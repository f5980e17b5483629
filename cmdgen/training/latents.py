"""Clips as the later stages see them: latents, and (content, motion) pairs, from the cache."""

from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.vae import KlVae
from cmdgen.training.cache import cached, fingerprint
from cmdgen.training.data import TrainingData
from cmdgen.training.loop import Report
from cmdgen.training.sheets import to_pixels, to_unit

# frames, and clips, that go through an encoder at once
VAE_BATCH = 64
AUTOENCODER_BATCH = 16


@dataclass(frozen=True)
class Codec:
    """Frames to what the autoencoder works on, and back: scaled latents; pixels without a VAE."""

    vae: KlVae | None
    device: torch.device
    bf16: bool

    def autocast(self) -> torch.autocast:
        """The precision that encoders and decoders run in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """(B, T, 3, H, W) uint8 -> (B, C, T, h, w) float32, posterior means."""
        count = len(frames)
        parts = frames.flatten(0, 1).split(VAE_BATCH)
        with self.autocast():
            latents = torch.cat([self._encode(to_unit(part.to(self.device))) for part in parts])
        return rearrange(latents, "(b t) c h w -> b c t h w", b=count)

    def _encode(self, frames: Tensor) -> Tensor:
        return frames if self.vae is None else self.vae.to_latents(frames).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, T, h, w) -> (B, T, 3, H, W) uint8."""
        count = len(latents)
        parts = rearrange(latents, "b c t h w -> (b t) c h w").split(VAE_BATCH)
        with self.autocast():
            frames = torch.cat([to_pixels(self._decode(part)) for part in parts])
        return frames.unflatten(0, (count, -1))

    def _decode(self, latents: Tensor) -> Tensor:
        return latents if self.vae is None else self.vae.from_latents(latents)


@dataclass(frozen=True)
class Encodings:
    """The training clips, encoded; shards live in `folder`."""

    data: TrainingData
    codec: Codec
    folder: Path
    report: Report

    @property
    def key(self) -> str:
        """Tells the latents of these clips from others."""
        vae = self.codec.vae or torch.nn.Identity()
        scale = "" if self.codec.vae is None else str(self.codec.vae.config.scaling_factor)
        return fingerprint(vae, scale, self.data.key)

    def latents(self) -> Tensor:
        """() -> (N, C, T, h, w) float16."""
        indices = self.data.training

        def encode(rows: range) -> dict[str, Tensor]:
            parts = [
                self.codec.encode(self.data.clips(indices[row : min(row + 16, rows.stop)]).frames)
                for row in range(rows.start, rows.stop, 16)
            ]
            return {"latents": torch.cat(parts)}

        return cached(self.folder, "latents", self.key, len(indices), encode, self.report)[
            "latents"
        ]

    def pairs(self, autoencoder: CmdAutoencoder) -> dict[str, Tensor]:
        """() -> content (N, C, h, w) and raw motion (N, D, T, w' + h'), float16."""
        key = fingerprint(autoencoder, self.key)
        latents: list[Tensor] = []

        @torch.no_grad()
        def encode(rows: range) -> dict[str, Tensor]:
            if not latents:
                latents.append(self.latents())
            parts = latents[0][rows.start : rows.stop].split(AUTOENCODER_BATCH)
            with self.codec.autocast():
                pairs = [autoencoder.encode(part.to(self.codec.device).float()) for part in parts]
            content, motion = zip(*pairs, strict=True)
            return {"content": torch.cat(content), "motion": torch.cat(motion)}

        return cached(
            self.folder,
            "pairs",
            key,
            len(self.data.training),
            encode,
            self.report,
        )
