"""Models that are put together from several repositories, in the layouts that these have."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter, PNDMScheduler, StableVideoDiffusionPipeline
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from cmdgen.config import ANIMATEDIFF, CMD_SD15, SVD, SVD_XT, ModelConfig, MotionConfig
from cmdgen.pipelines.load import load_pipeline
from cmdgen.store import recipes
from cmdgen.store.create import create_model
from cmdgen.store.find import find_model
from cmdgen.store.parts import read_model
from cmdgen.store.recipes import RECIPES, describe_modules
from cmdgen.video.read import read_video
from tests.store.conftest import TOKEN
from tests.video_unets import tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"
CARD = "---\nlicense: {}\n---\n"


def write(model: ModelConfig, folder: Path, *, licence: str, half: bool = False) -> Path:
    """A repository as diffusers writes it, without what only we write."""
    create_model(model, folder, dtype=torch.float16 if half else torch.float32)
    index = folder / "model_index.json"
    index.write_text(json.dumps({k: v for k, v in json.loads(index.read_text()).items() if k != "cmdgen"}))
    (folder / "README.md").write_text(CARD.format(licence))
    shutil.rmtree(folder / "still_scheduler", ignore_errors=True)
    return folder


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "cmdgen" / "models"


@pytest.fixture
def base(hub, tmp_path: Path) -> Path:
    """Stable Diffusion 1.5 with the variants, shards, old names and keys that its folders have."""
    config = replace(tiny(ANIMATEDIFF), adapter=None, noise=CMD_SD15.noise, still_noise=None, frames=1)
    folder = write(config, tmp_path / "base", licence="openrail-base")
    add_variant(folder / "unet" / WEIGHTS)
    cut_up(folder / "text_encoder" / "model.safetensors")
    state = load_file(folder / "vae" / WEIGHTS)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        state = {name.replace(f".{new}.", f".{old}."): value for name, value in state.items()}
    save_file(state, folder / "vae" / WEIGHTS)
    # keys of a former time
    old_keys = {"act_fn": "silu", "center_input_sample": False, "downsample_padding": 1, "norm_eps": 1e-5}
    change(folder / "unet" / "config.json", **old_keys, mid_block_scale_factor=1, _diffusers_version="0.6.0")
    PNDMScheduler(**STOCK, skip_prk_steps=True, set_alpha_to_one=False).save_pretrained(folder / "scheduler")
    for part in ("safety_checker", "feature_extractor"):
        (folder / part).mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"not read")
    (folder / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    change(folder / "model_index.json", feature_extractor=["transformers", "CLIPFeatureExtractor"])
    hub.folders["emilianJR/epiCRealism"] = folder
    return folder


STOCK = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def add_variant(path: Path) -> None:
    """The same weights in half precision beside them."""
    half = {name: value.half() for name, value in load_file(path).items()}
    save_file(half, path.with_suffix(".fp16.safetensors"))


def cut_up(path: Path) -> None:
    """The same weights in two files and an index."""
    state = load_file(path)
    names = [f"{path.stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {name: names[i % 2] for i, name in enumerate(sorted(state))}
    for file in names:
        save_file({name: value for name, value in state.items() if where[name] == file}, path.with_name(file))
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    path.unlink()


def adapter(folder: Path, *, mid: bool, length: int = 32) -> MotionAdapter:
    shape = {"block_out_channels": (32, 64, 64), "use_motion_mid_block": mid, "motion_max_seq_length": length}
    modules = MotionAdapter(**shape)
    modules.save_pretrained(folder)
    # keys of a former time
    config = json.loads((folder / "config.json").read_text())
    config |= {"motion_activation_fn": "geglu", "motion_attention_bias": False, "motion_cross_attention_dim": None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(CARD.format("apache-2.0"))
    return modules


@pytest.fixture
def sample(cmdgen, hub) -> Callable[..., np.ndarray]:
    """Samples with what was pulled, and asks nothing of the hub."""

    def run(model: str, output: Path, *arguments: object) -> np.ndarray:
        requests = hub.requests
        done = cmdgen("sample", *arguments, "--model", model, "-o", output, "--steps", 2, "--seed", 1)
        assert done.code == 0 and hub.requests == requests, done.err
        return read_video(output)[0]

    return run


@pytest.mark.parametrize(("name", "mid"), [("animatediff", False), ("animatediff-v2", True)])
def test_motion_modules_and_their_base_are_one_model(
    cmdgen, sample, hub, base: Path, data: Path, tmp_path: Path, name: str, mid: bool
) -> None:
    adapter(tmp_path / "modules", mid=mid)
    hub.folders[RECIPES[name].adapter] = tmp_path / "modules"
    done = cmdgen("models", "pull", name)
    assert (done.code, done.out) == (0, f"{data / name}\n"), done.err
    first, second, *_ = (line for line in done.err.splitlines() if "licence: " in line)
    assert re.fullmatch(r"emilianJR/epiCRealism: \d MB, licence: openrail-base", first)
    assert re.fullmatch(rf"{RECIPES[name].adapter}: \d MB, licence: apache-2.0", second)
    last = f"licence: openrail-base (emilianJR/epiCRealism) and apache-2.0 ({RECIPES[name].adapter})"
    assert last in done.err.splitlines()
    # of two forms the smaller one
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.asked
    assert f"unet/{WEIGHTS}" not in hub.asked

    assert any("00002-of-00002" in file for file in hub.asked) and not any("safety" in file for file in hub.asked)
    # of the base model's schedule
    used = f"note: {name} is sampled as motion modules were trained, on linear betas with leading timesteps; "
    assert f"{used}its base model's schedule (scaled_linear, leading) is for stills alone\n" in done.err

    assert find_model(name) == data / name
    model = read_model(data / name)
    assert model.noise == ANIMATEDIFF.noise and model.still_noise == CMD_SD15.noise
    assert model.adapter == MotionConfig(block_out_channels=(32, 64, 64), use_motion_mid_block=mid)
    assert (model.frames, model.steps, model.size) == (16, 25, (64, 64))
    assert (data / name / "unet").is_symlink() and (data / name / "motion_adapter" / WEIGHTS).is_symlink()
    assert sample(name, tmp_path / "clip.mp4", "a dog", "--frames", 4).shape == (4, 64, 64, 3)
    still = load_pipeline(base).sample("a dog", seed=1, steps=2)
    ours = load_pipeline(name).sample("a dog", seed=1, steps=2, frames=1)
    # its weights came in half precision
    assert np.abs(still.frames.astype(int) - ours.frames).max() <= 3

    done = cmdgen("models", "list", "--json")
    rows = {row["name"]: row for row in json.loads(done.out)}
    assert rows[name]["folder"] == str(data / name)
    done = cmdgen("models", "pull", name, "-o", tmp_path / "copy")
    assert done.code == 0 and not any(path.is_symlink() for path in (tmp_path / "copy").rglob("*"))
    theirs = AnimateDiffPipeline.from_pretrained(tmp_path / "copy", variant="fp16")
    assert theirs.motion_adapter.config.use_motion_mid_block == mid


def test_lightning_is_a_file_without_a_configuration(
    cmdgen, sample, hub, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = tmp_path / "modules", RECIPES["animatediff-lightning"]
    adapter(folder, mid=True)
    (folder / "config.json").unlink()
    (folder / WEIGHTS).rename(folder / recipe.file)
    (folder / "animatediff_lightning_8step_diffusers.safetensors").write_bytes(b"not read")
    hub.folders[recipe.adapter] = folder
    done = cmdgen("models", "pull", "animatediff-lightning")
    assert done.code == 0, done.err
    model = read_model(data / "animatediff-lightning")
    assert (model.steps, model.guidance, model.sampler) == (4, 1.0, "ddim")
    assert (model.noise.timestep_spacing, model.noise.beta_schedule, model.noise.solver) == (
        "trailing",
        "linear",
        "euler",
    )
    assert sample("animatediff-lightning", tmp_path / "x.mp4", "a dog", "--frames", 3).shape[0] == 3
    assert not any("8step" in name for name in hub.asked)
    # put together again from the cache
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    shutil.rmtree(data)
    requests = hub.requests
    done = cmdgen("models", "pull", "animatediff-lightning")
    assert (done.code, hub.requests) == (0, requests), done.err
    assert read_model(data / "animatediff-lightning") == model


def test_any_motion_modules_go_into_any_base(cmdgen, sample, hub, base: Path, data: Path, tmp_path: Path) -> None:
    """Under the names that their authors give them, too."""
    folder = tmp_path / "modules"
    modules = adapter(folder, mid=True, length=24)
    names = {
        **{".norm1.": ".norms.0.", ".norm2.": ".norms.1.", ".norm3.": ".ff_norm."},
        **{".attn1.": ".attention_blocks.0.", ".attn2.": ".attention_blocks.1."},
        ".pos_embed.": ".attention_blocks.0.pos_encoder.",
    }
    state = {}
    for name, value in modules.state_dict().items():
        for new, old in names.items():
            name = name.replace(new, old)
        for i in range(3):
            name = name.replace(f"motion_modules.{i}.", f"motion_modules.{i}.temporal_transformer.")
        state[name] = value.contiguous()
        if name.endswith(".pe"):
            state[name.replace("blocks.0.pos", "blocks.1.pos")] = value.clone()
    save_file(state, folder / "mm.safetensors")
    hub.folders["acme/motion"] = folder
    done = cmdgen("models", "pull", "acme/motion", "--base", "emilianJR/epiCRealism", "--file", "mm.safetensors")
    assert (done.code, done.out) == (0, f"{data / 'motion'}\n"), done.err
    pipeline = load_pipeline("motion")
    assert pipeline.config.adapter.motion_max_seq_length == 24
    assert "note: the motion modules of motion know 24 frames: they are of AnimateDiff's first version" in done.err
    assert sample("motion", tmp_path / "x.mp4", "a dog", "--frames", 3).shape[0] == 3
    ours = pipeline.part("motion_adapter").state_dict()
    assert all(torch.equal(ours[name], value) for name, value in modules.state_dict().items())
    done = cmdgen("models", "pull", "acme/motion")
    assert done.code == 2 and "acme/motion is no whole model: motion modules need --base OWNER/NAME" in done.err


@pytest.mark.parametrize(("name", "preset"), [("svd", SVD), ("svd-xt", SVD_XT), ("svd-xt-1.1", SVD_XT)])
def test_pictures_are_animated_by_what_was_pulled(
    cmdgen, sample, hub, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, preset: ModelConfig
) -> None:
    folder = write(tiny(preset), tmp_path / "svd", licence="other\nlicense_name: stable-video-diffusion-community")
    for path in ("unet/" + WEIGHTS, "vae/" + WEIGHTS, "image_encoder/model.safetensors"):
        add_variant(folder / path)
    repository = RECIPES[name].base
    hub.folders[repository] = folder
    if name == "svd-xt-1.1":
        hub.gated.add(repository)
        done = cmdgen("models", "pull", name)
        assert done.code == 1 and done.err.splitlines()[-1] == (
            f"error: {repository} is gated: accept its terms at {constants.ENDPOINT}/{repository}, "
            "then set HF_TOKEN to a token of that account"
        )
        assert not any(file.endswith(".safetensors") for file in hub.asked)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = cmdgen("models", "pull", name)
    assert (done.code, done.out) == (0, f"{data / name}\n"), done.err
    assert "licence: stable-video-diffusion-community" in done.err
    weights = [file for file in hub.asked if file.endswith(".safetensors")]
    assert len({*weights}) == 3 and all(file.endswith(".fp16.safetensors") for file in weights)
    model = read_model(data / name)
    assert (model.frames, model.size, model.steps, model.guidance) == (preset.frames, (576, 1024), 25, 3.0)
    shutil.copy(Path(__file__).parents[2] / "docs" / "reconstruction.png", tmp_path / "picture.png")
    arguments = ("--image", tmp_path / "picture.png", "--frames", 2, "--size", "64x64")
    assert sample(name, tmp_path / "x.mp4", *arguments).shape == (2, 64, 64, 3)
    # by the name of the repository, too
    assert read_model(find_model(RECIPES[name].base)).guidance_first == 1.0
    StableVideoDiffusionPipeline.from_pretrained(data / name, variant="fp16")
    done = cmdgen("models", "pull", name, "--full")
    assert done.code == 0 and f"unet/{WEIGHTS}" in hub.asked, done.err


def test_what_does_not_fit_is_refused_and_leaves_no_folder(cmdgen, hub, base: Path, data: Path, tmp_path: Path) -> None:
    def refuse(*arguments: object, code: int = 2) -> str:
        done = cmdgen("models", "pull", *arguments)
        lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert (done.code, done.out, len(lines)) == (code, "", 1), done.err
        return lines[0]

    pull = ("acme/motion", "--base", "emilianJR/epiCRealism")
    # SDXL's have three levels
    shapes = {
        "acme/motion": {"block_out_channels": (32, 64), "use_motion_mid_block": False},
        "acme/pia": {"block_out_channels": (32, 64, 64), "conv_in_channels": 9},
        "acme/v1": {"block_out_channels": (32, 64, 64), "use_motion_mid_block": False, "motion_max_seq_length": 24},
    }
    for name, shape in shapes.items():
        hub.folders[name] = tmp_path / name
        MotionAdapter(**shape).save_pretrained(hub.folders[name])
    assert "is for a UNet of (32, 64), " in refuse(*pull)
    assert refuse(*pull).endswith("has (32, 64, 64): take motion modules of Stable Diffusion 1.5")
    assert "conv_in_channels 9 is not supported" in refuse("acme/pia", *pull[1:])
    file = ("--file", WEIGHTS)
    assert "has a first convolution of its own, as PIA: take AnimateDiff's" in refuse("acme/pia", *pull[1:], *file)
    (tmp_path / "acme/motion/mm.ckpt").write_bytes(b"pickle")
    ckpt = refuse(*pull, "--file", "mm.ckpt")
    assert "mm.ckpt is no safetensors file: pickled weights could run any code" in ckpt
    assert "acme/motion has no no.safetensors" in refuse(*pull, "--file", "no.safetensors")
    alone = refuse("acme/motion", "--file", "mm.safetensors")
    assert "--file and --lora go with motion modules, which need --base" in alone
    other = refuse("svd", "--base", "emilianJR/epiCRealism")
    assert "--base has no effect: svd has no motion modules" in other
    # version 1 in Stable Diffusion 2.1
    change(base / "unet" / "config.json", use_linear_projection=True)
    hub.folders["acme/sd21"] = base
    second = refuse("acme/v1", "--base", "acme/sd21")
    assert second.endswith(" is Stable Diffusion 2: motion modules need a Stable Diffusion 1.5")
    assert not data.exists() or not any(data.iterdir())


def test_a_public_model_that_is_not_here_says_how_to_get_it(cmdgen, data: Path, tmp_path: Path) -> None:
    done = cmdgen("sample", "a dog", "--model", "animatediff", "-o", tmp_path / "x.mp4")
    assert done.code == 2 and done.err == "error: animatediff is not here yet: cmdgen models pull animatediff\n"
    done = cmdgen("models", "show", "svd-xt", "--json")
    assert json.loads(done.out)["parameters"] == 1_524_623_082 + 97_742_847 + 632_076_800


def test_a_file_without_motion_modules_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="holds no motion modules of AnimateDiff"):
        describe_modules(tmp_path / "x.safetensors")
    place = "down_blocks.{}.motion_modules.0.{}"
    position = {place.format(0, "transformer_blocks.0.pos_embed.pe"): torch.zeros(1, 24, 8)}
    for name, shape in ((place.format("x", "proj_in.weight"), (8, 8)), (place.format(0, "proj_in.weight"), ())):
        save_file({**position, name: torch.zeros(shape)}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="holds no motion modules of AnimateDiff"):
            describe_modules(tmp_path / "x.safetensors")


def test_links_are_copies_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("x")

    def refuse(*arguments: object, **named: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    recipes.link(tmp_path / "a", tmp_path / "b")
    recipes.link(tmp_path / "a" / "x", tmp_path / "y")
    assert (tmp_path / "b" / "x").read_text() == (tmp_path / "y").read_text() == "x"


def test_a_consistency_model_comes_with_its_lora(cmdgen, sample, hub, base: Path, data: Path, tmp_path: Path) -> None:
    folder, recipe = tmp_path / "modules", RECIPES["animatelcm"]
    adapter(folder, mid=True)
    target = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    matrices = {f"lora_unet_{target}.lora_{side}.weight": torch.ones(shape) for side, shape in LORA.items()}
    save_file(matrices, folder / "AnimateLCM_sd15_t2v_lora.safetensors")
    hub.folders[recipe.adapter] = folder
    done = cmdgen("models", "pull", "animatelcm")
    assert done.code == 0, done.err
    model = read_model(data / "animatelcm")
    assert (model.sampler, model.steps, model.guidance, model.noise.solver) == ("lcm", 6, 2.0, "lcm")
    assert model.loras == ("0.safetensors:0.8",)
    changed, plain = load_pipeline("animatelcm").unet, load_pipeline(base).unet
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    change = changed.state_dict()[name] - plain.state_dict()[name]
    torch.testing.assert_close(change, torch.full((32, 32), 0.8 * 3), rtol=0, atol=1e-2)
    sample("animatelcm", tmp_path / "x.mp4", "a dog", "--frames", 3)


LORA = {"down": (3, 32), "up": (32, 3)}


def test_a_lora_of_the_hub_is_pulled_and_used_by_name(
    cmdgen, sample, hub, base: Path, data: Path, tmp_path: Path
) -> None:
    adapter(tmp_path / "modules", mid=True)
    hub.folders["acme/motion"] = tmp_path / "modules"
    (tmp_path / "zoom").mkdir()
    module = "unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.processor"
    matrices = {f"{module}.to_q_lora.{side}.weight": torch.ones(shape) for side, shape in LORA.items()}
    save_file(matrices, tmp_path / "zoom" / WEIGHTS)
    hub.folders["guoyww/zoom"] = tmp_path / "zoom"
    done = cmdgen("models", "pull", "guoyww/zoom")
    assert done.code == 0 and "for --lora of cmdgen sample" in done.err, done.err
    done = cmdgen("models", "pull", "acme/motion", "--base", "emilianJR/epiCRealism")
    assert done.code == 0, done.err
    clip = ("a dog", "--frames", 2, "--lora", "guoyww/zoom:0.5")
    zoomed = sample("motion", tmp_path / "x.mp4", *clip)
    assert not np.array_equal(zoomed, sample("motion", tmp_path / "y.mp4", *clip[:3]))
    # put together once, it is in the model
    pull = ("models", "pull", "acme/motion", "--base", "emilianJR/epiCRealism", "--lora", "guoyww/zoom:0.5")
    assert cmdgen(*pull).code == 0
    assert np.array_equal(zoomed, sample("motion", tmp_path / "z.mp4", *clip[:3]))


def test_the_readme_goes_from_pull_to_clip(
    cmdgen, hub, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line by line, in a folder that has a picture alone."""
    lightning, svd = RECIPES["animatediff-lightning"], RECIPES["svd-xt"]
    adapter(tmp_path / "modules", mid=True)
    (tmp_path / "modules" / WEIGHTS).rename(tmp_path / "modules" / lightning.file)
    small = {"frames": 2, "height": 64, "width": 64, "steps": 2}
    monkeypatch.setitem(RECIPES, "svd-xt", replace(svd, model=replace(SVD_XT, **small)))
    write(tiny(SVD_XT), tmp_path / "svd", licence="other\nlicense_name: stable-video-diffusion-community")
    hub.folders |= {lightning.adapter: tmp_path / "modules", svd.base: tmp_path / "svd"}
    root = Path(__file__).parents[2]
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    shutil.copy(root / "docs" / "reconstruction.png", "photo.png")
    section = (root / "README.md").read_text().partition("## Real models")[2].partition("\n## ")[0]
    commands = [shlex.split(line, comments=True) for line in section.splitlines() if line.startswith("    cmdgen ")]
    assert [command[1] for command in commands] == ["models", "sample"] * 2
    for command in commands:
        done = cmdgen(*command[1:])
        assert done.code == 0, done.err
    assert read_video("out.mp4")[0].shape == (16, 64, 64, 3) and read_video("alive.mp4")[0].shape == (2, 64, 64, 3)


def test_a_broken_connection_goes_on_where_it_broke(
    cmdgen, sample, hub, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as it is read and written, and what is waited before another try
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    adapter(tmp_path / "modules", mid=False)
    hub.folders[RECIPES["animatediff"].adapter] = tmp_path / "modules"
    file = "unet/diffusion_pytorch_model.fp16.safetensors"
    hub.breaks[file] = 500_500
    done = cmdgen("models", "pull", "animatediff")
    assert done.code == 0, done.err
    assert hub.resumed == [(file, 500_000)]
    pulled = data / "animatediff" / file
    assert pulled.read_bytes() == (base / file).read_bytes()
    assert sample("animatediff", tmp_path / "x.mp4", "a dog", "--frames", 2).shape[0] == 2


def test_a_pull_that_was_stopped_keeps_the_files_that_are_whole(
    cmdgen, sample, hub, base: Path, data: Path, tmp_path: Path
) -> None:
    adapter(tmp_path / "modules", mid=False)
    modules = tmp_path / "modules" / WEIGHTS
    hub.folders[RECIPES["animatediff"].adapter] = tmp_path / "modules"
    content = modules.read_bytes()
    # listed, but not to be had
    hub.refused.add(WEIGHTS)
    done = cmdgen("models", "pull", "animatediff")
    assert done.code == 3 and "answers with status 503" in done.err.splitlines()[-1]
    assert not data.exists() or not any(data.iterdir())
    hub.refused.clear()
    hub.sent.clear()
    done = cmdgen("models", "pull", "animatediff")
    assert done.code == 0, done.err
    assert hub.sent == [WEIGHTS]
    assert (data / "animatediff" / "motion_adapter" / WEIGHTS).read_bytes() == content
    assert sample("animatediff", tmp_path / "x.mp4", "a dog", "--frames", 2).shape[0] == 2
