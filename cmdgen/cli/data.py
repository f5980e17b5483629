"""`cmdgen data preview`: look at the clips that models learn from."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cmdgen.cli.errors import EXIT_CODES
from cmdgen.cli.size import parse_size
from cmdgen.config import WORLDS, WorldConfig

app = typer.Typer(no_args_is_help=True, help="Look at the clips that models learn from.")

_MOST = 200
_NAMES = "of these names, with commas between  [default: all that it has]"


@app.callback()
def _group() -> None:
    pass


@app.command(epilog=EXIT_CODES)
def preview(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The PNG to write.", show_default=False)
    ],
    data: Annotated[
        str, typer.Option(help=f"A rendered world ({', '.join(WORLDS)}) or a folder of videos.")
    ] = "world",
    count: Annotated[int, typer.Option(help="Clips, one a row.", min=1, max=_MOST)] = 12,
    columns: Annotated[int, typer.Option(help="Frames of each clip.", min=1, max=16)] = 8,
    size: Annotated[str, typer.Option(help="Of a frame, WIDTHxHEIGHT.")] = "128x128",
    split: Annotated[str, typer.Option(help="train, or test: held out.")] = "train",
    seed: Annotated[int, typer.Option(help="Of the world.", min=0)] = WorldConfig.seed,
    subjects: Annotated[str, typer.Option(help=f"Only subjects {_NAMES}")] = "",
    motions: Annotated[str, typer.Option(help=f"Only motions {_NAMES}")] = "",
    scenes: Annotated[str, typer.Option(help=f"Only scenes {_NAMES}")] = "",
    font: Annotated[
        str | None, typer.Option(help="NotoColorEmoji.ttf.  [default: where fonts usually are]")
    ] = None,
) -> None:
    """Write a contact sheet of captioned clips and print its path."""
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
        raise ValueError(f"data {data!r} is neither one of {', '.join(WORLDS)} nor a folder")
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


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for part in text.split(",") if (name := part.strip()))
