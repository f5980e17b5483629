"""Beside a stage's own loss: what a pruned denoiser learns from its teacher, as `compression.distill` has it."""

from typing import Any, Protocol

import torch
from torch import Tensor

from cmdgen.compression.distill import Critic, Matched, decoder_tokens, hinge, list_depths
from cmdgen.compression.units import units_of
from cmdgen.config import NoiseConfig
from cmdgen.diffusion.schedule import split_sigma, to_x0_eps
from cmdgen.models.dit import DiT
from cmdgen.training.config import CaptionedLoss
from cmdgen.training.context import Run

# of the noise schedule: where more is noise, student and teacher head for the same mean of all clips
LEAST_NOISY = 0.6
# the critic sees one clip of so many of a batch, as the CMD decoder takes longer than the student
RARE = 4
# largest deviation of noise on what it sees
DEVIATION = 0.3


class Student(Protocol):
    """What is read of the stage whose denoiser learns."""

    alphas: Tensor
    noise: NoiseConfig

    def halves(self, x0: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(B, C, ...) -> content (B, C, h, w) and motion (B, K, T, S) of the clips that samples are of."""


class Distillation:
    """The teacher of one part, and the critic that learns with the student."""

    def __init__(self, run: Run, part: str, student: Any) -> None:
        assert isinstance(run.loss, CaptionedLoss)
        self.weights, self.teacher, self.ranks = run.loss, run.teach(part), run.ranks
        self.matched = Matched(student, self.teacher, units_of(part, run.model.dropped))
        # frames meet here for the first time
        self.autoencoder = run.teach("autoencoder")
        critic = Critic(self.autoencoder.config.width, len(list_depths(self.autoencoder)))
        self.critic = critic.to(run.device).requires_grad_(bool(run.loss.mca))

    def loss(
        self, stage: Student, batch: dict[str, Tensor], noisy: Tensor, outputs: tuple[Tensor, Tensor], task: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of ICD and MCA, and both, of what student and teacher made of noisy samples.

        Through the CMD decoder the critic's gradient is dozens of times that of the `task`'s loss. MCA's is
        scaled to the length of the task's in the outputs, as Esser et al. 2021 do (arXiv:2012.09841, Eq. 7).
        Draws from torch's own generators, which the loop seeds at each step. Several processes each
        judge clips of their own: their MCA is another estimate of the same mean.
        """
        grid = None
        if isinstance(self.teacher, DiT):
            patch = self.teacher.config.patch
            grid = noisy.shape[-2] // patch, noisy.shape[-1] // patch
        named = {"icd": self.matched.difference(grid)}
        total = self.weights.icd * named["icd"]
        rows = (batch["timestep"] < LEAST_NOISY * len(stage.alphas)).nonzero().flatten()[: -(-len(noisy) // RARE)]
        if not self.weights.mca or (not len(rows) and self.ranks.world == 1):
            return total, named
        share = float(len(rows) > 0)
        if not len(rows):
            # of several processes all take the same path, this one with a weight of 0
            rows = batch["timestep"].argmin()[None]
        alpha, kind = stage.alphas[batch["timestep"][rows]], stage.noise.prediction_type
        some = {name: tensor[rows] for name, tensor in batch.items()}
        deviation = DEVIATION * torch.rand(len(rows), *(1,) * (noisy.ndim - 1), device=noisy.device)
        noise = deviation * torch.randn_like(noisy[rows])

        def see(output: Tensor) -> tuple[list[Tensor], int]:
            prediction, _ = split_sigma(output.float(), noisy.shape[1])
            x0, _ = to_x0_eps(prediction, noisy[rows], alpha, kind)
            content, motion = stage.halves(x0 + noise, some)
            return decoder_tokens(self.autoencoder, content, motion), content.shape[-2] // self.autoencoder.config.patch

        output = outputs[0][rows].detach().requires_grad_()
        (student, height), (teacher, _) = see(output), see(outputs[1][rows])
        named["mca"], named["critic"] = (share * part for part in hinge(self.critic, student, teacher, height))
        (ours,) = torch.autograd.grad(named["mca"], output)
        (tasks,) = torch.autograd.grad(task, outputs[0], retain_graph=True)
        scale = self.weights.mca * tasks[rows].float().norm() / ours.float().norm().clamp(min=1e-12)
        # a term of this gradient, whose value is 0
        pulled = (outputs[0][rows].float() * (scale * ours.float())).sum()
        return total + pulled - pulled.detach() + named["critic"], named
