"""Training the content model: the UNet, and with it the text encoder unless that is frozen."""

from pathlib import Path

import torch
from torch import Tensor, nn

from cmdgen.config import NoiseConfig
from cmdgen.diffusion.guidance import guide
from cmdgen.diffusion.samplers import ddim
from cmdgen.models.text import ClipTextModel
from cmdgen.models.tokenizer import Tokenizer
from cmdgen.models.unet import UNet
from cmdgen.training.cache import Rows
from cmdgen.training.config import DenoisingLoss
from cmdgen.training.data import TrainingData
from cmdgen.training.denoising import Captions, Denoising
from cmdgen.training.latents import Codec
from cmdgen.training.loop import Batch
from cmdgen.training.randomness import Order, seeded
from cmdgen.training.sheets import compare

SHEET_STEPS = 20
SHEET_GUIDANCE = 3.0


class ContentStage:
    """Content frames of cached clips; `held_out` are those of clips that training never sees."""

    def __init__(
        self,
        unet: UNet,
        text_encoder: ClipTextModel,
        tokenizer: Tokenizer,
        noise: NoiseConfig,
        content: Rows,
        held_out: Tensor,
        codec: Codec,
        data: TrainingData,
        options: DenoisingLoss,
        *,
        batch: int,
        seed: int,
        device: torch.device,
        freeze_text: bool = False,
    ) -> None:
        self.unet, self.text_encoder, self.tokenizer = unet, text_encoder, tokenizer
        text_encoder.requires_grad_(not freeze_text)
        self.modules: dict[str, nn.Module] = {"unet": unet}
        if not freeze_text:
            self.modules["text_encoder"] = text_encoder
        self.noise, self.content, self.held_out = noise, content, held_out.to(device)
        self.codec, self.size, self.seed, self.device = codec, batch, seed, device
        self.indices = data.training
        self.order = Order(len(content), seed)
        self.denoising = Denoising(noise, options, device)
        self.length = text_encoder.config.max_position_embeddings
        self.captions = Captions(data, tokenizer, self.length, dropout=options.text_dropout)
        self.prompts = data.captions(data.held_out(len(held_out)), 0)

    def batch(self, step: int) -> Batch:
        """Content frames, noise, timesteps and token ids."""
        generator = seeded(self.seed, "content", step)
        rows = self.order.rows(step, self.size)
        content = self.content[rows].float()
        batch = {
            "content": content,
            "noise": torch.randn(content.shape, generator=generator),
            "timestep": torch.randint(
                len(self.denoising.alphas), (self.size,), generator=generator
            ),
            "ids": self.captions.ids(self.indices[rows], generator),
        }
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Denoising, given the text."""
        text = self.text_encoder(batch["ids"]).last_hidden_state
        noisy = self.denoising.noisy(batch["content"], batch["noise"], batch["timestep"])
        output = self.unet(noisy, batch["timestep"], text)
        return self.denoising.loss(output, batch["content"], batch["noise"], batch["timestep"])

    def evaluate(self) -> dict[str, float]:
        """The loss on held-out clips at fixed timesteps and noise."""
        generator = seeded("held out")
        count = len(self.held_out)
        batch = {
            "content": self.held_out,
            "noise": torch.randn(self.held_out.shape, generator=generator).to(self.device),
            "timestep": torch.linspace(0, len(self.denoising.alphas) - 1, count)
            .long()
            .to(self.device),
            "ids": self.tokenizer(self.prompts, self.length).to(self.device),
        }
        return {"loss_held_out": float(self.loss(batch)[0])}

    def sheet(self) -> Tensor:
        """Real content frames of held-out clips above frames sampled for their captions."""
        real = self.held_out[:16]
        ids = self.tokenizer([*self.prompts[: len(real)], *[""] * len(real)], self.length)
        text, empty = self.text_encoder(ids.to(self.device)).last_hidden_state.chunk(2)
        noise = torch.randn(real.shape, generator=seeded("sheet")).to(self.device)
        sampled = ddim(
            guide(self.unet, SHEET_GUIDANCE, (text,), (empty,)),
            noise,
            self.noise,
            steps=SHEET_STEPS,
        )
        frames = [self.codec.decode(latents[:, :, None])[:, 0] for latents in (real, sampled)]
        return compare(frames[0], frames[1])

    def export(self, folder: Path) -> None:
        """Writes unet/ and, unless the text encoder is frozen, text_encoder/ and tokenizer/."""
        self.unet.save_pretrained(folder / "unet")
        if "text_encoder" in self.modules:
            self.text_encoder.save_pretrained(folder / "text_encoder")
            self.tokenizer.save_pretrained(folder / "tokenizer", length=self.length)
