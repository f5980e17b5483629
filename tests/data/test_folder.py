import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cmdgen.data import folder as folder_module
from cmdgen.data.folder import VideoFolder


@pytest.fixture
def clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos of 20 frames, 12 high and 20 wide: the left and right 4 columns are black."""

    def read(path: Path, *, max_frames: int | None = None) -> tuple[np.ndarray, float]:
        frames = np.full((20, 12, 20, 3), len(path.stem), np.uint8)
        frames[:, :, :4] = frames[:, :, -4:] = 0
        return frames[:max_frames], 8.0

    monkeypatch.setattr(folder_module, "read_video", read)


def _listed(path: Path, *rows: object) -> Path:
    (path / "a.mp4").touch()
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (path / "captions.jsonl").write_text("\n".join(lines))
    return path


def test_listed_captions_and_centre_crop(tmp_path: Path, clips: None) -> None:
    folder = VideoFolder(_listed(tmp_path, {"file": "a.mp4", "caption": " a  dog "}))
    batch = folder.render([0], (6, 6))
    assert folder.captions([0], variant=3) == batch.captions == ["a dog"]
    assert batch.frames.shape == (1, 16, 3, 6, 6) and batch.frames.dtype == torch.uint8
    assert (batch.frames == 1).all() and batch.mask is None


def test_captions_beside_the_videos_and_splits_share_nothing(tmp_path: Path) -> None:
    for number in range(25):
        (tmp_path / f"{number:02}.MP4").touch()
        (tmp_path / f"{number:02}.txt").write_text(f"clip {number}\n")
    folder = VideoFolder(tmp_path)
    train, test = (folder.indices(split, 99).tolist() for split in ("train", "test"))
    assert len(folder) == 25 and len(test) == 2 and sorted(train + test) == list(range(25))
    assert folder.captions([7]) == ["clip 7"] and len(folder.indices("train", 3)) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"file": "a.mp4"', "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[1]", "line 2: got"),
        ({"file": "a.mp4", "caption": " "}, "line 2: 'caption' is missing"),
        ({"file": 3, "caption": "x"}, "line 2: 'file' is missing"),
        ({"file": "b.mp4", "caption": "x"}, "line 2: 'b.mp4' does not exist"),
        ({"file": "../b.mp4", "caption": "x"}, "line 2: '../b.mp4' lies outside"),
        ({"file": "/etc/passwd", "caption": "x"}, "line 2: '/etc/passwd' lies outside"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        VideoFolder(_listed(tmp_path, {"file": "a.mp4", "caption": "x"}, row))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_bad_folders_are_refused(tmp_path: Path, clips: None) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        VideoFolder(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no video"):
        VideoFolder(tmp_path)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ValueError, match="has no caption"):
        VideoFolder(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="not UTF-8"):
        VideoFolder(tmp_path)
    (tmp_path / "a.txt").write_text("a dog")
    with pytest.raises(ValueError, match="has 20 frames, fewer than 21"):
        VideoFolder(tmp_path).render([0], (6, 6), frames=21)
