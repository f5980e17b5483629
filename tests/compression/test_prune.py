"""What is left of a network: exact sizes, diffusers' own networks, weights where they were."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel, UNetSpatioTemporalConditionModel
from torch import nn

from cmdgen.compression.prune import prune_folder, prune_network
from cmdgen.compression.units import PRUNED, list_rule, list_units, shrink, shrink_model
from cmdgen.config import CMD_SD15, CMD_SD21, MINI, PUBLIC, ModelConfig, UNetConfig
from cmdgen.evaluation.flops import count_pruned
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.dit import DiT
from cmdgen.models.pretrained import Pretrained
from cmdgen.models.unet import UNet
from cmdgen.pipelines.load import load_pipeline
from cmdgen.store.catalogue import check_folder
from cmdgen.store.create import create_model
from cmdgen.store.parts import build_part, read_model
from cmdgen.weights import read_tensors
from tests import video_unets as video
from tests.conftest import tiny_config

WHOLE = {"cmd-sd15": CMD_SD15, "cmd-sd21": CMD_SD21, "animatelcm": PUBLIC["animatelcm"], "svd": PUBLIC["svd"]}
# of the UNet, with its motion modules: parameters whole and pruned, the share of operations that is left
SIZES = {
    "cmd-sd15": (859_520_964, 473_210_244, 0.697),
    "cmd-sd21": (865_910_724, 477_961_604, 0.685),
    "animatelcm": (1_312_730_244, 687_421_124, 0.689),
    "svd": (1_524_623_082, 939_884_186, 0.690),
}
# BK-SDM's Base, Small and Tiny, of Stable Diffusion 1.5 and 2.1
KIM = {
    ("layers.0.1", "layers.1.1", "layers.2.1", "layers.3.1"): (579_384_964, 583_480_964),
    ("mid", "layers.0.1", "layers.1.1", "layers.2.1", "layers.3.1"): (482_346_884, 485_787_524),
    ("mid", "level", "layers.0.1", "layers.1.1", "layers.2.1"): (323_384_964, 326_825_604),
}
WIDE = UNetConfig(
    **video.STILL
    | {"block_out_channels": (16, 32, 32, 48), "norm_num_groups": 4}
    | {"down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")}
    | {"up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)}
)


def count(model: ModelConfig) -> int:
    parts = {"unet": model.content, "motion_adapter": model.adapter}
    networks = [build_part(name, config) for name, config in parts.items() if config is not None]
    return sum(parameter.numel() for network in networks for parameter in network.parameters())


@pytest.mark.parametrize("name", WHOLE)
def test_the_rule_leaves_the_published_size(name: str) -> None:
    whole, pruned, share = SIZES[name]
    small = PRUNED[f"{name}-vdmini"]
    assert (count(WHOLE[name]), count(small)) == (whole, pruned)
    rows = {row["model"]: row for row in count_pruned()}
    assert (rows[name]["parameters"], rows[small.name]["parameters"]) == (whole, pruned)
    assert rows[small.name]["giga_operations"] / rows[name]["giga_operations"] == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize("units", KIM)
def test_other_units_leave_bk_sdm(units: Sequence[str]) -> None:
    for model, expected in zip((CMD_SD15, CMD_SD21), KIM[units], strict=True):
        assert count(replace(model, content=shrink(model.content, units))) == expected


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def test_a_pruned_unet_is_diffusers(tmp_path: Path) -> None:
    # levels of other widths: what comes from below is cut
    unet = video.randomise(UNet(WIDE))
    small = prune_network(unet, [*list_rule(WIDE), "attentions.up.2"])
    assert isinstance(small, UNet) and small.config.layers == (1, 1, 2)
    small.save_pretrained(tmp_path)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path).double()
    sample, text, t = random(2, 4, 16, 24), random(2, 7, 16), torch.tensor([3, 981])
    ours = small.double()(sample, t, text)
    torch.testing.assert_close(ours, theirs(sample, t, text).sample, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_pruned_unet_of_blended_layers_is_diffusers_without_its_mid_block(tmp_path: Path) -> None:
    class Nothing(nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
            return hidden_states

    theirs = video.randomise(UNetSpatioTemporalConditionModel(**video.BLEND, layers_per_block=[1, 2, 1])).double()
    theirs.save_pretrained(tmp_path)
    ours = UNet.from_pretrained(tmp_path, dtype=torch.float64)
    theirs.mid_block = Nothing()
    small = prune_network(ours, ["mid"])
    sample, image, t = random(2, 5, 8, 12, 20), random(2, 1, 16), torch.tensor(0.7).double()
    numbers = torch.tensor([[6.0, 127.0, 0.02]] * 2).double()
    made = small(sample.flatten(0, 1), t, image, numbers).unflatten(0, (2, 5))
    torch.testing.assert_close(made, theirs(sample, t, image, numbers).sample, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("build", "part"), [(UNet, "unet"), (DiT, "motion"), (CmdAutoencoder, "autoencoder")])
def test_what_loses_nothing_is_the_same_network(build: type, part: str) -> None:
    config = {"unet": WIDE, "motion": MINI.motion, "autoencoder": MINI.autoencoder}[part]
    network: Pretrained[object] = build(config)
    small = prune_network(network, [])
    assert small.config == config
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in small.state_dict().items())


@torch.no_grad()
def test_a_block_that_adds_nothing_can_go() -> None:
    dit = DiT(replace(MINI.motion, width=32, depth=3, text_width=16)).double()
    for name, parameter in video.randomise(dit).named_parameters():
        # its two gates
        if name.startswith("blocks.1.modulation"):
            parameter.unflatten(0, (6, -1))[[2, 5]] = 0
    arguments = {"text": random(2, 3, 16), "context": random(2, 8, 12, 12), "split": 4}
    small = prune_network(dit, ["blocks.1"])
    x, t = random(2, 8, 4, 8), torch.tensor([3, 700])
    assert torch.equal(dit(x, t, **arguments), small(x, t, **arguments))


def test_units_that_a_model_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mini has no unet\.layers\.0\.1 to lose: it has unet\.mid, unet\.level"):
        shrink_model(MINI, ["unet.layers.0.1"])
    with pytest.raises(ValueError, match="all 5 of blocks would be lost"):
        shrink_model(MINI, [f"motion.{unit}" for unit in list_units("motion", MINI.motion)])


def test_a_pruned_folder_samples_and_says_where_it_came_from(tiny_model: Path, tmp_path: Path, cmdgen) -> None:
    target = tmp_path / "small"
    done = cmdgen("compress", "prune", tiny_model, "-o", target, "--rule", "vdmini", "--drop", "unet.mid")
    assert (done.code, done.out) == (0, f"{target}\n"), done
    model = read_model(target)
    assert model.dropped == ("unet.mid", "unet.level") and model.name == "small"
    assert model.pruned_from == load_pipeline(tiny_model).weights_hash
    assert load_pipeline(target).sample("a dog swimming").frames.shape == (4, 32, 48, 3)
    assert cmdgen("compress", "prune", tiny_model, "-o", tmp_path / "none").code == 2
    # weights that are not what their configuration says
    shutil.copytree(tiny_model, tmp_path / "broken")
    shutil.copy(tiny_model / "vae" / UNet.filename, tmp_path / "broken" / "unet")
    done = cmdgen("compress", "prune", tmp_path / "broken", "-o", tmp_path / "none", "--rule", "vdmini")
    assert done.code and "is not part of the model" in done.err and not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["still", "animatelcm", "svd"])
def test_folders_of_other_models_are_pruned_and_read(name: str, tmp_path: Path) -> None:
    whole = replace(tiny_config(), autoencoder=None, motion=None, frames=1)
    if name != "still":
        whole = video.tiny(PUBLIC[name])
        assert isinstance(whole.content, UNetConfig)
        whole = replace(whole, loras=(), content=replace(whole.content, norm_num_groups=32))
    create_model(whole, tmp_path / "whole")
    assert isinstance(whole.content, UNetConfig)
    dropped = [f"unet.{unit}" for unit in list_rule(whole.content)]
    prune_folder(tmp_path / "whole", tmp_path / "small", dropped)
    small = read_model(tmp_path / "small")
    assert small.dropped == tuple(dropped) and small.pruned_from is not None
    assert (small.frames, small.moves) == (whole.frames, whole.moves)
    pipeline = load_pipeline(tmp_path / "small")
    pipeline.load()
    # in the precision of the weights
    assert read_tensors(tmp_path / "small/unet" / UNet.filename)[0]["conv_in.weight"].dtype == torch.float16
    if name == "svd":
        return
    assert pipeline.sample("a dog", seed=1).frames.shape[0] == whole.frames
    check_folder(tmp_path / "small", weights=True)
