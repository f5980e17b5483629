"""Who watches a pipeline: progress bars, previews, writers, stopwatches, tracers."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class Observer:
    """Watches a pipeline at work; subclasses override what they need. Never imports torch."""

    # whether `estimate` is called
    estimates = False

    def stage(self, name: str) -> AbstractContextManager[object]:
        """Return what to enter around a stage: a clock, or a name in a trace."""
        return nullcontext()

    def step(self, stage: str, done: int, total: int) -> None:
        """Learn how much of a stage is done."""

    def estimate(self, decode: "Callable[[], np.ndarray]") -> None:
        """Look at the first clip's content frame, uint8 (H, W, 3), after a sampling step."""

    def content(self, clip: int, picture: "np.ndarray") -> None:
        """Take the content frame of a clip, uint8 (H, W, 3), before its frames."""

    def frames(self, clip: int, frames: "np.ndarray") -> None:
        """Take the next frames of a clip as soon as they are decoded."""
