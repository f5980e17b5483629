"""Bytes: of tensors that live at once, of what runs on a CPU or of shapes alone; and of devices."""

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operators made while it was entered: those alive, and the most.

    Not counted: tensors that were there before, what an operator takes and gives back inside, and
    under `inference_mode` what it takes that is made of others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known: dict[int, weakref.finalize[..., Any]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        before = {id(each.untyped_storage()) for each in _tensors((args, kwargs))}
        result = function(*args, **kwargs)
        for each in _tensors(result):
            storage = each.untyped_storage()
            if id(storage) not in before and id(storage) not in self.known:
                self._take(storage)
        return result

    def _take(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)

        def give_back() -> None:
            self.now -= size
            del self.known[key]

        # torch keeps the Python object of a storage for as long as the storage lives
        self.known[key] = weakref.finalize(storage, give_back)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors that `run` makes and holds at once; of fake ones too."""
    with torch.no_grad(), LiveBytes() as counter:
        run()
    return counter.peak


class Memory(NamedTuple):
    """Bytes of a device, those that are free None where that cannot be told."""

    total: int
    free: int | None


def measure_memory(device: torch.device) -> Memory:
    """What a device has; of a CPU what this process may take of it."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # what PyTorch keeps and does not use is free to it
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Memory(total, free + kept)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        # not Linux
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        return Memory(pages * os.sysconf("SC_PAGE_SIZE") if pages else 0, None)
    known = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (x.partition(":") for x in lines)
    }
    total, free = known["MemTotal"], known.get("MemAvailable", known["MemFree"])
    for most, used in _limits():
        total, free = min(total, most), max(0, min(free, most - used))
    return Memory(total, free)


def _limits() -> Iterator[tuple[int, int]]:
    """Bytes that this process may have beside what a Linux machine has, and those that it has."""
    import resource

    group = Path("/sys/fs/cgroup")
    # what is not there, or has no limit, has no number either
    with suppress(OSError, ValueError):
        most, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        yield most, used
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        pages, *_ = Path("/proc/self/statm").read_text().split()
        yield most, int(pages) * resource.getpagesize()
