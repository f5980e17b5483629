"""The clips of one training run: a source, how many of its clips, at which size."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from cmdgen.config import ModelConfig
from cmdgen.data.clips import Clips, ClipSource
from cmdgen.data.folder import Folder
from cmdgen.training.config import CLIPS
from cmdgen.world.config import WORLDS
from cmdgen.world.world import World


@dataclass(frozen=True)
class TrainingData:
    """Clips of one size from a source that may know many."""

    source: ClipSource
    # differs between sets of clips
    name: str
    count: int
    frames: int
    size: tuple[int, int]
    device: torch.device

    @property
    def key(self) -> str:
        """Return all that a cached encoding of clip number i depends on."""
        return f"{self.name} {self.frames} {self.size}"

    @cached_property
    def training(self) -> Tensor:
        """() -> (N,) int64, indices to learn from."""
        return self.source.indices("train", self.count)

    def held_out(self, count: int) -> Tensor:
        """() -> (at most `count`,) int64, indices that training never sees."""
        return self.source.indices("test", count)

    def clips(self, indices: Tensor) -> Clips:
        """(B,) -> clips, rendered or read."""
        return self.source.render(indices, self.size, self.frames, str(self.device))

    def captions(self, indices: Tensor | Sequence[int], variant: int) -> list[str]:
        """(B,) -> one caption each, phrased by the variant."""
        return self.source.captions(indices, variant)


def open_data(
    name: str, clips: int | None, model: ModelConfig, device: torch.device
) -> TrainingData:
    """Open a world or a folder of videos at a model's size; None: as many clips as help says."""
    source: ClipSource
    if name in WORLDS:
        source, key, count = World(WORLDS[name]), repr(WORLDS[name]), CLIPS
    elif Path(name).is_dir():
        source = folder = Folder(Path(name))
        key, count = folder.key, len(folder.indices("train", sys.maxsize))
    else:
        known = ", ".join(WORLDS)
        raise FileNotFoundError(f"data {name!r} is neither one of {known} nor a folder")
    size = model.height, model.width
    return TrainingData(source, key, count if clips is None else clips, model.frames, size, device)
