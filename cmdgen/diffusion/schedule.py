"""The forward process `x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps` and its parametrisations.

`alpha` is the signal's power a_t throughout (Ho et al. 2020's cumulative product,
arXiv:2006.11239): one number, or a tensor of shape (B,) with one for each sample.
"""

import math

import torch
from torch import Tensor

from cmdgen.config import NoiseConfig
from cmdgen.schema import check_choice


def alphas_cumprod(noise: NoiseConfig) -> Tensor:
    """() -> (num_train_timesteps,) float64: the signal's power at each timestep, falling."""
    check_choice(noise.beta_schedule, "beta_schedule")
    # evenly spaced are the betas, or their roots
    power = 1.0 if noise.beta_schedule == "linear" else 0.5
    ends = noise.beta_start**power, noise.beta_end**power
    roots = torch.linspace(*ends, noise.num_train_timesteps, dtype=torch.float64)
    return (1 - roots ** (1 / power)).cumprod(dim=0)


# of the steps between the ends of a range of sigma, in Karras et al. 2022 (arXiv:2206.00364)
_RHO = 7


def signal_powers(noise: NoiseConfig, times: Tensor) -> Tensor:
    """(S,) -> (S,) float64: the signal's power at times that `timesteps` gives."""
    if noise.timestep_type == "continuous":
        # of sigma = exp(4 t), where the signal has unit size: 1 / (1 + sigma^2)
        return (-8 * times.double()).sigmoid()
    return alphas_cumprod(noise)[times]


def timesteps(noise: NoiseConfig, steps: int) -> Tensor:
    """() -> (steps,): the training timesteps to visit, int64, or continuous times, falling.

    "leading" starts each of `steps` equal parts, moved up by `steps_offset`; "trailing" ends each,
    and so begins at the noisiest; "linspace" goes evenly from the noisiest to timestep 0
    (Lin et al. 2023, arXiv:2305.08891, table 2). Continuous times are log(sigma) / 4, as Stable
    Video Diffusion has them, of sigmas from the largest to the smallest (eq. 5 of Karras et al.).
    """
    total = noise.num_train_timesteps
    if not 1 <= steps <= total:
        raise ValueError(f"steps {steps} is not between 1 and {total}")
    if noise.timestep_type == "continuous":
        if noise.sigma_min is None or noise.sigma_max is None:
            raise ValueError("continuous timesteps lie between sigma_min and sigma_max: one is missing")
        first, last = (sigma ** (1 / _RHO) for sigma in (noise.sigma_max, noise.sigma_min))
        return torch.linspace(first, last, steps, dtype=torch.float64).log() * _RHO / 4
    check_choice(noise.timestep_spacing, "timestep_spacing")
    index = torch.arange(steps)
    if noise.timestep_spacing == "leading":
        visited = index.flip(0) * (total // steps)
        # as many steps as timesteps leave no room for an offset
        return visited + min(noise.steps_offset, total - 1 - int(visited[0]))
    if noise.timestep_spacing == "trailing":
        return (total - index.double() * total / steps).round().long() - 1
    return torch.linspace(total - 1, 0, steps, dtype=torch.float64).round().long()


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor | float) -> Tensor:
    """(B, ...), (B, ...) -> (B, ...): the sample at signal power `alpha`."""
    signal, deviation = _amplitudes(alpha, x0)
    return signal * x0 + deviation * noise


def velocity(x0: Tensor, noise: Tensor, alpha: Tensor | float) -> Tensor:
    """(B, ...), (B, ...) -> (B, ...): the v of Salimans & Ho 2022 (arXiv:2202.00512)."""
    signal, deviation = _amplitudes(alpha, x0)
    return signal * noise - deviation * x0


def to_prediction(x0: Tensor, noise: Tensor, alpha: Tensor | float, prediction_type: str) -> Tensor:
    """(B, ...), (B, ...) -> (B, ...): what a denoiser should say: the noise, v, or the clean sample."""
    check_choice(prediction_type, "prediction_type")
    if prediction_type == "v_prediction":
        return velocity(x0, noise, alpha)
    return noise if prediction_type == "epsilon" else x0


def to_x0_eps(prediction: Tensor, sample: Tensor, alpha: Tensor | float, prediction_type: str) -> tuple[Tensor, Tensor]:
    """(B, C, ...), (B, C, ...) -> clean sample, noise: what a prediction says of both."""
    signal, deviation = _amplitudes(alpha, sample)
    prediction = prediction.to(sample.dtype)
    check_choice(prediction_type, "prediction_type")
    if prediction_type == "epsilon":
        return (sample - deviation * prediction) / signal, prediction
    if prediction_type == "sample":
        return prediction, (sample - signal * prediction) / deviation
    x0 = signal * sample - deviation * prediction
    return x0, signal * prediction + deviation * sample


def ddim_weights(alpha: float, after: float, prediction_type: str, *, sigma: float = 0.0) -> tuple[float, float]:
    """() -> keep, move: a DDIM step is `keep * sample + move * prediction`, and `sigma` of noise.

    Eq. 12 of Song et al. 2021 (arXiv:2010.02502), from signal power `alpha` to `after`.
    """
    # it is linear in both: its weights are what it makes of (1, 0) and of (0, 1)
    sample, prediction = torch.eye(2, dtype=torch.float64)
    x0, eps = to_x0_eps(prediction, sample, alpha, prediction_type)
    deviation = math.sqrt(max(1 - after - sigma**2, 0.0))
    keep, move = (math.sqrt(after) * x0 + deviation * eps).tolist()
    return keep, move


def split_sigma(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """(B, C or 2 C, ...) -> prediction and, where there is one, learned variance, (B, C, ...)."""
    if output.shape[1] == channels:
        return output, None
    assert output.shape[1] == 2 * channels, f"{output.shape[1]} channels for samples of {channels}"
    prediction, sigma = output.chunk(2, dim=1)
    return prediction, sigma


def _amplitudes(alpha: Tensor | float, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """(B,) or a number -> sqrt(alpha), sqrt(1 - alpha), broadcasting to `like` in its dtype."""
    if isinstance(alpha, float):
        return alpha**0.5, (1 - alpha) ** 0.5
    # the roots are taken before the cast: 1 - alpha is small where little noise is added
    alpha = alpha.view(-1, *(1,) * (like.dim() - 1))
    return alpha.sqrt().to(like), (1 - alpha).sqrt().to(like)
