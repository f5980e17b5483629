"""Frames to an mp4 that plays everywhere, h264, yuv420p, BT.709, or one to a PNG.

Nothing is resized, and a file appears whole or not at all.
"""

import json
import os
import secrets
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import IO

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image
from PIL.PngImagePlugin import PngInfo

VIDEO, STILL = ".mp4", ".png"

# parts of a video that wait for the encoder, before who makes them has to
AHEAD = 8

# the matrix is tagged as well as used: players else guess it from the frame's size
BT709 = (
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"),
    *("-color_range", "tv"),
)
# before the input, and after it: planes that are not said to be BT.709 would be converted to it
CONVERT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "rgb24": (
        (),
        ("-vf", "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int"),
    ),
    "yuv420p": (BT709, ()),
}


def check_output(path: str | os.PathLike[str]) -> None:
    """Raise ValueError, saying what is possible, where no file could be written to `path`."""
    target = Path(path)
    if target.suffix.lower() not in (VIDEO, STILL):
        raise ValueError(f"{target}: the name must end in {VIDEO}, or in {STILL} for a still")
    try:
        if target.is_dir():
            raise ValueError(f"{target} is a folder: give the name of a file in it")
        if target.exists() and not (target.is_file() and os.access(target, os.W_OK)):
            raise ValueError(f"{target} exists and may not be replaced: give another name")
        folder = target.resolve().parent
        if not folder.is_dir():
            raise ValueError(f"{target}: there is no folder {folder}: make it first")
        # a nameless file: permissions alone do not tell what a mounted folder allows
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{target}: {error.strerror}") from error


def write_video(
    path: str | os.PathLike[str],
    frames: np.ndarray,
    fps: float,
    metadata: Mapping[str, object],
    *,
    crf: int = 16,
) -> None:
    """uint8 (T, H, W, 3) -> an mp4 with `metadata` as JSON in its comment; `crf` 0 best, 51 worst.

    Raises ValueError for frames that h264 in yuv420p cannot hold or a path that cannot be written,
    OSError where the encoder fails.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(
            f"frames are {frames.dtype} {frames.shape}, expected uint8 (T, H, W, 3), T at least 1"
        )
    height, width = frames.shape[1:3]
    with open_video(path, (height, width), fps, metadata, crf=crf) as write:
        write(frames)


@contextmanager
def open_video(
    path: str | os.PathLike[str],
    size: tuple[int, int],
    fps: float,
    metadata: Mapping[str, object],
    *,
    pixels: str = "rgb24",
    crf: int = 16,
) -> Iterator[Callable[[np.ndarray], None]]:
    """Give a function to write the next frames with, uint8; `size` is (H, W).

    They are (N, H, W, 3), or, of yuv420p, planes (N, 3 * H // 2, W), BT.709 in limited range.
    It returns before they are encoded: they may not change. The encoder starts at once; the file is
    there when the block has ended, and only if it ended well. Raises ValueError for a video that
    h264 in yuv420p cannot hold or a path that cannot be written, OSError where the encoder fails.
    """
    height, width = size
    if height % 2 or width % 2:
        raise ValueError(f"size {width}x{height} is odd: h264 in yuv420p needs even sides")
    before, after = CONVERT[pixels]
    shape = (3 * height // 2, width) if pixels == "yuv420p" else (height, width, 3)
    if not 0 < fps <= 1000:
        raise ValueError(f"fps {fps} is not above 0 and at most 1000")
    with _replace(path, VIDEO) as temporary:
        command = [
            *(get_ffmpeg_exe(), "-v", "error", "-y"),
            *("-f", "rawvideo", "-pix_fmt", pixels, "-s", f"{width}x{height}", "-r", str(fps)),
            *(*before, "-i", "-", *after, *BT709),
            *("-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", str(crf)),
            *("-metadata", f"comment={json.dumps(metadata, ensure_ascii=False)}"),
            *("-movflags", "+faststart", f"file:{temporary}"),
        ]
        # in a session of its own: Ctrl-C reaches the encoder through us, which then remove its file
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as encoder:
            assert encoder.stdin is not None and encoder.stderr is not None
            waiting: Queue[np.ndarray | None] = Queue(AHEAD)
            said: list[bytes] = []
            threads = (
                Thread(target=_feed, args=(encoder.stdin, waiting), daemon=True),
                # a pipe that nobody reads would stop the encoder when it is full
                Thread(target=said.extend, args=(encoder.stderr,), daemon=True),
            )
            for thread in threads:
                thread.start()

            def write(frames: np.ndarray) -> None:
                if frames.dtype != np.uint8 or frames.shape[1:] != shape:
                    sides = ", ".join(map(str, shape))
                    raise ValueError(
                        f"frames are {frames.dtype} {frames.shape}, expected uint8 (N, {sides})"
                    )
                if not len(frames):
                    return
                # the rest of a video that cannot be written need not be made
                if encoder.poll() is not None:
                    raise _EncoderEnded
                waiting.put(frames)

            try:
                with suppress(_EncoderEnded):
                    yield write
                _finish(waiting, threads)
            except BaseException:
                encoder.kill()
                _finish(waiting, threads)
                raise
        if encoder.returncode:
            lines = b"".join(said).decode(errors="replace").strip().splitlines()
            raise OSError(f"{path} was not written: {lines[-1] if lines else 'ffmpeg failed'}")


def _finish(waiting: "Queue[np.ndarray | None]", threads: Iterable[Thread]) -> None:
    waiting.put(None)
    for thread in threads:
        thread.join()


class _EncoderEnded(Exception):
    """Before it was given all frames."""


def _feed(pipe: IO[bytes], waiting: "Queue[np.ndarray | None]") -> None:
    """Writes frames to an encoder until there is a None; takes them even where it has failed."""
    frames = waiting.get()
    try:
        # closing writes what is left
        with suppress(BrokenPipeError), pipe:
            while frames is not None:
                pipe.write(np.ascontiguousarray(frames).data.cast("B"))
                frames = waiting.get()
    finally:
        while frames is not None:
            frames = waiting.get()


def write_still(
    path: str | os.PathLike[str], frame: np.ndarray, metadata: Mapping[str, object]
) -> None:
    """uint8 (H, W, 3) -> a PNG with `metadata` as JSON in its text field "comment".

    Raises ValueError for a path that cannot be written.
    """
    fields = PngInfo()
    fields.add_itxt("comment", json.dumps(metadata, ensure_ascii=False))
    with _replace(path, STILL) as temporary:
        Image.fromarray(frame).save(temporary, pnginfo=fields)


@contextmanager
def _replace(path: str | os.PathLike[str], suffix: str) -> Iterator[Path]:
    """Give a temporary path; what was written there replaces `path` if the block ends well."""
    check_output(path)
    target = Path(path).resolve()
    if target.suffix.lower() != suffix:
        raise ValueError(f"{path}: the name must end in {suffix}")
    temporary = target.with_name(f".cmdgen-{secrets.token_hex(8)}{suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
