"""Memory of devices: what there is, and what is free."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch


class Memory(NamedTuple):
    """Bytes of a device; free is None where that cannot be told."""

    total: int
    free: int | None


def measure_memory(device: torch.device) -> Memory:
    """Return the memory of a device; of a CPU, as much of it as this process may take."""
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
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (x.partition(":") for x in lines)}
    total, free = sizes["MemTotal"], sizes.get("MemAvailable", sizes["MemFree"])
    for limit, used in _limits():
        total, free = min(total, limit), max(0, min(free, limit - used))
    return Memory(total, free)


def _limits() -> Iterator[tuple[int, int]]:
    """Yield the limits of this process on Linux, in bytes, and what it uses of each."""
    import resource

    group = Path("/sys/fs/cgroup")
    # what is not there, or has no limit, has no number either
    with suppress(OSError, ValueError):
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        yield limit, used
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        pages, *_ = Path("/proc/self/statm").read_text().split()
        yield limit, int(pages) * resource.getpagesize()
