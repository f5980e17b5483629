"""How commands end: the exit codes, and one line for what went wrong."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

FAILED, USAGE = 1, 2

EXIT_CODES = (
    "Exit codes: 0 done; 1 failed on the way (unreadable weights, a full disk, no memory); "
    "2 asked for something impossible; 130 interrupted by Ctrl-C."
)


class Failure(Exception):
    """What was asked is possible, but a file or the machine is at fault."""


def describe(error: Exception) -> str:
    """An error in one line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split())


@contextmanager
def on_the_way(smaller: str) -> Iterator[None]:
    """Around what was asked and is possible: what goes wrong there is a file or the machine.

    `smaller` says what to ask for where memory is short.
    """
    try:
        yield
    except ValueError as error:
        raise Failure(describe(error)) from error
    except (RuntimeError, MemoryError) as error:
        of_memory = re.search("alloc|overflow|out of memory", str(error), re.IGNORECASE)
        if not (of_memory or isinstance(error, MemoryError)):
            raise
        raise Failure(f"not enough memory: ask for a smaller {smaller}") from error
