"""The one training loop: AdamW, warm-up, accumulation, EMA, logs, sheets, exact resume.

What is trained is a Stage: its trainable modules, a batch for every step (a function of the step
alone), a loss, an evaluation, a sheet of samples and how to export itself.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cmdgen.training.checkpoint import Log, load_checkpoint, save_checkpoint
from cmdgen.training.config import TrainConfig
from cmdgen.training.ema import Ema
from cmdgen.training.sheets import write_png

Batch = dict[str, Tensor]
# what is going on, how much is done, of how much, latest figures
Report = Callable[[str, int, int, dict[str, float]], None]


class Stage(Protocol):
    """What the loop trains."""

    modules: dict[str, nn.Module]

    def batch(self, step: int) -> Batch:
        """Tensors of one update, the same whenever the same step is asked for."""

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """A mean over the batch, and named parts of it for the log."""

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data."""

    def sheet(self) -> Tensor:
        """() -> (H, W, 3) uint8, a picture of what the weights do."""

    def export(self, folder: Path) -> None:
        """Writes the trained parts into a model folder."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine from lr to final_lr * lr at the last step."""
    warm = min(1.0, (step + 1) / max(config.warmup, 1))
    progress = max(0, step - config.warmup) / max(config.steps - config.warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.lr * warm * (config.final_lr + (1 - config.final_lr) * cosine)


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether forward passes run in bfloat16 autocast; by default on GPUs alone."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def train(
    stage: Stage,
    config: TrainConfig,
    state_folder: Path,
    model_folder: Path,
    *,
    device: torch.device,
    report: Report,
    stopped: Callable[[], bool] = lambda: False,
    started: float | None = None,
) -> int:
    """Trains until the last step, the last minute or until stopped; returns the steps done.

    `state_folder` holds checkpoint.pt, log.jsonl and sheet-*.png; a checkpoint in it is continued.
    `started` is the time.monotonic() from which `minutes` count.
    Raises FloatingPointError where the weights have diverged; those are not saved.
    """
    started = time.monotonic() if started is None else started
    run = _Run(stage, config, state_folder, model_folder, device)
    if run.step >= config.steps:
        return run.step
    log = Log(state_folder / "log.jsonl", run.step)
    deadline = math.inf if config.minutes is None else started + 60 * config.minutes
    last_save = last_log = time.monotonic()
    logged = run.step
    figures: dict[str, float] = {}
    # seconds that a step, and saving with evaluation at the end, last took
    step_cost = finish_cost = 0.0
    while run.step < config.steps and not stopped():
        begun = time.monotonic()
        if begun + step_cost + finish_cost > deadline and step_cost:
            break
        run.update()
        step_cost = max(time.monotonic() - begun, 0.9 * step_cost)
        if run.step % config.log_steps == 0 or run.step == 1:
            now = time.monotonic()
            figures = run.take_figures()
            figures["samples/s"] = (run.step - logged) * config.batch / max(now - last_log, 1e-9)
            log.write({"step": run.step, **figures, "seconds": round(now - started, 1)})
            last_log, logged = now, run.step
        report("train", run.step, config.steps, figures)
        finished = run.step == config.steps
        if not finished and run.step % config.evaluate_steps == 0:
            begun = time.monotonic()
            log.write({"step": run.step, **run.evaluate()})
            finish_cost = max(finish_cost, time.monotonic() - begun)
        if not finished and time.monotonic() - last_save >= config.save_seconds:
            begun = time.monotonic()
            run.save()
            last_save = time.monotonic()
            finish_cost = max(finish_cost, last_save - begun)
    report("evaluate", run.step, config.steps, figures)
    log.write({"step": run.step, **run.evaluate()})
    run.save()
    log.close()
    return run.step


class _Run:
    """Weights, optimiser, averages and running figures at a step: what a checkpoint holds."""

    def __init__(
        self, stage: Stage, config: TrainConfig, folder: Path, model: Path, device: torch.device
    ) -> None:
        self.stage, self.config, self.folder, self.model = stage, config, folder, model
        self.step = 0
        self.sums: dict[str, Tensor] = {}
        self.summed = 0
        self.device, self.bf16 = device, uses_bf16(config.precision, device)
        parameters = [p for m in stage.modules.values() for p in m.parameters() if p.requires_grad]
        self.parameters = parameters
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        self.ema = Ema(stage.modules, config.ema)
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint = folder / "checkpoint.pt"
        if self.checkpoint.exists():
            self._load(load_checkpoint(self.checkpoint))

    def update(self) -> None:
        """One optimiser step."""
        config = self.config
        lr = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = self.stage.batch(self.step)
        self._add("lr", torch.tensor(lr))
        parts = config.accumulate
        for part in range(parts):
            with self._autocast():
                loss, named = self.stage.loss(
                    {name: tensor.chunk(parts)[part] for name, tensor in batch.items()}
                )
            (loss / parts).backward()
            for name, value in {"loss": loss, **named}.items():
                self._add(name, value.detach().float() / parts)
        norm = nn.utils.clip_grad_norm_(self.parameters, config.clip_norm, foreach=True)
        self._add("grad", norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        self.step += 1
        self.summed += 1

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def take_figures(self) -> dict[str, float]:
        """Means since the last call."""
        figures = {name: float(value) / self.summed for name, value in self.sums.items()}
        self.sums, self.summed = {}, 0
        if not math.isfinite(figures["grad"]):
            raise FloatingPointError(
                f"the gradient is not finite at step {self.step}: run again with a lower --lr"
                " (it continues from the last checkpoint)"
            )
        return figures

    def evaluate(self) -> dict[str, float]:
        """Figures of the averaged weights, and their sheet on disk."""
        with self._averaged(), self._autocast():
            figures = self.stage.evaluate()
            write_png(self.folder / f"sheet-{self.step:07d}.png", self.stage.sheet())
        return figures

    def save(self) -> None:
        """Checkpoint first, then the averaged weights into the model folder."""
        if not all(math.isfinite(float(value)) for value in self.sums.values()):
            raise FloatingPointError(
                f"the loss is not finite before step {self.step}: run again with a lower --lr"
                " (it continues from the last checkpoint)"
            )
        state = {
            "step": self.step,
            "modules": {name: m.state_dict() for name, m in self.stage.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "sums": self.sums,
            "summed": self.summed,
            "data": json.dumps([self.config.batch, self.config.seed]),
        }
        save_checkpoint(self.checkpoint, state)
        with self._averaged():
            self.stage.export(self.model)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        with torch.no_grad(), self.ema.swapped():
            yield

    def _load(self, state: dict[str, Any]) -> None:
        data = json.loads(state["data"])
        if data != [self.config.batch, self.config.seed]:
            raise ValueError(
                f"{self.checkpoint} was trained with batch {data[0]} and seed {data[1]}:"
                " repeat them, or use --restart"
            )
        try:
            for name, module in self.stage.modules.items():
                module.load_state_dict(state["modules"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            for moments in self.optimizer.state.values():
                # off the file, which the next checkpoint replaces
                moments |= {name: tensor.clone() for name, tensor in moments.items()}
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.checkpoint} is of a model of another shape: use --restart"
            ) from error
        self.ema.load_state_dict(state["ema"], state["step"])
        self.sums, self.summed, self.step = state["sums"], state["summed"], state["step"]
