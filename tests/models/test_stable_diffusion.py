"""At Stable Diffusion's own configurations: the numbers of diffusers and transformers, by disk.

Weights are random, kept in half precision as they are on disk, computed with in float64: what is
left of a difference is rounding, and what the folders lose.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from cmdgen.config import CMD_SD15, CMD_SD21, TextConfig, UNetConfig
from cmdgen.models.text import ClipTextModel
from cmdgen.models.unet import UNet
from cmdgen.models.vae import KlVae
from cmdgen.schema import read_config, write_config
from cmdgen.weights import build_empty

# of the largest value; 1e-14 is what is seen
TOLERANCE = 1e-10
# all levels and layers at an eighth of the width
NARROW_UNET = {"block_out_channels": (40, 80, 160, 160), "norm_num_groups": 8}
NARROW_TEXT = {"hidden_size": 96, "intermediate_size": 384}

# as the folders of Stable Diffusion 1.5 and 2.1-base have it, where diffusers has another default
UNETS = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
    "sd21": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "sample_size": 64,
        "use_linear_projection": True,
    },
}
UNET_PRESETS = {"sd15": CMD_SD15.content, "sd21": CMD_SD21.content}
TEXTS = {
    "sd15": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
    },
    "sd21": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 512,
    },
}
TEXT_PRESETS = {"sd15": CMD_SD15.text, "sd21": CMD_SD21.text}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Emptied at the end: pytest would keep gigabytes for three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def random_module(build: Callable[[], nn.Module]) -> nn.Module:
    """A module of half-precision weights that keep what passes through at unit size."""
    with torch.device("meta"):
        module = build()
    # not their own `to`, which warns
    nn.Module.to(module, torch.float16)
    module.to_empty(device="cpu").eval()
    # the only ones count positions
    for buffer in module.buffers():
        buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            bound = 0.1 if parameter.dim() == 1 else (3 / parameter[0].numel()) ** 0.5
            parameter.uniform_(-bound, bound, generator=generator)
        for norm in module.modules():
            if isinstance(norm, nn.GroupNorm | nn.LayerNorm):
                norm.weight += 1
    return module


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype == torch.float64 and ours.shape == theirs.shape
        # a network that has died or exploded would hide its errors
        assert 0.01 < theirs.std() < 100
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < TOLERANCE, f"relative error {error:.1e}"


def run_unet(unet: nn.Module, width: int, size: tuple[int, int], times: list[int]) -> list[Tensor]:
    sample, text = draw(len(times), 4, *size, seed=1), draw(len(times), 77, width, seed=2)
    with torch.no_grad():
        output = unet(sample, torch.tensor(times), text)
    return [output if isinstance(output, Tensor) else output.sample]


@pytest.mark.parametrize("name", UNETS)
def test_the_unet_that_we_describe_is_stable_diffusions(name: str, folder: Path) -> None:
    write_config(UNET_PRESETS[name], folder)
    configs = []
    for config in (UNet2DConditionModel.load_config(folder), UNETS[name]):
        with torch.device("meta"):
            public = dict(UNet2DConditionModel.from_config(config).config)
        # JSON has no tuples
        configs.append(
            {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in public.items()
                if not key.startswith("_")
            }
        )
    ours, theirs = configs
    assert ours == theirs


@pytest.mark.parametrize("name", UNETS)
def test_unet_of_full_width_goes_both_ways(name: str, folder: Path) -> None:
    """Its first two levels, with one layer each: the others are wider, and no different."""
    stock = dict(UNETS[name])
    if name == "sd21":
        stock["attention_head_dim"] = [5, 10]
    stock |= {
        "block_out_channels": [320, 640],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
    }
    width, size, times = stock["cross_attention_dim"], (7, 10), [3, 981]
    assert isinstance(width, int)

    theirs = random_module(lambda: UNet2DConditionModel(**stock))
    theirs.save_pretrained(folder / "theirs")
    expected = run_unet(nn.Module.double(theirs), width, size, times)

    ours = UNet.from_pretrained(folder / "theirs", dtype=torch.float64)
    assert_equal(run_unet(ours, width, size, times), expected)
    ours.save_pretrained(folder / "ours", dtype=torch.float16)
    theirs = UNet2DConditionModel.from_pretrained(folder / "ours", torch_dtype=torch.float64)
    assert_equal(run_unet(theirs, width, size, times), expected)


@pytest.mark.parametrize("name", UNETS)
def test_whole_unet_goes_both_ways(name: str, folder: Path) -> None:
    """All of its tensors by name and shape; what they compute at a smaller width."""
    stock, preset = UNETS[name], UNET_PRESETS[name]
    assert isinstance(preset, UNetConfig)
    with torch.device("meta"):
        whole = UNet2DConditionModel(**stock)
    whole.save_config(folder / "whole")
    assert read_config(folder / "whole", UNetConfig) == preset
    assert shapes(build_empty(UNet, preset)) == shapes(whole)

    width, size, times = preset.cross_attention_dim, (8, 16), [981]
    theirs = random_module(lambda: UNet2DConditionModel(**stock | NARROW_UNET))
    theirs.save_pretrained(folder / "theirs")
    expected = run_unet(nn.Module.double(theirs), width, size, times)
    ours = UNet.from_pretrained(folder / "theirs", dtype=torch.float64)
    assert ours.config == replace(preset, **NARROW_UNET)
    assert_equal(run_unet(ours, width, size, times), expected)
    ours.save_pretrained(folder / "ours", dtype=torch.float16)
    # the same model again, without running it again
    assert_same_file(folder / "ours" / UNet.filename, folder / "theirs" / UNet.filename)


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def assert_same_file(actual: Path, expected: Path) -> None:
    with safe_open(actual, "pt") as ours, safe_open(expected, "pt") as theirs:
        assert set(ours.keys()) == set(theirs.keys())
        for name in theirs.keys():  # noqa: SIM118
            assert torch.equal(ours.get_tensor(name), theirs.get_tensor(name)), name


def run_vae(vae: KlVae | AutoencoderKL) -> list[Tensor]:
    frames, latents = draw(1, 3, 16, 24, seed=1), draw(1, 4, 3, 2, seed=2)
    with torch.no_grad():
        if isinstance(vae, KlVae):
            return [*vae.encode(frames), vae.decode(latents)]
        posterior = vae.encode(frames).latent_dist
        return [posterior.mean, posterior.logvar, vae.decode(latents).sample]


def test_whole_vae_goes_both_ways(folder: Path) -> None:
    theirs = random_module(
        lambda: AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        )
    )
    assert isinstance(theirs, AutoencoderKL)
    theirs.save_pretrained(folder / "theirs")
    nn.Module.double(theirs)
    expected = run_vae(theirs)

    ours = KlVae.from_pretrained(folder / "theirs", dtype=torch.float64)
    assert ours.config == CMD_SD15.vae
    assert_equal(run_vae(ours), expected)
    ours.save_pretrained(folder / "ours", dtype=torch.float16)
    theirs = AutoencoderKL.from_pretrained(folder / "ours", torch_dtype=torch.float64)
    assert theirs.config.scaling_factor == 0.18215
    assert_equal(run_vae(theirs), expected)


def text_ids(length: int) -> Tensor:
    """() -> (3, length): texts of no, few and too many tokens, padded in both models' ways."""
    ids = torch.randint(0, 49406, (3, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[2, -1] = 49406, 49407
    ids[0, 1:] = 49407
    ids[1, 9], ids[1, 10:] = 49407, 0
    return ids


def run_text(text: ClipTextModel | CLIPTextModel) -> list[Tensor]:
    with torch.no_grad():
        outputs = [text(text_ids(length)) for length in (77, 20)]
    pooled = "pooled" if isinstance(text, ClipTextModel) else "pooler_output"
    return [part for out in outputs for part in (out.last_hidden_state, getattr(out, pooled))]


def assert_text_goes_both_ways(stock: dict[str, object], preset: TextConfig, folder: Path) -> None:
    config = CLIPTextConfig(**stock)
    theirs = random_module(lambda: CLIPTextModel(config))
    assert isinstance(theirs, CLIPTextModel)
    theirs.save_pretrained(folder / "theirs")
    nn.Module.double(theirs)
    expected = run_text(theirs)
    del theirs

    ours = ClipTextModel.from_pretrained(folder / "theirs", dtype=torch.float64)
    assert ours.config == preset
    assert_equal(run_text(ours), expected)
    ours.save_pretrained(folder / "ours", dtype=torch.float16)
    del ours
    again = CLIPTextModel.from_pretrained(folder / "ours", dtype=torch.float64)
    assert_equal(run_text(again), expected)


# the end of a text is 49407; Stable Diffusion's files say 2, which stands for the highest id
@pytest.mark.parametrize(("name", "end"), [("sd15", 2), ("sd21", 49407)])
def test_text_encoder_of_full_width_goes_both_ways(name: str, end: int, folder: Path) -> None:
    stock, preset = TEXTS[name], TEXT_PRESETS[name]
    assert preset is not None
    short = {"num_hidden_layers": 2, "eos_token_id": end}
    assert_text_goes_both_ways({**stock, **short}, replace(preset, **short), folder)


@pytest.mark.parametrize("name", TEXTS)
def test_whole_text_encoder_goes_both_ways(name: str, folder: Path) -> None:
    """All of its tensors by name and shape; what they compute at a smaller width."""
    stock, preset = {**TEXTS[name], "eos_token_id": 2}, TEXT_PRESETS[name]
    assert preset is not None
    preset = replace(preset, eos_token_id=2)
    config = CLIPTextConfig(**stock)
    config.save_pretrained(folder / "whole")
    assert read_config(folder / "whole", TextConfig) == preset
    with torch.device("meta"):
        whole = CLIPTextModel(config)
    # transformers 5 writes the names without their first word
    names = {ClipTextModel.rename_stored(key): shape for key, shape in shapes(whole).items()}
    assert shapes(build_empty(ClipTextModel, preset)) == names
    assert_text_goes_both_ways({**stock, **NARROW_TEXT}, replace(preset, **NARROW_TEXT), folder)
