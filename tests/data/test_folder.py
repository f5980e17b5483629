import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cmdgen.data.folder import Folder
from cmdgen.video.formats import Encoding
from tests.videos import write_video

GOOD = {"file": "a.mp4", "caption": " a  dog "}


def listed(path: Path, *rows: object) -> Path:
    """Videos of 20 frames, 12 high and 20 wide: the left and right 4 columns are black."""
    for name in ("a", "bb"):
        frames = np.full((20, 12, 20, 3), len(name), np.uint8)
        frames[:, :, :4] = frames[:, :, -4:] = 0
        lossless = Encoding("mkv", codec="ffv1")
        write_video(path / f"{name}.mp4", frames, 8, None, lossless, overwrite=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (path / "captions.jsonl").write_text("\n".join(lines))
    return path


def test_listed_captions_and_centre_crop(tmp_path: Path) -> None:
    several = {"file": "bb.mp4", "caption": ["a cat", "a kitten"]}
    folder = Folder(listed(tmp_path, GOOD, "", several))
    batch = folder.render([0, 1], (6, 6), variant=1)
    assert batch.captions == folder.captions([0, 1], variant=1) == ["a dog", "a kitten"]
    assert batch.frames.shape == (2, 16, 3, 6, 6) and batch.frames.dtype == torch.uint8
    assert (batch.frames[0] == 1).all() and (batch.frames[1] == 2).all() and batch.mask is None


def test_captions_beside_the_videos_and_splits_share_nothing(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for number in range(25):
        (tmp_path / "deep" / f"{number:02}.MP4").touch()
        (tmp_path / "deep" / f"{number:02}.txt").write_text(f"clip {number}\n\nlike {number}\n")
    folder = Folder(tmp_path)
    train, test = (folder.indices(split, 99).tolist() for split in ("train", "test"))
    assert len(folder) == 25 and len(test) == 2 and sorted(train + test) == list(range(25))
    assert folder.captions([7], 1) == ["like 7"] and len(folder.indices("train", 3)) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"file": "a.mp4"', "line 2: not readable as JSON"),
        ("[" * 100_000, "line 2: not readable as JSON"),
        ("[1]", r"line 2: not readable as JSON \(\[1\] is not"),
        ({"file": 3, "caption": "x"}, "line 2: got"),
        ({"file": "a.mp4"}, "line 2: the caption is missing"),
        ({"file": "a.mp4", "caption": ["x", " "]}, "line 2: the caption is missing"),
        ({"file": "b.mp4", "caption": "x"}, "line 2: 'b.mp4' does not exist"),
        ({"file": "a\0", "caption": "x"}, "line 2: .* does not exist"),
        ({"file": "../outside.mp4", "caption": "x"}, "line 2: '../outside.mp4' lies outside"),
        ({"file": "/etc/passwd", "caption": "x"}, "line 2: '/etc/passwd' lies outside"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, row: object, message: str) -> None:
    (tmp_path / "outside.mp4").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=message) as error:
        Folder(listed(tmp_path / "folder", GOOD, row))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        Folder(tmp_path / "none")
    with pytest.raises(ValueError, match="holds 0 captioned videos"):
        Folder(tmp_path)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ValueError, match="has no caption"):
        Folder(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"a\.txt: not a text file"):
        Folder(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"a\.txt: the caption is missing, empty"):
        Folder(tmp_path)
    with pytest.raises(ValueError, match="has 20 frames, 21 are needed"):
        Folder(listed(tmp_path, GOOD, {**GOOD, "file": "bb.mp4"})).render([0], (6, 6), frames=21)
