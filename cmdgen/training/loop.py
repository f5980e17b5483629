"""The one training loop: AdamW, warm-up, accumulation, EMA, logs, sheets, exact resume.

What is trained is a Stage: its trainable modules, a batch for every step (a function of the step
alone), a loss, an evaluation, a sheet of samples and how to export itself.
"""

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from reprlib import repr as short
from typing import Protocol

import torch
from torch import Tensor, nn

from cmdgen.models.pretrained import Pretrained
from cmdgen.training.checkpoint import Checkpoint, Log, check_origin, load_checkpoint, save_checkpoint, save_shards
from cmdgen.training.config import TrainConfig
from cmdgen.training.context import Run
from cmdgen.training.distributed import gather, sync, whole
from cmdgen.training.ema import Ema
from cmdgen.training.randomness import seeded
from cmdgen.training.sheets import write_png

Batch = dict[str, Tensor]


class Stage(Protocol):
    """What the loop trains; `modules` are trainable, by the folders that they are written to.

    Of several processes each has its rows of a batch; all evaluate, draw and export together.
    """

    modules: dict[str, nn.Module]

    def batch(self, step: int) -> Batch:
        """Return the tensors of one update, of this process's rows, the same for the same step."""

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a mean over the batch, and named parts of it for the log."""

    def evaluate(self) -> dict[str, float]:
        """Return figures on held-out data."""

    def sheet(self) -> Tensor:
        """() -> (H, W, 3) uint8, a picture of what the weights do."""

    def export(self, folder: Path) -> None:
        """Write the trained parts into a model folder."""
        for part, module in self.modules.items():
            # a critic is no part of a model
            if isinstance(module, Pretrained) and (state := gather(module)):
                module.save_pretrained(folder / part, state=state)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine from lr to final_lr * lr."""
    warm = min(1.0, (step + 1) / max(config.warmup, 1))
    progress = max(0, step - config.warmup) / max(config.steps - config.warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.lr * warm * (config.final_lr + (1 - config.final_lr) * cosine)


def train(stage: Stage, run: Run) -> int:
    """Train until the last step, the last minute or a signal; return the number of steps done.

    A checkpoint in the run's folder is continued. Raises FloatingPointError where the weights have
    diverged; those are not saved.
    """
    config, report = run.config, run.report
    state = _State(stage, run)
    if state.step >= config.steps:
        return state.step
    ranks = run.ranks
    log = Log(run.state / "log.jsonl" if ranks.leads else None, state.step)
    deadline = math.inf if config.minutes is None else run.started + 60 * config.minutes
    last_save = last_log = time.monotonic()
    logged = state.step
    figures: dict[str, float] = {}
    # seconds of a step, and of evaluation and saving
    step_cost = finish_cost = 0.0
    while state.step < config.steps and not ranks.any(run.stopped()):
        begun = time.monotonic()
        if ranks.any(begun + step_cost + finish_cost > deadline and step_cost > 0):
            break
        try:
            state.update()
        except (ValueError, OSError):
            # a clip that cannot be read costs no step that was done, unless others must save as well
            if state.step and ranks.world == 1:
                state.save()
            raise
        step_cost = max(time.monotonic() - begun, 0.9 * step_cost)
        if state.step % config.log_steps == 0 or state.step == 1:
            now = time.monotonic()
            figures = state.take_figures()
            samples = (state.step - logged) * config.batch
            figures["samples/s"] = samples / max(now - last_log, 1e-9)
            log.write({"step": state.step, **figures, "seconds": round(now - run.started, 1)})
            last_log, logged = now, state.step
        report("train", state.step, config.steps, figures)
        if state.step == config.steps:
            break
        begun = time.monotonic()
        if state.step % config.evaluate_steps == 0:
            log.write({"step": state.step, **state.evaluate()})
        if ranks.any(begun - last_save >= config.save_seconds):
            state.save()
            last_save = time.monotonic()
        finish_cost = max(finish_cost, time.monotonic() - begun)
    report("evaluate", state.step, config.steps, figures)
    log.write({"step": state.step, **state.evaluate()})
    state.save()
    state.saved.result()
    log.close()
    return state.step


class _Batches:
    """The stage's batches on a device; for a GPU the next one is made while a step runs."""

    def __init__(self, stage: Stage, device: torch.device) -> None:
        self.stage, self.device = stage, device
        self.worker = ThreadPoolExecutor(1) if device.type == "cuda" else None
        self.next: tuple[int, Future[Batch]] | None = None

    def take(self, step: int) -> Batch:
        """Return the batch of a step, its copy to the GPU perhaps still under way."""
        if self.worker is None:
            return {name: tensor.to(self.device) for name, tensor in self.stage.batch(step).items()}
        if self.next is None or self.next[0] != step:
            self.next = step, self.worker.submit(self._pin, step)
        pinned = self.next[1].result()
        self.next = step + 1, self.worker.submit(self._pin, step + 1)
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in pinned.items()}

    def _pin(self, step: int) -> Batch:
        # a thread has a current device of its own
        with torch.cuda.device(self.device):
            return {name: t.pin_memory() if t.is_cpu else t for name, t in self.stage.batch(step).items()}


class _State:
    """Weights, optimiser, averages and running figures at a step: what a checkpoint holds."""

    def __init__(self, stage: Stage, run: Run) -> None:
        config = run.config
        self.stage, self.run, self.config = stage, run, config
        self.step = self.summed = 0
        self.sums: dict[str, Tensor] = {}
        # by name, of modules that may be frozen in part
        self.trained = {
            f"{part}.{name}": parameter
            for part, module in stage.modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.parameters = list(self.trained.values())
        matrices = [parameter for parameter in self.parameters if parameter.ndim > 1]
        vectors = [parameter for parameter in self.parameters if parameter.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        self.ema = Ema(stage.modules, config.ema)
        self.batches, self.origin = _Batches(stage, run.device), run.origin()
        self.saved: Future[None] = Future()
        self.saved.set_result(None)
        run.state.mkdir(parents=True, exist_ok=True)
        if (read := load_checkpoint(run.state, run.ranks)) is not None:
            self._load(read)

    def update(self) -> None:
        """Take one optimiser step."""
        lr, parts = learning_rate(self.config, self.step), self.config.accumulate
        # dropout draws from torch's own generators
        rank = [self.run.ranks.rank] if self.run.ranks.rank else []
        torch.manual_seed(seeded(self.config.seed, "dropout", self.step, *rank).initial_seed())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = self.batches.take(self.step)
        self._add("lr", torch.tensor(lr))
        for part in range(parts):
            chunk = {name: tensor.chunk(parts)[part] for name, tensor in batch.items()}
            with self.run.autocast():
                loss, named = self.stage.loss(chunk)
            sync(self.stage.modules, part == parts - 1)
            (loss / parts).backward()
            for name, value in {"loss": loss, **named}.items():
                self._add(name, value.detach().float() / parts)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm, foreach=True)
        self._add("grad", whole(norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        self.step += 1
        self.summed += 1

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + value

    def take_figures(self) -> dict[str, float]:
        """Return the means since the last call."""
        self.sums = self.run.ranks.mean(self.sums)
        self._check_finite()
        figures = {name: float(value) / self.summed for name, value in self.sums.items()}
        self.sums, self.summed = {}, 0
        return figures

    def _check_finite(self) -> None:
        for name, value in self.sums.items():
            if not math.isfinite(float(value)):
                raise FloatingPointError(
                    f"{name} is not finite at step {self.step}: run again with a lower"
                    " --lr (it continues from the last checkpoint)"
                )

    def evaluate(self) -> dict[str, float]:
        """Return figures of the averaged weights, and draw their sheet."""
        with self.ema.swapped(), self.run.autocast():
            figures, sheet = self.stage.evaluate(), self.stage.sheet()
            if self.run.ranks.leads:
                write_png(self.run.state / f"sheet-{self.step:07d}.png", sheet)
        return figures

    def save(self) -> None:
        """Write the averaged weights into the model folder, then a checkpoint.

        In that order, a checkpoint of the last step says that all is done.
        """
        ranks, self.sums = self.run.ranks, self.run.ranks.mean(self.sums)
        self._check_finite()
        with self.ema.swapped():
            self.stage.export(self.run.folder)
        state = {"step": self.step, "summed": self.summed, "origin": self.origin}
        if ranks.world == 1:
            save_checkpoint(self.run.state, self._tensors(), state)
            return
        self.saved.result()
        background = self.run.device.type == "cuda"
        self.saved = save_shards(self.run.state, self._tensors(), state, ranks, background=background)

    def _tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds, by name."""
        modules = {
            f"modules.{part}.{name}": tensor
            for part, module in self.stage.modules.items()
            for name, tensor in module.state_dict().items()
        }
        moments = {
            f"{moment}.{name}": tensor
            for name, parameter in self.trained.items()
            for moment, tensor in self.optimizer.state.get(parameter, {}).items()
        }
        averages = {f"ema.{name}": tensor for name, tensor in self.ema.averages.items()}
        return modules | moments | averages | {f"sums.{name}": value for name, value in self.sums.items()}

    @torch.no_grad()
    def _load(self, read: Checkpoint) -> None:
        path, state = read.path, read.state
        check_origin(path, self.origin, state.get("origin"))
        for name, parameter in self.trained.items():
            if f"exp_avg.{name}" in read.shapes:
                step = torch.zeros((), device=parameter.device)
                moments = {"step": step, "exp_avg": parameter.clone(), "exp_avg_sq": parameter.clone()}
                self.optimizer.state[parameter] = moments
        self.sums = {name[5:]: torch.zeros(()) for name in read.shapes if name.startswith("sums.")}
        expected = self._tensors()
        if read.shapes != {name: [*tensor.shape] for name, tensor in expected.items()}:
            raise ValueError(f"{path} is of a model of another shape: use --restart")
        read.copy_to(expected, self.run.ranks)
        for name in ("step", "summed"):
            if type(count := state.get(name)) is not int or not 0 <= count < 2**53:
                raise ValueError(f"{path}: {name} {short(count)} is no count: use --restart")
            setattr(self, name, count)
        self.ema.updates = self.step
