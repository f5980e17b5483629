"""Training EVDM: which frames it is given, what it reports, and that it continues exactly."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cmdgen.config import PRESETS, EvdmConfig, ModelConfig
from cmdgen.store.parts import read_model
from cmdgen.training.config import EvdmLoss, Shared, Start, TrainConfig, build_model
from cmdgen.training.context import Run
from cmdgen.training.data import open_data
from cmdgen.training.evdm import EvdmStage, draw_known, weigh_frames
from cmdgen.training.run import run_stage, settle

CPU = torch.device("cpu")
CONFIG = TrainConfig(steps=2, batch=4, warmup=2, log_steps=1, evaluate_steps=10, held_out=4)


def tiny(**changes: object) -> ModelConfig:
    content = replace(
        EvdmConfig(past=2, current=2, future=2, patch=2, width=8, multipliers=(1, 2), attention="gated"), **changes
    )
    return replace(PRESETS["evdm-small"], content=content, frames=content.frames, height=32, width=48)


def build(folder: Path, model: ModelConfig, *, steps: int = 2, **options: float) -> Run:
    loss = EvdmLoss(min_snr=0.0, **options)
    data, config = open_data("shapes", 10, model, CPU), replace(CONFIG, steps=steps)
    return Run("evdm", Start(folder), Shared("evdm-small", "world"), config, loss, model, data, CPU)


def test_the_nearest_frames_are_known_in_the_shares_asked_for() -> None:
    known = draw_known(4000, 5, 0.25, 0.4, torch.Generator().manual_seed(0))
    count = known.sum(1)
    # nearest first: after an unknown frame none is known
    assert torch.equal(known, torch.arange(5) < count[:, None])
    assert float((count == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert float((count == 5).float().mean()) == pytest.approx(0.75 * (0.6 + 0.4 / 5), abs=0.03)
    assert draw_known(9, 5, 0.0, 0.0, torch.Generator()).all()
    assert not draw_known(9, 5, 1.0, 0.0, torch.Generator()).any()
    assert draw_known(9, 0, 0.5, 0.5, torch.Generator()).shape == (9, 0)


def test_unknown_frames_are_0_and_the_known_are_the_clips(tmp_path: Path) -> None:
    stage = EvdmStage(build(tmp_path, tiny(), partial=0.5))
    batch = stage.batch(0)
    frames = stage.read(stage.data.training[stage.order.rows(0, 4)])
    assert torch.equal(batch["x0"], frames[:, :, 2:4])
    whole = torch.cat([frames[:, :, :2], frames[:, :, 4:]], dim=2)
    shown = batch["context"].flatten(3).any(3, keepdim=True)[..., None]
    assert torch.equal(batch["context"], whole * shown)
    # of the past the last frame is the nearest
    assert all(last or not first for first, last in shown[:, 0, :2].flatten(1).tolist())
    assert set(shown.flatten().tolist()) == {True, False}


def test_frames_count_less_the_farther_the_nearest_known_one_is() -> None:
    # after all of the past; between past and future; before the nearest future frame; nothing known
    past = torch.tensor([[True] * 3, [True, False, False], [False] * 3, [False] * 3])
    future = torch.tensor([[False], [True], [True], [False]])
    distance = torch.tensor([[1.0, 2, 3, 4, 5], [1, 2, 3, 2, 1], [5, 4, 3, 2, 1], [1, 1, 1, 1, 1]])
    for power in (0.0, 1.0, 2.0):
        weights = weigh_frames(past, future, 5, power)
        torch.testing.assert_close(weights, distance**-power / (distance**-power).mean(1, keepdim=True))
    assert torch.equal(weigh_frames(past[:, :0], future[:, :0], 2, 2.0), torch.ones(4, 2))


def test_the_loss_weighs_frames(tmp_path: Path) -> None:
    stage = EvdmStage(build(tmp_path, tiny(), past_dropout=0.3, nearness=2.0))
    batch, made = stage.batch(0), torch.zeros(4, 1, 2, 32, 48)
    batch["x0"][:, :, 1] *= 2
    stage.noise = replace(stage.noise, prediction_type="sample")
    stage.predict = lambda *args: made  # type: ignore[method-assign, assignment]
    known = batch["context"].flatten(3).any(3)[:, 0]
    weight = weigh_frames(known[:, :2].flip(1), known[:, 2:], 2, 2.0)
    error = batch["x0"].square().mean(dim=(1, 3, 4))
    assert float(stage.loss(batch)[0]) == pytest.approx(float((weight * error).mean()), rel=1e-5)
    assert float(stage.loss(batch)[0]) != pytest.approx(float(error.mean()), rel=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_resumed_training_equals_training_at_once(tmp_path: Path, channels: int) -> None:
    once, resumed, model = tmp_path / "once", tmp_path / "resumed", tiny(channels=channels)
    assert run_stage(build(once, model, steps=3)) == 3
    run_stage(build(resumed, model, steps=1))
    run_stage(build(resumed, model, steps=3))
    expected, got = (load_file(run / "evdm" / "diffusion_pytorch_model.safetensors") for run in (once, resumed))
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    figures = json.loads((once / "training/evdm/log.jsonl").read_text().splitlines()[-1])
    names = ("predict", "mean", "repeat", "predict_first", "repeat_first", "interpolate", "blend")
    assert {f"psnr_{name}" for name in names} <= figures.keys()
    assert (once / "training/evdm/sheet-0000003.png").exists()
    found = read_model(once)
    assert (found.content, found.frames, found.motion) == (model.content, 6, None)


def test_a_preset_without_future_frames_does_not_interpolate(tmp_path: Path) -> None:
    with torch.no_grad():
        figures = EvdmStage(build(tmp_path, tiny(future=0))).evaluate()
    assert "psnr_predict" in figures and "psnr_interpolate" not in figures


def test_presets_and_stages_belong_together(tmp_path: Path) -> None:
    assert settle(tmp_path, Shared(), "evdm").preset == "evdm-small"
    assert settle(tmp_path, Shared(), "vae").preset == "mini"
    with pytest.raises(ValueError, match="preset mini has no stage evdm, which is of evdm-small"):
        settle(tmp_path, Shared("mini"), "evdm")
    with pytest.raises(ValueError, match="preset evdm-sm has no stage motion"):
        settle(tmp_path, Shared("evdm-sm"), "motion")
    with pytest.raises(ValueError, match="frames 20: evdm-small learns from clips of 15"):
        build_model(Shared("evdm-small", frames=20))
    gated = build_model(Shared("evdm-small", attention="gated", attention_threshold=1.0)).content
    assert (gated.attention, gated.attention_threshold) == ("gated", 1.0)


def test_files_are_decoded_once(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reads = tiny(past=1, current=1, future=1), []
    data = open_data(str(videos), None, model, CPU)
    render = type(data.source).render
    monkeypatch.setattr(type(data.source), "render", lambda *args: reads.append(args[1]) or render(*args))
    stage = EvdmStage(replace(build(tmp_path, model), data=data))
    first = stage.read(data.training)
    assert torch.equal(stage.read(data.training.flip(0)), first.flip(0))
    assert torch.equal(first, stage.read(data.training))
    # four to learn from, and one that is held out
    assert sorted(index for some in reads for index in some if isinstance(some, list)) == list(range(5))
