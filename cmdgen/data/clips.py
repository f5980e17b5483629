"""Clips to learn from, and the protocol of their sources."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

Indices = Tensor | Sequence[int]
# height, width
Size = tuple[int, int]
# to learn from, to steer by, to measure once
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Clips:
    """A batch of clips of one size."""

    frames: Tensor  # (B, T, 3, H, W) uint8
    mask: Tensor | None  # (B, T, H, W) bool: where the subject shows; None: unknown
    labels: dict[str, Tensor] = field(default_factory=dict)  # "subject", "motion", "scene": (B,)


class ClipSource(Protocol):
    """Clips and captions by index: the same index is always the same clip."""

    # differs between sets of clips, and between states of their files
    key: str
    # differs between sets of clips alone
    contents: str

    def indices(self, split: str, count: int) -> Tensor:
        """Return at most `count` indices, (N,) int64, of one of SPLITS; none of "train" is in another."""

    def captions(self, indices: Indices, variant: int = 0) -> list[str]:
        """Return one caption each, fast; another variant may phrase it differently."""

    def render(self, indices: Indices, size: Size, frames: int = 16, device: str = "cpu") -> Clips:
        """(B,) -> clips of `size`, drawn or read."""
