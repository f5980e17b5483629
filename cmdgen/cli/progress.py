"""Notes and progress on stderr, results on stdout."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import IO, TYPE_CHECKING, Annotated, Any, Protocol

import typer

from cmdgen.cli.command import Only
from cmdgen.cli.errors import printable
from cmdgen.options import option
from cmdgen.pipelines.observer import Observer

if TYPE_CHECKING:
    from rich.console import Console

REPORTING = "Reporting"
# seconds between two lines where there is no terminal: the first wait doubles up to the longest
_FIRST_WAIT, _LONGEST_WAIT = 2.0, 60.0
# seconds that are too few to tell a rate
_MOMENT = 0.02

_flag = partial(option, False, group=REPORTING)


class Show(Protocol):
    """Shows how much of a stage is done, and a few figures beside it."""

    def __call__(self, stage: str, done: int, total: int, figures: str = "") -> None: ...


class Bars(Observer):
    """Shows how far a pipeline is, and hands its frames on."""

    def __init__(self, show: Show, write: Callable[[Any], None] | None = None) -> None:
        self.show, self.write = show, write

    def step(self, stage: str, done: int, total: int) -> None:
        self.show(stage, done, total)

    def frames(self, clip: int, frames: Any) -> None:
        if self.write is not None:
            self.write(frames)


@dataclass
class Say:
    """Print notes and progress on stderr, results on stdout. `--verbose` wins over `--quiet`."""

    as_json: bool = _flag("Print JSON on stdout instead of text.", flags=("--json",))
    quiet: bool = _flag("Print nothing but errors on stderr.", flags=("--quiet", "-q"))
    verbose: bool = _flag("Print more on stderr.", flags=("--verbose", "-v"))
    # a rich Console while bars are drawn: lines go above them
    _console: Any = field(default=None, init=False, repr=False)
    # where results go, where that is not stdout at the time
    out: IO[str] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        # where one is a default from the user's file, the other must be able to win
        self.quiet = self.quiet and not self.verbose

    def note(self, line: str) -> None:
        """Print a line on stderr, unless quiet."""
        if not self.quiet:
            self._write(line)

    def detail(self, line: str) -> None:
        """Print a line on stderr if verbose."""
        if self.verbose:
            self._write(line)

    def error(self, line: str) -> None:
        """Print what went wrong with one of several jobs, even if quiet."""
        self._write(f"error: {line}")

    def _write(self, line: str) -> None:
        line = printable(line)
        if self._console is None:
            typer.echo(line, err=True)
        else:
            # no markup, and not wrapped at the terminal's width
            self._console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def result(self, text: object, record: Mapping[str, Any] | Sequence[Any]) -> None:
        """Print on stdout: the record as one line of JSON with --json, else the text."""
        if self.as_json:
            # a file's name may hold lone surrogates: they become escapes of JSON
            line = json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace")
            text = line.decode()
        # typer.echo would strip control characters from a file's name
        print(text, file=self.out, flush=True)

    @contextmanager
    def progress(self, *, deadline: float | None = None) -> Iterator[Show]:
        """Yield a function that shows how far each stage is.

        On a terminal, a bar for each stage; elsewhere a line when a stage ends and now and then
        before. `deadline`, in seconds of `time.monotonic`, is when the work stops in any case.
        """
        if self.quiet:
            yield lambda stage, done, total, figures="": None
        elif (console := _open_terminal()) is None:
            yield _Lines(self, deadline)
        else:
            self._console = console
            try:
                with _draw_bars(console, deadline) as show:
                    yield show
            finally:
                self._console = None


# what commands take of it
AsJson = Annotated[Say, Only(("as_json",))]
Quiet = Annotated[Say, Only(("quiet",))]
JsonOrQuiet = Annotated[Say, Only(("as_json", "quiet"))]


def _open_terminal() -> "Console | None":
    """Return stderr as a console if it is a terminal that can move its cursor."""
    if not sys.stderr.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        return None
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal else None


@contextmanager
def _draw_bars(console: "Console", deadline: float | None) -> Iterator[Show]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

    name = TextColumn("{task.description:>8}", markup=False)
    pace = TextColumn("{task.fields[pace]}", markup=False)
    # redirected, lines of stdout would go to stderr and not into a pipe
    settings: Any = {"redirect_stdout": False, "redirect_stderr": False, "console": console}
    bars = Progress(name, BarColumn(), MofNCompleteColumn(), pace, **settings)
    tasks: dict[str, TaskID] = {}
    rates = _Rates(deadline)

    def show(stage: str, done: int, total: int, figures: str = "") -> None:
        pace = "  ".join(filter(None, (figures, rates.update(stage, done, total))))
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total, pace=pace)
        bars.update(tasks[stage], completed=done, total=total, pace=pace)

    with bars:
        yield show


class _Rates:
    """How fast stages run."""

    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline
        # when each was first shown, how much was done by then, and since
        self.stages: dict[str, tuple[float, int, int]] = {}

    def update(self, name: str, done: int, total: int) -> str:
        """Return rate and time left, or the time taken; empty where it is too early to tell."""
        now = time.monotonic()
        start, first, previous = self.stages.get(name, (now, done, done))
        if done < previous:
            # the same stage of the next clip
            start, first = now, done
        self.stages[name] = start, first, done
        seconds, count = now - start, done - first
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
        self.say, self.rates = say, _Rates(deadline)
        self.last_line, self.wait = time.monotonic(), _FIRST_WAIT

    def __call__(self, stage: str, done: int, total: int, figures: str = "") -> None:
        pace, now = self.rates.update(stage, done, total), time.monotonic()
        if done < total:
            if not done or now - self.last_line < self.wait:
                return
            self.wait = min(2 * self.wait, _LONGEST_WAIT)
        self.last_line = now
        self.say.note(", ".join(filter(None, (f"{stage} {done}/{total}", figures, pace))))


def _clock(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"
