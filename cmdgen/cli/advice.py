"""Advice where memory ran out."""

from contextlib import suppress

from cmdgen.options import write_size
from cmdgen.pipelines.base import Pipeline
from cmdgen.pipelines.still import StillPipeline
from cmdgen.request import Request


def advise(pipeline: Pipeline, request: Request, batch: int) -> str:
    """Return what would fit instead, for `within_memory`."""
    from cmdgen.evaluation.estimate import estimate_activations, find_fitting
    from cmdgen.evaluation.memory import measure_memory

    if not pipeline.loaded:
        return f"the weights of {pipeline.config.name} do not fit: try --dtype bfloat16"
    if not isinstance(pipeline, StillPipeline):
        return "ask for a smaller --size or --batch, or fewer --frames"
    plan = pipeline.plan(request, batch=batch)
    needed = estimate_activations(plan, pipeline.dtype, batch=batch)
    free: int | None = None
    # of a GPU whose memory is short that cannot be told either
    with suppress(RuntimeError):
        free = measure_memory(pipeline.device).free
    model = plan.model
    length = f"{model.frames} frames" if plan.moves else "a still"
    several = f"{batch} clips of " if batch > 1 else ""
    start = f"about {needed / 1e6:,.0f} MB beside the weights for {several}{length} of {write_size(model.size)}"
    if free is not None:
        start += f", {free / 1e6:,.0f} MB free"
    # whatever was free, as much as this was not
    limit = min(int(0.8 * needed), needed if free is None else free)
    if batch > 1 and needed / batch <= limit:
        return f"{start}: ask for --batch {max(1, int(batch * limit / needed))}"
    fitting = find_fitting(pipeline, request, limit)
    if fitting is None:
        return f"{start}: a quarter of its frames and sides would not fit either"
    options = ["--batch 1"] if batch > 1 else []
    if fitting.size is not None and fitting.size != model.size:
        options.append(f"--size {write_size(fitting.size)}")
    if fitting.frames != model.frames:
        options.append(f"--frames {fitting.frames}")
    if fitting.max_memory is not None:
        # rounded down, as it must fit
        options.append(f"--max-memory {fitting.max_memory // 10**6}MB")
    return f"{start}: {' '.join(options)} should fit"
