"""What a cold command costs: seconds and memory of a fresh process. Never imports torch.

Linux counts the memory of the process that starts another into the peak of the new one, so the
measuring process has to be the small one.
"""

import os
import sys
import time
from pathlib import Path
from statistics import median
from subprocess import DEVNULL, PIPE, Popen
from tempfile import TemporaryDirectory
from typing import NamedTuple

from cmdgen.evaluation.report import Figure, Report

HELP_RUNS = 3


class Cost(NamedTuple):
    """Seconds from start to end, CPU seconds of all processes, and the peak resident memory of the largest in MB."""

    seconds: float
    cpu: float
    megabytes: float


def measure_cost(*arguments: str) -> Cost:
    """Run `cmdgen ARGUMENTS` in a new process; ValueError with its last line if it fails."""
    command = [sys.executable, "-m", "cmdgen", *arguments]
    started = time.perf_counter()
    with Popen(command, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE) as process:
        assert process.stderr is not None
        errors = process.stderr.read().decode(errors="replace").strip()
        # the usage of this child and of those it waited for, such as the video encoder
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = errors.splitlines()[-1] if errors else process.returncode
        raise ValueError(f"cmdgen {arguments[0]}: {last}")
    # kilobytes on Linux, bytes on macOS
    cpu = usage.ru_utime + usage.ru_stime
    return Cost(seconds, cpu, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024))


def report_cost(model: str, prompt: str = "a corgi swimming") -> Report:
    """Measure `cmdgen sample` and `cmdgen --help`, from the start of a process to its end."""
    with TemporaryDirectory() as folder:
        output = Path(folder) / "out.mp4"
        sample = measure_cost("sample", prompt, "-o", str(output), "--model", model, "--seed", "0")
        assert output.stat().st_size > 0
    helps = [measure_cost("--help").seconds for _ in range(HELP_RUNS)]
    spread = {"fastest": min(helps), "slowest": max(helps)}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Report(
        title=f"Cost of {model} on {cores} CPU cores",
        figures=[
            Figure("sample_seconds", "cmdgen sample, cold", sample.seconds, "s", {}, 15, "most"),
            Figure("sample_cpu", "its CPU time", sample.cpu, "s", {}, 5, "most"),
            Figure("sample_memory", "its peak resident memory", sample.megabytes, "MB", {}, 2000, "most"),
            Figure("help_seconds", "cmdgen --help", median(helps), "s", spread, 0.5, "most"),
        ],
        notes=[
            "Seconds from the start of a new process to its end, file on disk; targets: 2 cores.",
            "CPU time is nearly the same on a busy machine.",
            f"--help is the median of {HELP_RUNS} runs.",
        ],
        settings={"model": model, "cores": cores},
    )
