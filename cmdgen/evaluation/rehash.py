"""Step rehash: which steps can reuse features, and what that is worth beside fewer steps."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cmdgen.acceleration.calibration import PARTS, Calibration, Measurement, Predict
from cmdgen.acceleration.keysteps import count_protected
from cmdgen.acceleration.rehash import CutDiT
from cmdgen.config import CUTS, POLICIES
from cmdgen.evaluation.measure import Evaluator, Readings
from cmdgen.evaluation.metrics import SquaredError, structural_similarity
from cmdgen.evaluation.probe import HEADS
from cmdgen.evaluation.profile import Show, Stopwatch, full_steps, vary
from cmdgen.evaluation.report import table
from cmdgen.evaluation.settings import Calibrating, Comparing
from cmdgen.pipelines.clip import Inputs, Task
from cmdgen.pipelines.cmd import CmdPipeline
from cmdgen.pipelines.still import StillPipeline, cut_unet
from cmdgen.pipelines.video_unet import MotionPipeline
from cmdgen.request import Plan, Request

# full steps of the content model; the motion model's are in proportion
BUDGETS = (13, 9)


@torch.inference_mode()
def calibrate(
    pipeline: StillPipeline,
    plan: Plan,
    prompts: Sequence[str],
    options: Calibrating,
    *,
    inputs: Sequence[Inputs] = (),
    show: Show,
) -> list[Calibration]:
    """Measure what step rehash of a plan's sampler and steps would change, for each network.

    Prompts have the seeds 0, 1, ... Where P of the K steps are protected, each network runs about
    (K - P)^3 / 6 times for each prompt; for similarity alone, K times. A model that animates
    pictures has `inputs` in place of prompts.
    """
    protect, batch = options.protect, options.batch if not inputs else 1
    model = plan.model
    steps = dict(zip(PARTS, (model.steps, model.motion_steps)[: 1 + plan.samples_motion], strict=False))
    for part, count in steps.items():
        if count < 2:
            raise ValueError(f"{part} in {count} step has nothing to reuse: ask for 2 or more")
    if not prompts:
        raise ValueError("no prompts to calibrate on")
    replays = options.policy != "similarity"
    sums = {
        part: Measurement(count, count_protected(part, count, protect), replays=replays)
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
            network = cut_unet(pipeline.unet, plan)
            if isinstance(pipeline, MotionPipeline):
                task = Task(plans, inputs=inputs[start] if inputs else Inputs())
                sums["content"].add(network, partial(pipeline.sample_clips, task), partial(count_run, "content"))
                continue
            task, text = Task(plans), pipeline.encode_text(plans)
            sample = partial(pipeline.sample_content, task, text)
            content = sums["content"].add(network, sample, partial(count_run, "content"))
            if isinstance(pipeline, CmdPipeline) and plan.moves:
                motion = partial(_sample_motion, pipeline, task, text, content)
                sums["motion"].add(CutDiT(pipeline.motion), motion, partial(count_run, "motion"))
    cuts = {"content": plan.rehash_cut or CUTS[0]}
    return [sums[part].finish(part, model.sampler, len(prompts), cuts.get(part, CUTS[0])) for part in sums]


def _sample_motion(pipeline: CmdPipeline, task: Task, text: Tensor, content: Tensor, predict: Predict) -> Tensor:
    """(B + 1, L, D), (B, C, h, w) -> (B, K, T, W' + H'): standardised, as the sampler makes it."""
    return pipeline.autoencoder.standardise(pipeline.sample_motion(task, text, content, predict=predict))


@dataclass
class Way:
    """One way to sample, and what was measured of it so far."""

    name: str
    plan: Plan
    readings: Readings
    # of "all" and of each stage, summed over batches
    watch: Stopwatch
    # to the frames of the way that skips nothing
    error: SquaredError = field(default_factory=SquaredError)
    ssim: list[Tensor] = field(default_factory=list)

    def to_dict(self, clips: int) -> dict[str, Any]:
        """Return the row of this way: per cent named correctly, dB, seconds for each clip."""
        content, motion = full_steps(self.plan)
        # of the way that skips nothing: none; where nothing differs, JSON has no infinity
        psnr = self.error.psnr()
        return {
            **{"way": self.name, "full_steps": content, "full_motion_steps": motion},
            "named": {head: self.readings.accuracy(head) for head in HEADS},
            "psnr": psnr if math.isfinite(psnr) else None,
            "ssim": float(torch.cat(self.ssim).mean()) if self.ssim else None,
            "sampler_seconds": sum(self.watch.seconds[part] for part in PARTS) / clips,
            "seconds": self.watch.seconds["all"] / clips,
        }


def compare_rehash(evaluator: Evaluator, options: Comparing) -> dict[str, Any]:
    """Sample the same captions and seeds in every way; ValueError where one of them cannot be.

    Returns settings, and under "rows" the ways, the one that skips nothing first.
    """
    pipeline, clips, done = evaluator.pipeline, options.clips, 0
    ways = _list_ways(evaluator, options)
    indices = evaluator.world.indices("test", clips)
    # the first clips of a process are slow, and those in which a way's graphs are captured
    for way in ways[: None if pipeline.uses_graphs else 1]:
        evaluator.sample(way.plan, indices[: options.batch], options.seed)
    evaluator.show("compare", 0, clips * len(ways))
    for rows in indices.split(options.batch):
        labels, seed = evaluator.labels(rows), options.seed + done // len(ways)
        reference: Tensor | None = None
        # one after the other in each batch: what else the machine does, it does to all of them
        for way in ways:
            with way.watch.stage("all"):
                frames, _ = evaluator.sample(way.plan, rows, seed, way.watch)
            way.readings.add(frames, labels)
            values = (frames.float() / 255).flatten(0, 1)
            if reference is None:
                reference = values
            else:
                way.error.add(values, reference)
                way.ssim.append(structural_similarity(values, reference))
            done += len(rows)
            evaluator.show("compare", done, clips * len(ways))
    model = pipeline.config
    names = ("sampler", "steps", "motion_steps", "guidance")
    return {
        **{"model": model.name, **{name: getattr(model, name) for name in names}},
        **{"clips": clips, "seed": options.seed, "batch": options.batch},
        **{"protect": options.protect, "device": pipeline.device.type},
        "threads": torch.get_num_threads(),
        "rows": [way.to_dict(clips) for way in ways],
    }


def _list_ways(evaluator: Evaluator, options: Comparing) -> list[Way]:
    """Return all ways, without measurements; the first skips nothing."""
    pipeline, ways = evaluator.pipeline, [("all steps", Request())]
    for budget in options.full or BUDGETS:
        rehash = Request(rehash=budget, rehash_policy="uniform", rehash_protect=options.protect)
        content, motion = full_steps(pipeline.plan(rehash))
        ways.append(("fewer steps", Request(steps=content, motion_steps=motion)))
        ways += [(f"rehash {policy}", replace(rehash, rehash_policy=policy)) for policy in POLICIES]
    plans = [(name, pipeline.plan(request, batch=options.batch)) for name, request in ways]
    return [Way(name, plan, Readings(evaluator.probe), Stopwatch(pipeline.device)) for name, plan in plans]


def list_lines(comparison: dict[str, Any]) -> list[str]:
    """Return a title and a table."""
    rows = [("full steps", "", *HEADS, "PSNR", "SSIM", "samplers", "clip")]
    for row in comparison["rows"]:
        all_steps, psnr = row["ssim"] is None, row["psnr"]
        rows.append(
            (
                f"{row['full_steps']} + {row['full_motion_steps']}",
                row["way"],
                *(f"{row['named'][head]:.1f} %" for head in HEADS),
                "" if all_steps else f"{math.inf if psnr is None else psnr:.2f} dB",
                "" if all_steps else f"{row['ssim']:.3f}",
                *(f"{row[name]:.3f} s" for name in ("sampler_seconds", "seconds")),
            )
        )
    title = "{model}: {clips} clips, {sampler}, {steps} + {motion_steps} steps"
    return [title.format(**comparison), "", *table(rows)]
