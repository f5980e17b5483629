"""The clips of one training run: a source, how many of its clips, at which size."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from cmdgen.config import ModelConfig
from cmdgen.data.clips import Clips, ClipSource, Indices
from cmdgen.data.digits import Digits
from cmdgen.data.folder import Folder
from cmdgen.training.config import CLIPS
from cmdgen.world.config import WORLDS
from cmdgen.world.world import World


@dataclass(frozen=True)
class TrainingData:
    """Clips of one size from a source that may know many."""

    source: ClipSource
    count: int
    frames: int
    size: tuple[int, int]
    device: torch.device

    @property
    def note(self) -> str:
        """Return what a folder leaves out as one line, empty where that is nothing."""
        if not (isinstance(self.source, Folder) and self.source.left_out):
            return ""
        left_out = list(self.source.left_out.values())
        total = len(left_out) + len(self.source)
        return f"note: {len(left_out)} of {total} clips left out, the first: {left_out[0]}"

    @property
    def key(self) -> str:
        """Return all that a cached encoding of clip number i depends on."""
        return f"{self.source.key} {self.frames} {self.size}"

    @cached_property
    def training(self) -> Tensor:
        """() -> (N,) int64, indices to learn from."""
        return self.source.indices("train", self.count)

    def held_out(self, count: int) -> Tensor:
        """() -> (at most `count`,) int64, indices that training never sees."""
        return self.source.indices("validation", count)

    def clips(self, indices: Indices) -> Clips:
        """(B,) -> clips, rendered or read."""
        return self.source.render(indices, self.size, self.frames, str(self.device))

    def captions(self, indices: Tensor | Sequence[int], variant: int) -> list[str]:
        """(B,) -> one caption each, phrased by the variant."""
        return self.source.captions(indices, variant)


def open_source(name: str, model: ModelConfig | None = None) -> ClipSource:
    """Open a world, digits or captioned videos, of which what is no clip of `model` is left out."""
    if name in WORLDS:
        return World(WORLDS[name])
    kind, _, digits = name.partition(":")
    if kind == "digits" and Path(digits).is_dir():
        return Digits(Path(digits))
    if not Path(name).exists():
        raise FileNotFoundError(
            f"data {name!r} is neither one of {', '.join(WORLDS)} nor a folder or a tar, nor digits:FOLDER"
        )
    return Folder(Path(name)) if model is None else Folder(Path(name), fps=model.fps, frames=model.frames)


def open_data(name: str, clips: int | None, model: ModelConfig, device: torch.device) -> TrainingData:
    """Open a source at a model's size; None: all clips of a folder, and CLIPS of a world."""
    source = open_source(name, model)
    if clips is None:
        clips = CLIPS if name in WORLDS else len(source.indices("train", sys.maxsize))
    return TrainingData(source, clips, model.frames, model.size, device)
