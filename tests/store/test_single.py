"""Checkpoints in one file: diffusers' own conversion of random weights is ours."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cmdgen.files import create_folder
from cmdgen.models.tokenizer import Tokenizer
from cmdgen.pipelines.load import load_pipeline
from cmdgen.store import single
from cmdgen.store.find import find_model
from cmdgen.store.parts import read_model
from cmdgen.store.single import stored_name
from tests.video_unets import randomise

WIDTHS, STATES, TOKENS = (64, 64, 128, 128), 64, 560


# of the second one's text encoder, of which all but the last are read
LAYERS = 24
SCHEDULE = {
    **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1},
    **{"set_alpha_to_one": False, "clip_sample": False},
}


def build(second: bool, predicts: str | None = None) -> dict[str, torch.nn.Module]:
    text = CLIPTextConfig(
        **{"vocab_size": TOKENS, "hidden_size": STATES, "intermediate_size": 128, "num_attention_heads": 1},
        **{"num_hidden_layers": LAYERS - 1 if second else 3, "projection_dim": STATES},
        **{"hidden_act": "gelu" if second else "quick_gelu", "bos_token_id": 0, "eos_token_id": 1},
    )
    heads = (1, 1, 2, 2) if second else 8
    unet = UNet2DConditionModel(
        **{"block_out_channels": WIDTHS, "cross_attention_dim": STATES, "attention_head_dim": heads},
        **{"use_linear_projection": second, "sample_size": 96 if predicts == "v_prediction" else 64},
    )
    vae = AutoencoderKL(
        **{"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
        **{"block_out_channels": (32, 32, 64, 64), "layers_per_block": 2},
    )
    modules = {"unet": randomise(unet), "vae": randomise(vae), "text_encoder": randomise(CLIPTextModel(text))}
    if predicts is not None:
        see_noise(unet, {"epsilon": 1.0, "v_prediction": 0.45}[predicts])
    return modules


@torch.no_grad()
def see_noise(unet: UNet2DConditionModel, share: float) -> None:
    """Weights of the last layer that answer with a share of the noise, whatever the others do."""
    last, width = unet.up_blocks[-1], WIDTHS[0]
    for module in (unet.conv_in, unet.conv_out, last.resnets[-1].conv2, last.attentions[-1].proj_out):
        module.weight.zero_()
        module.bias.zero_()
    shortcut = last.resnets[-1].conv_shortcut
    shortcut.weight.copy_(torch.cat([torch.zeros(width, width), torch.eye(width)], dim=1)[..., None, None])
    shortcut.bias.zero_()
    unet.conv_norm_out.weight.fill_(1)
    unet.conv_norm_out.bias.zero_()
    for i in range(width):
        # silu(x) - silu(-x) is x; a group of the norm has both
        sign, channel = 1 - 2 * (i % 2), i // 2 % 4
        unet.conv_in.weight[i, channel, 1, 1] = sign
        unet.conv_out.weight[channel, i, 1, 1] = sign * share * 8 / width


@pytest.fixture
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    """What the authors' code writes, half of it in half precision, with what training leaves there."""
    second, predicts = request.param
    state = {"model_ema.decay": torch.tensor(0.9), "betas": torch.zeros(9)}
    for part, module in build(second, predicts).items():
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
    # the average of training has other values
    averaged = {key: torch.zeros_like(value) for key, value in state.items() if key.startswith("model.diffusion_model")}
    state |= {f"model_ema.{key[6:].replace('.', '')}": value for key, value in averaged.items()}
    if second:
        # its last layer is not read, nor a matrix for pictures
        first = {k: v.clone() for k, v in state.items() if "resblocks.1." in k}
        state |= {k.replace("resblocks.1.", f"resblocks.{LAYERS - 1}."): v for k, v in first.items()}
        state["cond_stage_model.model.text_projection"] = torch.zeros(STATES, STATES)
    save_file(state, tmp_path / "x.safetensors")
    return state


CASES = [(False, None), (True, None), (True, "epsilon"), (True, "v_prediction")]


@pytest.mark.parametrize("checkpoint", CASES, ids=["sd1", "sd2", "sd2-epsilon", "sd2-v"], indirect=True)
def test_a_checkpoint_is_the_model_that_diffusers_makes_of_it(
    cmdgen, checkpoint, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    second, predicts = request.node.callspec.params["checkpoint"]
    kind, side = predicts or "epsilon", 768 if predicts == "v_prediction" else 512
    # a tokenizer of the other kind, which pads in another way
    learned = Tokenizer.train(["a dog swimming in the ocean"], TOKENS)
    other = Tokenizer(learned.vocab, learned.merges, pad="<|endoftext|>" if second else "!")
    other.save_pretrained(tmp_path / "base" / "tokenizer")
    done = cmdgen(
        "models", "import", tmp_path / "x.safetensors", "-o", tmp_path / "x", "--tokenizer", tmp_path / "base"
    )
    assert (done.code, done.out) == (0, f"{tmp_path / 'x'}\n"), done.err
    model = read_model(tmp_path / "x")
    assert (model.noise.prediction_type, model.size) == (kind, (side, side))
    assert not any("ema" in name for path in (tmp_path / "x").rglob("*.safetensors") for name in load_file(path))

    tokenizer = Tokenizer(learned.vocab, learned.merges, pad="!" if second else "<|endoftext|>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    described = StableDiffusionPipeline(
        **{**build(second, predicts), "tokenizer": CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")},
        **{"scheduler": DDIMScheduler(**SCHEDULE, prediction_type=kind), "safety_checker": None},
        **{"feature_extractor": None, "requires_safety_checker": False},
    )
    described.save_pretrained(tmp_path / "config")
    for path in (tmp_path / "config").rglob("*.safetensors"):
        path.unlink()
    settings = {"config": str(tmp_path / "config"), "local_files_only": True}
    theirs = StableDiffusionPipeline.from_single_file(str(tmp_path / "x.safetensors"), **settings)
    theirs.set_progress_bar_config(disable=True)

    ours = load_pipeline(tmp_path / "x")
    for part in ("unet", "vae", "text_encoder"):
        state, expected = ours.part(part).state_dict(), getattr(theirs, part).state_dict()
        if part == "text_encoder":
            # transformers 5 leaves out the first word
            expected = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in expected.items()}
        assert state.keys() == {name for name in expected if not name.endswith("position_ids")}
        assert all(torch.equal(value, expected[name].float()) for name, value in state.items())
    half = load_file(tmp_path / "x" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in half.values()} == {torch.float16}
    clip = ours.sample("a dog", seed=3, steps=3, size="64x64", negative="swimming")
    (picture,) = theirs(
        **{"prompt": "a dog", "negative_prompt": "swimming", "height": 64, "width": 64, "num_inference_steps": 3},
        **{"latents": ours.noise("content", (4, 8, 8), [3])[0], "output_type": "np"},
    ).images
    assert np.abs(clip.frames[0] - 255 * picture).max() < 0.51


@pytest.mark.parametrize("checkpoint", [(False, None)], indirect=True)
def test_a_checkpoint_is_sampled_by_its_own_name(
    cmdgen, checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    file, clip = tmp_path / "x.safetensors", ("--steps", 1, "--size", "64x64", "--seed", 1)
    done = cmdgen("sample", "a dog", "--model", file, "-o", tmp_path / "a.png", *clip)
    assert done.code == 2 and f"{file} has no tokenizer: give --tokenizer to cmdgen models import" in done.err
    # one that was pulled
    snapshot = tmp_path / "hub" / "models--acme--base" / "snapshots" / ("0" * 40)
    Tokenizer.train(["a dog swimming"], TOKENS).save_pretrained(snapshot / "tokenizer")
    (snapshot / "model_index.json").write_text("{}")
    imported = tmp_path / "cache" / "cmdgen" / "imported"
    times = []
    for name in ("a.png", "b.png"):
        done = cmdgen("sample", "a dog", "--model", file, "-o", tmp_path / name, *clip)
        assert (done.code, done.out) == (0, f"{tmp_path / name}\n"), done.err
        times += [path.stat().st_mtime_ns for path in imported.glob("*/x/unet/*.safetensors")]
    assert len(times) == 2 and times[0] == times[1]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_checkpoint_may_be_imported_by_several_processes_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (file := tmp_path / "model.safetensors").touch()

    def lose(path: Path, folder: Path, base: Path | None) -> None:
        with create_folder(folder) as mine:
            (mine / "model_index.json").touch()
            with create_folder(folder) as theirs:
                (theirs / "model_index.json").touch()

    monkeypatch.setattr(single, "import_checkpoint", lose)
    assert (single.find_imported(file) / "model_index.json").is_file()


@pytest.mark.parametrize("checkpoint", [(False, None)], indirect=True)
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
    for name, changed, message in (
        (key, torch.zeros(()), f"{key} has shape [], expected 4 sides"),
        ("model.diffusion_model.input_blocks.1.0.out_layers.3.weight", torch.zeros(8, 4, 3, 3), "must be divisible"),
        ("first_stage_model.quant_conv.bias", torch.zeros(8, dtype=torch.int64), "is int64 [8], expected numbers"),
        ("first_stage_model.quant_conv.bias", torch.zeros(9), "is float32 [9], expected numbers of shape [8]"),
    ):
        save_file({**checkpoint, name: changed}, tmp_path / "odd.safetensors")
        command = ("models", "import", tmp_path / "odd.safetensors", "-o", tmp_path / "out")
        done = cmdgen(*command, "--tokenizer", tmp_path / "base")
        assert done.code == 2 and message in done.err and done.err.count("\n") == 1, done.err
        assert done.err.startswith(f"error: {tmp_path / 'odd.safetensors'}: ") and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"x\.ckpt is pickled, and reading it could run any code"):
        find_model(str(tmp_path / "x.ckpt"))
