"""`cmdgen inspect`: how a file was made, from the metadata in it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cmdgen.cli.errors import Failure, describe, printable
from cmdgen.cli.inputs import LATENTS, spool
from cmdgen.cli.progress import AsJson

_FILE = typer.Argument(metavar="FILE", help="A video, picture or latents that cmdgen wrote.")


def inspect(file: Annotated[Path, _FILE], say: AsJson) -> None:
    """Print how a file was made: model, prompt, options.

    Of latents, it also prints the shapes of the two tensors.

    Examples:
        cmdgen inspect corgi.mp4
        cmdgen inspect corgi.mp4 --json | jq .seed
    """
    try:
        metadata = _read(spool(file))
    except ValueError as error:
        raise Failure(describe(error)) from error
    if say.as_json:
        # in ASCII: metadata is untrusted, and may hold lone surrogates
        typer.echo(json.dumps(metadata))
        return
    width = max(map(len, metadata), default=0)
    for name, value in metadata.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        typer.echo(printable(f"{name:{width}}  {text}"))


def _read(file: Path) -> dict[str, Any]:
    if file.suffix.lower() != LATENTS:
        from cmdgen.video.read import read_metadata

        return read_metadata(file)
    from cmdgen.latents import read_header

    header = read_header(file)
    shapes = {"content": list(header.content), "motion": list(header.motion)}
    return {**header.metadata, "tensors": shapes | {"dtype": header.dtype}}
