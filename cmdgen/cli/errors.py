"""How commands end: one line on stderr for what went wrong, and the exit codes."""

from typing import NoReturn

import typer

FAILED, USAGE, INTERRUPTED = 1, 2, 130

EXIT_CODES = (
    "Exit codes: 0 done; 1 failed on the way (unreadable weights, a full disk, no memory); "
    "2 asked for something impossible; 130 interrupted by Ctrl-C."
)


def fail(reason: object, code: int) -> NoReturn:
    """Say in one line what is wrong, and end."""
    if isinstance(reason, OSError) and reason.strerror:
        reason = f"{reason.filename}: {reason.strerror}" if reason.filename else reason.strerror
    typer.echo(f"error: {' '.join(str(reason).split())}", err=True)
    raise typer.Exit(code)
