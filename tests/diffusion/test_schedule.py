import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler

from cmdgen.config import CMD_SD15, CMD_SD21, MINI, DiTConfig, NoiseConfig
from cmdgen.diffusion.schedule import (
    add_noise,
    alphas_cumprod,
    ddim_weights,
    split_sigma,
    timesteps,
    to_prediction,
    to_x0_eps,
    velocity,
)
from cmdgen.schema import read_config, write_config
from cmdgen.store.find import find_model
from cmdgen.store.parts import read_model

STABLE_DIFFUSION = CMD_SD15.noise
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


def common(config: NoiseConfig) -> dict[str, object]:
    """The fields that diffusers' DDIM has, too."""
    others = ("solver", "timestep_type", "sigma_min", "sigma_max")
    return {name: value for name, value in asdict(config).items() if name not in others}


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, MOTION])
def test_signal_powers_are_those_of_diffusers(config: NoiseConfig) -> None:
    powers = alphas_cumprod(config)
    assert powers.dtype == torch.float64 and powers.shape == (1000,)
    torch.testing.assert_close(powers.float(), peer(config).alphas_cumprod, rtol=1e-4, atol=0)


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, TRAILING, LINSPACE, MOTION])
@pytest.mark.parametrize("one", [False, True])
def test_scheduler_folders_go_both_ways(config: NoiseConfig, one: bool, tmp_path: Path) -> None:
    config = replace(config, set_alpha_to_one=one, prediction_type="v_prediction")
    write_config(config, tmp_path / "ours")
    theirs = DDIMScheduler.from_pretrained(tmp_path / "ours")
    assert common(config).items() <= theirs.config.items()
    assert not theirs.config.clip_sample and not theirs.config.thresholding
    for kind in (DDIMScheduler, PNDMScheduler):
        kind.from_config(theirs.config).save_pretrained(tmp_path / kind.__name__)
        assert read_config(tmp_path / kind.__name__, NoiseConfig) == config


def test_the_presets_are_stable_diffusions_schedule() -> None:
    """As the scheduler folders of SD 1.5 and SD 2.1-base have it."""
    stock = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    stock |= {"steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True}
    theirs = PNDMScheduler(**stock)
    for model in (CMD_SD15, CMD_SD21):
        # their folders hold it too, for other schedulers
        assert common(model.noise).items() <= {**theirs.config, "clip_sample": False}.items()


def test_mini_ends_without_noise() -> None:
    """As it always has: a stray `false` in its files would change every video of DDIM."""
    mini = read_model(find_model("mini"))
    assert mini.noise == MINI.noise and mini.noise.set_alpha_to_one
    assert mini.motion == MINI.motion and mini.motion.noise.set_alpha_to_one


def test_ddim_ends_where_the_folder_says(tmp_path: Path) -> None:
    write_config(STABLE_DIFFUSION, tmp_path)
    assert read_config(tmp_path, NoiseConfig).set_alpha_to_one is False
    path = tmp_path / "scheduler_config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "set_alpha_to_one": 1}))
    with pytest.raises(ValueError, match="set_alpha_to_one 1 is not true or false"):
        read_config(tmp_path, NoiseConfig)
    del stored["set_alpha_to_one"]
    path.write_text(json.dumps(stored))
    theirs = DDIMScheduler.from_pretrained(tmp_path)
    assert read_config(tmp_path, NoiseConfig).set_alpha_to_one is theirs.config.set_alpha_to_one


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
    with pytest.raises(ValueError, match="beta_schedule 'cosine' is not supported, expected"):
        alphas_cumprod(replace(STABLE_DIFFUSION, beta_schedule="cosine"))
    with pytest.raises(ValueError, match="timestep_spacing 'random' is not supported, expected"):
        timesteps(replace(STABLE_DIFFUSION, timestep_spacing="random"), 10)
    with pytest.raises(ValueError, match="prediction_type 'score' is not supported, expected"):
        to_x0_eps(torch.ones(1, 1), torch.ones(1, 1), 0.5, "score")


def test_every_parametrisation_gives_back_the_sample_and_the_noise() -> None:
    x0, noise = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    alpha = torch.tensor([0.9, 0.3, 0.01], dtype=torch.float64)
    sample = add_noise(x0, noise, alpha)
    for prediction, name in ((noise, "epsilon"), (velocity(x0, noise, alpha), "v_prediction"), (x0, "sample")):
        torch.testing.assert_close(to_prediction(x0, noise, alpha, name), prediction)
        torch.testing.assert_close(to_x0_eps(prediction, sample, alpha, name), (x0, noise))
    one = add_noise(x0[1:2], noise[1:2], 0.3)
    torch.testing.assert_close(sample[1:2], one)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "sample"])
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
