"""Step rehash: which steps can reuse features, and what that is worth beside fewer steps."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from cmdgen.acceleration.calibration import PARTS, Calibration, Measurement, Predict
from cmdgen.acceleration.keysteps import count_protected
from cmdgen.acceleration.rehash import CutDiT, CutUNet
from cmdgen.config import POLICIES
from cmdgen.evaluation.measure import Evaluator, Readings
from cmdgen.evaluation.metrics import SquaredError, structural_similarity
from cmdgen.evaluation.probe import HEADS
from cmdgen.evaluation.profile import Show, Stopwatch, full_steps, vary
from cmdgen.evaluation.report import table
from cmdgen.evaluation.settings import Comparing
from cmdgen.pipelines.base import Inputs
from cmdgen.pipelines.cmd import CmdPipeline
from cmdgen.pipelines.observer import Observer
from cmdgen.pipelines.still import StillPipeline
from cmdgen.request import Plan, Request

# full steps of the content model; the motion model's are in proportion
BUDGETS = (13, 9)


@torch.inference_mode()
def calibrate(
    pipeline: StillPipeline,
    plan: Plan,
    prompts: Sequence[str],
    *,
    protect: float,
    batch: int,
    show: Show,
) -> list[Calibration]:
    """Measure what step rehash of a plan's sampler and steps would change, for each network.

    Prompts have the seeds 0, 1, ... Where P of the K steps are protected, each network runs about
    (K - P)^3 / 6 times for each prompt.
    """
    model = plan.model
    steps = dict(zip(PARTS, (model.steps, model.motion_steps)[: 1 + plan.moves], strict=False))
    for part, count in steps.items():
        if count < 2:
            raise ValueError(f"{part} in {count} step has nothing to reuse: ask for 2 or more")
    if not prompts:
        raise ValueError("no prompts to calibrate on")
    sums = {
        part: Measurement(count, count_protected(part, count, protect))
        for part, count in steps.items()
    }
    starts = range(0, len(prompts), batch)
    done = dict.fromkeys(steps, 0)

    def count_run(part: str) -> None:
        done[part] += 1
        show(part, done[part], len(starts) * sums[part].runs)

    with torch.cuda.device(pipeline.device) if pipeline.device.type == "cuda" else nullcontext():
        for start in starts:
            some = enumerate(prompts[start : start + batch], start)
            plans = [vary(plan, prompt, seed) for seed, prompt in some]
            text = pipeline.encode_text(plans)

            network = CutUNet(pipeline.unet)
            sample = partial(pipeline.sample_content, plans, text, Observer(), Inputs())
            content = sums["content"].add(network, sample, partial(count_run, "content"))
            if isinstance(pipeline, CmdPipeline) and plan.moves:
                motion = partial(_sample_motion, pipeline, plans, text, content)
                sums["motion"].add(CutDiT(pipeline.motion), motion, partial(count_run, "motion"))
    return [each.finish(part, model.sampler, len(prompts)) for part, each in sums.items()]


def _sample_motion(
    pipeline: CmdPipeline, plans: list[Plan], text: Tensor, content: Tensor, predict: Predict
) -> Tensor:
    """(B + 1, L, D), (B, C, h, w) -> (B, K, T, W' + H'): standardised, as the sampler makes it."""
    motion = pipeline.sample_motion(plans, text, content, Observer(), Inputs(), predict=predict)
    return pipeline.autoencoder.standardise(motion)


@dataclass(frozen=True)
class Row:
    """One way to sample, measured."""

    way: str
    full_steps: int
    full_motion_steps: int
    # per cent that the probe names correctly, by head
    named: dict[str, float]
    # to the frames of the run that skips nothing: dB, and the mean over frames; None for itself
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
        """Return what JSON can hold, which has no infinity: where nothing differs, no PSNR."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            row["psnr"] = None if row["psnr"] == math.inf else row["psnr"]
        return {**self.settings, "rows": rows}

    def to_markdown(self) -> str:
        """Return a title and a table."""
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
        title = "{model}: {clips} clips, {sampler}, {steps} + {motion_steps} steps"
        return "\n".join([title.format(**self.settings), "", *table([header, *cells])])


@dataclass
class _Sums:
    """One way to sample, over the clips so far."""

    way: str
    plan: Plan
    readings: Readings
    error: SquaredError = field(default_factory=SquaredError)
    ssim: list[Tensor] = field(default_factory=list)
    sampler_seconds: float = 0.0
    seconds: float = 0.0

    def finish(self, clips: int) -> Row:
        return Row(
            self.way,
            *full_steps(self.plan),
            named={head: self.readings.accuracy(head) for head in HEADS},
            psnr=self.error.psnr() if self.ssim else None,
            ssim=float(torch.cat(self.ssim).mean()) if self.ssim else None,
            sampler_seconds=self.sampler_seconds / clips,
            seconds=self.seconds / clips,
        )


def compare_rehash(evaluator: Evaluator, options: Comparing) -> Comparison:
    """Sample the same captions and seeds in every way; ValueError where one of them cannot be."""
    pipeline, world, clips = evaluator.pipeline, evaluator.world, options.clips
    ways = [
        _Sums(way, plan, Readings(evaluator.probe)) for way, plan in _list_ways(pipeline, options)
    ]
    indices = world.indices("test", clips)
    # the first clips of a process are slow, and those in which a way's graphs are captured
    for sums in ways[: None if pipeline.uses_graphs else 1]:
        evaluator.sample(sums.plan, indices[: options.batch], options.seed)
    done = 0
    evaluator.show("compare", 0, clips * len(ways))
    for rows in indices.split(options.batch):
        labels, seed = evaluator.labels(rows), options.seed + done // len(ways)
        reference: Tensor | None = None
        # one after the other in each batch: what else the machine does, it does to all of them
        for sums in ways:
            watch, started = Stopwatch(pipeline.device), time.perf_counter()
            frames, _ = evaluator.sample(sums.plan, rows, seed, watch)
            sums.seconds += time.perf_counter() - started
            sums.sampler_seconds += sum(watch.seconds[part] for part in PARTS)
            sums.readings.add(frames, labels)
            values = (frames.float() / 255).flatten(0, 1)
            if reference is None:
                reference = values
            else:
                sums.error.add(values, reference)
                sums.ssim.append(structural_similarity(values, reference))
            done += len(rows)
            evaluator.show("compare", done, clips * len(ways))
    own = pipeline.config
    names = ("sampler", "steps", "motion_steps", "guidance")
    return Comparison(
        settings={
            **{"model": own.name, **{name: getattr(own, name) for name in names}},
            **{"clips": clips, "seed": options.seed, "batch": options.batch},
            **{"protect": options.protect, "device": pipeline.device.type},
            "threads": torch.get_num_threads(),
        },
        rows=[sums.finish(clips) for sums in ways],
    )


def _list_ways(pipeline: CmdPipeline, options: Comparing) -> list[tuple[str, Plan]]:
    """Return the name and the plan of each way; the first skips nothing."""
    ways = [("all steps", Request())]
    for budget in options.full or BUDGETS:
        rehash = Request(rehash=budget, rehash_policy="uniform", rehash_protect=options.protect)
        content, motion = full_steps(pipeline.plan(rehash))
        ways.append(("fewer steps", Request(steps=content, motion_steps=motion)))
        ways += [(f"rehash {policy}", replace(rehash, rehash_policy=policy)) for policy in POLICIES]
    return [(way, pipeline.plan(request, batch=options.batch)) for way, request in ways]
