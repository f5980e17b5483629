"""All four stages on drawn shapes: a folder that samples, resumed exactly, reading each other's parts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cmdgen.config import SampleConfig, WorldConfig
from cmdgen.data.world import World
from cmdgen.pipeline import TextToVideo
from cmdgen.training.config import STAGES, StageConfig, TrainConfig
from cmdgen.training.data import TrainingData
from cmdgen.training.run import run_stage
from cmdgen.weights import read_config
from cmdgen.config import AutoencoderConfig, VaeConfig
from tests.conftest import tiny_config

SHAPES = WorldConfig(
    motions=("jumping", "spinning"), scenes=("grass", "sky"), pairs=0.0, sprites="shapes"
)
CONFIG = TrainConfig(steps=2, batch=4, warmup=2, log_steps=1, evaluate_steps=10)


def run(folder: Path, stage: str, **changes: Any) -> int:
    model = tiny_config()
    name = changes.pop("data", "shapes")
    cpu = torch.device("cpu")
    data = TrainingData(World(SHAPES), name, 10, model.frames, (model.height, model.width), cpu)
    options = changes.pop("options", StageConfig())
    return run_stage(
        stage,
        folder,
        model,
        data,
        replace(CONFIG, **changes),
        options,
        device=cpu,
        report=lambda *_: None,
        stopped=lambda: False,
        shared={},
        started=0.0,
    )


def curve(folder: Path, stage: str) -> list[dict[str, float]]:
    lines = (folder / "training" / stage / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: r[k] for k in ("step", "loss", "grad", "lr")} for r in records if "loss" in r]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    for stage in STAGES:
        assert run(folder, stage) == 2
    return folder


def test_four_stages_give_a_folder_that_samples(trained: Path) -> None:
    clip = TextToVideo.load(trained).sample("a square jumping", SampleConfig(seed=1))
    assert clip.frames.shape == (4, 32, 48, 3)
    for stage in STAGES:
        state = trained / "training" / stage
        assert (state / "sheet-0000002.png").read_bytes().startswith(b"\x89PNG")
        assert [record["step"] for record in curve(trained, stage)] == [1, 2]


def test_latents_and_motion_are_measured_on_the_training_clips(trained: Path) -> None:
    vae = read_config(trained / "vae", VaeConfig)
    assert vae.scaling_factor != VaeConfig.scaling_factor
    autoencoder = read_config(trained / "autoencoder", AutoencoderConfig)
    assert (autoencoder.motion_std is None) == (autoencoder.motion_activation == "tanh")
