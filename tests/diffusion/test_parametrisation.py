"""What a denoiser predicts is told by what it makes of noise."""

import pytest
import torch
from torch import Tensor

from cmdgen.config import NoiseConfig
from cmdgen.diffusion.parametrisation import recognise_prediction
from cmdgen.diffusion.schedule import alphas_cumprod, velocity

CONFIG = NoiseConfig()
NOISE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def sees(share: float, picture: float, kind: str) -> object:
    """A denoiser that sees so much of the noise, and takes the rest for a picture."""
    powers = alphas_cumprod(CONFIG).float()
    imagined = picture * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha = powers[t]
        assert x.shape == (2, 4, 8, 8)
        eps = share * x / (1 - alpha).sqrt().view(-1, 1, 1, 1)
        return eps if kind == "epsilon" else velocity(imagined, eps, alpha)

    return denoise


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("share", [1.0, 0.9])
@pytest.mark.parametrize("picture", [0.0, 1.0])
def test_what_sees_the_noise_is_recognised(kind: str, share: float, picture: float) -> None:
    assert recognise_prediction(sees(share, picture, kind), NOISE, CONFIG) == kind


def test_what_has_learned_nothing_is_neither() -> None:
    generator = torch.Generator().manual_seed(2)
    for denoise in (
        lambda x, t: torch.zeros_like(x),
        lambda x, t: torch.randn(x.shape, generator=generator),
        lambda x, t: -x,
    ):
        assert recognise_prediction(denoise, NOISE, CONFIG) is None
