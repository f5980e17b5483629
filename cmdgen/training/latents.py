"""Clips as the later stages see them: latents, and (content, motion) pairs, from the cache."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from cmdgen.acceleration.memory import Work, choose_slices
from cmdgen.acceleration.slicer import encode_clip, encode_pictures
from cmdgen.config import AutoencoderConfig, ModelConfig, VaeConfig
from cmdgen.files import hold_folder
from cmdgen.headers import weight_paths
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.vae import KlVae
from cmdgen.options import WHOLE, Shard
from cmdgen.request import Slices
from cmdgen.schema import read_config
from cmdgen.training.cache import ROWS, Rows, fill, fingerprint, read, remove_others
from cmdgen.training.config import Report
from cmdgen.training.data import TrainingData
from cmdgen.video.pixels import to_levels, to_unit

# pixels that go through the VAE's decoder at once: 64 frames of 64x64, one of 512x512 or more
VAE_PIXELS = 2**18
# largest number of clips that are rendered, read or encoded at once
CLIPS = 16
# of a file of latents for many runs: 1 GiB of 16 frames at 512x1024, and no more of larger clips
SHARED_CLIPS, SHARED_BYTES = 1024, 2**30


@dataclass(frozen=True)
class Codec:
    """Frames to the autoencoder's input and back: scaled latents, or pixels without a VAE."""

    # of the VAE, which is read when first needed
    folder: Path | None
    model: ModelConfig
    device: torch.device
    bf16: bool
    # bytes that encoding may hold beside the weights; None: no limit, fastest
    max_memory: int | None = None

    @cached_property
    def vae(self) -> KlVae | None:
        """Return the VAE, frozen."""
        if self.folder is None:
            return None
        return KlVae.from_pretrained(self.folder, device=self.device).requires_grad_(False)

    @cached_property
    def config(self) -> VaeConfig | None:
        """Return the configuration of the VAE."""
        return None if self.folder is None else read_config(self.folder, VaeConfig)

    @cached_property
    def key(self) -> str:
        """Return a hash of all that the latents of a frame depend on: not of the decoder."""
        if self.folder is None or self.config is None:
            return fingerprint([])
        digest, vae = hashlib.blake2b(digest_size=8), KlVae.from_pretrained(self.folder)
        for parameter in (*vae.encoder.parameters(), *vae.quant_conv.parameters()):
            digest.update(parameter.detach().contiguous().numpy().tobytes())
        return fingerprint([], digest.hexdigest(), str(self.config.scaling_factor))

    def autocast(self) -> torch.autocast:
        """Return the precision of encoders and decoders."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def slices(self, batch: int, autoencoder: AutoencoderConfig | None = None) -> Slices:
        """Return how to encode a batch of clips, by this autoencoder or the model's own."""
        autoencoder = autoencoder or self.model.autoencoder
        model = replace(self.model, vae=self.config, autoencoder=autoencoder)
        # weights are float32; in bf16 the convolutions alone run, and others hold no more than that
        work = Work(model, torch.float32, batch, "encode")
        return choose_slices(work, self.device, self.max_memory)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """(B, T, 3, H, W) uint8 -> (B, C, T, h, w) float32, posterior means.

        Raises ValueError, saying how much memory would do, where `max_memory` is too little.
        """
        slices = self.slices(len(frames))
        latents = []
        for part in frames.flatten(0, 1).split(slices.pictures):
            pixels = to_unit(part.to(self.device))
            with self.autocast():
                if self.vae is not None:
                    pixels = encode_pictures(self.vae, pixels, slices.strips).float()
            latents.append(pixels)
        return rearrange(torch.cat(latents), "(b t) c h w -> b c t h w", b=len(frames))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, T, h, w) -> (B, T, 3, H, W) uint8."""
        stride = 1 if self.vae is None else self.vae.config.stride
        step = max(1, VAE_PIXELS // (latents.shape[-2] * latents.shape[-1] * stride**2))
        frames = []
        for part in rearrange(latents, "b c t h w -> (b t) c h w").split(step):
            with self.autocast():
                frames.append(to_levels(part if self.vae is None else self.vae.from_latents(part)))
        return torch.cat(frames).unflatten(0, (len(latents), -1))


@dataclass(frozen=True)
class Encodings:
    """The encoded clips of a run; their files live in `folder`."""

    data: TrainingData
    codec: Codec
    folder: Path
    report: Report
    # folder of latents that `precompute` wrote; nothing is written there
    shared: Path | None = None

    @property
    def key(self) -> str:
        """Return a hash of all that the latents of these clips depend on."""
        return fingerprint([], self.codec.key, self.data.key)

    def latents(self) -> Rows:
        """() -> (N, C, T, h, w) float16, of the clips to learn from."""
        return self._latents("latents", self.data.training)

    def held_out(self, count: int) -> Tensor:
        """() -> (at most `count`, C, T, h, w) float32, of clips that training never sees."""
        latents = self._latents("held-out", self.data.held_out(count))
        return latents[torch.arange(len(latents))].to(self.codec.device).float()

    def _latents(self, kind: str, indices: Tensor) -> Rows:
        place = (self.shared or self.folder) / f"{kind}-{self.key}"
        if self.shared is None:
            remove_others(place)
            self._encode(place, indices, ROWS)
        try:
            return read(place, ("latents",), len(indices))["latents"]
        except ValueError as error:
            height, width = self.data.size
            raise ValueError(
                f"{error}, {self.data.frames} frames of {width}x{height} of this data and VAE:"
                f" first run `cmdgen data precompute -o {self.shared}` for them"
            ) from error

    def precompute(self, held_out: int, shard: Shard = WHOLE) -> None:
        """Encode what `folder` lacks of a shard of the clips to learn from and of those to evaluate on.

        It may serve many runs: encodings of other data, sizes and VAEs stay. Raises OSError where
        another process encodes the same into it.
        """
        place = self.folder if shard == WHOLE else self.folder / f"shard-{shard.number + 1}-of-{shard.of}"
        (height, width), vae = self.data.size, self.codec.config
        assert vae is not None
        # in half precision
        size = 2 * vae.latent_channels * self.data.frames * (height // vae.stride) * (width // vae.stride)
        rows = min(SHARED_CLIPS, max(1, SHARED_BYTES // size))
        with hold_folder(place):
            self._encode(self.folder / f"held-out-{self.key}", self.data.held_out(held_out), rows, shard)
            self._encode(self.folder / f"latents-{self.key}", self.data.training, rows, shard)

    @property
    def step(self) -> int:
        """Return how many clips to encode together: 16 of 64x64, one of 512x512 or more."""
        height, width = self.data.size
        return min(CLIPS, max(1, VAE_PIXELS * CLIPS // (self.data.frames * height * width)))

    def _encode(self, place: Path, indices: Tensor, rows: int, shard: Shard = WHOLE) -> None:
        def encode(part: range) -> dict[str, Tensor]:
            frames = self.data.clips(indices[part.start : part.stop]).frames
            return {"latents": self.codec.encode(frames)}

        fill(place, len(indices), encode, self.report, step=self.step, rows=rows, shard=shard)

    def pairs(self, autoencoder: CmdAutoencoder, folder: Path) -> dict[str, Rows]:
        """() -> content (N, C, h, w) and raw motion (N, D, T, w' + h'), float16.

        `folder` is where the autoencoder was read from.
        """
        weights = weight_paths(folder, CmdAutoencoder.filename)
        place = self.folder / f"pairs-{fingerprint(weights, self.key)}"
        remove_others(place)
        # read when the first pair is missing
        latents = lru_cache(self.latents)

        @torch.no_grad()
        def encode(rows: range) -> dict[str, Tensor]:
            part = latents()[torch.arange(rows.start, rows.stop)].to(self.codec.device).float()
            slices = self.codec.slices(len(part), autoencoder.config)
            with self.codec.autocast():
                content, motion = encode_clip(autoencoder, part, slices)
            return {"content": content, "motion": motion}

        count = len(self.data.training)
        fill(place, count, encode, self.report, step=self.step)
        return read(place, ("content", "motion"), count)
