"""`cmdgen train vae|autoencoder|content|motion` and `cmdgen train export`."""

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cmdgen.cli.size import parse_size
from cmdgen.config import ATTENTIONS, PRESETS, WORLDS, ModelConfig, SampleConfig, UNetConfig
from cmdgen.training.config import AutoencoderLoss, StageConfig, TrainConfig, VaeLoss

app = typer.Typer(
    no_args_is_help=True,
    help="Train a model in one folder: vae, autoencoder, content, motion, then export.",
)
# what is shared by all stages of a run, unless the first one is told otherwise
PRESET = "mini"
DATA = "world"
CLIPS = 12_000
# what the UNet and the autoencoder of a run have in common
GATE = ("attention", "attention_threshold", "attention_features")
# between two lines of progress where there is no terminal
LINE_SECONDS = 30


def _option(help: str, panel: str | None = None) -> Any:
    return typer.Option(help=help, rich_help_panel=panel)


def _command(stage: str) -> Callable[..., None]:
    def command(
        output: Annotated[
            Path, typer.Option("--output", "-o", help="Folder of the run; all stages share it.")
        ],
        preset: Annotated[str | None, _option("Model to build.")] = None,
        data: Annotated[
            str | None,
            _option(f"A rendered world ({', '.join(WORLDS)}) or a folder of videos."),
        ] = None,
        size: Annotated[str | None, _option("Frame size, WIDTHxHEIGHT.")] = None,
        frames: Annotated[int | None, _option("Frames of a clip.")] = None,
        attention: Annotated[
            str | None,
            _option("softmax, or gated: linear where tokens > threshold * head width."),
        ] = None,
        attention_threshold: Annotated[float | None, _option("Where the gate opens.")] = None,
        attention_features: Annotated[
            int | None, _option("Random features of gated attention.")
        ] = None,
        clips: Annotated[int, _option("Clips to learn from.")] = CLIPS,
        init: Annotated[Path | None, _option("Model folder to start from.")] = None,
        restart: Annotated[bool, _option("Forget this stage's checkpoint.")] = StageConfig.restart,
        steps: Annotated[int, _option("Updates in all.")] = TrainConfig.steps,
        minutes: Annotated[
            float | None, _option("Stop cleanly within this time.")
        ] = TrainConfig.minutes,
        batch: Annotated[int, _option("Clips (vae: frames) an update.")] = TrainConfig.batch,
        accumulate: Annotated[
            int, _option("Parts that a batch is computed in.")
        ] = TrainConfig.accumulate,
        lr: Annotated[float, _option("Learning rate.")] = TrainConfig.lr,
        warmup: Annotated[int, _option("Steps of linear warm-up.")] = TrainConfig.warmup,
        final_lr: Annotated[
            float, _option("Fraction of lr that a cosine ends at; 1: constant.")
        ] = TrainConfig.final_lr,
        weight_decay: Annotated[float, _option("Of matrices.")] = TrainConfig.weight_decay,
        ema: Annotated[float, _option("Decay of the averaged weights.")] = TrainConfig.ema,
        precision: Annotated[
            str, _option("auto, bf16 or fp32; auto is bf16 on a GPU.")
        ] = TrainConfig.precision,
        seed: Annotated[int, _option("Of everything drawn.")] = TrainConfig.seed,
        device: Annotated[str, _option("auto, cpu, cuda, cuda:1 ...")] = "auto",
        threads: Annotated[int | None, _option("CPU threads.")] = None,
        save_every: Annotated[
            float, _option("Seconds between checkpoints.")
        ] = TrainConfig.save_seconds,
        log_every: Annotated[int, _option("Steps between log lines.")] = TrainConfig.log_steps,
        evaluate_every: Annotated[
            int, _option("Steps between evaluations and sample sheets.")
        ] = TrainConfig.evaluate_steps,
        mask: Annotated[
            float, _option("Extra weight of the subject's pixels.", "Only for vae")
        ] = VaeLoss.mask,
        edges: Annotated[
            float, _option("Weight of image gradients.", "Only for vae")
        ] = VaeLoss.edges,
        kl: Annotated[float, _option("Weight of the KL of a frame.", "Only for vae")] = VaeLoss.kl,
        moving: Annotated[
            float, _option("Extra weight of what moves.", "Only for autoencoder")
        ] = AutoencoderLoss.moving,
        motion_l2: Annotated[
            float, _option("Weight of z squared.", "Only for autoencoder")
        ] = AutoencoderLoss.motion,
        content_pull: Annotated[
            float,
            _option("Pulls content to a real frame.", "Only for autoencoder"),
        ] = AutoencoderLoss.content_pull,
        freeze_text: Annotated[
            bool, _option("Train the UNet alone.", "Only for content")
        ] = StageConfig.freeze_text,
    ) -> None:
        config = TrainConfig(
            steps=steps,
            batch=batch,
            accumulate=accumulate,
            lr=lr,
            warmup=warmup,
            final_lr=final_lr,
            weight_decay=weight_decay,
            ema=ema,
            precision=precision,
            seed=seed,
            minutes=minutes,
            save_seconds=save_every,
            log_steps=log_every,
            evaluate_steps=evaluate_every,
        )
        options = StageConfig(
            init,
            restart,
            freeze_text,
            VaeLoss(mask, edges, kl),
            AutoencoderLoss(moving, motion_l2, content_pull),
        )
        shared = {
            "preset": preset,
            "data": data,
            "size": size,
            "frames": frames,
            "attention": attention,
            "attention_threshold": attention_threshold,
            "attention_features": attention_features,
        }
        _train(stage, output, config, options, shared, clips, device, threads)

    return command


for _stage, _help in {
    "vae": "Frames to latents and back, learned on single frames.",
    "autoencoder": "Clips of latents to content frame and motion latents, and back. Needs vae.",
    "content": "Text to content frame, with the text encoder. Needs autoencoder.",
    "motion": "Text and content frame to motion latents. Needs content.",
}.items():
    app.command(_stage, help=_help)(_command(_stage))


def _train(
    stage: str,
    output: Path,
    config: TrainConfig,
    options: StageConfig,
    asked: dict[str, Any],
    clips: int,
    device_name: str,
    threads: int | None,
) -> None:
    started = time.monotonic()
    if asked["size"] is not None:
        parse_size(asked["size"])
    if options.init is not None and not options.init.is_dir():
        raise ValueError(f"init {options.init} is not a folder")
    # a part that is given has been trained with the attention that it has
    part = {"content": "unet"}.get(stage, stage)
    if options.init is not None and (options.init / part).is_dir():
        for name in GATE:
            if asked[name] is not None:
                raise ValueError(f"{options.init / part} brings its own {name.replace('_', ' ')}")
    if clips < 1:
        raise ValueError(f"clips {clips} is not at least 1")

    import torch

    from cmdgen.pipeline import choose_device
    from cmdgen.training.data import TrainingData, open_source
    from cmdgen.training.run import run_stage, settle

    if threads is not None:
        torch.set_num_threads(threads)
    shared = {"preset": PRESET, "data": DATA} | settle(output, asked)
    model = _model(shared)
    device = choose_device(device_name)
    if device.index is not None:
        # kernels are launched on the current GPU
        torch.cuda.set_device(device)
    source, name = open_source(shared["data"])
    data = TrainingData(source, name, clips, model.frames, (model.height, model.width), device)
    with _Stop() as stop, _Progress(config.minutes, started) as progress:

        def report(phase: str, done: int, total: int, figures: dict[str, float]) -> None:
            progress.report(phase, done, total, figures)
            late = progress.deadline is not None and time.monotonic() > progress.deadline
            if phase.startswith("encode") and (stop() or late):
                # shards that are done are on disk: the next run goes on after them
                progress.console.print(f"{stage}: stopped with {done} of {total} clips encoded")
                raise typer.Exit(0 if stop.signal is None else 128 + stop.signal)

        done = run_stage(
            stage,
            output,
            model,
            data,
            config,
            options,
            device=device,
            report=report,
            stopped=stop,
            shared=shared,
            started=started,
        )
    Console(stderr=True).print(f"{stage}: {done} of {config.steps} steps done", highlight=False)
    print(output)
    if stop.signal is not None:
        raise typer.Exit(128 + stop.signal)


def _model(shared: dict[str, Any]) -> ModelConfig:
    preset = PRESETS.get(shared["preset"])
    if preset is None:
        raise ValueError(f"preset {shared['preset']!r} is not one of {', '.join(PRESETS)}")
    height, width = parse_size(shared["size"]) if "size" in shared else (None, None)
    model = SampleConfig(frames=shared.get("frames"), height=height, width=width).apply(preset)
    side = min(model.height, model.width)
    vae = model.vae and replace(model.vae, sample_size=side)
    stride = 1 if vae is None else vae.stride
    gate = {name: shared[name] for name in GATE if name in shared}
    if gate.get("attention", "softmax") not in ATTENTIONS:
        raise ValueError(f"attention {gate['attention']!r} is not one of {', '.join(ATTENTIONS)}")
    for name in set(gate) - {"attention"}:
        if not gate[name] > 0:
            raise ValueError(f"{name.replace('_', ' ')} {gate[name]} is not above 0")
    content = model.content
    if isinstance(content, UNetConfig):
        content = replace(content, sample_size=side // stride, **gate)
    autoencoder = replace(model.autoencoder, **gate)
    return replace(model, vae=vae, content=content, autoencoder=autoencoder)


class _Stop:
    """Whether a signal has come; the first ends the run after a step, the second at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> "_Stop":
        self.former = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self.__exit__()
        print("stopping after this step", file=sys.stderr)

    def __call__(self) -> bool:
        return self.signal is not None


class _Progress:
    """A bar with figures and the time left, or a line now and then where stderr is no terminal."""

    def __init__(self, minutes: float | None, started: float) -> None:
        self.deadline = None if minutes is None else started + 60 * minutes
        self.console = Console(stderr=True, highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn(
                "{task.completed}/{task.total}  {task.fields[figures]}  {task.fields[left]} left"
            ),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task: TaskID | None = None
        self.phase = ""
        self.begun = (0.0, 0)
        self.line = 0.0

    def __enter__(self) -> "_Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def report(self, phase: str, done: int, total: int, figures: dict[str, float]) -> None:
        """Shows where the run is."""
        now = time.monotonic()
        if phase != self.phase:
            self.phase, self.begun, self.line = phase, (now, done), 0.0
            if self.task is not None:
                self.bar.stop_task(self.task)
            self.task = self.bar.add_task(phase, total=total, figures="", left="")
        text = f"loss {figures['loss']:.4g}" if "loss" in figures else ""
        left = self._left(now, done, total)
        assert self.task is not None
        self.bar.update(self.task, completed=done, total=total, figures=text, left=left)
        if not self.console.is_terminal and (now - self.line > LINE_SECONDS or done == total):
            self.line = now
            self.console.print(f"{phase} {done}/{total} {text} {left} left")

    def _left(self, now: float, done: int, total: int) -> str:
        begun, first = self.begun
        if done == first:
            return "--:--"
        seconds = (now - begun) / (done - first) * (total - done)
        if self.deadline is not None and self.phase == "train":
            seconds = min(seconds, max(0.0, self.deadline - now))
        minutes, rest = divmod(round(seconds), 60)
        return (
            f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
            if minutes >= 60
            else f"{minutes}:{rest:02}"
        )


@app.command("export", help="Copy a finished run's model, without training state, to a folder.")
def export(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    target: Annotated[Path, typer.Argument(help="Folder to write, such as cmdgen/assets/mini.")],
    dtype: Annotated[str, _option("float16, bfloat16 or float32.")] = "float16",
) -> None:
    from cmdgen.training.export import DTYPES, export_model

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    sizes = export_model(run, target, DTYPES[dtype])
    console = Console(stderr=True, highlight=False)
    for name, size in sizes.items():
        console.print(f"{size / 2**20:7.2f} MiB  {name}")
    console.print(f"{sum(sizes.values()) / 2**20:7.2f} MiB  in all")
    print(target)
