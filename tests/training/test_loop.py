"""The loop on a stage that learns one linear map, in milliseconds."""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cmdgen.training import checkpoint, loop
from cmdgen.training.config import Loss, Shared, Start, TrainConfig
from cmdgen.training.context import Run
from cmdgen.training.data import open_data
from cmdgen.training.ema import Ema
from cmdgen.training.loop import Batch, Stage, learning_rate, train
from cmdgen.training.randomness import Order, seeded
from cmdgen.weights import read_tensors, save_tensors
from tests.conftest import tiny_config
from tests.killing import full_disk

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
        save_file(self.model.state_dict(), folder / "model.safetensors")


def fit(folder: Path, config: TrainConfig = CONFIG, stage: LinearStage | None = None) -> LinearStage:
    stage, cpu, model = stage or LinearStage(), torch.device("cpu"), tiny_config()
    data = open_data("mini", 1, model, cpu)
    train(stage, Run("linear", Start(folder), Shared(), config, Loss(), model, data, cpu))
    return stage


def state(folder: Path) -> Path:
    return folder / "training" / "linear"


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    read = checkpoint.load_checkpoint(state(folder))
    assert read is not None and read.tensors is not None
    return read.tensors, read.state


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
    assert load(tmp_path / "killed")[1]["step"] == 5
    continued = fit(tmp_path / "killed", config)
    assert torch.equal(continued.model.weight, expected.model.weight)
    assert log(tmp_path / "killed") == log(tmp_path / "whole")


def test_a_clip_that_cannot_be_read_costs_no_step_that_was_done(tmp_path: Path) -> None:
    class Unreadable(LinearStage):
        def batch(self, step: int) -> Batch:
            if step == 5:
                raise ValueError("a.mp4 is not a readable video")
            return super().batch(step)

    with pytest.raises(ValueError, match=r"a\.mp4 is not"):
        fit(tmp_path, stage=Unreadable())
    assert load(tmp_path)[1]["step"] == 5


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


def test_options_of_the_optimizer_may_change_on_the_way(tmp_path: Path) -> None:
    model, data, cpu = tiny_config(), open_data("mini", 1, tiny_config(), torch.device("cpu")), torch.device("cpu")
    for steps, betas in ((1, (0.5, 0.75)), (2, (0.25, 0.5))):
        config = replace(CONFIG, steps=steps, betas=betas, weight_decay=0.125)
        run = Run("linear", Start(tmp_path), Shared(), config, Loss(), model, data, cpu)
        matrices, vectors = loop._State(LinearStage(), run).optimizer.param_groups
        assert matrices["betas"] == vectors["betas"] == betas
        assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.125, 0.0)
        train(LinearStage(), run)


def test_log_keeps_whole_records_that_the_checkpoint_knows(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    kept = b'{"step": 2, "loss": 1}\n{"step": 3, "psnr": Infinity}\n'
    bad = (
        b"\xff\xfe",
        b"\0" * 50,
        b"[" * 100_000,
        b"5",
        b"{}",
        b'{"step": "x"}',
        b'{"step": 1e999}',
        b'{"step": true}',
    )
    path.write_bytes(b"\n".join(bad) + b"\n" + kept + b'{"step": 4, "loss": 2}\n{"step": 3, "lo')
    checkpoint.Log(path, 3).close()
    assert path.read_bytes() == kept


def test_a_full_disk_leaves_the_former_checkpoint(tmp_path: Path) -> None:
    fit(tmp_path, replace(CONFIG, steps=2))
    (path,) = state(tmp_path).glob("*.safetensors")
    former = path.read_bytes()
    with full_disk(len(former) // 2), pytest.raises(OSError, match=f"^{path} was not written: File too large$"):
        fit(tmp_path, replace(CONFIG, steps=3))
    assert path.read_bytes() == former
    assert not [*tmp_path.rglob(".*")]
    assert log(tmp_path)[-1]["step"] == 3
    fit(tmp_path, replace(CONFIG, steps=3))
    fit(tmp_path / "whole", replace(CONFIG, steps=3))
    assert path.read_bytes() == next(state(tmp_path / "whole").glob("*.safetensors")).read_bytes()


def change(path: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    """Write a checkpoint whose digest is right, but whose contents are not those of the loop."""
    tensors, metadata = read_tensors(path)
    tensors, values = {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(metadata["state"])
    edit(tensors, values)
    checkpoint.save_checkpoint(path.parent, tensors, values)


def flip(path: Path, *bits: int) -> None:
    data = bytearray(path.read_bytes())
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: flip(path, -8 * 4 + 3), "is damaged: its digest is another one"),
        (lambda path: flip(path, 8 * 60), "not a readable checkpoint: use --restart"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "not a readable checkpoint: use --restart"),
        (lambda path: path.write_bytes(b"PK\x03\x04 cut off"), "not a readable checkpoint: use --restart"),
        (lambda path: path.write_bytes(b""), "not a readable checkpoint: use --restart"),
        (lambda path: save_file({"a": torch.ones(2)}, path), "is damaged: it has no digest"),
        (lambda path: save_tensors(path, {"a": torch.ones(2)}), "not a readable checkpoint: use --restart"),
        (lambda path: change(path, lambda _, values: values.pop("step")), "step None is no count: use --restart"),
        (lambda path: change(path, lambda _, values: values.update(step=1.5)), "step 1.5 is no count"),
        (lambda path: change(path, lambda _, values: values.update(summed="a")), "summed 'a' is no count"),
        (lambda path: change(path, lambda _, values: values.update(origin=5)), "was trained with another stage"),
        (
            lambda path: change(path, lambda tensors, _: tensors.pop("ema.model.bias")),
            "of another shape: use --restart",
        ),
        (lambda path: change(path, lambda tensors, _: tensors.update({"sums.x": torch.ones(2)})), "of another shape"),
        (lambda path: (path.unlink(), path.with_name("checkpoint.pt").touch()), "pickled, as an earlier version did"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "is not a file"),
    ],
)
def test_damaged_checkpoint_is_one_line(tmp_path: Path, damage: Callable[[Path], object], says: str) -> None:
    fit(tmp_path, replace(CONFIG, steps=2))
    damage(state(tmp_path) / "checkpoint.safetensors")
    with pytest.raises(ValueError, match=f"^{state(tmp_path)}/checkpoint.*{says}") as error:
        fit(tmp_path, replace(CONFIG, steps=3))
    assert "\n" not in str(error.value)


def test_other_batch_or_shape_is_refused(tmp_path: Path) -> None:
    fit(tmp_path)
    for change, says in (({"batch": 4}, "trained with batch 8"), ({"seed": 1}, "trained with seed 0")):
        with pytest.raises(ValueError, match=f"{says}: repeat the former command, or use --restart"):
            fit(tmp_path, replace(CONFIG, **change, steps=9))
    wider = LinearStage()
    wider.modules["model"] = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="another shape"):
        fit(tmp_path, replace(CONFIG, steps=9), wider)


def test_minutes_end_the_run_in_time_with_a_checkpoint(tmp_path: Path) -> None:
    fit(tmp_path, replace(CONFIG, steps=10_000, minutes=0.1 / 60), LinearStage(seconds=0.01))
    step = load(tmp_path)[1]["step"]
    assert 0 < step < 10_000
    assert log(tmp_path)[-1]["step"] == step


def test_diverged_weights_are_never_saved(tmp_path: Path) -> None:
    stage = LinearStage()
    nn.init.constant_(stage.model.weight, float("inf"))
    with pytest.raises(FloatingPointError, match="not finite"):
        fit(tmp_path, stage=stage)
    assert not (state(tmp_path) / "checkpoint.safetensors").exists()


def test_export_holds_the_averaged_weights(tmp_path: Path) -> None:
    stage = fit(tmp_path)
    exported = load_file(tmp_path / "model.safetensors")
    assert torch.equal(exported["weight"], load(tmp_path)[0]["ema.model.weight"])
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
