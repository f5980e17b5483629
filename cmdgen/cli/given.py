"""What of a clip `cmdgen sample` need not draw: read from videos, latents and pictures."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from cmdgen.cli.decompose import SMALLER, note_weights, read_input
from cmdgen.cli.errors import Failure, describe, on_the_way
from cmdgen.cli.progress import Say
from cmdgen.config import SampleConfig

if TYPE_CHECKING:
    from torch import Tensor

    from cmdgen.config import ModelConfig
    from cmdgen.latents import Latents
    from cmdgen.pipeline import Given, TextToVideo

# the options that name files, as metadata has them too
NAMES = CONTENT, MOTION, IMAGE = "content_from", "motion_from", "image"


class GivenFiles:
    """The files that --content-from, --motion-from and --image name.

    The first two are videos, or latents as `cmdgen encode` writes them; the last one is a picture,
    to be the content frame. FileNotFoundError names one that is not there.
    """

    def __init__(
        self,
        *,
        content_from: Path | None = None,
        motion_from: Path | None = None,
        image: Path | None = None,
    ) -> None:
        if content_from is not None and image is not None:
            raise ValueError("--content-from and --image both say what is seen: give one")
        named = {CONTENT: content_from, MOTION: motion_from, IMAGE: image}
        self.paths = {name: path for name, path in named.items() if path is not None}
        self.origin: dict[str, dict[str, str]] = {}
        if self.paths:
            from cmdgen.latents import describe_origin

            self.origin = {name: describe_origin(path) for name, path in self.paths.items()}
        # what was read, by size, length and rate
        self._read: dict[tuple[int, ...], Given] = {}

    def holds(self, half: str) -> bool:
        """Whether "content" or "motion" is given."""
        return MOTION in self.paths if half == "motion" else bool({CONTENT, IMAGE} & {*self.paths})

    def check_like(self, metadata: Mapping[str, Any], like: Path, say: Say) -> None:
        """ValueError where a file was made with others that are not given; notes other contents."""
        for name in NAMES:
            origin = metadata.get(name)
            if not isinstance(origin, dict):
                continue
            option, file = f"--{name.replace('_', '-')}", short(origin.get("file"))
            if name in self.paths:
                if origin.get("sha256") != self.origin[name]["sha256"]:
                    say.note(f"note: {like} was made with {option} of other contents, {file}")
            elif not self.holds("motion" if name == MOTION else "content"):
                raise ValueError(f"{like} was made with {option} {file}: give that file, too")

    def fit(self, config: SampleConfig, model: "ModelConfig") -> SampleConfig:
        """`config` with the size and length of latents, where it asks for none; reads no tensors.

        Raises ValueError where it asks for others, Failure where latents are not the model's.
        """
        if not self.paths:
            return config
        from cmdgen.latents import check_fit, fit_model, latent_shapes, read_header

        # says so where it makes stills
        latent_shapes(model)
        headers = {}
        for name in (CONTENT, MOTION):
            if name not in self.paths or not _holds_latents(self.paths[name]):
                continue
            path = self.paths[name]
            try:
                headers[name] = read_header(path)
                own = fit_model(model, headers[name].content, headers[name].motion)
            except ValueError as error:
                raise Failure(describe(error)) from error
            if config.height is None and config.width is None:
                config = replace(config, height=own.height, width=own.width)
            if config.frames is None and name == MOTION:
                config = replace(config, frames=own.frames)
        asked = config.apply(model)
        if CONTENT in headers:
            check_fit(asked, headers[CONTENT].content, None)
        if MOTION in headers:
            check_fit(asked, None, headers[MOTION].motion)
        if MOTION in self.paths and asked.frames == 1:
            raise ValueError("--motion-from has nothing to move: a still is asked for")
        return config

    def read(self, pipeline: "TextToVideo", config: SampleConfig, say: Say) -> "Given | None":
        """What `TextToVideo.sample` takes, of the size and length asked for; None for nothing.

        What is done to videos and pictures is noted.
        """
        if not self.paths:
            return None
        asked = config.apply(pipeline.config)
        key = asked.height, asked.width, asked.frames, asked.fps
        if key not in self._read:
            self._read[key] = self._read_files(pipeline, config, say)
        return self._read[key]

    def _read_files(self, pipeline: "TextToVideo", config: SampleConfig, say: Say) -> "Given":
        from cmdgen.pipeline import Given

        content: Tensor | None = None
        if IMAGE in self.paths:
            still = replace(config, frames=1)
            picture, _ = read_input(self.paths[IMAGE], pipeline, still, say)
            with on_the_way("ask for a smaller --size"):
                content = pipeline.encode_still(picture[0])
        # one file may be both
        paths = {path for name, path in self.paths.items() if name != IMAGE}
        latents = {path: _read_latents(path, pipeline, config, say) for path in paths}
        if CONTENT in self.paths:
            content = latents[self.paths[CONTENT]].content
        motion = latents[self.paths[MOTION]].motion if MOTION in self.paths else None
        return Given(content, motion, self.origin)


def _holds_latents(path: Path) -> bool:
    from cmdgen.latents import SUFFIX

    return path.suffix.lower() == SUFFIX


def _read_latents(path: Path, pipeline: "TextToVideo", config: SampleConfig, say: Say) -> "Latents":
    from cmdgen.latents import read_latents

    if _holds_latents(path):
        with on_the_way(SMALLER):
            latents = read_latents(path, pipeline.config)
        note_weights(path, latents, pipeline, say)
        return latents
    if config.frames == 1:
        # a still is made, of a whole clip's content frame
        config = replace(config, frames=None)
    clip, _ = read_input(path, pipeline, config, say)
    with on_the_way(SMALLER):
        fps = config.apply(pipeline.config).fps
        return pipeline.encode(clip, fps, max_memory=config.max_memory)
