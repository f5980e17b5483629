"""Train all stages of a model, each behind a gate: no hour goes to a stage that cannot win.

    python -m cmdgen.training.plan RUN -- --precision bf16 --threads 1
    python -m cmdgen.training.plan RUN --minutes 9 --shards OUT

Without --minutes each stage has the steps of its recipe. With it each has its share of the time: its
first steps show how fast it is, and its learning rate ends with its time. What follows -- goes to
every stage. Started again, it goes on where it was; a gate that failed stops it with exit code 1.
The model is in RUN/model, its report by `cmdgen eval` in RUN/report.json.
"""

import argparse
import io
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmdgen.files import read_json, write_json
from cmdgen.training.config import recipe

# bytes of a shard, seconds between looks at the log
SHARD, LOOK = 2**24, 5.0
# fewer than those of the warm-up, so that the learning rate is that of the whole stage
TRIAL = 20
# glibc keeps the pages that it has: a step of the autoencoder takes a tenth less CPU time, encoding a
# fifth
_MALLOC = {"MMAP_THRESHOLD_": 4_000_000_000, "TRIM_THRESHOLD_": 8_000_000_000, "TOP_PAD_": 200_000_000}
ENVIRONMENT = {f"MALLOC_{name}": str(value) for name, value in _MALLOC.items()} | os.environ


@dataclass(frozen=True)
class Phase:
    """One stage: its share of the time, and the least figures that it must reach."""

    stage: str
    share: float
    gate: Mapping[str, float] = field(default_factory=dict)
    # what an evaluation must show from this share of the steps on
    early_share: float = 1.0
    early_gate: Mapping[str, float] = field(default_factory=dict)


PHASES = (
    Phase("vae", 0.2, {"psnr": 30.0, "psnr_subject": 24.0}, 0.5, {"psnr": 24.0, "psnr_subject": 19.0}),
    Phase(
        *("autoencoder", 0.43, {"psnr": 26.5, "psnr_subject": 20.5, "time_variance_ratio": 0.8}),
        *(0.25, {"time_variance_ratio": 0.5}),
    ),
    Phase("content", 0.19),
    Phase("motion", 0.15, {"text_shift": 0.4}, 0.2, {"text_shift": 0.1}),
    Phase("decoder", 0.03),
)


class GateError(Exception):
    """A figure is below its gate."""


@dataclass(frozen=True)
class Plan:
    """A run, how long it may take, and what every stage is told."""

    run: Path
    preset: str
    data: str
    minutes: float | None
    gates: bool
    measured: bool
    shards: Path | None
    options: list[str]

    def follow(self) -> None:
        """Run what is left of all stages, export the model and measure it; raise GateError."""
        for phase in PHASES:
            steps = self.train(phase)
            self.check(phase.stage, phase.gate, steps)
            if self.shards is not None:
                write_shards(self.run / "training" / phase.stage, self.shards / phase.stage)
        self.call("train", "export", self.run, self.run / "model")
        if self.shards is not None:
            write_shards(self.run / "model", self.shards / "model")
        if self.measured:
            probe = self.run / "model" / "probe"
            self.call("eval", "--train-probe", probe, "--data", self.data)
            report = self.call("eval", self.run / "model", "--probe", probe, "--data", self.data, "--json")
            (self.run / "report.json").write_text(report)

    def train(self, phase: Phase) -> int:
        """Train a stage to its end; return its steps."""
        path = self.run / "training" / phase.stage / "plan.json"
        if not path.exists():
            steps = recipe(self.preset, phase.stage).train.steps
            if self.minutes is not None:
                steps = self.measure(phase, 60 * self.minutes * phase.share)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"steps": steps})
        settled = read_json(path)
        steps = int(settled["steps"])
        # the last step may be in the log of a stage that was killed before it was saved
        if not settled.get("done"):
            self.watch(phase, steps)
            write_json(path, {"steps": steps, "done": True})
        return steps

    def measure(self, phase: Phase, seconds: float) -> int:
        """Return the steps that a stage takes in a time, after a trial of `TRIAL` steps."""
        started = time.monotonic()
        self.call(*self.command(phase.stage, TRIAL), "--log-every", 1)
        rates = sorted(record["samples/s"] for record in self.records(phase.stage) if "samples/s" in record)
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--batch", type=int, default=recipe(self.preset, phase.stage).train.batch)
        batch = parser.parse_known_args(self.options)[0].batch
        # encoding is in the time that is spent; the first step, which is slow, is not in the median
        left = seconds - (time.monotonic() - started)
        return TRIAL + max(1, int(left * rates[len(rates) // 2] / batch))

    def command(self, stage: str, steps: int) -> list[Any]:
        """Return the arguments of `cmdgen` that train a stage."""
        shared = ["--preset", self.preset, "--data", self.data, "--steps", steps, "--quiet"]
        return ["train", stage, "-o", self.run, *shared, *self.options]

    def watch(self, phase: Phase, steps: int) -> None:
        """Train a stage, and stop it where an evaluation shows that it will fail."""
        command = _arguments(self.command(phase.stage, steps))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
        try:
            while process.poll() is None:
                time.sleep(LOOK)
                if self.read_step(phase.stage) >= phase.early_share * steps:
                    self.check(phase.stage, phase.early_gate, steps)
        finally:
            if process.poll() is None:
                process.terminate()
            code = process.wait()
        if code:
            raise SystemExit(code)

    def check(self, stage: str, gate: Mapping[str, float], steps: int) -> None:
        """Raise GateError where the last evaluation is below a gate."""
        figures = next((r for r in reversed(self.records(stage)) if "lr" not in r), {})
        below = {name: figures[name] for name, least in gate.items() if figures.get(name, math.inf) < least}
        for name, value in below.items() if self.gates else ():
            step = int(figures["step"])
            raise GateError(f"{stage}: {name} is {value:.4g} after {step} of {steps} steps, not {gate[name]}")

    def records(self, stage: str) -> list[dict[str, float]]:
        """Return the lines of a stage's log."""
        path = self.run / "training" / stage / "log.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def read_step(self, stage: str) -> int:
        """Return the last step in the log."""
        return max((int(record["step"]) for record in self.records(stage)), default=0)

    def call(self, *arguments: Any) -> str:
        """Run `cmdgen`; return what it prints."""
        done = subprocess.run(_arguments(arguments), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        if done.returncode:
            raise SystemExit(done.returncode)
        return done.stdout


def _arguments(arguments: Any) -> list[str]:
    return [sys.executable, "-m", "cmdgen", *map(str, arguments)]


def write_shards(folder: Path, target: Path) -> None:
    """Write a folder as target.tar.000, ... of at most 16 MiB; `cat target.tar.* | tar x` reads them."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(folder, arcname=folder.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    data = packed.getvalue()
    for number, start in enumerate(range(0, len(data), SHARD)):
        target.with_name(f"{target.name}.tar.{number:03d}").write_bytes(data[start : start + SHARD])


def main(arguments: list[str]) -> int:
    """Follow the plan that the command line gives; return the exit code."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="python -m cmdgen.training.plan")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--data", default="mini", help="a rendered world")
    parser.add_argument("--minutes", type=float, help="time for all stages; default: the steps of the recipes")
    parser.add_argument("--no-gates", dest="gates", action="store_false", help="go on whatever the figures are")
    parser.add_argument("--no-eval", dest="measured", action="store_false", help="train and export alone")
    parser.add_argument("--shards", type=Path, help="also pack checkpoints and the model into files of 16 MiB")
    # so that the stage that runs is stopped too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        Plan(**vars(parser.parse_args(arguments[:end])), options=arguments[end + 1 :]).follow()
    except GateError as error:
        print(f"gate failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
