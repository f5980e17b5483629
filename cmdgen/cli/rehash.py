"""`cmdgen rehash`: calibrate step rehash, and measure what it is worth."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cmdgen.cli.command import Only, expand
from cmdgen.cli.errors import on_the_way, within_memory
from cmdgen.cli.help import Command, Group
from cmdgen.cli.progress import JsonOrQuiet, Quiet
from cmdgen.config import CALIBRATION
from cmdgen.evaluation.settings import Calibrating, Comparing, check_writable
from cmdgen.files import read_text
from cmdgen.request import Request, check_cut
from cmdgen.world.config import MINI_WORLD

app = typer.Typer(cls=Group, no_args_is_help=True, help="Calibrate step rehash; compare it with fewer steps.")

# captions of the rendered world, where no others are given
CAPTIONS = 6
_SAMPLING = ("steps", "motion_steps", "sampler", "size", "frames", "rehash_cut")


@app.command(cls=Command)
@expand
def calibrate(
    options: Calibrating, request: Annotated[Request, Only((*_SAMPLING, "model", "device", "dtype"))], say: Quiet
) -> None:
    """Measure which steps can reuse the features of others.

    Runs all steps, then each network about (K - P)^3 / 6 times for each prompt, where P of the K
    steps are protected: what skipping each stretch of steps does to the result. With --steps alone,
    the motion model takes as many. An existing file keeps the calibrations of other samplers and
    numbers of steps. The file's path goes to stdout.

    Examples:
      cmdgen rehash calibrate --model DIR --steps 25 --plot map.png
      cmdgen rehash calibrate --model mini -o rehash.json --prompts prompts.txt
      cmdgen rehash calibrate --model svd --policy similarity --image a.png --image b.png
    """
    from cmdgen.acceleration.calibration import MAX_STEPS, read_calibrations, write_calibrations
    from cmdgen.acceleration.chart import draw_similarity
    from cmdgen.evaluation import rehash
    from cmdgen.pipelines.clip import Inputs
    from cmdgen.pipelines.load import load_pipeline
    from cmdgen.video.read import read_video

    pipeline = load_pipeline(request.model, device=request.device, dtype=request.dtype)
    name, target = pipeline.config.name, options.output or pipeline.folder / CALIBRATION
    check_writable(target)
    if target.exists():
        # an error now, not minutes later
        read_calibrations(target, name)
    pictures = [Inputs(image=read_video(Path(path), max_frames=1)[0][0]) for path in options.image]
    if pipeline.config.vision is None and pictures:
        raise ValueError(f"image has no effect with {name}: it animates no picture")
    if pipeline.config.vision is not None and not pictures:
        raise ValueError(f"{name} animates a picture: give one or more with --image")
    prompts = [""] * len(pictures) or _read_prompts(options.prompts)
    if pipeline.config.motion is not None:
        request = replace(request, motion_steps=request.motion_steps or request.steps)
    # of no step that runs, but of where its feature is taken
    cut = request.rehash_cut
    check_cut(cut, pipeline.config)
    plan = replace(pipeline.plan(replace(request, rehash_cut="layer")), rehash_cut=cut)
    counts = {"content": plan.model.steps} | ({"motion": plan.model.motion_steps} if plan.samples_motion else {})
    for part, count in counts.items():
        if not 2 <= count <= MAX_STEPS:
            raise ValueError(f"{part} in {count} steps: between 2 and {MAX_STEPS} are searched")
    with on_the_way("ask for a smaller --batch or --size"), say.progress() as show:
        measured = rehash.calibrate(pipeline, plan, prompts, options, inputs=pictures, show=show)
    write_calibrations(target, name, measured)
    if options.plot is not None:
        draw_similarity(options.plot, measured, name)
    say.result(target, {"output": str(target)})


@app.command(cls=Command)
@expand
def compare(options: Comparing, request: Annotated[Request, Only(("model", "device"))], say: JsonOrQuiet) -> None:
    """Compare step rehash, by each policy, with fewer steps at the same number of full steps.

    Measures what the packaged probe names in clips of held-out captions, how close the frames are
    to those of all steps from the same seed, and seconds. The table goes to stdout.

    Examples:
      cmdgen rehash compare --clips 32 --full 13
    """
    from cmdgen.evaluation.measure import load_evaluator
    from cmdgen.evaluation.rehash import compare_rehash, list_lines

    with say.progress() as show:
        evaluator = load_evaluator(request.model, request.device, show=show)
        with within_memory("ask for a smaller --batch"):
            comparison = compare_rehash(evaluator, options)
    say.result("\n".join(list_lines(comparison)), comparison)


def _read_prompts(path: Path | None) -> list[str]:
    if path is None:
        from cmdgen.world.world import World

        world = World(MINI_WORLD)
        return world.captions(world.indices("train", CAPTIONS))
    if not path.exists():
        raise FileNotFoundError(f"{path}: No such file or directory")
    prompts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: no prompt in it")
    return prompts
