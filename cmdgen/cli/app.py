"""The `cmdgen` command: its verbs, and where errors become one line and an exit code."""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib import import_module
from io import TextIOWrapper
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.main import get_command

from cmdgen import __version__
from cmdgen.cli.command import expand
from cmdgen.cli.completion import VARIABLE, complete
from cmdgen.cli.errors import describe, exit_code, printable, shorten
from cmdgen.cli.help import Command, Group
from cmdgen.cli.settings import Defaults, read_settings

# bytes that loading torch takes
_TORCH_SPACE = 640 * 2**20
VIDEOS, MODELS, MACHINE = "Videos", "Models", "This machine"
# by name: title of the group, module and attribute in `cmdgen.cli`, and the first sentence of its
# help, which a test compares: to import all verbs for it would take as long as everything else
VERBS = {
    "sample": (VIDEOS, "sample.sample", "Make videos from text prompts."),
    "predict": (VIDEOS, "predict.predict", "Continue a clip or a picture by more frames."),
    "interpolate": (VIDEOS, "predict.interpolate", "Put frames between those of pictures and clips."),
    "encode": (VIDEOS, "decompose.encode", "Turn a video into content frame and motion latents."),
    "decode": (VIDEOS, "decompose.decode", "Turn a content frame and motion latents into a video."),
    "reconstruct": (VIDEOS, "decompose.reconstruct", "Encode a video, decode it and compare."),
    "inspect": (VIDEOS, "inspect.inspect", "Print how a file was made: model, prompt, options."),
    "eval": (MODELS, "evaluate.evaluate", "Measure a model on what training never showed."),
    "models": (MODELS, "models.app", "List, describe, pull and create models."),
    "train": (MODELS, "train.app", "Train a model, stage by stage, in one folder."),
    "data": (MODELS, "data.app", "Look at the clips that models learn from; encode them once."),
    "compress": (MODELS, "compress.app", "Make a model smaller: measure its blocks, drop some, compare."),
    "rehash": (MODELS, "rehash.app", "Calibrate step rehash; compare it with fewer steps."),
    "doctor": (MACHINE, "doctor.doctor", "Check devices, ffmpeg, kernels and the default model."),
    "profile": (MACHINE, "profile.profile", "Measure the stages of sampling: time, memory, work."),
    "completion": (MACHINE, "completion.completion", "Print a script for completion in a shell."),
}
_PLAIN: Any = {"add_completion": False, "rich_markup_mode": None}


def _load(name: str) -> Any:
    module, _, attribute = VERBS[name][1].partition(".")
    return getattr(import_module(f"cmdgen.cli.{module}"), attribute)


@cache
def _build(name: str) -> Any:
    """Return a verb as a command with its options."""
    verb, parent = _load(name), typer.Typer(callback=lambda: None, **_PLAIN)
    if isinstance(verb, typer.Typer):
        parent.add_typer(verb, name=name)
    else:
        epilog = getattr(sys.modules[verb.__module__], "EPILOG", None)
        parent.command(name, cls=Command, epilog=epilog)(expand(verb))
    group: Any = get_command(parent)
    return group.commands[name]


class _Verbs(Group):
    """All verbs. Each is imported, and gets its options, when it is needed: that is faster."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        names: dict[str, Any] = dict.fromkeys(VERBS)
        self.commands = names | dict(self.commands)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _build(cmd_name) if cmd_name in VERBS else self.commands.get(cmd_name)

    def summaries(self) -> Iterator[tuple[str, str, str]]:
        return ((title, name, summary) for name, (title, _, summary) in VERBS.items())


app = typer.Typer(cls=_Verbs, no_args_is_help=True, **_PLAIN)


def _show_version(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        typer.echo(f"cmdgen {__version__}")
        raise typer.Exit


_VERSION = typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")


@app.callback()
@expand
def _options(context: typer.Context, defaults: Defaults, version: Annotated[bool, _VERSION] = False) -> None:
    """Make short videos from text prompts.

    One diffusion model samples a content frame, another one motion latents; a decoder makes them a
    video. `cmdgen COMMAND --help` describes a command.

    Examples:
        cmdgen sample "a corgi swimming" -o corgi.mp4
        cmdgen sample -f prompts.txt -o "clips/{index:04d}-{slug}.mp4"
        cmdgen sample "a corgi swimming" -o - | ffplay -
    """
    if (path := defaults.path) is None:
        return
    try:
        context.default_map = read_settings(path, context.command)
    except ValueError:
        # doctor reports what is wrong with the file, completion does without it
        if context.invoked_subcommand not in ("doctor", "completion"):
            raise


class _Stopped(KeyboardInterrupt):
    """A signal arrived. Raised in the code of `exec` or `eval`, KeyboardInterrupt itself would make SIGINT end
    `python -m cmdgen`, whatever code it exits with."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run one command, the process's own unless `arguments` are given, and exit with its code."""
    received: list[int] = []
    former, hook, runs = dict[int, Any](), sys.unraisablehook, True

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        # unwinds the stack, so that temporary files are removed
        if runs:
            raise _Stopped

    def report(lost: "sys.UnraisableHookArgs") -> None:
        # raised in a destructor, it would unwind nothing
        if received and lost.exc_type is _Stopped:
            os._exit(128 + received[0])
        hook(lost)

    code = 0
    try:
        sys.unraisablehook = report
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # under nohup, or after a shell's &, some are to be ignored
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                former[number] = signal.signal(number, stop)
        _reopen_streams()
        _check_space()
        # OpenMP's threads spin in barriers, while another process may hold the core that they wait for: asleep at
        # once they lose a quarter of a second where nothing else runs, so they spin briefly (docs/performance.md)
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "3000")}
        try:
            code = _run(sys.argv[1:] if arguments is None else arguments)
        # the last resort: whatever it is ends as one line
        except Exception as error:
            if os.environ.get("CMDGEN_TRACEBACK"):
                traceback.print_exception(error)
            if not received:
                code = _report(error)
        code = _flush(code)
    except KeyboardInterrupt:
        pass
    finally:
        runs = False
        # while the interpreter shuts down, a signal ends it in silence
        for number, handler in former.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
        # torch at times turns a KeyboardInterrupt into an error of its own
        if received:
            sys.exit(128 + received[0])
    sys.exit(code)


class _NoRoom:
    """Where an import of torch is an error."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "torch":
            raise MemoryError(f"less than {_TORCH_SPACE >> 20} MiB of address space, which torch takes (ulimit -v)")


def _check_space() -> None:
    """Make an import of torch an error where its libraries would end the process."""
    with suppress(ImportError):
        import resource

        if resource.getrlimit(resource.RLIMIT_AS)[0] in range(_TORCH_SPACE):
            sys.meta_path.insert(0, _NoRoom())


def _reopen_streams() -> None:
    """Open closed standard streams on /dev/null, so that no file gets their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):
        # names of files that are not UTF-8 are printed as they are
        sys.stdout.reconfigure(errors="surrogateescape")


def _run(arguments: list[str]) -> int:
    # calling the app would turn a broken pipe into exit code 1
    command = get_command(app)
    try:
        if instruction := os.environ.get(VARIABLE):
            complete(command, instruction)
            return 0
        with command.make_context("cmdgen", arguments) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return 0


def _report(error: Exception) -> int:
    """Print what is wrong as one line on stderr, and return the exit code."""
    if isinstance(error, BrokenPipeError):
        return exit_code(error)
    if isinstance(error, typer.TyperException):
        text, code = error.format_message(), error.exit_code
        # a group of commands without one prints its help: that is not an error
        if type(error).__name__ != "NoArgsIsHelpError":
            text = f"error: {shorten(text)}"
    else:
        text, code = f"error: {describe(error)}", exit_code(error)
    # stderr may be a broken pipe or a full disk as well
    with suppress(OSError):
        typer.echo("\n".join(map(printable, text.split("\n"))), err=True)
    return code


def _flush(code: int) -> int:
    """Write what is left for stdout, and return the exit code."""
    if sys.stdout is None:
        return code
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or _report(error)
        # Python flushes again when it exits, and would print its own message
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code
