"""Where the time of sampling goes, stage by stage, beside what this machine can do at most."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from cmdgen.config import ModelConfig, ProfileConfig, SampleConfig
from cmdgen.evaluation.flops import count_reads, count_sampling
from cmdgen.files import replace_with
from cmdgen.pipeline import OnStage, Parts, TextToVideo
from cmdgen.video.write import open_video, write_still

PROMPT = "a corgi swimming"
# what tells what the machine can do: the product of two square matrices, and copying a buffer that
# no cache holds
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
# how often each is timed, and repeated in between: a GPU's clock is also that of its launches
LIMIT_RUNS = 5
LIMIT_REPEATS = {"cpu": 1, "cuda": 5}


class Limits(NamedTuple):
    """What the machine can do at most, measured."""

    # of a matrix product
    flops_per_second: float
    # of a copy, read and written
    bytes_per_second: float


@dataclass(frozen=True)
class Work:
    """What a stage, or all of them, has to do, counted."""

    # of the half of a part that runs; of "load", of everything that is loaded
    parameters: int = 0
    weight_bytes: int = 0
    forwards: int = 0
    flops: int = 0
    # its weights, for each forward or, where all share what is made of them, once; of "load", all
    # weights; of "video encode", the frames
    bytes_read: int = 0


@dataclass(frozen=True)
class StageProfile:
    """One stage, or all of them: its work, and what that took."""

    work: Work
    # of each run
    seconds: tuple[float, ...]
    # highest bytes: "resident" on a CPU, "allocated" and "reserved" on a GPU; empty: cannot be told
    memory: dict[str, int]

    @property
    def flops_per_second(self) -> float:
        """In the median run."""
        return self.work.flops / median(self.seconds)

    @property
    def bytes_per_second(self) -> float:
        """In the median run."""
        return self.work.bytes_read / median(self.seconds)


@dataclass(frozen=True)
class Profile:
    """One model on one machine."""

    settings: dict[str, Any]
    limits: Limits
    stages: dict[str, StageProfile]
    total: StageProfile

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the keys that `cmdgen profile --help` explains."""
        return {
            **self.settings,
            "matmul_flops_per_second": self.limits.flops_per_second,
            "copy_bytes_per_second": self.limits.bytes_per_second,
            "stages": {name: self._entry(stage) for name, stage in self.stages.items()},
            "total": self._entry(self.total),
        }

    def _entry(self, stage: StageProfile) -> dict[str, Any]:
        seconds = stage.seconds
        return {
            **asdict(stage.work),
            "seconds": {
                "median": median(seconds),
                "fastest": min(seconds),
                "slowest": max(seconds),
            },
            "flops_per_second": stage.flops_per_second,
            "share_of_matmul": stage.flops_per_second / self.limits.flops_per_second,
            "bytes_per_second": stage.bytes_per_second,
            "share_of_copy": stage.bytes_per_second / self.limits.bytes_per_second,
            "memory_bytes": stage.memory,
        }


@dataclass
class Stopwatch:
    """Seconds and highest memory of each stage that is entered, all its work waited for."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        _forget_peak(self.device)
        _wait(self.device)
        started = time.perf_counter()
        yield
        _wait(self.device)
        seconds = time.perf_counter() - started
        # a stage may be entered once for each clip
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        self.memory[stage] = highest([self.memory.get(stage, {}), _peak(self.device)])


class StepNames:
    """Names the stages of a trace, and the steps between two reports of progress."""

    def __init__(self) -> None:
        self.step: record_function | None = None

    @contextmanager
    def on_stage(self, stage: str) -> Iterator[None]:
        """Around a stage."""
        with record_function(stage):
            if stage in ("content", "motion"):
                self._begin(f"{stage} step 1")
            yield
            self._end()

    def on_progress(self, stage: str, done: int, total: int) -> None:
        """After a step."""
        if self.step is not None:
            self._end()
            if done < total:
                self._begin(f"{stage} step {done + 1}")

    def _begin(self, name: str) -> None:
        self.step = record_function(name)
        self.step.__enter__()

    def _end(self) -> None:
        if self.step is not None:
            self.step.__exit__(None, None, None)
        self.step = None


def profile_sampling(
    load: Callable[[], TextToVideo],
    asked: SampleConfig,
    config: ProfileConfig,
    *,
    trace: Path | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Profile:
    """Sample clips as `cmdgen sample` does, from reading the weights to the encoded file.

    `trace` is where to write one more run as a Chrome trace. Raises ValueError where the model
    cannot do what is asked.
    """
    report = on_progress or (lambda stage, done, total: None)
    runs = 1 + config.runs + (trace is not None)
    report("run", 0, runs)
    model = load()
    device, dtype, own = model.device, model.dtype, asked.apply(model.config)
    before = measure_limits(device, dtype)

    watches, totals = [], []
    with TemporaryDirectory() as name:
        folder = Path(name)
        for i in range(1 + config.runs):
            watch = Stopwatch(device)
            started = time.perf_counter()
            # the weights of the run before are let go before they are read again
            model = load()
            _run(model, asked, config.batch, folder, watch)
            _wait(device)
            # the first run warms up
            if i:
                watches.append(watch)
                totals.append(time.perf_counter() - started)
            report("run", i + 1, runs)
        if trace is not None:
            model = load()
            _trace(model, asked, config.batch, folder, trace)
            report("run", runs, runs)
    # others may have had the machine before or after: its limits are the higher of the two
    after = measure_limits(device, dtype)
    limits = Limits(*map(max, before, after))

    counted = count_work(own, model.parts, dtype, batch=config.batch)
    stages = {
        stage: StageProfile(
            work=work,
            seconds=tuple(watch.seconds[stage] for watch in watches),
            memory=highest([watch.memory[stage] for watch in watches]),
        )
        for stage, work in counted.items()
    }
    moves = own.frames > 1
    return Profile(
        settings={
            **{"model": own.name, "frames": own.frames, "height": own.height, "width": own.width},
            **{"sampler": own.sampler, "steps": own.steps, "guidance": own.guidance},
            "motion_steps": own.motion_steps if moves else None,
            "motion_guidance": own.motion_guidance if moves else None,
            **{"batch": config.batch, "runs": config.runs, "torch": torch.__version__},
            **{"device": device_name(device), "dtype": str(dtype).removeprefix("torch.")},
        },
        limits=limits,
        stages=stages,
        total=StageProfile(
            work=replace(
                counted["load"],
                forwards=sum(work.forwards for work in counted.values()),
                flops=sum(work.flops for work in counted.values()),
                bytes_read=sum(work.bytes_read for work in counted.values()),
            ),
            seconds=tuple(totals),
            memory=highest([stage.memory for stage in stages.values()]),
        ),
    )


def count_work(
    model: ModelConfig, parts: Parts, dtype: torch.dtype, *, batch: int
) -> dict[str, Work]:
    """The stages that run, in their order; all weights of `parts` are of one dtype."""
    loaded = [part for part in vars(parts).values() if part is not None]
    weights = sum(each.nbytes for part in loaded for each in part.state_dict().values())
    # a still is RGB, a video planes of which two are of half the height and width
    numbers = model.height * model.width * 3 // (1 if model.frames == 1 else 2)
    products = count_sampling(model, batch=batch)
    return {
        "load": Work(
            parameters=sum(each.numel() for part in loaded for each in part.parameters()),
            weight_bytes=weights,
            bytes_read=weights,
        ),
        **{
            stage: Work(
                parameters=reads.weights.parameters,
                weight_bytes=reads.weights.numbers * dtype.itemsize,
                forwards=reads.forwards,
                flops=products[stage].flops,
                bytes_read=reads.read * dtype.itemsize,
            )
            for stage, reads in count_reads(model, batch=batch, dtype=dtype).items()
        },
        "video encode": Work(bytes_read=batch * model.frames * numbers),
    }


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """The fastest of a few square matrix products of random data, and of a few copies."""
    limits = Limits(_matmul_rate(device, dtype), _copy_rate(device))
    if device.type == "cuda":
        # what is kept for reuse would count as reserved by the stages
        torch.cuda.empty_cache()
    return limits


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = MATMUL_SIZE[device.type]
    # float16 is not drawn on every CPU
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _fastest(lambda: torch.mm(a, b), device)


def _copy_rate(device: torch.device) -> float:
    length = COPY_BYTES[device.type]
    # written first: pages of memory that never were are all one and the same
    source = torch.ones(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * length / _fastest(lambda: target.copy_(source), device)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the first of which warms up."""
    work()
    repeats = LIMIT_REPEATS[device.type]
    seconds = []
    for _ in range(LIMIT_RUNS):
        _wait(device)
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        _wait(device)
        seconds.append((time.perf_counter() - started) / repeats)
    return min(seconds)


def _run(
    model: TextToVideo,
    asked: SampleConfig,
    batch: int,
    folder: Path,
    on_stage: OnStage,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> None:
    clips = model.sample_batch(
        *([PROMPT] * batch, asked, range(batch)),
        pixels="yuv420p",
        on_progress=on_progress,
        on_stage=on_stage,
    )
    with on_stage("video encode"):
        for i, clip in enumerate(clips):
            if len(clip.frames) == 1:
                write_still(folder / f"{i}.png", clip.content, clip.metadata, overwrite=True)
            else:
                path, what = folder / f"{i}.mp4", (clip.content.shape[:2], clip.fps, clip.metadata)
                with open_video(path, *what, overwrite=True, pixels=clip.pixels) as write:
                    write(clip.frames)


def _trace(model: TextToVideo, asked: SampleConfig, batch: int, folder: Path, path: Path) -> None:
    activities = [ProfilerActivity.CPU]
    if model.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    names = StepNames()
    with profile(activities=activities) as recorded:
        _run(model, asked, batch, folder, names.on_stage, names.on_progress)
    with replace_with(path) as temporary:
        recorded.export_chrome_trace(str(temporary))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        # Linux: 5 sets the peak of the resident memory to what it is now
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> dict[str, int]:
    """Highest memory in bytes since it was forgotten; of a CPU, Linux alone can tell."""
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return {}
    status = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in status)
    return {"resident": int(fields["VmHWM"].split()[0]) * 1024}


def highest(peaks: list[dict[str, int]]) -> dict[str, int]:
    """The largest of each name."""
    names = dict.fromkeys(name for peak in peaks for name in peak)
    return {name: max(peak.get(name, 0) for peak in peaks) for name in names}


def device_name(device: torch.device) -> str:
    """As reports call it: a GPU's own name, a CPU's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"
