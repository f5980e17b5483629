"""Training the VAE on single frames: the subject and its edges count more, and a small KL."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cmdgen.evaluation.metrics import psnr
from cmdgen.models.vae import KlVae
from cmdgen.training.config import VaeLoss
from cmdgen.training.context import Run
from cmdgen.training.loop import Batch, Stage
from cmdgen.training.losses import edge_difference, gaussian_kl, l1_plus_l2
from cmdgen.training.randomness import Order, seeded
from cmdgen.training.sheets import compare
from cmdgen.video.pixels import to_levels, to_unit

# of a clip in a batch
FRAMES = 2
# clips that the scale of the latents is measured on
MEASURED = 64


class VaeStage(Stage):
    """Frames of clips that are rendered when they are needed."""

    def __init__(self, run: Run) -> None:
        if run.model.vae is None:
            raise ValueError(f"preset {run.model.name} works on pixels: it has no VAE to train")
        if run.config.batch % FRAMES:
            raise ValueError(f"batch {run.config.batch} is not a multiple of the {FRAMES} frames of a clip")
        assert isinstance(run.loss, VaeLoss)
        self.run, self.weights, seed = run, run.loss, run.config.seed
        self.vae: KlVae = run.build("vae")
        if run.initial("vae") is None:
            _narrow_posterior(self.vae)
        self.modules = {"vae": self.vae}
        self.training = run.data.training
        self.order = Order(len(self.training), seed)
        held_out = run.data.held_out(run.config.held_out)
        self.held_out = self._frames(held_out, seeded(seed, "held out"))
        self.measured = self._frames(self.training[:MEASURED], seeded(seed, "scale"))["frames"]

    def batch(self, step: int) -> Batch:
        """Return frames (B, 3, H, W) uint8, the subject's mask (B, 1, H, W) and noise."""
        generator = seeded(self.run.config.seed, "vae", step)
        rows = self.order.rows(step, self.run.config.batch // FRAMES)
        batch = self._frames(self.training[rows], generator)
        frames, config = batch["frames"], self.vae.config
        size = [side // config.stride for side in frames.shape[-2:]]
        noise = torch.randn((len(frames), config.latent_channels, *size), generator=generator)
        return batch | {"noise": noise}

    def _frames(self, indices: Tensor, generator: torch.Generator) -> Batch:
        clips = self.run.data.clips(indices)
        count, device = clips.frames.shape[1], clips.frames.device
        order = torch.rand((len(indices), count), generator=generator).argsort(dim=1)
        chosen = order[:, :FRAMES].to(device)
        rows = torch.arange(len(indices), device=device)[:, None]
        frames = clips.frames[rows, chosen].flatten(0, 1)
        mask = torch.zeros_like(frames[:, :1], dtype=torch.bool)
        if clips.mask is not None:
            mask = clips.mask[rows, chosen].flatten(0, 1)[:, None]
        return {"frames": frames.to(self.run.device), "mask": mask.to(self.run.device)}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the error of a reconstruction from a sample of the posterior, and the KL."""
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
        """Return PSNR on held-out frames, overall and inside the subject's mask."""
        frames, mask = self.held_out["frames"], self.held_out["mask"][:, 0]
        output, target = self._reconstruct(frames).float() / 255, frames.float() / 255
        figures = {"psnr": psnr(output, target)}
        if mask.any():
            figures["psnr_subject"] = psnr(output, target, mask)
        return figures

    def _means(self, frames: Tensor) -> Tensor:
        return torch.cat([self.vae.encode(to_unit(part))[0] for part in frames.split(16)])

    def _reconstruct(self, frames: Tensor) -> Tensor:
        parts = [self.vae.decode(part) for part in self._means(frames).split(16)]
        return to_levels(torch.cat(parts))

    def sheet(self) -> Tensor:
        """Draw held-out frames, one of a clip, above their reconstructions."""
        frames = self.held_out["frames"][::FRAMES][:16]
        return compare(frames[:, None], self._reconstruct(frames)[:, None])

    def export(self, folder: Path) -> None:
        """Write vae/ with the measured scale of its latents."""
        scale = 1 / float(self._means(self.measured).float().std())
        self.vae.config = replace(self.vae.config, scaling_factor=round(scale, 6))
        super().export(folder)


@torch.no_grad()
def _narrow_posterior(vae: KlVae) -> None:
    """Make the posterior of fresh weights narrow: a wide one would drown the means in noise."""
    channels = vae.config.latent_channels
    assert vae.quant_conv.bias is not None
    vae.quant_conv.weight[channels:] *= 0.1
    vae.quant_conv.bias[channels:] = -6.0
