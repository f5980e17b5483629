"""Where the time of sampling goes, stage by stage, beside what this machine's arithmetic can do."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from cmdgen.config import ProfileConfig, SampleConfig
from cmdgen.evaluation.flops import count_sampling
from cmdgen.pipeline import OnStage, Parts, TextToVideo
from cmdgen.video.write import write_video
from cmdgen.weights import replace_with

PROMPT = "a corgi swimming"
# in the order in which they run; the part of a model that each of them runs
STAGES = {
    "load": None,
    "text": "text",
    "content": "content",
    "motion": "motion",
    "frame decode": "autoencoder",
    "VAE decode": "vae",
    "video encode": None,
}
# of the square matrices whose product tells what the machine can do, and how often it is taken
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
MATMUL_RUNS = 5


@dataclass(frozen=True)
class StageProfile:
    """One stage, or all of them: what it holds, computes and takes."""

    parameters: int
    weight_bytes: int
    flops: int
    # of each run
    seconds: tuple[float, ...]
    # highest bytes: "resident" on a CPU, "allocated" and "reserved" on a GPU; empty: cannot be told
    memory: dict[str, int]

    @property
    def rate(self) -> float:
        """Operations per second in the median run."""
        return self.flops / median(self.seconds)


@dataclass(frozen=True)
class Profile:
    """One model on one machine."""

    settings: dict[str, Any]
    # operations per second of a matrix product
    matmul_rate: float
    stages: dict[str, StageProfile]
    total: StageProfile

    def to_dict(self) -> dict[str, Any]:
        """For JSON: settings, "matmul_flops_per_second", "stages" by name, and "total".

        Of each stage: "parameters", "weight_bytes", "flops", "seconds" (median, fastest, slowest),
        "flops_per_second", "share_of_matmul", "memory_bytes".
        """
        return {
            **self.settings,
            "matmul_flops_per_second": self.matmul_rate,
            "stages": {name: self._entry(stage) for name, stage in self.stages.items()},
            "total": self._entry(self.total),
        }

    def _entry(self, stage: StageProfile) -> dict[str, Any]:
        seconds = stage.seconds
        return {
            "parameters": stage.parameters,
            "weight_bytes": stage.weight_bytes,
            "flops": stage.flops,
            "seconds": {
                "median": median(seconds),
                "fastest": min(seconds),
                "slowest": max(seconds),
            },
            "flops_per_second": stage.rate,
            "share_of_matmul": stage.rate / self.matmul_rate,
            "memory_bytes": stage.memory,
        }


class Size(NamedTuple):
    """Parameters of a part, and the bytes of all its tensors."""

    parameters: int
    bytes: int


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
        self.memory[stage] = _highest([self.memory.get(stage, {}), _peak(self.device)])


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
    counted = count_sampling(own, batch=config.batch)
    rate = matmul_rate(device, dtype)

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
    # others may have had the machine before or after: its limit is the faster of the two
    rate = max(rate, matmul_rate(device, dtype))

    sizes = {name: _size(part) for name, part in _modules(model.parts).items()}
    parameters = sum(size.parameters for size in sizes.values())
    weights = sum(size.bytes for size in sizes.values())
    held = {stage: sizes[part] if part else Size(0, 0) for stage, part in STAGES.items()}
    held["load"] = Size(parameters, weights)
    stages = {
        stage: StageProfile(
            parameters=size.parameters,
            weight_bytes=size.bytes,
            flops=counted[stage].flops if stage in counted else 0,
            seconds=tuple(watch.seconds[stage] for watch in watches),
            memory=_highest([watch.memory[stage] for watch in watches]),
        )
        for stage, size in held.items()
    }
    return Profile(
        settings={
            **{"model": own.name, "frames": own.frames, "height": own.height, "width": own.width},
            **{"sampler": own.sampler, "steps": own.steps, "motion_steps": own.motion_steps},
            **{"guidance": own.guidance, "motion_guidance": own.motion_guidance},
            **{"batch": config.batch, "runs": config.runs, "torch": torch.__version__},
            **{"device": _device_name(device), "dtype": str(dtype).removeprefix("torch.")},
        },
        matmul_rate=rate,
        stages=stages,
        total=StageProfile(
            parameters=parameters,
            weight_bytes=weights,
            flops=sum(stage.flops for stage in stages.values()),
            seconds=tuple(totals),
            memory=_highest([stage.memory for stage in stages.values()]),
        ),
    )


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product on random data: the fastest of a few."""
    size = MATMUL_SIZE[device.type]
    # float16 is not drawn on every CPU
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(1 + MATMUL_RUNS):
        _wait(device)
        started = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[1:])


def _run(
    model: TextToVideo,
    asked: SampleConfig,
    batch: int,
    folder: Path,
    on_stage: OnStage,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> None:
    clips = model.sample_batch(
        [PROMPT] * batch, asked, range(batch), on_progress=on_progress, on_stage=on_stage
    )
    with on_stage("video encode"):
        for i, clip in enumerate(clips):
            write_video(folder / f"{i}.mp4", clip.frames, clip.fps, clip.metadata)


def _trace(model: TextToVideo, asked: SampleConfig, batch: int, folder: Path, path: Path) -> None:
    activities = [ProfilerActivity.CPU]
    if model.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    names = StepNames()
    with profile(activities=activities) as recorded:
        _run(model, asked, batch, folder, names.on_stage, names.on_progress)
    with replace_with(path) as temporary:
        recorded.export_chrome_trace(str(temporary))


def _modules(parts: Parts) -> dict[str, nn.Module]:
    return {name: getattr(parts, name) for name in STAGES.values() if name is not None}


def _size(part: nn.Module) -> Size:
    return Size(
        sum(parameter.numel() for parameter in part.parameters()),
        sum(tensor.nbytes for tensor in part.state_dict().values()),
    )


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


def _highest(peaks: list[dict[str, int]]) -> dict[str, int]:
    names = dict.fromkeys(name for peak in peaks for name in peak)
    return {name: max(peak.get(name, 0) for peak in peaks) for name in names}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"
