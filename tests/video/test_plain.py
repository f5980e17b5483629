"""Frames that PyAV decodes are those of our ffmpeg, bit by bit, or none."""

import os
from pathlib import Path

import numpy as np
import pytest

from cmdgen.video import plain
from cmdgen.video.plain import Decoders
from cmdgen.video.read import count_frames, read_clip
from tests.videos import write_video

pytest.importorskip("av")

_UNTAGGED = "setparams=colorspace=unknown:color_primaries=unknown:color_trc=unknown"
PLAIN = {
    "as we write it": "-c copy",
    "one frame a group": "-c:v libx264 -g 1 -pix_fmt yuv420p",
    "without tags": f"-c:v libx264 -bf 3 -pix_fmt yuv420p -vf {_UNTAGGED}",
    "tagged BT.601": f"-c:v libx264 -pix_fmt yuv420p -vf {_UNTAGGED.replace('unknown', 'smpte170m')}",
    "HEVC": "-c:v libx265 -pix_fmt yuv420p -x265-params log-level=none",
    "VP9": "-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -pix_fmt yuv420p",
    "AV1": "-c:v libaom-av1 -cpu-used 8 -usage realtime -pix_fmt yuv420p",
    "variable rate": "-c:v libx264 -pix_fmt yuv420p -fps_mode vfr -vf setpts='(N+floor(N/3))/12/TB'",
    "odd rate and sound": "-f lavfi -i sine=duration=3 -c:v libx264 -pix_fmt yuv420p -r 30000/1001 -c:a aac",
    "untagged HD": f"-c:v libx264 -pix_fmt yuv420p -preset ultrafast -vf scale=1280:720,setsar=1,{_UNTAGGED}",
}
OTHER = {
    "turned": None,
    "full range": "-c:v libx264 -pix_fmt yuvj420p",
    "4:4:4": "-c:v libx264 -pix_fmt yuv444p",
    "10 bits": "-c:v libx265 -pix_fmt yuv420p10le -x265-params log-level=none",
    "interlaced": "-c:v libx264 -pix_fmt yuv420p -x264opts tff=1 -vf scale=86:52,setsar=1,setfield=tff",
    "HDR": "-c:v libx264 -pix_fmt yuv420p -color_trc smpte2084 -color_primaries bt2020 -colorspace bt2020nc",
    "pixels not square": "-c:v libx264 -pix_fmt yuv420p -vf setsar=4/3",
    "another codec": "-c:v mpeg4",
    "too short": "-c:v libx264 -pix_fmt yuv420p -frames:v 9",
    "two videos": "-map 0 -map 0 -c:v libx264 -pix_fmt yuv420p",
}


@pytest.fixture(scope="module")
def decoders() -> Decoders:
    return Decoders()


@pytest.fixture(scope="module")
def original(tmp_path_factory, colours) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    write_video(folder / "a.mp4", colours(24, 50, 86), 12, None)
    return folder / "a.mp4"


def convert(ffmpeg, original: Path, target: Path, how: str | None) -> Path:
    before, after = ([], how.split()) if how else (["-display_rotation", "90"], ["-c", "copy"])
    done = ffmpeg("-v", "error", *before, "-i", original, *after, target)
    assert not done.returncode, done.stderr
    return target


@pytest.mark.parametrize("how", PLAIN.values(), ids=PLAIN.keys())
def test_frames_and_counts_equal_those_of_ffmpeg(tmp_path, ffmpeg, original, decoders, how):
    file = convert(ffmpeg, original, tmp_path / "b.mp4", how)
    data = file.read_bytes()
    for frames, size, fps in ((16, (24, 40), 12), (8, (50, 86), 5.5), (12, (64, 64), 8), (30, (16, 16), 24)):
        expected, source = read_clip(file, frames=frames, size=size, fps=fps)
        clip = decoders.read(data, frames=frames, size=size, fps=fps)
        assert (clip is None) == bool(source.held)
        assert clip is None or np.array_equal(clip, expected)
        assert decoders.count(data, fps, 99) == count_frames(file, fps, 99)
    assert decoders.read(data, frames=16, size=(16, 16), fps=8) is not None


@pytest.mark.parametrize("how", OTHER.values(), ids=OTHER.keys())
def test_what_is_not_plain_is_left_to_ffmpeg(tmp_path, ffmpeg, original, decoders, how):
    file = convert(ffmpeg, original, tmp_path / "b.mp4", how)
    assert decoders.read(file.read_bytes(), frames=16, size=(16, 16), fps=12) is None


def test_damaged_files_are_left_to_ffmpeg_or_equal(tmp_path, original, decoders):
    data, random = original.read_bytes(), np.random.default_rng(0)
    for number in range(12):
        damaged = bytearray(data)
        for place in random.integers(32, len(data), 5):
            damaged[place] = random.integers(256)
        (tmp_path / "b.mp4").write_bytes(damaged)
        clip = decoders.read(bytes(damaged), frames=8, size=(16, 16), fps=8)
        if clip is not None:
            assert np.array_equal(clip, read_clip(tmp_path / "b.mp4", frames=8, size=(16, 16), fps=8)[0]), number
    assert decoders.read(data[: len(data) // 2], frames=16, size=(16, 16), fps=8) is None


def test_a_process_that_dies_or_hangs_costs_its_clip_alone(original, monkeypatch):
    decoders, data = Decoders(), original.read_bytes()
    request = {"frames": 4, "size": (16, 16), "fps": 8.0}
    assert decoders.read(data, **request) is not None
    (process,) = decoders._idle
    process.kill()
    process.wait()
    assert decoders.read(data, **request) is None
    assert decoders.read(data, **request) is not None
    (process,) = decoders._idle
    monkeypatch.setattr(plain, "_MOST_SECONDS", 0.2)
    os.kill(process.pid, 19)
    assert decoders.read(data, **request) is None and process.poll() is not None


def test_an_older_pyav_costs_one_process_for_all_clips(original, tmp_path, monkeypatch):
    (tmp_path / "av.py").write_text("")
    monkeypatch.setattr(plain.sys, "path", [str(tmp_path), *plain.sys.path])
    decoders = Decoders()
    assert decoders.read(original.read_bytes(), frames=4, size=(16, 16), fps=8.0) is None
    assert len(decoders._idle) == 1
