"""`cmdgen train vae|autoencoder|content|motion` and `cmdgen train export`."""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cmdgen.cli.completion import one_of
from cmdgen.cli.errors import Failure, describe, within_memory
from cmdgen.cli.help import Command, Group
from cmdgen.cli.options import Device, Quiet, Threads
from cmdgen.cli.progress import Say
from cmdgen.cli.size import parse_size
from cmdgen.cli.stop import Stop
from cmdgen.config import ATTENTIONS, PRESETS, ModelConfig, SampleConfig, UNetConfig
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
from cmdgen.world.config import WORLDS

if TYPE_CHECKING:
    import torch

    from cmdgen.training.data import TrainingData

C = TypeVar("C", TrainConfig, StageConfig, VaeLoss, AutoencoderLoss, DenoisingLoss)

app = typer.Typer(
    cls=Group,
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


LEARNING, KEEPING, OBJECTIVE = "Learning", "Checkpoints and logs", "What is learned"


def _option(
    help: str, panel: str | None = None, *, hidden: bool = False, known: Iterable[str] = ()
) -> Any:
    """`known`: what a shell completes it with."""
    complete = one_of(known) if known else None
    return typer.Option(help=help, hidden=hidden, rich_help_panel=panel, autocompletion=complete)


def _command(stage: str) -> Callable[..., None]:
    def tuned(
        setting: str, help: str, only: tuple[str, ...] = STAGES, panel: str | None = None
    ) -> Any:
        """An option of these stages whose default is the recipe's, by preset."""
        read, presets = attrgetter(setting), dict[str, list[str]]()
        for preset in PRESETS:
            presets.setdefault(_show(read(recipe(preset, stage))), []).append(preset)
        value, *others = presets
        texts = [value, *(f"{other} for {', '.join(presets[other])}" for other in others)]
        panel = panel or (LEARNING if setting.startswith("train.") else OBJECTIVE)
        return _option(f"{help}  [default: {'; '.join(texts)}]", panel, hidden=stage not in only)

    def command(
        output: Annotated[
            Path, typer.Option("--output", "-o", help="Folder of the run; all stages share it.")
        ],
        preset: Annotated[
            str | None, _option(f"Model to build.  [default: {PRESET}]", known=PRESETS)
        ] = None,
        data: Annotated[str | None, _option(DATA_HELP, known=WORLDS)] = None,
        size: Annotated[str | None, _option("Frame size, WIDTHxHEIGHT.")] = None,
        frames: Annotated[int | None, _option("Frames of a clip.")] = None,
        latents: Annotated[
            Path | None, _option("What `cmdgen data precompute` wrote for these clips and VAE.")
        ] = None,
        attention: Annotated[
            str | None,
            _option(
                "softmax, or gated: linear where tokens > threshold * head width.", known=ATTENTIONS
            ),
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
        minutes: Annotated[
            float | None,
            _option(
                "Stop cleanly within this time; the learning rate still goes by --steps.", LEARNING
            ),
        ] = None,
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
        device: Device = "auto",
        threads: Threads = None,
        save_every: Annotated[
            float | None, tuned("train.save_seconds", "Seconds between checkpoints.", panel=KEEPING)
        ] = None,
        log_every: Annotated[
            int | None, tuned("train.log_steps", "Steps between log lines.", panel=KEEPING)
        ] = None,
        evaluate_every: Annotated[
            int | None,
            tuned(
                "train.evaluate_steps",
                "Steps between evaluations and sample sheets.",
                panel=KEEPING,
            ),
        ] = None,
        held_out: Annotated[
            int | None,
            tuned("train.held_out", "Clips to evaluate on, never trained on.", panel=KEEPING),
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
        quiet: Quiet = False,
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
        _train(stage, output, settle_recipe, init, shared, clips, device, threads, quiet)

    return command


def _show(value: object) -> str:
    """A default as it would be typed."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _replace(config: C, told: dict[str, Any]) -> C:
    """A configuration with what was asked for; None asks for nothing."""
    return replace(config, **{name: value for name, value in told.items() if value is not None})


_HELP = """{}

    The folder's path goes to stdout. What stops, the same command continues.

    Examples:
        cmdgen train {stage} -o RUN
        cmdgen train {stage} -o RUN --minutes 30 --batch 8
    """
for _stage, _help in {
    "vae": "Frames to latents and back, learned on single frames.",
    "autoencoder": "Clips of latents to content frame and motion latents, and back. Needs vae.",
    "content": "Text to content frame, with the text encoder. Needs autoencoder.",
    "motion": "Text and content frame to motion latents. Needs content.",
}.items():
    app.command(_stage, cls=Command, help=_HELP.format(_help, stage=_stage))(_command(_stage))


def _train(
    stage: str,
    output: Path,
    settle_recipe: Callable[[str], Recipe],
    init: Path | None,
    asked: dict[str, Any],
    clips: int | None,
    device_name: str,
    threads: int | None,
    quiet: bool,
) -> None:
    started = time.monotonic()
    if asked["size"] is not None:
        parse_size(asked["size"])
    if init is not None and not init.is_dir():
        raise FileNotFoundError(f"init {init} is not a folder")
    # a part that is given has been trained with the attention that it has
    part = {"content": "unet"}.get(stage, stage)
    if init is not None and (init / part).is_dir():
        for name in GATE:
            if asked[name] is not None:
                raise ValueError(f"{init / part} brings its own {name.replace('_', ' ')}")

    import torch

    from cmdgen.pipeline import choose_device
    from cmdgen.training.loop import learning_rate
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
    say = Say(quiet=quiet)
    deadline = None if config.minutes is None else started + 60 * config.minutes
    smaller = "ask for a smaller --batch or --size, more --accumulate, or --gradient-checkpointing"
    with (
        Stop("this step") as stop,
        within_memory(smaller),
        say.progress(deadline=deadline) as show,
    ):

        def report(phase: str, done: int, total: int, figures: dict[str, float]) -> None:
            show(phase, done, total, f"loss {figures['loss']:.4g}" if "loss" in figures else "")
            late = deadline is not None and time.monotonic() > deadline
            if phase.startswith("encode") and (stop() or late):
                # what is encoded is on disk: the next run goes on after it
                say.note(f"{stage}: stopped with {done} of {total} clips encoded")
                raise typer.Exit(0 if stop.signal is None else 128 + stop.signal)

        try:
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
        except FloatingPointError as error:
            raise Failure(describe(error)) from error
    say.note(f"{stage}: {done} of {config.steps} steps done")
    if done < config.steps and config.final_lr < 1:
        say.note(
            f"note: the learning rate, {learning_rate(config, done):.2g} by now, falls until step "
            f"{config.steps}: the same command goes on, and fewer --steps end it earlier"
        )
    typer.echo(output)
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


@app.command(cls=Command)
def export(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    target: Annotated[Path, typer.Argument(help="Folder to write, such as cmdgen/assets/mini.")],
    dtype: Annotated[
        str, _option("float16, bfloat16 or float32.", known=("float16", "bfloat16", "float32"))
    ] = "float16",
) -> None:
    """Copy a finished run's model, without training state, to a folder."""
    from cmdgen.training.export import DTYPES, export_model

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    sizes = export_model(run, target, DTYPES[dtype])
    for name, size in sizes.items():
        typer.echo(f"{size / 2**20:7.2f} MiB  {name}", err=True)
    typer.echo(f"{sum(sizes.values()) / 2**20:7.2f} MiB  in all", err=True)
    typer.echo(target)
