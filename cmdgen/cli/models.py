"""`cmdgen models`: the models there are, what they consist of, where to get more."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmdgen.cli.command import expand
from cmdgen.cli.completion import complete_model, one_of
from cmdgen.cli.errors import Failure, describe
from cmdgen.cli.help import Command, Group
from cmdgen.cli.progress import AsJson
from cmdgen.compression.units import PRUNED
from cmdgen.config import ANIMATEDIFF, PRESETS, PUBLIC, packaged_models
from cmdgen.options import option
from cmdgen.store.find import composed_models, find_model

if TYPE_CHECKING:
    from cmdgen.store.catalogue import Model

app = typer.Typer(cls=Group, no_args_is_help=True, help="List, describe, pull and create models.")

_SHAPES = PRESETS | PUBLIC | PRUNED
_NAME = typer.Argument(
    metavar="NAME|DIR",
    autocompletion=lambda incomplete: complete_model(incomplete) + one_of(_SHAPES)(incomplete),
    help="A packaged model, a preset, a folder, or OWNER/NAME in the local cache.",
)
_VERIFY = typer.Option("--verify", help="Read all weights, and compare them with their digests.")
_REPOSITORY = typer.Argument(
    metavar="NAME|REPO[@REV]",
    autocompletion=one_of(PUBLIC),
    help="A known name, or OWNER/NAME on the Hugging Face hub.",
)
_BASE = typer.Option("--base", metavar="REPO", help="The Stable Diffusion 1.5 that motion modules go into.")
_FILE = typer.Option("--file", metavar="NAME", help="One file of motion modules in their repository.")
_LORA = typer.Option(
    "--lora", metavar="REPO[:SCALE]", help="LoRA that the model is put together with, or a file; repeatable."
)
_FULL = typer.Option("--full", help="Prefer float32 to half-precision files.")
_CHECKPOINT = typer.Argument(metavar="FILE", help="A checkpoint in one file, .safetensors.")
_FOLDER = typer.Option("--output", "-o", help="The folder to write.")
_TOKENIZER = typer.Option("--tokenizer", metavar="NAME|DIR", help="The model whose tokenizer it reads with.")
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
    rows += [{"kind": "public", **_record(describe_preset(public))} for public in PUBLIC.values()]
    composed = sorted(composed_models().glob("*/model_index.json"))
    rows += [_describe_pulled(path.parent, path.parent.name) for path in composed]
    for snapshot in find_cached():
        refs = sorted(snapshot.refs)
        name = f"{snapshot.repo}@{refs[0] if refs else snapshot.commit[:12]}"
        rows.append(_describe_pulled(snapshot.folder, name))
    cells = [("", "", "parameters", "size", "")]
    for row in rows:
        if "error" in row:
            cells.append((row["kind"], row["name"], "", "", f"not usable: {row['error']}"))
        else:
            verb = "pull {name}" if row["kind"] == "public" else "init {name} -o DIR"
            place = row["folder"] or f"cmdgen models {verb}".format(**row)
            numbers = f"{row['parameters'] / 1e6:.1f} M", _size(row["bytes"])
            cells.append((row["kind"], row["name"], *numbers, place))
    say.result("\n".join(_align(cells, right=(2, 3))), rows)


@app.command(cls=Command)
@expand
def show(model: Annotated[str, _NAME], say: AsJson, verify: Annotated[bool, _VERIFY] = False) -> None:
    """Print what a model consists of, its licence, and which presets it fits.

    A part fits a preset that has the same configuration. The size of a preset is the size of the
    model that `cmdgen models init` writes.
    The UNet of a model that others wrote runs once, to check what its scheduler says of it.
    Files that cmdgen wrote hold a digest, and files of the hub's cache are named by theirs. Loading a
    model checks those of less than 64 MiB, pull those that it brings, and --verify all.

    Examples:
        cmdgen models show mini
        cmdgen models show my-model --verify
        cmdgen models show cmd-sd21 --json
    """
    from cmdgen.store.catalogue import describe_preset, verify_folder

    pulled = composed_models() / model
    if model in _SHAPES and model not in packaged_models() and not pulled.is_dir():
        described = describe_preset(_SHAPES[model])
        place, licence = f"a preset: cmdgen models init {model} -o DIR", "none: no weights"
        if verify:
            raise ValueError(f"{model} is a preset: there are no weights to verify")
        if model in PUBLIC:
            place, licence = f"not here yet: cmdgen models pull {model}", "of each part, by pull"
    else:
        described = _describe_files(find_model(model), model)
        place, licence = str(described.folder), described.licence or "not stated"
    fits = ", ".join(described.presets) or "no preset as a whole"
    facts = {"model": described.name, "where": place, "licence": licence, "fits": fits}
    digests: dict[str, int] = {}
    if verify:
        try:
            digests = dict(zip(("verified", "files"), verify_folder(described.folder or Path()), strict=True))
        except ValueError as error:
            raise Failure(describe(error)) from error
        facts["digests"] = "{verified} of {files} files match theirs, others have none".format(**digests)
    cells = [("", "parameters", "size", "", "fits")]
    for part in described.parts:
        fits = ", ".join(part.presets) or "no preset"
        cells.append((part.name, f"{part.parameters:,}", _size(part.bytes), part.dtype, fits))
    cells.append(("total", f"{described.parameters:,}", _size(described.bytes), "", ""))
    lines = [*(f"{name:16}{fact}" for name, fact in facts.items()), "", *_align(cells, right=(1, 2))]
    record = _record(described) | {"licence": described.licence, "parts": [vars(part) for part in described.parts]}
    say.result("\n".join(lines), record | digests)


@dataclass(frozen=True)
class Init:
    """Options of `cmdgen models init`."""

    preset: str = option(MISSING, "Shape of the model.", choices=tuple(_SHAPES), argument=True)
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

    preset, dtype = _SHAPES[options.preset], DTYPES[options.dtype]
    create_model(preset, options.output, seed=options.seed, dtype=dtype)
    tokenizer = "; the tokenizer is cmdgen's own, not CLIP's" if preset.text is not None else ""
    typer.echo(f"note: random weights: the videos are noise{tokenizer}", err=True)
    typer.echo(options.output)


@app.command(cls=Command)
def pull(
    repository: Annotated[str, _REPOSITORY],
    output: Annotated[Path | None, _COPY] = None,
    base: Annotated[str | None, _BASE] = None,
    file: Annotated[str | None, _FILE] = None,
    lora: Annotated[list[str] | None, _LORA] = None,
    full: Annotated[bool, _FULL] = False,
) -> None:
    """Download a model from the Hugging Face hub and print its folder.

    Takes configurations, tokenizer and safetensors files, into the hub's cache (HF_HOME). HF_TOKEN
    opens gated and private models; with HF_HUB_OFFLINE=1 only the cache is used. A broken
    connection goes on in the middle of a file; a pull that was stopped, with the files that are missing.

    NAME is one of animatediff, animatediff-v2, animatediff-lightning, animatelcm, svd, svd-xt,
    svd-xt-1.1: its parts come from several repositories, and --model NAME samples it. So does the
    name of motion modules of AnimateDiff that are pulled with --base. A repository that holds
    a LoRA alone is one for `cmdgen sample --lora`.

    Examples:
        cmdgen models pull animatediff-lightning
        cmdgen models pull OWNER/NAME@v1 -o DIR
        cmdgen models pull OWNER/MOTION --base OWNER/NAME
    """
    from cmdgen.store import hub
    from cmdgen.store.recipes import RECIPES, Recipe, pull_recipe

    if output is not None and (output.exists() or output.is_symlink()):
        raise ValueError(f"{output} exists already: give another folder")
    recipe = RECIPES.get(repository)
    if recipe is None and base is not None:
        recipe = Recipe(ANIMATEDIFF, base, repository, file)
    elif file is not None or (recipe is None and lora):
        raise ValueError("--file and --lora go with motion modules, which need --base")
    elif recipe is not None and base is not None:
        if recipe.adapter is None:
            raise ValueError(f"--base has no effect: {repository} has no motion modules")
        recipe = replace(recipe, base=base)
    report = partial(typer.echo, err=True)
    if recipe is None:
        folder = hub.pull(repository, full=full, report=report)
        if not (folder / "model_index.json").is_file():
            typer.echo("note: it is a LoRA, for --lora of cmdgen sample", err=True)
            typer.echo(folder)
            return
    else:
        name = hub.parse_name(repository)[0].rpartition("/")[2]
        folder = pull_recipe(name, recipe, loras=lora or (), full=full, report=report)
    described = _describe_files(folder, repository)
    typer.echo(f"licence: {described.licence or 'not stated'}", err=True)
    typer.echo(f"{described.parameters / 1e6:.1f} M parameters, {_size(described.bytes)}", err=True)
    if output is not None:
        hub.copy_snapshot(folder, output)
    typer.echo(output or folder)


@app.command("import", cls=Command)
def import_file(
    file: Annotated[Path, _CHECKPOINT],
    output: Annotated[Path, _FOLDER],
    tokenizer: Annotated[str | None, _TOKENIZER] = None,
) -> None:
    """Write the model folder of a checkpoint: Stable Diffusion 1 or 2 in one safetensors file.

    Weights stay as they are stored. Whether the UNet predicts noise or velocity is told by running it
    once. The file has no tokenizer: it is copied from a model that was pulled. `cmdgen sample --model
    FILE` does the same on its own, into the user's cache.

    Examples:
        cmdgen models import realistic.safetensors -o DIR --tokenizer animatediff
    """
    from cmdgen.store.single import import_checkpoint

    import_checkpoint(file, output, None if tokenizer is None else find_model(tokenizer))
    typer.echo(output)


def _describe_pulled(folder: Path, name: str) -> dict[str, Any]:
    """Return a row of the list; a broken model must not hide the others."""
    from cmdgen.store.catalogue import describe_folder

    try:
        return {"kind": "cached", **_record(describe_folder(folder, name))}
    except ValueError as error:
        return {"kind": "cached", "name": name, "error": describe(error)}


def _describe_files(folder: Path, name: str) -> "Model":
    """Describe a folder; if its files are wrong, the command line is not at fault.

    A folder that others wrote is checked in full.
    """
    from cmdgen.store.catalogue import check_folder, check_prediction, describe_folder
    from cmdgen.store.parts import read_index

    try:
        described = describe_folder(folder, name)
        if "cmdgen" not in read_index(folder):
            check_folder(folder, weights=True)
            if {"text_encoder", "unet", "vae"} <= {part.name for part in described.parts}:
                # others wrote the scheduler, which has to say what their UNet predicts
                check_prediction(folder)
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
