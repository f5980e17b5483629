"""The loop on a stage that learns one linear map, in milliseconds."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cmdgen.training import checkpoint, loop
from cmdgen.training.config import Loss, Shared, Start, TrainConfig
from cmdgen.training.context import Run
from cmdgen.training.data import open_data
from cmdgen.training.ema import Ema
from cmdgen.training.loop import Batch, Stage, learning_rate, train
from cmdgen.training.randomness import Order, seeded
from tests.conftest import tiny_config

CONFIG = TrainConfig(steps=8, batch=8, lr=0.01, warmup=3, log_steps=3, evaluate_steps=100, ema=0.9)


class LinearStage(Stage):
    def __init__(self, *, fail_at: int = -1, seconds: float = 0.0) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.modules: dict[str, nn.Module] = {"model": self.model}
        self.fail_at, self.seconds = fail_at, seconds

    def batch(self, step: int) -> Batch:
        if step == self.fail_at:
            raise KeyboardInterrupt
        time.sleep(self.seconds)
        return {"x": torch.randn(8, 3, generator=seeded(step))}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return (self.model(batch["x"]) - batch["x"][:, :2]).square().mean(), {}

    def evaluate(self) -> dict[str, float]:
        return {"weight": float(self.model.weight.sum())}

    def sheet(self) -> Tensor:
        return torch.zeros(2, 2, 3, dtype=torch.uint8)

    def export(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        torch.save(self.model.state_dict(), folder / "model.pt")


def fit(folder: Path, config: TrainConfig = CONFIG, stage: LinearStage | None = None) -> LinearStage:
    stage, cpu, model = stage or LinearStage(), torch.device("cpu"), tiny_config()
    data = open_data("mini", 1, model, cpu)
    train(stage, Run("linear", Start(folder), Shared(), config, Loss(), model, data, cpu))
    return stage


def state(folder: Path) -> Path:
    return folder / "training" / "linear"


def log(folder: Path) -> list[dict[str, float]]:
    lines = (state(folder) / "log.jsonl").read_text().splitlines()
    timed = ("samples/s", "seconds")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole")
    parts = fit(tmp_path / "parts", replace(CONFIG, accumulate=4))
    torch.testing.assert_close(parts.model.state_dict(), whole.model.state_dict())


def test_kill_loses_at_most_the_steps_since_the_checkpoint(tmp_path: Path) -> None:
    expected = fit(tmp_path / "whole")
    config = replace(CONFIG, save_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", config, LinearStage(fail_at=5))
    assert checkpoint.load_checkpoint(state(tmp_path / "killed") / "checkpoint.pt")["step"] == 5
    continued = fit(tmp_path / "killed", config)
    assert torch.equal(continued.model.weight, expected.model.weight)
    assert log(tmp_path / "killed") == log(tmp_path / "whole")


def test_batches_made_ahead_are_those_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = LinearStage(fail_at=6)
    monkeypatch.setattr(loop._Batches, "_pin", lambda self, step: self.stage.batch(step))
    batches = loop._Batches(stage, torch.device("cpu"))
    batches.worker = ThreadPoolExecutor(1)
    # a run that goes on begins anywhere
    for step in (3, 4, 0, 1, 5):
        assert torch.equal(batches.take(step)["x"], stage.batch(step)["x"])
    with pytest.raises(KeyboardInterrupt):
        batches.take(6)


def test_the_optimizer_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    fit(tmp_path, replace(CONFIG, steps=1, betas=(0.5, 0.75), weight_decay=0.125))
    matrices, vectors = checkpoint.load_checkpoint(state(tmp_path) / "checkpoint.pt")["optimizer"]["param_groups"]
    assert matrices["betas"] == vectors["betas"] == (0.5, 0.75)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.125, 0.0)


def test_log_forgets_what_the_checkpoint_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 2, "loss": 1}\n{"step": 4, "loss": 2}\n{"step": 5, "lo')
    checkpoint.Log(path, 3).close()
    assert path.read_text() == '{"step": 2, "loss": 1}\n'


def test_checkpoint_that_fails_half_way_leaves_the_former_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save_checkpoint(path, {"step": 1})

    def fail(state: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save_checkpoint(path, {"step": 2})
    assert checkpoint.load_checkpoint(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        checkpoint.load_checkpoint(path)


def test_other_batch_or_shape_is_refused(tmp_path: Path) -> None:
    fit(tmp_path)
    with pytest.raises(ValueError, match="trained with batch 8 and seed 0"):
        fit(tmp_path, replace(CONFIG, batch=4, steps=9))
    wider = LinearStage()
    wider.modules["model"] = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="another shape"):
        fit(tmp_path, replace(CONFIG, steps=9), wider)


def test_minutes_end_the_run_in_time_with_a_checkpoint(tmp_path: Path) -> None:
    begun = time.monotonic()
    fit(tmp_path, replace(CONFIG, steps=10_000, minutes=0.1 / 60), LinearStage(seconds=0.01))
    assert time.monotonic() - begun < 5
    step = checkpoint.load_checkpoint(state(tmp_path) / "checkpoint.pt")["step"]
    assert 0 < step < 10_000
    assert log(tmp_path)[-1]["step"] == step


def test_diverged_weights_are_never_saved(tmp_path: Path) -> None:
    stage = LinearStage()
    nn.init.constant_(stage.model.weight, float("inf"))
    with pytest.raises(FloatingPointError, match="not finite"):
        fit(tmp_path, stage=stage)
    assert not (state(tmp_path) / "checkpoint.pt").exists()


def test_export_holds_the_averaged_weights(tmp_path: Path) -> None:
    stage = fit(tmp_path)
    exported = torch.load(tmp_path / "model.pt", weights_only=True)
    averages = checkpoint.load_checkpoint(state(tmp_path) / "checkpoint.pt")["ema"]
    assert torch.equal(exported["weight"], averages["model.weight"])
    assert not torch.equal(exported["weight"], stage.model.weight)


def test_ema_of_a_ramp_is_its_closed_form() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    ema = Ema({"m": module}, decay=0.5)
    # past the warm-up of the decay
    ema.updates = 100
    for step in range(1, 11):
        module.weight.data.fill_(step)
        ema.update()
    # sum over k of (1 - d) d^(n - k) k = n - d (1 - d^n) / (1 - d)
    expected = 10 - 0.5 * (1 - 0.5**10) / 0.5
    assert float(ema.averages["m.weight"]) == pytest.approx(expected)
    with ema.swapped():
        assert module.weight.item() == pytest.approx(expected)
    assert module.weight.item() == 10


def test_learning_rate_warms_up_and_ends_at_its_fraction() -> None:
    config = TrainConfig(steps=100, warmup=10, lr=1e-3, final_lr=0.1)
    assert learning_rate(config, 0) == pytest.approx(1e-4)
    assert learning_rate(config, 10) == pytest.approx(1e-3)
    assert learning_rate(config, 55) == pytest.approx(5.5e-4)
    assert learning_rate(config, 100) == pytest.approx(1e-4)


def test_order_shows_every_row_once_in_a_pass() -> None:
    order = Order(10, seed=3)
    rows = torch.cat([order.rows(step, 4) for step in range(5)])
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))
    assert torch.equal(Order(10, seed=3).rows(4, 4), rows[16:])
