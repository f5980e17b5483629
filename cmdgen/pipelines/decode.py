"""Latents to pictures, frame by frame, as soon as they can be shown, and frames to latents."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from cmdgen.acceleration.overlap import Pending, fetch, start
from cmdgen.acceleration.slicer import decode_pictures, encode_pictures
from cmdgen.models.tiny_vae import TinyVae
from cmdgen.models.vae import KlVae
from cmdgen.pipelines.observer import Observer
from cmdgen.request import Slices
from cmdgen.video.formats import Pixels
from cmdgen.video.pixels import CONVERT, to_rgb24, to_unit

# of latents
Make = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Decoder:
    """A VAE that decodes in slices; `check` raises ValueError for a sample with NaN or inf.

    `prepare` takes a function and returns it as it runs fastest, under a key that tells it from others.
    """

    vae: KlVae | TinyVae
    slices: Slices
    check: Callable[[Tensor, str], Tensor]
    observer: Observer
    prepare: Callable[[object, Make], Make] = lambda _, make: make

    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) -> (B, 3, H, W), in [-1, 1] except for overshoot, and their sum ().

        The sum, on the device, tells whether all are finite.
        """
        pixels = decode_pictures(self.vae, latents, self.slices.strips)
        return pixels, pixels.sum(dtype=torch.float32)

    def shows(self, pixels: Pixels) -> Make:
        """Return a function: (B, C, h, w) -> uint8 (B, ...) in `pixels`, and the sum of `decode`."""

        def show(latents: Tensor) -> tuple[Tensor, Tensor]:
            decoded, total = self.decode(latents)
            return CONVERT[pixels](decoded), total

        return show

    def picture(self, latent: Tensor) -> np.ndarray:
        """(B, C, h, w) -> uint8 (H, W, 3) of the first latent."""
        picture: np.ndarray = to_rgb24(self.decode(latent[:1])[0])[0].cpu().numpy()
        return picture

    def start_pictures(self, content: Tensor, stream: torch.cuda.Stream | None = None) -> Pending:
        """(B, C, h, w) -> uint8 (B, H, W, 3), beside other work if there is a stream for it."""
        show = self.shows("rgb24")

        def decode(content: Tensor) -> Tensor:
            made, sums = zip(*map(show, content.split(self.slices.pictures)), strict=True)
            if stream is None:
                # beside other work nothing may wait: there, the frames tell
                self.check(torch.stack(sums), "vae")
            return torch.cat(made)

        def hand_out(pictures: Tensor) -> None:
            for i, picture in enumerate(pictures.numpy()):
                self.observer.content(i, picture)

        return start(decode, content, hand_out, stream=stream)

    def clips(self, latents: Tensor, pixels: Pixels) -> tuple[np.ndarray, Tensor]:
        """(B, C, T, h, w) -> uint8 (B, T, ...) in `pixels`, the middle frames (B, H, W, 3) uint8."""
        count = latents.shape[2]
        if isinstance(self.vae, TinyVae) or self.vae.config.temporal == "none":
            middle = self.start_pictures(latents[:, :, count // 2]).finish()
            return self.frames(latents, pixels), middle
        made: list[np.ndarray] = []
        middles: list[Tensor] = []
        for i, clip in enumerate(rearrange(latents, "b c t h w -> b t c h w")):
            decoded, total = self.decode(clip)
            self.check(total, "vae")
            middles.append(to_rgb24(decoded[count // 2 :][:1]).cpu())
            self.observer.content(i, middles[-1][0].numpy())
            made.append(CONVERT[pixels](decoded).cpu().numpy())
            self.observer.frames(i, made[-1])
            self.observer.step("decode", i + 1, len(latents))
        return np.stack(made), torch.cat(middles)

    def frames(self, latents: Tensor, pixels: Pixels) -> np.ndarray:
        """(B, C, T, h, w) -> uint8 (B, T, ...) in `pixels`; all clips' first frames come first."""
        show = self.shows(pixels)
        prepared = self.prepare(("frames", pixels, self.slices.strips), show)
        batch, _, count = latents.shape[:3]
        frames: np.ndarray | None = None
        parts = rearrange(latents, "b c t h w -> (t b) c h w").split(self.slices.pictures)
        pictures = done = 0
        sums: list[Tensor] = []

        def run(part: Tensor) -> Tensor:
            # what is left at the end is not worth its preparation
            shown, total = (prepared if len(part) == self.slices.pictures else show)(part)
            sums.append(total)
            return shown

        for part in fetch(map(run, parts)):
            if frames is None:
                frames = np.empty((batch, count, *part.shape[1:]), np.uint8)
            for picture in part.numpy():
                frames[pictures % batch, pictures // batch] = picture
                pictures += 1
            ready, done = slice(done, pictures // batch), pictures // batch
            if ready.start < done:
                for i in range(batch):
                    self.observer.frames(i, frames[i, ready])
                self.observer.step("decode", done, count)
        assert frames is not None
        # once, at the end: the GPU is never waited for
        self.check(torch.stack(sums), "vae")
        return frames

    def still_frames(self, pictures: Tensor, pixels: Pixels) -> np.ndarray:
        """uint8 (B, H, W, 3) -> uint8 (B, 1, ...) in `pixels`: clips of one frame."""
        levels = rearrange(pictures, "b h w c -> b c h w")
        frames: np.ndarray = CONVERT[pixels](to_unit(levels))[:, None].numpy()
        for i, frame in enumerate(frames):
            self.observer.frames(i, frame)
        return frames


def encode_frames(vae: KlVae, frames: np.ndarray, strips: int = 1) -> Tensor:
    """uint8 (N, H, W, 3) -> (N, C, h, w), scaled: the mean of the VAE's posterior."""
    weights = next(vae.parameters())
    # copied: the frames of others may be read-only
    pixels = torch.tensor(frames, device=weights.device)
    unit = to_unit(rearrange(pixels, "n h w c -> n c h w"))
    return encode_pictures(vae, unit.to(weights.dtype), strips)
