"""Videos, latents and pictures that commands read: parts of clips that need not be sampled."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from cmdgen.cli.errors import COPIES, on_the_way
from cmdgen.cli.progress import Say
from cmdgen.config import ModelConfig
from cmdgen.metadata import INPUT_FIELDS
from cmdgen.options import write_size
from cmdgen.request import Plan, Request, resolve
from cmdgen.video.formats import describe_origin

if TYPE_CHECKING:
    import numpy as np

    from cmdgen.latents import Latents
    from cmdgen.pipelines.clip import Inputs
    from cmdgen.pipelines.still import StillPipeline
    from cmdgen.video.read import Source

CONTENT, MOTION, IMAGE = INPUT_FIELDS
# what each gives
_PARTS = {CONTENT: "content", MOTION: "motion", IMAGE: "content"}
_FLAGS = {"content": "--content-from or --image", "motion": "--motion-from"}
# suffix of files of latents
LATENTS = ".safetensors"
STDIN = "-"
# bytes of a video that comes through a pipe
MOST_PIPED = 2**32
SMALLER = "ask for a smaller --size, fewer --frames, or work within --max-memory"
# sizes that inputs are kept at: a batch may come from a pipe that never ends
_MAX_SIZES = 8


def spool(path: Path) -> Path:
    """Return a file that can be read twice: of a pipe, and of stdin for -, a temporary copy.

    Raises ValueError for more bytes than MOST_PIPED.
    """
    stdin = str(path) == STDIN
    if not (stdin or path.is_fifo()):
        return path
    if stdin and os.isatty(0):
        raise ValueError("- is stdin, which is a terminal: pipe a file in, or give its name")
    folder = Path(tempfile.mkdtemp(prefix=COPIES))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy, size = folder / path.name, 0
    with open(0 if stdin else path, "rb", closefd=not stdin) as source, copy.open("wb") as target:
        while part := source.read(2**20):
            size += target.write(part)
            if size > MOST_PIPED:
                raise ValueError(f"{path} goes on for more than {MOST_PIPED} bytes")
    return copy


class InputFiles:
    """The files of --content-from, --motion-from and --image.

    The first two are videos, or latents that `cmdgen encode` wrote; the last one is a picture, to
    be the content frame; - is stdin. Raises FileNotFoundError for a missing file.
    """

    def __init__(self, request: Request) -> None:
        given = {name: path for name in INPUT_FIELDS if (path := getattr(request, name))}
        copies = {path: spool(path) for path in set(given.values())}
        self.paths: dict[str, Path] = {name: copies[path] for name, path in given.items()}
        self.parts = {_PARTS[name] for name in self.paths}
        if CONTENT in self.paths and IMAGE in self.paths:
            raise ValueError("--content-from and --image both give the content frame: give one")
        for part, flags in _FLAGS.items():
            if getattr(request, f"{part}_seed") is not None and part in self.parts:
                raise ValueError(f"--{part}-seed has no effect with {flags}: leave it out")
        self.origin = {name: describe_origin(path) for name, path in self.paths.items()}
        # by size, length and rate
        self._inputs: dict[tuple[object, ...], Inputs] = {}

    def check(self) -> None:
        """Raise Failure for a file whose first frame cannot be read."""
        from cmdgen.video.read import read_video

        for path in self.paths.values():
            if path.suffix.lower() != LATENTS:
                with on_the_way(SMALLER):
                    read_video(path, max_frames=1)

    def check_like(self, recorded: Mapping[str, Any], like: Path, say: Say) -> None:
        """Compare with the metadata of the clip to make again; note inputs of other contents.

        Raises ValueError where that clip had inputs that are missing now.
        """
        for name in INPUT_FIELDS:
            origin, flag = recorded.get(name), f"--{name.replace('_', '-')}"
            if not isinstance(origin, dict):
                continue
            made, file = f"{like} was made with {flag}", short(origin.get("file"))
            if name in self.paths:
                if origin.get("sha256") != self.origin[name]["sha256"]:
                    say.note(f"note: {made} of other contents, {file}")
            elif _PARTS[name] not in self.parts:
                raise ValueError(f"{made} {file}: give that file, too")

    def fit(self, request: Request, model: ModelConfig) -> Request:
        """Return the request with the size and length of latents, where it has none.

        Reads no tensors. Raises ValueError where it has others, Failure where latents do not fit
        the model.
        """
        if model.vision is not None and IMAGE not in self.paths:
            raise ValueError(f"{model.name} animates a picture: give one with --image")
        if not self.paths or model.looks_along_time:
            return request
        from cmdgen.latents import check_fit, fit_model, latent_shapes, read_header

        # raises ValueError for a model of stills
        latent_shapes(model)
        shapes: dict[str, tuple[int, ...] | None] = {CONTENT: None, MOTION: None}
        for name in shapes:
            if name not in self.paths or self.paths[name].suffix.lower() != LATENTS:
                continue
            with on_the_way(SMALLER):
                header = read_header(self.paths[name])
                recorded = fit_model(model, header.content, header.motion)
            shapes[name] = header.content if name == CONTENT else header.motion
            if request.size is None:
                request = replace(request, size=recorded.size)
            if request.frames is None and name == MOTION:
                request = replace(request, frames=recorded.frames)
        model = resolve(request, model).model
        check_fit(model, shapes[CONTENT], shapes[MOTION])
        if MOTION in self.paths and model.frames == 1:
            raise ValueError("--motion-from has nothing to move: a still has one frame")
        return request

    def count(self, plan: Plan) -> int:
        """Return the length of the clip, of which no file is a part."""
        return plan.model.frames

    def read(self, pipeline: "StillPipeline", plan: Plan, say: Say) -> "Inputs | None":
        """Return what `Pipeline.run` takes as inputs, at the plan's size; None without files.

        What is done to videos and pictures is noted.
        """
        if not self.paths:
            return None
        model = plan.model
        key = model.size, model.frames, model.fps
        if key not in self._inputs:
            if len(self._inputs) >= _MAX_SIZES:
                self._inputs.clear()
            self._inputs[key] = self._read_files(pipeline, plan, say)
        return self._inputs[key]

    def _read_files(self, pipeline: "StillPipeline", plan: Plan, say: Say) -> "Inputs":
        from cmdgen.pipelines.clip import Inputs

        if plan.model.vision is not None:
            return Inputs(origin=self.origin, image=_read_picture(self.paths[IMAGE], plan.model, say))
        content = motion = None
        if IMAGE in self.paths:
            picture = read_input(self.paths[IMAGE], replace(plan.model, frames=1), say)
            with on_the_way("ask for a smaller --size"):
                content = pipeline.encode_still(picture[0])
        # one file may give both parts
        paths = {path for name, path in self.paths.items() if name != IMAGE}
        latents = {path: _read_latents(path, pipeline, plan, say) for path in paths}
        if CONTENT in self.paths:
            content = latents[self.paths[CONTENT]].content
        if MOTION in self.paths:
            motion = latents[self.paths[MOTION]].motion
        return Inputs(content, motion, origin=self.origin)


def _read_picture(path: Path, model: ModelConfig, say: Say) -> "np.ndarray":
    """A file -> uint8 (H, W, 3), of the size that it has: the model sees it as a whole, too."""
    from cmdgen.video.read import read_video

    with on_the_way("ask for a smaller picture"):
        picture = read_video(path, max_frames=1)[0][0]
    size = picture.shape[:2]
    change = "unchanged" if size == model.size else f"cropped and resized to {write_size(model.size)}"
    say.note(f"{path}, {write_size(size)}: {change}")
    return picture


def _read_latents(path: Path, pipeline: "StillPipeline", plan: Plan, say: Say) -> "Latents":
    from cmdgen.latents import read_latents
    from cmdgen.pipelines.cmd import CmdPipeline

    if path.suffix.lower() == LATENTS:
        with on_the_way(SMALLER):
            latents = read_latents(path, pipeline.config)
        note_weights(path, latents, pipeline, say)
        return latents
    if not plan.moves:
        # a still is made of a whole clip's content frame
        plan = replace(plan, model=replace(plan.model, frames=pipeline.config.frames))
    clip = read_input(path, plan.model, say)
    assert isinstance(pipeline, CmdPipeline)
    with on_the_way(SMALLER):
        return pipeline.encode(clip, plan)


def read_input(video: Path, model: ModelConfig, say: Say) -> "np.ndarray":
    """A file -> uint8 (T, H, W, 3) of the model's size, length and rate.

    What is done to it is noted.
    """
    from cmdgen.video.read import read_clip

    with on_the_way("ask for a smaller --size or fewer --frames"):
        clip, source = read_clip(video, frames=model.frames, size=model.size, fps=model.fps)
    changes = []
    if model.frames > 1:
        start = f"its first {model.frames / model.fps:.3g} s"
        start = f"{model.frames} frames" if source.fps is None else start
        changes.append(f"{start} at {model.fps} fps")
    changes += list_changes(source, model.size)
    say.note(f"{video}, {source}: {', '.join(changes) or 'unchanged'}")
    return clip


def list_changes(source: "Source", size: tuple[int, int]) -> list[str]:
    """Return what was done to frames of a file of which a clip of a size was made."""
    changes = []
    if (source.height, source.width) != size:
        changes.append(f"cropped and resized to {write_size(size)}")
    if source.held:
        changes.append(f"the last frame held for {source.held} more")
    if source.damaged:
        changes.append("it is damaged: some of it is a decoder's guess")
    return changes


def note_weights(path: Path, latents: "Latents", pipeline: "StillPipeline", say: Say) -> None:
    """Note latents of other weights than those that they are used with."""
    about = latents.metadata
    if about.get("weights", pipeline.weights_hash) != pipeline.weights_hash:
        say.note(f"note: {path} was made with other weights, of {short(about.get('model'))}")
