"""The plan of all stages, without the training itself."""

import io
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from cmdgen.training import plan as plans
from cmdgen.training.plan import PHASES, GateError, Phase, Plan, write_shards


class Rehearsal(Plan):
    """Write the log that a stage would: so many steps a second, one of which is of four clips."""

    def watch(self, phase, steps):
        self.log(phase.stage, {"step": steps, "lr": 0.1})
        self.log(phase.stage, {"step": steps, **{name: 1.01 * least for name, least in phase.gate.items()}})

    def call(self, *arguments):
        if "--steps" in arguments:
            for step in range(1, plans.TRIAL + 1):
                self.log(arguments[1], {"step": step, "lr": 0.1, "samples/s": 1.0 if step == 1 else 40.0})
        return "{}"

    def log(self, stage, record):
        path = self.run / "training" / stage / "log.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")


@pytest.fixture
def plan(tmp_path: Path) -> Rehearsal:
    (tmp_path / "model").mkdir()
    return Rehearsal(tmp_path, "mini", "mini", 10.0, True, True, None, ["--batch", "4"])


def test_shares_are_the_whole_time() -> None:
    assert sum(phase.share for phase in PHASES) == pytest.approx(1)


def test_steps_are_those_that_fit_into_the_time(plan: Rehearsal) -> None:
    plan.follow()
    for phase in PHASES:
        steps = json.loads((plan.run / "training" / phase.stage / "plan.json").read_text())["steps"]
        # ten steps a second, after a trial that took no time
        assert steps == pytest.approx(plans.TRIAL + 10 * 600 * phase.share, abs=2)
        assert plans.recipe("mini", phase.stage).train.warmup > plans.TRIAL
    assert json.loads((plan.run / "report.json").read_text()) == {}


def test_without_a_time_steps_are_the_recipes(plan: Rehearsal) -> None:
    assert replace(plan, minutes=None).train(PHASES[0]) == plans.recipe("mini", "vae").train.steps


def test_a_batch_is_read_in_either_form(plan: Rehearsal) -> None:
    for options in (["--batch", "4"], ["--lr=0.1", "--batch=4"]):
        (plan.run / "training" / "vae" / "log.jsonl").unlink(missing_ok=True)
        steps = replace(plan, options=options).measure(PHASES[0], 60.0)
        assert steps == pytest.approx(plans.TRIAL + 600, abs=2)


def test_a_stage_that_was_killed_after_its_last_step_goes_on(plan: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(plan: Rehearsal, phase: Phase, steps: int) -> None:
        # the last step is in the log before it is evaluated and saved
        plan.log(phase.stage, {"step": steps, "lr": 0.1})
        raise SystemExit(137)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Rehearsal, "watch", die)
        plan.train(PHASES[0])
    assert len(plan.records("vae")) == plans.TRIAL + 1
    for _ in range(2):
        # once more, and not when it has ended well
        plan.train(PHASES[0])
        assert len(plan.records("vae")) == plans.TRIAL + 3 and plan.records("vae")[-1]["psnr"] > 30


def test_a_gate_stops_the_plan_and_names_the_figure(plan: Rehearsal) -> None:
    plan.log("vae", {"step": 100, "lr": 0.1})
    plan.log("vae", {"step": 100, "psnr": 29.5, "psnr_subject": 27.0})
    with pytest.raises(GateError, match=r"vae: psnr is 29\.5 after 100 of 100 steps, not 30\.0"):
        plan.check("vae", PHASES[0].gate, 100)
    replace(plan, gates=False).check("vae", PHASES[0].gate, 100)


def test_a_stage_that_will_fail_is_stopped(plan: Rehearsal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "LOOK", 0.1)
    monkeypatch.setattr(plans, "_arguments", lambda _: [sys.executable, "-c", "import time; time.sleep(60)"])
    for phase in PHASES:
        plan.log(phase.stage, {"step": 100, "lr": 0.1})
        plan.log(phase.stage, {"step": 100, **{name: 0.5 * least for name, least in phase.early_gate.items()}})
        if phase.early_gate:
            with pytest.raises(GateError):
                Plan.watch(plan, phase, 100)


def test_shards_are_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "SHARD", 5000)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_bytes(bytes(range(256)) * 64)
    write_shards(tmp_path / "run", tmp_path / "out" / "run")
    shards = sorted((tmp_path / "out").iterdir())
    assert all(shard.stat().st_size <= 5000 for shard in shards) and len(shards) > 3
    with tarfile.open(fileobj=io.BytesIO(b"".join(shard.read_bytes() for shard in shards))) as archive:
        packed = archive.extractfile("run/file")
        assert packed is not None and packed.read() == bytes(range(256)) * 64
