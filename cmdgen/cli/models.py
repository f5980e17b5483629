"""`cmdgen models`: what there is, what it consists of, where to get more."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmdgen.cli.completion import complete_model, one_of
from cmdgen.cli.errors import Failure, describe
from cmdgen.cli.help import Command, Group
from cmdgen.cli.options import AsJson
from cmdgen.config import PRESETS, packaged_models
from cmdgen.store.find import find_model

if TYPE_CHECKING:
    from cmdgen.store.catalogue import Model

app = typer.Typer(cls=Group, no_args_is_help=True, help="List, describe, pull and create models.")


def _complete_name(incomplete: str) -> list[str]:
    return complete_model(incomplete) + one_of(PRESETS)(incomplete)


@app.command("list", cls=Command)
def list_models(as_json: AsJson = False) -> None:
    """List packaged models, presets, and models of the hub in the local cache."""
    from cmdgen.store.catalogue import describe_folder, describe_preset
    from cmdgen.store.hub import find_cached

    rows: list[dict[str, Any]] = []
    for name, folder in packaged_models().items():
        rows.append({"kind": "packaged", **_row(describe_folder(folder, name))})
    for preset in PRESETS.values():
        rows.append({"kind": "preset", **_row(describe_preset(preset))})
    for snapshot in find_cached():
        refs = sorted(snapshot.refs)
        name = f"{snapshot.repo}@{refs[0] if refs else snapshot.commit[:12]}"
        try:
            rows.append({"kind": "cached", **_row(describe_folder(snapshot.folder, name))})
        except ValueError as error:
            # one that is broken must not hide the others
            rows.append({"kind": "cached", "name": name, "error": describe(error)})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    cells = [("", "", "parameters", "size", "")]
    for row in rows:
        if "error" in row:
            cells.append((row["kind"], row["name"], "", "", f"not usable: {row['error']}"))
        else:
            place = row["folder"] or f"cmdgen models init {row['name']} -o DIR"
            numbers = f"{row['parameters'] / 1e6:.1f} M", _size(row["bytes"])
            cells.append((row["kind"], row["name"], *numbers, place))
    _print_columns(cells)


@app.command(cls=Command)
def show(
    model: Annotated[
        str,
        typer.Argument(
            metavar="NAME|DIR",
            autocompletion=_complete_name,
            help="A packaged model, a preset, a folder, or OWNER/NAME in the local cache.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Say what a model consists of, its licence, and which presets it fits.

    A part fits a preset where it has the preset's configuration. The size of a preset is that
    which `cmdgen models init` writes.

    Examples:
        cmdgen models show mini
        cmdgen models show cmd-sd21 --json
    """
    from cmdgen.store.catalogue import describe_preset

    folder = None if _is_bare_preset(model) else find_model(model)
    found = describe_preset(PRESETS[model]) if folder is None else _describe_files(folder, model)
    if as_json:
        parts = [{**vars(part), "presets": list(part.presets)} for part in found.parts]
        report = {**_row(found), "licence": found.licence, "parts": parts}
        typer.echo(json.dumps(report, indent=2))
        return
    licence = found.licence or ("none: no weights" if folder is None else "not stated")
    place = f"a preset: cmdgen models init {found.name} -o DIR" if folder is None else str(folder)
    typer.echo(f"{'model':16}{found.name}\n{'where':16}{place}\n{'licence':16}{licence}")
    typer.echo(f"{'fits':16}{', '.join(found.presets) or 'no preset as a whole'}\n")
    cells = [("", "parameters", "size", "", "fits")]
    for part in found.parts:
        fits = ", ".join(part.presets) or "no preset"
        cells.append((part.name, f"{part.parameters:,}", _size(part.bytes), part.dtype, fits))
    cells.append(("total", f"{found.parameters:,}", _size(found.bytes), "", ""))
    _print_columns(cells, right=(1, 2))


@app.command(cls=Command)
def init(
    preset: Annotated[
        str,
        typer.Argument(
            metavar="PRESET",
            help=f"One of {', '.join(PRESETS)}.",
            autocompletion=one_of(PRESETS),
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to write.", show_default=False)
    ],
    seed: Annotated[int, typer.Option(help="Same seed, same weights.", min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float16",
) -> None:
    """Write a model with random weights, to run and time a preset with no download.

    What it makes is noise. The folder's path goes to stdout.

    Examples:
        cmdgen models init cmd-sd21 -o DIR
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is not one of {', '.join(PRESETS)}")
    if seed >= 2**63:
        raise ValueError(f"seed {seed} is not between 0 and 2^63 - 1")
    from cmdgen.pipeline import DTYPES
    from cmdgen.store.catalogue import create_model

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    create_model(PRESETS[preset], output, seed=seed, dtype=DTYPES[dtype])
    note = "random weights: what it makes is noise"
    if PRESETS[preset].text is not None:
        note += "; the tokenizer is cmdgen's own, not CLIP's"
    typer.echo(f"note: {note}", err=True)
    typer.echo(output)


@app.command(cls=Command)
def pull(
    repository: Annotated[
        str, typer.Argument(metavar="REPO[@REV]", help="OWNER/NAME on the Hugging Face hub.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A folder to copy it to.  [default: the cache alone]"),
    ] = None,
) -> None:
    """Download a model from the Hugging Face hub and print its folder.

    Takes configurations, tokenizer and safetensors alone. Its place is the hub's cache (HF_HOME);
    HF_TOKEN opens what is gated or private; with HF_HUB_OFFLINE=1 the cache alone is asked.

    Examples:
        cmdgen models pull OWNER/NAME
        cmdgen models pull OWNER/NAME@v1 -o DIR
    """
    from cmdgen.store import hub

    hub.parse_name(repository)
    if output is not None and (output.exists() or output.is_symlink()):
        raise ValueError(f"{output} is there already: give another folder")
    folder = hub.pull(repository)
    found = _describe_files(folder, repository)
    typer.echo(f"licence: {found.licence or 'not stated'}", err=True)
    typer.echo(f"{found.parameters / 1e6:.1f} M parameters, {_size(found.bytes)}", err=True)
    if output is not None:
        hub.copy_snapshot(folder, output)
    typer.echo(output or folder)


def _is_bare_preset(model: str) -> bool:
    return model in PRESETS and model not in packaged_models()


def _describe_files(folder: Path, name: str) -> "Model":
    """What a folder holds; its being there, what is wrong with it is no fault of the question."""
    from cmdgen.store.catalogue import describe_folder

    try:
        return describe_folder(folder, name)
    except ValueError as error:
        raise Failure(describe(error)) from error


def _row(model: "Model") -> dict[str, Any]:
    return {
        "name": model.name,
        "folder": None if model.folder is None else str(model.folder),
        "parameters": model.parameters,
        "bytes": model.bytes,
        "presets": list(model.presets),
    }


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _print_columns(rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = (2, 3)) -> None:
    """Cells in aligned columns; those of numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        typer.echo("  ".join(cells).rstrip())
