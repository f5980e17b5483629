"""A clip as CMD decomposes it, content frame and motion latents, and the file that holds the two.

What is read comes from strangers: every value is checked, and whatever is wrong is one line of
ValueError that names the file. What is written appears whole or not at all.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cmdgen.config import ModelConfig, SampleConfig
from cmdgen.files import parse_json
from cmdgen.files import check_file, replace_with
from cmdgen.video.formats import Encoding, list_frames
from cmdgen.video.write import check_output
from cmdgen.weights import FLOATS, open_weights

SUFFIX = ".safetensors"
# of the file: which one it is, and the JSON of the clip's metadata, as in a video's comment
VERSION_KEY, VERSION, METADATA_KEY = "cmdgen_latents", "1", "comment"
# bytes: latents of a clip of 512x1024 take half a million for each 128 frames
MOST_BYTES, MOST_HEADER = 2**28, 2**20
MOST_FPS = 240

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Latents:
    """A clip as `CmdAutoencoder.encode` sees it, on the CPU in float32.

    The content frame is a scaled VAE latent. The motion is as the autoencoder makes it, bounded by
    its tanh where it has one, and not standardised; its width-indexed part comes first.
    """

    content: Tensor  # (C, h, w)
    motion: Tensor  # (K, T, W' + H')
    fps: int
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Header:
    """What a file says before its tensors are read."""

    content: Shape
    motion: Shape
    dtype: str
    fps: int
    metadata: dict[str, Any]


def latent_shapes(model: ModelConfig) -> tuple[Shape, Shape]:
    """Of the content frame and the motion of a clip as the model makes it: (C, h, w), (K, T, S).

    Raises ValueError for a model that makes stills.
    """
    autoencoder = model.autoencoder
    if autoencoder is None:
        raise ValueError(f"{model.name} has no autoencoder: it makes stills and knows no motion")
    stride = 1 if model.vae is None else model.vae.stride
    height, width = model.height // stride, model.width // stride
    positions = width // autoencoder.patch + height // autoencoder.patch
    return (
        (autoencoder.channels, height, width),
        (autoencoder.motion_channels, model.frames, positions),
    )


def fit_model(model: ModelConfig, content: Shape, motion: Shape) -> ModelConfig:
    """The model at the size and length of these latents; ValueError where they cannot be its."""
    latent_shapes(model)
    if motion[1] < 2:
        raise ValueError(f"motion of {motion[1]} frame: a clip has 2 or more")
    stride = 1 if model.vae is None else model.vae.stride
    asked = SampleConfig(frames=motion[1], height=content[1] * stride, width=content[2] * stride)
    asked_model = asked.apply(model)
    for name, got, wanted in zip(
        ("content", "motion"), (content, motion), latent_shapes(asked_model), strict=True
    ):
        if got != wanted:
            raise ValueError(
                f"{name} of shape {list(got)} does not fit {model.name}: expected {list(wanted)}"
            )
    return asked_model


def check_fit(model: ModelConfig, content: Shape | None, motion: Shape | None) -> None:
    """ValueError where what there is of the two is not of the model's size and length."""
    for name, got, wanted in zip(
        ("content", "motion"), (content, motion), latent_shapes(model), strict=True
    ):
        if got is not None and got != wanted:
            raise ValueError(
                f"the {name} given is of shape {list(got)}, {model.frames} frames of "
                f"{model.width}x{model.height} have {list(wanted)}"
            )


def describe_origin(path: str | os.PathLike[str]) -> dict[str, str]:
    """What tells a file, or a sequence of them (%04d.png), from others, for metadata.

    Its name, and SHA-256 of all its bytes. Raises FileNotFoundError where there is none,
    ValueError for a device or a pipe.
    """
    file, digest = Path(path), hashlib.sha256()
    sequence: list[Path] = []
    if not file.is_file():
        # of what is no name of a sequence, opening says what is wrong
        with suppress(ValueError):
            sequence = list_frames(file)
    for part in sequence or [file]:
        check_file(part)
        with part.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    # bytes that are no letters are told as such
    name = os.fsencode(file.name).decode(errors="backslashreplace")
    return {"file": name, "sha256": digest.hexdigest()}


def save_latents(
    path: str | os.PathLike[str], latents: Latents, *, overwrite: bool = False
) -> None:
    """Write a file that `read_latents` reads.

    Raises FileExistsError where there is one and it is not to be replaced, ValueError or OSError
    where it cannot be written.
    """
    target = Path(path)
    check_output(target, Encoding("safetensors"), overwrite=overwrite)
    comment = json.dumps({**latents.metadata, "fps": latents.fps}, ensure_ascii=False)
    header = {"format": "pt", VERSION_KEY: VERSION, METADATA_KEY: comment}
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in (("content", latents.content), ("motion", latents.motion))
    }
    with replace_with(target) as temporary:
        try:
            save_file(tensors, temporary, metadata=header)
        except SafetensorError as error:
            raise OSError(f"{target}: {error}") from error


def read_latents(path: str | os.PathLike[str], model: ModelConfig | None = None) -> Latents:
    """Read a file that `save_latents` wrote, of latents that are the model's, if one is given.

    Raises ValueError where it is anything else, FileNotFoundError where there is none.
    """
    with _open(path) as file:
        header = _parse(file, path)
        if model is not None:
            try:
                fit_model(model, header.content, header.motion)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        content, motion = (file.get_tensor(name).float() for name in ("content", "motion"))
    for name, tensor in (("content", content), ("motion", motion)):
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} has values that are no finite numbers")
    return Latents(content, motion, header.fps, header.metadata)


def read_header(path: str | os.PathLike[str]) -> Header:
    """What `read_latents` would read, without the tensors; raises what it raises."""
    with _open(path) as file:
        return _parse(file, path)


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[safe_open]:
    """Give an open file whose size and header are no larger than ours are."""
    target = Path(path)
    check_file(target)
    with target.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        size = os.fstat(raw.fileno()).st_size
    if size > MOST_BYTES or length > MOST_HEADER:
        raise ValueError(f"{path}: not latents of cmdgen: they are never this large")
    with open_weights(target) as file:
        yield file


def _parse(file: safe_open, path: str | os.PathLike[str]) -> Header:
    about: dict[str, str] = file.metadata() or {}
    if VERSION_KEY not in about:
        raise ValueError(f"{path}: not latents of cmdgen: its header has no {VERSION_KEY}")
    if about[VERSION_KEY] != VERSION:
        raise ValueError(
            f"{path}: version {short(about[VERSION_KEY])} of latents is not supported, {VERSION} is"
        )
    names = sorted(file.keys())
    if names != ["content", "motion"]:
        raise ValueError(f"{path}: holds tensors {short(names)}, expected content and motion")
    content, motion = (_parse_shape(file, name, path) for name in names)
    types = {FLOATS[file.get_slice(name).get_dtype()] for name in names}
    metadata = _parse_metadata(about.get(METADATA_KEY, ""), path)
    fps = metadata.get("fps")
    if type(fps) is not int or not 1 <= fps <= MOST_FPS:
        raise ValueError(f"{path}: fps {short(fps)} is not a whole number from 1 to {MOST_FPS}")
    return Header(content, motion, " and ".join(sorted(types)), fps, metadata)


def _parse_shape(file: safe_open, name: str, path: str | os.PathLike[str]) -> Shape:
    """Of a tensor that is one of ours, of floats."""
    part = file.get_slice(name)
    shape, dtype = tuple(part.get_shape()), part.get_dtype()
    if len(shape) != 3 or not all(shape):
        raise ValueError(f"{path}: {name} has shape {short(list(shape))}, expected three sides")
    if dtype not in FLOATS:
        raise ValueError(f"{path}: {name} has type {dtype}, not one of {', '.join(FLOATS)}")
    return shape


def _parse_metadata(text: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: its {METADATA_KEY} is no JSON of ours: {text[:40]!r}") from error
