"""Bytes: of tensors that live at once, of what runs on a CPU or of shapes alone; and of devices."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch


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
