"""Training the motion model: motion latents given the text and a maybe noisy content frame."""

from pathlib import Path

import torch
from torch import Tensor, nn

from cmdgen.diffusion.samplers import ddim
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.dit import DiT
from cmdgen.models.text import ClipTextModel
from cmdgen.models.tokenizer import Tokenizer
from cmdgen.training.cache import Rows
from cmdgen.training.config import DenoisingLoss
from cmdgen.training.data import TrainingData
from cmdgen.training.denoising import Captions, Denoising
from cmdgen.training.latents import Codec
from cmdgen.training.loop import Batch
from cmdgen.training.randomness import Order, seeded
from cmdgen.training.sheets import grid

SHEET_STEPS = 20


class MotionStage:
    """Content and standardised motion of cached clips; text encoder and autoencoder are frozen."""

    def __init__(
        self,
        motion: DiT,
        autoencoder: CmdAutoencoder,
        text_encoder: ClipTextModel,
        tokenizer: Tokenizer,
        pairs: dict[str, Rows],
        held_out: Tensor,
        codec: Codec,
        data: TrainingData,
        options: DenoisingLoss,
        *,
        batch: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.motion, self.autoencoder = motion, autoencoder
        self.modules: dict[str, nn.Module] = {"motion": motion}
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.pairs, self.codec, self.size, self.seed = pairs, codec, batch, seed
        self.device = device
        self.indices = data.training
        self.order = Order(len(pairs["content"]), seed)
        self.denoising = Denoising(motion.config.noise, options, device)
        self.length = text_encoder.config.max_position_embeddings
        self.captions = Captions(data, tokenizer, self.length, dropout=options.text_dropout)
        self.content_noise = options.content_noise
        indices = data.held_out(len(held_out))
        self.frames = data.clips(indices[:6]).frames
        self.prompts = data.captions(indices, 0)
        self.held_out = held_out
        self.split = pairs["content"].shape[-1] // autoencoder.config.patch

    def batch(self, step: int) -> Batch:
        """Motion, content, noise for both, timesteps and token ids."""
        generator = seeded(self.seed, "motion", step)
        rows = self.order.rows(step, self.size)
        content = self.pairs["content"][rows].float()
        motion = self.autoencoder.standardise(self.pairs["motion"][rows].float())
        blur = self.content_noise * torch.rand((self.size, 1, 1, 1), generator=generator)
        batch = {
            "motion": motion,
            "content": content + blur * torch.randn(content.shape, generator=generator),
            "noise": torch.randn(motion.shape, generator=generator),
            "timestep": torch.randint(
                len(self.denoising.alphas), (self.size,), generator=generator
            ),
            "ids": self.captions.ids(self.indices[rows], generator),
        }
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoising, given the text and the content frame."""
        x0, noise, timestep = batch["motion"], batch["noise"], batch["timestep"]
        noisy = self.denoising.noisy(x0, noise, timestep)
        text = self._text(batch["ids"])
        output = self.motion(noisy, timestep, text=text, context=batch["content"], split=self.split)
        return self.denoising.loss(output, x0, noise, timestep)

    @torch.no_grad()
    def _text(self, ids: Tensor) -> Tensor:
        return self.text_encoder(ids).last_hidden_state

    def evaluate(self) -> dict[str, float]:
        """The held-out loss at fixed timesteps and noise, and how much sampled clips move."""
        content, motion = self.autoencoder.encode(self.held_out)
        motion = self.autoencoder.standardise(motion)
        generator = seeded("held out")
        last = len(self.denoising.alphas) - 1
        batch = {
            "motion": motion,
            "content": content,
            "noise": torch.randn(motion.shape, generator=generator).to(self.device),
            "timestep": torch.linspace(0, last, len(motion)).long().to(self.device),
            "ids": self.tokenizer(self.prompts, self.length).to(self.device),
        }
        sampled = self._sample(8)
        return {
            "loss_held_out": float(self.loss(batch)[0]),
            "time_variance_ratio": float(
                sampled.var(dim=2).mean() / self.held_out[:8].var(dim=2).mean()
            ),
        }

    def _sample(self, count: int) -> Tensor:
        """() -> (B, C, T, h, w), latents of clips with real content frames and sampled motion."""
        content, motion = self.autoencoder.encode(self.held_out[:count])
        text = self._text(self.tokenizer(self.prompts[:count], self.length).to(self.device))
        noise = torch.randn(motion.shape, generator=seeded("sheet")).to(self.device)

        def denoise(x: Tensor, timestep: Tensor) -> Tensor:
            return self.motion(x, timestep, text=text, context=content, split=self.split)

        sampled = ddim(denoise, noise, self.motion.config.noise, steps=SHEET_STEPS)
        return self.autoencoder.decode(content, self.autoencoder.destandardise(sampled)).float()

    def sheet(self) -> Tensor:
        """Every second frame of held-out clips above the same content with sampled motion."""
        sampled = self.codec.decode(self._sample(len(self.frames)))
        rows = torch.stack((self.frames.to(sampled.device), sampled), dim=1)
        return grid(rows.flatten(0, 1)[:, ::2])

    def export(self, folder: Path) -> None:
        """Writes motion/."""
        self.motion.save_pretrained(folder / "motion")
