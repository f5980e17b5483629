"""Whether a motion model reads the verb: two motions that mirror each other in time, their words swapped.

Such clips have the same content frame, so that the text alone can tell the model which is meant. At
the noisiest timestep noise hides nearly all of the motion latents, and the text should decide the
estimate of the clean ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cmdgen.config import NoiseConfig
from cmdgen.diffusion.schedule import add_noise, alphas_cumprod, split_sigma, to_x0_eps
from cmdgen.world.world import World

MIRRORED = ("growing", "shrinking")
# clips of each motion: that give its mean, and that are denoised
MEAN, DENOISED = 128, 16
# noisy motion latents, timesteps, content frames, captions -> the denoiser's output
Predict = Callable[[Tensor, Tensor, Tensor, list[str]], Tensor]


def find_mirrored(world: World, indices: Tensor) -> Tensor | None:
    """(N,) -> (2, M): of each motion the first positions in `indices`; None where there are none."""
    if not {*MIRRORED} <= {*world.motions}:
        return None
    motions = world.specs(indices).motion
    rows = [(motions == world.motions.index(name)).nonzero()[:MEAN, 0] for name in MIRRORED]
    count = min(map(len, rows))
    return torch.stack([each[:count] for each in rows]) if count else None


@dataclass(frozen=True)
class Swap:
    """Clips of the two motions, as many of each: indices (2, M), content frames and standardised motion."""

    world: World
    indices: Tensor
    content: Tensor  # (2, M, C, h, w)
    motion: Tensor  # (2, M, D, T, S)

    def shift(self, predict: Predict, noise: NoiseConfig) -> float:
        """Return how far the other word moves the estimate, as a share of the way between the class means.

        1 where the text decides, 0 where it is not read.
        """
        device, alphas = self.motion.device, alphas_cumprod(noise)
        way = self.motion[1].mean(dim=0) - self.motion[0].mean(dim=0)
        x0, content, rows = (part[:, :DENOISED].flatten(0, 1) for part in (self.motion, self.content, self.indices))
        timestep = torch.full((len(x0),), len(alphas) - 1, device=device)
        alpha = alphas.to(device)[timestep]
        noisy = add_noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(device), alpha)
        estimates = []
        for order in (0, 1), (1, 0):
            motions = torch.tensor([self.world.motions.index(MIRRORED[i]) for i in order])
            texts = self.world.captions(rows, motions=motions.repeat_interleave(len(rows) // 2))
            prediction, _ = split_sigma(predict(noisy, timestep, content, texts).float(), x0.shape[1])
            estimates.append(to_x0_eps(prediction, noisy, alpha, noise.prediction_type)[0])
        moved = (estimates[1] - estimates[0]).chunk(2)
        return float((((moved[0] - moved[1]) / 2).mean(dim=0) * way).sum() / way.square().sum())
