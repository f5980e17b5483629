"""`cmdgen sample --dry-run`: what would be made, in how much memory and time."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cmdgen.cli.batch import Kept, Manner, group
from cmdgen.cli.errors import PARTIAL, Failure
from cmdgen.cli.jobs import Job, Refused
from cmdgen.cli.progress import Say
from cmdgen.video.formats import STDOUT

if TYPE_CHECKING:
    from cmdgen.pipeline import TextToVideo


def print_plan(
    jobs: Iterable[Job | Refused | Kept | None],
    pipeline: "TextToVideo",
    manner: Manner,
    say: Say,
) -> None:
    """What would become of jobs that were checked; Failure where some could not be made."""
    from cmdgen.evaluation.estimate import EFFICIENCY, Estimate, estimate
    from cmdgen.evaluation.profile import Limits, measure_limits

    limits: Limits | None = None
    estimates: dict[object, Estimate] = {}
    records: list[dict[str, Any]] = []
    seconds, memory, refused, flops = 0.0, 0, 0, 0
    for each in group(jobs, manner.batch):
        if isinstance(each, Refused):
            refused += 1
            records.append(each.describe())
            if not each.told:
                say.error(str(each))
        elif isinstance(each, Kept):
            records.append({**each.job.describe(), "skipped": True})
        else:
            # what takes no time of its own
            config = replace(
                each[0].config, seed=0, content_seed=None, motion_seed=None, negative=""
            )
            key = config, len(each)
            if key not in estimates:
                limits = limits or measure_limits(pipeline.device, pipeline.dtype)
                estimates[key] = estimate(pipeline, config, limits, batch=len(each))
            found = estimates[key]
            seconds, flops = seconds + found.seconds, flops + found.flops
            memory = max(memory, found.memory)
            records += [_describe(job, pipeline) for job in each]
    report: dict[str, Any] = {
        **{"model": pipeline.config.name, "folder": str(pipeline.folder)},
        **{"device": str(pipeline.device), "dtype": str(pipeline.dtype).removeprefix("torch.")},
        **{"jobs": records, "flops": flops, "memory_bytes": memory, "seconds": round(seconds, 1)},
    }
    if any(record.get("output") == STDOUT for record in records):
        # where the video would be
        for line in _lines(report, EFFICIENCY):
            say.note(line)
    else:
        say.result("\n".join(_lines(report, EFFICIENCY)), report)
    if refused:
        raise Failure(f"{refused} of {len(records)} clips cannot be made", PARTIAL)


def _describe(job: Job, pipeline: "TextToVideo") -> dict[str, Any]:
    asked = job.config.apply(pipeline.config)
    plan = pipeline.plan_rehash(job.config)
    return {
        **job.describe(),
        **{"format": job.encoding.format, "frames": asked.frames, "fps": asked.fps},
        **{"width": asked.width, "height": asked.height, "sampler": asked.sampler},
        **{"steps": asked.steps, "motion_steps": asked.motion_steps},
        **{"guidance": asked.guidance, "motion_guidance": asked.motion_guidance},
        "rehash": None if plan is None else plan.to_dict(),
    }


def _lines(report: dict[str, Any], efficiency: float) -> Iterator[str]:
    for job in report["jobs"]:
        if "error" in job:
            continue
        if "skipped" in job:
            yield f"{job['output']}  is there already"
            continue
        size = f"{job['frames']} x {job['width']}x{job['height']}, {job['fps']} frames a second"
        steps = (
            str(job["steps"]) if job["frames"] == 1 else f"{job['steps']} + {job['motion_steps']}"
        )
        yield f"{job['output']}  seed {job['seed']}, {size}, {steps} steps of {job['sampler']}"
        if job["rehash"] is not None:
            full = " + ".join(
                str(len(job["rehash"][part]))
                for part in ("content", "motion")
                if part in job["rehash"]
            )
            yield f"{'':4}rehash: {full} of them in full"
    yield (
        f"{report['model']} on {report['device']} in {report['dtype']}: about "
        f"{report['memory_bytes'] / 1e6:,.0f} MB of weights and activations, about "
        f"{report['seconds']:.1f} s for {report['flops'] / 1e12:.2f} * 10^12 operations at "
        f"{efficiency:.0%} of the rate that a matrix product has here now"
    )
