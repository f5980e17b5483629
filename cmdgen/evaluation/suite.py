"""Whole clips in the ways that are compared in public, warm, in one process: one table."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cmdgen.acceleration.rehash import CutDiT, CutUNet
from cmdgen.config import ModelConfig, SampleConfig, SuiteConfig
from cmdgen.evaluation.flops import (
    Products,
    build_parts,
    count_forwards,
    count_products,
    count_sampling,
)
from cmdgen.evaluation.profile import PROMPT, Stopwatch, device_name, highest, measure_limits
from cmdgen.pipeline import TextToVideo
from cmdgen.request import KeySteps
from cmdgen.video.write import open_video

# CMD's (Yu et al. 2024, arXiv:2403.14148), for its speed too
SAMPLER = "ddim"
# what its 3.1 s count: without the VAE, and without a file
PAPER_STAGES = ("text", "content", "motion", "frame decode")
# full steps of the rows with step rehash, of the steps of the others
SHARES = {"rehash_half": 25 / 50, "rehash_quarter": 13 / 50}


@dataclass(frozen=True)
class Row:
    """One way to make a clip, and what it took."""

    steps: int
    full_steps: int
    full_motion_steps: int
    guidance: float
    motion_guidance: float
    # of each stage that counts: operations, two for each multiply-add, and seconds of each run
    flops: dict[str, int]
    stages: dict[str, tuple[float, ...]]
    # of each run: the sum of the stages, or from the prompt to the file on disk
    seconds: tuple[float, ...]
    # highest bytes: "resident" on a CPU, "allocated" and "reserved" on a GPU; empty: cannot be told
    memory: dict[str, int]

    @property
    def step_seconds(self) -> float:
        """Of the content model in the median run; full steps and skipped ones alike."""
        return median(self.stages["content"]) / self.steps

    @property
    def flops_per_second(self) -> float:
        """In the median run."""
        return sum(self.flops.values()) / median(self.seconds)


@dataclass(frozen=True)
class Suite:
    """All rows, of one model on one machine."""

    settings: dict[str, Any]
    # of a product of square matrices, measured
    matmul_flops_per_second: float
    rows: dict[str, Row]

    @property
    def step(self) -> tuple[float, float]:
        """Seconds and operations for each second of a step of the UNet, with guidance."""
        row = self.rows["clip"]
        return row.step_seconds, row.flops["content"] / row.steps / row.step_seconds

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the keys that `cmdgen profile --help` explains."""
        seconds, rate = self.step
        return {
            **self.settings,
            "matmul_flops_per_second": self.matmul_flops_per_second,
            "rows": {name: self._entry(row) for name, row in self.rows.items()},
            "unet_step": {"seconds": seconds, **self._rates(rate)},
        }

    def _entry(self, row: Row) -> dict[str, Any]:
        return {
            "full_steps": row.full_steps,
            "full_motion_steps": row.full_motion_steps,
            "guidance": row.guidance,
            "motion_guidance": row.motion_guidance,
            "seconds": _spread(row.seconds),
            "content_step_seconds": row.step_seconds,
            "flops": sum(row.flops.values()),
            **self._rates(row.flops_per_second),
            "memory_bytes": row.memory,
            "stages": {
                stage: {"flops": row.flops[stage], "seconds": _spread(seconds)}
                for stage, seconds in row.stages.items()
            },
        }

    def _rates(self, rate: float) -> dict[str, float]:
        return {
            "flops_per_second": rate,
            "share_of_matmul": rate / self.matmul_flops_per_second,
        }


def _spread(seconds: tuple[float, ...]) -> dict[str, float]:
    return {"median": median(seconds), "fastest": min(seconds), "slowest": max(seconds)}


def plan_suite(model: TextToVideo, config: SuiteConfig) -> dict[str, SampleConfig]:
    """What each row asks for; reads no weights. ValueError where the model cannot do it."""
    if model.config.motion is None:
        raise ValueError(f"{model.config.name} makes stills: the suite measures videos")
    clip = SampleConfig(
        sampler=SAMPLER,
        steps=config.steps,
        motion_steps=config.steps,
        height=config.height,
        width=config.width,
    )
    rows = {"paper": replace(clip, guidance=1.0, motion_guidance=1.0), "clip": clip}
    # the first step runs, and one more at least
    budgets = {name: max(2, round(share * config.steps)) for name, share in SHARES.items()}
    for name, budget in budgets.items():
        # the one policy that needs no calibration
        rows[name] = replace(clip, rehash=budget, rehash_policy="uniform")
    for asked in rows.values():
        asked.apply(model.config)
        model.plan_rehash(asked)
        model.plan_decoding(asked)
    return rows


def measure_suite(
    model: TextToVideo,
    config: SuiteConfig,
    *,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Suite:
    """Make clips in each way; the first one of each warms up, and reads the weights if need be.

    Raises ValueError where the model cannot do what is asked.
    """
    report = on_progress or (lambda stage, done, total: None)
    asked = plan_suite(model, config)
    work = {name: count_row(model, each) for name, each in asked.items()}
    device, total = model.device, len(asked) * (1 + config.runs)
    before = measure_limits(device, model.dtype)

    rows: dict[str, Row] = {}
    report("run", 0, total)
    with TemporaryDirectory() as folder:
        for name, each in asked.items():
            if device.type == "cuda":
                # what other rows keep for reuse would count as reserved by this one
                torch.cuda.empty_cache()
            runs = []
            for i in range(1 + config.runs):
                # a clip of its own: nothing of the one before it serves it
                path = None if name == "paper" else Path(folder) / f"{name}-{i}.mp4"
                runs.append(_run(model, replace(each, seed=i), path))
                report("run", len(rows) * (1 + config.runs) + i + 1, total)
            rows[name] = _finish(model, each, work[name], runs[1:])
    # others may have had the machine before or after: its limit is the higher of the two
    after = measure_limits(device, model.dtype)
    own = asked["clip"].apply(model.config)
    return Suite(
        settings={
            **{"model": own.name, "frames": own.frames, "height": own.height, "width": own.width},
            **{"sampler": own.sampler, "steps": own.steps, "motion_steps": own.motion_steps},
            **{"guidance": own.guidance, "motion_guidance": own.motion_guidance},
            **{"runs": config.runs, "device": device_name(device)},
            **{"dtype": str(model.dtype).removeprefix("torch."), "torch": torch.__version__},
            "compile": model.uses_compiler,
        },
        matmul_flops_per_second=max(before.flops_per_second, after.flops_per_second),
        rows=rows,
    )


def _run(
    model: TextToVideo, asked: SampleConfig, path: Path | None
) -> tuple[Stopwatch, float | None]:
    """A clip as `cmdgen sample` makes it, and the seconds until its file is there, if it gets one.

    Without a file the VAE runs all the same: its stage is there to be left out.
    """
    watch = Stopwatch(model.device)
    if path is None:
        model.sample_batch([PROMPT], asked, [asked.seed], on_stage=watch)
        return watch, None
    own = asked.apply(model.config)
    started = time.perf_counter()
    metadata = model.describe(PROMPT, asked)
    what = (own.height, own.width), own.fps, metadata
    with open_video(path, *what, pixels="yuv420p") as write:
        model.sample_batch(
            *([PROMPT], asked, [asked.seed]),
            pixels="yuv420p",
            on_frames=lambda _, decoded: write(decoded),
            on_stage=watch,
        )
    return watch, time.perf_counter() - started


def _finish(
    model: TextToVideo,
    asked: SampleConfig,
    work: dict[str, Products],
    runs: list[tuple[Stopwatch, float | None]],
) -> Row:
    own, plan = asked.apply(model.config), model.plan_rehash(asked)
    whole = runs[0][1] is not None
    counted = [stage for stage in work if whole or stage in PAPER_STAGES]
    seconds = (
        sum(watch.seconds[stage] for stage in counted) if taken is None else taken
        for watch, taken in runs
    )
    return Row(
        steps=own.steps,
        full_steps=own.steps if plan is None else len(plan.content),
        full_motion_steps=own.motion_steps if plan is None else len(plan.motion),
        guidance=own.guidance,
        motion_guidance=own.motion_guidance,
        flops={stage: work[stage].flops for stage in counted},
        stages={stage: tuple(watch.seconds[stage] for watch, _ in runs) for stage in counted},
        seconds=tuple(seconds),
        memory=highest([watch.memory[stage] for watch, _ in runs for stage in counted]),
    )


def count_row(model: TextToVideo, asked: SampleConfig) -> dict[str, Products]:
    """Each stage of one clip, by what runs: of skipped steps, what is after the cut."""
    own, plan = asked.apply(model.config), model.plan_rehash(asked)
    forwards = count_forwards(own)
    if plan is None:
        return count_sampling(own, forwards)
    full = replace(own, steps=len(plan.content), motion_steps=len(plan.motion))
    stages = count_sampling(full, forwards)
    content, motion = count_skipped(own, plan)
    branches = [1 if scale == 1 else 2 for scale in (own.guidance, own.motion_guidance)]
    # what is made of their timesteps is made for skipped steps too
    content = content * branches[0] + forwards.content_time
    motion = (motion + forwards.motion_time) * branches[1]
    stages["content"] += content * (own.steps - full.steps)
    stages["motion"] += motion * (own.motion_steps - full.motion_steps)
    return stages


def count_skipped(model: ModelConfig, plan: KeySteps) -> tuple[Products, Products]:
    """A skipped step of the content model and one of the motion model, one branch of one clip."""
    parts = build_parts(model)
    assert model.text is not None and model.vae is not None
    assert parts.autoencoder is not None and parts.motion is not None
    with torch.device("meta"), torch.inference_mode():
        states = torch.empty(1, model.text.max_position_embeddings, model.text.hidden_size)
        height, width = (side // model.vae.stride for side in (model.height, model.width))
        still, when = torch.empty(1, model.vae.latent_channels, height, width), torch.empty(1)
        rows, columns = (side // parts.autoencoder.config.patch for side in (height, width))
        channels = parts.autoencoder.config.motion_channels
        size = model.frames, columns + rows
        unet, dit = CutUNet(parts.content), CutDiT(parts.motion)
        x = still, parts.content.project_time(when), *parts.content.project_text(states)
        given = None if parts.motion.config.text_width is None else states
        z = (
            torch.empty(1, channels, *size),
            parts.motion.modulations(when, text=given),
            parts.motion.place(*size, context=still, split=columns),
        )
        _, of_unet = unet.run(*x)
        _, of_dit = dit.run(*z)
    return (
        count_products(lambda: unet.resume(of_unet, *x)),
        count_products(lambda: dit.resume(of_dit, *z)),
    )
