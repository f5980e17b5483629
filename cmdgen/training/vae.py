"""Training the VAE on single frames: the subject and its edges count more, and a small KL."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cmdgen.config import VaeConfig
from cmdgen.evaluation.metrics import psnr
from cmdgen.models.vae import KlVae
from cmdgen.training.config import VaeLoss
from cmdgen.training.data import TrainingData
from cmdgen.training.loop import Batch
from cmdgen.training.losses import edge_difference, gaussian_kl, l1_plus_l2
from cmdgen.training.randomness import Order, seeded
from cmdgen.training.sheets import compare
from cmdgen.video.pixels import to_levels, to_unit


def fresh_vae(config: VaeConfig) -> KlVae:
    """A VAE from scratch; a posterior that started wide would drown the means in noise."""
    vae = KlVae(config)
    assert vae.quant_conv.bias is not None
    with torch.no_grad():
        vae.quant_conv.weight[config.latent_channels :] *= 0.1
        vae.quant_conv.bias[config.latent_channels :] = -6.0
    return vae


class VaeStage:
    """Frames of clips rendered as they are needed, a few from each."""

    def __init__(
        self,
        vae: KlVae,
        data: TrainingData,
        weights: VaeLoss,
        *,
        batch: int,
        seed: int,
        device: torch.device,
        frames_per_clip: int = 2,
    ) -> None:
        if batch % frames_per_clip:
            raise ValueError(
                f"batch {batch} is not a multiple of the {frames_per_clip} frames of a clip"
            )
        self.vae, self.data, self.weights, self.device = vae, data, weights, device
        self.modules: dict[str, nn.Module] = {"vae": vae}
        self.seed, self.frames_per_clip = seed, frames_per_clip
        self.clips = batch // frames_per_clip
        self.training = data.training
        self.order = Order(len(self.training), seed)
        self.held_out = self._frames(data.held_out(32), seeded(seed, "held out"))
        self.measured = self._frames(self.training[:64], seeded(seed, "scale"))["frames"]

    def batch(self, step: int) -> Batch:
        """Frames (B, 3, H, W) uint8, the subject's mask (B, 1, H, W), noise for the latents."""
        generator = seeded(self.seed, "vae", step)
        rows = self.order.rows(step, self.clips)
        batch = self._frames(self.training[rows], generator)
        frames, config = batch["frames"], self.vae.config
        height, width = (side // config.stride for side in frames.shape[-2:])
        noise = torch.randn(
            (len(frames), config.latent_channels, height, width), generator=generator
        )
        return {**batch, "noise": noise.to(self.device)}

    def _frames(self, indices: Tensor, generator: torch.Generator) -> Batch:
        clips = self.data.clips(indices)
        count = clips.frames.shape[1]
        chosen = torch.rand((len(indices), count), generator=generator).argsort(dim=1)
        chosen = chosen[:, : self.frames_per_clip].to(clips.frames.device)
        rows = torch.arange(len(indices), device=clips.frames.device)[:, None]
        frames = clips.frames[rows, chosen].flatten(0, 1)
        mask = torch.zeros_like(frames[:, :1], dtype=torch.bool)
        if clips.mask is not None:
            mask = clips.mask[rows, chosen].flatten(0, 1)[:, None]
        return {"frames": frames.to(self.device), "mask": mask.to(self.device)}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction of a sample of the posterior, and its KL."""
        frames = to_unit(batch["frames"])
        mean, logvar = (moment.float() for moment in self.vae.encode(frames))
        output = self.vae.decode(mean + (0.5 * logvar).exp() * batch["noise"]).float()
        weights = 1 + self.weights.mask * batch["mask"].float()
        pixels = l1_plus_l2(output, frames, weights)
        edges = edge_difference(output, frames, weights)
        kl = gaussian_kl(mean, logvar)
        loss = pixels + self.weights.edges * edges + self.weights.kl * kl
        return loss, {"pixels": pixels, "edges": edges, "kl": kl}

    def evaluate(self) -> dict[str, float]:
        """PSNR on held-out frames, overall and inside the subject's mask."""
        frames, mask = self.held_out["frames"], self.held_out["mask"][:, 0]
        output = self._reconstruct(frames).float() / 255
        target = frames.float() / 255
        figures = {"psnr": psnr(output, target)}
        if mask.any():
            figures["psnr_subject"] = psnr(output, target, mask)
        return figures

    def _reconstruct(self, frames: Tensor) -> Tensor:
        parts = [self.vae.decode(self.vae.encode(to_unit(part))[0]) for part in frames.split(16)]
        return to_levels(torch.cat(parts))

    def sheet(self) -> Tensor:
        """Held-out frames above their reconstructions."""
        # one of each clip, of at most 16
        frames = self.held_out["frames"][:: self.frames_per_clip][:16]
        return compare(frames, self._reconstruct(frames))

    def export(self, folder: Path) -> None:
        """Measures the scale of the latents, then writes vae/."""
        means = [self.vae.encode(to_unit(part))[0].float() for part in self.measured.split(16)]
        scale = 1 / float(torch.cat(means).std())
        self.vae.config = replace(self.vae.config, scaling_factor=round(scale, 6))
        self.vae.save_pretrained(folder / "vae")
