"""Small MP4 files decoded by PyAV (extra `av`): the frames of `read_clip`, without a start of ffmpeg for each.

Only plain ones: H.264, HEVC, VP9 or AV1, whose standards say every bit, in 8-bit 4:2:0 of limited range, upright,
progressive, SDR, undamaged, and long enough. Of any other file the answer is None, and ffmpeg decides.

Files are untrusted: they are decoded in processes of their own, with limits of memory and time.
"""

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from io import BufferedReader, BytesIO
from itertools import chain
from threading import Timer
from typing import TYPE_CHECKING, Any

import numpy as np

from cmdgen.video.read import HD, SQUARE, UNTAGGED_HD, fit, limit_memory, set_rate

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.filter import Graph
    from av.video import VideoStream

# bytes of a file: beside the decoding of a larger one a start of ffmpeg is short
MOST_BYTES = 2**26
# of a frame: 4096x2048
_MOST_PIXELS = 2**23
# until a clip is left to ffmpeg
_MOST_SECONDS = 30
_CODECS = ("h264", "hevc", "vp9", "av1", "libdav1d")
# FFmpeg's numbers: BT.709, unspecified, and two of BT.601; unspecified and limited; unknown and progressive
_UNSPECIFIED = 2
_SDR = {1, _UNSPECIFIED, 5, 6}
_LIMITED = (0, 1)
_PROGRESSIVE = (0, 1)
# bytes of the file, how many frames, their height and width (0: count them), and how many in a second
_REQUEST = struct.Struct("<QIIId")
# how many frames, -1 where the file is not plain; frames follow
_ANSWER = struct.Struct("<i")


class Decoders:
    """Processes that decode: a call takes one that is idle, or starts one. They end with this process."""

    def __init__(self) -> None:
        self._idle: list[subprocess.Popen[bytes]] = []
        self._works = find_spec("av") is not None

    def read(self, data: bytes, *, frames: int, size: tuple[int, int], fps: float) -> np.ndarray | None:
        """Return the frames of a plain MP4, uint8 (T, H, W, 3), as `read_clip` does; None of another file."""
        clip = np.empty((frames, *size, 3), np.uint8)
        return clip if self._ask(data, _REQUEST.pack(len(data), frames, *size, fps), clip) == frames else None

    def count(self, data: bytes, fps: float, most: int) -> int | None:
        """Return how many frames at `fps` a plain MP4 holds, as `count_frames` does; None of another file."""
        count = self._ask(data, _REQUEST.pack(len(data), most, 0, 0, fps))
        return None if count < 0 else count

    def _ask(self, data: bytes, request: bytes, clip: np.ndarray | None = None) -> int:
        """Return what a process answers, and fill `clip` with what follows; -1 where nobody answers."""
        # what crops the picture is hidden from PyAV
        if not self._works or data[4:8] != b"ftyp" or len(data) > MOST_BYTES or b"clap" in data:
            return -1
        try:
            process = self._idle.pop()
        except IndexError:
            process = _start()
        assert process.stdin is not None and isinstance(process.stdout, BufferedReader)
        timer = Timer(_MOST_SECONDS, process.kill)
        timer.start()
        try:
            process.stdin.write(request + data)
            process.stdin.flush()
            (count,) = _ANSWER.unpack(process.stdout.read(_ANSWER.size))
            if count > 0 and clip is not None and process.stdout.readinto(clip.data.cast("B")) < clip.nbytes:
                raise EOFError
        # it was killed, for its time or by the file
        except (OSError, EOFError, struct.error):
            process.kill()
            process.wait()
            return -1
        finally:
            timer.cancel()
        self._idle.append(process)
        return int(count)


def _start() -> "subprocess.Popen[bytes]":
    # the modules of this process, and none of the current folder; Ctrl-C reaches us alone
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,
    )
    limit_memory(process.pid)
    return process


def _serve() -> None:
    """Answer requests until there are no more."""
    with os.fdopen(os.dup(1), "wb") as answers:
        # whatever a library prints is no answer
        os.dup2(2, 1)
        while len(request := sys.stdin.buffer.read(_REQUEST.size)) == _REQUEST.size:
            size, frames, height, width, fps = _REQUEST.unpack(request)
            data = sys.stdin.buffer.read(size)
            clip = b""
            try:
                if height:
                    clip, count = _decode(data, frames, (height, width), fps), frames
                else:
                    count = _count(data, frames, fps)
            # of these are most of PyAV's own, and of one that is too old; with others this process ends
            except (AttributeError, ImportError, OSError, ValueError, MemoryError):
                count = -1
            answers.write(_ANSWER.pack(count) + clip)
            answers.flush()


@contextmanager
def _open(data: bytes) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """Give the container of a plain MP4 and its only video; ValueError of another file."""
    import av

    with av.open(BytesIO(data), "r", options={"format_whitelist": "mov", "max_pixels": str(_MOST_PIXELS)}) as container:
        (stream,) = container.streams.video
        codec = stream.codec_context
        plain = (
            container.duration,
            codec.name in _CODECS,
            codec.width * codec.height <= _MOST_PIXELS,
            codec.pix_fmt == "yuv420p",
            codec.color_range in _LIMITED,
            codec.field_order in _PROGRESSIVE,
            {codec.colorspace, codec.color_primaries, codec.color_trc} <= _SDR,
            {stream.sample_aspect_ratio or 1, codec.sample_aspect_ratio or 1} == {1},
            not stream.disposition & av.stream.Disposition.attached_pic,
        )
        if not all(plain):
            raise ValueError
        yield container, stream


def _count(data: bytes, most: int, fps: float) -> int:
    with _open(data) as (container, _):
        # in hundredths of a second, as ffmpeg prints it
        return min(most, round(((container.duration or 0) + 5000) // 10_000 / 100 * fps))


def _decode(data: bytes, frames: int, size: tuple[int, int], fps: float) -> bytes:
    """Return frames as `read_clip` makes them; ValueError of a file that is not plain."""
    import av

    with _open(data) as (container, stream):
        codec = stream.codec_context
        codec.options, codec.thread_count = {"max_pixels": str(_MOST_PIXELS)}, 1
        untagged = {codec.colorspace, codec.color_primaries, codec.color_trc} == {_UNSPECIFIED}
        colours = [UNTAGGED_HD] if untagged and codec.height >= HD else []
        graph, former = None, None
        clip: list[bytes] = []
        for frame in chain(container.decode(stream), [None]):
            if frame is not None:
                _check(frame, former)
                former = frame
                graph = graph or _build(frame, [*set_rate(fps, frames), *colours, *SQUARE])
            if graph is None:
                # a file without frames
                break
            graph.vpush(frame)
            try:
                while len(clip) < frames:
                    clip.append(fit(graph.vpull().to_ndarray(), size).tobytes())
                return b"".join(clip)
            except (av.BlockingIOError, av.EOFError):
                continue
    raise ValueError


def _check(frame: "VideoFrame", former: "VideoFrame | None") -> None:
    """Raise ValueError of a frame that is not plain, or unlike the one before."""
    looks = [(f.width, f.height, f.format.name, f.colorspace, f.color_range) for f in (frame, former or frame)]
    # PyAV's stub knows one of them alone
    sides: Any = frame.side_data
    turned = any(side.type.name == "DISPLAYMATRIX" for side in sides)
    # without a time or a length, ffmpeg guesses
    before = None if former is None else former.pts
    timed = frame.pts is not None and frame.duration > 0 and (before is None or frame.pts > before)
    if looks[0] != looks[1] or turned or not timed or frame.interlaced_frame or frame.is_corrupt:
        raise ValueError


def _build(frame: "VideoFrame", filters: list[str]) -> "Graph":
    """Return ffmpeg's filters for frames like this one."""
    from av.filter import Graph

    size, base = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}", frame.time_base
    graph = Graph()
    graph.threads = 1
    colours = f"colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
    names = [f"buffer={size}:time_base={base}:pixel_aspect=1/1:{colours}", *filters, "buffersink="]
    graph.link_nodes(*(graph.add(*name.split("=", 1)) for name in names)).configure()
    return graph


if __name__ == "__main__":
    _serve()
