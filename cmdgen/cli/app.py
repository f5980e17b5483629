"""The `cmdgen` command: its verbs, and the one place where errors become lines and exit codes."""

import os
import signal
import sys
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from typer.core import TyperGroup
from typer.main import get_command

from cmdgen import __version__
from cmdgen.cli.completion import VARIABLE, complete, completion
from cmdgen.cli.data import app as data
from cmdgen.cli.decompose import decode, encode, reconstruct
from cmdgen.cli.doctor import doctor
from cmdgen.cli.errors import (
    CLOSED,
    ENCODER,
    FAILED,
    MEMORY,
    NOT_FOUND,
    USAGE,
    Failure,
    describe,
    printable,
    shorten,
)
from cmdgen.cli.evaluate import evaluate
from cmdgen.cli.help import Command, Group
from cmdgen.cli.inspect import inspect
from cmdgen.cli.models import app as models
from cmdgen.cli.profile import JSON_KEYS, profile
from cmdgen.cli.rehash import app as rehash
from cmdgen.cli.sample import sample
from cmdgen.cli.settings import config_path, read_settings
from cmdgen.cli.train import app as train

app = typer.Typer(
    name="cmdgen",
    cls=Group,
    help="""Short videos from text, by content-frame motion-latent decomposition.

    Examples:
        cmdgen sample "a corgi swimming" -o corgi.mp4
        cmdgen sample -f prompts.txt -o "clips/{index:04d}-{slug}.mp4"
        cmdgen sample "a corgi swimming" -o - | ffplay -
    """,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
VIDEOS, MODELS, MACHINE = "Videos", "Models", "This machine"
for verb in (sample, encode, decode, reconstruct, inspect):
    app.command(cls=Command, rich_help_panel=VIDEOS)(verb)
app.add_typer(models, name="models", rich_help_panel=MODELS)
app.add_typer(train, name="train", rich_help_panel=MODELS)
app.add_typer(data, name="data", rich_help_panel=MODELS)
app.command("eval", cls=Command, rich_help_panel=MODELS)(evaluate)
app.add_typer(rehash, name="rehash", rich_help_panel=MODELS)
app.command(cls=Command, rich_help_panel=MACHINE)(doctor)
app.command(cls=Command, epilog=JSON_KEYS, rich_help_panel=MACHINE)(profile)
app.command(cls=Command, rich_help_panel=MACHINE)(completion)


def _show_version(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        typer.echo(f"cmdgen {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Defaults for options, in TOML: a table for each command, such as [sample].  "
            "[default: config.toml in the folder that `cmdgen doctor` names]",
        ),
    ] = None,
    no_config: Annotated[bool, typer.Option("--no-config", help="Read no such file.")] = False,
) -> None:
    if no_config:
        if config is not None:
            raise ValueError("--config and --no-config contradict each other: give one")
        return
    path = config or config_path()
    if config is None and not path.exists():
        return
    assert isinstance(context.command, TyperGroup)
    try:
        context.default_map = read_settings(path, context.command)
    except ValueError:
        # the first says what is wrong with it, the others do without
        if context.invoked_subcommand not in ("doctor", "completion"):
            raise


def main(arguments: list[str] | None = None) -> NoReturn:
    """The entry point: run one command, the process's own unless given, and exit with its code."""
    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        # unwinds, so that temporary files are removed
        raise KeyboardInterrupt

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # nohup, and a shell's &, say that some are not for us
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    _replace_closed()
    if isinstance(sys.stdout, TextIOWrapper):
        # names of files that are no text come out as they went in
        sys.stdout.reconfigure(errors="surrogateescape")
    code = 0
    try:
        try:
            code = _run(sys.argv[1:] if arguments is None else arguments)
        except (typer.TyperException, Failure, ValueError, OSError, MemoryError) as error:
            if not stopped:
                code = _report(error)
        code = _flush(code)
    except KeyboardInterrupt:
        pass
    finally:
        # whatever it came out as: torch turns a KeyboardInterrupt into errors of its own at times
        if stopped:
            sys.exit(128 + stopped[0])
    sys.exit(code)


def _replace_closed() -> None:
    """Where a caller has closed one of the three streams, no file may be opened under its number.

    Nothing is said then where stderr is closed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _run(arguments: list[str]) -> int:
    # not the app itself: it would take a closed pipe for a failure
    command = get_command(app)
    if instruction := os.environ.get(VARIABLE):
        complete(command, instruction)
        return 0
    try:
        with command.make_context("cmdgen", arguments) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return 0


def _report(error: Exception) -> int:
    """Say what is wrong, and which exit code it has."""
    if isinstance(error, BrokenPipeError):
        return CLOSED
    if isinstance(error, typer.TyperException):
        message = error.format_message()
        # the help of a group of commands that was called without one is no error
        helps = type(error).__name__ == "NoArgsIsHelpError"
        _complain(message if helps else f"error: {shorten(message)}")
        return error.exit_code
    _complain(f"error: {describe(error)}")
    match error:
        case Failure():
            return error.code
        case FileNotFoundError() | ConnectionError():
            return NOT_FOUND
        case MemoryError():
            return MEMORY
        case ValueError():
            return USAGE
        case OSError():
            # what it brings along takes a moment, and help does without
            from cmdgen.video.write import EncoderError

            return ENCODER if isinstance(error, EncoderError) else FAILED
    return FAILED


def _complain(line: str) -> None:
    # whoever read stderr may have gone as well, or its disk be full
    with suppress(OSError):
        typer.echo("\n".join(map(printable, line.split("\n"))), err=True)


def _flush(code: int) -> int:
    """Write what is still to be written to stdout, and give the code to end with."""
    if sys.stdout is None:
        return code
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or _report(error)
        # Python tries again on its way out, and would complain in its own words
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
