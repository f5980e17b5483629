"""`cmdgen sample`: a prompt to an mp4, or to a still."""

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from cmdgen.cli.errors import on_the_way
from cmdgen.cli.models import find_model
from cmdgen.cli.progress import show_progress
from cmdgen.cli.size import parse_memory, parse_size
from cmdgen.config import CUTS, POLICIES, SAMPLERS, SampleConfig

OWN = "  [default: the model's own]"
# of step rehash, where nothing is said
HOW = (SampleConfig.rehash_cut, SampleConfig.rehash_protect, None)


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
    guidance_interval: Annotated[
        str | None,
        typer.Option(
            metavar="LOW-HIGH",
            help="Guide only where noise is between these shares of the schedule, such as 0.1-0.8: "
            "faster, not the same.",
            show_default=False,
        ),
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
    rehash: Annotated[
        str,
        typer.Option(
            metavar="N|off",
            help="Run N of the steps in full, and reuse features at all others: faster, not the "
            "same. Of motion, as many in proportion.",
        ),
    ] = "off",
    rehash_policy: Annotated[
        str | None,
        typer.Option(
            help=f"How those are chosen, one of {', '.join(POLICIES)}.  [default: minimax]",
        ),
    ] = None,
    rehash_threshold: Annotated[
        float | None,
        typer.Option(
            metavar="G",
            help="Run the steps in full that are less similar than G to the last one, instead of "
            "N.",
            show_default=False,
        ),
    ] = None,
    rehash_cut: Annotated[
        str, typer.Option(help=f"Where the UNet is cut, one of {', '.join(CUTS)}; earliest first.")
    ] = SampleConfig.rehash_cut,
    rehash_protect: Annotated[
        float, typer.Option(help="Share of the content frame's steps, the first, that always run.")
    ] = SampleConfig.rehash_protect,
    rehash_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Made by `cmdgen rehash calibrate`." + OWN),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="What decoding may hold beside the weights, such as 4GB: the result stays the "
            "same.  [default: what is fastest]",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (float32 on a CPU), float32, float16 or bfloat16.")
    ] = "auto",
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Put the networks through torch's compiler: minutes for the first clip of a size, "
            "less for those that follow in the same process.",
        ),
    ] = False,
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
    from cmdgen.video.write import STILL, check_output, open_video, write_still

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
        guidance_interval=None if guidance_interval is None else _parse_interval(guidance_interval),
        negative=negative,
        frames=1 if still else frames,
        height=height,
        width=width,
        fps=fps,
        rehash=_parse_rehash(rehash),
        rehash_threshold=rehash_threshold,
        rehash_policy=rehash_policy,
        rehash_cut=rehash_cut,
        rehash_protect=rehash_protect,
        rehash_file=None if rehash_file is None else str(rehash_file),
        max_memory=None if max_memory is None else parse_memory(max_memory),
    )
    how = (rehash_cut, rehash_protect, rehash_file)
    if rehash == "off" and rehash_threshold is None and how != HOW:
        raise ValueError("say how many steps run in full with --rehash N: nothing is rehashed")
    from cmdgen.pipeline import TextToVideo

    pipeline = TextToVideo.load(find_model(model), device=device, dtype=dtype, compile=compile)
    asked, own = config.apply(pipeline.config), pipeline.config
    plan = pipeline.plan_rehash(config)
    pipeline.plan_decoding(config)
    _say(f"seed {config.seed}")
    if compile:
        _say("note: the first step waits for the compiler, for minutes where all is new to it")
    if (asked.width, asked.height) != (own.width, own.height):
        _say(f"note: {own.name} was trained at {own.width}x{own.height}")
    if asked.frames not in (own.frames, 1):
        _say(f"note: {own.name} was trained on {own.frames} frames")
    if plan is not None:
        _say(f"rehash: {plan.policy}, content in full at {_list_steps(plan.content, asked.steps)}")
        if plan.motion:
            _say(f"rehash: motion in full at {_list_steps(plan.motion, asked.motion_steps)}")

    with on_the_way("--size, fewer --frames, or decoding within --max-memory"):
        unknown = dict.fromkeys(pipeline.tokenizer.unknown_words(prompt))
        if unknown:
            _say(f"note: {own.name} has never seen: {', '.join(unknown)}")
        if not pipeline.fits(prompt):
            _say(f"note: {own.name} reads the start of this prompt only: it is too long")
        with show_progress() as show:
            if still:
                clip = pipeline.sample(prompt, config, on_progress=show)
                write_still(output, clip.content, clip.metadata)
            else:
                size_asked = asked.height, asked.width
                metadata = pipeline.describe(prompt, config)
                what = size_asked, asked.fps, metadata
                with open_video(output, *what, pixels="yuv420p") as write:
                    pipeline.sample(
                        *(prompt, config),
                        pixels="yuv420p",
                        on_progress=show,
                        on_frames=lambda _, decoded: write(decoded),
                    )
    typer.echo(output)


def _parse_interval(text: str) -> tuple[float, float]:
    match = re.fullmatch(r"([01](?:\.\d{1,6})?)-([01](?:\.\d{1,6})?)", text)
    if match is None:
        raise ValueError(f"guidance interval {text!r} is not LOW-HIGH, such as 0.1-0.8")
    return float(match[1]), float(match[2])


def _parse_rehash(text: str) -> int | None:
    if text == "off":
        return None
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise ValueError(f"rehash {text!r} is neither off nor a number of steps, such as 13")
    return int(text)


def _list_steps(steps: tuple[int, ...], total: int) -> str:
    return f"{len(steps)} of {total} steps: {' '.join(map(str, steps))}"


def _say(line: str) -> None:
    typer.echo(line, err=True)
