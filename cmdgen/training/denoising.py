"""Training a denoiser: one objective, evaluation and sheet for all families.

A family loads its data and networks, and says what its denoiser reads and what a sample shows.
"""

import math
import shutil
from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cmdgen.config import NoiseConfig, UNetConfig
from cmdgen.diffusion.guidance import guide
from cmdgen.diffusion.samplers import Sampling, ddim
from cmdgen.diffusion.schedule import add_noise, alphas_cumprod, split_sigma, to_prediction
from cmdgen.evaluation.swap import Swap, find_mirrored
from cmdgen.schema import write_config
from cmdgen.training.cache import Rows
from cmdgen.training.config import CaptionedLoss, ContentLoss, DenoisingLoss, MotionLoss
from cmdgen.training.context import Run
from cmdgen.training.distillation import Distillation
from cmdgen.training.loop import Batch, Stage
from cmdgen.training.losses import min_snr_weights, variational_bound
from cmdgen.training.randomness import Draws, Order, seeded
from cmdgen.training.sheets import compare
from cmdgen.training.text import GAIN, Text
from cmdgen.world.world import World

SHEET_STEPS = 20


class DenoisingStage(Stage):
    """Learns to denoise `x0` under the conditions that `condition` makes of the rest of a batch."""

    # of the samples on a sheet
    sheet_clips, guidance = 16, 1.0
    # every so many frames are shown
    sheet_stride = 2

    def __init__(self, run: Run, part: str, count: int, held_out: Batch) -> None:
        """Build the denoiser; it learns from `count` clips, in an order of the seed's.

        `held_out` holds clean samples x0 and what `condition` reads.
        """
        assert isinstance(run.loss, DenoisingLoss)
        self.run, self.options, self.codec = run, run.loss, run.codec()
        self.denoiser = run.build(part)
        self.modules = {part: self.denoiser}
        learns = isinstance(run.loss, CaptionedLoss) and (run.loss.icd or run.loss.mca)
        self.distillation = Distillation(run, part, self.denoiser) if run.start.teacher and learns else None
        if self.distillation is not None:
            self.modules["critic"] = self.distillation.critic
        self.order = Order(count, run.config.seed)
        self.noise: NoiseConfig = getattr(self.denoiser.config, "noise", run.model.noise)
        self.alphas = alphas_cumprod(self.noise).to(run.device)
        shape = held_out["x0"].shape
        self.held_out = held_out | {
            "noise": torch.randn(shape, generator=seeded("held out")).to(run.device),
            "timestep": torch.linspace(0, len(self.alphas) - 1, shape[0]).long().to(run.device),
        }

    @abstractmethod
    def example(self, rows: Tensor, draws: Draws) -> Batch:
        """Return x0 of some clips, what `condition` reads and, where values do not count alike, `weight`."""

    @abstractmethod
    def condition(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return what the denoiser reads beside the noisy sample and its timestep."""

    def without(self, batch: Batch) -> Batch:
        """Return a batch as the negative branch of guidance reads it."""
        return batch

    def predict(self, x: Tensor, timestep: Tensor, *conditions: Tensor, denoiser: Any = None) -> Tensor:
        """(B, C, ...), (B,), the conditions -> the raw output, (B, C or 2C, ...), of a teacher if it is given."""
        return (denoiser or self.denoiser)(x, timestep, *conditions)

    def latents(self, x0: Tensor, batch: Batch) -> Tensor:
        """(B, C, ...) -> (B, C, T, h, w): clips of scaled latents, to look at."""
        return x0[:, :, None]

    def batch(self, step: int) -> Batch:
        """Return clean samples, their conditions, noise and timesteps."""
        size = self.run.config.batch
        draws, shift = self.run.draws(step, size), self.options.timestep_shift
        batch = self.example(self.order.rows(step, size)[draws.own], draws)
        return batch | {
            "noise": draws(torch.randn, *batch["x0"].shape[1:]),
            "timestep": draw_timesteps(size, len(self.alphas), shift, draws.generator)[draws.own],
        }

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the task and, where a teacher is, those of distillation."""
        timestep, conditions = batch["timestep"], self.condition(batch)
        noisy = add_noise(batch["x0"], batch["noise"], self.alphas[timestep])
        output = self.predict(noisy, timestep, *conditions)
        loss, named = self._task_loss(batch, noisy, output)
        # evaluation, without gradients, is of the task
        if self.distillation is not None and torch.is_grad_enabled():
            with torch.no_grad():
                taught = self.predict(noisy, timestep, *conditions, denoiser=self.distillation.teacher)
            more, parts = self.distillation.loss(self, batch, noisy, (output, taught), loss)
            return loss + more, named | parts
        return loss, named

    def _task_loss(self, batch: Batch, noisy: Tensor, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean of min-SNR weighted errors, or of MSE and a learned variance's bound.

        The bound is as DiT is trained (Peebles & Xie 2022, arXiv:2212.09748).
        """
        x0, noise, timestep = batch["x0"], batch["noise"], batch["timestep"]
        alpha, kind = self.alphas[timestep], self.noise.prediction_type
        prediction, sigma = split_sigma(output.float(), x0.shape[1])
        target = to_prediction(x0, noise, alpha, kind)
        error = ((prediction - target).square() * batch.get("weight", 1)).flatten(1).mean(dim=1)
        loss = mse = error.mean()
        if sigma is not None:
            bound = variational_bound(x0, noisy, output, timestep, self.alphas).mean()
            return mse + bound, {"mse": mse, "bound": bound}
        if self.options.min_snr:
            loss = (min_snr_weights(alpha, kind, self.options.min_snr).float() * error).mean()
        return loss, {"mse": mse}

    def halves(self, x0: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, C, ...) -> content (B, C, h, w) and motion (B, K, T, S) of the clips that samples are of."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Return the loss on held-out clips at fixed timesteps and noise."""
        return {"loss_held_out": float(self.loss(self.held_out)[0])}

    def held(self, count: int) -> Batch:
        """Return the first held-out clips."""
        return {name: tensor[:count] for name, tensor in self.held_out.items()}

    def sample(self, batch: Batch, steps: int | None = None) -> Tensor:
        """Return x0 sampled under the conditions of a batch, in SHEET_STEPS unless told otherwise."""
        noise = torch.randn(batch["x0"].shape, generator=seeded("sheet")).to(self.run.device)
        positive, negative = self.condition(batch), self.condition(self.without(batch))
        denoise = guide(self.predict, self.guidance, positive, negative)
        return ddim(denoise, noise, Sampling(self.noise, steps or SHEET_STEPS))

    def sheet(self) -> Tensor:
        """Draw held-out clips above clips sampled for their conditions."""
        batch = self.held(self.sheet_clips)
        clips = [self.codec.decode(self.latents(x0, batch)) for x0 in (batch["x0"], self.sample(batch))]
        return compare(*(clip[:, :: self.sheet_stride] for clip in clips))


class CaptionedStage(DenoisingStage):
    """A denoiser that reads text; on its own the text is the only condition."""

    def __init__(self, run: Run, part: str, rows: Rows, text: Text | None, held_out: Batch) -> None:
        """Without a frozen `text`, build a text encoder that learns with the denoiser."""
        assert isinstance(run.loss, CaptionedLoss)
        super().__init__(run, part, len(rows), held_out)
        self.rows, self.dropout = rows, run.loss.text_dropout
        if text is None:
            text = Text.build(run)
            self.modules["text_encoder"] = text.encoder
        self.text, prompts = text, run.data.held_out(len(held_out["x0"]))
        self.held_out["ids"] = text.ids(run.data.captions(prompts, 0))

    def example(self, rows: Tensor, draws: Draws) -> Batch:
        """Return x0 and token ids."""
        return {"x0": self.rows[rows].float(), "ids": self.text.draw(rows, self.dropout, draws)}

    def condition(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the text."""
        return (self.text(batch["ids"]),)

    def without(self, batch: Batch) -> Batch:
        """Return the batch without its captions."""
        return batch | {"ids": self.text.ids([""] * len(batch["x0"]))}


class Pairs:
    """Content and motion of all clips, and the frozen autoencoder that made them.

    An unbounded motion is standardised: its moments are measured here and kept in autoencoder/.
    """

    def __init__(self, run: Run) -> None:
        encodings, self.autoencoder = run.encodings(), run.read("autoencoder")
        self.rows = encodings.pairs(self.autoencoder, run.finished("autoencoder"))
        config = self.autoencoder.config
        # a student's are those that its teacher learned with
        if config.motion_activation == "linear" and run.start.teacher is None:
            mean, std = _moments(self.rows["motion"])
            self.autoencoder.config = replace(config, motion_mean=mean, motion_std=std)
            write_config(self.autoencoder.config, run.folder / "autoencoder")
        self.held_out = encodings.held_out(run.config.held_out)
        with torch.no_grad(), run.autocast():
            parts = [self.autoencoder.encode(part) for part in self.held_out.split(8)]
        self.content, motion = (torch.cat(part).float() for part in zip(*parts, strict=True))
        self.motion = self.autoencoder.standardise(motion)

    def standardised(self, rows: Tensor) -> Tensor:
        """(B,) -> (B, D, T, S)."""
        return self.autoencoder.standardise(self.rows["motion"][rows].float())


class ContentStage(CaptionedStage):
    """The UNet makes content frames from text. The text encoder learns too, unless frozen."""

    guidance = 3.0

    def __init__(self, run: Run) -> None:
        assert isinstance(run.loss, ContentLoss)
        if run.model.text is None or not isinstance(run.model.content, UNetConfig):
            name = run.model.name
            raise ValueError(f"preset {name} has no text encoder: only text can be trained on")
        taught = run.start.teacher is not None
        text = Text.read(run) if taught else _read_frozen_text(run) if run.loss.freeze_text else None
        self.pairs = pairs = Pairs(run)
        super().__init__(run, "unet", pairs.rows["content"], text, {"x0": pairs.content})

    def example(self, rows: Tensor, draws: Draws) -> Batch:
        """Return x0 and token ids and, for a critic, the motion of the clips."""
        batch = super().example(rows, draws)
        return batch | ({"motion": self.pairs.rows["motion"][rows].float()} if self.distillation else {})

    def halves(self, x0: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the samples, and the motion of the clips that they are of."""
        return x0, batch["motion"]


def _read_frozen_text(run: Run) -> Text:
    """Return the text encoder of the run, else a copy of that of `init`."""
    for name in ("tokenizer", "text_encoder"):
        if run.initial(name) is None and not (run.folder / name).is_dir():
            raise ValueError(
                f"{run.folder} has no {name}/ that could stay frozen: give --init a folder that"
                " has, or --no-freeze-text"
            )
        if run.start.restart and run.initial(name) is not None:
            shutil.rmtree(run.folder / name, ignore_errors=True)
    return Text.read(run)


class MotionStage(CaptionedStage):
    """The DiT makes motion latents from text and a content frame, which may be noisy."""

    sheet_clips = 6

    def __init__(self, run: Run) -> None:
        # before clips are encoded, which may take hours
        run.codec()
        for part in ("autoencoder", "text_encoder"):
            run.finished(part)
        self.pairs = pairs = Pairs(run)
        text = Text.read(run)
        self.content, self.autoencoder = pairs.rows["content"], pairs.autoencoder
        self.split = pairs.content.shape[-1] // self.autoencoder.config.patch
        self.variance = pairs.held_out[:8].var(dim=2).mean()
        held_out = {"x0": pairs.motion, "content": pairs.content}
        super().__init__(run, "motion", pairs.rows["motion"], text, held_out)
        fresh = run.initial("motion") is None and run.start.teacher is None
        if self.denoiser.config.text_whitened and fresh:
            with torch.no_grad():
                for buffer, measured in zip(self.denoiser.whitening, text.whitening(), strict=True):
                    buffer.copy_(measured)
                self.denoiser.embed_text.weight /= GAIN
        self.swap = self._find_swap()

    def example(self, rows: Tensor, draws: Draws) -> Batch:
        """Return standardised motion, and content frames: at sampling they are not real either."""
        assert isinstance(self.options, MotionLoss)
        batch, content = super().example(rows, draws), self.content[rows].float()
        blur = draws(torch.rand, 1, 1, 1) * self.options.content_noise
        return batch | {
            "x0": self.autoencoder.standardise(batch["x0"]),
            "content": content + blur * draws(torch.randn, *content.shape[1:]),
        }

    def condition(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the text and the content frame."""
        return self.text(batch["ids"]), batch["content"]

    def predict(self, x: Tensor, timestep: Tensor, *conditions: Tensor, denoiser: Any = None) -> Tensor:
        """(B, D, T, S), (B,), (B, L, D), (B, C, h, w) -> (B, D or 2D, T, S)."""
        text, content = conditions
        return (denoiser or self.denoiser)(x, timestep, text=text, context=content, split=self.split)

    def halves(self, x0: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the content frames that the samples are for, and these as the autoencoder has them."""
        return batch["content"], self.autoencoder.destandardise(x0)

    def latents(self, x0: Tensor, batch: Batch) -> Tensor:
        """(B, D, T, S) -> (B, C, T, h, w), decoded with the batch's content frames."""
        motion = self.autoencoder.destandardise(x0)
        return self.autoencoder.decode(batch["content"], motion).float()

    def evaluate(self) -> dict[str, float]:
        """Return the held-out loss, how much sampled clips move, of what real clips do, and `text_shift`."""
        batch = self.held(8)
        variance = self.latents(self.sample(batch), batch).var(dim=2).mean()
        figures = super().evaluate() | {"time_variance_ratio": float(variance / self.variance)}
        if self.swap is not None:
            figures["text_shift"] = self.swap.shift(self._predict_captions, self.noise)
        return figures

    def _find_swap(self) -> Swap | None:
        """Return clips for `text_shift`, where the data is a world that has them."""
        world, training = self.run.data.source, self.run.data.training
        rows = find_mirrored(world, training) if isinstance(world, World) else None
        if rows is None:
            return None
        assert isinstance(world, World)
        parts = (self.content[rows.flatten()].float(), self.pairs.standardised(rows.flatten()))
        content, motion = (part.unflatten(0, rows.shape).to(self.run.device) for part in parts)
        return Swap(world, training[rows], content, motion)

    def _predict_captions(self, x: Tensor, timestep: Tensor, content: Tensor, captions: list[str]) -> Tensor:
        return self.predict(x, timestep, *self.condition({"ids": self.text.ids(captions), "content": content}))


def draw_timesteps(count: int, timesteps: int, shift: float, generator: torch.Generator) -> Tensor:
    """() -> (B,) int64, from 0, clean: uniform for a shift of 1, noisier ones more often above it.

    s u / (1 + (s - 1) u) of a uniform u, as Esser et al. 2024 (arXiv:2403.03206, Eq. 23).
    """
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    return (timesteps * shift * uniform / (1 + (shift - 1) * uniform)).long()


def _moments(motion: Rows) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(N, D, T, S) -> D numbers x 2: mean and standard deviation of each channel."""
    total = squares = torch.zeros(motion.shape[1], dtype=torch.float64)
    for rows in torch.arange(len(motion)).split(1024):
        part = motion[rows].double()
        total = total + part.sum(dim=(0, 2, 3))
        squares = squares + part.square().sum(dim=(0, 2, 3))
    count = math.prod(motion.shape) / motion.shape[1]
    mean = total / count
    std = ((squares - count * mean.square()) / (count - 1)).sqrt()
    means, deviations = (tuple(round(x, 6) for x in values.tolist()) for values in (mean, std))
    return means, deviations
