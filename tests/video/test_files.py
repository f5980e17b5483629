import json
import re
import resource
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest

from cmdgen.video import write
from cmdgen.video.read import read_metadata, read_video
from cmdgen.video.write import open_video, write_video


def colours(frames: int = 8, height: int = 48, width: int = 80) -> np.ndarray:
    """(T, H, W, 3): a smooth field of saturated colours that drifts."""
    t, y, x = np.mgrid[:frames, :height, :width] / 16
    waves = [np.sin(x + t), np.cos(y - t), np.sin(x + y)]
    return (127.5 + 120 * np.stack(waves, -1)).astype(np.uint8)


def describe(path: object) -> str:
    """What ffmpeg says about a file."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path)]
    return subprocess.run(command, capture_output=True, text=True).stderr


@pytest.mark.parametrize(("height", "width"), [(48, 80), (64, 64), (34, 18)])
def test_frames_come_back_at_their_size_and_rate(tmp_path, height, width):
    frames = colours(height=height, width=width)
    write_video(tmp_path / "a.mp4", frames, 12, {})
    back, fps = read_video(tmp_path / "a.mp4")
    assert back.shape == frames.shape
    assert fps == 12
    assert np.abs(back.astype(float) - frames).mean() < 3


@pytest.mark.parametrize("colour", [(200, 30, 40), (20, 220, 60), (30, 40, 230), (250, 250, 250)])
def test_colours_come_back(tmp_path, colour):
    frames = np.full((4, 32, 48, 3), colour, np.uint8)
    write_video(tmp_path / "a.mp4", frames, 8, {})
    back, _ = read_video(tmp_path / "a.mp4")
    assert np.abs(back.astype(float) - frames).max() <= 3


def test_file_is_h264_yuv420p_tagged_and_starts_with_its_index(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, colours(), 8, {})
    assert re.search(r"Video: h264 .*yuv420p\(tv, bt709", describe(path))
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_metadata_comes_back_whatever_the_prompt_holds(tmp_path):
    metadata = {"prompt": 'a=b; #c \\ "é"\nnew\\\nline 犬', "seed": 2**63 - 1, "negative": None}
    write_video(tmp_path / "a.mp4", colours(2), 8, metadata)
    assert read_metadata(tmp_path / "a.mp4") == metadata


def test_reading_stops_after_max_frames(tmp_path):
    write_video(tmp_path / "a.mp4", colours(8), 8, {})
    whole, _ = read_video(tmp_path / "a.mp4")
    start, _ = read_video(tmp_path / "a.mp4", max_frames=3)
    assert np.array_equal(start, whole[:3])


@pytest.mark.parametrize(
    ("frames", "name", "says"),
    [
        (np.zeros((2, 33, 32, 3), np.uint8), "a.mp4", "32x33 is odd"),
        (np.zeros((2, 32, 32, 3), np.float32), "a.mp4", "expected uint8"),
        (np.zeros((0, 32, 32, 3), np.uint8), "a.mp4", "at least 1"),
        (np.zeros((2, 32, 32, 3), np.uint8), "a.avi", r"end in \.mp4"),
        (np.zeros((2, 32, 32, 3), np.uint8), "none/a.mp4", "no folder"),
        (np.zeros((2, 32, 32, 3), np.uint8), "folder.mp4", "is a folder"),
        (np.zeros((2, 32, 32, 3), np.uint8), "a" * 300 + ".mp4", "too long"),
    ],
)
def test_impossible_output_is_refused_and_nothing_is_left(tmp_path, frames, name, says):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match=says):
        write_video(tmp_path / name, frames, 8, {})
    assert [path.name for path in tmp_path.iterdir()] == ["folder.mp4"]


def test_failed_encoding_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="not written"):
            write_video(path, colours(), 8, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_frames_written_one_after_another_are_the_same_video(tmp_path):
    frames = colours(8)
    write_video(tmp_path / "a.mp4", frames, 8, {"seed": 1})
    with open_video(tmp_path / "b.mp4", frames.shape[1:3], 8, {"seed": 1}) as take:
        for part in (frames[:1], frames[1:4], frames[4:]):
            take(part)
    assert np.array_equal(read_video(tmp_path / "a.mp4")[0], read_video(tmp_path / "b.mp4")[0])
    assert read_metadata(tmp_path / "b.mp4") == {"seed": 1}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_error_between_frames_ends_the_encoder_and_leaves_nothing(tmp_path, error):
    path = tmp_path / "a.mp4"
    with pytest.raises(error, match="sampling"), open_video(path, (48, 80), 8, {}) as take:
        take(colours(4))
        raise error("sampling")
    assert not list(tmp_path.iterdir())


def test_frames_of_another_size_are_refused(tmp_path):
    with (
        pytest.raises(ValueError, match=r"uint8 \(2, 48, 80, 3\), expected uint8 \(N, 80, 48, 3\)"),
        open_video(tmp_path / "a.mp4", (80, 48), 8, {}) as take,
    ):
        take(colours(2))
    assert not list(tmp_path.iterdir())


def test_encoder_that_fails_on_the_way_is_one_line_and_stops_the_making(tmp_path, monkeypatch):
    broken = tmp_path / "ffmpeg"
    broken.write_text("#!/bin/sh\nread line\necho first >&2\necho no codec >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(write, "get_ffmpeg_exe", lambda: str(broken))
    made = 0
    with (
        pytest.raises(OSError, match=r"a\.mp4 was not written: no codec$") as caught,
        open_video(tmp_path / "a.mp4", (480, 800), 8, {}) as take,
    ):
        # newlines, for the shell that plays the encoder
        frames = np.full((1, 480, 800, 3), 10, np.uint8)
        while made < 10_000:
            take(frames)
            made += 1
    assert "\n" not in str(caught.value)
    assert made < 10_000
    assert list(tmp_path.iterdir()) == [broken]


@pytest.mark.parametrize("content", [b"", b"not a video\n" * 100, json.dumps({}).encode()])
def test_file_that_is_no_video_is_one_line(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    for read in (read_video, read_metadata):
        with pytest.raises(ValueError, match=r"a\.mp4") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_truncated_video_is_one_line(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, colours(), 8, {})
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match=r"a\.mp4"):
        read_video(path)


def test_missing_file_is_one_line(tmp_path):
    for read in (read_video, read_metadata):
        with pytest.raises(ValueError, match="is not a file"):
            read(tmp_path / "a.mp4")


def test_no_frames_are_no_part_of_a_video(tmp_path):
    frames = colours(4)
    with open_video(tmp_path / "a.mp4", frames.shape[1:3], 8, {}) as write:
        for part in (frames[:0], frames[:1], *[frames[:0]] * 20, frames[1:]):
            write(part)
    assert len(read_video(tmp_path / "a.mp4")[0]) == 4
