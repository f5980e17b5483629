"""Processes that die at a rename, as SIGKILL and a power cut end them, and disks that are full."""

import itertools
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# what gives a file its name
RENAMES = ("replace", "link", "rename")
_DEAD = 9


def kill_at_every_rename(work: Callable[[], object]) -> Iterator[int]:
    """Run `work` in children that die before the first rename, the second and so on.

    Yields the number after each death; the last child ends well.
    """
    for number in itertools.count(1):
        code = run_child(work, die_at=number)
        if code == 0:
            assert number > 1, "there was no rename"
            return
        yield number


def run_child(work: Callable[[], object], *, die_at: int = 0) -> int:
    """Run `work` in a child, which may die at a rename; return its exit code, 0 or that of the dead."""
    if not os.fork():
        code = 1
        try:
            _die(die_at)
            work()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.wait()[1])
    assert code == 0 or (die_at and code == _DEAD), f"the child that was to die at rename {die_at} ended with {code}"
    return code


def _die(number: int) -> None:
    """Patch what renames files, to end this process at a call of that number."""
    calls = itertools.count(1)

    def patched(real: Callable[..., None]) -> Callable[..., None]:
        def rename(*arguments: object, **options: object) -> None:
            if next(calls) == number:
                os._exit(_DEAD)
            real(*arguments, **options)

        return rename

    for name in RENAMES:
        setattr(os, name, patched(getattr(os, name)))


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file of this process become larger than `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
