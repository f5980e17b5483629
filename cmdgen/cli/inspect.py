"""`cmdgen inspect`: what a file of ours says about how it was made."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cmdgen.cli.errors import Failure, describe, printable
from cmdgen.cli.options import AsJson


def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A video, picture or latents that cmdgen wrote.")
    ],
    as_json: AsJson = False,
) -> None:
    """Print what a file says about how it was made: model, prompt, seeds, options.

    Of latents, the shapes of the two tensors as well.

    Examples:
        cmdgen inspect corgi.mp4
        cmdgen inspect corgi.mp4 --json | jq .seed
    """
    from cmdgen.latents import SUFFIX, read_header
    from cmdgen.video.read import read_metadata

    found: dict[str, Any]
    try:
        if file.suffix.lower() == SUFFIX:
            header = read_header(file)
            shapes = {"content": list(header.content), "motion": list(header.motion)}
            found = {**header.metadata, "tensors": shapes | {"dtype": header.dtype}}
        else:
            found = read_metadata(file)
    except ValueError as error:
        # a fault of the file
        raise Failure(describe(error)) from error
    if as_json:
        # escaped: what a stranger wrote may be no Unicode
        typer.echo(json.dumps(found))
        return
    width = max(map(len, found), default=0)
    for name, value in found.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        typer.echo(printable(f"{name:{width}}  {text}"))
