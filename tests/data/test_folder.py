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
    batch = folder.render([0, 1], (6, 6))
    assert folder.captions([0, 1], variant=1) == ["a dog", "a kitten"]
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
    with pytest.raises(ValueError, match="is neither a folder nor a tar"):
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
    with pytest.raises(ValueError, match="has 20 frames at 8 fps, 21 are needed"):
        Folder(listed(tmp_path, GOOD, {**GOOD, "file": "bb.mp4"})).render([0], (6, 6), frames=21)


def film(path: Path, count: int = 20, fps: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.full((count, 16, 16, 3), 10 * np.arange(count).reshape(-1, 1, 1, 1) % 256, np.uint8)
    write_video(path, frames, fps, None, Encoding("mkv", codec="ffv1"))
    path.with_suffix(".txt").write_text(f"clip {path.stem}\n")
    return path


def test_what_is_too_short_or_unreadable_is_left_out_before_it_is_needed(tmp_path: Path) -> None:
    paths = [film(tmp_path / f"{name}.mkv", count) for name, count in (("a", 20), ("b", 20), ("c", 15), ("d", 20))]
    paths[3].write_bytes(b"\0" * 100)
    write_video(tmp_path / "e.gif", np.arange(4, dtype=np.uint8).repeat(768).reshape(4, 16, 16, 3) * 60, 8, None)
    (tmp_path / "e.txt").write_text("a gif\n")
    paths.append(tmp_path / "e.gif")
    folder = Folder(tmp_path, frames=16)
    assert len(folder) == 2
    assert [*folder.left_out] == [path.name for path in paths[2:]]
    assert folder.left_out[paths[2].name].endswith("c.mkv has 15 frames at 8 fps, 16 are needed")
    assert folder.left_out[paths[3].name].endswith("d.mkv is not a readable video or picture")
    assert folder.left_out[paths[4].name].endswith("e.gif has 4 frames at 8 fps, 16 are needed")
    paths[0].unlink()
    paths[0].with_suffix(".txt").unlink()
    with pytest.raises(ValueError, match=r"holds 4 captioned videos, 1 of use, at least 2 are needed: .*c\.mkv has 15"):
        Folder(tmp_path, frames=16)


def test_a_clip_is_read_at_one_rate(tmp_path: Path) -> None:
    film(tmp_path / "a.mkv", 60, fps=24), film(tmp_path / "b.mkv", 60, fps=24)
    shown = Folder(tmp_path, fps=8).render([0], (8, 8), frames=4).frames[0, :, 0, 0, 0].tolist()
    # the middles of eighths of a second: of frames 0-2, 3-5, 6-8, 9-11
    assert shown == [10, 40, 70, 100]
    assert Folder(tmp_path, fps=12).key != Folder(tmp_path, fps=8).key


def test_what_computers_leave_in_folders_is_no_clip(tmp_path: Path) -> None:
    film(tmp_path / "a.mkv"), film(tmp_path / "b.mkv")
    for name in ("._a.mkv", ".ipynb_checkpoints/a-checkpoint.mkv", "__MACOSX/._a.mkv", "__MACOSX/a.mkv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert len(Folder(tmp_path)) == 2


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for name in "ab":
        for suffix in (".mkv", ".txt"):
            film(tmp_path / "blobs" / f"{name}.mkv") if suffix == ".mkv" else None
            (snapshot / f"{name}{suffix}").symlink_to(f"../../blobs/{name}{suffix}")
    assert Folder(snapshot).captions([0, 1]) == ["clip a", "clip b"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", '{"file_name": "a.mkv", "text": "a dog"}\n{"file_name": "b.mkv", "text": "a cat"}'),
        ("metadata.csv", 'file_name,text\na.mkv,a dog\nb.mkv,"a cat"\n'),
        ("metadata.csv", "\ufefffile,caption,seed\r\na.mkv,a dog,1\r\nb.mkv,a cat,2\r\n"),
    ],
)
def test_lists_of_the_hub_name_captions_too(tmp_path: Path, name: str, text: str) -> None:
    film(tmp_path / "a.mkv"), film(tmp_path / "b.mkv")
    (tmp_path / name).write_text(text)
    assert Folder(tmp_path).captions([0, 1]) == ["a dog", "a cat"]


@pytest.mark.parametrize("suffix", ["ts", "mpg", "wmv", "flv", "ogv", "3gp", "MOV"])
def test_every_container_that_is_read_is_a_clip(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.{suffix}").touch()
        (tmp_path / f"{name}.txt").write_text(name)
    assert len(Folder(tmp_path)) == 2
