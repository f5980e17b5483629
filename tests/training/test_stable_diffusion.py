"""From a plain Stable Diffusion folder to a whole model, by the recipe of the paper's presets."""

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cmdgen.config import CMD_SD21, PRESETS, MotionConfig, NoiseConfig, VaeConfig
from cmdgen.models.temporal import MotionAdapter
from cmdgen.models.unet import UNet
from cmdgen.models.vae import KlVae
from cmdgen.pipelines.load import load_pipeline
from cmdgen.schema import read_config, write_config
from cmdgen.training import recompute
from tests.conftest import tiny_config

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """cmd-sd21 is as small as a test; all else about it stays."""
    tiny = tiny_config()
    assert CMD_SD21.autoencoder is not None and CMD_SD21.motion is not None
    assert tiny.autoencoder is not None and tiny.motion is not None
    autoencoder = replace(tiny.autoencoder, importance="pixel", motion_activation="tanh")
    motion = replace(tiny.motion, learned_sigma=True, noise=CMD_SD21.motion.noise)
    small = replace(tiny, autoencoder=autoencoder, motion=motion, noise=CMD_SD21.noise)
    monkeypatch.setitem(PRESETS, "cmd-sd21", replace(small, name="cmd-sd21"))


@pytest.fixture
def stock(tiny_model: Path, tmp_path: Path) -> Path:
    """What a Stable Diffusion folder has, and pickled weights that nobody asked for."""
    folder = tmp_path / "sd"
    for part in ("vae", "unet", "text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(tiny_model / part, folder / part)
    write_config(NoiseConfig(set_alpha_to_one=False), folder / "scheduler")
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"pickled")
    index = json.loads((tiny_model / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "cmdgen": {}}))
    return folder


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Frames in each call of the VAE's encoder, as they come."""
    calls: list[int] = []
    encode = KlVae.encode

    def count(vae: KlVae, x: Tensor) -> tuple[Tensor, Tensor]:
        # memory is counted on the meta device
        if not x.is_meta:
            calls.append(len(x))
        return encode(vae, x)

    monkeypatch.setattr(KlVae, "encode", count)
    return calls


def test_three_stages_and_precomputed_latents_make_a_whole_model(
    cmdgen: Run, stock: Path, videos: Path, encoded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recomputed: list[object] = []
    checkpoint = recompute.checkpoint

    def count(function: object, *arguments: object, **settings: bool) -> object:
        recomputed.append(function)
        return checkpoint(function, *arguments, **settings)

    monkeypatch.setattr(recompute, "checkpoint", count)
    run, latents = tmp_path / "run", tmp_path / "latents"
    same = ("--preset", "cmd-sd21", "--data", videos)
    made = cmdgen("data", "precompute", "-o", latents, "--vae", stock, *same)
    assert (made.code, made.out) == (0, f"{latents}\n"), made.err
    # one of the five is held out
    assert encoded == [4, 16]
    before = {path: path.stat().st_mtime_ns for path in latents.rglob("*")}

    # the first stage settles what they share
    settings = ("-o", run, "--init", stock)
    shared = (*same, "--latents", latents)
    few = ("--batch", 4, "--accumulate", 2, "--log-every", 1)
    for stage, steps in {"autoencoder": (1,), "content": (1, 2), "motion": (1,)}.items():
        recomputed.clear()
        for count_to in steps:
            own = shared if stage == "autoencoder" else few
            done = cmdgen("train", stage, *settings, "--steps", count_to, *own)
            assert done.code == 0, done.err
            assert f"{stage}: {count_to} of {count_to} steps" in done.err
        assert recomputed, "blocks kept their activations"
    # neither encoded again, nor written to, nor removed
    assert encoded == [4, 16]
    assert {path: path.stat().st_mtime_ns for path in latents.rglob("*")} == before

    log = (run / "training/content/log.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, log) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    # plain, without min-SNR weights, from the first step at the paper's rate
    assert all(line["loss"] == line["mse"] and line["lr"] == 1e-4 for line in lines)
    assert "bound" in (run / "training/motion/log.jsonl").read_text()
    for part in ("text_encoder/model.safetensors", "tokenizer/vocab.json"):
        assert (run / part).read_bytes() == (stock / part).read_bytes()
    assert not list(run.rglob("*.bin"))
    assert read_config(run / "scheduler", NoiseConfig) == CMD_SD21.noise
    model = load_pipeline(run)
    assert model.config.name == "cmd-sd21"
    assert model.sample("noise a").frames.shape == (4, 32, 48, 3)


def test_a_model_with_motion_modules_is_its_base_model_to_training(
    cmdgen: Run, stock: Path, videos: Path, tmp_path: Path
) -> None:
    shutil.move(stock / "scheduler", stock / "still_scheduler")
    write_config(NoiseConfig(beta_schedule="linear"), stock / "scheduler")
    shape = {"block_out_channels": (16, 16, 16), "motion_layers_per_block": 1, "motion_norm_num_groups": 4}
    MotionAdapter(MotionConfig(**shape)).save_pretrained(stock / "motion_adapter")
    train = ("-o", tmp_path / "run", "--preset", "cmd-sd21", "--data", videos, "--steps", 1, "--batch", 2)
    for stage in ("autoencoder", "content"):
        done = cmdgen("train", stage, *train, "--accumulate", 1, "--init", stock)
        assert done.code == 0, done.err
    assert read_config(tmp_path / "run" / "scheduler", NoiseConfig) == NoiseConfig(set_alpha_to_one=False)
    first, last = (load_file(folder / "unet" / UNet.filename) for folder in (stock, tmp_path / "run"))
    assert first.keys() == last.keys() and not (tmp_path / "run" / "motion_adapter").exists()
    # one step away from where it started
    assert 0 < max(float((last[name] - first[name]).abs().max()) for name in first) < 0.01


def test_interrupted_precompute_goes_on_where_it_was(
    cmdgen: Run, stock: Path, videos: Path, encoded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = KlVae.to_latents

    def interrupt(vae: KlVae, frames: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGTERM)
        return encode(vae, frames)

    arguments = ("--vae", stock, "--preset", "cmd-sd21", "--data", videos)
    command = ("data", "precompute", "-o", tmp_path / "latents", *arguments)
    with monkeypatch.context() as patch:
        patch.setattr(KlVae, "to_latents", interrupt)
        stopped = cmdgen(*command)
    assert (stopped.code, stopped.out) == (143, "")
    assert "stopped with 0 of 4 clips: the same command goes on" in stopped.err
    # the held-out clip was being encoded, and is kept
    assert encoded == [4]
    refused = cmdgen(
        "train",
        "autoencoder",
        "-o",
        tmp_path / "run",
        "--init",
        stock,
        "--latents",
        tmp_path / "latents",
        *arguments[2:],
    )
    assert refused.code == 2
    assert "holds 0 of 4 clips, 4 frames of 48x32 of this data and VAE: first run" in refused.err
    assert cmdgen(*command).code == 0
    assert encoded == [4, 16]


def test_precompute_within_a_budget_gives_the_same_latents(
    cmdgen: Run, stock: Path, videos: Path, encoded: list[int], tmp_path: Path
) -> None:
    arguments = ("--vae", stock, "--preset", "cmd-sd21", "--data", videos)
    free, within = tmp_path / "free", tmp_path / "within"
    assert cmdgen("data", "precompute", "-o", free, *arguments).code == 0
    assert encoded == [4, 16]
    encoded.clear()
    command = ("data", "precompute", "-o", within, *arguments, "--max-memory")
    refused = cmdgen(*command, "0.1MB")
    assert (refused.code, refused.out) == (2, "")
    assert "to encode 4 frames of 48x32 takes at least 1 MB" in refused.err
    assert cmdgen(*command, "0.33MB").code == 0
    # of the held-out clip frame by frame, of the four others in strips
    assert encoded == [1, 1, 1, 1]
    for path in free.rglob("*.safetensors"):
        ours = load_file(within / path.relative_to(free))["latents"]
        torch.testing.assert_close(ours, load_file(path)["latents"], rtol=2e-3, atol=2e-3)


def test_shards_of_latents_train_as_whole_ones_do(
    cmdgen: Run, stock: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = read_config(stock / "vae", VaeConfig)
    # a file holds two clips of 4 frames of 48x32
    size = 2 * 4 * vae.latent_channels * 48 * 32 // vae.stride**2
    monkeypatch.setattr("cmdgen.training.latents.SHARED_BYTES", 2 * size)
    same = ("--preset", "cmd-sd21", "--data", videos)
    losses = []
    for name, shards in {"whole": ["1/1"], "parts": ["2/2", "1/2"]}.items():
        folder, run = tmp_path / name, tmp_path / f"run-{name}"
        for shard in shards:
            assert cmdgen("data", "precompute", "-o", folder, "--vae", stock, *same, "--shard", shard).code == 0
        assert len(list(folder.rglob("*.safetensors"))) == 3
        assert len(list(folder.iterdir())) == 2
        few = ("--batch", 2, "--accumulate", 1, "--steps", 2, "--log-every", 1)
        done = cmdgen("train", "autoencoder", "-o", run, "--init", stock, *same, "--latents", folder, *few)
        assert done.code == 0, done.err
        log = map(json.loads, (run / "training/autoencoder/log.jsonl").read_text().splitlines())
        losses.append([(line["loss"], line["grad"]) for line in log if "loss" in line])
    assert len(losses[0]) == 2 and losses[0] == losses[1]


def test_what_does_not_fit_is_one_line(cmdgen: Run, stock: Path, videos: Path, tmp_path: Path) -> None:
    train = ("-o", tmp_path / "run", "--preset", "cmd-sd21", "--data", videos)

    def refuse(stage: str, *options: object) -> str:
        result = cmdgen("train", stage, *train, *options)
        assert result.code == 2 and result.err.count("\n") == 1, result.err
        assert not (tmp_path / "run").exists()
        return result.err

    # mini's text is 128 wide, this preset's 16
    mini = Path(__file__).parents[2] / "cmdgen/assets/mini"
    assert "text_encoder: hidden_size is 128, preset cmd-sd21 has 16" in refuse("autoencoder", "--init", mini)
    shutil.rmtree(stock / "scheduler")
    message = refuse("autoencoder", "--init", stock)
    assert "has unet/ but no scheduler/: whether its UNet predicts noise or velocity" in message


def test_frozen_text_must_come_from_somewhere(cmdgen: Run, stock: Path, videos: Path, tmp_path: Path) -> None:
    few = ("--steps", 1, "--batch", 2, "--accumulate", 1)
    train = ("-o", tmp_path / "run", "--preset", "cmd-sd21", "--data", videos, *few)
    assert cmdgen("train", "autoencoder", *train, "--init", stock).code == 0
    refused = cmdgen("train", "content", *train)
    assert refused.code == 2
    assert "has no tokenizer/ that could stay frozen: give --init a folder" in refused.err
    # else --restart would remove the tokenizer that it starts from
    shutil.copytree(stock / "tokenizer", tmp_path / "run" / "tokenizer")
    refused = cmdgen("train", "content", *train, "--init", tmp_path / "run", "--restart")
    assert refused.code == 2 and "cannot start from itself: leave --init out" in refused.err
    assert (tmp_path / "run" / "tokenizer" / "vocab.json").is_file()
