"""Exit codes, and one line for what went wrong."""

import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENOMEM

FAILED, USAGE, NOT_FOUND, MEMORY, ENCODER, PARTIAL, BUG = 1, 2, 3, 4, 5, 6, 7
# broken pipe: 128 + SIGPIPE, as shells have it
CLOSED = 141

EXIT_CODES = (
    "Exit codes: 0 done; 1 failed; 2 invalid request; 3 not found, or offline; 4 out of memory; "
    "5 the encoder failed; 6 some of several jobs failed; 7 a bug; 129 hung up; 130 interrupted; 141 broken pipe; "
    "143 terminated."
)

# how folders of copies of what came through pipes are named: messages name what was given
COPIES = "cmdgen-copy-"
_COPY = re.compile(rf"(/[^/:]+)*/{COPIES}\w{{8}}/")
# characters of a message: a path, and what is wrong with it
_LONGEST = 1000


class Failure(Exception):
    """A valid request failed, a file or the machine is at fault: one line and its exit code."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


def exit_code(error: Exception) -> int:
    """Return the exit code of an error that is reported in one line."""
    match error:
        case Failure():
            return error.code
        case BrokenPipeError():
            return CLOSED
        case FileNotFoundError() | ConnectionError():
            return NOT_FOUND
        case ValueError():
            return USAGE
        case FloatingPointError():
            return FAILED
    if is_about_memory(error):
        return MEMORY
    if not isinstance(error, OSError | ImportError):
        return BUG
    # importing it would take a moment: where it was not, its error was not either
    write = sys.modules.get("cmdgen.video.write")
    return ENCODER if write and isinstance(error, write.EncoderError) else FAILED


def is_about_memory(error: Exception) -> bool:
    """Return whether memory was short, or the address space for a library."""
    if isinstance(error, RuntimeError | ImportError):
        return re.search("alloc|overflow|out of memory|failed to map", str(error), re.IGNORECASE) is not None
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == ENOMEM)


def printable(text: str) -> str:
    """Escape control characters and lone surrogates, and name what was given, not its copy."""
    text = _name_given(text)
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _name_given(text: str) -> str:
    # a long text without one would take long
    return _COPY.sub("", text) if COPIES in text else text


def describe(error: Exception) -> str:
    """Return an error as one line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if exit_code(error) == BUG:
        text = f"this is a bug of cmdgen: {type(error).__name__}: {text} (CMDGEN_TRACEBACK=1 shows where it is)"
    return shorten(text) or type(error).__name__


def shorten(text: str) -> str:
    """Return a text as one line, without its middle if it is far too long."""
    line, half = _name_given(" ".join(text.split())), _LONGEST // 2
    return line if len(line) <= _LONGEST else f"{line[:half]} ... {line[-half:]}"


@contextmanager
def on_the_way(smaller: str | Callable[[], str]) -> Iterator[None]:
    """Turn errors of a valid request into `Failure`: a file or the machine is at fault.

    `smaller` is the advice where memory is short, see `within_memory`.
    """
    try:
        with within_memory(smaller):
            yield
    except ValueError as error:
        raise Failure(describe(error)) from error


@contextmanager
def within_memory(smaller: str | Callable[[], str]) -> Iterator[None]:
    """Turn errors about memory into `Failure`.

    `smaller` is the advice: options that need less, or a function that finds them.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_about_memory(error):
            raise
        # frees what the work had made, so that the advice can count on that memory
        traceback.clear_frames(error.__traceback__)
        advice = smaller if isinstance(smaller, str) else smaller()
        raise Failure(f"not enough memory: {advice}", MEMORY) from error
