"""`cmdgen sample --dry-run`: what would be made, in how much memory and time."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any

from cmdgen.cli.batch import Batch, group
from cmdgen.cli.errors import PARTIAL, Failure
from cmdgen.cli.jobs import Job, Refused
from cmdgen.evaluation.estimate import EFFICIENCY, Estimate, estimate
from cmdgen.evaluation.profile import measure_limits
from cmdgen.pipelines.device import dtype_name
from cmdgen.request import shared_settings
from cmdgen.video.formats import STDOUT

# values of a plan's model that the report has
_SETTINGS = (
    *("frames", "fps", "width", "height", "sampler", "steps", "motion_steps"),
    *("guidance", "motion_guidance"),
)


def print_forecast(jobs: Iterable[Job | Refused | None], batch: Batch) -> None:
    """Print what would become of checked jobs; Failure where some could not be made."""
    pipeline, say = batch.pipeline, batch.say
    limits = cache(partial(measure_limits, pipeline.device, pipeline.dtype))
    foresee = cache(lambda plan, batch: estimate(plan, pipeline.dtype, limits(), batch=batch))
    groups: list[Estimate] = []
    records: list[dict[str, Any]] = []
    for jobs_together in group(jobs, batch.options.batch):
        if isinstance(jobs_together, Refused):
            records.append(jobs_together.describe())
            if not jobs_together.reported:
                say.error(str(jobs_together))
        elif jobs_together[0].exists:
            records.append({**jobs_together[0].describe(), "skipped": True})
        else:
            plan = replace(shared_settings(jobs_together[0].plan), negative="")
            groups.append(foresee(plan, len(jobs_together)))
            batch.note_prompts(jobs_together)
            records += map(_describe, jobs_together)
    report: dict[str, Any] = {
        **{"model": pipeline.config.name, "folder": str(pipeline.folder)},
        **{"device": str(pipeline.device), "dtype": dtype_name(pipeline.dtype), "jobs": records},
        "flops": sum(each.flops for each in groups),
        "memory_bytes": max((each.memory for each in groups), default=0),
        "least_memory_bytes": max((each.least for each in groups if each.least is not None), default=None),
        "seconds": round(sum(each.seconds for each in groups), 1),
    }
    if any(record.get("output") == STDOUT for record in records):
        # stdout is the video's
        for line in _lines(report):
            say.note(line)
    else:
        say.result("\n".join(_lines(report)), report)
    if refused := sum("error" in record for record in records):
        raise Failure(f"{refused} of {len(records)} clips cannot be made", PARTIAL)


def _describe(job: Job) -> dict[str, Any]:
    model, key_steps = job.plan.model, job.plan.key_steps
    rehash = None if key_steps is None else asdict(key_steps)
    return {
        **job.describe(),
        "format": job.encoding.format,
        **{name: getattr(model, name) for name in _SETTINGS if job.plan.samples_motion or "motion" not in name},
        "rehash": rehash and {name: value for name, value in rehash.items() if value},
    }


def _lines(report: dict[str, Any]) -> Iterator[str]:
    for job in report["jobs"]:
        if "error" in job:
            continue
        if "skipped" in job:
            yield f"{job['output']}  exists already"
            continue
        motion = f" + {job['motion_steps']}" if "motion_steps" in job else ""
        yield (
            "{output}  seed {seed}, {frames} x {width}x{height}, {fps} frames a second, "
            f"{{steps}}{motion} steps of {{sampler}}"
        ).format(**job)
        if job["rehash"] is not None:
            parts = (job["rehash"].get(part) for part in ("content", "motion"))
            full = " + ".join(str(len(steps)) for steps in parts if steps)
            yield f"    rehash: {full} of them in full"
    if report["least_memory_bytes"] is not None:
        fits, least = (report[name] / 1e9 for name in ("memory_bytes", "least_memory_bytes"))
        yield f"fits in {fits:.2f} GB, with --max-memory in {least:.2f} GB or more, workspaces of libraries aside"
    yield (
        f"{report['model']} on {report['device']} in {report['dtype']}: about "
        f"{report['memory_bytes'] / 1e6:,.0f} MB of weights and activations, about "
        f"{report['seconds']:.1f} s ({report['flops'] / 1e12:.2f} TFLOP at {EFFICIENCY:.0%} of the "
        "speed of a matrix product here)"
    )
