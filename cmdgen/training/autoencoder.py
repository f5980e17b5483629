"""Training the CMD autoencoder on cached latents: what moves may count more, z is kept small."""

from pathlib import Path

import torch
from torch import Tensor, nn

from cmdgen.evaluation.metrics import psnr
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.training.cache import Rows
from cmdgen.training.config import AutoencoderLoss
from cmdgen.training.data import TrainingData
from cmdgen.training.latents import Codec
from cmdgen.training.loop import Batch
from cmdgen.training.losses import l1_plus_l2, moving_weights
from cmdgen.training.randomness import Order
from cmdgen.training.sheets import grid


class AutoencoderStage:
    """Clips of scaled VAE latents; `held_out` are those of clips that training never sees."""

    def __init__(
        self,
        autoencoder: CmdAutoencoder,
        latents: Rows,
        held_out: Tensor,
        codec: Codec,
        data: TrainingData,
        weights: AutoencoderLoss,
        *,
        batch: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.autoencoder, self.latents, self.codec = autoencoder, latents, codec
        self.modules: dict[str, nn.Module] = {"autoencoder": autoencoder}
        self.weights, self.size, self.device = weights, batch, device
        self.order = Order(len(latents), seed)
        clips = data.clips(data.held_out(len(held_out)))
        self.frames, self.mask = clips.frames, clips.mask
        self.held_out = held_out
        self.mean_frame = codec.decode(self.held_out.mean(dim=2, keepdim=True)).expand_as(
            self.frames
        )

    def batch(self, step: int) -> Batch:
        """Latents (B, C, T, H, W)."""
        return {"latents": self.latents[self.order.rows(step, self.size)].to(self.device).float()}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted reconstruction, and what holds z and the content frame."""
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
        """On held-out clips: latents, frames beside the mean frame, and whether anything moves."""
        output, _, motion = self._reconstruct(self.held_out)
        error = (output - self.held_out).square().mean()
        spread = self.held_out.var(dim=2).mean()
        figures = {
            # decibels for a peak of 2, about the range of scaled latents
            "psnr_latents": float(10 * (4 / error).log10()),
            "time_variance_ratio": float(output.var(dim=2).mean() / spread),
            "z_saturated": float((motion.abs() > 0.95).float().mean()),
            "z_std": float(motion.std()),
        }
        decoded = self.codec.decode(output)
        for name, frames in {"": decoded, "_mean_frame": self.mean_frame}.items():
            pair = frames.float() / 255, self.frames.to(frames.device).float() / 255
            figures[f"psnr{name}"] = psnr(*pair)
            if self.mask is not None:
                figures[f"psnr_subject{name}"] = psnr(*pair, self.mask.to(frames.device))
        return figures

    def _reconstruct(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, T, H, W) -> reconstruction, content and motion."""
        parts = []
        for part in latents.split(8):
            content, motion = self.autoencoder.encode(part)
            parts.append((self.autoencoder.decode(content, motion), content, motion))
        output, contents, motions = (
            torch.cat(tensors).float() for tensors in zip(*parts, strict=True)
        )
        return output, contents, motions

    def sheet(self) -> Tensor:
        """Every second frame of held-out clips above its reconstruction, the content frame last."""
        output, content, _ = self._reconstruct(self.held_out[:6])
        decoded = self.codec.decode(output)
        still = self.codec.decode(content[:, :, None])
        rows = []
        for i in range(len(decoded)):
            rows.append(torch.cat((self.frames[i, ::2].to(decoded.device), still[i])))
            rows.append(torch.cat((decoded[i, ::2], still[i])))
        return grid(torch.stack(rows))

    def export(self, folder: Path) -> None:
        """Writes autoencoder/."""
        self.autoencoder.save_pretrained(folder / "autoencoder")
