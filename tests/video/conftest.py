import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from cmdgen.video.formats import choose_encoding
from tests.videos import write_video


def draw(frames: int = 8, height: int = 48, width: int = 80) -> np.ndarray:
    """(T, H, W, 3): a smooth field of saturated colours that drifts."""
    t, y, x = np.mgrid[:frames, :height, :width] / 16
    waves = [np.sin(x + t), np.cos(y - t), np.sin(x + y)]
    return (127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)


@pytest.fixture(scope="session")
def colours() -> Callable[..., np.ndarray]:
    return draw


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """Returns the bytes of a video; of each name and shape it is written once."""

    @cache
    def write(name: str, *shape: int) -> bytes:
        path = tmp_path_factory.mktemp("written") / name
        write_video(path, draw(*shape), 8, {"seed": 1}, choose_encoding(name))
        return path.read_bytes()

    return write


@pytest.fixture(scope="session")
def ffmpeg() -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """Runs the ffmpeg that comes with us, in a folder if one is given."""

    def run(*arguments: object, folder: Path | None = None, data: bytes = b""):
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, cwd=folder, input=data)

    return run
