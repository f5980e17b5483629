"""`cmdgen data preview|precompute`: look at the clips that models learn from; encode them once."""

from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from cmdgen.cli.command import Only, check_flags, expand
from cmdgen.cli.help import Command, Group
from cmdgen.cli.progress import AsJson, JsonOrQuiet
from cmdgen.cli.stop import Stop
from cmdgen.files import replace_with
from cmdgen.options import SHARD, SIZE, WHOLE, Shard, Size, option, write_size
from cmdgen.request import Request, threads_option
from cmdgen.training.config import CLIPS, CLIPS_OF, DATA, Shared, TrainConfig, build_model, recipe
from cmdgen.world.config import WORLDS, WorldConfig

app = typer.Typer(cls=Group, no_args_is_help=True, help="Look at the clips that models learn from; encode them once.")

# what a preview may change in a world
_NARROWED = ("seed", "subjects", "motions", "scenes", "font")


@dataclass(frozen=True)
class Sheet:
    """Options of a contact sheet."""

    output: Path = option(MISSING, "The PNG to write.", flags=("--output", "-o"))
    data: str = option("world", CLIPS_OF, complete="world")
    count: int = option(12, "Clips, one a row.", low=1, high=200)
    columns: int = option(8, "Frames of each clip.", low=1, high=16)
    size: Size = option((128, 128), "Size of a frame.", **SIZE)
    split: str = option("train", "train, or test: held out.", choices=("train", "test"))
    sprites: Path | None = option(
        None, "Write the subjects' pictures too, as a PNG that --font reads in place of the font."
    )

    def __post_init__(self) -> None:
        if not all(16 <= side <= 1024 for side in self.size):
            raise ValueError(f"size {write_size(self.size)}: both sides must be between 16 and 1024")
        folder = self.output.absolute().parent
        if not folder.is_dir():
            raise ValueError(f"folder {folder} does not exist")
        if self.output.is_dir():
            raise ValueError(f"{self.output} is a folder")
        for path in (self.output, self.sprites):
            if path is not None and path.suffix.lower() != ".png":
                raise ValueError(f"{path}: its name must end in .png")
        if self.sprites == self.output:
            raise ValueError(f"{self.output} is the sheet: give --sprites another name")


@app.command(cls=Command)
@expand
def preview(context: typer.Context, sheet: Sheet, world: Annotated[WorldConfig, Only(_NARROWED)], say: AsJson) -> None:
    """Write a contact sheet of captioned clips and print its path.

    Examples:
        cmdgen data preview -o sheet.png --data mini --split test
        cmdgen data preview -o cats.png --subjects cat --count 4
        cmdgen data preview -o sheet.png --data mini --sprites sprites.png
    """
    from cmdgen.data.clips import ClipSource
    from cmdgen.data.sheet import draw_sheet
    from cmdgen.training.data import open_source
    from cmdgen.world.world import World

    if sheet.data in WORLDS:
        chosen = {name: value for name in _NARROWED if (value := getattr(world, name))}
        source: ClipSource = (drawn := World(replace(WORLDS[sheet.data], **chosen)))
        if sheet.sprites is not None:
            drawn.write_sprites(sheet.sprites)
    else:
        check_flags(context, f"{sheet.data} is no rendered world", "output data count columns size split")
        source = open_source(sheet.data)
    indices = source.indices(sheet.split, sheet.count)
    picture = draw_sheet(source.render(indices, sheet.size), source.captions(indices), sheet.columns)
    with replace_with(sheet.output) as temporary:
        picture.save(temporary, "PNG")
    say.result(sheet.output, {"output": str(sheet.output)})


@dataclass(frozen=True)
class Latents:
    """Options of latents that many runs share."""

    output: Path = option(MISSING, "Folder of the latents; it may hold several sets.", flags=("--output", "-o"))
    vae: Path = option(MISSING, "Model folder with the vae/ that training gets.")
    clips: int | None = option(None, "Clips to learn from.", low=1, shown=f"all of a folder, {CLIPS} of a world")
    held_out: int | None = option(None, "Clips to evaluate on.", low=1, shown="as many as for `cmdgen train`")
    shard: Shard | None = option(
        None, "Encode this part of the files, 1/N to N/N; auto: as a SLURM array or torchrun counts.", **SHARD
    )
    threads: int | None = threads_option()

    def __post_init__(self) -> None:
        if not (self.vae / "vae").is_dir():
            raise FileNotFoundError(f"vae {self.vae} is no model folder: it has no vae/")


@app.command(cls=Command)
@expand
def precompute(
    *,
    latents: Latents,
    shared: Annotated[Shared, Only(("preset", "data", "size", "frames", "fps"))],
    train: Annotated[TrainConfig, Only(("precision",))],
    machine: Annotated[Request, Only(("device", "max_memory"))],
    say: JsonOrQuiet,
) -> None:
    """Encode clips with a VAE, once for many runs, and print the folder.

    `cmdgen train ... --latents FOLDER` finds what was encoded for the same data, size, frames and
    VAE, and at least as many clips; it refuses anything else and never writes there. After a
    stop, the same command continues. A clip of 16 frames at 512x1024 takes 1 MiB, a file of
    them at most 1 GiB. Several machines share the work by --shard in one folder; which of them
    encodes a file changes no bit of it.

    Examples:
        cmdgen data precompute -o latents --vae RUN --data clips/
        cmdgen data precompute -o latents --vae RUN --data clips/ --shard 2/8
        cmdgen train content -o RUN --latents latents
    """
    model = build_model(shared)
    if model.vae is None:
        raise ValueError(f"preset {model.name} works on pixels: there is nothing to encode")

    import torch

    from cmdgen.pipelines.device import use_device
    from cmdgen.training.data import open_data
    from cmdgen.training.latents import Codec, Encodings

    if latents.threads is not None:
        torch.set_num_threads(latents.threads)
    device = use_device(machine.device)
    bf16 = train.uses_bf16(device.type)
    codec = Codec(latents.vae / "vae", model, device, bf16, machine.max_memory)
    with Stop("these clips") as stop, say.progress() as show:

        def report(phase: str, done: int, total: int, figures: dict[str, float]) -> None:
            show(phase, done, total)
            if stop() and done < total:
                say.note(f"stopped with {done} of {total} clips: the same command goes on")
                raise typer.Exit(stop.code)

        source = open_data(shared.data or DATA, latents.clips, model, device)
        if source.note:
            say.note(source.note)
        held_out = latents.held_out or recipe(model.name, "content").train.held_out
        Encodings(source, codec, latents.output, report).precompute(held_out, latents.shard or WHOLE)
    say.result(latents.output, {"output": str(latents.output)})
