"""How commands end: the exit codes, and one line for what went wrong."""

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
