from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cmdgen.training import denoising
from tests.videos import write_video


@pytest.fixture(scope="package", autouse=True)
def short_sheets() -> Iterator[None]:
    """Sheets are sampled in few steps: no test looks at their quality."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoising, "SHEET_STEPS", 2)
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
