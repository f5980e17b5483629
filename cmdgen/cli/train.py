"""`cmdgen train vae|autoencoder|content|motion|decoder|evdm` and `cmdgen train export`."""

import os
import time
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Any

import typer

from cmdgen.cli.command import Device, expand
from cmdgen.cli.errors import within_memory
from cmdgen.cli.help import Command, Group
from cmdgen.cli.progress import AsJson, JsonOrQuiet, Say
from cmdgen.cli.stop import Stop
from cmdgen.options import option, options_of
from cmdgen.training.config import DATA, EVDM, Shared, Start, build_model, presets_of, read_student, recipe

app = typer.Typer(cls=Group, no_args_is_help=True, help="Train a model, stage by stage, in one folder.")
_SUMMARIES = {
    "vae": "Frames to latents and back, learned on single frames.",
    "autoencoder": "Clips of latents to content frame and motion latents, and back. Needs vae.",
    "content": "Text to content frame, with the text encoder. Needs autoencoder.",
    "motion": "Text and content frame to motion latents. Needs content.",
    "decoder": "The VAE's decoder on what the autoencoder rebuilds: sharper. Needs autoencoder, comes last.",
    "evdm": "Frames from past and future frames, in pixels: a model of its own.",
}
# by stage, those that learn from what it makes
_LEARNERS = {
    "vae": ("autoencoder", "content", "motion", "decoder"),
    "autoencoder": ("content", "motion", "decoder"),
    "content": ("motion",),
}
_HELP = """{}

    The folder's path goes to stdout. After a stop, the same command continues, with any number
    of processes: torchrun --nproc-per-node N -m cmdgen train {stage} ...

    Examples:
        cmdgen train {stage} -o RUN
        cmdgen train {stage} -o RUN --minutes 30 --batch 8
    """


def _settings(stage: str) -> type:
    """Return a dataclass of a stage's settings, where None means the value of the recipe."""
    recipes = {preset: recipe(preset, stage) for preset in presets_of(stage)}
    members = []
    for i, part in enumerate(next(iter(recipes.values()))):
        cls: Any = type(part)
        for name, described in options_of(cls).items():
            defaults = {preset: _show(getattr(parts[i], name)) for preset, parts in recipes.items()}
            shown = replace(described, shown=_show_defaults(defaults))
            setting = field(default=None, metadata={"option": shown})
            members.append((name, described.type | None, setting))
    return make_dataclass("Settings", members, repr=False, eq=False)


def _show_defaults(defaults: dict[str, str]) -> str:
    """Return the defaults of a setting by preset as `VALUE; VALUE for PRESET, PRESET`."""
    presets = dict[str, list[str]]()
    for preset, value in defaults.items():
        presets.setdefault(value, []).append(preset)
    first, *others = presets
    return "; ".join([first, *(f"{value} for {', '.join(presets[value])}" for value in others)])


def _show(value: object) -> str:
    """Return a default as a user would type it; nothing for None."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _command(stage: str) -> Callable[..., None]:
    settings_type: Any = _settings(stage)

    def command(start: Start, shared: Shared, settings: settings_type, request: Device, say: JsonOrQuiet) -> None:
        _train(stage, start, shared, vars(settings), request.device, say)

    return expand(command)


for _stage, _help in _SUMMARIES.items():
    app.command(_stage, cls=Command, help=_HELP.format(_help, stage=_stage))(_command(_stage))


def _train(stage: str, start: Start, shared: Shared, settings: dict[str, Any], device_name: str, say: Say) -> None:
    started, leads = time.monotonic(), os.environ.get("RANK", "0") == "0"
    if not leads:
        # of the processes that torchrun started one reports
        say = replace(say, quiet=True)
    _check_gate(stage, start, shared)
    if start.teacher is None and (alone := [name for name in ("icd", "mca") if settings.get(name) is not None]):
        raise ValueError(f"--{alone[0]} has no effect without --teacher")
    if shared.latents is not None and stage in ("vae", EVDM):
        raise ValueError(f"--latents has no effect on {stage}, which learns from frames")

    import torch

    from cmdgen.pipelines.device import use_device
    from cmdgen.training.context import Run
    from cmdgen.training.data import open_data
    from cmdgen.training.distributed import join
    from cmdgen.training.loop import learning_rate
    from cmdgen.training.run import run_stage, settle

    if start.threads is not None:
        torch.set_num_threads(start.threads)
    chosen, shared = shared, settle(start.folder, shared, stage)
    model = build_model(shared) if start.teacher is None else read_student(start, chosen, stage)
    config, loss = recipe(shared.preset or model.name, stage).replaced(settings)
    device = use_device(device_name)
    data = open_data(shared.data or DATA, start.clips, model, device)
    if data.note:
        say.note(data.note)
    deadline = None if config.minutes is None else started + 60 * config.minutes
    smaller = "ask for a smaller --batch or --size, more --accumulate, or --gradient-checkpointing"
    progress = say.progress(deadline=deadline)
    with join(device) as ranks, Stop("this step") as stop, within_memory(smaller), progress as show:
        phases = set()

        def print_result(what: str, done: int, total: int) -> None:
            if leads:
                say.result(start.folder, {"output": str(start.folder), "stage": stage, what: done, "of": total})

        def report(phase: str, done: int, total: int, figures: dict[str, float]) -> None:
            phases.add(phase)
            show(phase, done, total, f"loss {figures['loss']:.4g}" if "loss" in figures else "")
            late = deadline is not None and time.monotonic() > deadline
            if phase.startswith("encode") and (stop() or late):
                # encoded clips are on disk: the next run continues after them
                say.note(f"{stage}: stopped with {done} of {total} clips encoded")
                print_result("encoded", done, total)
                raise typer.Exit(stop.code)

        run = Run(stage, start, shared, config, loss, model, data, device, report, stop, started, ranks)
        done = run_stage(run)
    say.note(f"{stage}: {done} of {config.steps} steps done")
    if done < config.steps and config.final_lr < 1:
        say.note(
            f"note: the learning rate, {learning_rate(config, done):.2g} by now, falls until step "
            f"{config.steps}: the same command goes on, and fewer --steps end it earlier"
        )
    later = _LEARNERS.get(stage, ()) if "train" in phases else ()
    if stale := [name for name in later if (start.folder / "training" / name).is_dir()]:
        say.note(f"note: {', '.join(stale)} learned from another {stage}: train them again with --restart")
    print_result("steps", done, config.steps)
    raise typer.Exit(stop.code)


def _check_gate(stage: str, start: Start, shared: Shared) -> None:
    """Raise ValueError for settings of attention that the part of `init` already has."""
    part = {"content": "unet"}.get(stage, stage)
    for name in shared.gate:
        if start.init is not None and (start.init / part).is_dir():
            raise ValueError(f"{start.init / part} brings its own {name.replace('_', ' ')}")


@dataclass(frozen=True)
class Export:
    """Options of `cmdgen train export`."""

    run: Path = option(MISSING, "Folder of the run.", argument=True)
    target: Path = option(MISSING, "Folder to write.", argument=True)
    dtype: str = option("float16", "Type of the weights.", choices=("float32", "float16", "bfloat16"))
    overwrite: bool = option(False, "Replace a model that is there.")


@app.command(cls=Command)
@expand
def export(options: Export, say: AsJson) -> None:
    """Copy a finished run's model, without training state, to a folder.

    Examples:
        cmdgen train export RUN MODEL
    """
    from cmdgen.pipelines.device import DTYPES
    from cmdgen.training.export import export_model

    sizes = export_model(options.run, options.target, DTYPES[options.dtype], overwrite=options.overwrite)
    for name, size in (sizes | {"in all": sum(sizes.values())}).items():
        typer.echo(f"{size / 2**20:7.2f} MiB  {name}", err=True)
    say.result(options.target, {"output": str(options.target), "bytes": sizes})
