from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

from cmdgen.config import DiTConfig, NoiseConfig
from cmdgen.diffusion.schedule import (
    add_noise,
    alphas_cumprod,
    ddim_weights,
    split_sigma,
    timesteps,
    to_x0_eps,
    velocity,
)

STABLE_DIFFUSION = NoiseConfig()
TRAILING = replace(STABLE_DIFFUSION, timestep_spacing="trailing")
LINSPACE = replace(STABLE_DIFFUSION, timestep_spacing="linspace")
MOTION = DiTConfig().noise


def peer(config: NoiseConfig) -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        timestep_spacing=config.timestep_spacing,
        steps_offset=config.steps_offset,
    )


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, MOTION])
def test_signal_powers_are_those_of_diffusers(config: NoiseConfig) -> None:
    powers = alphas_cumprod(config)
    assert powers.dtype == torch.float64 and powers.shape == (1000,)
    torch.testing.assert_close(powers.float(), peer(config).alphas_cumprod, rtol=1e-4, atol=0)


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, TRAILING, LINSPACE, MOTION])
@pytest.mark.parametrize("steps", [2, 7, 25, 50, 100, 333, 999])
def test_timesteps_are_those_of_diffusers(config: NoiseConfig, steps: int) -> None:
    scheduler = peer(config)
    scheduler.set_timesteps(steps)
    # rounding in diffusers can add one timestep at the end
    assert timesteps(config, steps).tolist() == scheduler.timesteps.tolist()[:steps]


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, TRAILING, LINSPACE, MOTION])
def test_as_many_steps_as_timesteps_visit_each_once(config: NoiseConfig) -> None:
    assert timesteps(config, 1000).tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_impossible_step_counts_are_rejected(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps {steps} is not between 1 and 1000"):
        timesteps(STABLE_DIFFUSION, steps)


def test_unknown_names_are_rejected() -> None:
    with pytest.raises(ValueError, match="beta schedule 'cosine'"):
        alphas_cumprod(replace(STABLE_DIFFUSION, beta_schedule="cosine"))
    with pytest.raises(ValueError, match="timestep spacing 'random'"):
        timesteps(replace(STABLE_DIFFUSION, timestep_spacing="random"), 10)
    with pytest.raises(ValueError, match="prediction type 'score'"):
        to_x0_eps(torch.ones(1, 1), torch.ones(1, 1), 0.5, "score")


def test_both_parametrisations_give_back_the_sample_and_the_noise() -> None:
    x0, noise = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    alpha = torch.tensor([0.9, 0.3, 0.01], dtype=torch.float64)
    sample = add_noise(x0, noise, alpha)
    for prediction, name in (
        (noise, "epsilon"),
        (velocity(x0, noise, alpha), "v_prediction"),
    ):
        torch.testing.assert_close(to_x0_eps(prediction, sample, alpha, name), (x0, noise))
    one = add_noise(x0[1:2], noise[1:2], 0.3)
    torch.testing.assert_close(sample[1:2], one)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("alpha", "after"), [(0.005, 0.02), (0.3, 0.9), (0.997, 1.0)])
@pytest.mark.parametrize("sigma", [0.0, 0.03])
def test_ddim_weights_are_the_step(name: str, alpha: float, after: float, sigma: float) -> None:
    sample, prediction = torch.randn(2, 3, 4, dtype=torch.float64)
    x0, eps = to_x0_eps(prediction, sample, alpha, name)
    keep, move = ddim_weights(alpha, after, name, sigma=sigma)
    expected = after**0.5 * x0 + max(1 - after - sigma**2, 0) ** 0.5 * eps
    torch.testing.assert_close(keep * sample + move * prediction, expected)


def test_noised_samples_keep_their_dtype() -> None:
    x0 = torch.ones(2, 3, dtype=torch.float32)
    alpha = alphas_cumprod(STABLE_DIFFUSION)[torch.tensor([0, 999])]
    assert add_noise(x0, x0, alpha).dtype == velocity(x0, x0, alpha).dtype == torch.float32


def test_learned_variance_is_the_second_half_of_the_channels() -> None:
    output = torch.arange(8.0).view(1, 8)
    prediction, sigma = split_sigma(output, 4)
    assert prediction.tolist() == [[0, 1, 2, 3]] and sigma is not None
    assert sigma.tolist() == [[4, 5, 6, 7]]
    assert split_sigma(output, 8)[1] is None
