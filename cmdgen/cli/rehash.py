"""`cmdgen rehash`: what step rehash goes by, measured, and what it is worth."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cmdgen.cli.errors import on_the_way
from cmdgen.cli.help import Command, Group
from cmdgen.cli.options import (
    OWN,
    AsJson,
    Cut,
    Device,
    Dtype,
    Model,
    Protect,
    Quiet,
    Sampler,
)
from cmdgen.cli.progress import Say
from cmdgen.config import CALIBRATION, SampleConfig
from cmdgen.store.find import find_model
from cmdgen.world.config import MINI_WORLD

app = typer.Typer(
    cls=Group, no_args_is_help=True, help="Calibrate step rehash, and compare it with fewer steps."
)

# captions of the rendered world, where no others are given
CAPTIONS = 6


@app.command(cls=Command)
def calibrate(
    model: Model = "mini",
    steps: Annotated[int | None, typer.Option(help="Steps for the content frame." + OWN)] = None,
    motion_steps: Annotated[
        int | None, typer.Option(help="Steps for the motion.  [default: --steps]")
    ] = None,
    sampler: Sampler = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"A prompt a line.  [default: {CAPTIONS} captions of the rendered world]",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file.  [default: rehash.json of the model]"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the similarities as a PNG, too.")
    ] = None,
    cut: Cut = SampleConfig.rehash_cut,
    protect: Protect = SampleConfig.rehash_protect,
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Size of the video." + OWN)
    ] = None,
    batch: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> None:
    """Measure which steps can reuse the features of others.

    Runs all steps, then each network about (K - P)^3 / 6 times for each prompt, where P of the K
    steps are protected: what skipping each stretch of steps does to the result. A file that is
    there keeps what it knows of other samplers, steps and cuts. Its path goes to stdout.

    Examples:
        cmdgen rehash calibrate --model DIR --steps 25 --plot map.png
        cmdgen rehash calibrate --model mini -o rehash.json --prompts prompts.txt
    """
    from cmdgen.acceleration.calibration import (
        MOST_STEPS,
        read_calibrations,
        write_calibrations,
    )
    from cmdgen.acceleration.chart import draw_similarity
    from cmdgen.cli.size import parse_size
    from cmdgen.pipeline import TextToVideo

    if batch < 1:
        raise ValueError(f"batch {batch} is not at least 1")
    height, width = (None, None) if size is None else parse_size(size)
    asked = SampleConfig(
        steps=steps,
        motion_steps=steps if motion_steps is None else motion_steps,
        sampler=sampler,
        height=height,
        width=width,
        rehash_cut=cut,
        rehash_protect=protect,
    )
    texts = _read_prompts(prompts)
    pipeline = TextToVideo.load(find_model(model), device=device, dtype=dtype)
    target = pipeline.folder / CALIBRATION if output is None else output
    for path in (target, *([] if plot is None else [plot])):
        _check_writable(path)
    name = pipeline.config.name
    if target.exists():
        # minutes later it would be too late to say that it is something else
        read_calibrations(target, name)
    own = asked.apply(pipeline.config)
    for part, count in (("content", own.steps), ("motion", own.motion_steps)):
        if not 2 <= count <= MOST_STEPS:
            raise ValueError(f"{part} in {count} steps: between 2 and {MOST_STEPS} are searched")
    with on_the_way("ask for a smaller --batch or --size"), Say(quiet=quiet).progress() as show:
        measured = pipeline.calibrate(texts, asked, batch=batch, on_progress=show)
    write_calibrations(target, name, measured)
    if plot is not None:
        draw_similarity(plot, measured, name)
    typer.echo(target)


@app.command(cls=Command)
def compare(
    model: Model = "mini",
    full: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Full steps, may be repeated.  [default: 13, 9]"),
    ] = None,
    clips: Annotated[int, typer.Option(help="Clips, made in each way.")] = 128,
    batch: Annotated[int, typer.Option(help="Clips at a time.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the first clip; the next ones count up.")] = 0,
    cut: Cut = SampleConfig.rehash_cut,
    protect: Protect = SampleConfig.rehash_protect,
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare step rehash, by each policy, with fewer steps at the same number of full steps.

    What the packaged probe names in clips of held-out captions, how close the frames are to those
    of all steps from the same seed, and seconds. The table goes to stdout.

    Examples:
        cmdgen rehash compare --clips 32 --full 13
    """
    from cmdgen.evaluation.probe import PACKAGED, Probe
    from cmdgen.evaluation.rehash import ComparisonConfig, compare_rehash
    from cmdgen.pipeline import TextToVideo
    from cmdgen.world.world import World

    config = ComparisonConfig(
        tuple(full or ComparisonConfig.budgets), clips, batch, seed, cut, protect
    )
    pipeline = TextToVideo.load(find_model(model), device=device)
    probe = Probe.from_pretrained(PACKAGED).to(pipeline.device)
    with on_the_way("ask for a smaller --batch"), Say(quiet=quiet).progress() as show:
        found = compare_rehash(pipeline, World(MINI_WORLD), probe, config, on_progress=show)
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.to_markdown())


def _read_prompts(path: Path | None) -> list[str]:
    if path is None:
        from cmdgen.world.world import World

        world = World(MINI_WORLD)
        return world.captions(world.indices("train", CAPTIONS))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: no prompt in it")
    return prompts


def _check_writable(path: Path) -> None:
    import os

    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"{path}: not the name of a file in a folder that can be written to")
