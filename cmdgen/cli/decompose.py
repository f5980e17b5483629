"""`cmdgen encode|decode|reconstruct`: clips to content frame and motion latents, and back."""

import math
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cmdgen.cli.command import Only
from cmdgen.cli.errors import on_the_way
from cmdgen.cli.inputs import SMALLER, note_weights, read_input, spool
from cmdgen.cli.naming import check_stdout, check_suffix
from cmdgen.cli.progress import Bars, JsonOrQuiet, Say
from cmdgen.options import option, parse_output
from cmdgen.request import Request
from cmdgen.video.formats import FORMATS, STDOUT, Encoding, choose_encoding, describe_origin

if TYPE_CHECKING:
    import numpy as np

    from cmdgen.latents import Latents
    from cmdgen.pipelines.cmd import CmdPipeline
    from cmdgen.request import Plan

LATENTS, PICTURE = Encoding("safetensors"), Encoding("png")

Video = Annotated[Path, typer.Argument(metavar="VIDEO", help="Any video, or - for stdin; a picture is a still video.")]
LatentsFile = Annotated[Path, typer.Argument(metavar="LATENTS", help="A .safetensors of `cmdgen encode`.")]
Content = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the content frame, to a .png.")]
SideBySide = Annotated[bool, typer.Option("--side-by-side", help="Show the input and the content frame on the left.")]
_MACHINE = ("model", "max_memory", "device", "dtype")
Machine = Annotated[Request, Only(_MACHINE)]
# the clip to take of a video, and the model
Taken = Annotated[Request, Only(("frames", "size", "fps", *_MACHINE))]


@dataclass(frozen=True)
class Output:
    """Where the result goes."""

    output: str = option(
        MISSING, "File to write.", flags=("--output", "-o"), metavar="FILE", complete="file", read=parse_output
    )
    overwrite: bool = option(False, "Replace existing files.")


def encode(video: Video, output: Output, request: Taken, say: JsonOrQuiet, content: Content = None) -> None:
    """Turn a video into content frame and motion latents.

    The .safetensors file holds both: content, the scaled VAE latents of one picture, and motion, as
    the model's autoencoder makes it. Sound is left out. The file's path goes to stdout.

    Examples:
        cmdgen encode clip.mp4 -o clip.cmd.safetensors --content content.png
    """
    from cmdgen.latents import save_latents
    from cmdgen.video.write import write_still

    target, overwrite = Path(output.output), output.overwrite
    check_suffix(target, LATENTS, overwrite=overwrite)
    if content is not None:
        check_suffix(content, PICTURE, overwrite=overwrite)
    pipeline, plan = _load(request)
    _, latents = _take_apart(video, pipeline, plan, say)
    with on_the_way(SMALLER):
        save_latents(target, latents, overwrite=overwrite)
        if content is not None:
            picture = pipeline.decode_still(latents.content)
            write_still(content, picture, latents.metadata, PICTURE, overwrite=overwrite)
    record = {"output": output.output} | ({} if content is None else {"content": str(content)})
    shapes = {name: list(getattr(latents, name).shape) for name in ("content", "motion")}
    say.result(target, {**record, "tensors": shapes, "metadata": latents.metadata})


def decode(latents: LatentsFile, output: Output, request: Machine, say: JsonOrQuiet) -> None:
    """Turn a content frame and motion latents into a video.

    The video's path goes to stdout.

    Examples:
        cmdgen decode clip.cmd.safetensors -o clip.mp4
        cmdgen decode clip.cmd.safetensors -o - | ffplay -
    """
    from cmdgen.latents import fit_model, read_latents
    from cmdgen.video import write

    encoding = _choose_video(output, say)
    pipeline, _ = _load(request)
    with on_the_way("work within --max-memory"):
        halves = read_latents(spool(latents), pipeline.config)
    note_weights(latents, halves, pipeline, say)
    fitted = fit_model(pipeline.config, halves.content.shape, halves.motion.shape)
    encoding.check(fitted.size, halves.fps)
    plan = pipeline.plan(replace(request, frames=fitted.frames, size=fitted.size))
    settings = halves.metadata, encoding, output.overwrite, encoding.pixels
    video = write.Output(output.output, fitted.size, halves.fps, *settings)
    with on_the_way("work within --max-memory"), say.progress() as show, write.open_video(video) as take:
        pipeline.decode(halves, plan, Bars(show, take), pixels=encoding.pixels)
    _report(output, halves.metadata, say)


def reconstruct(
    video: Video, output: Output, request: Taken, say: JsonOrQuiet, side_by_side: SideBySide = False
) -> None:
    """Encode a video, decode it and compare.

    This shows what a content frame and motion latents can hold.

    PSNR and SSIM, of the result beside the input as the model saw it, go to stderr, with --json to
    stdout; the video's path goes to stdout.

    Examples:
        cmdgen reconstruct clip.mp4 -o seen.mp4 --side-by-side
        cmdgen reconstruct clip.mp4 -o seen.mp4 --json | jq .metadata.psnr
    """
    encoding = _choose_video(output, say)
    pipeline, plan = _load(request)
    model = plan.model
    encoding.check((model.height, model.width * (3 if side_by_side else 1)), model.fps)
    clip, latents = _take_apart(video, pipeline, plan, say)
    import numpy as np

    from cmdgen.evaluation.metrics import compare_frames

    with on_the_way(SMALLER):
        with say.progress() as show:
            result = pipeline.decode(latents, plan, Bars(show))
        likeness = compare_frames(result.frames, clip)
        psnr = round(likeness.psnr, 2) if math.isfinite(likeness.psnr) else None
        metadata = {**result.metadata, "psnr": psnr, "ssim": round(likeness.ssim, 4)}
        shown = result.frames
        if side_by_side:
            content = np.broadcast_to(result.content, clip.shape)
            shown = np.concatenate((clip, content, shown), axis=2)
            metadata["side_by_side"] = True
        result = replace(result, frames=shown, metadata=metadata)
        result.save(output.output, encoding, overwrite=output.overwrite)
    say.note(f"PSNR {likeness.psnr:.2f} dB, SSIM {likeness.ssim:.4f}")
    _report(output, metadata, say)


def _choose_video(output: Output, say: Say) -> Encoding:
    from cmdgen.video.write import check_output

    check_stdout(output.output, say)
    encoding = choose_encoding(output.output)
    if not encoding.kind.video:
        videos = ", ".join(kind.name for kind in FORMATS.values() if kind.video)
        raise ValueError(f"{output.output}: {encoding.format} is no video, one of {videos} is")
    check_output(output.output, encoding, overwrite=output.overwrite)
    return encoding


def _report(output: Output, metadata: dict[str, Any], say: Say) -> None:
    # nothing else goes where the video itself goes
    if output.output != STDOUT:
        say.result(output.output, {"output": output.output, "metadata": metadata})


def _load(request: Request) -> "tuple[CmdPipeline, Plan]":
    """Return a pipeline that takes clips of the request's size and length apart, and the plan."""
    from cmdgen.latents import fit_model, latent_shapes
    from cmdgen.pipelines.cmd import CmdPipeline
    from cmdgen.pipelines.load import load_pipeline

    pipeline = load_pipeline(request.model, device=request.device, dtype=request.dtype)
    plan = pipeline.plan(request)
    fit_model(plan.model, *latent_shapes(plan.model))
    assert isinstance(pipeline, CmdPipeline)
    return pipeline, plan


def _take_apart(video: Path, pipeline: "CmdPipeline", plan: "Plan", say: Say) -> "tuple[np.ndarray, Latents]":
    """Return a video's frames as the model sees them, and their latents."""
    # raises ValueError where memory is too small, before the video is read
    pipeline.encoding_slices(plan)
    video = spool(video)
    clip = read_input(video, plan.model, say)
    with on_the_way(SMALLER), say.progress() as show:
        origin = {"source": describe_origin(video)}
        return clip, pipeline.encode(clip, plan, Bars(show), origin=origin)
