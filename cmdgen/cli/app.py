"""The `cmdgen` command: its verbs, and the one place where errors become lines and exit codes."""

import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer

from cmdgen import __version__
from cmdgen.cli.errors import EXIT_CODES, FAILED, INTERRUPTED, USAGE, fail
from cmdgen.cli.evaluate import evaluate
from cmdgen.cli.sample import sample

app = typer.Typer(
    name="cmdgen",
    help="Short videos from text, by content-frame motion-latent decomposition.",
    epilog=EXIT_CODES,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(epilog=EXIT_CODES)(sample)
app.command("eval", epilog=EXIT_CODES)(evaluate)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cmdgen {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> NoReturn:
    """The entry point: run one command, the process's own unless given, and exit with its code."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(_run(arguments))
    except typer.Exit as end:
        sys.exit(end.exit_code)


def _run(arguments: list[str] | None) -> int | None:
    try:
        code: int | None = app(arguments, standalone_mode=False)
        return code
    except typer.TyperException as error:
        message = error.format_message()
        if "\n" not in message:
            fail(message, error.exit_code)
        # the help of a group of commands that was called without one
        typer.echo(message, err=True)
        return error.exit_code
    except ValueError as error:
        fail(error, USAGE)
    except OSError as error:
        fail(error, FAILED)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED


def _terminate(number: int, frame: FrameType | None) -> None:
    # unwinds like Ctrl-C does, so that temporary files are removed
    sys.exit(128 + number)
