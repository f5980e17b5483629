"""Training the CMD autoencoder on cached latents: what moves may count more, z is kept small."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cmdgen.data.clips import Clips
from cmdgen.evaluation.metrics import psnr
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.training.config import AutoencoderLoss
from cmdgen.training.context import Run
from cmdgen.training.loop import Batch, Stage
from cmdgen.training.losses import l1_plus_l2, moving_weights
from cmdgen.training.randomness import Order
from cmdgen.training.sheets import compare
from cmdgen.world.world import World

# held-out clips of a sheet
SHEET_CLIPS = 6


class AutoencoderStage(Stage):
    """Clips of scaled VAE latents."""

    def __init__(self, run: Run) -> None:
        assert isinstance(run.loss, AutoencoderLoss)
        self.run, self.weights = run, run.loss
        encodings = run.encodings()
        self.latents = encodings.latents()
        self.held_out = encodings.held_out(run.config.held_out)
        # its VAE leaves its memory to the autoencoder
        del encodings
        self.autoencoder: CmdAutoencoder = run.build("autoencoder")
        self.modules = {"autoencoder": self.autoencoder}
        self.order, self.codec = Order(len(self.latents), run.config.seed), run.codec()
        clips = run.data.clips(run.data.held_out(len(self.held_out)))
        self.frames, self.regions = clips.frames, self._regions(clips)
        mean = self.codec.decode(self.held_out.mean(dim=2, keepdim=True))
        self.mean_frame = mean.expand_as(self.frames)

    def batch(self, step: int) -> Batch:
        """Return latents (B, C, T, H, W)."""
        size = self.run.config.batch
        rows = self.order.rows(step, size)[self.run.ranks.part(size)]
        return {"latents": self.latents[rows].float()}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted reconstruction, and what holds z and the content frame."""
        latents = batch["latents"]
        content, motion = self.autoencoder.encode(latents)
        output = self.autoencoder.decode(content, motion).float()
        weights = moving_weights(latents, self.weights.moving)
        loss = l1_plus_l2(output, latents, weights, l1=self.weights.l1)
        parts = {"reconstruction": loss}
        if self.autoencoder.config.motion_activation == "linear":
            parts["z2"] = motion.float().square().mean()
            loss = loss + self.weights.motion_l2 * parts["z2"]
        if self.weights.content_pull:
            middle = latents[:, :, latents.shape[2] // 2]
            parts["pull"] = (content.float() - middle).square().mean()
            loss = loss + self.weights.content_pull * parts["pull"]
        return loss, parts

    def evaluate(self) -> dict[str, float]:
        """Measure held-out clips: latents, frames beside the mean frame, and how much moves."""
        output, _, motion = reconstruct(self.autoencoder, self.held_out)
        error = (output - self.held_out).square().mean()
        variance = self.held_out.var(dim=2).mean()
        figures = {
            # decibels for a peak of 2, about the range of scaled latents
            "psnr_latents": float(10 * (4 / error).log10()),
            "time_variance_ratio": float(output.var(dim=2).mean() / variance),
            "z_saturated": float((motion.abs() > 0.95).float().mean()),
            "z_std": float(motion.std()),
        }
        for name, decoded in {"": self.codec.decode(output), "_mean_frame": self.mean_frame}.items():
            device = decoded.device
            pair = decoded.float() / 255, self.frames.to(device).float() / 255
            figures[f"psnr{name}"] = psnr(*pair)
            for region, mask in self.regions.items():
                figures[f"psnr_{region}{name}"] = psnr(*pair, mask.to(device))
        return figures

    def _regions(self, clips: Clips) -> dict[str, Tensor]:
        """Return where PSNR is measured, (B, T, H, W) bool each: the subject, its edge, it in each motion."""
        if clips.mask is None:
            return {}
        regions = {"subject": clips.mask, "edge": edge_ring(clips.mask)}
        for number in clips.labels["motion"].unique() if "motion" in clips.labels else ():
            of_motion = (clips.labels["motion"] == number).view(-1, 1, 1, 1)
            assert isinstance(self.run.data.source, World)
            regions[f"subject_{self.run.data.source.motions[number]}"] = clips.mask & of_motion
        return regions

    def sheet(self) -> Tensor:
        """Draw every second frame of clips above its reconstruction, the content frame last."""
        output, content, _ = reconstruct(self.autoencoder, self.held_out[:SHEET_CLIPS])
        still = self.codec.decode(content[:, :, None])
        above, below = self.frames[: len(still)].to(still.device), self.codec.decode(output)
        rows = [torch.cat((frames[:, ::2], still), dim=1) for frames in (above, below)]
        return compare(rows[0], rows[1])


def reconstruct(autoencoder: CmdAutoencoder, latents: Tensor) -> list[Tensor]:
    """(B, C, T, H, W) -> reconstruction, content and motion."""
    parts = []
    for part in latents.split(8):
        content, motion = autoencoder.encode(part)
        parts.append((autoencoder.decode(content, motion), content, motion))
    return [torch.cat(tensors).float() for tensors in zip(*parts, strict=True)]


def edge_ring(mask: Tensor, radius: int = 3) -> Tensor:
    """(B, T, H, W) bool -> the same: the pixels within `radius` of the silhouette's edge, on both sides."""
    cover, window = mask.float(), 2 * radius + 1
    grown = F.max_pool2d(cover, window, 1, radius)
    shrunk = 1 - F.max_pool2d(1 - cover, window, 1, radius)
    return grown > shrunk
