"""Training the VAE on single frames: the subject and its edges count more, and a small KL.

At last its decoder alone, on frames that the CMD autoencoder has rebuilt.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmdgen.config import TinyConfig
from cmdgen.evaluation.metrics import psnr
from cmdgen.models.tiny_vae import TinyVae
from cmdgen.models.vae import KlVae
from cmdgen.training.autoencoder import reconstruct
from cmdgen.training.config import DecoderLoss, VaeLoss
from cmdgen.training.context import Run
from cmdgen.training.loop import Batch, Stage
from cmdgen.training.losses import edge_difference, gaussian_kl, l1_plus_l2
from cmdgen.training.randomness import Draws, Order, seeded
from cmdgen.training.sheets import compare
from cmdgen.video.pixels import to_levels, to_unit

# of a clip in a batch
FRAMES = 2
# clips that the scale of the latents is measured on
MEASURED = 64
# largest deviation of noise on what a small decoder learns from
NOISE = 0.3
# of so many batches of the decoder's last stage one is not rebuilt
CLEAN = 3


class VaeStage(Stage):
    """Frames of clips that are rendered when they are needed."""

    def __init__(self, run: Run) -> None:
        if run.model.vae is None:
            raise ValueError(f"preset {run.model.name} works on pixels: it has no VAE to train")
        if run.config.batch % FRAMES:
            raise ValueError(f"batch {run.config.batch} is not a multiple of the {FRAMES} frames of a clip")
        assert isinstance(run.loss, DecoderLoss)
        self.run, self.weights, seed = run, run.loss, run.config.seed
        self.vae = self.build()
        self.modules = {"vae": self.vae}
        self.training = run.data.training
        self.order = Order(len(self.training), seed)
        held_out = run.data.held_out(run.config.held_out)
        self.held_out = self._frames(held_out, Draws(seeded(seed, "held out"), len(held_out)))
        measured = self.training[:MEASURED]
        self.measured = self._frames(measured, Draws(seeded(seed, "scale"), len(measured)))["frames"]

    def build(self) -> KlVae:
        """Return the VAE of `init`, or a new one."""
        vae: KlVae = self.run.build("vae")
        if self.run.initial("vae") is None:
            _narrow_posterior(vae)
        return vae

    def batch(self, step: int) -> Batch:
        """Return frames (B, 3, H, W) uint8, the subject's mask (B, 1, H, W) and noise."""
        _, batch, draws = self._example(step)
        frames, config = batch["frames"], self.vae.config
        size = [side // config.stride for side in frames.shape[-2:]]
        noise = draws(torch.randn, FRAMES, config.latent_channels, *size).flatten(0, 1)
        return batch | {"noise": noise}

    def _example(self, step: int) -> tuple[Tensor, Batch, Draws]:
        """Return the rows of a step's clips, some of their frames, and what else is drawn for them."""
        draws = self.run.draws(step, self.run.config.batch // FRAMES)
        rows = self.order.rows(step, draws.count)[draws.own]
        return rows, self._frames(self.training[rows], draws), draws

    def _frames(self, indices: Tensor, draws: Draws) -> Batch:
        """(B,) -> frames and masks of `FRAMES` frames of each clip, and which these are, (B, FRAMES)."""
        clips = self.run.data.clips(indices)
        chosen = draws(torch.rand, clips.frames.shape[1]).argsort(dim=1)[:, :FRAMES]
        frames = _pick(clips.frames, chosen)
        mask = torch.zeros_like(frames[:, :1], dtype=torch.bool)
        if clips.mask is not None:
            mask = _pick(clips.mask, chosen)[:, None]
        return {"frames": frames.to(self.run.device), "mask": mask.to(self.run.device), "chosen": chosen}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the error of a reconstruction from a sample of the posterior, and the KL."""
        assert isinstance(self.weights, VaeLoss)
        mean, logvar = (moment.float() for moment in self.vae.encode(to_unit(batch["frames"])))
        output = self.vae.decode(mean + (0.5 * logvar).exp() * batch["noise"]).float()
        loss, parts = self.compare(output, batch)
        parts["kl"] = gaussian_kl(mean, logvar)
        return loss + self.weights.kl * parts["kl"], parts

    def compare(self, output: Tensor, batch: Batch, expected: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, 3, H, W), what it should be if not the frames -> the weighted errors of pixels and of edges."""
        frames = to_unit(batch["frames"]) if expected is None else expected
        weights = 1 + self.weights.mask * batch["mask"].float()
        pixels = l1_plus_l2(output, frames, weights, l1=self.weights.l1)
        edges = edge_difference(output, frames, weights)
        return pixels + self.weights.edges * edges, {"pixels": pixels, "edges": edges}

    def evaluate(self) -> dict[str, float]:
        """Return PSNR on held-out frames, overall and inside the subject's mask."""
        return self._psnr(self._reconstruct(self.held_out["frames"]))

    def _psnr(self, output: Tensor) -> dict[str, float]:
        """(B, 3, H, W) uint8 -> of the held-out frames, overall and inside the subject's mask."""
        pair, mask = (output.float() / 255, self.held_out["frames"].float() / 255), self.held_out["mask"][:, 0]
        return {"psnr": psnr(*pair)} | ({"psnr_subject": psnr(*pair, mask)} if mask.any() else {})

    def _means(self, frames: Tensor) -> Tensor:
        return torch.cat([self.vae.encode(to_unit(part))[0] for part in frames.split(16)])

    def _reconstruct(self, frames: Tensor) -> Tensor:
        return self._decode(self._means(frames))

    def _decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) unscaled -> (B, 3, H, W) uint8."""
        return to_levels(torch.cat([self.vae.decode(part) for part in latents.split(16)]))

    def sheet(self) -> Tensor:
        """Draw held-out frames, one of a clip, above their reconstructions."""
        frames = self.held_out["frames"][::FRAMES][:16]
        return compare(frames[:, None], self._reconstruct(frames)[:, None])

    def export(self, folder: Path) -> None:
        """Write vae/ with the measured scale of its latents."""
        scale = 1 / float(self._means(self.measured).float().std())
        self.vae.config = replace(self.vae.config, scaling_factor=round(scale, 6))
        super().export(folder)


class DecoderStage(VaeStage):
    """Frames that the CMD autoencoder has rebuilt, every third batch untouched: latents keep their meaning."""

    def __init__(self, run: Run) -> None:
        encodings, self.autoencoder = run.encodings(), run.read("autoencoder")
        self.latents = encodings.latents()
        self.pairs = encodings.pairs(self.autoencoder, run.finished("autoencoder"))
        super().__init__(run)
        held_out = encodings.held_out(run.config.held_out)
        with torch.no_grad(), run.autocast():
            rebuilt, _, _ = reconstruct(self.autoencoder, held_out)
        self.rebuilt = self._unscaled(rebuilt, self.held_out["chosen"])

    def build(self) -> KlVae:
        """Return the VAE of the run, of which the decoder learns."""
        vae: KlVae = self.run.read("vae")
        for module in (vae.decoder, vae.post_quant_conv):
            module.requires_grad_(True)
        return vae

    @torch.no_grad()
    def batch(self, step: int) -> Batch:
        """Return frames (B, 3, H, W) uint8, the subject's mask (B, 1, H, W) and latents (B, C, h, w)."""
        rows, batch, _ = self._example(step)
        if step % CLEAN:
            halves = [self.pairs[name][rows].to(self.run.device).float() for name in ("content", "motion")]
            with self.run.autocast():
                latents = self.autoencoder.decode(*halves).float()
        else:
            latents = self.latents[rows].to(self.run.device).float()
        return batch | {"latents": self._unscaled(latents, batch["chosen"])}

    def _unscaled(self, latents: Tensor, chosen: Tensor) -> Tensor:
        """(B, C, T, h, w), (B, N) -> (B N, C, h, w)."""
        return _pick(latents.movedim(1, 2), chosen) / self.vae.config.scaling_factor

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the error of what is decoded."""
        return self.compare(self.vae.decode(batch["latents"]).float(), batch)

    def evaluate(self) -> dict[str, float]:
        """Return PSNR on held-out frames, by the VAE alone and as the autoencoder rebuilds them."""
        rebuilt = self._psnr(self._decode(self.rebuilt))
        return super().evaluate() | {f"{name}_rebuilt": value for name, value in rebuilt.items()}

    def sheet(self) -> Tensor:
        """Draw held-out frames, one of a clip, above what becomes of them."""
        frames, rebuilt = (each[::FRAMES][:16] for each in (self.held_out["frames"], self.rebuilt))
        return compare(frames[:, None], self._decode(rebuilt)[:, None])

    def export(self, folder: Path) -> None:
        """Write vae/; its encoder and so the scale of its latents are the same."""
        Stage.export(self, folder)


class TinyStage(VaeStage):
    """A small VAE for the latents of a teacher's: what the large decoder makes of them is what it learns."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        config = self.vae.config
        levels = len(config.block_out_channels)
        small = TinyConfig(
            latent_channels=config.latent_channels,
            encoder_block_out_channels=(config.block_out_channels[0] // 2,) * levels,
            # TAESD's is 64 wide where Stable Diffusion's is 128
            decoder_block_out_channels=(min(config.block_out_channels[0], 64),) * levels,
            num_encoder_blocks=(1,) * levels,
            # fewer where maps are larger
            num_decoder_blocks=tuple(range(2 * levels - 1, 0, -2)),
        )
        tiny: Any = TinyVae(small)
        self.tiny: TinyVae = tiny.to(memory_format=torch.channels_last).to(run.device)
        self.modules = {"decoder": self.tiny}

    def build(self) -> KlVae:
        """Return the teacher's VAE."""
        vae: KlVae = self.run.teach("vae")
        return vae

    def batch(self, step: int) -> Batch:
        """Return what a VAE learns from, and deviations of the noise (B, 1, 1, 1)."""
        size = self.run.config.batch
        draws = Draws(seeded(self.run.config.seed, "small decoder", step), size, self.run.ranks.part(size))
        return super().batch(step) | {"deviation": draws(torch.rand, 1, 1, 1)}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the distance from what the teacher decodes of noisy latents, and from the latents it encodes."""
        frames, scale = to_unit(batch["frames"]), self.vae.config.scaling_factor
        with torch.no_grad():
            latents = self.vae.encode(frames)[0] * scale
            # those of samplers are not real ones
            seen = latents + NOISE * batch["deviation"] * batch["noise"]
            expected = self.vae.from_latents(seen).float()
        loss, parts = self.compare(self.tiny.from_latents(seen).float(), batch, expected)
        parts["latents"] = F.mse_loss(self.tiny.encode(frames).float(), latents.float())
        return loss + parts["latents"], parts

    def evaluate(self) -> dict[str, float]:
        """Return PSNR on held-out frames: to these, and to what the teacher decodes."""
        means = self._means(self.held_out["frames"])
        small, large = self._decode(means), super()._decode(means)
        return super().evaluate() | {"psnr_teacher": psnr(small.float() / 255, large.float() / 255)}

    def _decode(self, latents: Tensor) -> Tensor:
        scaled = latents * self.vae.config.scaling_factor
        return to_levels(torch.cat([self.tiny.from_latents(part) for part in scaled.split(16)]))

    def export(self, folder: Path) -> None:
        """Write decoder/."""
        Stage.export(self, folder)


def _pick(clips: Tensor, chosen: Tensor) -> Tensor:
    """(B, T, ...), (B, N) -> (B N, ...): of each clip the chosen frames."""
    return clips[torch.arange(len(clips))[:, None], chosen].flatten(0, 1)


@torch.no_grad()
def _narrow_posterior(vae: KlVae) -> None:
    """Make the posterior of fresh weights narrow: a wide one would drown the means in noise."""
    channels = vae.config.latent_channels
    assert vae.quant_conv.bias is not None
    vae.quant_conv.weight[channels:] *= 0.1
    vae.quant_conv.bias[channels:] = -6.0
