"""Checkpoints in one file: diffusers' own conversion of random weights is ours."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from cmdgen.models.tokenizer import Tokenizer
from cmdgen.pipelines.load import load_pipeline
from cmdgen.store.find import find_model
from cmdgen.store.parts import read_model
from cmdgen.store.single import stored_name

WIDTHS, STATES, TOKENS = (64, 64, 128, 128), 64, 560


def build(second: bool) -> dict[str, torch.nn.Module]:
    text = CLIPTextConfig(
        **{"vocab_size": TOKENS, "hidden_size": STATES, "intermediate_size": 128, "num_attention_heads": 1},
        **{"num_hidden_layers": 3 - second, "projection_dim": STATES},
    )
    heads = (1, 1, 2, 2) if second else 8
    return {
        "unet": UNet2DConditionModel(
            **{"block_out_channels": WIDTHS, "cross_attention_dim": STATES, "attention_head_dim": heads},
            **{"use_linear_projection": second, "sample_size": 64},
        ),
        "vae": AutoencoderKL(
            **{"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
            **{"block_out_channels": (32, 32, 64, 64), "layers_per_block": 2},
        ),
        "text_encoder": CLIPTextModel(text),
    }


@pytest.fixture
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    """What the authors' code writes, half of it in half precision, with what training leaves there."""
    second, state = request.param, {"model_ema.decay": torch.tensor(0.9), "betas": torch.zeros(9)}
    for part, module in build(second).items():
        for name, value in module.state_dict().items():
            name = name if part != "text_encoder" or name.startswith("text_model.") else f"text_model.{name}"
            if name.endswith("position_ids"):
                continue
            if part == "vae" and "attentions" in name and value.ndim == 2:
                value = value[:, :, None, None]
            if part == "text_encoder" and second and "self_attn.q_proj" in name:
                prefix = "" if f"{name}" in module.state_dict() else "text_model."
                keys = (name.removeprefix(prefix).replace("q_proj", f"{letter}_proj") for letter in "qkv")
                both = [module.state_dict()[key] for key in keys]
                layer, kind = name.split(".")[3], name.rpartition(".")[2]
                state[f"cond_stage_model.model.transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(both)
            elif part == "text_encoder" and second and ("k_proj" in name or "v_proj" in name):
                continue
            else:
                state[stored_name(part, name, second=second)] = value.half() if part == "unet" else value.clone()
    if second:
        # its last layer is not read
        last = {k: v.clone() for k, v in state.items() if "resblocks.1." in k}
        state |= {k.replace("resblocks.1.", "resblocks.2."): v for k, v in last.items()}
    save_file(state, tmp_path / "x.safetensors")
    return state


@pytest.mark.parametrize("checkpoint", [False, True], ids=["sd1", "sd2"], indirect=True)
def test_a_checkpoint_becomes_the_folder_that_diffusers_makes_of_it(cmdgen, checkpoint, tmp_path: Path) -> None:
    second = "cond_stage_model.model.token_embedding.weight" in checkpoint
    Tokenizer.train(["a dog swimming in the ocean"], TOKENS).save_pretrained(tmp_path / "base" / "tokenizer")
    done = cmdgen(
        "models", "import", tmp_path / "x.safetensors", "-o", tmp_path / "x", "--tokenizer", tmp_path / "base"
    )
    assert (done.code, done.out) == (0, f"{tmp_path / 'x'}\n"), done.err
    peers = build(second)
    theirs = {
        "unet": convert_ldm_unet_checkpoint(dict(checkpoint), {**peers["unet"].config}),
        "vae": convert_ldm_vae_checkpoint(dict(checkpoint), {**peers["vae"].config}),
        "text_encoder": convert_open_clip_checkpoint(peers["text_encoder"], dict(checkpoint))
        if second
        else convert_ldm_clip_checkpoint(dict(checkpoint)),
    }
    for part in theirs:
        (path,) = (tmp_path / "x" / part).glob("*.safetensors")
        ours = load_file(path)
        for name, value in ours.items():
            plain = name.removeprefix("text_model.") if name not in theirs[part] else name
            assert value.dtype == theirs[part][plain].dtype
            assert torch.equal(value, theirs[part][plain].reshape(value.shape)), name
    model = read_model(tmp_path / "x")
    assert model.content.attention_head_dim == ((1, 1, 2, 2) if second else 8)
    assert model.content.use_linear_projection == second and model.text.num_hidden_layers == 3 - second
    assert load_pipeline(tmp_path / "x").sample("a dog", steps=1, size="64x64").frames.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("checkpoint", [False], indirect=True)
def test_what_is_no_checkpoint_is_one_line(cmdgen, checkpoint, tmp_path: Path) -> None:
    Tokenizer.train(["a dog"], TOKENS).save_pretrained(tmp_path / "base" / "tokenizer")
    key = "model.diffusion_model.input_blocks.0.0.weight"
    (tmp_path / "x.ckpt").write_bytes(b"pickle")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_file({**checkpoint, key: torch.zeros(64, 9, 3, 3)}, tmp_path / "inpainting.safetensors")
    part = {name: value for name, value in checkpoint.items() if name != "first_stage_model.quant_conv.bias"}
    save_file(part, tmp_path / "part.safetensors")
    for name, message in (
        ("x.ckpt", "x.ckpt is pickled, and reading it could run any code: get it as .safetensors"),
        ("other.safetensors", "is no checkpoint of Stable Diffusion 1 or 2: model.diffusion_model.input"),
        ("inpainting.safetensors", "reads 9 channels: 4 alone are read"),
        ("part.safetensors", "tensor first_stage_model.quant_conv.bias is missing"),
    ):
        done = cmdgen("models", "import", tmp_path / name, "-o", tmp_path / "out", "--tokenizer", tmp_path / "base")
        assert (done.code, done.out) == (2, "") and message in done.err and done.err.count("\n") == 1, done.err
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="is a file: cmdgen models import"):
        find_model(str(tmp_path / "x.safetensors"))
    done = cmdgen("models", "import", tmp_path / "x.safetensors", "-o", tmp_path / "out")
    assert done.code == 2 and "has no tokenizer: name a Stable Diffusion that was pulled" in done.err
