"""Memory of devices: what there is, what is free, and what clips of UNets along time take of it."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cmdgen.acceleration.memory import WAYS, FusedAttention, Run, Work, peak_bytes, run_reader, run_unet, run_vae
from cmdgen.config import ModelConfig
from cmdgen.request import Slices
from cmdgen.video.pixels import to_rgb24

# of a container's processes, version 2
_GROUP = Path("/sys/fs/cgroup")


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

    # what is not there, or has no limit, has no number either
    with suppress(OSError, ValueError):
        limit, used = (int((_GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        # files that were read, such as weights, stay for as long as nothing else needs their memory
        held = re.findall(r"^(?:in)?active_file (\d+)$", (_GROUP / "memory.stat").read_text(), re.MULTILINE)
        yield limit, used - sum(map(int, held))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        pages, *_ = Path("/proc/self/statm").read_text().split()
        yield limit, int(pages) * resource.getpagesize()


def compare_memory(
    model: ModelConfig, dtype: torch.dtype, device: torch.device, show: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    """Count what one clip holds as libraries make it, and in each of our ways; bytes, on the meta device.

    As libraries do: everything at once, or frames through the VAE one by one, which of a decoder
    that looks along time makes another video. "peak" is with all weights, "staged" with those of a
    stage alone. On a GPU the same runs run, with random weights, and "allocated", "reserved" and
    "driver", all memory in use there, are measured.
    """
    work = Work(model, dtype)
    whole, single = (partial(_decode, together=count) for count in (model.frames, 1))
    ways: list[tuple[str, dict[str, Any], Any]] = [("all at once", {}, whole), ("VAE by frame", {}, single)]
    for way in WAYS:
        size, turn = way["bytes"], ", in turn" * way.get("in_turn", False)
        ways.append((("whole" if size is None else "least" if size == 1 else f"{size >> 20} MiB") + turn, way, run_vae))
    rows = []
    for i, (name, way, decode) in enumerate(ways):
        show("memory", i, len(ways))
        slices = Slices(1, 1, 1, **way)
        runs: dict[str, Run] = {"reader": run_reader, "unet": run_unet, "vae": decode}
        held = {stage: _count(partial(run, work, slices)) for stage, run in runs.items()}
        stages = {"reader": run_reader, "unet": run_unet, "vae": run_vae}
        staged = max(held[stage] + work.beside(run, staged=True) for stage, run in stages.items())
        weights = work.weights()
        row: dict[str, Any] = {"way": name, "unet": held["unet"], "vae": held["vae"], "weights": weights}
        row |= {"peak": weights + max(held.values()), "staged": staged}
        if device.type == "cuda":
            there = replace(work, device="cuda")
            row |= _measure([partial(run, there, slices) for run in runs.values()], device)
        rows.append(row)
    show("memory", len(ways), len(ways))
    return rows


def _decode(work: Work, slices: Slices, *, together: int) -> None:
    """Decode so many frames at a time, a decoder that looks along time like any other."""
    frames, latents = (
        work.empty(work.model.frames, 3, *work.model.size, dtype=torch.uint8),
        work.latents().flatten(0, 1),
    )
    to_rgb24(work.networks["vae"].from_latents(latents[:together]))
    del frames


def _count(run: Callable[[], object]) -> int:
    with FusedAttention():
        return peak_bytes(run)


@torch.no_grad()
def _measure(runs: list[Callable[[], object]], device: torch.device) -> dict[str, int | None]:
    """Return the highest memory of runs on a GPU; None where it is not enough."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        for run in runs:
            run()
    except torch.OutOfMemoryError:
        return dict.fromkeys(("allocated", "reserved", "driver"))
    free, total = torch.cuda.mem_get_info(device)
    peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return dict(zip(("allocated", "reserved", "driver"), (*peaks, total - free), strict=True))
