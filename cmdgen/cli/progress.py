"""Progress on stderr: bars with the time left on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# between two lines where there is no terminal: the first wait doubles up to the longest
_FIRST_SECONDS, _LONGEST_SECONDS = 2.0, 60.0


@contextmanager
def show_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Give a function of a stage's name, how much of it is done, and of how much."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}
        started: dict[str, float] = {}
        line, wait = time.monotonic(), _FIRST_SECONDS

        def show(stage: str, done: int, total: int) -> None:
            nonlocal line, wait
            now = time.monotonic()
            if stage not in tasks:
                tasks[stage], started[stage] = bars.add_task(stage, total=total), now
            bars.update(tasks[stage], completed=done)
            if not console.is_terminal and done and now - line > wait:
                line, wait = now, min(2 * wait, _LONGEST_SECONDS)
                # the first report of a stage may come when some of it is done
                left = (now - started[stage]) / done * (total - done)
                console.print(f"{stage} {done}/{total}, {left:.0f} s left")

        yield show
