"""Ends long work cleanly: the first signal after the step that runs, the second at once."""

import signal
import sys
from types import FrameType


class Stop:
    """Whether a signal has come, within the block that it is entered for."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.signal: int | None = None

    def __enter__(self) -> "Stop":
        # after a shell's &, Ctrl-C is to be ignored
        numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
        self.handlers = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self.__exit__()
        print(f"stopping after {self.what}", file=sys.stderr)

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def code(self) -> int:
        """Return the exit code: 0, or that of a process which the signal ends."""
        return 0 if self.signal is None else 128 + self.signal
