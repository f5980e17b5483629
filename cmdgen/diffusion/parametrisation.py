"""What a denoiser predicts, told by what it makes of noise."""

import torch
from torch import Tensor

from cmdgen.config import NoiseConfig
from cmdgen.diffusion.guidance import Denoise
from cmdgen.diffusion.schedule import alphas_cumprod


def recognise_prediction(denoise: Denoise, noise: Tensor, config: NoiseConfig) -> str | None:
    """(1, C, ...) of unit noise -> "epsilon", "v_prediction", or None where it is neither.

    A trained network sees the noise in `sqrt(1 - a) noise`, whatever picture it takes the rest for:
    it answers with 1 of it where it predicts the noise, with sqrt(a) of it where it predicts
    velocity (Salimans & Ho 2022, arXiv:2202.00512). Noisy, at a = 0.05, the two are far apart; at
    a = 0.5 a network that has learned nothing, and answers with little of it, is told from them.
    """
    powers = alphas_cumprod(config)
    when = (powers[:, None] - torch.tensor([0.05, 0.5])).abs().argmin(dim=0).to(noise.device)
    x = torch.cat([noise * (1 - float(powers[t])) ** 0.5 for t in when])
    seen = (denoise(x, when).float() * noise).flatten(1).sum(dim=1) / noise.square().sum()
    noisy, clean = seen.tolist()
    if noisy > 0.75:
        return "epsilon"
    return "v_prediction" if noisy < 0.5 and clean > 0.4 else None
