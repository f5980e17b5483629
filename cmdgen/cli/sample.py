"""`cmdgen sample`: a prompt to an mp4, or to a still."""

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from cmdgen.cli.errors import Failure, describe
from cmdgen.cli.models import find_model
from cmdgen.cli.progress import show_progress
from cmdgen.cli.size import parse_size
from cmdgen.config import SAMPLERS, SampleConfig

OWN = "  [default: the model's own]"


def sample(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the video shows.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The mp4 to write; a .png gets a still.", show_default=False
        ),
    ],
    model: Annotated[
        str, typer.Option(help="A packaged model's name, a folder, or OWNER/NAME that was pulled.")
    ] = "mini",
    seed: Annotated[
        int | None, typer.Option(help="Same seed, same frames.  [default: a random one]")
    ] = None,
    content_seed: Annotated[
        int | None, typer.Option(help="Seed of what is seen alone.  [default: --seed]")
    ] = None,
    motion_seed: Annotated[
        int | None, typer.Option(help="Seed of how it moves alone.  [default: --seed]")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps for the content frame." + OWN)] = None,
    motion_steps: Annotated[int | None, typer.Option(help="Steps for the motion." + OWN)] = None,
    sampler: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(SAMPLERS)}." + OWN)
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="How strictly content follows the prompt; 1 is off." + OWN)
    ] = None,
    motion_guidance: Annotated[
        float | None, typer.Option(help="How strictly motion follows the prompt; 1 is off." + OWN)
    ] = None,
    negative: Annotated[
        str, typer.Option(help="What guidance leads away from.", show_default=False)
    ] = SampleConfig.negative,
    frames: Annotated[
        int | None, typer.Option(help="Length of the video; 1 is the content frame alone." + OWN)
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Size of the video." + OWN)
    ] = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the file." + OWN)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (float32 on a CPU), float32, float16 or bfloat16.")
    ] = "auto",
) -> None:
    """Make a video from a text prompt.

    The path of the file goes to stdout, everything else to stderr.
    """
    for name, text in (("prompt", prompt), ("negative prompt", negative)):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"the {name} is not valid UTF-8")
    if not prompt.strip():
        raise ValueError('the prompt is empty: say what to show, such as "a corgi swimming"')
    height, width = (None, None) if size is None else parse_size(size)
    from cmdgen.video.write import STILL, check_output, write_still, write_video

    check_output(output)
    still = output.suffix.lower() == STILL
    if still and frames not in (None, 1):
        raise ValueError(f"{output} holds one frame, not {frames}: give the name of an mp4")
    config = SampleConfig(
        seed=int.from_bytes(os.urandom(4), "big") if seed is None else seed,
        content_seed=content_seed,
        motion_seed=motion_seed,
        steps=steps,
        motion_steps=motion_steps,
        sampler=sampler,
        guidance=guidance,
        motion_guidance=motion_guidance,
        negative=negative,
        frames=1 if still else frames,
        height=height,
        width=width,
        fps=fps,
    )
    from cmdgen.pipeline import TextToVideo

    pipeline = TextToVideo.load(find_model(model), device=device, dtype=dtype)
    asked, own = config.apply(pipeline.config), pipeline.config
    _say(f"seed {config.seed}")
    if (asked.width, asked.height) != (own.width, own.height):
        _say(f"note: {own.name} was trained at {own.width}x{own.height}")
    if asked.frames not in (own.frames, 1):
        _say(f"note: {own.name} was trained on {own.frames} frames")

    # what was asked is possible: what is wrong from here on is a file or the machine
    try:
        unknown = dict.fromkeys(pipeline.tokenizer.unknown_words(prompt))
        if unknown:
            _say(f"note: {own.name} has never seen: {', '.join(unknown)}")
        if not pipeline.fits(prompt):
            _say(f"note: {own.name} reads the start of this prompt only: it is too long")
        with show_progress() as show:
            clip = pipeline.sample(prompt, config, on_progress=show)
    except ValueError as error:
        raise Failure(describe(error)) from error
    except (RuntimeError, MemoryError) as error:
        if not re.search("allocate|overflow", str(error)):
            raise
        raise Failure("not enough memory: ask for a smaller --size or fewer --frames") from error
    if still:
        write_still(output, clip.content, clip.metadata)
    else:
        write_video(output, clip.frames, clip.fps, clip.metadata)
    typer.echo(output)


def _say(line: str) -> None:
    typer.echo(line, err=True)
