"""AnimateDiff and Stable Video Diffusion are diffusers': same names, same numbers, either way round."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from diffusers import MotionAdapter as Peer
from torch import Tensor, nn

from cmdgen.config import MotionConfig, UNetConfig, VaeConfig
from cmdgen.models.temporal import MotionAdapter, TemporalResnet, clip_view
from cmdgen.models.unet import UNet
from cmdgen.models.vae import KlVae
from cmdgen.schema import read_config, write_config
from cmdgen.weights import build_empty
from tests import video_unets as video

CLIPS, FRAMES = 2, 5
SVD = UNetConfig(
    **{"in_channels": 8, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)},
    **{"use_linear_projection": True, "temporal": "blend", "num_frames": 14},
    **{"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 768, "sample_size": 96},
)
TEMPORAL_VAE = VaeConfig(temporal="blend", sample_size=768)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * float(theirs.abs().max()))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def build_motion(*, mid: bool = True) -> UNet:
    unet = UNet(UNetConfig(**video.STILL))
    unet.attach(MotionAdapter(MotionConfig(**video.MOTION, use_motion_mid_block=mid)))
    return unet


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("mid", [True, False])
@torch.no_grad()
def test_a_unet_with_motion_modules_is_diffusers(mid: bool) -> None:
    theirs, ours = video.motion(mid=mid).double(), build_motion(mid=mid).double()
    ours.load_state_dict(theirs.state_dict())
    clip, text, t = random(CLIPS, 4, FRAMES, 12, 20), random(CLIPS, 7, 16), torch.tensor(301)
    expected = theirs(clip, t, text.repeat_interleave(FRAMES, dim=0)).sample
    frames = ours(clip.transpose(1, 2).flatten(0, 1), t, text)
    assert_close(frames.unflatten(0, (CLIPS, FRAMES)).transpose(1, 2), expected)


@torch.no_grad()
def test_of_one_frame_it_is_the_unet_without_them_to_the_bit() -> None:
    base, ours = UNet(UNetConfig(**video.STILL)), build_motion()
    theirs = video.motion().state_dict()
    ours.load_state_dict(theirs)
    base.load_state_dict({name: value for name, value in theirs.items() if ".motion_modules." not in name})
    sample, text, t = torch.randn(2, 4, 12, 20), torch.randn(2, 7, 16), torch.tensor([7, 301])
    assert torch.equal(ours(sample, t, text), base(sample, t, text))


def test_positions_are_in_float32_what_files_hold() -> None:
    name = "down_blocks.0.motion_modules.0.transformer_blocks.0.pos_embed.pe"
    ours = MotionAdapter(MotionConfig(**video.MOTION)).state_dict()
    assert torch.equal(ours[name], Peer(**video.MOTION).state_dict()[name])


@pytest.mark.parametrize("mid", [True, False])
def test_folders_of_motion_modules_go_both_ways(mid: bool, tmp_path: Path) -> None:
    theirs = video.adapter(mid=mid)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = MotionAdapter.from_pretrained(tmp_path / "theirs")
    assert ours.config == MotionConfig(**video.MOTION, use_motion_mid_block=mid)
    ours.save_pretrained(tmp_path / "ours")
    again = Peer.from_pretrained(tmp_path / "ours").state_dict()
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in theirs.state_dict().items())


def test_a_unet_that_was_saved_with_them_is_read_in_two_parts(tmp_path: Path) -> None:
    theirs = video.motion()
    theirs.save_pretrained(tmp_path)
    ours = UNet.from_pretrained(tmp_path)
    assert ours.config == UNetConfig(**video.STILL)
    ours.attach(build_parts(tmp_path))
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def build_parts(folder: Path) -> MotionAdapter:
    from cmdgen.weights import load_weights

    adapter = build_empty(MotionAdapter, MotionConfig(**video.MOTION))
    load_weights(adapter, folder, MotionAdapter.filename, rename=MotionAdapter.rename_stored)
    return adapter


@torch.no_grad()
def test_the_blended_unet_is_diffusers(tmp_path: Path) -> None:
    theirs = video.blend()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, theirs = UNet.from_pretrained(tmp_path / "theirs").double(), theirs.double()
    sample, image, t = random(CLIPS, FRAMES, 8, 12, 20), random(CLIPS, 1, 16), torch.tensor(0.7).double()
    numbers = torch.tensor([[6.0, 127.0, 0.02]] * CLIPS).double()
    expected = theirs(sample, t, image, numbers).sample
    assert_close(ours(sample.flatten(0, 1), t, image, numbers).unflatten(0, (CLIPS, FRAMES)), expected)

    ours.save_pretrained(tmp_path / "ours")
    again = UNetSpatioTemporalConditionModel.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(again[name], value) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_the_temporal_vae_is_diffusers(layers: int, tmp_path: Path) -> None:
    theirs = video.vae(layers)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, theirs = KlVae.from_pretrained(tmp_path / "theirs").double(), theirs.double()
    expected = theirs.decode(random(FRAMES, 4, 6, 10), num_frames=FRAMES).sample
    assert_close(ours.decode(random(FRAMES, 4, 6, 10)), expected)
    assert_close(ours.encode(expected)[0], theirs.encode(expected).latent_dist.mean)

    ours.save_pretrained(tmp_path / "ours")
    again = AutoencoderKLTemporalDecoder.from_pretrained(tmp_path / "ours")
    assert again.config.layers_per_block == layers
    assert_close(again.double().decode(random(FRAMES, 4, 6, 10), num_frames=FRAMES).sample, expected)


def test_time_is_a_side_of_the_same_memory() -> None:
    x = torch.randn(CLIPS * FRAMES, 8, 3, 4).contiguous(memory_format=torch.channels_last)
    clip = clip_view(x, CLIPS)
    assert clip.data_ptr() == x.data_ptr() and clip.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(clip[1, :, 2].unflatten(1, (3, 4)), x[FRAMES + 2])
    # what the convolution reads of a file's filter is channels_last, too
    filters = TemporalResnet(8, 2, 1e-5).conv1.weight.contiguous(memory_format=torch.channels_last_3d)
    assert filters[..., 0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("length", "mid", "own", "buffers", "entries", "whole", "all_entries"),
    [
        # v1-5, v1-5-3; v1-5-2, Lightning, AnimateLCM
        (24, False, 417_137_600, 422_400, 540, 1_276_658_564, 1226),
        (32, False, 417_137_600, 563_200, 540, 1_276_658_564, 1226),
        (32, True, 453_209_280, 604_160, 567, 1_312_730_244, 1253),
    ],
)
def test_published_motion_modules_have_their_published_sizes(
    length: int, mid: bool, own: int, buffers: int, entries: int, whole: int, all_entries: int
) -> None:
    adapter = build_empty(MotionAdapter, MotionConfig(use_motion_mid_block=mid, motion_max_seq_length=length))
    assert (count(adapter), sum(pe.numel() for pe in adapter.buffers())) == (own, buffers)
    assert len(adapter.state_dict()) == entries
    unet = build_empty(UNet, UNetConfig())
    assert count(unet) == 859_520_964
    unet.attach(adapter)
    assert (count(unet), len(unet.state_dict()), len(unet._readers())) == (whole, all_entries, 16)
    if mid:
        # Lightning's file in half precision, by its listing
        assert file_size(adapter, 2) / 1e6 == pytest.approx(907.7, abs=0.1)


def test_stable_video_diffusion_has_its_published_size() -> None:
    svd = build_empty(UNet, SVD)
    state = svd.state_dict()
    assert (count(svd), len(state)) == (1_524_623_082, 1428)
    assert sum("mix_factor" in name for name in state) == 38 and len(svd._readers()) == 32
    temporal = ("temporal", "time_mixer", "time_pos_embed")
    assert sum(value.numel() for name, value in state.items() if any(word in name for word in temporal)) == 656_076_838
    # of attention to one token, what asks does not matter
    unused = [
        value.numel()
        for name, value in state.items()
        if ".attn2.to_q." in name or ".attn2.to_k." in name or ("transformer_blocks.0.norm2." in name)
    ]
    assert sum(unused) == 50_389_760
    assert file_size(svd, 4) == 6_098_682_464
    vae = build_empty(KlVae, TEMPORAL_VAE)
    assert (count(vae), count(vae.encoder), count(vae.decoder)) == (97_742_847, 34_163_592, 63_579_183)
    assert len(vae.state_dict()) == 374
    assert sum("mix_factor" in name for name in vae.state_dict()) == 14
    assert count(build_empty(KlVae, VaeConfig()).decoder) == 49_490_179


def file_size(module: nn.Module, size: int) -> int:
    """Bytes of a module's safetensors file, whose header lists names, shapes and offsets."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in sorted(module.state_dict().items()):
        ends = [offset, offset := offset + tensor.numel() * size]
        header[name] = {"dtype": f"F{8 * size}", "shape": list(tensor.shape), "data_offsets": ends}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + (length + 7) // 8 * 8 + offset


@pytest.mark.parametrize(
    ("config", "peer"),
    [(SVD, UNetSpatioTemporalConditionModel), (TEMPORAL_VAE, AutoencoderKLTemporalDecoder), (MotionConfig(), Peer)],
)
def test_what_we_write_describes_the_published_models_to_diffusers(config: object, peer: type, tmp_path: Path) -> None:
    write_config(config, tmp_path)
    described, unused = peer.load_config(tmp_path, return_unused_kwargs=True)
    assert unused == {}
    with torch.device("meta"):
        theirs = peer.from_config(described)
    ours = build_empty({UNetConfig: UNet, VaeConfig: KlVae, MotionConfig: MotionAdapter}[type(config)], config)
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    assert read_config(tmp_path, type(config)) == config
    # nothing that diffusers would warn of
    theirs.save_config(tmp_path / "theirs")
    assert set(described) - {"_class_name"} <= set(theirs.config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": (32, 64, 96)}, r"block_out_channels \(32, 64, 96\) of the motion modules are not the"),
        ({"motion_layers_per_block": 3}, r"layers \(3, 3, 3\) of the motion modules are not the UNet's, \(2, 2, 2\)"),
    ],
)
def test_motion_modules_of_another_unet_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(UNetConfig(**video.STILL)).attach(MotionAdapter(MotionConfig(**{**video.MOTION, **changes})))


def test_adapters_with_channels_of_their_own_are_refused(tmp_path: Path) -> None:
    Peer(**video.MOTION, conv_in_channels=9).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="conv_in_channels 9 is not supported, only None is"):
        MotionAdapter.from_pretrained(tmp_path)
