"""`cmdgen train vae|autoencoder|content|motion` and `cmdgen train export`."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cmdgen.cli.size import parse_size
from cmdgen.cli.stop import Stop
from cmdgen.config import ATTENTIONS, PRESETS, WORLDS, ModelConfig, SampleConfig, UNetConfig
from cmdgen.training.config import (
    STAGES,
    AutoencoderLoss,
    DenoisingLoss,
    Recipe,
    StageConfig,
    TrainConfig,
    VaeLoss,
    recipe,
)

if TYPE_CHECKING:
    import torch

    from cmdgen.training.data import TrainingData

C = TypeVar("C", TrainConfig, StageConfig, VaeLoss, AutoencoderLoss, DenoisingLoss)

app = typer.Typer(
    no_args_is_help=True,
    help="Train a model in one folder: vae, autoencoder, content, motion, then export.",
)
# what is shared by all stages of a run, unless the first one is told otherwise
PRESET = "mini"
DATA = "world"
# of a world, which has no end
CLIPS = 12_000
DATA_HELP = f"A rendered world ({', '.join(WORLDS)}) or a folder of videos.  [default: {DATA}]"
CLIPS_HELP = f"Clips to learn from.  [default: all of a folder, {CLIPS} of a world]"
# stages that some options are for alone
VAE, AUTOENCODER, CONTENT, MOTION = ((stage,) for stage in STAGES)
DENOISING = CONTENT + MOTION
# what the UNet and the autoencoder of a run have in common
GATE = ("attention", "attention_threshold", "attention_features")
# between two lines of progress where there is no terminal
LINE_SECONDS = 30


def _option(help: str, *, hidden: bool = False) -> Any:
    return typer.Option(help=help, hidden=hidden)


def _command(stage: str) -> Callable[..., None]:
    def tuned(setting: str, help: str, only: tuple[str, ...] = STAGES) -> Any:
        """An option of these stages whose default is the recipe's, by preset."""
        read, presets = attrgetter(setting), dict[str, list[str]]()
        for preset in PRESETS:
            presets.setdefault(_show(read(recipe(preset, stage))), []).append(preset)
        value, *others = presets
        texts = [value, *(f"{other} for {', '.join(presets[other])}" for other in others)]
        return _option(f"{help}  [default: {'; '.join(texts)}]", hidden=stage not in only)

    def command(
        output: Annotated[
            Path, typer.Option("--output", "-o", help="Folder of the run; all stages share it.")
        ],
        preset: Annotated[str | None, _option(f"Model to build.  [default: {PRESET}]")] = None,
        data: Annotated[str | None, _option(DATA_HELP)] = None,
        size: Annotated[str | None, _option("Frame size, WIDTHxHEIGHT.")] = None,
        frames: Annotated[int | None, _option("Frames of a clip.")] = None,
        latents: Annotated[
            Path | None, _option("What `cmdgen data precompute` wrote for these clips and VAE.")
        ] = None,
        attention: Annotated[
            str | None,
            _option("softmax, or gated: linear where tokens > threshold * head width."),
        ] = None,
        attention_threshold: Annotated[float | None, _option("Where the gate opens.")] = None,
        attention_features: Annotated[
            int | None, _option("Random features of gated attention.")
        ] = None,
        clips: Annotated[int | None, _option(CLIPS_HELP)] = None,
        init: Annotated[
            Path | None, _option("Model folder to start from, such as a Stable Diffusion.")
        ] = None,
        restart: Annotated[bool, _option("Forget this stage's checkpoint.")] = StageConfig.restart,
        steps: Annotated[int | None, tuned("train.steps", "Updates in all.")] = None,
        minutes: Annotated[float | None, _option("Stop cleanly within this time.")] = None,
        batch: Annotated[int | None, tuned("train.batch", "Clips (vae: frames) an update.")] = None,
        accumulate: Annotated[
            int | None, tuned("train.accumulate", "Parts that a batch is computed in.")
        ] = None,
        lr: Annotated[float | None, tuned("train.lr", "Learning rate.")] = None,
        warmup: Annotated[int | None, tuned("train.warmup", "Steps of linear warm-up.")] = None,
        final_lr: Annotated[
            float | None,
            tuned("train.final_lr", "Fraction of lr that a cosine ends at; 1: constant."),
        ] = None,
        weight_decay: Annotated[
            float | None, tuned("train.weight_decay", "Of matrices; 0: Adam.")
        ] = None,
        betas: Annotated[
            tuple[float, float] | None, tuned("train.betas", "Decays of Adam's moments.")
        ] = None,
        ema: Annotated[float | None, tuned("train.ema", "Decay of the averaged weights.")] = None,
        gradient_checkpointing: Annotated[
            bool | None,
            tuned(
                "train.gradient_checkpointing",
                "Compute activations again in the backward pass: slower, much less memory.",
            ),
        ] = None,
        precision: Annotated[
            str | None, tuned("train.precision", "auto, bf16 or fp32; auto is bf16 on a GPU.")
        ] = None,
        seed: Annotated[int | None, tuned("train.seed", "Of everything drawn.")] = None,
        device: Annotated[str, _option("auto, cpu, cuda, cuda:1 ...")] = "auto",
        threads: Annotated[int | None, _option("CPU threads.")] = None,
        save_every: Annotated[
            float | None, tuned("train.save_seconds", "Seconds between checkpoints.")
        ] = None,
        log_every: Annotated[
            int | None, tuned("train.log_steps", "Steps between log lines.")
        ] = None,
        evaluate_every: Annotated[
            int | None,
            tuned("train.evaluate_steps", "Steps between evaluations and sample sheets."),
        ] = None,
        held_out: Annotated[
            int | None, tuned("train.held_out", "Clips to evaluate on, never trained on.")
        ] = None,
        mask: Annotated[
            float | None,
            tuned("stage.vae.mask", "Extra weight of the subject's pixels.", VAE),
        ] = None,
        edges: Annotated[
            float | None, tuned("stage.vae.edges", "Weight of image gradients.", VAE)
        ] = None,
        kl: Annotated[
            float | None, tuned("stage.vae.kl", "Weight of the KL of a frame.", VAE)
        ] = None,
        l1: Annotated[
            float | None,
            tuned("stage.autoencoder.l1", "Weight of |d| beside d².", AUTOENCODER),
        ] = None,
        moving: Annotated[
            float | None,
            tuned("stage.autoencoder.moving", "Extra weight of what moves.", AUTOENCODER),
        ] = None,
        motion_l2: Annotated[
            float | None,
            tuned("stage.autoencoder.motion_l2", "Weight of an unbounded z squared.", AUTOENCODER),
        ] = None,
        content_pull: Annotated[
            float | None,
            tuned("stage.autoencoder.content_pull", "Pulls content to a real frame.", AUTOENCODER),
        ] = None,
        freeze_text: Annotated[
            bool | None, tuned("stage.freeze_text", "Train the UNet alone.", CONTENT)
        ] = None,
        min_snr: Annotated[
            float | None,
            tuned(
                "stage.denoising.min_snr",
                "Gamma of min-SNR weights, unless a variance is learned; 0: plain mean.",
                DENOISING,
            ),
        ] = None,
        text_dropout: Annotated[
            float | None,
            tuned(
                "stage.denoising.text_dropout",
                "Share of captions left empty, for guidance.",
                DENOISING,
            ),
        ] = None,
        content_noise: Annotated[
            float | None,
            tuned(
                "stage.denoising.content_noise",
                "Deviation, at most, of noise on the content frame.",
                MOTION,
            ),
        ] = None,
    ) -> None:
        loop = {
            "steps": steps,
            "batch": batch,
            "accumulate": accumulate,
            "lr": lr,
            "warmup": warmup,
            "final_lr": final_lr,
            "weight_decay": weight_decay,
            "betas": betas,
            "ema": ema,
            "gradient_checkpointing": gradient_checkpointing,
            "precision": precision,
            "seed": seed,
            "minutes": minutes,
            "save_seconds": save_every,
            "log_steps": log_every,
            "evaluate_steps": evaluate_every,
            "held_out": held_out,
        }
        own: dict[tuple[str, ...], dict[str, Any]] = {
            VAE: {"mask": mask, "edges": edges, "kl": kl},
            AUTOENCODER: {
                "l1": l1,
                "moving": moving,
                "motion_l2": motion_l2,
                "content_pull": content_pull,
            },
            CONTENT: {"freeze_text": freeze_text},
            DENOISING: {"min_snr": min_snr, "text_dropout": text_dropout},
            MOTION: {"content_noise": content_noise},
        }
        for only, told in own.items():
            for name, value in told.items():
                if value is not None and stage not in only:
                    raise ValueError(f"{name.replace('_', ' ')} is only for {' and '.join(only)}")

        def settle_recipe(preset: str) -> Recipe:
            config, options = recipe(preset, stage)
            options = replace(
                _replace(options, own[CONTENT]),
                init=init,
                restart=restart,
                vae=_replace(options.vae, own[VAE]),
                autoencoder=_replace(options.autoencoder, own[AUTOENCODER]),
                denoising=_replace(options.denoising, own[DENOISING] | own[MOTION]),
            )
            return Recipe(_replace(config, loop), options)

        shared = {
            "preset": preset,
            "data": data,
            "size": size,
            "frames": frames,
            "latents": None if latents is None else str(latents.resolve()),
            "attention": attention,
            "attention_threshold": attention_threshold,
            "attention_features": attention_features,
        }
        _train(stage, output, settle_recipe, init, shared, clips, device, threads)

    return command


def _show(value: object) -> str:
    """A default as it would be typed."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _replace(config: C, told: dict[str, Any]) -> C:
    """A configuration with what was asked for; None asks for nothing."""
    return replace(config, **{name: value for name, value in told.items() if value is not None})


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
    settle_recipe: Callable[[str], Recipe],
    init: Path | None,
    asked: dict[str, Any],
    clips: int | None,
    device_name: str,
    threads: int | None,
) -> None:
    started = time.monotonic()
    if asked["size"] is not None:
        parse_size(asked["size"])
    if init is not None and not init.is_dir():
        raise ValueError(f"init {init} is not a folder")
    # a part that is given has been trained with the attention that it has
    part = {"content": "unet"}.get(stage, stage)
    if init is not None and (init / part).is_dir():
        for name in GATE:
            if asked[name] is not None:
                raise ValueError(f"{init / part} brings its own {name.replace('_', ' ')}")

    import torch

    from cmdgen.pipeline import choose_device
    from cmdgen.training.run import run_stage, settle

    if threads is not None:
        torch.set_num_threads(threads)
    shared = {"preset": PRESET, "data": DATA} | settle(output, asked)
    model = build_config(shared)
    config, options = settle_recipe(model.name)
    device = choose_device(device_name)
    if device.index is not None:
        # kernels are launched on the current GPU
        torch.cuda.set_device(device)
    data = open_data(shared["data"], clips, model, device)
    with Stop("this step") as stop, _Progress(config.minutes, started) as progress:

        def report(phase: str, done: int, total: int, figures: dict[str, float]) -> None:
            progress.report(phase, done, total, figures)
            late = progress.deadline is not None and time.monotonic() > progress.deadline
            if phase.startswith("encode") and (stop() or late):
                # what is encoded is on disk: the next run goes on after it
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


def open_data(
    name: str, clips: int | None, model: ModelConfig, device: "torch.device"
) -> "TrainingData":
    """The clips of a world or a folder, as a model takes them; None: as many as CLIPS_HELP says."""
    from cmdgen.training.data import TrainingData, open_source

    if clips is not None and clips < 1:
        raise ValueError(f"clips {clips} is not at least 1")
    source, key = open_source(name)
    if clips is None:
        clips = CLIPS if name in WORLDS else len(source.indices("train", sys.maxsize))
    return TrainingData(source, key, clips, model.frames, (model.height, model.width), device)


def build_config(shared: dict[str, Any]) -> ModelConfig:
    """The model that what a run shares describes."""
    preset = PRESETS.get(shared["preset"])
    if preset is None:
        raise ValueError(f"preset {shared['preset']!r} is not one of {', '.join(PRESETS)}")
    height, width = parse_size(shared["size"]) if "size" in shared else (None, None)
    model = SampleConfig(frames=shared.get("frames"), height=height, width=width).apply(preset)
    if model.frames == 1:
        raise ValueError("frames 1: nothing moves in a clip of one frame")
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
    assert model.autoencoder is not None
    autoencoder = replace(model.autoencoder, **gate)
    return replace(model, vae=vae, content=content, autoencoder=autoencoder)


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
