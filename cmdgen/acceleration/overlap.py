"""Work of one GPU beside other work of it; a CPU has its cores busy with the one."""

from collections.abc import Callable

import torch
from torch import Tensor


class Pending:
    """A tensor on its way to the CPU; `on_ready` is given it once, when it is seen to be there."""

    def __init__(
        self, made: Tensor, copied: torch.cuda.Event | None, on_ready: Callable[[Tensor], None]
    ) -> None:
        self.made, self.copied, self.on_ready = made, copied, on_ready
        if copied is None:
            on_ready(made)

    def poll(self) -> None:
        """Look whether it is there; nothing waits."""
        if self.copied is not None and self.copied.query():
            self._hand_on()

    def finish(self) -> Tensor:
        """Wait until it is there."""
        if self.copied is not None:
            self.copied.synchronize()
            self._hand_on()
        return self.made

    def _hand_on(self) -> None:
        # page-locked memory is not for keeping
        self.made, self.copied = self.made.clone(), None
        self.on_ready(self.made)


def start(
    make: Callable[[Tensor], Tensor],
    given: Tensor,
    on_ready: Callable[[Tensor], None],
    *,
    stream: torch.cuda.Stream | None,
) -> Pending:
    """Make a tensor of another one in a stream beside the current one, or, without one, at once.

    All launches come from this thread, before what follows is launched: a graph that is captured
    then waits for them, and sees none. `on_ready` is called by this thread too, within `poll` or
    `finish`, between two launches.
    """
    if stream is None:
        return Pending(make(given).cpu(), None, on_ready)
    stream.wait_stream(torch.cuda.current_stream(given.device))
    # no other tensor may have its memory before this stream has read it
    given.record_stream(stream)
    with torch.cuda.stream(stream):
        made = make(given)
        copy = torch.empty_like(made, device="cpu", pin_memory=True)
        copy.copy_(made, non_blocking=True)
        return Pending(copy, stream.record_event(), on_ready)
