import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, TextIOWrapper
from threading import Thread

import numpy as np
import pytest
from PIL import Image, ImageSequence

from cmdgen.request import Request
from cmdgen.video import ffmpeg
from cmdgen.video.ffmpeg import run_ffmpeg
from cmdgen.video.formats import STDOUT, Encoding, choose_encoding
from cmdgen.video.read import read_metadata, read_video
from cmdgen.video.write import EncoderError, Output, check_output, open_video, write_still
from tests.videos import write_video

VIDEOS = ("a.mp4", "a.webm", "a.mkv", "a.gif", "a.webp", "a.apng", "a.y4m", "%03d.png")
# of the mean pixel, from 0 to 255: gif has 256 colours
LOSS = {"a.gif": 8, "a.apng": 0, "%03d.png": 0}


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_come_back_at_their_size_and_rate(tmp_path, colours, name):
    # no whole number of a codec's blocks
    frames = colours(8, 34, 50)
    write_video(tmp_path / name, frames, 12, {})
    back, fps = read_video(tmp_path / name)
    assert back.shape == frames.shape
    # a sequence has no rate, and pictures that move a clock of their own
    assert "%" in name or fps == pytest.approx(12, rel=0.02)
    assert np.abs(back.astype(float) - frames).mean() <= LOSS.get(name, 3)


@pytest.mark.parametrize(
    ("name", "codec", "described"),
    [
        ("a.mp4", "h264", r"h264 .*avc1.*yuv420p\(tv, bt709"),
        ("a.mp4", "hevc", r"hevc .*hvc1.*yuv420p\(tv, bt709"),
        ("a.mp4", "av1", r"av1 .*av01.*yuv420p\(tv, bt709"),
        ("a.webm", "vp9", r"vp9 .*yuv420p\(tv, bt709"),
        ("a.webm", "av1", r"av1 .*yuv420p\(tv, bt709"),
        ("a.mkv", "ffv1", r"ffv1, bgr0\(pc, gbr"),
    ],
)
def test_a_codec_is_what_ffmpeg_reads_with_its_colours(tmp_path, colours, ffmpeg, name, codec, described):
    write_video(tmp_path / name, colours(4, 64, 64), 8, None, choose_encoding(name, codec=codec))
    assert re.search(rf"Video: {described}", ffmpeg("-i", tmp_path / name).stderr.decode())
    back, _ = read_video(tmp_path / name)
    assert np.abs(back.astype(float) - colours(4, 64, 64)).mean() <= (0 if codec == "ffv1" else 3)


@pytest.mark.parametrize("name", VIDEOS)
def test_colours_come_back(tmp_path, name):
    colours = np.array([(200, 30, 40), (20, 220, 60), (30, 40, 230), (250, 250, 250)], np.uint8)
    # a row of four squares, each as large as the blocks that codecs cut a frame into
    frame = colours.repeat(64, 0)[None].repeat(64, 0)
    write_video(tmp_path / name, frame[None].repeat(2, 0), 8, {})
    back, _ = read_video(tmp_path / name)
    # without the edges between them, where colours have half the resolution
    inner = back.reshape(-1, 64, 4, 64, 3)[:, :, :, 8:-8].astype(float)
    # a webp has limited range and whole levels: it gives way a little more
    assert np.abs(inner - colours[:, None]).max() <= (4 if name == "a.webp" else 3)


def test_an_mp4_starts_with_its_index(written):
    data = written("a.mp4")
    assert data.index(b"moov") < data.index(b"mdat")


def test_a_y4m_says_its_range_and_where_chroma_lies(tmp_path, colours):
    write_video(tmp_path / "a.y4m", colours(3), 12, {})
    header, *frames = (tmp_path / "a.y4m").read_bytes().split(b"FRAME\n")
    parts = header.decode().split()
    assert parts[:4] == ["YUV4MPEG2", "W80", "H48", "F12:1"]
    assert {"C420jpeg", "XCOLORRANGE=LIMITED", "A1:1"} <= set(parts)
    assert [len(frame) for frame in frames] == [80 * 48 * 3 // 2] * 3


def test_a_raw_file_is_the_frames(tmp_path, colours):
    write_video(tmp_path / "a.raw", colours(), 8, {})
    assert (tmp_path / "a.raw").read_bytes() == colours().tobytes()


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.apng"])
@pytest.mark.parametrize("loop", [0, 1, 3])
def test_pictures_that_move_play_as_often_and_as_long_as_asked(tmp_path, colours, name, loop):
    write_video(tmp_path / name, colours(6), 7, {"a": 1}, choose_encoding(name, loop=loop))
    with Image.open(tmp_path / name) as image:
        # a GIF says how often it is repeated, and nothing for once
        plays = {None: 1, 0: 0}.get(image.info.get("loop"), image.info.get("loop", 0))
        plays += name == "a.gif" and bool(image.info.get("loop"))
        shown = [(page.load(), page.info["duration"])[1] for page in ImageSequence.Iterator(image)]
    assert plays == loop
    assert len(shown) == 6 and sum(shown) == pytest.approx(6000 / 7, abs=10)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.apng", "a.mp4"])
def test_a_video_of_one_frame_is_one(tmp_path, colours, name):
    loop = None if name == "a.mp4" else 3
    frames = colours(1, 34, 18)
    write_video(tmp_path / name, frames, 7, {"a": 1}, choose_encoding(name, loop=loop))
    assert read_video(tmp_path / name)[0].shape == (1, 34, 18, 3)
    assert read_metadata(tmp_path / name) == {"a": 1}


@pytest.mark.parametrize("codec", ["ffv1", "h264"])
def test_planes_are_stored_as_they_are(tmp_path, ffmpeg, codec):
    planes = np.random.default_rng(0).integers(16, 236, (4, 72, 80), np.uint8)
    lossless = Encoding("mkv", codec=codec, crf=None if codec == "ffv1" else 0)
    with open_video(Output(tmp_path / "a.mkv", (48, 80), 8, {}, lossless, pixels="yuv420p")) as take:
        take(planes[:3])
        take(planes[3:])
    decoded = ffmpeg("-i", tmp_path / "a.mkv", "-f", "rawvideo", "-")
    assert decoded.stdout == planes.tobytes()
    assert re.search(r"yuv420p\(tv, bt709", decoded.stderr.decode())


@pytest.mark.parametrize(("name", "height"), [("a.gif", 48), ("a.y4m", 48), ("a.mkv", 47)])
def test_planes_are_refused_where_they_would_be_converted(tmp_path, name, height):
    encoding = choose_encoding(name, codec="ffv1" if name == "a.mkv" else None)
    with (
        pytest.raises(ValueError, match="does not take frames in yuv420p"),
        open_video(Output(tmp_path / name, (height, 80), 8, {}, encoding, pixels="yuv420p")),
    ):
        pass


@pytest.mark.parametrize(
    ("frames", "name", "says"),
    [
        (np.zeros((2, 33, 32, 3), np.uint8), "a.mp4", "32x33 is odd"),
        (np.zeros((2, 32, 32, 3), np.float32), "a.mp4", "expected uint8"),
        (np.zeros((0, 32, 32, 3), np.uint8), "a.mp4", "has no frames"),
        (np.zeros((0, 32, 32, 3), np.uint8), "a.webp", "has no frames"),
        (np.zeros((0, 32, 32, 3), np.uint8), "%d.png", "has no frames"),
        (np.zeros((2, 32, 32, 3), np.uint8), "a.avi", r"end in \.mp4"),
        (np.zeros((2, 32, 32, 3), np.uint8), "a.png", "png is no video"),
        (np.zeros((2, 32, 32, 3), np.uint8), "a.safetensors", "safetensors is no video"),
        (np.zeros((2, 32, 32, 3), np.uint8), "none/a.mp4", "no folder"),
        (np.zeros((2, 32, 32, 3), np.uint8), "none/%d.png", "no folder"),
        (np.zeros((2, 32, 32, 3), np.uint8), "folder.mp4", "is a folder"),
        (np.zeros((2, 32, 32, 3), np.uint8), "a" * 300 + ".mp4", "too long"),
    ],
)
def test_impossible_output_is_refused_and_nothing_is_left(tmp_path, frames, name, says):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match=says):
        write_video(tmp_path / name, frames, 8, {})
    assert [path.name for path in tmp_path.iterdir()] == ["folder.mp4"]


@pytest.mark.parametrize("name", [*VIDEOS, "a.png"])
def test_files_are_kept_unless_overwritten(tmp_path, colours, name):
    def make(frames: np.ndarray, **how: bool) -> None:
        if name == "a.png":
            write_still(tmp_path / name, frames[0], {}, **how)
        else:
            write_video(tmp_path / name, frames, 8, {}, **how)

    before = {tmp_path / name.replace("%03d", f"{i:03}"): b"%d" % i for i in range(1, 5)}
    for path, content in before.items():
        path.write_bytes(content)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="exists: give another name") as caught:
        make(colours(2, 16, 16))
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    make(colours(2, 16, 16), overwrite=True)
    # none of a longer sequence is left over
    assert len(list(tmp_path.iterdir())) == (2 if "%" in name else 1)
    assert len(read_video(tmp_path / name)[0]) == (1 if name == "a.png" else 2)


def refuse(*_: object) -> None:
    raise PermissionError("no links here")


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("name", ["a.mp4", "%03d.png"])
def test_a_file_that_appeared_meanwhile_is_kept(tmp_path, colours, monkeypatch, name, links):
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    other = tmp_path / name.replace("%03d", "002")
    with (
        pytest.raises(FileExistsError, match=f"{other.name} exists"),
        open_video(Output(tmp_path / name, (48, 80), 8, {})) as take,
    ):
        take(colours(3))
        other.write_text("mine")
    assert list(tmp_path.iterdir()) == [other] and other.read_text() == "mine"


def test_without_links_files_are_written_all_the_same(tmp_path, colours, monkeypatch):
    monkeypatch.setattr(os, "link", refuse)
    write_video(tmp_path / "a.mp4", colours(3), 8, {})
    assert len(read_video(tmp_path / "a.mp4")[0]) == 3


@pytest.mark.parametrize("name", [*VIDEOS, "a.raw"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_failed_encoding_keeps_the_old_file_and_leaves_nothing_else(tmp_path, name, overwrite):
    old = tmp_path / name.replace("%03d", "001")
    if overwrite:
        old.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(0, 256, (3, 48, 80, 3), np.uint8)
    # as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
    try:
        with pytest.raises(EncoderError, match="not written") as caught:
            write_video(tmp_path / name, noise, 8, {}, overwrite=overwrite)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [old] * overwrite
    assert not overwrite or old.read_bytes() == b"old"


def test_frames_written_one_after_another_are_the_same_video(tmp_path, colours):
    frames = colours(8)
    write_video(tmp_path / "a.mp4", frames, 8, {"seed": 1})
    with open_video(Output(tmp_path / "b.mp4", frames.shape[1:3], 8, {"seed": 1})) as take:
        for part in (frames[:0], frames[:1], frames[1:4], *[frames[:0]] * 20, frames[4:]):
            take(part)
            take.check()
    # nothing in a file tells when it was made
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "%d.png"])
def test_error_between_frames_ends_the_encoder_and_leaves_nothing(tmp_path, colours, error, name):
    how = choose_encoding(name, sidecar=True)
    with pytest.raises(error, match="sampling"), open_video(Output(tmp_path / name, (48, 80), 8, {}, how)) as take:
        take(colours(4))
        raise error("sampling")
    assert not list(tmp_path.iterdir())


def test_frames_of_another_size_are_refused(tmp_path, colours):
    with (
        pytest.raises(ValueError, match=r"uint8 \(2, 48, 80, 3\), expected uint8 \(N, 80, 48, 3\)"),
        open_video(Output(tmp_path / "a.mp4", (80, 48), 8, {})) as take,
    ):
        take(colours(2))
    assert not list(tmp_path.iterdir())


def test_encoder_that_fails_on_the_way_is_one_line_and_stops_the_making(tmp_path, monkeypatch):
    broken = tmp_path / "ffmpeg"
    broken.write_text("#!/bin/sh\nread line\necho first >&2\necho no codec >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(broken))
    made = 0
    with (
        pytest.raises(EncoderError, match=r"a\.mp4 was not written: no codec$") as caught,
        open_video(Output(tmp_path / "a.mp4", (480, 800), 8, {})) as take,
    ):
        # newlines, for the shell that plays the encoder
        frames = np.full((1, 480, 800, 3), 10, np.uint8)
        while made < 10_000:
            take(frames)
            made += 1
    assert "\n" not in str(caught.value)
    assert made < 10_000
    assert list(tmp_path.iterdir()) == [broken]


@contextmanager
def stdout_to(descriptor: int, monkeypatch) -> Iterator[None]:
    with monkeypatch.context() as patch, open(descriptor, "w", closefd=False) as stream:
        patch.setattr(sys, "stdout", stream)
        yield


@pytest.mark.parametrize("name", ["y4m", "mp4", "raw", "gif", "webp"])
def test_stdout_gets_the_video_and_nothing_else(tmp_path, colours, monkeypatch, capfd, name):
    path = tmp_path / f"a.{name}"
    with path.open("wb") as file, stdout_to(file.fileno(), monkeypatch):
        write_video("-", colours(4), 8, {"seed": 1}, choose_encoding("-", format=name))
    assert capfd.readouterr() == ("", "")
    if name == "raw":
        assert path.read_bytes() == colours(4).tobytes()
        return
    back, fps = read_video(path)
    assert back.shape == (4, 48, 80, 3) and fps == pytest.approx(8, rel=0.02)
    assert np.abs(back.astype(float) - colours(4)).mean() <= 8
    if name != "y4m":
        assert read_metadata(path) == {"seed": 1}


@pytest.mark.parametrize("name", ["y4m", "gif"])
def test_a_closed_stdout_ends_the_making(colours, monkeypatch, name):
    reader, writer = os.pipe()
    how = choose_encoding("-", format=name)
    with (
        stdout_to(writer, monkeypatch),
        pytest.raises(BrokenPipeError) as caught,
        open_video(Output("-", (48, 80), 8, {"seed": 1}, how)) as take,
    ):
        os.close(reader)
        for _ in range(100_000):
            take(colours(1))
            take.check()
            time.sleep(0.01)
    assert "\n" not in str(caught.value)
    os.close(writer)


# writes videos to stdout, in the formats that its arguments name
STREAM = """
import sys
import numpy as np
from cmdgen.video.formats import choose_encoding
from cmdgen.video.write import Output, open_video
for name in sys.argv[1:]:
    try:
        with open_video(Output("-", (16, 16), 8, {"seed": 1}, choose_encoding("-", format=name))) as take:
            take(np.zeros((3, 16, 16, 3), np.uint8))
    except OSError as error:
        print(type(error).__name__, error, file=sys.stderr)
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
def test_a_full_stdout_is_one_line():
    command = [sys.executable, "-c", STREAM, "y4m", "gif", "mp4"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment)
    # nothing is left in a buffer either, which would fail when Python ends
    line = b"EncoderError stdout was not written: No space left on device\n"
    assert (done.returncode, done.stderr) == (0, line * 3)


def test_a_stdout_without_a_number_gets_the_video_too(colours, monkeypatch):
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(memory := BytesIO()))
    write_video("-", colours(2), 8, {}, Encoding("raw"))
    assert memory.getvalue() == colours(2).tobytes()


def test_a_terminal_and_a_closed_stdout_get_no_video(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with pytest.raises(ValueError, match="stdout is a terminal"):
        check_output("-", overwrite=False)
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(ValueError, match="stdout is closed"):
        check_output("-", overwrite=False)


def test_a_sidecar_lies_beside_the_file_and_is_kept_as_it_is(tmp_path, colours):
    how = choose_encoding("a.y4m", sidecar=True)
    write_video(tmp_path / "a.y4m", colours(2), 8, {"seed": 1}, how)
    sidecar = tmp_path / "a.y4m.json"
    assert json.loads(sidecar.read_text()) == {"seed": 1}
    (tmp_path / "a.y4m").unlink()
    with pytest.raises(FileExistsError, match=r"a\.y4m\.json exists"):
        write_video(tmp_path / "a.y4m", colours(2), 8, {"seed": 2}, how)
    assert list(tmp_path.iterdir()) == [sidecar]
    write_video(tmp_path / "a.y4m", colours(2), 8, {"seed": 2}, how, overwrite=True)
    assert json.loads(sidecar.read_text()) == {"seed": 2}
    # what is no metadata of ours is none of our business
    write_video(tmp_path / "a.y4m", colours(2, 8, 8), 8, None, overwrite=True)
    assert sidecar.exists()


def test_a_sidecar_of_what_was_replaced_goes(tmp_path, colours):
    path, how = tmp_path / "a.y4m", choose_encoding("a.y4m", sidecar=True)
    write_video(path, colours(2, 8, 8), 8, {"cmdgen": "1", "seed": 1}, how)
    assert len(list(tmp_path.iterdir())) == 2
    write_video(path, colours(2, 8, 8), 8, {"cmdgen": "1", "seed": 2}, overwrite=True)
    assert list(tmp_path.iterdir()) == [path]


def test_a_named_pipe_and_a_device_take_a_video_live(tmp_path, colours):
    pipe, got = tmp_path / "a.mp4", []
    os.mkfifo(pipe)
    reader = Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_video(pipe, colours(), 8, None)
    reader.join()
    (tmp_path / "b.mp4").write_bytes(got[0])
    assert read_video(tmp_path / "b.mp4")[0].shape == colours().shape
    write_video("/dev/null", colours(), 8, None)
    assert pipe.is_fifo() and os.path.exists("/dev/null")
    with pytest.raises(EncoderError, match="No space left"):
        write_video("/dev/full", colours(), 8, None)
    with pytest.raises(ValueError, match="webm cannot go to stdout or a pipe"):
        choose_encoding("/dev/null", format="webm")
    assert Request(output="/dev/stdout").output == STDOUT


def test_ctrl_c_while_ffmpeg_starts_does_not_wait_for_it(monkeypatch) -> None:
    class Interrupted(Thread):
        def start(self) -> None:
            super().start()
            raise KeyboardInterrupt

    ended = []

    def run() -> None:
        try:
            with run_ffmpeg(
                *["-f", "rawvideo", "-pix_fmt", "gray", "-s", "2x2", "-i", "pipe:0", "-f", "null", "-"],
                stdin=subprocess.PIPE,
            ):
                pass
        except KeyboardInterrupt:
            ended.append(True)

    # it reads from a pipe that nobody closes
    worker = Thread(target=run, daemon=True)
    monkeypatch.setattr(ffmpeg, "Thread", Interrupted)
    worker.start()
    worker.join(20)
    assert ended
