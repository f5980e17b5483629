import os
import struct
import sys
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmdgen.video import read
from cmdgen.video.formats import Encoding
from cmdgen.video.read import fit, read_clip, read_video
from tests.videos import write_video

LOSSLESS = Encoding("mkv", codec="ffv1")
# equal examples each time, few enough to be quick
STEADY = settings(derandomize=True, max_examples=25, deadline=None, database=None)


def levels(count: int, height: int = 32, width: int = 32) -> np.ndarray:
    """(T, H, W, 3): each frame one grey, 10 brighter than the one before."""
    return np.full((count, height, width, 3), np.arange(count).reshape(-1, 1, 1, 1) * 10, np.uint8)


def greys(clip: np.ndarray) -> list[int]:
    assert (clip == clip[:, :1, :1, :1]).all()
    return (clip[:, 0, 0, 0] // 10).tolist()


@pytest.fixture(scope="module")
def lossless(tmp_path_factory) -> Callable[[int], bytes]:
    """Returns the bytes of a Matroska of `levels`."""

    @cache
    def write(count: int) -> bytes:
        path = tmp_path_factory.mktemp("lossless") / "a.mkv"
        write_video(path, levels(count), 8, None, LOSSLESS)
        return path.read_bytes()

    return write


def clip_of(path: object, frames: int, fps: float | None) -> list[int]:
    return greys(read_clip(path, frames=frames, size=(16, 16), fps=fps)[0])


def test_reading_stops_after_max_frames(tmp_path, written):
    (tmp_path / "a.mp4").write_bytes(written("a.mp4"))
    whole, _ = read_video(tmp_path / "a.mp4")
    start, _ = read_video(tmp_path / "a.mp4", max_frames=3)
    assert np.array_equal(start, whole[:3])


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (8, [0, 1, 2, 3, 4, 5]),
        (None, [0, 1, 2, 3, 4, 5]),
        # the middle of each frame's time decides, between two the earlier
        (4, [0, 2, 4, 6, 8, 10]),
        (16, [0, 0, 1, 1, 2, 2]),
        (12, [0, 0, 1, 2, 2, 3]),
        (5, [0, 2, 3, 5, 7, 8]),
        (1, [3, 11, 19, 19, 19, 19]),
    ],
)
@pytest.mark.parametrize("name", ["a.mkv", "a.apng"])
def test_frames_are_those_shown_in_the_middle_of_their_time(tmp_path, lossless, name, fps, expected):
    if name == "a.mkv":
        (tmp_path / name).write_bytes(lossless(20))
    else:
        write_video(tmp_path / name, levels(20), 8, None)
    assert clip_of(tmp_path / name, 6, fps) == expected


def test_equal_frames_of_an_apng_are_one_that_lasts_longer(tmp_path):
    shown = [0, 0, 1, 1, 1, 2]
    write_video(tmp_path / "a.apng", levels(3)[shown], 8, None)
    assert clip_of(tmp_path / "a.apng", 6, 8) == shown


def test_a_short_video_is_held_and_a_still_repeated(tmp_path, colours, lossless):
    (tmp_path / "a.mkv").write_bytes(lossless(3))
    clip, source = read_clip(tmp_path / "a.mkv", frames=5, size=(16, 16), fps=8)
    assert greys(clip) == [0, 1, 2, 2, 2]
    assert (source.held, source.fps, str(source)) == (2, 8, "32x32, 8 fps, 0.38 s")
    Image.fromarray(colours(1, 20, 20)[0]).save(tmp_path / "a.jpg", quality=95)
    clip, source = read_clip(tmp_path / "a.jpg", frames=5, size=(16, 16), fps=8)
    assert (source.held, source.fps, str(source)) == (0, None, "20x20")
    assert (clip == clip[0]).all()
    assert np.abs(clip[0].astype(float) - fit(colours(1, 20, 20)[0], (16, 16))).mean() < 3


def test_a_variable_rate_goes_by_timestamps(tmp_path, ffmpeg, lossless):
    (tmp_path / "a.mkv").write_bytes(lossless(6))
    # 2 frames at 8 a second, the others at 2
    times = "setpts='if(lt(N,2),N/8,2/8+(N-2)/2)/TB'"
    ffmpeg("-i", "a.mkv", "-vf", times, "-fps_mode", "vfr", "-c:v", "ffv1", "b.mkv", folder=tmp_path)
    assert clip_of(tmp_path / "b.mkv", 8, 8) == [0, 1, 2, 2, 2, 2, 3, 3]


def test_a_gif_goes_by_how_long_each_frame_is_shown(tmp_path):
    first, *rest = (Image.fromarray(frame) for frame in levels(3))
    # nothing said is 0.1 s
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=[300, 0, 200])
    assert clip_of(tmp_path / "a.gif", 7, 10) == [0, 0, 0, 1, 2, 2, 2]


def test_sound_is_ignored_and_lengthens_nothing(tmp_path, ffmpeg, lossless):
    (tmp_path / "a.mkv").write_bytes(lossless(3))
    sound = ["-f", "lavfi", "-i", "sine=duration=3"]
    ffmpeg("-i", "a.mkv", *sound, "-c:v", "copy", "-c:a", "flac", "b.mkv", folder=tmp_path)
    assert clip_of(tmp_path / "b.mkv", 5, 8) == [0, 1, 2, 2, 2]
    ffmpeg("-i", "b.mkv", "-vn", "c.mkv", folder=tmp_path)
    with pytest.raises(ValueError, match=r"c\.mkv is not a readable video"):
        read_clip(tmp_path / "c.mkv", frames=2, size=(16, 16), fps=8)


def test_a_turned_video_is_upright(tmp_path, ffmpeg):
    frames = levels(2, 32, 48)
    # a bright corner, upper left
    frames[:, :8, :8] = 255
    write_video(tmp_path / "a.mp4", frames, 8, None)
    for turned in (90, 180, 270):
        how = ["-display_rotation", turned, "-i", "a.mp4", "-c", "copy", f"{turned}.mp4"]
        assert not ffmpeg(*how, folder=tmp_path).returncode
        whole = read_video(tmp_path / f"{turned}.mp4")[0][0]
        assert whole.shape == ((32, 48, 3) if turned == 180 else (48, 32, 3))
        # counter-clockwise, as ffmpeg's option says
        corner = {90: whole[-8:, :8], 180: whole[-8:, -8:], 270: whole[:8, -8:]}[turned]
        assert corner.mean() > 200 and whole.mean() < 40
    _, source = read_clip(tmp_path / "90.mp4", frames=1, size=(12, 12), fps=8)
    assert (source.width, source.height) == (32, 48)


def test_a_turned_photograph_is_upright(tmp_path, colours):
    exif = Image.Exif()
    # stored on its side: 90 degrees clockwise show it
    exif[0x0112] = 6
    Image.fromarray(colours(1, 20, 40)[0]).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_video(tmp_path / "a.png")[0][0], np.rot90(colours(1, 20, 40)[0], -1))


@pytest.mark.parametrize(("aspect", "size"), [("2/1", (24, 80)), ("1/2", (48, 40))])
def test_pixels_become_as_wide_as_they_are_high(tmp_path, ffmpeg, colours, aspect, size):
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "80x48", "-i", "-"]
    how = ["-vf", f"setsar={aspect}", "-c:v", "ffv1"]
    ffmpeg(*raw, *how, "a.mkv", folder=tmp_path, data=colours(2).tobytes())
    assert read_video(tmp_path / "a.mkv")[0].shape == (2, *size, 3)


@pytest.mark.parametrize(
    "how",
    [
        ["-pix_fmt", "yuv420p10le", "-c:v", "libx265", "-x265-params", "log-level=error"],
        ["-vf", "scale=out_color_matrix=bt601", "-colorspace", "smpte170m", "-c:v", "libx264"],
        ["-vf", "scale=out_color_matrix=bt709", "-colorspace", "bt709", "-c:v", "libx264"],
        ["-pix_fmt", "yuvj444p", "-c:v", "mjpeg", "-q:v", "1"],
        ["-vf", "format=rgba", "-c:v", "qtrle"],
    ],
)
def test_depth_and_matrix_are_read_by_their_tags(tmp_path, ffmpeg, how):
    frames = np.full((3, 32, 32, 3), (200, 60, 30), np.uint8)
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "32x32", "-i", "-"]
    done = ffmpeg(*raw, *how, "b.mov", folder=tmp_path, data=frames.tobytes())
    assert not done.returncode, done.stderr
    back, _ = read_video(tmp_path / "b.mov")
    assert np.abs(back.astype(float) - frames).max() <= 4


def test_what_is_transparent_in_a_picture_is_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert (read_video(tmp_path / "a.png")[0] == 255).all()


def test_grey_of_16_bits_keeps_its_levels(tmp_path):
    Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(tmp_path / "a.png")
    assert (read_video(tmp_path / "a.png")[0] == 30_000 // 256).all()


def test_a_sequence_is_a_video(tmp_path):
    write_video(tmp_path / "%03d.png", levels(4), 8, None)
    assert clip_of(tmp_path / "%03d.png", 5, 12) == [0, 1, 2, 3, 3]


@pytest.mark.parametrize(
    ("shape", "size", "part"),
    [
        ((12, 20), (6, 6), (slice(0, 12), slice(4, 16))),
        ((20, 12), (6, 6), (slice(4, 16), slice(0, 12))),
        ((33, 47), (11, 11), (slice(0, 33), slice(7, 40))),
    ],
)
def test_fit_keeps_the_middle_and_nothing_beside_it(shape, size, part):
    frame = np.zeros((*shape, 3), np.uint8)
    frame[part] = 200
    assert (fit(frame, size) == 200).all()


def test_fit_changes_nothing_at_its_size_and_makes_one_pixel_many(colours):
    assert np.array_equal(fit(colours(1)[0], (48, 80)), colours(1)[0])
    assert (fit(np.full((1, 1, 3), 7, np.uint8), (16, 24)) == 7).all()


def test_fit_does_not_flicker_on_fine_stripes():
    # as bright as their mean, where every other pixel alone would be black
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    assert np.abs(fit(stripes, (16, 16)).astype(int)[:, 1:-1] - 100).max() <= 3


def png(width: int, height: int) -> bytes:
    """A PNG's beginning that says so; there is nothing behind."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))


HUGE_GIF = b"GIF89a" + b"\xff" * 4 + b"\0\0\0,\0\0\0\0" + b"\xff" * 4 + b"\0\2\0;"
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mkv\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.mp4", b"", "is not a readable video or picture"),
        ("a.mp4", b"not a video\n" * 100, "is not a readable video or picture"),
        ("a.raw", b"\0" * 1000, "is not a readable video or picture"),
        ("a.gif", b"GIF89a" + b"\xff" * 100, "is not a readable video or picture"),
        ("a.webp", b"RIFF\x64\0\0\0WEBPVP8 " + b"\0" * 100, "is not a readable video or picture"),
        ("a.png", png(8, 8)[:40], "is not a readable video or picture"),
        ("a.png", png(65_535, 65_535), "has more than the 67108864 pixels"),
        ("a.png", png(8200, 8200), "has more than the 67108864 pixels"),
        ("a.gif", HUGE_GIF, "has more than the 67108864 pixels"),
        ("a.y4m", b"YUV4MPEG2 W65535 H65535 F25:1\nFRAME\nxxxx", "is not a readable video"),
        ("a.y4m", b"YUV4MPEG2 W0 H0 F0:0\nFRAME\n", "is not a readable video"),
        # these name other files, which would be there
        *((f"a.{end}", PLAYLIST, "is not a readable video") for end in ("m3u8", "mp4", "mkv")),
        ("a.ffconcat", b"ffconcat version 1.0\nfile 'other.mkv'\n", "is not a readable video"),
        ("a.mp4", b"ffconcat version 1.0\nfile 'other.mkv'\n", "is not a readable video"),
        ("a.sdp", b"v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n", "is not a readable video"),
        ("a.svg", b'<svg><image href="other.png"/></svg>', "is not a readable video or picture"),
    ],
)
def test_what_is_no_video_is_one_line(tmp_path, lossless, name, content, says):
    (tmp_path / "other.mkv").write_bytes(lossless(3))
    (tmp_path / name).write_bytes(content)
    for reading in (lambda path: read_video(path), lambda path: read_clip(path, frames=4, size=(16, 16), fps=8)):
        with pytest.raises(ValueError, match=rf"{name} {says}") as caught:
            reading(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["concat:other.mkv", "-i", "file:other.mkv", "http://x/a.mkv"])
def test_a_name_is_the_name_of_a_file(tmp_path, lossless, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.mkv").write_bytes(lossless(3))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_clip(name, frames=2, size=(16, 16), fps=8)
    if "/" not in name:
        (tmp_path / "other.mkv").rename(tmp_path / name)
        assert clip_of(name, 2, 8) == [0, 1]


def test_what_is_no_file_is_one_line(tmp_path):
    for reading in (read_video, lambda path: read_clip(path, frames=2, size=(16, 16), fps=8)):
        with pytest.raises(FileNotFoundError, match=r"a\.mp4 does not exist"):
            reading(tmp_path / "a.mp4")
        with pytest.raises(ValueError, match="is not a file"):
            reading(tmp_path)
        with pytest.raises(ValueError, match="too long"):
            reading(tmp_path / ("a" * 300 + ".mp4"))


def test_a_long_video_is_read_no_further_than_needed(tmp_path, ffmpeg):
    how = ["-f", "lavfi", "-i", "testsrc=s=16x16:r=200", "-frames:v", 2000, "-c:v", "mpeg4"]
    ffmpeg(*how, "a.avi", folder=tmp_path)
    clip, source = read_clip(tmp_path / "a.avi", frames=4, size=(16, 16), fps=8)
    assert (len(clip), source.held, source.fps, source.seconds) == (4, 0, 200, 10)


@pytest.mark.parametrize(
    ("first", "rest"),
    [
        # a file of 66 bytes whose frames are 30 years apart
        ("YUV4MPEG2 W2 H2 F1:1000000000", 1),
        ("YUV4MPEG2 W2 H2 F1:100000", 2),
        ("YUV4MPEG2 W2 H2 F1:1", 2),
    ],
)
@pytest.mark.parametrize("fps", [1, 8, 240])
def test_a_leap_in_time_takes_no_memory(tmp_path, monkeypatch, first, rest, fps):
    # what lies between was made at once before, and needed gigabytes
    monkeypatch.setattr(read, "MOST_MEMORY", 2**29)
    dark, bright = (b"FRAME\n" + bytes([luma] * 4 + [128] * 2) for luma in (16, 235))
    (tmp_path / "a.y4m").write_bytes(first.encode() + b"\n" + dark + bright * rest)
    clip, source = read_clip(tmp_path / "a.y4m", frames=2, size=(2, 2), fps=fps)
    shown = [0, 1] if fps == 1 and first.endswith(":1") else [0, 0]
    assert [frame.mean() > 100 for frame in clip] == shown
    assert source.held == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits another process")
def test_a_file_that_asks_for_too_much_memory_is_one_line(tmp_path, monkeypatch, lossless):
    (tmp_path / "a.mkv").write_bytes(lossless(3))
    monkeypatch.setattr(read, "MOST_MEMORY", 2**24)
    with pytest.raises(ValueError, match=r"a\.mkv is not a readable video or picture"):
        read_video(tmp_path / "a.mkv")


def test_a_pipe_in_a_sequence_is_no_picture_of_it(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    os.mkfifo(tmp_path / "2.png")
    assert read_clip(tmp_path / "%d.png", frames=2, size=(4, 4), fps=8)[1].held == 1


def test_what_takes_too_long_is_given_up(tmp_path, monkeypatch):
    # ffmpeg would wait for the rest
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(slow))
    monkeypatch.setattr(read, "MOST_SECONDS", 0.2)
    (tmp_path / "a.mp4").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match=r"a\.mp4 takes longer than 0\.2 seconds"):
        read_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.gif", "a.webp", "a.apng", "a.y4m"])
def test_a_truncated_file_gives_its_start_or_one_line(tmp_path, written, name, kept):
    data = written(name)
    (tmp_path / name).write_bytes(data[: int(kept * len(data))])
    try:
        clip, _ = read_clip(tmp_path / name, frames=4, size=(16, 16), fps=8)
        assert clip.shape == (4, 16, 16, 3)
    except ValueError as error:
        assert name in str(error) and "\n" not in str(error)


@STEADY
@given(
    name=st.sampled_from(["a.mp4", "a.webm", "a.gif", "a.webp", "a.apng", "a.y4m"]),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_a_damaged_file_is_a_clip_or_one_line(tmp_path_factory, written, name, changes):
    data = bytearray(written(name, 3, 16, 16))
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(data)
    try:
        clip, _ = read_clip(path, frames=4, size=(8, 8), fps=8)
        assert clip.shape == (4, 8, 8, 3)
    except ValueError as error:
        assert name in str(error) and "\n" not in str(error)
