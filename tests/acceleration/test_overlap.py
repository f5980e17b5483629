"""What is made beside other work is handed on once; streams need a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from cmdgen.acceleration import overlap
from cmdgen.acceleration.overlap import Pending, fetch, run_slices, start


def test_without_a_stream_it_is_made_and_handed_on_at_once() -> None:
    seen: list[Tensor] = []
    pending = start(lambda x: x + 1, torch.arange(3), seen.append, stream=None)
    assert [each.tolist() for each in seen] == [[1, 2, 3]]
    pending.poll()
    assert pending.finish() is seen[0]
    assert len(seen) == 1


class Event:
    """Of a GPU, done when it is told to be, or waited for."""

    done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


@pytest.mark.parametrize("waits", [False, True])
def test_what_is_late_is_handed_on_once_and_leaves_its_buffer(waits: bool) -> None:
    seen: list[Tensor] = []
    event, buffer = Event(), torch.zeros(3)
    pending = Pending(buffer, event, seen.append)
    pending.poll()
    assert not seen
    buffer.fill_(7)
    if not waits:
        event.done = True
        pending.poll()
        assert len(seen) == 1
    result = pending.finish()
    pending.poll()
    assert len(seen) == 1 and seen[0] is result and result.tolist() == [7, 7, 7]
    buffer.zero_()
    assert result.tolist() == [7, 7, 7]


@pytest.mark.gpu
def test_beside_other_work_of_a_gpu_the_values_are_the_same() -> None:
    stream = torch.cuda.Stream()
    weights = torch.randn(2048, 2048, device="cuda")
    for _ in range(3):
        seen: list[Tensor] = []
        given = torch.randn(2048, 2048, device="cuda")
        expected = (given @ weights).cpu()
        pending = start(lambda x: x @ weights, given, seen.append, stream=stream)
        # its memory is free for these, once the stream has read it
        del given
        busy = [torch.randn(2048, 2048, device="cuda") @ weights for _ in range(20)]
        assert torch.equal(pending.finish(), expected)
        assert len(seen) == 1 and not seen[0].is_pinned()
        assert all(each.isfinite().all() for each in busy)


class Stream:
    """Of a GPU: writes down what it waits for."""

    device_index = 0

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name, self.seen = name, seen

    def wait_stream(self, other: "Stream") -> None:
        self.seen.append(f"{self.name} waits for {other.name}")


@pytest.mark.parametrize(
    ("count", "seen"),
    [(1, ["0 on main"]), (3, ["side waits for main", "0 on main", "1 on side", "2 on main", "main waits for side"])],
)
def test_slices_take_turns_on_streams_that_begin_and_end_with_the_current_one(
    monkeypatch: pytest.MonkeyPatch, count: int, seen: list[str]
) -> None:
    made: list[str] = []
    main, side = Stream("main", made), Stream("side", made)
    now = [main]

    @contextmanager
    def enter(stream: Stream) -> Iterator[None]:
        now.append(stream)
        try:
            yield
        finally:
            now.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[-1])
    monkeypatch.setattr(torch.cuda, "stream", enter)
    monkeypatch.setattr(overlap, "_slice_stream", lambda device, number: side)
    slices = [slice(i, i + 1) for i in range(count)]

    def run(part: slice, stream: int) -> None:
        assert stream == part.start % 2
        made.append(f"{part.start} on {now[-1].name}")

    def fail(part: slice, stream: int) -> None:
        raise AssertionError("a slice fails")

    run_slices(run, slices, torch.device("cuda"), 2)
    assert made == seen and now == [main]
    # an error leaves no stream apart
    made.clear()
    with pytest.raises(AssertionError, match="a slice fails"):
        run_slices(fail, slices, torch.device("cuda"), 2)
    assert made == [each for each in seen if " on " not in each] and now == [main]
    # elsewhere in order
    made.clear()
    run_slices(run, slices, torch.device("cpu"), 2)
    assert made == [f"{i} on main" for i in range(count)]


def test_fetching_on_a_cpu_hands_on_what_it_is_given_one_at_a_time() -> None:
    made: list[int] = []

    def make():
        for i in range(3):
            made.append(i)
            yield torch.full((2,), i)

    for i, part in enumerate(fetch(make())):
        assert made == list(range(i + 1))
        assert part.tolist() == [i, i]


@pytest.mark.gpu
def test_fetching_from_a_gpu_keeps_the_order_and_the_values() -> None:
    parts = [torch.full((3 - (i == 6), 1000, 1000), i, device="cuda") for i in range(7)]
    for i, part in enumerate(fetch(part + 0 for part in parts)):
        assert part.device.type == "cpu"
        assert torch.equal(part, parts[i].cpu())
