"""A clip as CMD decomposes it, content frame and motion latents, and the file that holds the two.

Files are untrusted: every value is checked, and whatever is wrong is one line of ValueError that
names the file. What is written appears whole or not at all.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from cmdgen.config import ModelConfig
from cmdgen.files import blame, check_file, parse_json
from cmdgen.headers import FLOATS, open_weights
from cmdgen.request import MAX_FPS, Request, resolve
from cmdgen.video.formats import Encoding
from cmdgen.video.write import EncoderError, check_output

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"
# keys of the file's header: its version, and the JSON of the clip's metadata, as a video has it
VERSION_KEY, VERSION, METADATA_KEY = "cmdgen_latents", "1", "comment"
# bytes: latents of a clip of 512x1024 take half a million for each 128 frames
MOST_BYTES, MOST_HEADER = 2**28, 2**20

Shape = tuple[int, ...]
File = str | os.PathLike[str]


@dataclass(frozen=True)
class Latents:
    """A clip as `CmdAutoencoder.encode` sees it, on the CPU in float32.

    The content frame is a scaled VAE latent. The motion is as the autoencoder makes it, bounded by
    its tanh where it has one, and not standardised; its width-indexed part comes first.
    """

    content: "Tensor"  # (C, h, w)
    motion: "Tensor"  # (K, T, W' + H')
    fps: int
    metadata: dict[str, Any]

    @property
    def recorded(self) -> dict[str, Any]:
        """Return the metadata as the file holds them."""
        return {**self.metadata, "fps": self.fps}


@dataclass(frozen=True)
class Header:
    """What a file says before its tensors are read."""

    content: Shape
    motion: Shape
    dtype: str
    fps: int
    metadata: dict[str, Any]


def latent_shapes(model: ModelConfig) -> tuple[Shape, Shape]:
    """Return the shapes of a clip's content frame and motion: (C, h, w), (K, T, S).

    Raises ValueError for a model that makes stills.
    """
    autoencoder = model.autoencoder
    if autoencoder is None:
        raise ValueError(f"{model.name} has no autoencoder: it makes stills and knows no motion")
    height, width = model.latent_size
    positions = width // autoencoder.patch + height // autoencoder.patch
    motion = autoencoder.motion_channels, model.frames, positions
    return (autoencoder.channels, height, width), motion


def fit_model(model: ModelConfig, content: Shape, motion: Shape) -> ModelConfig:
    """Return the model at the size and length of the latents; ValueError where they do not fit."""
    latent_shapes(model)
    if motion[1] < 2:
        raise ValueError(f"motion of {motion[1]} frame: a clip has 2 or more")
    size = content[1] * model.stride, content[2] * model.stride
    fitted = resolve(Request(frames=motion[1], size=size), model).model
    check_fit(fitted, content, motion)
    return fitted


def check_fit(model: ModelConfig, content: Shape | None, motion: Shape | None) -> None:
    """Raise ValueError where one of the two, if given, is not of the model's size and length."""
    fits = zip(("content", "motion"), (content, motion), latent_shapes(model), strict=True)
    for name, got, wanted in fits:
        if got is not None and got != wanted:
            raise ValueError(
                f"the {name} given is of shape {list(got)}, {model.frames} frames of "
                f"{model.width}x{model.height} by {model.name} have {list(wanted)}"
            )


def save_latents(path: File, latents: Latents, *, overwrite: bool = False) -> None:
    """Write a file that `read_latents` reads.

    Raises FileExistsError where there is one, unless `overwrite`, ValueError or EncoderError where
    it cannot be written.
    """
    import torch

    from cmdgen.weights import save_tensors

    target = Path(path)
    check_output(target, Encoding("safetensors"), overwrite=overwrite)
    comment = json.dumps(latents.recorded, ensure_ascii=False)
    tensors = {"content": latents.content, "motion": latents.motion}
    header = {VERSION_KEY: VERSION, METADATA_KEY: comment}
    try:
        save_tensors(target, tensors, torch.float32, metadata=header, overwrite=overwrite)
    except FileExistsError:
        raise
    except OSError as error:
        raise EncoderError(str(error)) from error


def read_latents(path: File, model: ModelConfig | None = None) -> Latents:
    """Read a file that `save_latents` wrote, of latents that fit the model, if one is given.

    Raises ValueError where it is anything else, FileNotFoundError where there is none.
    """
    from cmdgen.weights import read_tensors

    header = read_header(path)
    tensors, _ = read_tensors(Path(path), foreign=True)
    content, motion = (tensors[name].float() for name in ("content", "motion"))
    with blame(path):
        if model is not None:
            fit_model(model, header.content, header.motion)
        for name, tensor in (("content", content), ("motion", motion)):
            if not tensor.isfinite().all():
                raise ValueError(f"{name} has NaN or inf")
    return Latents(content, motion, header.fps, header.metadata)


def read_header(path: File) -> Header:
    """Read the file without its tensors; raises what `read_latents` raises."""
    check_file(Path(path))
    with Path(path).open("rb") as raw:
        length, size = int.from_bytes(raw.read(8), "little"), os.fstat(raw.fileno()).st_size
    if size > MOST_BYTES or length > MOST_HEADER:
        raise ValueError(f"{path}: not latents of cmdgen: they are never this large")
    with open_weights(Path(path)) as file, blame(path):
        return _parse_header(file)


def _parse_header(file: safe_open) -> Header:
    fields: dict[str, str] = file.metadata() or {}
    if (version := fields.get(VERSION_KEY)) is None:
        raise ValueError(f"not latents of cmdgen: its header has no {VERSION_KEY}")
    if version != VERSION:
        raise ValueError(f"version {short(version)} of latents is not supported, {VERSION} is")
    if (names := sorted(file.keys())) != ["content", "motion"]:
        raise ValueError(f"holds tensors {short(names)}, expected content and motion")
    parts = {name: file.get_slice(name) for name in names}
    for name, part in parts.items():
        shape, dtype = part.get_shape(), part.get_dtype()
        if len(shape) != 3 or not all(shape):
            raise ValueError(f"{name} has shape {short(shape)}, expected three sides")
        if dtype not in FLOATS:
            raise ValueError(f"{name} has type {dtype}, not one of {', '.join(FLOATS)}")
    comment = fields.get(METADATA_KEY, "")
    try:
        metadata = parse_json(comment)
    except ValueError as error:
        raise ValueError(f"its {METADATA_KEY} is no JSON of ours: {comment[:40]!r}") from error
    fps = metadata.get("fps")
    if type(fps) is not int or not 1 <= fps <= MAX_FPS:
        raise ValueError(f"fps {short(fps)} is not a whole number from 1 to {MAX_FPS}")
    content, motion = (tuple(part.get_shape()) for part in parts.values())
    dtypes = sorted({FLOATS[part.get_dtype()] for part in parts.values()})
    return Header(content, motion, " and ".join(dtypes), fps, metadata)
