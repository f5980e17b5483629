"""The gate in the models: shut, it changes nothing; open, its features travel with the weights."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from cmdgen.config import AutoencoderConfig, UNetConfig
from cmdgen.models.attention import GatedAttention
from cmdgen.models.autoencoder import CmdAutoencoder
from cmdgen.models.layers import Attention, fuse_weights
from cmdgen.models.temporal import TimeAttention
from cmdgen.models.unet import UNet
from cmdgen_kernels.gated_attention import linear_attention_reference

WIDTHS = (8, 16)
UNET = UNetConfig(
    sample_size=8,
    block_out_channels=WIDTHS,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=12,
    norm_num_groups=4,
    attention_head_dim=2,
)
AUTOENCODER = AutoencoderConfig(channels=3, width=24, heads=2, depth=1, motion_channels=5)
GATE = {"attention": "gated", "attention_features": 32}


def run_unet(unet):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, 12, generator=generator)
    with torch.no_grad():
        return unet(sample, torch.tensor([3, 500]), text)


def run_autoencoder(autoencoder):
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(1, 3, 4, 8, 12, generator=generator)
    with torch.no_grad():
        return autoencoder.decode(*autoencoder.encode(frames))


MODELS = [(UNet, UNET, run_unet), (CmdAutoencoder, AUTOENCODER, run_autoencoder)]


@pytest.mark.parametrize(("build", "config", "run"), MODELS)
def test_a_shut_gate_is_softmax_and_an_open_one_is_not(build, config, run):
    torch.manual_seed(0)
    plain = build(config)
    for threshold, same in ((1e6, True), (0.1, False)):
        gated = build(replace(config, **GATE, attention_threshold=threshold))
        missing, unexpected = gated.load_state_dict(plain.state_dict(), strict=False)
        assert not unexpected
        assert missing and all(name.endswith("attend.projection") for name in missing)
        assert torch.equal(run(gated), run(plain)) is same


@pytest.mark.parametrize(("build", "config", "run"), MODELS)
def test_a_gated_model_comes_back_from_its_folder(build, config, run, tmp_path):
    torch.manual_seed(0)
    gated = build(replace(config, **GATE, attention_threshold=0.5)).eval()
    gated.save_pretrained(tmp_path)
    again = build.from_pretrained(tmp_path)
    assert again.config == gated.config
    assert torch.equal(run(again), run(gated))


def test_diffusers_is_told_of_the_gate_only_where_there_is_one(tmp_path):
    UNet(UNET).save_pretrained(tmp_path / "plain")
    assert not set(GATE) & set(json.loads((tmp_path / "plain/config.json").read_text()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UNet2DConditionModel.from_pretrained(tmp_path / "plain")


def test_gated_attention_module_uses_its_own_features():
    torch.manual_seed(0)
    module = GatedAttention(16, 4, threshold=2.0)
    q, k, v = torch.randn(3, 2, 1, 9, 4)
    expected = linear_attention_reference(q, k, v, module.projection)
    assert torch.equal(module(q, k, v), expected)
    assert [name for name, _ in module.named_buffers()] == ["projection"]


def test_attention_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(ValueError, match="attention 'fast' is not supported, expected one of softmax, gated"):
        UNet(replace(UNET, attention="fast"))
    UNet(replace(UNET, **GATE)).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"gated"', '"fast"'))
    with pytest.raises(ValueError, match="attention 'fast' is not supported"):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("clips", [2, 1])
def test_one_product_makes_queries_keys_and_values(clips: int) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        among, reader = (Attention(24, width, 3, bias=False) for width in (24, 16))
        x, text = torch.randn(2, 7, 24), torch.randn(clips, 5, 16)
        expected, state = among(x), among.state_dict().keys()
        read = reader(x, reader.project(text))
        time = TimeAttention(24, 3)
        over_time = time(x[:, None])
        for layer in (among, reader, time):
            fuse_weights(layer)
        assert time.fused is not None
        torch.testing.assert_close(time(x[:, None]), over_time)
        assert among.fused is not None and among.state_dict().keys() == state
        torch.testing.assert_close(among(x), expected)
        assert reader.fused is None and torch.equal(reader(x, reader.project(text)), read)
