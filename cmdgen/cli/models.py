"""`cmdgen models`: the models there are, what they consist of, where to get more."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmdgen.cli.command import expand
from cmdgen.cli.completion import complete_model, one_of
from cmdgen.cli.errors import Failure, describe
from cmdgen.cli.help import Command, Group
from cmdgen.cli.progress import AsJson
from cmdgen.config import PRESETS, packaged_models
from cmdgen.options import option
from cmdgen.store.find import find_model

if TYPE_CHECKING:
    from cmdgen.store.catalogue import Model

app = typer.Typer(cls=Group, no_args_is_help=True, help="List, describe, pull and create models.")

_NAME = typer.Argument(
    metavar="NAME|DIR",
    autocompletion=lambda incomplete: complete_model(incomplete) + one_of(PRESETS)(incomplete),
    help="A packaged model, a preset, a folder, or OWNER/NAME in the local cache.",
)
_REPOSITORY = typer.Argument(metavar="REPO[@REV]", help="OWNER/NAME on the Hugging Face hub.")
_COPY = typer.Option("--output", "-o", metavar="PATH", help="A folder for a copy.  [default: the hub's cache]")


@app.command("list", cls=Command)
@expand
def list_models(say: AsJson) -> None:
    """List packaged models, presets, and models of the hub in the local cache."""
    from cmdgen.store.catalogue import describe_folder, describe_preset
    from cmdgen.store.hub import find_cached

    models = packaged_models().items()
    rows = [{"kind": "packaged", **_record(describe_folder(folder, name))} for name, folder in models]
    rows += [{"kind": "preset", **_record(describe_preset(preset))} for preset in PRESETS.values()]
    for snapshot in find_cached():
        refs = sorted(snapshot.refs)
        name = f"{snapshot.repo}@{refs[0] if refs else snapshot.commit[:12]}"
        try:
            rows.append({"kind": "cached", **_record(describe_folder(snapshot.folder, name))})
        except ValueError as error:
            # a broken model must not hide the others
            rows.append({"kind": "cached", "name": name, "error": describe(error)})
    cells = [("", "", "parameters", "size", "")]
    for row in rows:
        if "error" in row:
            cells.append((row["kind"], row["name"], "", "", f"not usable: {row['error']}"))
        else:
            place = row["folder"] or f"cmdgen models init {row['name']} -o DIR"
            numbers = f"{row['parameters'] / 1e6:.1f} M", _size(row["bytes"])
            cells.append((row["kind"], row["name"], *numbers, place))
    say.result("\n".join(_align(cells, right=(2, 3))), rows)


@app.command(cls=Command)
@expand
def show(model: Annotated[str, _NAME], say: AsJson) -> None:
    """Print what a model consists of, its licence, and which presets it fits.

    A part fits a preset that has the same configuration. The size of a preset is the size of the
    model that `cmdgen models init` writes.
    The UNet of a model that others wrote runs once, to check what its scheduler says of it.

    Examples:
        cmdgen models show mini
        cmdgen models show cmd-sd21 --json
    """
    from cmdgen.store.catalogue import describe_preset

    if model in PRESETS and model not in packaged_models():
        described = describe_preset(PRESETS[model])
        place, licence = f"a preset: cmdgen models init {model} -o DIR", "none: no weights"
    else:
        described = _describe_files(find_model(model), model)
        place, licence = str(described.folder), described.licence or "not stated"
    fits = ", ".join(described.presets) or "no preset as a whole"
    facts = {"model": described.name, "where": place, "licence": licence, "fits": fits}
    cells = [("", "parameters", "size", "", "fits")]
    for part in described.parts:
        fits = ", ".join(part.presets) or "no preset"
        cells.append((part.name, f"{part.parameters:,}", _size(part.bytes), part.dtype, fits))
    cells.append(("total", f"{described.parameters:,}", _size(described.bytes), "", ""))
    lines = [*(f"{name:16}{fact}" for name, fact in facts.items()), "", *_align(cells, right=(1, 2))]
    record = _record(described) | {"licence": described.licence, "parts": [vars(part) for part in described.parts]}
    say.result("\n".join(lines), record)


@dataclass(frozen=True)
class Init:
    """Options of `cmdgen models init`."""

    preset: str = option(MISSING, "Shape of the model.", choices=tuple(PRESETS), argument=True)
    output: Path = option(MISSING, "The folder to write.", flags=("--output", "-o"))
    seed: int = option(0, "Same seed, same weights.", low=0, high=2**63 - 1)
    dtype: str = option("float16", "Type of the weights.", choices=("float32", "float16", "bfloat16"))


@app.command(cls=Command)
@expand
def init(options: Init) -> None:
    """Write a model with random weights, to run and time a preset without a download.

    Its videos are noise. The folder's path goes to stdout.

    Examples:
        cmdgen models init cmd-sd21 -o DIR
    """
    from cmdgen.pipelines.device import DTYPES
    from cmdgen.store.create import create_model

    preset, dtype = PRESETS[options.preset], DTYPES[options.dtype]
    create_model(preset, options.output, seed=options.seed, dtype=dtype)
    tokenizer = "; the tokenizer is cmdgen's own, not CLIP's" if preset.text is not None else ""
    typer.echo(f"note: random weights: the videos are noise{tokenizer}", err=True)
    typer.echo(options.output)


@app.command(cls=Command)
def pull(repository: Annotated[str, _REPOSITORY], output: Annotated[Path | None, _COPY] = None) -> None:
    """Download a model from the Hugging Face hub and print its folder.

    Takes configurations, tokenizer and safetensors files, into the hub's cache (HF_HOME). HF_TOKEN
    opens gated and private models; with HF_HUB_OFFLINE=1 only the cache is used.

    Examples:
        cmdgen models pull OWNER/NAME
        cmdgen models pull OWNER/NAME@v1 -o DIR
    """
    from cmdgen.store import hub

    if output is not None and (output.exists() or output.is_symlink()):
        raise ValueError(f"{output} exists already: give another folder")
    folder = hub.pull(repository)
    described = _describe_files(folder, repository)
    typer.echo(f"licence: {described.licence or 'not stated'}", err=True)
    typer.echo(f"{described.parameters / 1e6:.1f} M parameters, {_size(described.bytes)}", err=True)
    if output is not None:
        hub.copy_snapshot(folder, output)
    typer.echo(output or folder)


def _describe_files(folder: Path, name: str) -> "Model":
    """Describe a folder; if its files are wrong, the command line is not at fault.

    A folder that others wrote is checked in full.
    """
    from cmdgen.store.catalogue import check_folder, describe_folder
    from cmdgen.store.parts import read_index

    try:
        described = describe_folder(folder, name)
        if "cmdgen" not in read_index(folder):
            check_folder(folder, weights=True)
            if {"text_encoder", "unet", "vae"} <= {part.name for part in described.parts}:
                # others wrote the scheduler, which has to say what their UNet predicts
                from cmdgen.pipelines.load import load_pipeline

                load_pipeline(folder, device="cpu").check_prediction()
        return described
    except ValueError as error:
        raise Failure(describe(error)) from error


def _record(model: "Model") -> dict[str, Any]:
    sums = {name: getattr(model, name) for name in ("parameters", "bytes", "presets")}
    return {"name": model.name, "folder": None if model.folder is None else str(model.folder), **sums}


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _align(rows: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> list[str]:
    """Return lines of cells in aligned columns; the columns in `right` are aligned to the right."""
    columns = []
    for i, cells in enumerate(zip(*rows, strict=True)):
        align, width = str.rjust if i in right else str.ljust, max(map(len, cells))
        columns.append([align(cell, width) for cell in cells])
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
