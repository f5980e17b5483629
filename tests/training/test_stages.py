"""All four stages on drawn shapes: each reads the parts of the former ones, and resumes exactly."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cmdgen.config import AutoencoderConfig, VaeConfig
from cmdgen.pipelines.load import load_pipeline
from cmdgen.schema import read_config
from cmdgen.training.config import LOSSES, Loss, Shared, Start, TrainConfig
from cmdgen.training.context import Run
from cmdgen.training.data import open_data
from cmdgen.training.export import export_model
from cmdgen.training.run import run_stage, settle
from cmdgen.training.text import GAIN, WHITENED, WORDINGS, Text
from tests.conftest import tiny_config

CONFIG = TrainConfig(steps=2, batch=4, warmup=2, log_steps=1, evaluate_steps=10, held_out=4)
PARTS = {"vae": "vae", "autoencoder": "autoencoder", "content": "unet", "motion": "motion", "decoder": "vae"}


def describe(
    folder: Path,
    stage: str,
    steps: int = 2,
    *,
    learned: bool = False,
    device: str = "cpu",
    precision: str = "auto",
    loss: Loss | None = None,
    **start: Any,
) -> Run:
    model, place = tiny_config(), torch.device(device)
    model = replace(model, motion=replace(model.motion, learned_sigma=learned, text_whitened=True))
    data, config = open_data("shapes", 10, model, place), replace(CONFIG, steps=steps, precision=precision)
    shared, loss = Shared("mini", "world"), loss or LOSSES[stage]()
    return Run(stage, Start(folder, **start), shared, config, loss, model, data, place)


def run(folder: Path, stage: str, steps: int = 2, **options: Any) -> int:
    return run_stage(describe(folder, stage, steps, **options))


def records(folder: Path, stage: str) -> list[dict[str, float]]:
    lines = (folder / "training" / stage / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def curve(folder: Path, stage: str) -> list[Any]:
    return [(r["step"], r["loss"], r["grad"], r["lr"]) for r in records(folder, stage) if "loss" in r]


def weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder / PARTS[stage] / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    for stage in PARTS:
        assert run(folder, stage) == 2
    return folder


def test_four_stages_give_a_folder_that_samples(trained: Path) -> None:
    clip = load_pipeline(trained).sample("a dog jumping", seed=1)
    assert clip.frames.shape == (4, 32, 48, 3)
    for stage in PARTS:
        assert [step for step, *_ in curve(trained, stage)] == [1, 2]
        sheet = trained / "training" / stage / "sheet-0000002.png"
        assert sheet.read_bytes().startswith(b"\x89PNG")
    last = records(trained, "autoencoder")[-1]
    assert {"psnr", "psnr_subject", "psnr_mean_frame", "psnr_subject_mean_frame"} <= last.keys()
    assert "psnr_edge" in last and {"psnr_subject_jumping", "psnr_subject_spinning"} & last.keys()
    assert {"time_variance_ratio", "text_shift"} <= records(trained, "motion")[-1].keys()


@pytest.mark.gpu
# EVDM is a model of its own
@pytest.mark.parametrize("stage", [stage for stage in LOSSES if stage != "evdm"])
def test_a_gpu_trains_as_a_cpu_does(stage: str, trained: Path, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        shutil.copytree(trained, tmp_path / device)
        run(tmp_path / device, stage, restart=True, device=device)
    expected, steps = curve(tmp_path / "cpu", stage), curve(tmp_path / "cuda", stage)
    # a GPU computes in bfloat16
    for (_, loss, grad, lr), step in zip(expected, steps, strict=True):
        assert step[1:] == (pytest.approx(loss, rel=0.05), pytest.approx(grad, rel=0.2), lr)


def test_scale_of_latents_and_of_motion_are_measured(trained: Path) -> None:
    assert read_config(trained / "vae", VaeConfig).scaling_factor != VaeConfig.scaling_factor
    autoencoder = read_config(trained / "autoencoder", AutoencoderConfig)
    assert (autoencoder.motion_std is None) == (autoencoder.motion_activation == "tanh")


@pytest.mark.parametrize("stage", PARTS)
def test_resumed_training_equals_training_at_once(stage: str, trained: Path, tmp_path: Path) -> None:
    once, resumed = tmp_path / "once", tmp_path / "resumed"
    for folder in (once, resumed):
        shutil.copytree(trained, folder)
        shutil.rmtree(folder / "training" / stage)
    run(once, stage, steps=3)
    run(resumed, stage, steps=1)
    run(resumed, stage, steps=3)
    assert len(curve(once, stage)) == 3
    assert curve(resumed, stage) == curve(once, stage)
    expected = weights(once, stage)
    for name, tensor in weights(resumed, stage).items():
        assert torch.equal(tensor, expected[name]), name


def test_motion_with_learned_variance_trains_on_the_bound(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    run(folder, "motion", restart=True, learned=True)
    assert records(folder, "motion")[0]["bound"] > 0


def test_last_stage_changes_the_decoder_alone_and_keeps_the_cache(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    cached = {path: path.stat().st_mtime_ns for path in (folder / "training" / "cache").rglob("*.safetensors")}
    before, scale = weights(folder, "vae"), read_config(folder / "vae", VaeConfig).scaling_factor
    run(folder, "decoder", restart=True, precision="bf16")
    changed = {name.split(".")[0] for name, tensor in weights(folder, "vae").items() if not tensor.equal(before[name])}
    assert changed == {"decoder", "post_quant_conv"}
    assert read_config(folder / "vae", VaeConfig).scaling_factor == scale
    run(folder, "motion", restart=True)
    assert {path: path.stat().st_mtime_ns for path in cached} == cached
    last = records(folder, "decoder")[-1]
    assert {"psnr", "psnr_subject", "psnr_rebuilt", "psnr_subject_rebuilt"} <= last.keys()


def test_whitening_makes_all_directions_of_the_text_vary_alike(trained: Path) -> None:
    text = Text.read(describe(trained, "motion"))
    mean, whitening = text.whitening()
    data = text.data
    captions = [caption for variant in range(WORDINGS) for caption in data.captions(data.training[:WHITENED], variant)]
    pooled = (text(text.ids(captions)).mean(dim=1) - mean) @ whitening
    deviations = torch.linalg.svdvals(pooled / len(pooled) ** 0.5)
    assert deviations[0] == pytest.approx(GAIN, rel=1e-3)
    # before, the second is a fraction of the first
    assert deviations[1] == pytest.approx(GAIN, rel=0.1)


def test_missing_stage_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no vae/ yet: first run `cmdgen train vae -o "):
        run(tmp_path, "autoencoder")


def test_init_provides_the_parts_that_the_run_lacks(trained: Path, tmp_path: Path) -> None:
    run(tmp_path, "autoencoder", init=trained)
    assert (tmp_path / "vae" / "config.json").read_bytes() == (trained / "vae" / "config.json").read_bytes()


def test_stages_of_a_run_share_what_the_first_was_told(trained: Path) -> None:
    assert settle(trained, Shared(), "vae") == Shared("mini", "world")
    with pytest.raises(ValueError, match="started with the preset's frames, not 8"):
        settle(trained, Shared(frames=8), "vae")
    with pytest.raises(ValueError, match="started with preset mini, not cmd-sd15"):
        settle(trained, Shared("cmd-sd15"), "vae")


def test_export_replaces_another_model_alone_and_when_asked(trained: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    export_model(trained, target, torch.float16)
    (target / "old").touch()
    with pytest.raises(ValueError, match="model exists already: give another folder"):
        export_model(trained, target, torch.float16)
    export_model(trained, target, torch.float32, overwrite=True)
    assert not (target / "old").exists()
    assert load_file(target / "vae/diffusion_pytorch_model.safetensors")["quant_conv.weight"].dtype == torch.float32
    (tmp_path / "mine").mkdir()
    for place in (tmp_path / "mine", tmp_path, trained, trained.parent):
        with pytest.raises(ValueError, match="is not another model, and is not replaced: give another folder"):
            export_model(trained, place, torch.float16, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model"]


def test_export_is_the_model_alone_in_half_precision(trained: Path, tmp_path: Path) -> None:
    (trained / "rehash.json").write_text("{}")
    sizes = export_model(trained, tmp_path / "tiny", torch.float16)
    (trained / "rehash.json").unlink()
    assert (tmp_path / "tiny" / "rehash.json").read_text() == "{}"
    assert not (tmp_path / "tiny" / "training").exists()
    assert all(tensor.dtype == torch.float16 for tensor in weights(tmp_path / "tiny", "vae").values())
    assert "tokenizer/words.json" in sizes
    load_pipeline(tmp_path / "tiny").sample("a cat")
