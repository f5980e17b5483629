"""Low-rank changes of weights, under the names that three tools give them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cmdgen.config import ANIMATEDIFF, MotionConfig, TextConfig, UNetConfig
from cmdgen.models.temporal import MotionAdapter
from cmdgen.models.text import ClipTextModel
from cmdgen.models.unet import UNet
from cmdgen.pipelines.load import load_pipeline
from cmdgen.store.create import create_model
from cmdgen.store.lora import Lora, find_lora, merge_lora, parse_lora
from cmdgen.video.read import read_metadata
from tests import video_unets as video

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "up_blocks.1.motion_modules.2.transformer_blocks.0.attn2.to_out.0"
CONV = "down_blocks.0.resnets.1.conv1"
PROJECTION = "mid_block.attentions.0.proj_in"
RANK = 3


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**video.STILL))
    unet.attach(MotionAdapter(MotionConfig(**video.MOTION)))
    return unet


def pair(module: torch.nn.Module, target: str) -> tuple[torch.Tensor, torch.Tensor]:
    weight = module.get_parameter(f"{target}.weight")
    generator = torch.Generator().manual_seed(len(target))
    down = torch.randn(RANK, *weight.shape[1:], generator=generator)
    return down, torch.randn(len(weight), RANK, *(1,) * (weight.ndim - 2), generator=generator)


def processor(target: str, side: str) -> str:
    module, _, name = target.removesuffix(".0").rpartition(".")
    return f"unet.{module}.processor.{name}_lora.{side}.weight"


def peft(target: str, side: str) -> str:
    return f"unet.{target}.lora_{'A' if side == 'down' else 'B'}.weight"


def kohya(target: str, side: str) -> str:
    return f"lora_unet_{target.replace('.', '_')}.lora_{side}.weight"


@pytest.mark.parametrize(
    ("named", "targets", "alpha"),
    [
        (processor, (QUERY, OUT), None),
        (peft, (QUERY, OUT, CONV, PROJECTION), None),
        (peft, (QUERY,), 6.0),
        (kohya, (QUERY, OUT, CONV, PROJECTION), 1.5),
    ],
)
def test_weights_change_by_the_product(
    unet: UNet, tmp_path: Path, named: Callable[[str, str], str], targets: tuple[str, ...], alpha: float | None
) -> None:
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    state, expected = {}, {}
    for target in targets:
        down, up = pair(unet, target)
        state |= {named(target, "down"): down, named(target, "up"): up.contiguous()}
        change = (up.flatten(1) @ down.flatten(1)).view(before[f"{target}.weight"].shape)
        expected[f"{target}.weight"] = 0.7 * (1 if alpha is None else alpha / RANK) * change
        if alpha is not None:
            state[f"{named(target, 'down').partition('.lora_')[0]}.alpha"] = torch.tensor(alpha)
    save_file(state, tmp_path / "x.safetensors")
    assert merge_lora(unet, "unet", Lora(tmp_path / "x.safetensors", 0.7)) == len(targets)
    for name, value in unet.state_dict().items():
        torch.testing.assert_close(value, before[name] + expected.get(name, 0))
    assert merge_lora(ClipTextModel(TextConfig(hidden_size=12)), "text_encoder", Lora(tmp_path / "x.safetensors")) == 0


def test_a_text_encoder_changes_too(tmp_path: Path) -> None:
    text = ClipTextModel(TextConfig(hidden_size=24, num_hidden_layers=1))
    target = "text_model.encoder.layers.0.mlp.fc1"
    names = (
        f"lora_te_{target.replace('.', '_')}.lora_{{}}.weight",
        f"text_encoder.{target}.lora_linear_layer.{{}}.weight",
    )
    for i, name in enumerate(names):
        down, up = pair(text, target)
        before = text.get_parameter(f"{target}.weight").clone()
        save_file({name.format("down"): down, name.format("up"): up}, tmp_path / f"{i}.safetensors")
        assert merge_lora(text, "text_encoder", Lora(tmp_path / f"{i}.safetensors")) == 1
        torch.testing.assert_close(text.get_parameter(f"{target}.weight"), before + up @ down)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({kohya(QUERY, "down"): (3, 32), "lora_unet_x.dora_scale": (3,)}, "is a DoRA: of its kind, LoRA alone is read"),
        ({"lora_unet_x.hada_w1_a": (3, 3)}, "is a LoHa"),
        ({"something.weight": (3, 3)}, "'something.weight' is no tensor of a LoRA"),
        ({kohya("input_blocks.1", "down"): (3, 3)}, "'input_blocks_1' is no weight of unet/: it is of another model"),
        ({kohya(QUERY, "down"): (3, 32)}, "lacks one of two matrices"),
        ({kohya(QUERY, "down"): (3, 32), kohya(QUERY, "up"): (32, 4)}, "lacks one of two matrices that fit"),
        ({kohya(QUERY, "down"): (3,), kohya(QUERY, "up"): (32, 3)}, "lacks one of two matrices that fit"),
        ({kohya(QUERY, "down"): (), kohya(QUERY, "up"): (32, 3)}, "lacks one of two matrices that fit"),
        ({kohya(QUERY, "down"): (0, 32), kohya(QUERY, "up"): (32, 0)}, "lacks one of two matrices that fit"),
        ({kohya(CONV, "down"): (3, 32, 3, 3), kohya(CONV, "up"): (32, 3, 2, 2)}, "lacks one of two matrices that fit"),
        (
            {kohya(QUERY, "down"): (3, 32), kohya(QUERY, "up"): (32, 3), f"{kohya(QUERY, '')[:-13]}.alpha": (2,)},
            "lacks one of two matrices that fit",
        ),
        # of a file of a megabyte, a matrix of ten billion
        (
            {kohya(QUERY, "down"): (1, 100_000), kohya(QUERY, "up"): (100_000, 1)},
            r"is changed by \[100000, 100000\], the model has \[32, 32\]",
        ),
        (
            {kohya(QUERY, "down"): (3, 64), kohya(QUERY, "up"): (32, 3)},
            r"is changed by \[32, 64\], the model has \[32, 32\]",
        ),
    ],
)
def test_what_is_no_lora_of_this_model_is_one_line(unet: UNet, tmp_path: Path, state: dict, message: str) -> None:
    save_file({name: torch.zeros(shape) for name, shape in state.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        merge_lora(unet, "unet", Lora(tmp_path / "x.safetensors"))
    assert "\n" not in str(error.value)


def test_a_scale_may_follow_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_lora("a.safetensors") == ("a.safetensors", 1.0)
    assert parse_lora("a/b:0.8") == ("a/b", 0.8) and parse_lora("a/b:-1") == ("a/b", -1.0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="no LoRA 'acme/zoom': expected a safetensors file"):
        find_lora("acme/zoom:0.5")


def test_a_clip_with_loras_is_recorded_and_made_again(cmdgen, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    create_model(video.tiny(ANIMATEDIFF), folder, dtype=torch.float32)
    unet = load_pipeline(folder).unet
    for i, target in enumerate((QUERY, OUT.replace("mid", "up"))):
        down, up = pair(unet, target)
        save_file({kohya(target, "down"): down, kohya(target, "up"): up}, tmp_path / f"{i}.safetensors")
    loras = ("--lora", tmp_path / "0.safetensors", "--lora", f"{tmp_path / '1.safetensors'}:0.51234567")
    clip = ("a dog", "--model", folder, "--seed", 1, "--frames", 2, "--steps", 1)
    for name, arguments in (("plain", (*clip,)), ("changed", (*clip, *loras))):
        done = cmdgen("sample", *arguments, "-o", tmp_path / f"{name}.mp4")
        assert done.code == 0, done.err
    plain, changed = (read_metadata(tmp_path / f"{name}.mp4") for name in ("plain", "changed"))
    assert changed["lora"] == "0.safetensors:1, 1.safetensors:0.51234567" and "lora" not in plain
    assert changed["weights"] != plain["weights"]
    assert (tmp_path / "plain.mp4").read_bytes() != (tmp_path / "changed.mp4").read_bytes()
    again = ("sample", "--like", tmp_path / "changed.mp4", "-o", tmp_path / "again.mp4", "--model", folder)
    done = cmdgen(*again, *loras)
    assert done.code == 0 and "other weights" not in done.err, done.err
    done = cmdgen(*again, "--overwrite")
    assert done.code == 0 and "other weights" in done.err
    done = cmdgen("sample", *clip, "--lora", tmp_path / "no.safetensors", "-o", tmp_path / "x.mp4")
    assert done.code == 3 and done.err.startswith("error: no LoRA ")


def test_python_takes_loras_too(tmp_path: Path) -> None:
    import cmdgen

    folder = tmp_path / "model"
    create_model(video.tiny(ANIMATEDIFF), folder, dtype=torch.float32)
    plain = load_pipeline(folder)
    down, up = pair(plain.unet, QUERY)
    save_file({peft(QUERY, "down"): down, peft(QUERY, "up"): up}, tmp_path / "x.safetensors")
    changed = cmdgen.load(folder, lora=[f"{tmp_path / 'x.safetensors'}:2"])
    before, after = (pipeline.unet.get_parameter(f"{QUERY}.weight") for pipeline in (plain, changed))
    np.testing.assert_allclose(after.detach(), (before + 2 * up @ down).detach(), rtol=1e-5, atol=1e-6)
