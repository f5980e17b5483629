"""What sampling will take, told from shapes and from how fast the machine multiplies and copies."""

from dataclasses import dataclass, replace

from cmdgen.acceleration.memory import Work
from cmdgen.config import SampleConfig
from cmdgen.evaluation.flops import build_parts, count_peaks
from cmdgen.evaluation.profile import Limits, count_work
from cmdgen.evaluation.suite import count_row
from cmdgen.pipeline import TextToVideo

# of a large matrix product's rate: what `mini` reaches on a CPU as a whole (`cmdgen profile`)
EFFICIENCY = 0.5


@dataclass(frozen=True)
class Estimate:
    """Of one forward of so many clips; an estimate, not a promise."""

    flops: int
    # of all weights
    weights: int
    # beside them, at the moment of most
    activations: int
    seconds: float

    @property
    def memory(self) -> int:
        """Bytes, without what Python, libraries and an allocator take."""
        return self.weights + self.activations


def estimate(
    model: TextToVideo, config: SampleConfig, limits: Limits, *, batch: int = 1
) -> Estimate:
    """What `sample_batch` will take; reads no weights.

    A stage takes the longer of its operations at EFFICIENCY of a matrix product's rate, and its
    weights at a copy's.
    """
    asked, dtype = config.apply(model.config), model.dtype
    parts = build_parts(model.config)
    for part in vars(parts).values():
        if part is not None:
            part.to(dtype)
    work = count_work(asked, parts, dtype, batch=batch)
    flops = {stage: each.flops for stage, each in work.items()}
    if model.plan_rehash(config) is not None and asked.frames > 1:
        flops |= {stage: batch * each.flops for stage, each in count_row(model, config).items()}
    speed = EFFICIENCY * limits.flops_per_second
    seconds = sum(
        max(flops[stage] / speed, each.bytes_read / limits.bytes_per_second)
        for stage, each in work.items()
    )
    return Estimate(
        flops=sum(flops.values()),
        weights=work["load"].weight_bytes,
        activations=estimate_activations(model, config, batch=batch),
        seconds=seconds,
    )


def estimate_activations(model: TextToVideo, config: SampleConfig, *, batch: int = 1) -> int:
    """Bytes beside the weights, at the moment of most; reads no weights."""
    asked, dtype = config.apply(model.config), model.dtype
    # guidance runs both branches at once
    branches = {"content": asked.guidance, "motion": asked.motion_guidance}
    peaks = [
        peak * batch * (2 if branches.get(name, 1.0) != 1 else 1)
        for name, peak in count_peaks(asked, dtype).items()
    ]
    slices = model.plan_decoding(config, batch=batch)
    return max(*peaks, Work(asked, dtype, batch).peak(slices))


def find_fitting(model: TextToVideo, config: SampleConfig, memory: int) -> SampleConfig | None:
    """One clip like what is asked for that takes at most `memory` bytes beside the weights.

    First in slices, then in fewer frames, then smaller; None where nothing of that would do.
    """
    asked, multiple = config.apply(model.config), model.config.size_multiple
    least = 1 if model.config.motion is None else model.config.motion.patch
    for part in (1, 2, 4):
        sides = {
            name: max(1, getattr(asked, name) // part // multiple) * multiple
            for name in ("height", "width")
        }
        for share in (1, 2, 4) if asked.frames > 1 else (1,):
            frames = max(1, asked.frames // share // least) * least if share > 1 else asked.frames
            smaller = replace(config, **sides, frames=frames, max_memory=memory)
            try:
                model.plan_decoding(smaller)
            except ValueError:
                # not in the smallest slices
                continue
            if estimate_activations(model, smaller) <= memory:
                return smaller
    return None
