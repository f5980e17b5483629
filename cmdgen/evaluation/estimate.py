"""What making clips will take: told from shapes, and from how fast the machine multiplies."""

from dataclasses import dataclass, replace

import torch

from cmdgen.acceleration.calibration import PARTS
from cmdgen.acceleration.memory import Work
from cmdgen.evaluation.flops import count_work, list_forwards
from cmdgen.evaluation.profile import Limits
from cmdgen.pipelines.still import StillPipeline
from cmdgen.request import Plan, Request

# of a large matrix product's rate: what `mini` reaches on a CPU as a whole (`cmdgen profile`)
EFFICIENCY = 0.5


@dataclass(frozen=True)
class Estimate:
    """What a batch of clips takes; an estimate, not a promise."""

    flops: int
    # of all weights
    weights: int
    # beside those that are there, at the moment of most
    activations: int
    # of all, without what Python, libraries and an allocator take
    memory: int
    seconds: float
    # of a UNet that looks along time: the least that --max-memory can ask for
    least: int | None = None


def estimate(plan: Plan, dtype: torch.dtype, limits: Limits, *, batch: int = 1) -> Estimate:
    """Estimate what `Pipeline.run` will take; reads no weights.

    A stage takes the longer of its operations at EFFICIENCY of a matrix product's rate, and its
    bytes at a copy's.
    """
    work = count_work(plan, dtype, batch=batch)
    speed = EFFICIENCY * limits.flops_per_second
    weights, activations = work["load"].weight_bytes, estimate_activations(plan, dtype, batch=batch)
    memory, least = weights + activations, None
    if plan.model.looks_along_time:
        held = Work.of(plan, dtype, batch)
        memory, least = held.need(plan.slices), held.least
    return Estimate(
        flops=sum(stage.flops for stage in work.values()),
        weights=weights,
        activations=activations,
        memory=memory,
        least=least,
        seconds=sum(max(stage.flops / speed, stage.bytes_read / limits.bytes_per_second) for stage in work.values()),
    )


def estimate_activations(plan: Plan, dtype: torch.dtype, *, batch: int = 1) -> int:
    """Return the bytes beside the weights, at the moment of most; reads no weights."""
    model, forwards = plan.model, list_forwards(plan.model)
    if model.looks_along_time:
        return Work.of(plan, dtype, batch).peak(plan.slices)
    if "evdm" in forwards:
        # block by block, beside the frames of all
        return Work(model, dtype, batch).frames().nbytes + forwards["evdm"].peak * dtype.itemsize // 4 * batch
    # guidance runs both branches at once
    doubled = {"content": model.guidance != 1, "motion": model.motion_guidance != 1}
    peaks = [
        forwards[name].peak * dtype.itemsize // 4 * batch * (1 + doubled.get(name, False))
        for name in ("text", *PARTS)
        if name in forwards
    ]
    return max(*peaks, Work(model, dtype, batch).peak(plan.slices))


def find_fitting(pipeline: StillPipeline, request: Request, memory: int) -> Request | None:
    """Return a request for one clip like this one that takes at most `memory` bytes beside weights.

    First in slices, then in fewer frames, then smaller; None where none of these would fit.
    """
    plan = pipeline.plan(request)
    model = plan.model
    multiple, least = model.size_multiple, 1 if model.motion is None else model.motion.patch
    for part in (1, 2, 4):
        height, width = (max(1, side // part // multiple) * multiple for side in (model.height, model.width))
        for share in (1, 2, 4) if model.frames > 1 else (1,):
            frames = max(1, model.frames // share // least) * least if share > 1 else model.frames
            # of these, weights count too
            limit = memory + (Work.of(plan, pipeline.dtype).weights() if model.looks_along_time else 0)
            smaller = replace(request, size=(height, width), frames=frames, max_memory=limit)
            kept = Work(replace(model, height=height, width=width, frames=frames), pipeline.dtype).kept
            if kept > memory:
                # whatever the slices are, of which there may be many to count
                continue
            try:
                fitting = pipeline.plan(smaller)
            except ValueError:
                # not in the smallest slices
                continue
            if estimate_activations(fitting, pipeline.dtype) <= memory:
                return smaller
    return None
