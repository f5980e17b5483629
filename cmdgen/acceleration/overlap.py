"""Work of one GPU beside other work of it; a CPU has its cores busy with the one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor


class Pending:
    """A tensor on its way to the CPU; `on_ready` gets it once, when it has arrived."""

    def __init__(self, result: Tensor, copied: torch.cuda.Event | None, on_ready: Callable[[Tensor], None]) -> None:
        self.result, self.copied, self.on_ready = result, copied, on_ready
        if copied is None:
            on_ready(result)

    def poll(self) -> None:
        """Look whether the tensor has arrived; nothing waits."""
        if self.copied is not None and self.copied.query():
            self.finish()

    def finish(self) -> Tensor:
        """Wait for the tensor."""
        if self.copied is not None:
            self.copied.synchronize()
            # page-locked memory is not for keeping
            self.result, self.copied = self.result.clone(), None
            self.on_ready(self.result)
        return self.result


def start(
    make: Callable[[Tensor], Tensor],
    source: Tensor,
    on_ready: Callable[[Tensor], None],
    *,
    stream: torch.cuda.Stream | None,
) -> Pending:
    """Make a tensor of another one in a stream beside the current one, or, without one, at once.

    All launches come from this thread, before what follows is launched: a graph that is captured
    then waits for them, and sees none. This thread also calls `on_ready`, within `poll` or
    `finish`, between two launches.
    """
    if stream is None:
        return Pending(make(source).cpu(), None, on_ready)
    stream.wait_stream(torch.cuda.current_stream(source.device))
    # no other tensor may have its memory before this stream has read it
    source.record_stream(stream)
    with torch.cuda.stream(stream):
        result = make(source)
        copy = torch.empty_like(result, device="cpu", pin_memory=True)
        copy.copy_(result, non_blocking=True)
        return Pending(copy, stream.record_event(), on_ready)


def run_slices(run: Callable[[slice, int], None], slices: Sequence[slice], device: torch.device, streams: int) -> None:
    """Call run(slice, stream) for each, by turns on so many streams of a GPU; on another device in order.

    The first stream is the current one, and what it gets later waits for all others. No slice may
    read or write what another one makes: memory that is taken on one stream is free for that
    stream's own next slice, whatever the others do with it. What slices share is made before.
    """
    if device.type != "cuda" or streams == 1:
        for i, part in enumerate(slices):
            run(part, i % streams)
        return
    current = torch.cuda.current_stream(device)
    beside = [_slice_stream(current.device_index, number) for number in range(1, min(streams, len(slices)))]
    for stream in beside:
        stream.wait_stream(current)
    try:
        for i, part in enumerate(slices):
            with torch.cuda.stream([current, *beside][i % (1 + len(beside))]):
                run(part, i % streams)
    finally:
        # after an error, too: memory that it frees may still be written to, and no capture ends with a stream apart
        for stream in beside:
            current.wait_stream(stream)


@cache
def _slice_stream(device: int, number: int) -> torch.cuda.Stream:
    """Return the same stream every time: what a slice lets go of serves its own stream alone."""
    return torch.cuda.Stream(device)


def fetch(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Tensors -> the same on the CPU, in order; from a GPU while it computes those that follow."""
    stream: torch.cuda.Stream | None = None
    previous: Pending | None = None
    for part in parts:
        if part.device.type != "cuda":
            yield part.cpu()
            continue
        stream = stream or torch.cuda.Stream(part.device)
        current = start(lambda part: part, part, lambda _: None, stream=stream)
        # the GPU has its work for this part: time to wait for the part before it
        if previous is not None:
            yield previous.finish()
        previous = current
    if previous is not None:
        yield previous.finish()
