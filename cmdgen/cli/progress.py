"""What is said on stderr while a command works, and how its results are printed."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import typer

from cmdgen.cli.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

# between two lines where there is no terminal: the first wait doubles up to the longest
_FIRST_SECONDS, _LONGEST_SECONDS = 2.0, 60.0
# seconds that tell no rate
_MOMENT = 0.02


class Show(Protocol):
    """Shows how much of a stage is done, and a few figures beside it."""

    def __call__(self, stage: str, done: int, total: int, figures: str = "") -> None: ...


class Say:
    """Notes and progress on stderr, results on stdout.

    Quiet, nothing goes to stderr; verbose, quiet or not, details do as well; `as_json` makes
    results JSON.
    """

    def __init__(
        self, *, quiet: bool = False, verbose: bool = False, as_json: bool = False
    ) -> None:
        # where one is a default from the user's file, the other must be able to win
        self.quiet, self.verbose, self.as_json = quiet and not verbose, verbose, as_json
        # while bars are drawn: a line goes above them
        self._console: Console | None = None

    def note(self, line: str) -> None:
        """A line for a human."""
        if not self.quiet:
            self._write(line)

    def error(self, line: str) -> None:
        """What became of one job of several: said where nothing else is."""
        self._write(f"error: {line}")

    def _write(self, line: str) -> None:
        # names of files come from anywhere
        line = printable(line)
        if self._console is None:
            typer.echo(line, err=True)
        else:
            # as it is: neither markup nor broken at the terminal's width
            self._console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def detail(self, line: str) -> None:
        """A line for a human who asked for more."""
        if self.verbose:
            self.note(line)

    def result(self, text: object, record: Mapping[str, Any]) -> None:
        """One line on stdout: the record as JSON where JSON was asked for, else the text."""
        if self.as_json:
            # what is no letter, in the name of a file, is an escape of JSON so
            line = json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace")
            text = line.decode()
        # as it is: typer would leave out of a name what a terminal acts on
        print(text, flush=True)

    @contextmanager
    def progress(self, *, deadline: float | None = None) -> Iterator[Show]:
        """Give a function that shows how far stages are.

        Bars on a terminal; elsewhere a line when a stage ends, and now and then until it does.
        `deadline`, in `time.monotonic`'s seconds, is when the work stops whatever is left.
        """
        if self.quiet:
            yield _show_nothing
        elif (console := _open_terminal()) is None:
            yield _Lines(self, deadline)
        else:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (
                TextColumn("{task.description:>8}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[pace]}", markup=False),
            )
            # rich would send stdout's lines to stderr, away from a pipe
            with Progress(
                *columns, console=console, redirect_stdout=False, redirect_stderr=False
            ) as bars:
                tasks: dict[str, Any] = {}
                stages = _Stages(deadline)

                def show(stage: str, done: int, total: int, figures: str = "") -> None:
                    pace = "  ".join(filter(None, (figures, stages.pace(stage, done, total))))
                    if stage not in tasks:
                        tasks[stage] = bars.add_task(stage, total=total, pace=pace)
                    bars.update(tasks[stage], completed=done, total=total, pace=pace)

                self._console = console
                try:
                    yield show
                finally:
                    self._console = None


def _open_terminal() -> "Console | None":
    """Where bars can be drawn: stderr, if it is a terminal that can move its cursor."""
    if not sys.stderr.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        return None
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal else None


def _show_nothing(stage: str, done: int, total: int, figures: str = "") -> None:
    pass


@dataclass
class _Stage:
    """When a stage was first heard of, and how much of it was done by then and since."""

    started: float
    first: int
    done: int


class _Stages:
    """How fast stages are."""

    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline
        self.known: dict[str, _Stage] = {}

    def pace(self, name: str, done: int, total: int) -> str:
        """Rate and time left, or time taken; nothing where it cannot be known yet."""
        now = time.monotonic()
        stage = self.known.get(name)
        # less than before: the same stage of the next clip
        if stage is None or done < stage.done:
            stage = self.known[name] = _Stage(now, done, done)
        stage.done = done
        seconds, count = now - stage.started, done - stage.first
        if not count or seconds < _MOMENT:
            return ""
        rate = count / seconds
        shown = f"{rate:.1f}/s" if rate >= 1 else f"{seconds / count:.1f} s each"
        if done >= total:
            return f"{shown}, {_clock(seconds)}" if count > 1 else _clock(seconds)
        left = (total - done) / rate
        if self.deadline is not None:
            left = min(left, max(0.0, self.deadline - now))
        return f"{shown}, {_clock(left)} left"


class _Lines:
    """Progress where there is no terminal."""

    def __init__(self, say: Say, deadline: float | None) -> None:
        self.say, self.stages = say, _Stages(deadline)
        self.line, self.wait = time.monotonic(), _FIRST_SECONDS

    def __call__(self, stage: str, done: int, total: int, figures: str = "") -> None:
        pace, now = self.stages.pace(stage, done, total), time.monotonic()
        if done < total:
            if not done or now - self.line < self.wait:
                return
            self.wait = min(2 * self.wait, _LONGEST_SECONDS)
        self.line = now
        self.say.note(", ".join(filter(None, (f"{stage} {done}/{total}", figures, pace))))


def _clock(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes}:{rest:02}"
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
