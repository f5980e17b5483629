"""Frames to a video file or to stdout, in any of `formats.FORMATS`; a still to a PNG.

Nothing is resized. Files appear whole or not at all: a video, the frames of a sequence and a
sidecar get their names together, when all of them are made. yuv420p is of limited range, with
chroma in the middle of four pixels, and BT.709 where the format can say so.
"""

import json
import os
import re
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from errno import ELOOP, ENOENT, ENOTDIR
from functools import cached_property, lru_cache
from io import BufferedWriter
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cmdgen.files import kept, publish, read_json, replace_with, temporary_folder
from cmdgen.video.ffmpeg import run_ffmpeg
from cmdgen.video.formats import STDOUT, Encoding, Pixels, choose_encoding, is_stream, list_frames, name_sidecar

Target = str | os.PathLike[str]
Metadata = Mapping[str, object] | None

# frames that wait in ffmpeg for its encoder, before the caller has to wait
AHEAD = 64
# bytes of metadata: a prompt of 100 kB, twice, with every letter escaped
MOST_METADATA = 2**21
# where EXIF keeps the comment of a user, and the name of its encoding
EXIF_IFD, USER_COMMENT, ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"


class EncoderError(OSError):
    """A video could not be encoded or stored, in one line."""


@dataclass(frozen=True)
class Output:
    """A video or a still: where it goes, what its frames are, and what describes it."""

    # a path, or "-" for stdout
    name: Target
    size: tuple[int, int]
    fps: float = 1
    metadata: Metadata = None
    # None: by the suffix
    chosen: Encoding | None = None
    overwrite: bool = False
    pixels: Pixels = "rgb24"

    @property
    def target(self) -> str:
        """Return the path as text."""
        return os.fspath(self.name)

    @cached_property
    def encoding(self) -> Encoding:
        """Return how it is written."""
        return self.chosen or choose_encoding(self.target)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one frame as an array."""
        height, width = self.size
        return (height, width, 3) if self.pixels == "rgb24" else (3 * height // 2, width)

    @cached_property
    def comment(self) -> str:
        """Return the metadata as one line of JSON, empty where there is to be none."""
        if self.metadata is None or not self.encoding.metadata:
            return ""
        text = json.dumps(self.metadata, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        if (length := len(text.encode())) > MOST_METADATA:
            raise ValueError(f"metadata of {length} bytes: at most {MOST_METADATA} can be kept")
        return text

    @property
    def ascii_comment(self) -> bytes:
        """Return the same JSON in ASCII, which GIF and EXIF require."""
        return json.dumps(json.loads(self.comment), separators=(",", ":")).encode()

    @property
    def storage(self) -> str:
        """Return how the file keeps the comment, empty where there is none."""
        return self.encoding.kind.metadata if self.comment else ""


def check_output(
    target: Target, encoding: Encoding | None = None, *, overwrite: bool, makes_folder: bool = False
) -> None:
    """Raise where nothing could be written to `target`, a path or "-" for stdout.

    Its folder has to exist, unless `makes_folder`. ValueError says what is possible,
    FileExistsError names a file that is kept.
    """
    encoding = encoding or choose_encoding(os.fspath(target))
    if target == STDOUT:
        if sys.stdout is None or sys.stdout.closed:
            raise ValueError("stdout is closed")
        if sys.stdout.isatty():
            raise ValueError("stdout is a terminal: send the video to a file or a program")
        return
    if is_stream(os.fspath(target)):
        if not os.access(target, os.W_OK):
            raise ValueError(f"{target} may not be written to")
        return
    path, taken = os.path.abspath(target), []
    try:
        # unlike os.path.exists, this raises for a name that is too long
        if _is_there(path):
            taken = [Path(target)]
        if os.path.isdir(path):
            raise ValueError(f"{target} is a folder: give the name of a file in it")
        if encoding.format == "frames":
            # of a sequence one file will do
            taken = list_frames(Path(target))[:1]
        if encoding.sidecar and os.path.exists(name_sidecar(Path(path))):
            taken.append(name_sidecar(Path(target)))
        for file in taken:
            if not overwrite:
                raise kept(file)
            if file.exists() and not (file.is_file() and os.access(file, os.W_OK)):
                raise ValueError(f"{file} exists and may not be replaced: give another name")
        # what a symlink points to is written
        _check_folder(os.path.dirname(os.path.realpath(path) if taken else path), makes_folder)
    except FileExistsError:
        raise
    except OSError as error:
        raise ValueError(f"{target}: {error.strerror}") from error


def _is_there(path: str) -> bool:
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno not in (ENOENT, ENOTDIR, ELOOP):
            raise
        return False
    return True


@lru_cache(256)
def _check_folder(name: str, makes_folder: bool) -> None:
    """Raise OSError where no file can be made in a folder; asked once for the files of a batch."""
    folder = Path(os.path.realpath(name))
    if makes_folder:
        folder = next(each for each in (folder, *folder.parents) if each.exists())
    if not folder.is_dir():
        raise NotADirectoryError(ENOTDIR, f"there is no folder {folder}: make it first")
    # a nameless file: permissions alone do not tell what a mounted folder allows
    tempfile.TemporaryFile(dir=folder).close()


def write_still(
    target: Target, frame: np.ndarray, metadata: Metadata, encoding: Encoding | None = None, *, overwrite: bool = False
) -> None:
    """uint8 (H, W, 3) -> a PNG with `metadata` as JSON in its text field "comment".

    Raises what `open_video` raises.
    """
    output = Output(target, frame.shape[:2], 1, metadata, encoding, overwrite)
    if output.encoding.format != "png":
        raise ValueError(f"{target}: a still is written as png, not as {output.encoding.format}")
    with _open(output) as write:
        write(frame[None])


def open_video(output: Output) -> AbstractContextManager["Writer"]:
    """Return a context that gives a `Writer` of the frames of a video.

    The encoder starts with the block; the file is there when the block has ended, and only if it
    ended well. Frames in "yuv420p" are stored as they are. Raises ValueError for what is not
    possible, FileExistsError for a file that is kept, EncoderError where encoding or storing fails,
    BrokenPipeError where stdout is closed.
    """
    kind, (height, width) = output.encoding.kind, output.size
    if not kind.video:
        raise ValueError(f"{output.target}: {kind.name} is no video")
    if output.pixels == "yuv420p" and (kind.pixels != "yuv420p" or height % 2 or width % 2):
        raise ValueError(f"{kind.name} of {width}x{height} does not take frames in yuv420p")
    output.encoding.check(output.size, output.fps)
    return _open(output)


class _EncoderEnded(Exception):
    """The encoder ended before it had all frames."""


@dataclass
class Writer:
    """Take the next frames of a video, uint8 (N, H, W, 3), or (N, 3 * H // 2, W) in yuv420p.

    It returns before they are encoded: they may not change.
    """

    shape: tuple[int, ...]
    put: Callable[[Any], object]
    stdout: IO[bytes] | None
    encoder: "subprocess.Popen[bytes] | None" = None
    count: int = 0

    def __call__(self, frames: np.ndarray) -> None:
        if frames.dtype != np.uint8 or frames.shape[1:] != self.shape:
            raise ValueError(
                f"frames are {frames.dtype} {frames.shape}, expected uint8 (N, {', '.join(map(str, self.shape))})"
            )
        if len(frames):
            self.check()
            try:
                self.put(np.ascontiguousarray(frames))
            except BrokenPipeError:
                # the exit code of the encoder says why
                raise _EncoderEnded from None
            self.count += len(frames)

    def check(self) -> None:
        """End the block where nobody will see the video; cheap enough to call at every step."""
        if self.encoder is not None and self.encoder.poll() is not None:
            raise _EncoderEnded
        if self.stdout is not None and _is_closed(self.stdout):
            raise BrokenPipeError("stdout was closed")


@contextmanager
def _open(output: Output) -> Iterator[Writer]:
    """Give what takes the frames; the files get their names when the block has ended well."""
    check_output(output.target, output.encoding, overwrite=output.overwrite)
    # refuses metadata that cannot be kept, before anything is made
    _ = output.comment
    path, kind = Path(output.target), output.encoding.kind
    # what a symlink points to is replaced, not the link
    place = path.parent.resolve() / path.name if kind.name == "frames" else path.resolve()
    with ExitStack() as stack:
        stdout = _open_stdout() if output.target == STDOUT else None
        if stdout is None and is_stream(output.target):
            # waits for a reader
            stdout = stack.enter_context(path.open("wb"))
        with _storing(output.target):
            clip = stack.enter_context(temporary_folder(None if stdout else place.parent)) / "clip"
        encode = _encode_video if kind.muxer else _encode_pictures
        with encode(output, clip, stdout) as write:
            yield write
            if not write.count:
                raise ValueError(f"{output.target} was not written: it has no frames")
        with _storing("stdout" if stdout else output.target):
            if stdout is None:
                _move_all(output, clip, place)
            elif clip.exists():
                stdout.write(clip.read_bytes())
                stdout.flush()


@contextmanager
def _encode_pictures(output: Output, clip: Path, stdout: IO[bytes] | None) -> Iterator[Writer]:
    """Collect the frames, and write a PNG, APNG or WebP when the block has ended well.

    A frame equal to the one before is not stored again: that one is shown for longer.
    """
    parts: list[np.ndarray] = []
    yield Writer(output.shape, parts.append, stdout)
    # takes time to import, and most videos do without
    from imageio.v3 import imwrite

    frames = np.concatenate(parts)
    ends = [round(1000 * number / output.fps) for number in range(len(frames) + 1)]
    options: dict[str, Any] = {"loop": output.encoding.loop, "quality": 90, "method": 4}
    options["duration"] = [end - start for start, end in pairwise(ends)]
    if output.storage == "text":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("comment", output.comment)
    if output.storage == "exif":
        options["exif"] = Image.Exif()
        options["exif"][EXIF_IFD] = {USER_COMMENT: ASCII + output.ascii_comment}
    suffix = output.encoding.kind.suffixes[0]
    with _storing(output.target):
        clip.write_bytes(imwrite("<bytes>", frames, plugin="pillow", extension=suffix, **options))


@contextmanager
def _encode_video(output: Output, clip: Path, stdout: IO[bytes] | None) -> Iterator[Writer]:
    """Run ffmpeg on the frames that the `Writer` takes, until it has ended well."""
    kind, (height, width) = output.encoding.kind, output.size
    # where stdout has no number, the video goes there when it is whole
    streams = kind.stdout == "live" and isinstance(stdout, BufferedWriter)
    frames = f"-f rawvideo -pix_fmt {output.pixels} -s {width}x{height} -r {output.fps} -i pipe:0"
    arguments = [*f"-v error -thread_queue_size {AHEAD}".split(), *frames.split()]
    if output.storage == "tag":
        # a file: an argument is too short for a long prompt
        tags = clip.with_name("tags")
        escaped = re.sub(r"([=;#\\\n])", r"\\\1", output.comment)
        tags.write_text(f";FFMETADATA1\ncomment={escaped}\n", encoding="utf-8", newline="\n")
        arguments += ["-f", "ffmetadata", "-i", f"file:{tags}", "-map_metadata", "1"]
    arguments += output.encoding.choose_arguments(output.pixels, streams=streams)
    if kind.name == "frames":
        arguments += [f"file:{str(clip.parent).replace('%', '%%')}/%09d.png"]
    else:
        arguments += ["pipe:1" if streams else f"file:{clip}"]
    target = stdout if streams and stdout else subprocess.DEVNULL
    with run_ffmpeg(*arguments, stdin=subprocess.PIPE, stdout=target) as (encoder, log):
        assert encoder.stdin is not None
        try:
            with suppress(_EncoderEnded):
                yield Writer(output.shape, encoder.stdin.write, stdout, encoder)
        except BaseException:
            encoder.kill()
            raise
        finally:
            # closing writes what is left
            with suppress(BrokenPipeError):
                encoder.stdin.close()
    if encoder.returncode:
        if streams and stdout and _is_closed(stdout):
            raise BrokenPipeError("stdout was closed")
        # without the part of ffmpeg that says so
        lines = log.decode(errors="replace").strip().splitlines() or ["ffmpeg failed"]
        why = lines[-1].rpartition(": " if streams else "] ")[2]
        raise EncoderError(f"{'stdout' if streams else output.target} was not written: {why}")
    if output.storage == "comment":
        with _storing(output.target):
            clip.write_bytes(_add_comment(clip.read_bytes(), output.ascii_comment))


def _open_stdout() -> IO[bytes]:
    """Return stdout, apart from Python's buffer, which would keep what cannot be written."""
    sys.stdout.flush()
    with suppress(OSError):
        return open(sys.stdout.fileno(), "wb", closefd=False)
    return sys.stdout.buffer


def _is_closed(stdout: IO[bytes]) -> bool:
    """Return whether nobody reads it any more; False where the system cannot tell."""
    with suppress(OSError, AttributeError):
        poll = select.poll()
        poll.register(stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


def _add_comment(data: bytes, comment: bytes) -> bytes:
    """Put a comment before the first frame of a GIF: neither ffmpeg nor imageio can."""
    # behind a header of 13 bytes, the palette, and the block that says how often it plays
    place = 13 + (3 << (data[10] & 7) + 1 if data[10] & 128 else 0)
    if data[place : place + 2] == b"\x21\xff":
        place += 19
    parts = [comment[start : start + 255] for start in range(0, len(comment), 255)]
    blocks = b"".join(bytes([len(part)]) + part for part in parts)
    return data[:place] + b"\x21\xfe" + blocks + b"\0" + data[place:]


def _move_all(output: Output, clip: Path, place: Path) -> None:
    """Give all files of an output their names, or none; remove what they replace."""
    moves, sidecar = {clip: place}, name_sidecar(place)
    old = [sidecar] if is_sidecar(sidecar) else []
    if output.encoding.format == "frames":
        old += list_frames(place)
        made = sorted(clip.parent.glob("*.png"))
        moves = {file: place.with_name(place.name % i) for i, file in enumerate(made, 1)}
    if output.encoding.sidecar and output.comment:
        metadata = clip.with_name("sidecar")
        metadata.write_text(output.comment + "\n", encoding="utf-8", newline="\n")
        # a new clip is never without it, and it is never that of an old clip
        moves = moves | {metadata: sidecar} if output.overwrite else {metadata: sidecar} | moves
    publish(moves, overwrite=output.overwrite, old=old if output.overwrite else [])


def write_sidecar(target: Path, metadata: Mapping[str, Any]) -> None:
    """Write the sidecar that a clip, which holds these metadata, lacks."""
    with _storing(name_sidecar(target)), replace_with(name_sidecar(target), overwrite=False) as temporary:
        text = json.dumps(metadata, ensure_ascii=False, separators=(",", ":"))
        temporary.write_text(text + "\n", encoding="utf-8", newline="\n")


def is_sidecar(path: Path) -> bool:
    """Return whether a file is a sidecar that cmdgen wrote: any other of its name is none of ours."""
    with suppress(ValueError):
        return "cmdgen" in read_json(path, limit=2 * MOST_METADATA)
    return False


@contextmanager
def _storing(name: Target) -> Iterator[None]:
    """Turn an error of the disk into one line that says what was not written."""
    try:
        yield
    except (BrokenPipeError, FileExistsError):
        raise
    except OSError as error:
        raise EncoderError(f"{name} was not written: {error.strerror or error}") from error
