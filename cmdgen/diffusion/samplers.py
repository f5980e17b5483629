"""Samplers as pure functions over a denoiser: DDIM, ancestral DDPM, DPM-Solver++(2M), LCM.

A denoiser maps samples (B, C, ...) and timesteps (B,) to its raw output (B, C or 2 C, ...). A
sampler calls it once for each timestep that VISITED lists, in that order. Coefficients are float64
numbers; samples keep the dtype of the first noise. Noise of later steps comes from `generators`,
one for each sample of the batch. Each step first gives `on_estimate` the clean sample (B, C, ...)
that it heads for, if it moves at all, and then calls `on_step(done, total)`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmdgen.config import LCM_STEPS, NoiseConfig
from cmdgen.diffusion import schedule
from cmdgen.diffusion.guidance import Denoise, Guided
from cmdgen.diffusion.schedule import alphas_cumprod, signal_powers, timesteps


@dataclass(frozen=True)
class Sampling:
    """What all samplers take: a schedule, its steps, the noise of later steps, and who watches."""

    config: NoiseConfig
    steps: int
    # None: torch's own
    generators: Sequence[torch.Generator] | None = None
    on_step: Callable[[int, int], None] | None = None
    on_estimate: Callable[[Tensor], None] | None = None


def ddim(denoise: Denoise, noise: Tensor, how: Sampling, *, eta: float = 0.0) -> Tensor:
    """(B, C, ...) of unit noise -> (B, C, ...). Eq. 12 of Song et al. 2021 (arXiv:2010.02502).

    `eta` 0 is deterministic, 1 as noisy as DDPM. The last step ends without noise, or, where
    `set_alpha_to_one` is false as in Stable Diffusion, with that of timestep 0. Euler's method on
    samples that are not scaled down as noise grows makes the same steps (its Eq. 14).
    """
    config, visited = how.config, timesteps(how.config, how.steps)
    euler = config.solver == "euler"
    end = 1.0 if config.set_alpha_to_one or euler else float(alphas_cumprod(config)[0])
    x = noise
    if euler and config.timestep_spacing != "leading":
        # as diffusers' Euler begins there
        x = x * (1 - float(signal_powers(config, visited[:1]))) ** 0.5
    for t, alpha, after in _walk(how, visited, end):
        sigma = eta * math.sqrt((1 - after) / (1 - alpha) * (1 - alpha / after))
        if config.clip_sample:
            x0, eps, _ = _predict(denoise, x, t, alpha, how)
            x = math.sqrt(after) * x0 + math.sqrt(1 - after - sigma**2) * eps
            x = x + sigma * _draw(x, how) if sigma > 0 else x
            continue
        keep, move = schedule.ddim_weights(alpha, after, config.prediction_type, sigma=sigma)
        noisy, x = x, _linear_step(denoise, x, t, keep, move)
        # the step from timestep 0 to its own noise leaves all as it is
        if how.on_estimate is not None and after != alpha:
            how.on_estimate(_between(noisy, x, alpha, after, sigma))
        if sigma > 0:
            x = x + sigma * _draw(x, how)
    return x


def ddpm(denoise: Denoise, noise: Tensor, how: Sampling) -> Tensor:
    """(B, C, ...) of unit noise -> (B, C, ...). Ancestral sampling over respaced timesteps.

    Eq. 6-7 of Ho et al. 2020 (arXiv:2006.11239). The variance is the posterior's, or, where the
    denoiser has 2 C channels, the learned interpolation of logarithms between it and beta: eq. 15
    of Nichol & Dhariwal 2021 (arXiv:2102.09672).
    """
    x = noise
    for t, alpha, after in _walk(how, timesteps(how.config, how.steps), 1.0):
        x0, _, learned = _predict(denoise, x, t, alpha, how)
        keep = alpha / after
        beta = 1 - keep
        variance = (1 - after) / (1 - alpha) * beta
        mean = math.sqrt(after) * beta / (1 - alpha) * x0
        x = mean + math.sqrt(keep) * (1 - after) / (1 - alpha) * x
        deviation: Tensor | float = math.sqrt(variance)
        if variance > 0:
            if learned is not None:
                share = (learned.to(x.dtype) + 1) / 2
                log_variance = share * math.log(beta) + (1 - share) * math.log(variance)
                deviation = (log_variance / 2).exp()
            x = x + deviation * _draw(x, how)
    return x


def dpm_solver_pp(denoise: Denoise, noise: Tensor, how: Sampling) -> Tensor:
    """(B, C, ...) of unit noise -> (B, C, ...). Algorithm 2 of Lu et al. 2022 (arXiv:2211.01095).

    Deterministic: `generators` are not used. The first step is of first order, and so is the last,
    which ends without noise and therefore on the last x0.
    """
    x = noise
    previous: tuple[Tensor, float] | None = None
    for t, alpha, after in _walk(how, solver_timesteps(how.config, how.steps), 1.0):
        x0, _, _ = _predict(denoise, x, t, alpha, how)
        if after == 1.0:
            x = x0
            continue
        log_snr = _half_log_snr(alpha)
        stride = _half_log_snr(after) - log_snr
        target = x0
        if previous is not None:
            earlier, earlier_log_snr = previous
            target = x0 + stride / (log_snr - earlier_log_snr) / 2 * (x0 - earlier)
        x = math.sqrt((1 - after) / (1 - alpha)) * x - math.sqrt(after) * math.expm1(-stride) * target
        previous = x0, log_snr
    return x


def lcm(denoise: Denoise, noise: Tensor, how: Sampling) -> Tensor:
    """(B, C, ...) of unit noise -> (B, C, ...). Algorithm 3 of Luo et al. 2023 (arXiv:2310.04378).

    Each step jumps to a clean sample and, except for the last, adds the noise of the next timestep.
    """
    x = noise
    for t, alpha, after in _walk(how, lcm_timesteps(how.config, how.steps), 1.0):
        x0, _, _ = _predict(denoise, x, t, alpha, how)
        # the boundary condition of a consistency model: at t = 0 it is the sample itself
        scaled, data = 10 * t, 0.5
        x = scaled / math.hypot(scaled, data) * x0 + data**2 / (scaled**2 + data**2) * x
        if after < 1:
            x = schedule.add_noise(x, _draw(x, how), after)
    return x


def lcm_timesteps(config: NoiseConfig, steps: int) -> Tensor:
    """() -> (steps,) int64: those of `lcm`, falling, of the 50 that it is distilled at."""
    stride = config.num_train_timesteps // LCM_STEPS
    if not 1 <= steps <= LCM_STEPS or not stride:
        raise ValueError(f"steps {steps} of lcm is not between 1 and {LCM_STEPS}")
    index = torch.arange(steps) * LCM_STEPS // steps
    return (LCM_STEPS - index) * stride - 1


def solver_timesteps(config: NoiseConfig, steps: int) -> Tensor:
    """() -> (steps,) int64: those of `dpm_solver_pp`, falling.

    Unless trailing or continuous, they are those of one step more, without its last, as in diffusers: DDIM's
    would waste a step near zero.
    """
    if config.timestep_spacing == "trailing" or config.timestep_type == "continuous":
        return timesteps(config, steps)
    return timesteps(config, min(steps + 1, config.num_train_timesteps))[:steps]


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "dpm++": dpm_solver_pp, "lcm": lcm}
# (a noise schedule, steps) -> (steps,): the timesteps at which each calls its denoiser
VISITED = {"ddim": timesteps, "ddpm": timesteps, "dpm++": solver_timesteps, "lcm": lcm_timesteps}


def _walk(how: Sampling, visited: Tensor, end: float) -> Iterator[tuple[float, float, float]]:
    """(steps,) -> each timestep, its signal power, and the next one's, which is `end` at last."""
    steps = visited.tolist()
    powers = [*signal_powers(how.config, visited).tolist(), end]
    for i, t in enumerate(steps):
        yield t, powers[i], powers[i + 1]
        if how.on_step is not None:
            how.on_step(i + 1, len(steps))


def _predict(
    denoise: Denoise, x: Tensor, t: float, alpha: float, how: Sampling
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(B, C, ...) -> clean sample, clipped if so configured, noise, and learned variance, if any."""
    output = _choose(denoise, t)(x, _at(t, x))
    prediction, learned = schedule.split_sigma(output, x.shape[1])
    x0, eps = schedule.to_x0_eps(prediction, x, alpha, how.config.prediction_type)
    x0 = x0.clamp(-1, 1) if how.config.clip_sample else x0
    if how.on_estimate is not None:
        how.on_estimate(x0)
    return x0, eps, learned


def _linear_step(denoise: Denoise, x: Tensor, t: float, keep: float, move: float) -> Tensor:
    """(B, C, ...) -> (B, C, ...): weights of the sample and of what is predicted at timestep t."""
    prediction, _ = schedule.split_sigma(_choose(denoise, t)(x, _at(t, x)), x.shape[1])
    return keep * x + move * prediction.to(x.dtype)


def _between(noisy: Tensor, x: Tensor, alpha: float, after: float, sigma: float) -> Tensor:
    """(B, C, ...) x 2 -> the clean sample from which, with one noise, DDIM's step made both."""
    # the noise's share of either is eliminated
    share = math.sqrt((1 - after - sigma**2) / (1 - alpha))
    return (x - share * noisy) / (math.sqrt(after) - share * math.sqrt(alpha))


def _choose(denoise: Denoise, t: float) -> Denoise:
    """Return the denoiser of a timestep."""
    return denoise.at(t) if isinstance(denoise, Guided) else denoise


def _at(t: float, x: Tensor) -> Tensor:
    """(B, ...) -> (B,): the timestep of each sample."""
    return torch.full((x.shape[0],), t, device=x.device)


def _half_log_snr(alpha: float) -> float:
    return math.log(alpha / (1 - alpha)) / 2


def _draw(like: Tensor, how: Sampling) -> Tensor:
    """(B, C, ...) -> unit noise of that shape, drawn where each sample's generator lives."""
    generators = how.generators
    if generators is None:
        return torch.randn(like.shape).to(like)
    shape = like.shape[1:]
    assert len(generators) == len(like), f"{len(generators)} generators for a batch of {len(like)}"
    rows = (torch.randn(shape, generator=rng, device=rng.device) for rng in generators)
    return torch.stack([*rows]).to(like)
