"""The `cmdgen` command: its verbs, and the one place where errors become lines and exit codes."""

import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer

from cmdgen import __version__
from cmdgen.cli.data import app as data
from cmdgen.cli.doctor import doctor
from cmdgen.cli.errors import EXIT_CODES, FAILED, USAGE, Failure, describe
from cmdgen.cli.evaluate import evaluate
from cmdgen.cli.models import app as models
from cmdgen.cli.profile import JSON_KEYS, profile
from cmdgen.cli.rehash import app as rehash
from cmdgen.cli.sample import sample
from cmdgen.cli.train import app as train

app = typer.Typer(
    name="cmdgen",
    help="Short videos from text, by content-frame motion-latent decomposition.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(epilog=EXIT_CODES)(sample)
app.command("eval", epilog=EXIT_CODES)(evaluate)
app.command(epilog=f"{JSON_KEYS}\n\n{EXIT_CODES}")(profile)
app.command(epilog=EXIT_CODES)(doctor)
app.add_typer(train, name="train")
app.add_typer(data, name="data")
app.add_typer(models, name="models")
app.add_typer(rehash, name="rehash")


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
    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        # unwinds, so that temporary files are removed
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    code: int | None = None
    try:
        code = app(arguments, standalone_mode=False)
    except (typer.TyperException, Failure, ValueError, OSError) as error:
        if not stopped:
            code = _report(error)
    except KeyboardInterrupt:
        pass
    finally:
        # whatever it came out as: torch turns a KeyboardInterrupt into errors of its own at times
        if stopped:
            sys.exit(128 + stopped[0])
    sys.exit(code)


def _report(error: Exception) -> int:
    """Say what is wrong, and which exit code it has."""
    if isinstance(error, typer.TyperException):
        message = error.format_message()
        # the help of a group of commands that was called without one has lines of its own
        typer.echo(message if "\n" in message else f"error: {message}", err=True)
        return error.exit_code
    typer.echo(f"error: {describe(error)}", err=True)
    return USAGE if isinstance(error, ValueError) else FAILED
