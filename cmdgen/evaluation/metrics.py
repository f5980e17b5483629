"""Peak signal-to-noise ratio, whole and masked, structural similarity, and Frechet distance."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# of structural similarity: the window, and what keeps its two ratios from 0 / 0
_WINDOW, _DEVIATION = 11, 1.5
_K1, _K2 = 0.01, 0.03


class SquaredError:
    """Mean squared error over every value added so far, and the PSNR it gives.

    PSNR is taken once, of the mean over all values of all clips, so it is not a mean of decibels:
    a clip that fails weighs as much as its error does.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def add(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """(..., C, H, W) x2 in [0, 1], mask (..., H, W) bool: where values count."""
        if prediction.shape != target.shape:
            raise ValueError(f"shapes {tuple(prediction.shape)} and {tuple(target.shape)} differ")
        error = (prediction.double() - target.double()).square()
        if mask is not None:
            error = error * mask.unsqueeze(-3)
            self.count += int(mask.sum()) * error.shape[-3]
        else:
            self.count += error.numel()
        self.total += float(error.sum())

    def psnr(self) -> float:
        """Return decibels for a peak of 1: infinite if nothing differs, NaN of nothing."""
        if not self.count:
            return math.nan
        return -10 * math.log10(self.total / self.count) if self.total else math.inf


def psnr(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> float:
    """(..., C, H, W) x2 in [0, 1], mask (..., H, W) bool -> decibels."""
    error = SquaredError()
    error.add(prediction, target, mask)
    return error.psnr()


def structural_similarity(prediction: Tensor, target: Tensor) -> Tensor:
    """(N, C, H, W) x2 in [0, 1] -> (N,) float64: SSIM, the mean over all windows and channels.

    Wang et al. 2004: windows of 11x11 weighted by a Gaussian of deviation 1.5, each of them inside
    of the picture; K1 = 0.01, K2 = 0.03; moments with the weights, so without a correction of bias.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"shapes {tuple(prediction.shape)} and {tuple(target.shape)} differ")
    if min(target.shape[-2:]) < _WINDOW:
        raise ValueError(f"a picture of {tuple(target.shape[-2:])} has no window of {_WINDOW}")
    offsets = torch.arange(_WINDOW, dtype=torch.float64, device=target.device) - _WINDOW // 2
    weights = (-offsets.square() / (2 * _DEVIATION**2)).exp()
    weights = weights / weights.sum()

    def average(x: Tensor) -> Tensor:
        x = x.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(x, weights[None, None, None]), weights[None, None, :, None])

    a, b = prediction.double(), target.double()
    mean_a, mean_b = average(a), average(b)
    variances = average(a * a) - mean_a**2 + average(b * b) - mean_b**2
    covariance = average(a * b) - mean_a * mean_b
    alike = (2 * mean_a * mean_b + _K1**2) * (2 * covariance + _K2**2)
    alike = alike / ((mean_a**2 + mean_b**2 + _K1**2) * (variances + _K2**2))
    return alike.view(*target.shape[:2], -1).mean(dim=(1, 2))


@dataclass(frozen=True)
class Likeness:
    """How close frames are to others."""

    # decibels, of all values together; infinite when nothing differs
    psnr: float
    # the mean over frames
    ssim: float


def compare_frames(prediction: np.ndarray, target: np.ndarray) -> Likeness:
    """uint8 (T, H, W, 3) x2 -> how close they are; one frame at a time is held in float64."""
    error, similarity = SquaredError(), 0.0
    for pair in zip(prediction, target, strict=True):
        a, b = (torch.tensor(frame).permute(2, 0, 1)[None].double() / 255 for frame in pair)
        error.add(a, b)
        similarity += float(structural_similarity(a, b))
    return Likeness(error.psnr(), similarity / len(target))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """(N, D), (M, D) -> squared 2-Wasserstein distance of the two Gaussians fitted to the rows.

    |mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) in float64 (Dowson and Landau 1982), with
    unbiased covariances and no shrinkage. Finite sets bias it upwards: only equal sizes compare.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"feature sets {tuple(a.shape)} and {tuple(b.shape)} are not (N, D) and (M, D)")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{min(len(a), len(b))} clips have no covariance, at least 2 do")
    a, b = a.double(), b.double()
    root = _symmetric_root(torch.cov(a.mT))
    covariance = torch.cov(b.mT)
    # tr((A^1/2 B A^1/2)^1/2): the matrix inside is symmetric, so its eigenvalues are real
    cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
    traces = root.square().sum() + covariance.trace()
    distance = (a.mean(0) - b.mean(0)).square().sum() + traces - 2 * cross
    return max(float(distance), 0.0)


def _symmetric_root(matrix: Tensor) -> Tensor:
    """(D, D) symmetric positive semi-definite -> (D, D), its symmetric square root."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """(N, D), (M, D) -> squared maximum mean discrepancy, unbiased: around 0 for equal distributions.

    The kernel is (x y / D + 1)^3, as of KID (Binkowski et al. 2018, arXiv:1801.01401).
    """
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.mT / x.shape[1] + 1) ** 3

    within = sum(float((k.sum() - k.trace()) / (len(k) * (len(k) - 1))) for k in (kernel(x, x) for x in (a, b)))
    return within - 2 * float(kernel(a, b).mean())
