"""Where the time of making clips goes, stage by stage, beside what this machine can do at most."""

import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial, reduce
from operator import or_
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as record

from cmdgen.acceleration.calibration import PARTS
from cmdgen.config import ModelConfig
from cmdgen.evaluation.flops import Work, count_work
from cmdgen.files import replace_with
from cmdgen.pipelines.clip import Inputs
from cmdgen.pipelines.device import dtype_name
from cmdgen.pipelines.observer import Observer
from cmdgen.pipelines.still import StillPipeline
from cmdgen.request import Plan, Request
from cmdgen.video.pixels import CONVERT
from cmdgen.video.write import Output, open_video

PROMPT = "a corgi swimming"
# a machine's limits are those of the product of two square matrices, and of copying a buffer that
# no cache holds
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
# how often each is timed, and repeated in between: a GPU's clock includes launches
LIMIT_RUNS = 5
LIMIT_REPEATS = {"cpu": 1, "cuda": 5}

# of the suite, CMD's sampler (Yu et al. 2024, arXiv:2403.14148), for its speed too
SAMPLER, STEPS, LEAST_STEPS = "ddim", 50, 3
# what the paper's 3.1 s count: without the VAE, and without a file
PAPER_STAGES = ("text", "content", "motion", "frame decode")
# full steps of the rows with step rehash, of the steps of the others
SHARES = {"rehash_half": 25 / 50, "rehash_quarter": 13 / 50}

# stage, how much of it is done, of how much
Show = Callable[[str, int, int], None]


class Limits(NamedTuple):
    """What the machine can do at most, measured."""

    # of a matrix product
    flops_per_second: float
    # of a copy, read and written
    bytes_per_second: float


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure a few square matrix products of random data and a few copies; the fastest count."""
    size, length = MATMUL_SIZE.get(device.type, MATMUL_SIZE["cpu"]), COPY_BYTES.get(device.type, COPY_BYTES["cpu"])
    # float16 is not drawn on every CPU
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    # written first: pages of memory that never were are all one and the same
    source = torch.ones(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    works = (lambda: torch.mm(a, b), lambda: target.copy_(source))
    multiplying, copying = map(min, zip(*in_turn(works, device, time.perf_counter, LIMIT_RUNS), strict=True))
    return Limits(2 * size**3 / multiplying, 2 * length / copying)


def in_turn(
    works: Sequence[Callable[[], object]], device: torch.device, clock: Callable[[], float], rounds: int
) -> list[list[float]]:
    """Return for each round the seconds of one call of each work, after one to warm up.

    They take turns: machines slow down and recover.
    """
    for work in works:
        work()
    repeats = LIMIT_REPEATS.get(device.type, LIMIT_REPEATS["cpu"])

    def measure(work: Callable[[], object]) -> float:
        _wait(device)
        started = clock()
        for _ in range(repeats):
            work()
        _wait(device)
        return (clock() - started) / repeats

    return [[measure(work) for work in works] for _ in range(rounds)]


@dataclass
class Stopwatch(Observer):
    """Measures seconds and the highest memory of each stage; a GPU's own clock, which waits for nothing."""

    device: torch.device
    # takes frames as soon as they are decoded
    write: Callable[[np.ndarray], object] = lambda frames: None
    _seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    # stages of a GPU that may still be under way
    _laps: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    # "resident" on a CPU, "allocated" and "reserved" on a GPU; empty where that cannot be told
    memory: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage; one that is entered again adds to its time."""
        _forget_peak(self.device)
        if self.device.type == "cuda":
            started = _mark(self.device)
            yield
            self._laps.append((name, started, _mark(self.device)))
        else:
            _wait(self.device)
            begun = time.perf_counter()
            yield
            _wait(self.device)
            self._seconds[name] += time.perf_counter() - begun
        self.memory[name] |= _peak(self.device)

    @property
    def seconds(self) -> dict[str, float]:
        """Return the seconds of each stage, when all have ended."""
        if self._laps:
            torch.cuda.synchronize(self.device)
        while self._laps:
            name, started, ended = self._laps.pop()
            self._seconds[name] += started.elapsed_time(ended) / 1000
        return self._seconds

    def frames(self, clip: int, frames: np.ndarray) -> None:
        """Write frames, if they go anywhere."""
        self.write(frames)


class Tracer(Observer):
    """Names the stages of a trace, and the steps between two reports of progress."""

    def __init__(self) -> None:
        self.names = ExitStack()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Name a stage, and its first step."""
        with record_function(name), self.names:
            if name in PARTS:
                self.names.enter_context(record_function(f"{name} step 1"))
            yield

    def step(self, stage: str, done: int, total: int) -> None:
        """Name the next step."""
        if stage in PARTS:
            self.names.close()
            if done < total:
                self.names.enter_context(record_function(f"{stage} step {done + 1}"))


@dataclass(frozen=True)
class Way:
    """How clips are made, and what of it counts."""

    plan: Plan
    batch: int = 1
    # whether frames are encoded after all other stages, as they are decoded, or not at all
    encode: Literal["after", "during", "never"] = "after"
    # stages that count; None: all
    stages: tuple[str, ...] | None = None

    def clips(self, run: int) -> list[Plan]:
        """Return the plans of clips whose seeds no other run has: nothing serves a second time."""
        first = run * self.batch
        return [vary(self.plan, PROMPT, seed) for seed in range(first, first + self.batch)]

    def make(self, pipeline: StillPipeline, observer: Observer, path: Path, run: int = 0) -> None:
        """Make the clips of one run; `path`, with a suffix, is where their files go."""
        plans, model = self.clips(run), self.plan.model
        with ExitStack() as stack:
            if self.encode == "during":
                # as `cmdgen sample` does
                assert isinstance(observer, Stopwatch)
                size, about = (model.height, model.width), pipeline.describe(plans[0])
                file = Output(f"{path}.mp4", size, model.fps, about, pixels="yuv420p")
                write, shown = stack.enter_context(open_video(file)), iter(smooth_clip(model))
                observer.write = lambda frames: write(np.stack([next(shown) for _ in frames]))
            picture = None
            if model.vision is not None:
                picture = np.zeros((model.height, model.width, 3), np.uint8)
            clips = pipeline.run(plans, observer, pixels="yuv420p", inputs=Inputs(image=picture))
        if self.encode == "after":
            with observer.stage("video encode"):
                for i, clip in enumerate(clips):
                    clip.save(f"{path}-{i}.{'mp4' if self.plan.moves else 'png'}")


def smooth_clip(model: ModelConfig) -> np.ndarray:
    """() -> (T, ...) yuv420p of waves that move: random weights make noise, for which encoders take far longer."""
    t, y, x = (torch.linspace(0, 6, length) for length in (model.frames, model.height, model.width))
    wave = torch.sin(t[:, None, None] + y[:, None] + x)  # (T, H, W)
    frames: np.ndarray = CONVERT["yuv420p"](torch.stack([wave, wave.flip(1), wave.flip(2)], dim=1)).numpy()
    return frames


def vary(plan: Plan, prompt: str, seed: int) -> Plan:
    """Return the plan of another clip."""
    return replace(plan, prompt=prompt, seed=seed, content_seed=seed, motion_seed=seed)


def full_steps(plan: Plan) -> tuple[int, int]:
    """Return how many steps of content and motion skip nothing."""
    if plan.key_steps is None:
        return plan.model.steps, plan.model.motion_steps
    return len(plan.key_steps.content), len(plan.key_steps.motion)


def profile(load: Callable[[], StillPipeline], ways: Mapping[str, Way], *, runs: int, show: Show) -> dict[str, Any]:
    """Make clips in each way, `runs` times after once to warm up.

    `load` gives the pipeline of each run. Returns the keys that `cmdgen profile --help` explains,
    with a row for each way.
    """
    pipeline = load()
    device, dtype = pipeline.device, pipeline.dtype
    before = measure_limits(device, dtype)
    measured: dict[str, list[Stopwatch]] = {name: [] for name in ways}
    turns = [(name, i) for name in ways for i in range(1 + runs)]
    show("run", 0, len(turns))
    with TemporaryDirectory() as folder:
        for done, (name, i) in enumerate(turns, 1):
            if device.type == "cuda" and i == 0:
                # what others keep for reuse would count as reserved by this one
                torch.cuda.empty_cache()
            watch, path, previous = Stopwatch(device), Path(folder, f"{name}-{i}"), id(pipeline)
            with watch.stage("total"):
                # the pipeline of the run before is let go of before this one reads its weights
                pipeline = load()
                ways[name].make(pipeline, watch, path, i)
            if pipeline.uses_graphs and id(pipeline) != previous:
                watch = _repeat(watch, partial(ways[name].make, pipeline, path=Path(f"{path}-again"), run=i))
            if i > 0:
                measured[name].append(watch)
            show("run", done, len(turns))
    # others may have had the machine before or after: its limits are the higher of the two
    limits = Limits(*map(max, before, measure_limits(device, dtype)))
    (*_, last) = ways.values()
    model, moves = last.plan.model, last.plan.samples_motion
    names = ("frames", "height", "width", "sampler", "steps", "guidance")
    return {
        **{"model": model.name, **{name: getattr(model, name) for name in names}},
        **{"motion_steps": model.motion_steps if moves else None},
        **{"motion_guidance": model.motion_guidance if moves else None},
        **{"batch": last.batch, "runs": runs, "compile": pipeline.uses_compiler},
        **{"device": device_name(device), "dtype": dtype_name(dtype), "torch": torch.__version__},
        "matmul_flops_per_second": limits.flops_per_second,
        "copy_bytes_per_second": limits.bytes_per_second,
        "rows": {name: _describe_row(ways[name], dtype, limits, measured[name]) for name in ways},
    }


def _repeat(first: Stopwatch, make: Callable[..., None]) -> Stopwatch:
    """Make a clip again that was the first of its pipeline; its graphs were captured, "capture" is what that took."""
    watch, load = Stopwatch(first.device), first.seconds["load"]
    with watch.stage("total"):
        make(observer=watch)
    watch.seconds["capture"] = first.seconds["total"] - load - watch.seconds["total"]
    watch.seconds["load"], watch.memory["load"] = load, first.memory["load"]
    watch.seconds["total"] += load
    return watch


def _describe_row(way: Way, dtype: torch.dtype, limits: Limits, watches: list[Stopwatch]) -> dict[str, Any]:
    work = count_work(way.plan, dtype, batch=way.batch)
    counted = {stage: work[stage] for stage in way.stages or work}

    def describe(work: Work, stages: Iterable[str], timed: Iterable[str]) -> dict[str, Any]:
        seconds = [sum(watch.seconds[stage] for stage in timed) for watch in watches]
        memory = highest(watch.memory[stage] for watch in watches for stage in stages)
        return describe_stage(work, seconds, memory, limits)

    stages = {stage: describe(counted[stage], [stage], [stage]) for stage in counted}
    sums = {
        name: sum(getattr(stage, name) for stage in counted.values()) for name in ("forwards", "flops", "bytes_read")
    }
    timed = counted if way.encode == "never" else ["total"]
    model, (content, motion) = way.plan.model, full_steps(way.plan)
    return describe(replace(work["load"], **sums), counted, timed) | {
        **{"full_steps": content, "full_motion_steps": motion},
        **{"guidance": model.guidance, "motion_guidance": model.motion_guidance},
        "content_step_seconds": stages["content"]["seconds"]["median"] / model.steps,
        "capture_seconds": median(watch.seconds["capture"] for watch in watches),
        "stages": stages,
    }


def describe_stage(work: Work, seconds: Sequence[float], memory: Mapping[str, int], limits: Limits) -> dict[str, Any]:
    """Return what one stage, or all of them, did and took; rates are those of the median run."""
    middle = median(seconds)
    flops, read = work.flops / middle, work.bytes_read / middle
    return {
        **asdict(work),
        "seconds": {"median": middle, "fastest": min(seconds), "slowest": max(seconds)},
        **{"flops_per_second": flops, "share_of_matmul": flops / limits.flops_per_second},
        **{"bytes_per_second": read, "share_of_copy": read / limits.bytes_per_second},
        "memory_bytes": dict(memory),
    }


def plan_suite(pipeline: StillPipeline, request: Request) -> dict[str, Way]:
    """Return the ways that are compared in public; reads no weights.

    Raises ValueError where the model cannot make these clips.
    """
    if pipeline.config.motion is None:
        raise ValueError(f"{pipeline.config.name} makes stills: the suite measures videos")
    steps = request.steps or STEPS
    if steps < LEAST_STEPS:
        raise ValueError(f"steps {steps} is not at least {LEAST_STEPS}: some are skipped")
    clip = replace(request, sampler=SAMPLER, steps=steps, motion_steps=steps)
    paper = replace(clip, guidance=1.0, motion_guidance=1.0)
    stages = (*PAPER_STAGES, "VAE decode")
    ways = {
        "paper": Way(pipeline.plan(paper), encode="never", stages=PAPER_STAGES),
        "clip": Way(pipeline.plan(clip), encode="during", stages=stages),
    }
    for name, share in SHARES.items():
        # the first step runs, and one more at least; this policy alone needs no calibration
        full = max(2, round(share * steps))
        rehash = replace(clip, rehash=full, rehash_policy="uniform")
        ways[name] = Way(pipeline.plan(rehash), encode="during", stages=stages)
    return ways


def trace(pipeline: StillPipeline, way: Way, path: Path) -> None:
    """Write one run as a Chrome trace."""
    activities = [ProfilerActivity.CPU]
    if pipeline.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with TemporaryDirectory() as folder:
        if pipeline.uses_graphs:
            # or the trace would be of capturing them
            way.make(pipeline, Observer(), Path(folder, "first"))
        with record(activities=activities) as recorded:
            way.make(pipeline, Tracer(), Path(folder, "clip"))
    with replace_with(path) as temporary:
        recorded.export_chrome_trace(str(temporary))


def _mark(device: torch.device) -> torch.cuda.Event:
    """Return a moment in what this GPU has to do."""
    with torch.cuda.device(device):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
    return event


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        # Linux: 5 sets the peak of the resident memory to what it is now
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> Counter[str]:
    """Return the highest memory in bytes since it was forgotten; of a CPU, Linux alone can tell."""
    if device.type == "cuda":
        return Counter(
            allocated=torch.cuda.max_memory_allocated(device), reserved=torch.cuda.max_memory_reserved(device)
        )
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return Counter()
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return Counter(resident=int(peak[1]) * 1024) if peak else Counter()


def highest(peaks: Iterable[Counter[str]]) -> Counter[str]:
    """Return the largest value of each name."""
    return reduce(or_, peaks, Counter())


def device_name(device: torch.device) -> str:
    """Return a GPU's own name, or a CPU's threads, for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
