import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cmdgen.evaluation import swap
from cmdgen.training import denoising, text
from cmdgen.world.config import WORLDS, WorldConfig
from tests.videos import write_video

SHAPES = WorldConfig(
    subjects=("dog", "cat", "car"),
    motions=("jumping", "spinning"),
    scenes=("grass", "sky"),
    pairs=0.0,
    held_out=0.3,
    sprites="shapes",
)


@pytest.fixture(scope="module", autouse=True)
def little_work() -> Iterator[None]:
    """A world of drawn shapes, short sheets, few captions to learn, and no wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORLDS, "shapes", SHAPES)
        patch.setattr(denoising, "SHEET_STEPS", 2)
        patch.setattr(swap, "MIRRORED", SHAPES.motions)
        patch.setattr(text, "CAPTIONS", 20)
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five captioned files of noise; one of them is held out."""
    folder = tmp_path_factory.mktemp("videos")
    for name in "abcde":
        frames = np.random.default_rng(ord(name)).integers(0, 255, (4, 32, 48, 3), np.uint8)
        write_video(folder / f"{name}.mp4", frames, 8, {})
        (folder / f"{name}.txt").write_text(f"noise {name}\n")
    return folder
