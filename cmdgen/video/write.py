"""Frames to a video file or to stdout, in any of `formats.FORMATS`; a still to a PNG.

Nothing is resized. A file appears whole or not at all; frames of a sequence do so one after another
when all of them are made. What is yuv420p is of limited range, chroma in the middle of four pixels,
and BT.709 where the format can tell.
"""

import json
import os
import re
import secrets
import select
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import IO

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image
from PIL.PngImagePlugin import PngInfo, putchunk

from cmdgen.video.formats import (
    CODECS,
    FORMATS,
    STDOUT,
    Encoding,
    Pixels,
    choose_encoding,
    list_frames,
    name_sidecar,
)

Target = str | os.PathLike[str]

# parts of a video that wait for the encoder, before who makes them has to
AHEAD = 8
# bytes of metadata: a prompt of 100 kB, twice, with every letter escaped
MOST_METADATA = 2**21
# where EXIF keeps what a user says, and in which letters
EXIF_IFD, USER_COMMENT, ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"

# tagged as well as used: players else guess the matrix from the frame's size
_TAGS = "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709,setsar=1"
_CONVERT = (
    "scale=out_color_matrix={}:out_range=tv:flags=accurate_rnd+full_chroma_int,format=yuv420p"
)
_BT709 = (
    *("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"),
    *("-color_range", "tv", "-pix_fmt", "yuv420p"),
)
# one palette for the clip, so that what does not move stays as it is; dots that do not crawl
_PALETTE = "split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=bayer:bayer_scale=4"
# what no player needs: when it was made, by which version of ffmpeg
_PLAIN = ("-fflags", "+bitexact", "-flags:v", "+bitexact")


class EncoderError(OSError):
    """A video could not be encoded or stored, in one line."""


def check_output(
    target: Target,
    encoding: Encoding | None = None,
    *,
    overwrite: bool,
    makes_folder: bool = False,
) -> None:
    """Raise where nothing could be written to `target`, a path or "-" for stdout.

    Its folder has to be there, unless it is to be made. ValueError says what is possible,
    FileExistsError that there is a file that is to be kept.
    """
    encoding = encoding or choose_encoding(os.fspath(target))
    if target == STDOUT:
        if sys.stdout is None or sys.stdout.closed:
            raise ValueError("stdout is closed")
        if sys.stdout.isatty():
            raise ValueError("stdout is a terminal: send the video to a file or a program")
        return
    path = Path(target)
    try:
        taken = list_taken(path, encoding)
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give the name of a file in it")
        if encoding.sidecar and name_sidecar(path).exists():
            taken.append(name_sidecar(path))
        if taken and not overwrite:
            raise _kept(taken[0])
        for file in taken:
            if file.exists() and not (file.is_file() and os.access(file, os.W_OK)):
                raise ValueError(f"{file} exists and may not be replaced: give another name")
        folder = Path(os.path.realpath(path)).parent
        if makes_folder:
            folder = next(each for each in (folder, *folder.parents) if each.exists())
        if not folder.is_dir():
            raise ValueError(f"{path}: there is no folder {folder}: make it first")
        # a nameless file: permissions alone do not tell what a mounted folder allows
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def list_taken(target: Path, encoding: Encoding) -> list[Path]:
    """What is there already of a video, one file of it at most; a sidecar is none."""
    if encoding.format == "frames":
        return list_frames(target)[:1]
    return [target] if target.is_symlink() or target.exists() else []


def _kept(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} exists and is kept: give another name, or overwrite it")


def write_video(
    target: Target,
    frames: np.ndarray,
    fps: float,
    metadata: Mapping[str, object] | None,
    encoding: Encoding | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """uint8 (T, H, W, 3) -> a video; raises what `open_video` raises."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(
            f"frames are {frames.dtype} {frames.shape}, expected uint8 (T, H, W, 3), T at least 1"
        )
    size = frames.shape[1], frames.shape[2]
    with open_video(target, size, fps, metadata, encoding, overwrite=overwrite) as write:
        write(frames)


def write_still(
    target: Target,
    frame: np.ndarray,
    metadata: Mapping[str, object] | None,
    encoding: Encoding | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """uint8 (H, W, 3) -> a PNG with `metadata` as JSON in its text field "comment".

    Raises ValueError or FileExistsError where it cannot be written to `target`, OSError where that
    fails.
    """
    encoding = encoding or choose_encoding(os.fspath(target))
    if encoding.format != "png":
        raise ValueError(f"{target}: a still is written as png, not as {encoding.format}")
    check_output(target, encoding, overwrite=overwrite)
    comment = _dump(metadata, encoding)
    with _new_file(Path(target), comment, encoding, overwrite) as temporary:
        Image.fromarray(frame).save(temporary, "PNG", pnginfo=_png_text(comment))


class Writer:
    """Takes the next frames of a video, uint8 (N, H, W, 3), or (N, 3 * H // 2, W) of yuv420p.

    It returns before they are encoded: they may not change.
    """

    def __init__(
        self,
        encoder: "subprocess.Popen[bytes]",
        waiting: "Queue[np.ndarray | None]",
        shape: tuple[int, ...],
        stdout: IO[bytes] | None,
    ) -> None:
        self._encoder, self._waiting = encoder, waiting
        self._shape, self._stdout = shape, stdout

    def __call__(self, frames: np.ndarray) -> None:
        if frames.dtype != np.uint8 or frames.shape[1:] != self._shape:
            raise ValueError(
                f"frames are {frames.dtype} {frames.shape}, expected uint8 "
                f"(N, {', '.join(map(str, self._shape))})"
            )
        if len(frames):
            self.check()
            self._waiting.put(frames)

    def check(self) -> None:
        """End a video that nobody will see: who makes it may ask as often as it likes."""
        if self._encoder.poll() is not None:
            raise _EncoderEnded
        if self._stdout is not None and _is_closed(self._stdout):
            raise BrokenPipeError("stdout was closed")


@contextmanager
def open_video(
    target: Target,
    size: tuple[int, int],
    fps: float,
    metadata: Mapping[str, object] | None,
    encoding: Encoding | None = None,
    *,
    overwrite: bool = False,
    pixels: Pixels = "rgb24",
) -> Iterator[Writer]:
    """Give a `Writer` of frames of `size` (H, W) to `target`, a path or "-" for stdout.

    The encoder starts at once; the file is there when the block has ended, and only if it ended
    well. `encoding` is by the suffix unless given. Frames in "yuv420p" are stored as they are.
    Raises ValueError for what cannot be, FileExistsError for a file that is to be kept,
    EncoderError where encoding or storing fails, BrokenPipeError where stdout is closed.
    """
    encoding = encoding or choose_encoding(os.fspath(target))
    kind = FORMATS[encoding.format]
    if kind.name in ("png", "safetensors"):
        raise ValueError(f"{target}: {kind.name} is no video")
    if pixels == "yuv420p" and (kind.pixels != pixels or size[0] % 2 or size[1] % 2):
        raise ValueError(f"{kind.name} of {size[1]}x{size[0]} does not take frames in yuv420p")
    encoding.check(size, fps)
    check_output(target, encoding, overwrite=overwrite)
    comment = _dump(metadata, encoding)
    # these need to be read whole before they are played, or changed when they are whole
    streams = target == STDOUT and kind.name not in _INSERT
    with ExitStack() as stack:
        stdout = _open_stdout() if target == STDOUT else None
        if streams:
            place = None
        elif target == STDOUT:
            place = stack.enter_context(_new_stream(kind.name, stdout))
        elif kind.name == "frames":
            place = stack.enter_context(_new_frames(Path(target), comment, encoding, overwrite))
        else:
            place = stack.enter_context(_new_file(Path(target), comment, encoding, overwrite))
        command = [
            *(get_ffmpeg_exe(), "-v", "error", "-y"),
            *("-f", "rawvideo", "-pix_fmt", pixels, "-s", f"{size[1]}x{size[0]}"),
            *("-r", str(fps), "-i", "-"),
        ]
        if comment and encoding.metadata and kind.comment and kind.name not in _INSERT:
            command += ["-f", "ffmetadata", "-i", f"file:{stack.enter_context(_tags(comment))}"]
            command += ["-map_metadata", "1"]
        command += _arguments(encoding, pixels, streams)
        if kind.name == "frames":
            command += ["%09d.png"]
        else:
            command += ["pipe:1" if streams else f"file:{place}"]
        shape = (*size, 3) if pixels == "rgb24" else (3 * size[0] // 2, size[1])
        folder = place if kind.name == "frames" else None
        with _encode(command, str(target), shape, stdout, streams=streams, folder=folder) as write:
            yield write
        if place is not None and kind.name in _INSERT:
            with _storing(str(target)):
                data = _INSERT[kind.name](place.read_bytes(), size, comment, encoding.loop)
                place.write_bytes(data)


def _arguments(encoding: Encoding, pixels: Pixels, streams: bool) -> list[str]:
    """What ffmpeg is told of its output, but its name."""
    name, codec = encoding.format, CODECS.get(encoding.codec_used)
    kept = ["-vf", _TAGS, *_BT709, *_PLAIN]
    converted = ["-vf", f"{_CONVERT.format('bt709')},{_TAGS}", *_BT709, *_PLAIN]
    yuv420p = kept if pixels == "yuv420p" else converted
    if name == "gif":
        # 0 is for ever here, and else how often it is repeated
        repeats = {0: 0, 1: -1}.get(encoding.loop, encoding.loop - 1)
        return ["-filter_complex", _PALETTE, "-loop", str(repeats), *_PLAIN, "-f", "gif"]
    if name == "webp":
        return ["-c:v", "libwebp_anim", "-pix_fmt", "bgra", "-quality", "90", *_PLAIN, "-f", "webp"]
    if name == "apng":
        return [*("-pix_fmt", "rgb24", "-plays", str(encoding.loop)), *_PLAIN, "-f", "apng"]
    if name == "frames":
        return ["-pix_fmt", "rgb24", *_PLAIN, "-f", "image2"]
    if name == "raw":
        return ["-pix_fmt", "rgb24", "-f", "rawvideo"]
    if name == "y4m":
        return ["-vf", f"{_CONVERT.format('bt601')},setsar=1", "-f", "yuv4mpegpipe"]
    assert codec is not None
    compress = list(codec.arguments)
    if codec.crf is not None:
        compress += ["-crf", str(codec.crf if encoding.crf is None else encoding.crf)]
    if encoding.codec_used == "ffv1" and pixels == "rgb24":
        return [*compress, "-pix_fmt", "bgr0", *_PLAIN, "-f", "matroska"]
    if name == "mp4":
        flags = "frag_keyframe+delay_moov+default_base_moof" if streams else "+faststart"
        tag = ["-tag:v", "hvc1"] if encoding.codec_used == "hevc" else []
        return [*compress, *yuv420p, *tag, "-movflags", flags, "-f", "mp4"]
    return [*compress, *yuv420p, "-f", {"mkv": "matroska"}.get(name, name)]


@contextmanager
def _encode(
    command: list[str],
    target: str,
    shape: tuple[int, ...],
    stdout: IO[bytes] | None,
    *,
    streams: bool,
    folder: Path | None,
) -> Iterator[Writer]:
    """Run ffmpeg, on the frames that the `Writer` takes, until it has ended well."""
    # in a session of its own: Ctrl-C reaches the encoder through us, which then remove its file
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if streams else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=folder,
        # errors alone, as of all others
        env={**os.environ, "SVT_LOG": "1"},
        start_new_session=True,
    ) as encoder:
        assert encoder.stdin is not None and encoder.stderr is not None
        waiting: Queue[np.ndarray | None] = Queue(AHEAD)
        said: list[bytes] = []
        failed: list[OSError] = []
        threads = [
            Thread(target=_feed, args=(encoder.stdin, waiting), daemon=True),
            # a pipe that nobody reads would stop the encoder when it is full
            Thread(target=said.extend, args=(encoder.stderr,), daemon=True),
        ]
        if streams:
            threads.append(Thread(target=_copy, args=(encoder, stdout, failed), daemon=True))
        for thread in threads:
            thread.start()
        try:
            with suppress(_EncoderEnded):
                yield Writer(encoder, waiting, shape, stdout)
            waiting.put(None)
            _join(threads)
        except BaseException:
            encoder.kill()
            waiting.put(None)
            # one that writes to who does not read would wait for ever
            _join(threads, seconds=2)
            raise
    if failed and isinstance(failed[0], BrokenPipeError):
        raise failed[0]
    if failed:
        raise EncoderError(f"stdout was not written: {failed[0].strerror}") from failed[0]
    if encoder.returncode:
        lines = b"".join(said).decode(errors="replace").strip().splitlines()
        # without which part of ffmpeg says so
        why = re.sub(r"^\[[^\]]*\] ", "", lines[-1]) if lines else "ffmpeg failed"
        raise EncoderError(f"{target} was not written: {why}")


def _join(threads: Iterable[Thread], *, seconds: float | None = None) -> None:
    for thread in threads:
        thread.join(seconds)


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


def _copy(encoder: "subprocess.Popen[bytes]", stdout: IO[bytes], failed: list[OSError]) -> None:
    """Passes on what an encoder makes, as it comes; ends it where that cannot be."""
    assert encoder.stdout is not None
    try:
        while part := os.read(encoder.stdout.fileno(), 2**20):
            _write(stdout, part)
    except OSError as error:
        failed.append(error)
        encoder.kill()


def _open_stdout() -> IO[bytes]:
    """Stdout without Python's buffer, where it has a number: a closed pipe leaves nothing in it."""
    sys.stdout.flush()
    try:
        number = sys.stdout.fileno()
    except OSError:
        return sys.stdout.buffer
    return open(number, "wb", buffering=0, closefd=False)


def _write(stdout: IO[bytes], part: bytes) -> None:
    rest = memoryview(part)
    while rest:
        rest = rest[stdout.write(rest) :]


def _is_closed(stdout: IO[bytes]) -> bool:
    """Whether nobody reads it any more; False where that cannot be told."""
    if not hasattr(select, "poll"):
        return False
    try:
        number = stdout.fileno()
    except OSError:
        return False
    poll = select.poll()
    poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _dump(metadata: Mapping[str, object] | None, encoding: Encoding) -> str:
    """Metadata in one line of JSON, empty where there is to be none."""
    if metadata is None or not encoding.metadata:
        return ""
    text = json.dumps(metadata, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    if (length := len(text.encode())) > MOST_METADATA:
        raise ValueError(f"metadata of {length} bytes: at most {MOST_METADATA} can be kept")
    return text


@contextmanager
def _tags(comment: str) -> Iterator[Path]:
    """A file for ffmpeg to read `comment` from: an argument is too short for a long prompt."""
    escaped = re.sub(r"([=;#\\\n])", r"\\\1", comment)
    with tempfile.TemporaryDirectory(prefix="cmdgen-") as folder:
        path = Path(folder) / "metadata"
        path.write_text(f";FFMETADATA1\ncomment={escaped}\n", encoding="utf-8", newline="\n")
        yield path


def _ascii(comment: str) -> bytes:
    """The same JSON in the letters that GIF and EXIF allow."""
    return json.dumps(json.loads(comment), separators=(",", ":")).encode()


def _png_text(comment: str) -> PngInfo:
    fields = PngInfo()
    if comment:
        fields.add_itxt("comment", comment)
    return fields


def _insert_gif(data: bytes, size: tuple[int, int], comment: str, loop: int) -> bytes:
    """Puts a comment before the first picture of a GIF."""
    if not comment:
        return data
    # a header of 13 bytes and its palette
    place = 13 + (3 << (data[10] & 7) + 1 if data[10] & 128 else 0)
    # behind what says how often it plays
    while data[place : place + 2] == b"\x21\xff":
        place += 2
        while length := data[place]:
            place += length + 1
        place += 1
    text = _ascii(comment)
    parts = [text[i : i + 255] for i in range(0, len(text), 255)]
    blocks = b"".join(bytes([len(part)]) + part for part in parts)
    return data[:place] + b"\x21\xfe" + blocks + b"\0" + data[place:]


def _insert_apng(data: bytes, size: tuple[int, int], comment: str, loop: int) -> bytes:
    """Puts a text field behind the header of a PNG."""
    chunks = BytesIO()
    for name, content, _ in _png_text(comment).chunks:
        putchunk(chunks, name, content)
    return data[:33] + chunks.getvalue() + data[33:]


def _insert_webp(data: bytes, size: tuple[int, int], comment: str, loop: int) -> bytes:
    """Puts how often it plays and an EXIF user comment into a WebP."""
    body = bytearray(data[12:])
    if body[:4] != b"VP8X":
        # a video of one picture was made a simple still
        sides = b"".join(struct.pack("<I", side - 1)[:3] for side in reversed(size))
        body[:0] = struct.pack("<4sII", b"VP8X", 10, 0) + sides
    if body[18:22] == b"ANIM":
        body[30:32] = struct.pack("<H", loop)
    if comment:
        exif = Image.Exif()
        exif[EXIF_IFD] = {USER_COMMENT: ASCII + _ascii(comment)}
        content = exif.tobytes().removeprefix(b"Exif\0\0")
        body[8] |= 8
        body += struct.pack("<4sI", b"EXIF", len(content)) + content + b"\0" * (len(content) % 2)
    return struct.pack("<4sI4s", b"RIFF", 4 + len(body), b"WEBP") + body


# what ffmpeg does not write; these files are read again when they are whole
_INSERT = {"gif": _insert_gif, "apng": _insert_apng, "webp": _insert_webp}


@contextmanager
def _new_file(target: Path, comment: str, encoding: Encoding, overwrite: bool) -> Iterator[Path]:
    """Give a temporary path; what was written there becomes `target` if the block ends well."""
    place = Path(os.path.realpath(target))
    with _beside(place, comment, encoding, overwrite):
        temporary = _temporary(place)
        try:
            yield temporary
            with _storing(str(target)):
                _move(temporary, place, overwrite)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _new_frames(target: Path, comment: str, encoding: Encoding, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder; the files in it become the sequence `target` in place of the old."""
    place = Path(os.path.realpath(target.parent)) / target.name
    with (
        _beside(place, comment, encoding, overwrite),
        tempfile.TemporaryDirectory(prefix=".cmdgen-", dir=place.parent) as folder,
    ):
        yield Path(folder)
        old = list_frames(place) if overwrite else []
        made: list[Path] = []
        try:
            for number, file in enumerate(sorted(Path(folder).iterdir()), 1):
                made.append(place.with_name(place.name % number))
                with _storing(str(target)):
                    _move(file, made[-1], overwrite)
        except OSError:
            for file in made[:-1]:
                file.unlink()
            raise
        for file in set(old) - set(made):
            file.unlink()


@contextmanager
def _new_stream(name: str, stdout: IO[bytes] | None) -> Iterator[Path]:
    """Give a temporary path; what was written there goes to stdout if the block ends well."""
    with tempfile.TemporaryDirectory(prefix="cmdgen-") as folder:
        temporary = Path(folder) / name
        yield temporary
        assert stdout is not None
        with _storing("stdout"):
            _write(stdout, temporary.read_bytes())


@contextmanager
def _beside(place: Path, comment: str, encoding: Encoding, overwrite: bool) -> Iterator[None]:
    """Around the writing of a file: its sidecar, if it is to have one, appears after it.

    One that tells of what was replaced goes.
    """
    sidecar = name_sidecar(place)
    if not (encoding.sidecar and comment):
        yield
        if overwrite and _is_sidecar(sidecar):
            with _storing(str(sidecar)):
                sidecar.unlink()
        return
    temporary = _temporary(sidecar)
    try:
        with _storing(str(sidecar)):
            temporary.write_text(comment + "\n", encoding="utf-8", newline="\n")
        yield
        with _storing(str(sidecar)):
            _move(temporary, sidecar, overwrite)
    finally:
        temporary.unlink(missing_ok=True)


def _is_sidecar(path: Path) -> bool:
    """Whether it is metadata that cmdgen wrote, not anything else of such a name."""
    try:
        if path.stat().st_size > 2 * MOST_METADATA:
            return False
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "cmdgen" in found


def _temporary(place: Path) -> Path:
    return place.with_name(f".cmdgen-{secrets.token_hex(8)}{place.suffix}")


@contextmanager
def _storing(name: str) -> Iterator[None]:
    """Around what a full disk stops: says what was not written."""
    try:
        yield
    except (BrokenPipeError, FileExistsError):
        raise
    except OSError as error:
        raise EncoderError(f"{name} was not written: {error.strerror or error}") from error


def _move(temporary: Path, place: Path, overwrite: bool) -> None:
    """Give a file its name; one that took the name meanwhile is kept unless `overwrite`."""
    if not overwrite:
        try:
            # unlike a rename, fails where there is one
            os.link(temporary, place)
            return
        except FileExistsError:
            raise _kept(place) from None
        except OSError:
            # a disk without links
            if place.exists():
                raise _kept(place) from None
    os.replace(temporary, place)
