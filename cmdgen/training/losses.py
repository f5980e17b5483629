"""Loss terms of the four stages: what matters in a clip, and what matters in diffusion."""

import math

import torch
from torch import Tensor


def moving_weights(frames: Tensor, strength: float) -> Tensor:
    """(B, C, T, H, W) -> (B, 1, T, H, W): 1 + strength * max over C of |x - mean over T of x|.

    The subject is a few per cent of a clip; without this the static optimum is where training ends.
    """
    motion = (frames - frames.mean(dim=2, keepdim=True)).abs().amax(dim=1, keepdim=True)
    return 1 + strength * motion


def l1_plus_l2(prediction: Tensor, target: Tensor, weights: Tensor, *, l1: float = 1.0) -> Tensor:
    """x2 (...), broadcastable weights -> scalar: mean of weights * (l1 |d| + d^2)."""
    difference = (prediction - target).abs()
    return (weights * difference * (l1 + difference)).mean()


def edge_difference(prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """(B, C, H, W) x2, (B, 1, H, W) -> scalar: weighted L1 between the image gradients."""
    difference = prediction - target
    down = difference[..., 1:, :] - difference[..., :-1, :]
    across = difference[..., 1:] - difference[..., :-1]
    return (weights[..., 1:, :] * down.abs()).mean() + (weights[..., 1:] * across.abs()).mean()


def gaussian_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """(B, ...) x2 -> scalar: nats to the standard normal, summed over a sample, mean over B."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(dim=1).mean()


def min_snr_weights(alpha: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """(B,) signal powers -> (B,) loss weights: min(SNR, gamma) on x0, whatever is predicted.

    Of epsilon's error it is / SNR, of v's / (SNR + 1) (Hang et al. 2023, arXiv:2303.09556).
    """
    snr = alpha / (1 - alpha)
    return snr.clamp(max=gamma) / {"epsilon": snr, "v_prediction": snr + 1}.get(prediction_type, 1)


def variational_bound(x0: Tensor, noisy: Tensor, output: Tensor, timestep: Tensor, alphas: Tensor) -> Tensor:
    """(B, C, ...) x2, (B, 2C, ...), (B,), (1000,) -> (B,): bits per dimension of a reverse step.

    The second half of the output interpolates the log variance between the posterior's and beta's
    (Eq. 15 of Nichol and Dhariwal 2021, arXiv:2102.09672); the mean, from the epsilon in the first
    half, gets no gradient. At step 0: likelihood of x0 in bins of 2/255, as of 8-bit pixels.
    """
    epsilon, fraction = output.float().chunk(2, dim=1)
    epsilon = epsilon.detach()
    fraction = (fraction + 1) / 2
    shape = (-1, *[1] * (x0.ndim - 1))
    before = torch.cat((alphas.new_ones(1), alphas[:-1]))
    beta = 1 - alphas / before
    posterior = beta * (1 - before) / (1 - alphas)
    # the posterior's variance is 0 at step 0
    low = torch.cat((posterior[1:2], posterior[1:])).log()[timestep].float().view(shape)
    high = beta.log()[timestep].float().view(shape)
    logvar = fraction * high + (1 - fraction) * low
    alpha = alphas[timestep].float().view(shape)
    weight_x0 = (before.sqrt() * beta / (1 - alphas))[timestep].float().view(shape)
    weight_noisy = ((alphas / before).sqrt() * (1 - before) / (1 - alphas))[timestep].float().view(shape)
    predicted_x0 = (noisy - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()
    difference = weight_x0 * (x0 - predicted_x0)
    divergence = 0.5 * (logvar - low - 1 + (low - logvar).exp() + difference.square() * (-logvar).exp())
    mean = weight_x0 * predicted_x0 + weight_noisy * noisy
    likelihood = -_log_bin(x0, mean, 0.5 * logvar)
    first = (timestep == 0).view(shape)
    nats = torch.where(first, likelihood, divergence).flatten(1).mean(dim=1)
    return nats / math.log(2)


def _log_bin(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of the bin of width 2/255 around x, the outer bins being open."""
    inverse = (-log_std).exp()
    upper = torch.special.ndtr(((x - mean) + 1 / 255) * inverse)
    lower = torch.special.ndtr(((x - mean) - 1 / 255) * inverse)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()
