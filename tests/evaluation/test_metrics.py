"""PSNR and the Frechet distance against closed forms."""

import math

import pytest
import torch

from cmdgen.evaluation.metrics import (
    Likeness,
    SquaredError,
    compare_frames,
    frechet_distance,
    psnr,
    structural_similarity,
)


def gaussian_rows(mean: torch.Tensor, root: torch.Tensor, n: int = 64) -> torch.Tensor:
    """Rows whose sample mean and covariance are exactly `mean` and `root @ root.T`."""
    rows = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(0)).double()
    rows = rows - rows.mean(0)
    rows = torch.linalg.qr(rows).Q * math.sqrt(n - 1)
    return rows @ root.mT + mean


def test_psnr_of_a_constant_offset_is_minus_20_log10_of_it() -> None:
    target = torch.rand(2, 4, 3, 5, 7)
    assert psnr(target + 0.1, target) == pytest.approx(20, abs=1e-4)
    assert psnr(target, target) == math.inf


def test_masked_psnr_ignores_what_is_outside() -> None:
    target = torch.rand(2, 4, 3, 5, 7)
    mask = torch.rand(2, 4, 5, 7) < 0.3
    prediction = torch.where(mask.unsqueeze(2), target + 0.01, target + 0.9)
    assert psnr(prediction, target, mask) == pytest.approx(40, abs=1e-3)
    assert math.isnan(psnr(prediction, target, torch.zeros_like(mask)))


def test_accumulated_psnr_equals_psnr_of_everything_at_once() -> None:
    a, b = torch.rand(2, 6, 3, 4, 4)
    error = SquaredError()
    error.add(a[:1], b[:1])
    error.add(a[1:], b[1:])
    assert error.psnr() == pytest.approx(psnr(a, b))


def test_psnr_names_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\) and \(1, 3, 4, 5\)"):
        psnr(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5))


def test_frechet_distance_of_diagonal_gaussians_has_the_closed_form() -> None:
    means = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.0, 1.0, 0.5]).double()
    sigmas = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 0.5, 3.0]).double()
    a, b = (gaussian_rows(mean, torch.diag(sigma)) for mean, sigma in zip(means, sigmas, strict=True))
    expected = float((means[0] - means[1]).square().sum() + (sigmas[0] - sigmas[1]).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_gaussians_that_do_not_commute() -> None:
    # in two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for the product M of the covariances
    roots = (torch.tensor([[2.0, 0.0], [1.0, 1.0]]).double(), torch.tensor([[1.0, 0.7], [0, 1]]).double())
    a, b = (gaussian_rows(torch.zeros(2).double(), root) for root in roots)
    covariances = [root @ root.mT for root in roots]
    product = covariances[0] @ covariances[1]
    cross = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = float(covariances[0].trace() + covariances[1].trace() - 2 * cross)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_a_set_with_itself_is_zero_even_with_few_rows() -> None:
    rows = torch.randn(20, 128)
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_needs_two_rows_of_equal_width() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(torch.zeros(1, 4), torch.zeros(5, 4))
    with pytest.raises(ValueError, match="not \\(N, D\\)"):
        frechet_distance(torch.zeros(5, 3), torch.zeros(5, 4))


def test_structural_similarity_is_torchmetrics_inside_of_its_reflected_rim() -> None:
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(17.0), indexing="ij")
    target = torch.stack([(1 + torch.sin(x / (2 + k) + y / 3)) / 2 for k in range(3)]).double()
    prediction = (target * 0.8 + 0.1 + 0.05 * torch.cos(x * y / 5)).clamp(0, 1)
    found = structural_similarity(torch.stack((prediction, target)), torch.stack((target, target)))
    # torchmetrics 1.9.0, full image without 5 pixels at each side, mean
    assert found.tolist() == pytest.approx([0.934842055, 1], abs=1e-8)


def test_structural_similarity_of_flat_pictures_is_that_of_their_levels() -> None:
    a, b = torch.full((2, 1, 12, 15), 0.2), torch.full((2, 1, 12, 15), 0.6)
    alike = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert structural_similarity(a, b).tolist() == pytest.approx([alike] * 2, abs=1e-6)
    with pytest.raises(ValueError, match="no window of 11"):
        structural_similarity(a[..., :10], b[..., :10])


def test_frames_are_compared_as_their_values_are() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(256, (3, 16, 20, 3), generator=generator).byte() for _ in range(2))
    likeness = compare_frames(a.numpy(), b.numpy())
    values = [each.permute(0, 3, 1, 2).double() / 255 for each in (a, b)]
    assert likeness.psnr == pytest.approx(psnr(*values))
    assert likeness.ssim == pytest.approx(float(structural_similarity(*values).mean()))
    assert compare_frames(a.numpy(), a.numpy()) == Likeness(math.inf, 1.0)
    with pytest.raises(ValueError, match="shorter"):
        compare_frames(a.numpy(), b.numpy()[:2])
