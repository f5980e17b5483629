"""How commands end: the exit codes, and one line for what went wrong."""

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FAILED, USAGE, NOT_FOUND, MEMORY, ENCODER, PARTIAL = 1, 2, 3, 4, 5, 6
# of whoever reads stdout, as a shell counts what ended by SIGPIPE
CLOSED = 141

EXIT_CODES = (
    "Exit codes: 0 done; 1 failed; 2 asked for something impossible; 3 not found, or offline; "
    "4 out of memory; 5 the encoder failed; 6 some of several failed; 130 interrupted; "
    "141 the output's reader went away."
)

# characters of an error: a path, and what is wrong with it
_LONGEST = 1000


class Failure(Exception):
    """What was asked is possible, but a file or the machine is at fault: one line and its code."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


def printable(text: str) -> str:
    """A line as a terminal may have it: what it would act on, and halves of letters, as escapes."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def describe(error: Exception) -> str:
    """An error in one line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return shorten(text) or type(error).__name__


def shorten(text: str) -> str:
    """A text in one line, which holds what is far too long in part."""
    line = " ".join(text.split())
    return (
        line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    )


@contextmanager
def on_the_way(smaller: str | Callable[[], str]) -> Iterator[None]:
    """Around what was asked and is possible: what goes wrong there is a file or the machine.

    `smaller` says what to ask for where memory is short, see `within_memory`.
    """
    try:
        with within_memory(smaller):
            yield
    except ValueError as error:
        raise Failure(describe(error)) from error


@contextmanager
def within_memory(smaller: str | Callable[[], str]) -> Iterator[None]:
    """Around what may take more memory than there is.

    `smaller` says what to ask for then: an option, or a function that finds out what would fit.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        of_memory = re.search("alloc|overflow|out of memory", str(error), re.IGNORECASE)
        if not (of_memory or isinstance(error, MemoryError)):
            raise
        # what the work had made is no longer needed, and its memory may tell what would fit
        traceback.clear_frames(error.__traceback__)
        advice = smaller if isinstance(smaller, str) else smaller()
        raise Failure(f"not enough memory: {advice}", MEMORY) from error
