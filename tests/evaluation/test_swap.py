"""The word-swap test on predictions that are known."""

import pytest
import torch
from torch import Tensor

from cmdgen.config import NoiseConfig
from cmdgen.diffusion.schedule import alphas_cumprod
from cmdgen.evaluation.swap import MIRRORED, Swap, find_mirrored
from cmdgen.world.config import WorldConfig
from cmdgen.world.world import World

WORLD = World(WorldConfig(motions=("jumping", *MIRRORED), scenes=("grass", "sky"), sprites="shapes"))


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_shift_is_the_share_of_the_way_between_the_classes(share: float, kind: str) -> None:
    rows = find_mirrored(WORLD, torch.arange(200))
    assert rows is not None
    noise, (count, shape) = NoiseConfig(prediction_type=kind), (rows.shape[1], (2, 3, 4))
    means = torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(1))
    motion = means.expand(2, count, *shape)
    alpha = alphas_cumprod(noise)[-1].float()

    def predict(x: Tensor, timestep: Tensor, content: Tensor, captions: list[str]) -> Tensor:
        assert timestep.unique().tolist() == [len(alphas_cumprod(noise)) - 1]
        told = torch.tensor([float(any(word in text for word in ("shrink", "smaller"))) for text in captions])
        x0 = means[0] + share * told.view(-1, 1, 1, 1) * (means[1] - means[0])
        if kind == "epsilon":
            return (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()
        return (alpha.sqrt() * x - x0) / (1 - alpha).sqrt()

    swap = Swap(WORLD, rows, torch.zeros(2, count, 1, 1, 1), motion)
    assert swap.shift(predict, noise) == pytest.approx(share, abs=1e-3)


def test_a_world_without_such_motions_has_no_clips() -> None:
    world = World(WorldConfig(motions=("jumping", "growing"), sprites="shapes"))
    assert find_mirrored(world, torch.arange(50)) is None
