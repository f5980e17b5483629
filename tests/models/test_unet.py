"""The UNet is diffusers' UNet2DConditionModel: same names, same numbers, either way round."""

from dataclasses import asdict, replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from cmdgen.config import CMD_SD21, MINI, UNetConfig
from cmdgen.models.layers import timestep_embedding
from cmdgen.models.unet import UNet

assert isinstance(CMD_SD21.content, UNetConfig) and isinstance(MINI.content, UNetConfig)
TINY = UNetConfig(
    sample_size=16, block_out_channels=(8, 16, 16, 24), cross_attention_dim=20, norm_num_groups=4, attention_head_dim=2
)
TINY_SD21 = replace(TINY, attention_head_dim=(1, 2, 4, 4), use_linear_projection=True)
# what pruning leaves: BK-SDM's Small and Tiny, VDMini
TINY_SMALL = replace(TINY, layers_per_block=1, mid_block_type=None)
TINY_VDMINI = replace(
    TINY,
    block_out_channels=(8, 16, 24),
    down_block_types=("CrossAttnDownBlock2D",) * 3,
    up_block_types=("CrossAttnUpBlock2D",) * 3,
    layers_per_block=(1, 1, 2),
    mid_block_type=None,
)
TINY_MINI = replace(
    MINI.content,
    in_channels=4,
    out_channels=4,
    block_out_channels=(8, 16, 24),
    cross_attention_dim=20,
    norm_num_groups=4,
)


def peer(config: UNetConfig) -> UNet2DConditionModel:
    others = ("attention", "attention_threshold", "attention_features", "temporal", "num_frames")
    theirs = {name: value for name, value in asdict(config).items() if name not in others}
    return UNet2DConditionModel(**theirs).eval()


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def assert_same(ours: UNet, theirs: UNet2DConditionModel, size: tuple[int, int] = (16, 24)) -> None:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, *size, generator=generator)
    text = torch.randn(2, 7, 20, generator=generator)
    t = torch.tensor([3, 981])
    with torch.no_grad():
        torch.testing.assert_close(ours(sample, t, text), theirs(sample, t, text).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 24), (13, 18)])
@pytest.mark.parametrize("config", [TINY, TINY_SD21, TINY_MINI, TINY_SMALL, TINY_VDMINI])
def test_weights_go_both_ways_and_give_the_same_numbers(config: UNetConfig, size: tuple[int, int]) -> None:
    ours, theirs = UNet(config), peer(config)
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs, size)
    theirs.load_state_dict(UNet(config).state_dict())


@pytest.mark.parametrize(
    ("config", "parameters"), [(UNetConfig(), 859_520_964), (CMD_SD21.content, 865_910_724), (MINI.content, None)]
)
def test_names_shapes_and_count_of_the_presets(config: UNetConfig, parameters: int | None) -> None:
    with torch.device("meta"):
        ours, theirs = UNet(config), peer(config)
    assert shapes(ours) == shapes(theirs)
    assert parameters in (None, sum(parameter.numel() for parameter in ours.parameters()))


@pytest.mark.parametrize("config", [TINY_SD21, TINY_VDMINI])
def test_diffusers_opens_what_we_save_and_we_open_what_it_saves(config: UNetConfig, tmp_path) -> None:
    ours = UNet(config)
    ours.save_pretrained(tmp_path / "ours")
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "ours")
    assert_same(ours, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    again = UNet.from_pretrained(tmp_path / "theirs")
    assert again.config == config
    assert_same(again, theirs)


def test_float64_in_is_float64_throughout_and_a_batch_is_its_items() -> None:
    unet = UNet(TINY_MINI).double()
    sample, text = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 3, 20).double()
    t = torch.tensor([10, 900])
    together = unet(sample, t, text)
    assert together.dtype == torch.float64
    apart = [unet(sample[i : i + 1], t[i : i + 1], text[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(apart))


def test_timestep_embedding_is_cosines_then_sines() -> None:
    t = torch.tensor([0, 7])
    embedding = timestep_embedding(t, 4, dtype=torch.float64)
    angles = t.double()[:, None] * torch.tensor([1, 0.01], dtype=torch.float64)
    torch.testing.assert_close(embedding, torch.cat([angles.cos(), angles.sin()], dim=1))


def test_a_configuration_that_does_not_fit_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="up_block_types has 4 entries, block_out_channels 2"):
        UNet(replace(TINY, block_out_channels=(8, 16), down_block_types=("DownBlock2D",) * 2))
    with pytest.raises(ValueError, match="width 16 is not a multiple of heads 3"):
        UNet(replace(TINY, attention_head_dim=(2, 3, 2, 2)))
    with pytest.raises(ValueError, match="layers_per_block has 2 entries, block_out_channels 4"):
        UNet(replace(TINY, layers_per_block=(1, 2)))
