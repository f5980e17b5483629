"""Step rehash beside fewer steps, at equal numbers of full steps, on one set of clips."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import torch
from einops import rearrange
from torch import Tensor

from cmdgen.config import POLICIES, SampleConfig
from cmdgen.evaluation.measure import OnProgress, Readings
from cmdgen.evaluation.metrics import SquaredError, structural_similarity
from cmdgen.evaluation.probe import HEADS, Probe
from cmdgen.evaluation.report import table
from cmdgen.pipeline import Clip, TextToVideo
from cmdgen.world.world import World

SAMPLERS_OF = ("content", "motion")


@dataclass(frozen=True)
class ComparisonConfig:
    """What is compared, on how much."""

    # full steps of the content model; the motion model's are in proportion
    budgets: tuple[int, ...] = (13, 9)
    clips: int = 128
    batch: int = 16
    # of the first clip; every next one has the next
    seed: int = 0
    cut: str = SampleConfig.rehash_cut
    protect: float = SampleConfig.rehash_protect

    def __post_init__(self) -> None:
        for name in ("clips", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not at least 1")
        if not self.budgets:
            raise ValueError("no number of full steps to compare")


@dataclass(frozen=True)
class Row:
    """One way to sample, measured."""

    way: str
    full_steps: int
    full_motion_steps: int
    # per cent that the probe names correctly, by head
    named: dict[str, float]
    # to the frames of the run that skips nothing: dB, and the mean over frames; of itself neither
    psnr: float | None
    ssim: float | None
    # for each clip: of both samplers, and of everything
    sampler_seconds: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """All ways, the one that skips nothing first."""

    settings: dict[str, object]
    rows: list[Row]

    def to_dict(self) -> dict[str, object]:
        """For JSON, which has no infinity: where nothing differs there is no PSNR."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            row["psnr"] = None if row["psnr"] == math.inf else row["psnr"]
        return {**self.settings, "rows": rows}

    def to_markdown(self) -> str:
        """A title and a table."""
        header = ("full steps", "", *HEADS, "PSNR", "SSIM", "samplers", "clip")
        cells = [
            (
                f"{row.full_steps} + {row.full_motion_steps}",
                row.way,
                *(f"{row.named[head]:.1f} %" for head in HEADS),
                "" if row.psnr is None else f"{row.psnr:.2f} dB",
                "" if row.ssim is None else f"{row.ssim:.3f}",
                f"{row.sampler_seconds:.3f} s",
                f"{row.seconds:.3f} s",
            )
            for row in self.rows
        ]
        title = "{model}: {clips} clips, {sampler}, {steps} + {motion_steps} steps, cut {cut}"
        return "\n".join([title.format(**self.settings), "", *table([header, *cells])])


@dataclass
class _Sums:
    """Of one way to sample, over the clips so far."""

    readings: Readings
    error: SquaredError = field(default_factory=SquaredError)
    ssim: list[Tensor] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Around a stage; what it leaves on a GPU is waited for."""
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[stage] += time.perf_counter() - started


def compare_rehash(
    model: TextToVideo,
    world: World,
    probe: Probe,
    config: ComparisonConfig,
    *,
    on_progress: OnProgress,
) -> Comparison:
    """Sample the same captions and seeds in every way; ValueError where one of them cannot be."""
    own = model.config
    if own.motion is None:
        raise ValueError(f"{own.name} makes stills: videos alone are compared")
    ways = _list_ways(model, config)
    sums = [_Sums(Readings(probe)) for _ in ways]
    indices = world.indices("test", config.clips)
    # the first clips of a process are slow, and those in which a way's graphs are captured
    first_captions = world.captions(indices[: config.batch])
    for _, asked in ways if model.uses_graphs else ways[:1]:
        model.sample_batch(first_captions, asked, range(len(first_captions)))
    done = 0
    on_progress("compare", 0, config.clips * len(ways))
    for rows in indices.split(config.batch):
        specs = world.specs(rows)
        labels = {"subject": specs.subject, "motion": specs.motion, "scene": specs.scene}
        captions = world.captions(rows)
        first = config.seed + done // len(ways)
        seeds = range(first, first + len(rows))
        reference: Tensor | None = None
        # one after the other in each batch: what else the machine does, it does to all of them
        for (_, asked), each in zip(ways, sums, strict=True):
            with each.clock("all"):
                clips = model.sample_batch(captions, asked, seeds, on_stage=each.clock)
            frames = _stack(clips)
            each.readings.add(frames, labels)
            values = frames.float() / 255
            if reference is None:
                reference = values
            else:
                each.error.add(values, reference)
                each.ssim.append(
                    structural_similarity(values.flatten(0, 1), reference.flatten(0, 1))
                )
            done += len(rows)
            on_progress("compare", done, config.clips * len(ways))
    return Comparison(
        settings={
            **{"model": own.name, "sampler": own.sampler, "steps": own.steps},
            **{"motion_steps": own.motion_steps, "guidance": own.guidance},
            **{"clips": config.clips, "seed": config.seed, "batch": config.batch},
            **{"cut": config.cut, "protect": config.protect},
            **{"device": model.device.type, "threads": torch.get_num_threads()},
        },
        rows=[
            _finish(model, way, asked, each, config.clips)
            for (way, asked), each in zip(ways, sums, strict=True)
        ],
    )


def _list_ways(model: TextToVideo, config: ComparisonConfig) -> list[tuple[str, SampleConfig]]:
    """A name and what is asked for, of each way; the first skips nothing."""
    own = model.config
    ways = [("all steps", SampleConfig())]
    for budget in config.budgets:
        rehashed = SampleConfig(rehash=budget, rehash_cut=config.cut, rehash_protect=config.protect)
        plan = model.plan_rehash(replace(rehashed, rehash_policy="uniform"))
        assert plan is not None
        fewer = SampleConfig(steps=len(plan.content), motion_steps=len(plan.motion))
        ways.append(("fewer steps", fewer))
        for policy in POLICIES:
            ways.append((f"rehash {policy}", replace(rehashed, rehash_policy=policy)))
    for _, asked in ways:
        # what cannot be is said before anything runs
        asked.apply(own)
        model.plan_rehash(asked)
    return ways


def _finish(model: TextToVideo, way: str, asked: SampleConfig, sums: _Sums, clips: int) -> Row:
    plan, applied = model.plan_rehash(asked), asked.apply(model.config)
    return Row(
        way=way,
        full_steps=applied.steps if plan is None else len(plan.content),
        full_motion_steps=applied.motion_steps if plan is None else len(plan.motion),
        named={head: sums.readings.accuracy(head) for head in HEADS},
        psnr=sums.error.psnr() if sums.ssim else None,
        ssim=float(torch.cat(sums.ssim).mean()) if sums.ssim else None,
        sampler_seconds=sum(sums.seconds[stage] for stage in SAMPLERS_OF) / clips,
        seconds=sums.seconds["all"] / clips,
    )


def _stack(clips: list[Clip]) -> Tensor:
    """B clips -> (B, T, 3, H, W) uint8."""
    frames = torch.stack([torch.from_numpy(clip.frames) for clip in clips])
    return rearrange(frames, "b t h w c -> b t c h w")
