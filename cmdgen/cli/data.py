"""`cmdgen data preview|precompute`: look at the clips that models learn from; encode them once."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cmdgen.cli.command import Only, expand
from cmdgen.cli.completion import one_of
from cmdgen.cli.help import Command, Group
from cmdgen.cli.options import Device, Precision, Quiet, Threads
from cmdgen.cli.progress import Say
from cmdgen.cli.size import parse_memory, parse_size
from cmdgen.cli.stop import Stop
from cmdgen.training.config import CLIPS, DATA, Shared, TrainConfig, build_model, recipe
from cmdgen.world.config import WORLDS, WorldConfig

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    help="Look at the clips that models learn from; encode them once.",
)

WORLD = "Rendered world"
_MOST = 200
_NAMES = "of these names, with commas between  [default: all that it has]"


@app.command(cls=Command)
def preview(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The PNG to write.", show_default=False)
    ],
    data: Annotated[
        str,
        typer.Option(
            help=f"A rendered world ({', '.join(WORLDS)}) or a folder of videos.",
            autocompletion=one_of(WORLDS),
        ),
    ] = "world",
    count: Annotated[int, typer.Option(help="Clips, one a row.", min=1, max=_MOST)] = 12,
    columns: Annotated[int, typer.Option(help="Frames of each clip.", min=1, max=16)] = 8,
    size: Annotated[str, typer.Option(help="Of a frame, WIDTHxHEIGHT.")] = "128x128",
    split: Annotated[
        str,
        typer.Option(help="train, or test: held out.", autocompletion=one_of(("train", "test"))),
    ] = "train",
    seed: Annotated[
        int, typer.Option(help="Of the world.", min=0, rich_help_panel=WORLD)
    ] = WorldConfig.seed,
    subjects: Annotated[
        str, typer.Option(help=f"Only subjects {_NAMES}", rich_help_panel=WORLD)
    ] = "",
    motions: Annotated[
        str, typer.Option(help=f"Only motions {_NAMES}", rich_help_panel=WORLD)
    ] = "",
    scenes: Annotated[str, typer.Option(help=f"Only scenes {_NAMES}", rich_help_panel=WORLD)] = "",
    font: Annotated[
        str | None,
        typer.Option(
            help="NotoColorEmoji.ttf.  [default: where fonts usually are]", rich_help_panel=WORLD
        ),
    ] = None,
) -> None:
    """Write a contact sheet of captioned clips and print its path.

    Examples:
        cmdgen data preview -o sheet.png --data mini --split test
        cmdgen data preview -o cats.png --subjects cat --count 4
    """
    height, width = parse_size(size)
    if not (16 <= width <= 1024 and 16 <= height <= 1024):
        raise ValueError(f"size {size}: both sides must be between 16 and 1024")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"folder {output.absolute().parent} does not exist")
    if output.is_dir():
        raise ValueError(f"{output} is a folder")

    # torch: only once all that can be said without it has been
    from cmdgen.data.clips import ClipSource
    from cmdgen.data.folder import Folder
    from cmdgen.data.sheet import draw_sheet
    from cmdgen.data.world import World

    source: ClipSource
    if data in WORLDS:
        config = replace(
            WORLDS[data],
            seed=seed,
            font=font,
            subjects=_names(subjects) or WORLDS[data].subjects,
            motions=_names(motions) or WORLDS[data].motions,
            scenes=_names(scenes) or WORLDS[data].scenes,
        )
        source = World(config)
    elif Path(data).is_dir():
        source = Folder(Path(data))
    else:
        raise FileNotFoundError(f"data {data!r} is neither one of {', '.join(WORLDS)} nor a folder")
    sheet = draw_sheet(source.render(source.indices(split, count), (height, width)), columns)
    # whole or not at all: in the same folder, then renamed
    handle, name = tempfile.mkstemp(suffix=".png", dir=output.absolute().parent)
    try:
        with os.fdopen(handle, "wb") as file:
            sheet.save(file, "PNG")
        os.chmod(name, 0o644)
        os.replace(name, output)
    finally:
        Path(name).unlink(missing_ok=True)
    typer.echo(output)


@app.command(cls=Command)
@expand
def precompute(
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder of the latents; it may hold several sets.",
            show_default=False,
        ),
    ],
    vae: Annotated[
        Path,
        typer.Option(help="Model folder with the vae/ that training gets.", show_default=False),
    ],
    shared: Annotated[Shared, Only(("preset", "data", "size", "frames"))],
    clips: Annotated[
        int | None,
        typer.Option(
            help=f"Clips to learn from.  [default: all of a folder, {CLIPS} of a world]", min=1
        ),
    ] = None,
    held_out: Annotated[
        int | None, typer.Option(help="Clips to evaluate on.  [default: as `cmdgen train`]")
    ] = None,
    device: Device = "auto",
    precision: Precision = TrainConfig.precision,
    threads: Threads = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="What encoding may hold beside the weights, such as 1GB: the result stays the "
            "same.  [default: what is fastest]",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Encode clips with a VAE, once for many runs, and print the folder.

    `cmdgen train ... --latents FOLDER` finds what was encoded for the same data, size, frames and
    VAE, and at least as many clips; it refuses anything else and never writes there. Interrupted,
    the same command goes on where it was. A clip of 16 frames at 512x1024 takes 1 MiB.

    Examples:
        cmdgen data precompute -o latents --vae RUN --data clips/
        cmdgen train content -o RUN --latents latents
    """
    model = build_model(shared)
    config = replace(recipe(model.name, "content").train, precision=precision)
    if held_out is not None:
        config = replace(config, held_out=held_out)
    limit = None if max_memory is None else parse_memory(max_memory)
    if model.vae is None:
        raise ValueError(f"preset {model.name} works on pixels: there is nothing to encode")
    if not (vae / "vae").is_dir():
        raise FileNotFoundError(f"vae {vae} is no model folder: it has no vae/")

    import torch

    from cmdgen.pipeline import choose_device
    from cmdgen.training.data import open_data
    from cmdgen.training.latents import Codec, Encodings

    if threads is not None:
        torch.set_num_threads(threads)
    place, say = choose_device(device), Say(quiet=quiet)
    codec = Codec(vae / "vae", model, place, config.uses_bf16(place.type), limit)
    with Stop("these clips") as stop, say.progress() as show:

        def report(phase: str, done: int, total: int, figures: dict[str, float]) -> None:
            show(phase, done, total)
            if stop.signal is not None and done < total:
                say.note(f"stopped with {done} of {total} clips: the same command goes on")
                raise typer.Exit(stop.code)

        encodings = Encodings(
            open_data(shared.data or DATA, clips, model, place), codec, output, report
        )
        encodings.precompute(config.held_out)
    typer.echo(output)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for part in text.split(",") if (name := part.strip()))
