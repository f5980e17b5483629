"""Training EVDM: the frames in the middle of a clip, given some of those around them."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from cmdgen.config import EvdmConfig
from cmdgen.data.folder import Folder
from cmdgen.evaluation.prediction import blend, clip_psnr, repeat_last
from cmdgen.training.config import EvdmLoss
from cmdgen.training.context import Run
from cmdgen.training.denoising import DenoisingStage
from cmdgen.training.loop import Batch
from cmdgen.training.randomness import Draws
from cmdgen.video.pixels import to_grey, to_unit

# bytes of clips of files that stay in memory
_KEPT = 2**31


class EvdmStage(DenoisingStage):
    """Learns from clips as they are rendered or read, with past and future frames left out at random."""

    sheet_clips, sheet_stride = 6, 1

    def __init__(self, run: Run) -> None:
        assert isinstance(run.model.content, EvdmConfig)
        self.data, self.config = run.data, run.model.content
        size = 3 * math.prod((run.data.frames, *run.data.size))
        self.clip = lru_cache(max(1, _KEPT // size))(lambda index: run.data.clips([index]).frames)
        frames = self.read(run.data.held_out(run.config.held_out)).to(run.device)
        x0, self.known = self.split(frames)
        # the held-out loss and the sheet are of prediction
        context = self.known.clone()
        context[:, :, self.config.past :] = 0
        super().__init__(run, "evdm", len(run.data.training), {"x0": x0, "context": context})

    def read(self, indices: Tensor) -> Tensor:
        """(B,) -> clips (B, C, T, H, W) in [-1, 1]."""
        if isinstance(self.data.source, Folder):
            # to decode a file takes longer than to learn from it
            levels = torch.cat([self.clip(index) for index in indices.tolist()])
        else:
            levels = self.data.clips(indices).frames
        frames = to_unit(levels)
        return (to_grey(frames) if self.config.channels == 1 else frames).transpose(1, 2)

    def split(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, T, H, W) -> the frames to make, and past and future ones."""
        sizes = self.config.past, self.config.current, self.config.future
        past, x0, future = frames.split(sizes, dim=2)
        return x0, torch.cat([past, future], dim=2)

    def example(self, rows: Tensor, draws: Draws) -> Batch:
        """Return the frames to make, the context, whose unknown frames are 0, and how much each frame counts."""
        assert isinstance(self.options, EvdmLoss)
        x0, context = self.split(self.read(self.data.training[rows]))
        drop, partial = (self.options.past_dropout, self.options.future_dropout), self.options.partial
        past, future = (
            draw_known(draws.count, count, share, partial, draws.generator)[draws.own]
            for count, share in zip((self.config.past, self.config.future), drop, strict=True)
        )
        known = torch.cat([past.flip(1), future], dim=1).to(context.device)
        weight = weigh_frames(past, future, self.config.current, self.options.nearness).to(x0.device)
        frames = (slice(None), None, slice(None), None, None)
        return {"x0": x0, "context": context * known[frames], "weight": weight[frames]}

    def condition(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the context."""
        return (batch["context"],)

    def latents(self, x0: Tensor, batch: Batch) -> Tensor:
        """(B, C, T, H, W) -> (B, 3, T', H, W): whole clips, in which unknown frames are grey."""
        past, future = batch["context"].split((self.config.past, self.config.future), dim=2)
        return torch.cat([past, x0, future], dim=2).expand(-1, 3, -1, -1, -1)

    def evaluate(self) -> dict[str, float]:
        """Return the held-out loss, and decibels of prediction and interpolation beside trivial ones.

        Sampled in one step, frames are about the mean of all possible ones: blurred, in more decibels.
        """
        x0, count = self.held_out["x0"], self.config.current
        past, future = self.known.split((self.config.past, self.config.future), dim=2)
        made = {"predict": self.sample(self.held_out), "mean": self.sample(self.held_out, 1)}
        made["repeat"] = repeat_last(past, count)
        made |= {f"{name}_first": frames[:, :, :1] for name, frames in made.items()}
        if self.config.future:
            known = self.held_out | {"context": self.known}
            made |= {"interpolate": self.sample(known), "blend": blend(past, future, count)}
        figures = {
            f"psnr_{name}": float(clip_psnr(frames, x0[:, :, : frames.shape[2]]).mean())
            for name, frames in made.items()
        }
        return super().evaluate() | figures


def draw_known(batch: int, count: int, dropout: float, partial: float, generator: torch.Generator) -> Tensor:
    """() -> (B, count) bool: which frames are known, the nearest first.

    None in a share `dropout` of clips; in a share `partial` of the others as many as chance says.
    """
    none, some = torch.rand(2, batch, 1, generator=generator)
    nearest = torch.randint(1, max(2, count + 1), (batch, 1), generator=generator)
    number = torch.where(some < partial, nearest, count) * (none >= dropout)
    return torch.arange(count) < number


def weigh_frames(past: Tensor, future: Tensor, count: int, power: float) -> Tensor:
    """(B, P), (B, F) bool, the nearest first -> (B, count): distance from the nearest known frame ** -power, of mean 1.

    What is far from all that is known cannot be told: its error is mostly noise. With nothing known all count alike.
    """
    near = torch.arange(1.0, count + 1)
    sides = [
        torch.where(known.any(1, keepdim=True), steps, math.inf)
        for known, steps in ((past, near), (future, near.flip(0)))
    ]
    distance = torch.minimum(*sides)
    weights = torch.where(distance.isinf(), 1.0, distance) ** -power
    return weights / weights.mean(1, keepdim=True)
