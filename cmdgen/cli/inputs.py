"""Videos, latents and pictures that commands read: halves of clips that need not be sampled."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from cmdgen.cli.errors import Failure, describe, on_the_way
from cmdgen.cli.progress import Say
from cmdgen.config import ModelConfig
from cmdgen.request import INPUT_FIELDS, Request, resolve

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from cmdgen.latents import Latents
    from cmdgen.pipelines.base import Inputs
    from cmdgen.pipelines.still import StillPipeline

CONTENT, MOTION, IMAGE = INPUT_FIELDS
SMALLER = "ask for a smaller --size, fewer --frames, or work within --max-memory"


class InputFiles:
    """The files of --content-from, --motion-from and --image.

    The first two are videos, or latents that `cmdgen encode` wrote; the last one is a picture, to
    be the content frame. Raises FileNotFoundError for a missing file.
    """

    def __init__(self, request: Request) -> None:
        named = {name: getattr(request, name) for name in INPUT_FIELDS}
        self.paths: dict[str, Path] = {name: path for name, path in named.items() if path}
        if CONTENT in self.paths and IMAGE in self.paths:
            raise ValueError("--content-from and --image both give the content frame: give one")
        for half, seed in (("content", request.content_seed), ("motion", request.motion_seed)):
            if seed is not None and self.holds(half):
                options = "--motion-from" if half == "motion" else "--content-from or --image"
                raise ValueError(f"--{half}-seed has no effect with {options}: leave it out")
        self.origin: dict[str, dict[str, str]] = {}
        if self.paths:
            from cmdgen.latents import describe_origin

            self.origin = {name: describe_origin(path) for name, path in self.paths.items()}
        # inputs by size, length and rate
        self._read: dict[tuple[int, ...], Inputs] = {}

    def holds(self, half: str) -> bool:
        """Return whether "content" or "motion" is given."""
        return MOTION in self.paths if half == "motion" else bool({CONTENT, IMAGE} & {*self.paths})

    def check_like(self, recorded: Mapping[str, Any], like: Path, say: Say) -> None:
        """Raise ValueError where the clip to repeat had inputs that are missing now.

        Notes inputs of other contents.
        """
        for name, origin in recorded.items():
            if not isinstance(origin, dict):
                continue
            flag, file = f"--{name.replace('_', '-')}", short(origin.get("file"))
            if name in self.paths:
                if origin.get("sha256") != self.origin[name]["sha256"]:
                    say.note(f"note: {like} was made with {flag} of other contents, {file}")
            elif not self.holds("motion" if name == MOTION else "content"):
                raise ValueError(f"{like} was made with {flag} {file}: give that file, too")

    def fit(self, request: Request, model: ModelConfig) -> Request:
        """Return the request with the size and length of latents, where it has none.

        Reads no tensors. Raises ValueError where it has others, Failure where latents do not fit
        the model.
        """
        if not self.paths:
            return request
        from cmdgen.latents import check_fit, fit_model, latent_shapes, read_header

        # raises ValueError for a model of stills
        latent_shapes(model)
        headers = {}
        for name in (CONTENT, MOTION):
            if name not in self.paths or not _holds_latents(self.paths[name]):
                continue
            try:
                headers[name] = read_header(self.paths[name])
                own = fit_model(model, headers[name].content, headers[name].motion)
            except ValueError as error:
                raise Failure(describe(error)) from error
            if request.size is None:
                request = replace(request, size=(own.height, own.width))
            if request.frames is None and name == MOTION:
                request = replace(request, frames=own.frames)
        fitted = resolve(request, model).model
        if CONTENT in headers:
            check_fit(fitted, headers[CONTENT].content, None)
        if MOTION in headers:
            check_fit(fitted, None, headers[MOTION].motion)
        if MOTION in self.paths and fitted.frames == 1:
            raise ValueError("--motion-from has nothing to move: a still has one frame")
        return request

    def read(self, pipeline: "StillPipeline", request: Request, say: Say) -> "Inputs | None":
        """Return what `Pipeline.run` takes as inputs, at the request's size; None without files.

        What is done to videos and pictures is noted.
        """
        if not self.paths:
            return None
        model = resolve(request, pipeline.config).model
        key = model.height, model.width, model.frames, model.fps
        if key not in self._read:
            self._read[key] = self._read_files(pipeline, request, say)
        return self._read[key]

    def _read_files(self, pipeline: "StillPipeline", request: Request, say: Say) -> "Inputs":
        from cmdgen.pipelines.base import Inputs

        content: Tensor | None = None
        if IMAGE in self.paths:
            still = replace(request, frames=1)
            picture, _ = read_input(self.paths[IMAGE], pipeline, still, say)
            with on_the_way("ask for a smaller --size"):
                content = pipeline.encode_still(picture[0])
        # one file may give both halves
        paths = {path for name, path in self.paths.items() if name != IMAGE}
        latents = {path: _read_latents(path, pipeline, request, say) for path in paths}
        if CONTENT in self.paths:
            content = latents[self.paths[CONTENT]].content
        motion = latents[self.paths[MOTION]].motion if MOTION in self.paths else None
        return Inputs(content, motion, self.origin)


def _holds_latents(path: Path) -> bool:
    from cmdgen.latents import SUFFIX

    return path.suffix.lower() == SUFFIX


def _read_latents(path: Path, pipeline: "StillPipeline", request: Request, say: Say) -> "Latents":
    from cmdgen.latents import read_latents
    from cmdgen.pipelines.cmd import CmdPipeline

    if _holds_latents(path):
        with on_the_way(SMALLER):
            latents = read_latents(path, pipeline.config)
        note_weights(path, latents, pipeline, say)
        return latents
    if request.frames == 1:
        # a still is made of a whole clip's content frame
        request = replace(request, frames=None)
    clip, _ = read_input(path, pipeline, request, say)
    assert isinstance(pipeline, CmdPipeline)
    with on_the_way(SMALLER):
        return pipeline.encode(clip, resolve(request, pipeline.config))


def read_input(
    video: Path, pipeline: "StillPipeline", request: Request, say: Say
) -> tuple["np.ndarray", dict[str, str]]:
    """A file -> uint8 (T, H, W, 3) of the request's size, length and rate, and its origin.

    What is done to it is noted.
    """
    from cmdgen.latents import describe_origin
    from cmdgen.video.read import read_clip

    model = resolve(request, pipeline.config).model
    with on_the_way("ask for a smaller --size or fewer --frames"):
        clip, source = read_clip(
            video, frames=model.frames, size=(model.height, model.width), fps=model.fps
        )
        changes = []
        if model.frames > 1 and source.fps is None:
            changes.append(f"{model.frames} frames at {model.fps} fps")
        elif model.frames > 1:
            changes.append(f"its first {model.frames / model.fps:.3g} s at {model.fps} fps")
        if (source.width, source.height) != (model.width, model.height):
            changes.append(f"cropped and resized to {model.width}x{model.height}")
        if source.held:
            changes.append(f"the last frame held for {source.held} more")
        say.note(f"{video}, {source}: {', '.join(changes) or 'unchanged'}")
        return clip, describe_origin(video)


def note_weights(path: Path, latents: "Latents", pipeline: "StillPipeline", say: Say) -> None:
    """Note latents of other weights than those that they are used with."""
    about = latents.metadata
    if about.get("weights", pipeline.weights_hash) != pipeline.weights_hash:
        say.note(f"note: {path} was made with other weights, of {short(about.get('model'))}")
