"""Loss terms against their formulas, worked out another way."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from cmdgen.config import NoiseConfig
from cmdgen.diffusion.schedule import alphas_cumprod
from cmdgen.training.losses import (
    edge_difference,
    gaussian_kl,
    l1_plus_l2,
    min_snr_weights,
    moving_weights,
    variational_bound,
)


def test_moving_weights_are_one_where_nothing_moves() -> None:
    frames = torch.zeros(1, 2, 4, 3, 3)
    frames[0, 1, 2, 0, 0] = 1.0
    weights = moving_weights(frames, 6.0)
    assert weights.shape == (1, 1, 4, 3, 3)
    assert weights[0, 0, :, 1, 1].tolist() == [1, 1, 1, 1]
    # a mean over time of 1/4: one frame is 3/4 away from it, three are 1/4 away
    assert weights[0, 0, :, 0, 0].tolist() == [2.5, 2.5, 5.5, 2.5]


def test_l1_plus_l2_is_a_weighted_mean_of_both() -> None:
    prediction, target = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0])
    weights = torch.tensor([1.0, 2.0])
    assert float(l1_plus_l2(prediction, target, weights)) == (1 * (1 + 1) + 2 * (2 + 4)) / 2
    assert float(l1_plus_l2(prediction, target, weights, l1=0.0)) == (1 * 1 + 2 * 4) / 2


def test_edge_difference_ignores_a_constant_offset() -> None:
    image = torch.randn(1, 3, 5, 6)
    weights = torch.ones(1, 1, 5, 6)
    assert float(edge_difference(image + 2, image, weights)) == pytest.approx(0, abs=1e-6)
    ramp = torch.arange(6.0).expand(1, 3, 5, 6)
    assert float(edge_difference(image + ramp, image, weights)) == pytest.approx(1, abs=1e-5)


def test_gaussian_kl_is_that_of_torch() -> None:
    mean, logvar = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    reference = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(gaussian_kl(mean, logvar), reference.sum() / 2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_make_every_loss_the_same_one_on_x0(prediction_type: str) -> None:
    alpha = torch.tensor([0.999, 0.9, 0.5, 0.1, 0.001], dtype=torch.float64)
    weights = min_snr_weights(alpha, prediction_type, 5.0)
    # an error of 1 in x0 is this much in the prediction, at a fixed noisy sample
    squared = {"epsilon": alpha, "v_prediction": 1.0, "sample": 1 - alpha}[prediction_type] / (1 - alpha)
    snr = alpha / (1 - alpha)
    torch.testing.assert_close(weights * squared, snr.clamp(max=5))


@pytest.mark.parametrize("timestep", [0, 1, 500, 999])
def test_variational_bound_is_the_divergence_from_the_posterior(timestep: int) -> None:
    torch.manual_seed(timestep)
    alphas = alphas_cumprod(NoiseConfig(beta_schedule="linear", beta_start=1e-4, beta_end=0.02))
    x0 = torch.rand(1, 2, 3, 4, dtype=torch.float64) * 1.8 - 0.9
    noise = torch.randn_like(x0)
    alpha = alphas[timestep]
    noisy = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
    epsilon, fraction = noise + 0.1 * torch.randn_like(x0), torch.rand_like(x0) * 2 - 1
    output = torch.cat((epsilon, fraction), dim=1).requires_grad_()

    bound = variational_bound(x0, noisy, output, torch.tensor([timestep]), alphas)
    bound.sum().backward()

    # Bayes: q(x_t-1 | x_t, x0) is the product of q(x_t | x_t-1) and q(x_t-1 | x0)
    def posterior(start: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        before = alphas[step - 1] if step else torch.tensor(1.0, dtype=torch.float64)
        keep = alphas[step] / before
        if not step:
            return start, torch.tensor(0.0, dtype=torch.float64)
        variance = 1 / (keep / (1 - keep) + 1 / (1 - before))
        mean = variance * (keep.sqrt() / (1 - keep) * noisy + before.sqrt() / (1 - before) * start)
        return mean, variance

    predicted = (noisy - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()
    mean, _ = posterior(predicted, timestep)
    low = posterior(x0, max(timestep, 1))[1].log()
    high = (1 - alphas[timestep] / (alphas[timestep - 1] if timestep else 1.0)).log()
    share = (fraction + 1) / 2
    model = Normal(mean, (0.5 * (share * high + (1 - share) * low)).exp())
    if timestep:
        true_mean, variance = posterior(x0, timestep)
        nats = kl_divergence(Normal(true_mean, variance.sqrt()), model)
    else:
        nats = -(model.cdf(x0 + 1 / 255) - model.cdf(x0 - 1 / 255)).log()
    assert float(bound) == pytest.approx(float(nats.mean()) / math.log(2), rel=1e-4)
    # the mean is trained by the other loss alone
    assert output.grad is not None
    assert output.grad[:, :2].abs().sum() == 0
    assert output.grad[:, 2:].abs().sum() > 0
