"""`cmdgen encode|decode|reconstruct`: clips to content frame and motion latents, and back."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmdgen.cli.errors import on_the_way
from cmdgen.cli.options import (
    MACHINE,
    OWN,
    REPORTING,
    AsJson,
    Device,
    Dtype,
    Model,
    Quiet,
)
from cmdgen.cli.progress import Say
from cmdgen.cli.size import parse_memory, parse_size
from cmdgen.config import SampleConfig
from cmdgen.store.find import find_model
from cmdgen.video.formats import FORMATS, STDOUT, Encoding, choose_encoding

if TYPE_CHECKING:
    import numpy as np

    from cmdgen.latents import Latents
    from cmdgen.pipeline import TextToVideo

NO_VIDEO = ("png", "safetensors")
SMALLER = "ask for a smaller --size, fewer --frames, or work within --max-memory"

Video = Annotated[
    Path, typer.Argument(metavar="VIDEO", help="Any video; a picture counts as one that rests.")
]
Size = Annotated[
    str | None,
    typer.Option(metavar="WIDTHxHEIGHT", help="What it is cropped and resized to." + OWN),
]
Frames = Annotated[int | None, typer.Option(help="How many frames of it, from its start." + OWN)]
Fps = Annotated[int | None, typer.Option(help="Frames per second to take of it." + OWN)]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What networks may hold beside the weights, such as 4GB.  [default: what is fastest]",
        rich_help_panel=MACHINE,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace files.", rich_help_panel=REPORTING)
]


def encode(
    video: Video,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The .safetensors to write.", show_default=False),
    ],
    content: Annotated[
        Path | None, typer.Option(help="A .png of the content frame, too.", show_default=False)
    ] = None,
    model: Model = "mini",
    frames: Frames = None,
    size: Size = None,
    fps: Fps = None,
    max_memory: MaxMemory = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Take a video apart: into its content frame and its motion latents.

    The file holds both: content, scaled VAE latents of one picture, and motion, as the model's
    autoencoder makes it. Sound is left out. The file's path goes to stdout.

    Examples:
        cmdgen encode clip.mp4 -o clip.cmd.safetensors --content content.png
    """
    say = Say(quiet=quiet, as_json=as_json)
    config = _ask(frames, size, fps, max_memory)
    from cmdgen.latents import save_latents
    from cmdgen.video.write import check_output, write_still

    picture_encoding = Encoding("png")
    for path, encoding in ((output, Encoding("safetensors")), (content, picture_encoding)):
        if path is None:
            continue
        if path.suffix.lower() != f".{encoding.format}":
            raise ValueError(f"{path}: the name must end in .{encoding.format}")
        check_output(path, encoding, overwrite=overwrite)
    pipeline = _load(model, device, dtype, config)
    pipeline.plan_encoding(config)
    clip, origin = read_input(video, pipeline, config, say)
    with on_the_way(SMALLER):
        with say.progress() as show:
            latents = pipeline.encode(
                *(clip, config.apply(pipeline.config).fps),
                origin={"source": origin},
                max_memory=config.max_memory,
                on_progress=show,
            )
        save_latents(output, latents, overwrite=overwrite)
        if content is not None:
            picture = pipeline.decode_still(latents.content)
            write_still(
                *(content, picture, latents.metadata, picture_encoding), overwrite=overwrite
            )
    record = {"output": str(output)} | ({} if content is None else {"content": str(content)})
    shapes = {name: list(getattr(latents, name).shape) for name in ("content", "motion")}
    say.result(output, {**record, "tensors": shapes, "metadata": latents.metadata})


def decode(
    latents: Annotated[
        Path, typer.Argument(metavar="LATENTS", help="A .safetensors of `cmdgen encode`.")
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", help="The video to write.", show_default=False)
    ],
    model: Model = "mini",
    max_memory: MaxMemory = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Put a video together again from its content frame and its motion latents.

    The video's path goes to stdout.

    Examples:
        cmdgen decode clip.cmd.safetensors -o clip.mp4
        cmdgen decode clip.cmd.safetensors -o - | ffplay -
    """
    say = Say(quiet=quiet, as_json=as_json)
    config = _ask(None, None, None, max_memory)
    from cmdgen.latents import fit_model, read_latents
    from cmdgen.video.write import open_video

    encoding = _choose_video(output, overwrite, say)
    pipeline = _load(model, device, dtype, config)
    with on_the_way("work within --max-memory"):
        given = read_latents(latents, pipeline.config)
    note_weights(latents, given, pipeline, say)
    fitted = fit_model(pipeline.config, given.content.shape, given.motion.shape)
    size = fitted.height, fitted.width
    encoding.check(size, given.fps)
    pipeline.plan_decoding(replace(config, frames=fitted.frames, height=size[0], width=size[1]))
    with (
        on_the_way("work within --max-memory"),
        say.progress() as show,
        open_video(
            *(output, size, given.fps, given.metadata, encoding),
            overwrite=overwrite,
            pixels=encoding.pixels,
        ) as write,
    ):
        pipeline.decode(
            given,
            pixels=encoding.pixels,
            max_memory=config.max_memory,
            on_progress=show,
            on_frames=lambda _, decoded: write(decoded),
        )
    _tell(output, given.metadata, say)


def reconstruct(
    video: Video,
    output: Annotated[
        str, typer.Option("--output", "-o", help="The video to write.", show_default=False)
    ],
    side_by_side: Annotated[
        bool,
        typer.Option(
            "--side-by-side", help="Beside it the input, on the left, and the content frame."
        ),
    ] = False,
    model: Model = "mini",
    frames: Frames = None,
    size: Size = None,
    fps: Fps = None,
    max_memory: MaxMemory = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Take a video apart and put it together again: what a content frame and motion can hold.

    PSNR and SSIM, of the result beside the input as the model saw it, go to stderr, with --json to
    stdout; the video's path goes to stdout.

    Examples:
        cmdgen reconstruct clip.mp4 -o seen.mp4 --side-by-side
        cmdgen reconstruct clip.mp4 -o seen.mp4 --json | jq .metadata.psnr
    """
    say = Say(quiet=quiet, as_json=as_json)
    config = _ask(frames, size, fps, max_memory)
    from cmdgen.video.write import open_video

    encoding = _choose_video(output, overwrite, say)
    pipeline = _load(model, device, dtype, config)
    for plan in (pipeline.plan_encoding, pipeline.plan_decoding):
        plan(config)
    asked = config.apply(pipeline.config)
    encoding.check((asked.height, asked.width * (3 if side_by_side else 1)), asked.fps)
    clip, origin = read_input(video, pipeline, config, say)
    import numpy as np

    from cmdgen.evaluation.metrics import compare_frames

    with on_the_way(SMALLER):
        budget = config.max_memory
        with say.progress() as show:
            latents = pipeline.encode(
                *(clip, asked.fps),
                origin={"source": origin},
                max_memory=budget,
                on_progress=show,
            )
            result = pipeline.decode(latents, max_memory=budget, on_progress=show)
        likeness = compare_frames(result.frames, clip)
        shown = result.frames
        if side_by_side:
            held = np.broadcast_to(result.content, clip.shape)
            shown = np.concatenate((clip, held, shown), axis=2)
        metadata = {
            **result.metadata,
            "psnr": round(likeness.psnr, 2) if math.isfinite(likeness.psnr) else None,
            "ssim": round(likeness.ssim, 4),
        }
        if side_by_side:
            metadata["side_by_side"] = True
        size_shown = shown.shape[1], shown.shape[2]
        with open_video(
            *(output, size_shown, result.fps, metadata, encoding), overwrite=overwrite
        ) as write:
            write(shown)
    say.note(f"PSNR {likeness.psnr:.2f} dB, SSIM {likeness.ssim:.4f}")
    _tell(output, metadata, say)


def _choose_video(output: str, overwrite: bool, say: Say) -> Encoding:
    from cmdgen.video.write import check_output

    if output == STDOUT and say.as_json:
        raise ValueError("--json and -o - both need stdout: leave one of them")
    encoding = choose_encoding(output)
    if encoding.format in NO_VIDEO:
        videos = ", ".join(name for name in FORMATS if name not in NO_VIDEO)
        raise ValueError(f"{output}: {encoding.format} is no video, one of {videos} is")
    check_output(output, encoding, overwrite=overwrite)
    return encoding


def _tell(output: str, metadata: Mapping[str, Any], say: Say) -> None:
    # where the video itself went, nothing else goes
    if output != STDOUT:
        say.result(output, {"output": output, "metadata": metadata})


def read_input(
    video: Path, pipeline: "TextToVideo", config: SampleConfig, say: Say
) -> tuple["np.ndarray", dict[str, str]]:
    """A file -> uint8 (T, H, W, 3), of the size, length and rate asked for, and where it is from.

    What was done to it is noted.
    """
    from cmdgen.latents import describe_origin
    from cmdgen.video.read import read_clip

    asked = config.apply(pipeline.config)
    with on_the_way("ask for a smaller --size or fewer --frames"):
        clip, source = read_clip(
            video, frames=asked.frames, size=(asked.height, asked.width), fps=asked.fps
        )
        done = []
        if asked.frames > 1 and source.fps is None:
            done.append(f"{asked.frames} frames at {asked.fps} fps")
        elif asked.frames > 1:
            done.append(f"its first {asked.frames / asked.fps:.3g} s at {asked.fps} fps")
        if (source.width, source.height) != (asked.width, asked.height):
            done.append(f"cropped and resized to {asked.width}x{asked.height}")
        if source.held:
            done.append(f"the last frame held for {source.held} more")
        say.note(f"{video}, {source}: {', '.join(done) or 'as it is'}")
        return clip, describe_origin(video)


def note_weights(path: Path, latents: "Latents", pipeline: "TextToVideo", say: Say) -> None:
    """Notes where latents are of other weights than those that they are to be used with."""
    about = latents.metadata
    if about.get("weights", pipeline.weights_hash) != pipeline.weights_hash:
        say.note(f"note: {path} was made with other weights, of {short(about.get('model'))}")


def _load(model: str, device: str, dtype: str, config: SampleConfig) -> "TextToVideo":
    """A model that can make, and take apart, clips of the size and length asked for."""
    from cmdgen.latents import fit_model, latent_shapes
    from cmdgen.pipeline import TextToVideo

    pipeline = TextToVideo.load(find_model(model), device=device, dtype=dtype)
    asked = config.apply(pipeline.config)
    fit_model(asked, *latent_shapes(asked))
    return pipeline


def _ask(
    frames: int | None, size: str | None, fps: int | None, max_memory: str | None
) -> SampleConfig:
    height, width = (None, None) if size is None else parse_size(size)
    return SampleConfig(
        frames=frames,
        height=height,
        width=width,
        fps=fps,
        max_memory=None if max_memory is None else parse_memory(max_memory),
    )
