import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler
from torch import Tensor

from cmdgen.config import CMD_SD15, LCM_STEPS, PRESETS, DiTConfig, NoiseConfig
from cmdgen.config import SAMPLERS as NAMES
from cmdgen.diffusion.guidance import Denoise, guide
from cmdgen.diffusion.samplers import SAMPLERS, VISITED, Sampling, ddim, ddpm, dpm_solver_pp
from cmdgen.diffusion.schedule import add_noise, alphas_cumprod, signal_powers, timesteps, to_prediction, velocity

Scheduler = DDIMScheduler | DDPMScheduler | DPMSolverMultistepScheduler | EulerDiscreteScheduler | LCMScheduler
Sampler = Callable[..., Tensor]

STABLE_DIFFUSION = CMD_SD15.noise
MOTION = DiTConfig().noise
MINI = PRESETS["mini"].noise
CLEAN = replace(STABLE_DIFFUSION, prediction_type="sample")
# AnimateDiff's; in few steps, AnimateDiff-Lightning's; Stable Video Diffusion's
ANIMATE = NoiseConfig(beta_schedule="linear")
LIGHTNING = replace(ANIMATE, timestep_spacing="trailing", solver="euler")
SVD = NoiseConfig(
    prediction_type="v_prediction", solver="euler", timestep_type="continuous", sigma_min=0.002, sigma_max=700.0
)
SPACINGS = [
    replace(STABLE_DIFFUSION, timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=one)
    for spacing, offset, one in itertools.product(("leading", "trailing"), (0, 1), (False, True))
]

# the data of the Gaussian tests
MEAN, DEVIATION = 1.5, 0.4


def gaussian_denoiser(config: NoiseConfig) -> Denoise:
    """The optimal denoiser for data N(MEAN, DEVIATION^2)."""
    powers = alphas_cumprod(config)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha = float(powers[t[0]])
        variance = alpha * DEVIATION**2 + 1 - alpha
        centred = x - math.sqrt(alpha) * MEAN
        eps = math.sqrt(1 - alpha) / variance * centred
        x0 = MEAN + math.sqrt(alpha) * DEVIATION**2 / variance * centred
        return to_prediction(x0, eps, alpha, config.prediction_type)

    return denoise


def exact_flow(config: NoiseConfig, first: int) -> tuple[float, float]:
    """Mean and deviation that the exact probability flow makes of unit noise at one timestep."""
    alpha = float(alphas_cumprod(config)[first])
    deviation = DEVIATION / math.sqrt(alpha * DEVIATION**2 + 1 - alpha)
    return MEAN - deviation * math.sqrt(alpha) * MEAN, deviation


def errors(name: str, config: NoiseConfig, steps: int) -> tuple[float, float]:
    """Of a deterministic sampler's mean and deviation, against the exact probability flow."""
    optimal = gaussian_denoiser(config)
    visited: list[int] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        visited.append(int(t[0]))
        return optimal(x, t)

    # the sampler is an affine map of the noise here: its value at 0 is the mean
    noise = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    at_zero, at_one = SAMPLERS[name](denoise, noise, Sampling(config, steps))
    assert len(visited) == steps and visited == sorted(visited, reverse=True)
    mean, deviation = exact_flow(config, visited[0])
    return abs(at_zero.item() - mean), abs((at_one - at_zero).item() - deviation)


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, MOTION, MINI, CLEAN])
@pytest.mark.parametrize(
    ("name", "steps", "tolerance"),
    [("ddim", 1000, 0.003), ("ddim", 100, 0.03), ("dpm++", 1000, 0.001), ("dpm++", 100, 0.015)],
)
def test_deterministic_samplers_reach_the_gaussian(
    config: NoiseConfig, name: str, steps: int, tolerance: float
) -> None:
    assert max(errors(name, config, steps)) < tolerance


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, MOTION, MINI, CLEAN])
@pytest.mark.parametrize("eta", [None, 1.0])
def test_stochastic_samplers_reach_the_gaussian(config: NoiseConfig, eta: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 20_000, generator=generator)
    denoise, how = gaussian_denoiser(config), Sampling(config, 1000, [generator])
    x = ddpm(denoise, noise, how) if eta is None else ddim(denoise, noise, how, eta=eta)
    # three standard errors, and 0.005 of discretisation in the deviation
    assert x.mean().item() == pytest.approx(MEAN, abs=0.0085)
    assert x.std().item() == pytest.approx(DEVIATION, abs=0.011)


def test_second_order_converges_faster_than_first() -> None:
    first, second = (errors(name, MOTION, 10)[1] / errors(name, MOTION, 40)[1] for name in ("ddim", "dpm++"))
    assert 3 < first < 5
    assert second > 12


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def network(x: Tensor, t: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 2 C, H, W): nonlinear, mixing channels, dependent on the time."""
    mixing = torch.randn(2 * x.shape[1], x.shape[1], generator=torch.Generator().manual_seed(1))
    mixed = torch.einsum("oc,bchw->bohw", 0.4 * mixing.to(x), x)
    return mixed.sin() * (1 + t.view(-1, 1, 1, 1) / 1000)


def half(x: Tensor, t: Tensor) -> Tensor:
    return network(x, t)[:, : x.shape[1]]


def peer(kind: type[Scheduler], config: NoiseConfig, **settings: bool | str) -> Scheduler:
    return kind(
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        timestep_spacing=config.timestep_spacing,
        steps_offset=config.steps_offset,
        **settings,
    )


def scheduler_of(name: str, config: NoiseConfig) -> Scheduler:
    """diffusers' scheduler for one of our samplers."""
    clip = config.clip_sample
    match name:
        case "ddim" | "ddim noisy":
            end = config.set_alpha_to_one
            scheduler = peer(DDIMScheduler, config, clip_sample=clip, set_alpha_to_one=end)
            # noise of little power magnifies what float32 powers lose
            scheduler.alphas_cumprod = alphas_cumprod(config)
            scheduler.final_alpha_cumprod = torch.tensor(1.0) if end else scheduler.alphas_cumprod[0]
            return scheduler
        case "dpm++":
            return peer(DPMSolverMultistepScheduler, config)
        case "lcm":
            scheduler = peer(LCMScheduler, config)
            # a clean sample that much noise hides magnifies what float32 powers lose
            scheduler.alphas_cumprod = alphas_cumprod(config)
            return scheduler
        case "ddpm":
            return peer(DDPMScheduler, config, clip_sample=clip)
    return peer(DDPMScheduler, config, clip_sample=clip, variance_type="learned_range")


# of learned variance diffusers adds noise even after the last step, unless that is at timestep 0.
# its DDIM takes equal strides, which miss trailing timesteps that do not divide 1000: so many steps
# are not compared
@pytest.mark.parametrize(
    ("name", "config"),
    [
        *itertools.product(("ddim", "dpm++", "ddpm"), (STABLE_DIFFUSION, MOTION, MINI, CLEAN)),
        *itertools.product(("ddim", "ddim noisy", "dpm++"), SPACINGS),
        ("dpm++", replace(STABLE_DIFFUSION, timestep_spacing="linspace")),
        ("ddpm learned", MOTION),
        *itertools.product(("ddim", "lcm"), (ANIMATE,)),
        ("lcm", STABLE_DIFFUSION),
        *itertools.product(("ddim", "ddim noisy", "ddpm"), (replace(MINI, clip_sample=True),)),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 10, 25, 50])
def test_every_sample_on_the_way_is_that_of_diffusers(name: str, config: NoiseConfig, steps: int) -> None:
    scheduler = scheduler_of(name, config)
    denoise = network if name == "ddpm learned" else half
    noise = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))

    expected, theirs = [noise], []
    scheduler.set_timesteps(steps)
    settings = {} if name == "dpm++" else {"generator": seeded(2, 5)}
    if name == "ddim noisy":
        settings["eta"] = 0.5
    for t in scheduler.timesteps:
        output = denoise(expected[-1], t.expand(2))
        theirs.append(int(t))
        expected.append(scheduler.step(output, t, expected[-1], **settings).prev_sample)

    actual, ours = [], []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        actual.append(x)
        ours.append(int(t[0]))
        return denoise(x, t)

    settings = {"eta": 0.5} if name == "ddim noisy" else {}
    sampler = SAMPLERS[name.split()[0]]
    actual.append(sampler(watched, noise, Sampling(config, steps, seeded(2, 5)), **settings))
    assert ours == theirs
    for before, after in zip(actual, expected, strict=True):
        scale = after.abs().max()
        torch.testing.assert_close(before / scale, after / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (LIGHTNING, {}),
        (replace(LIGHTNING, timestep_spacing="leading"), {}),
        (SVD, {"timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0, "use_karras_sigmas": True}),
    ],
    ids=["trailing", "leading", "continuous"],
)
@pytest.mark.parametrize("steps", [4, 8, 25])
def test_eulers_method_is_ddim_on_samples_of_other_sizes(config: NoiseConfig, settings: dict, steps: int) -> None:
    scheduler = peer(EulerDiscreteScheduler, config, **settings)
    scheduler.set_timesteps(steps)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        called.append(float(t[0]))
        mixing = 0.3 * torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
        return torch.einsum("oc,bchw->bohw", mixing, x).tanh() * (1 + t.view(-1, 1, 1, 1) / 10000)

    noise = torch.randn(1, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    called: list[float] = []
    expected = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = denoise(scheduler.scale_model_input(expected, t), t.expand(1))
        expected = scheduler.step(output, t, expected).prev_sample
    theirs, called = called, []
    actual = ddim(denoise, noise, Sampling(config, steps))
    assert called == pytest.approx(theirs, abs=1e-5)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_distilled_models_are_called_at_the_published_timesteps() -> None:
    assert timesteps(LIGHTNING, 4).tolist() == [999, 749, 499, 249]
    assert timesteps(LIGHTNING, 8).tolist() == [999, 874, 749, 624, 499, 374, 249, 124]
    for steps, visited in ((25, [961, 921, 41, 1]), (20, [951, 901, 51, 1])):
        assert timesteps(ANIMATE, steps)[[0, 1, -2, -1]].tolist() == visited
    assert VISITED["lcm"](ANIMATE, 4).tolist() == [999, 759, 499, 259]
    assert VISITED["lcm"](ANIMATE, 6).tolist() == [999, 839, 679, 499, 339, 179]
    assert VISITED["lcm"](ANIMATE, 8).tolist() == [999, 879, 759, 639, 499, 379, 259, 139]
    times = timesteps(SVD, 25)
    assert (float(times[0]), float(times[-1])) == pytest.approx((1.63777, -1.55365), abs=1e-5)
    assert float(signal_powers(SVD, times)[0]) == pytest.approx(1 / (1 + 700**2))


def test_each_row_may_be_guided_on_a_scale_of_its_own() -> None:
    def conditional(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return half(x * text.view(-1, 1, 1, 1), t)

    noise, scales = torch.randn(2, 4, 3, 5), (1.5, 4.0)
    conditions = (torch.ones(2),), (torch.zeros(2),)
    how = Sampling(MINI, 3)
    together = ddim(guide(conditional, torch.tensor(scales).view(2, 1, 1, 1), *conditions), noise, how)
    for i, scale in enumerate(scales):
        alone = ddim(guide(conditional, scale, *conditions), noise, how)
        torch.testing.assert_close(together[i], alone[i])


@pytest.mark.parametrize("steps", [3, 7, 30, 333])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("one", [False, True])
def test_leading_ddim_is_that_of_diffusers_in_any_number_of_steps(steps: int, offset: int, one: bool) -> None:
    """With our powers in place of their float32 ones, what is left is the update, in float64."""
    config = replace(STABLE_DIFFUSION, steps_offset=offset, set_alpha_to_one=one)
    scheduler = scheduler_of("ddim", config)
    scheduler.alphas_cumprod = alphas_cumprod(config)
    if not one:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    noise = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0)).double()

    expected = noise
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        expected = scheduler.step(half(expected, t.expand(2)), t, expected).prev_sample
    actual = ddim(half, noise, Sampling(config, steps))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("predict", [half, network])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_guides_as_guidance_does(predict: Denoise, eta: float) -> None:
    """One pass for guidance and the step is the two of them, in the precision of the sample."""

    def conditional(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return predict(x * text.view(-1, 1, 1, 1), t).bfloat16()

    noise = torch.randn(2, 4, 3, 5)
    guided = guide(conditional, 3.0, (torch.ones(2),), (torch.zeros(2),))
    together, apart = (
        ddim(denoise, noise, Sampling(MINI, 6, seeded(0, 1)), eta=eta)
        for denoise in (guided, lambda x, t: guided(x, t))
    )
    assert together.dtype == torch.float32
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 64, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_a_denoiser_is_called_once_for_each_timestep_known_beforehand(name: str, steps: int, spacing: str) -> None:
    config = replace(STABLE_DIFFUSION, timestep_spacing=spacing)
    steps = min(steps, LCM_STEPS) if name == "lcm" else steps
    called: list[list[int]] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        called.append(t.tolist())
        return half(x, t)

    SAMPLERS[name](denoise, torch.randn(2, 1, 1, 1), Sampling(config, steps))
    assert called == [[t, t] for t in VISITED[name](config, steps).tolist()]


@pytest.mark.parametrize("name", NAMES)
def test_samplers_report_each_step_and_leave_the_noise_alone(name: str) -> None:
    noise = torch.randn(1, 2, 3, 3)
    before = noise.clone()
    reports: list[tuple[int, int]] = []
    how = Sampling(MINI, 5, on_step=lambda done, total: reports.append((done, total)))
    SAMPLERS[name](half, noise, how)
    assert reports == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    assert torch.equal(noise, before)


@pytest.mark.parametrize("name", NAMES)
def test_samples_keep_the_precision_of_the_noise(name: str) -> None:
    def denoise(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64 and t.shape == (2,)
        return network(x.float(), t).bfloat16()

    for dtype in (torch.float32, torch.float64):
        noise = torch.randn(2, 4, 3, 3, dtype=dtype)
        assert SAMPLERS[name](denoise, noise, Sampling(MOTION, 4)).dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_one_generator_state_gives_one_sample(name: str) -> None:
    noise = torch.randn(2, 4, 3, 3)
    first, second = (SAMPLERS[name](network, noise, Sampling(MOTION, 6, seeded(3, 4))) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [{}, {"eta": 1.0}])
def test_a_batch_is_its_samples_one_by_one(name: str, settings: dict[str, float]) -> None:
    if settings and name != "ddim":
        settings = {}
    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).double()

    def run(noise: Tensor, *seeds: int) -> Tensor:
        return SAMPLERS[name](network, noise, Sampling(MOTION, 6, seeded(*seeds)), **settings)

    together = run(noise, 3, 4)
    for i, seed in enumerate((3, 4)):
        alone = run(noise[i : i + 1], seed)
        torch.testing.assert_close(together[i : i + 1], alone)
    if name in ("ddpm", "lcm") or settings:
        assert not torch.allclose(together, run(noise, 3, 5))
        with pytest.raises(AssertionError, match="1 generators for a batch of 2"):
            run(noise, 3)


@pytest.mark.parametrize("sampler", [ddim, dpm_solver_pp])
def test_deterministic_samplers_ignore_the_learned_variance(sampler: Sampler) -> None:
    noise, how = torch.randn(2, 4, 3, 3), Sampling(MOTION, 6)
    assert torch.equal(sampler(network, noise, how), sampler(half, noise, how))


def test_one_step_of_a_perfect_denoiser_is_the_clean_sample() -> None:
    x0, eps = torch.randn(2, 1, 4, 3, 3, dtype=torch.float64)
    alpha = float(alphas_cumprod(MINI)[999])
    x = add_noise(x0, eps, alpha)
    for name in NAMES:
        result = SAMPLERS[name](lambda x, t: velocity(x0, eps, alpha), x, Sampling(MINI, 1))
        torch.testing.assert_close(result, x0)


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, MOTION, MINI, CLEAN])
@pytest.mark.parametrize("name", NAMES)
def test_estimates_of_a_perfect_denoiser_are_the_clean_sample(name: str, config: NoiseConfig) -> None:
    powers = alphas_cumprod(config)
    clean = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha = float(powers[t[0]])
        eps = (x - math.sqrt(alpha) * clean) / math.sqrt(1 - alpha)
        return to_prediction(clean, eps, alpha, config.prediction_type)

    estimates: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    SAMPLERS[name](denoise, noise, Sampling(config, 5, seeded(1, 2), on_estimate=estimates.append))
    assert len(estimates) == 5
    for estimate in estimates:
        torch.testing.assert_close(estimate, clean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim_with_noise_shows_its_estimate_before_that_is_added(eta: float) -> None:
    optimal = gaussian_denoiser(STABLE_DIFFUSION)
    estimates: list[Tensor] = []
    noise = torch.randn(1, 1, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ddim(optimal, noise, Sampling(STABLE_DIFFUSION, 3, seeded(0), on_estimate=estimates.append), eta=eta)
    # the first one knows the noise alone
    first = int(timesteps(STABLE_DIFFUSION, 3)[0])
    alpha = float(alphas_cumprod(STABLE_DIFFUSION)[first])
    eps = optimal(noise, torch.tensor([first]))
    expected = (noise - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
    torch.testing.assert_close(estimates[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_step_of_ddim_that_goes_nowhere_has_no_estimate(steps: int) -> None:
    config = NoiseConfig(set_alpha_to_one=False, steps_offset=0)
    assert timesteps(config, steps)[-1] == 0
    estimates: list[Tensor] = []
    noise = torch.randn(1, 1, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ddim(gaussian_denoiser(config), noise, Sampling(config, steps, on_estimate=estimates.append))
    assert len(estimates) == steps - 1
    assert all(estimate.isfinite().all() for estimate in estimates)
