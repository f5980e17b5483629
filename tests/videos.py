"""What tests of several areas need to write videos."""

import os
from collections.abc import Mapping

import numpy as np

from cmdgen.video.formats import Encoding
from cmdgen.video.write import Output, open_video


def write_video(
    target: str | os.PathLike[str],
    frames: np.ndarray,
    fps: float,
    metadata: Mapping[str, object] | None,
    encoding: Encoding | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """uint8 (T, H, W, 3) -> a video; raises what `open_video` raises."""
    size = frames.shape[1], frames.shape[2]
    with open_video(Output(target, size, fps, metadata, encoding, overwrite=overwrite)) as write:
        write(frames)
