"""What pipelines take and give: clips, and parts of clips that need not be sampled."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from cmdgen.latents import Latents, save_latents
from cmdgen.pipelines.observer import Observer
from cmdgen.request import Plan
from cmdgen.video.formats import Encoding, Pixels, choose_encoding, name_sidecar
from cmdgen.video.write import Output, open_video, write_sidecar, write_still


@dataclass(frozen=True)
class Clip:
    """A video and how it was made."""

    frames: np.ndarray  # uint8: (T, H, W, 3) of rgb24, planes (T, 3 * H // 2, W) of yuv420p
    pixels: Pixels
    content: np.ndarray  # (H, W, 3) uint8: the content frame as a picture
    fps: int
    metadata: dict[str, Any]
    # None for a still
    latents: Latents | None

    def save(self, path: str | os.PathLike[str], encoding: Encoding | None = None, *, overwrite: bool = False) -> None:
        """Write the clip; without `encoding` the suffix chooses the format, as in `cmdgen sample`.

        Raises ValueError for what a format cannot hold, FileExistsError unless `overwrite`.
        """
        target = os.fspath(path)
        encoding = encoding or choose_encoding(target)
        about = self.metadata if encoding.metadata else None
        if encoding.format == "png":
            write_still(target, self.content, about, encoding, overwrite=overwrite)
        elif encoding.format == "safetensors":
            if self.latents is None:
                raise ValueError(f"{target} holds content and motion: a still has no motion")
            latents, sidecar = replace(self.latents, metadata=about or {}), name_sidecar(Path(target))
            if encoding.sidecar and overwrite:
                # an old one never lies beside a new clip
                sidecar.unlink(missing_ok=True)
            save_latents(target, latents, overwrite=overwrite)
            if encoding.sidecar:
                write_sidecar(Path(target), latents.recorded)
        else:
            height, width = self.frames.shape[1:3]
            size = (height if self.pixels == "rgb24" else height * 2 // 3), width
            with open_video(Output(target, size, self.fps, about, encoding, overwrite, self.pixels)) as write:
                write(self.frames)


@dataclass(frozen=True)
class Inputs:
    """Parts of a clip that are given instead of sampled, the same for all clips of a batch.

    `origin` goes into the metadata: the files that they come from.
    """

    content: Tensor | None = None  # (C, h, w), as in Latents
    motion: Tensor | None = None  # (K, T, W' + H')
    # parts of the clip, (C, T, H, W) in [-1, 1]: frames are made between them, or after a single one
    given: tuple[Tensor, ...] = ()
    # whether they are a part of what is made
    keep: bool = True
    origin: Mapping[str, object] = field(default_factory=dict)
    # uint8 (H, W, 3) of any size, for models that animate a picture
    image: np.ndarray | None = None


@dataclass(frozen=True)
class Task:
    """Clips that are made together: plans that differ in prompt and seeds, and what they share."""

    plans: Sequence[Plan]
    observer: Observer = field(default_factory=Observer)
    # the form of the frames
    pixels: Pixels = "rgb24"
    inputs: Inputs = field(default_factory=Inputs)

    @property
    def plan(self) -> Plan:
        """Return the first clip's plan, for what all of them share."""
        return self.plans[0]


class Made(NamedTuple):
    """A batch as a pipeline makes it."""

    frames: np.ndarray  # uint8 (B, T, ...) in the pixels of the run
    pictures: np.ndarray  # uint8 (B, H, W, 3): the content frames
    content: Tensor  # (B, C, h, w) on the CPU: content frames, or the last new frames of an EVDM
    # None of stills and of an EVDM
    motion: Tensor | None  # (B, K, T, W' + H') on the CPU
