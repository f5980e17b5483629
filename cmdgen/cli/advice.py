"""What to ask for where memory ran out."""

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cmdgen.config import ModelConfig, SampleConfig
    from cmdgen.pipeline import TextToVideo


def advise(pipeline: "TextToVideo", config: "SampleConfig", batch: int) -> str:
    """What to ask for where memory ran out, for `within_memory`."""
    from cmdgen.evaluation.estimate import estimate_activations, find_fitting
    from cmdgen.evaluation.memory import measure_memory

    if "parts" not in vars(pipeline):
        return f"the weights of {pipeline.config.name} do not fit: try --dtype bfloat16"
    config = replace(config, seed=0, content_seed=None, motion_seed=None)
    asked = config.apply(pipeline.config)
    needed = estimate_activations(pipeline, config, batch=batch)
    free: int | None
    try:
        free = measure_memory(pipeline.device).free
    except RuntimeError:
        # of a GPU whose memory is short that cannot be told either
        free = None
    clips = f"{batch} clips of " if batch > 1 else ""
    said = f"about {needed / 1e6:,.0f} MB beside the weights for {clips}{_name(asked)}"
    if free is not None:
        said += f", {free / 1e6:,.0f} MB free"
    # whatever was free, as much as this was not
    within = min(int(0.8 * needed), needed if free is None else free)
    if batch > 1 and needed / batch <= within:
        return f"{said}: ask for --batch {max(1, int(batch * within / needed))}"
    fitting = find_fitting(pipeline, config, within)
    if fitting is None:
        return f"{said}: a quarter of its frames and sides would not fit either"
    smaller = fitting.apply(pipeline.config)
    options = ["--batch 1"] if batch > 1 else []
    if (smaller.width, smaller.height) != (asked.width, asked.height):
        options.append(f"--size {smaller.width}x{smaller.height}")
    if smaller.frames != asked.frames:
        options.append(f"--frames {smaller.frames}")
    # rounded down, as it must fit
    options.append(f"--max-memory {within // 10**6}MB")
    return f"{said}: {' '.join(options)} should fit"


def _name(asked: "ModelConfig") -> str:
    what = "a still" if asked.frames == 1 else f"{asked.frames} frames"
    return f"{what} of {asked.width}x{asked.height}"
