"""Video and picture files to frames, and the metadata that `video.write` put into a file.

What is read comes from strangers: a file is opened alone, whatever others it names, and what it
takes of memory and time has a limit. Untagged colours are taken for BT.601, as ffmpeg does.
"""

import json
import math
import os
import re
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import count, islice
from pathlib import Path
from threading import Event, Thread, Timer
from time import monotonic
from typing import IO, Any

import numpy as np
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageOps

from cmdgen.video.formats import list_frames, name_sidecar
from cmdgen.video.write import ASCII, EXIF_IFD, USER_COMMENT

# of one picture: 8192x8192
MOST_PIXELS = 2**26
# bytes of a file that Pillow may read whole
MOST_PICTURE = 2**28
# bytes at the start of a file in which metadata is looked for
MOST_HEAD = 2**23
# bytes that ffmpeg may ask for: pictures of MOST_PIXELS wait in several places
MOST_MEMORY = 2**32
# until a file must have been read
MOST_SECONDS = 120

# containers that hold all that they show: a playlist names other files, and addresses
_CONTAINERS = (
    "mov,matroska,avi,flv,mpeg,mpegvideo,mpegts,ogg,asf,ivf,nut,yuv4mpegpipe,h264,hevc,obu,m4v,dv"
)
_PICTURES = {b"\x89PNG": "PNG", b"GIF8": "GIF", b"RIFF": "WEBP", b"\xff\xd8\xff": "JPEG"}
# what Pillow raises on its way through a broken file
_BROKEN = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(struct.error, zlib.error),
)
# pixels as wide as they are high, by making the longer side shorter
_SQUARE = (
    "scale=w='if(gt(sar,1),iw,max(1,round(iw*sar)))':h='if(gt(sar,1),max(1,round(ih/sar)),ih)'"
    ":flags=bicubic+accurate_rnd+full_chroma_int,format=rgb24"
)
# frames, and how many seconds each is shown
_Shown = Generator[tuple[np.ndarray, float], None, None]


@dataclass(frozen=True)
class Source:
    """What a file holds that a clip was read from.

    `width` and `height` are as it is shown: turned upright, with square pixels. `fps` is the mean,
    None for a still or a sequence of pictures, `seconds` the whole length, None where it is not
    known. `held` counts the frames at the clip's end that repeat the last one for want of more.
    """

    width: int
    height: int
    fps: float | None
    seconds: float | None
    held: int

    def __str__(self) -> str:
        """1920x1080, 29.97 fps, 12.4 s."""
        rate = [] if self.fps is None else [f"{self.fps:.4g} fps"]
        length = [] if self.seconds is None else [f"{self.seconds:.4g} s"]
        return ", ".join((f"{self.width}x{self.height}", *rate, *length))


@dataclass
class _About:
    """What has become known of a file: its frames per second, and its length in seconds."""

    fps: float | None = None
    seconds: float | None = None


def read_clip(
    path: str | os.PathLike[str], *, frames: int, size: tuple[int, int], fps: float | None
) -> tuple[np.ndarray, Source]:
    """A video, picture or sequence (%04d.png) -> uint8 (T, H, W, 3) from its start, and its source.

    Each frame is what the file shows in the middle of its time, resized by `fit`; with `fps` None,
    the file's frames one by one. A still is repeated, the last frame of a short video held.
    Raises ValueError, in one line, for a file that cannot be read, FileNotFoundError for none.
    """
    clip = np.empty((frames, *size, 3), np.uint8)
    width = height = made = 0
    last: np.ndarray | None = None
    with _open(path, fps, frames) as (shown, about):
        for frame in islice(shown, frames):
            clip[made] = clip[made - 1] if frame is last else fit(frame, size)
            height, width, _ = frame.shape
            last, made = frame, made + 1
    if not made:
        raise ValueError(f"{path} is not a readable video or picture")
    clip[made:] = clip[made - 1]
    return clip, Source(width, height, about.fps, about.seconds, frames - made)


def read_video(
    path: str | os.PathLike[str], *, max_frames: int | None = None
) -> tuple[np.ndarray, float]:
    """A file -> uint8 (T, H, W, 3) and its frames per second; the first `max_frames` if given.

    Raises ValueError, in one line, for a file that cannot be read, FileNotFoundError for none.
    """
    with _open(path, None, max_frames) as (shown, about):
        frames = list(islice(shown, max_frames))
    if not frames or len({frame.shape for frame in frames}) != 1:
        raise ValueError(f"{path} is not a readable video or picture")
    return np.stack(frames), about.fps or 1.0


def fit(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (h, w, 3) -> (H, W, 3): the largest middle part of that shape, by a cubic filter."""
    tall, wide = frame.shape[:2]
    scale = min(tall / size[0], wide / size[1])
    height, width = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    top, left = (tall - height) // 2, (wide - width) // 2
    part = frame[top : top + height, left : left + width]
    if part.shape[:2] == size:
        return part
    # as wide as the shrinking asks for: nothing flickers
    resized = Image.fromarray(part).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(resized)


@contextmanager
def _open(
    path: str | os.PathLike[str], fps: float | None, limit: int | None
) -> Iterator[tuple[Iterator[np.ndarray], _About]]:
    """Give the frames of a file, at `fps` unless None, and what is known of it at the end."""
    file, about = Path(path), _About()
    sequence = [] if _is_file(file) else _list_sequence(file)
    if not sequence and not _is_file(file):
        raise _missing(path)
    kind = _picture_kind(sequence[0] if sequence else file)
    try:
        if sequence:
            with closing(_sequence(sequence)) as shown:
                yield shown, about
        elif kind:
            with closing(_picture(file, kind, about)) as pictures:
                yield (_at_times(pictures, fps) if fps else (frame for frame, _ in pictures)), about
        else:
            with _video(file, fps, limit, about) as shown:
                yield shown, about
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has more than the {MOST_PIXELS} pixels it may have") from error
    except _BROKEN as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} is not a readable video or picture") from error


def _sequence(files: list[Path]) -> Generator[np.ndarray, None, None]:
    for file in files:
        with closing(_picture(file, _picture_kind(file), _About())) as pictures:
            yield next(pictures)[0]


def _picture(
    file: Path, kind: str, about: _About
) -> Generator[tuple[np.ndarray, float], None, None]:
    """The frames of a picture file, and how many seconds each is shown: a still, for ever."""
    late = monotonic() + MOST_SECONDS
    seconds = 0.0
    with _open_picture(file, kind) as image:
        if not getattr(image, "is_animated", False):
            yield _to_rgb(ImageOps.exif_transpose(image)), math.inf
            return
        for number in count():
            try:
                image.seek(number)
            except EOFError:
                break
            image.load()
            # as players do where nothing is said
            shown = float(image.info.get("duration", 0)) / 1000 or 0.1
            seconds += shown
            about.fps = (number + 1) / seconds
            yield _to_rgb(image), shown
            if monotonic() > late:
                raise ValueError(f"{file} takes longer than {MOST_SECONDS} seconds to read")
    about.seconds = seconds


def _open_picture(file: Path | IO[bytes], kind: str) -> Image.Image:
    if isinstance(file, Path) and file.stat().st_size > MOST_PICTURE:
        raise ValueError(f"{file} is larger than the {MOST_PICTURE} bytes a picture may have")
    with warnings.catch_warnings():
        # of very large ones, which are refused here too
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(file, formats=(kind,))
    if image.width * image.height > MOST_PIXELS:
        image.close()
        raise Image.DecompressionBombError
    return image


def _to_rgb(image: Image.Image) -> np.ndarray:
    """-> uint8 (h, w, 3), on white where it is transparent."""
    if image.mode.startswith("I"):
        # grey of 16 bits, which Pillow would clip
        grey = np.asarray(image).astype(np.int64) >> 8
        return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)
    if image.has_transparency_data:
        shown = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
    return np.asarray(image.convert("RGB"))


def _at_times(shown: Iterator[tuple[np.ndarray, float]], fps: float) -> Iterator[np.ndarray]:
    """What is shown at 0.5 / fps, 1.5 / fps and so on, by (frame, seconds) one after another."""
    number, end = 0, 0.0
    for frame, seconds in shown:
        end += seconds
        while number + 0.5 <= end * fps:
            yield frame
            number += 1


@contextmanager
def _video(
    file: Path, fps: float | None, limit: int | None, about: _About
) -> Iterator[Iterator[np.ndarray]]:
    """Give a video's frames as ffmpeg decodes them."""
    rate = []
    if fps is not None:
        assert limit is not None
        # where time leaps, ffmpeg makes all that lies between at once: no more than is asked for,
        # for which the unit of time may not be long
        rate = ["settb=intb/ceil(intb*1000)"]
        rate += [f"setpts=min(PTS-STARTPTS\\,ceil({(limit + 2) / fps!r}/TB))"]
        # rounded to the nearest: the last one that began by the middle of the time
        rate += [f"fps={float(fps)!r}:round=near"]
    arguments = ["-map", "0:V:0", "-vf", ",".join([*rate, _SQUARE]), "-fps_mode", "passthrough"]
    arguments += [] if limit is None else ["-frames:v", str(limit)]
    with _run(file, *arguments, "-f", "image2pipe", "-c:v", "ppm") as (output, said):
        yield _read_ppm(output)
    text = bytes(said).decode(errors="replace")
    if "max_pixels" in text:
        raise Image.DecompressionBombError
    stream = re.search(r"^  Stream #0:.* Video: .*?([\d.]+) fps", text, re.MULTILINE)
    length = re.search(r"^  Duration: (\d+):(\d\d):(\d\d\.\d+)", text, re.MULTILINE)
    if stream and float(stream[1]):
        about.fps = float(stream[1])
    if length:
        hours, minutes, seconds = length.groups()
        about.seconds = int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def _read_ppm(output: IO[bytes]) -> Iterator[np.ndarray]:
    """Pictures one after another, each with its size before it, up to one that is not whole."""
    while output.readline() == b"P6\n":
        width, height = map(int, output.readline().split())
        assert output.readline() == b"255\n"
        pixels = output.read(height * width * 3)
        if len(pixels) < height * width * 3:
            return
        yield np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


@contextmanager
def _run(file: Path, *arguments: str) -> Iterator[tuple[IO[bytes], bytearray]]:
    """Give what ffmpeg makes of a file, and the start of what it says, complete at the end."""
    command = [
        *(get_ffmpeg_exe(), "-hide_banner", "-nostats", "-nostdin", "-v", "info"),
        *("-protocol_whitelist", "file", "-format_whitelist", _CONTAINERS),
        # of each thread, pictures wait in memory
        *("-max_pixels", str(MOST_PIXELS), "-threads", "2"),
        *("-i", f"file:{file}", *arguments, "pipe:1"),
    ]
    said, late = bytearray(), Event()
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        _limit_memory(process.pid)

        def stop() -> None:
            late.set()
            process.kill()

        timer = Timer(MOST_SECONDS, stop)
        listener = Thread(target=_listen, args=(process.stderr, said), daemon=True)
        timer.start()
        listener.start()
        try:
            yield process.stdout, said
        finally:
            timer.cancel()
            process.kill()
            listener.join()
    if late.is_set():
        raise ValueError(f"{file} takes longer than {MOST_SECONDS} seconds to read")


def _limit_memory(process: int) -> None:
    """Of a program that reads what strangers wrote, where the system can."""
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = MOST_MEMORY if hard == resource.RLIM_INFINITY else min(MOST_MEMORY, hard)
        resource.prlimit(process, resource.RLIMIT_AS, (most, hard))


def _listen(stderr: IO[bytes], said: bytearray) -> None:
    while part := stderr.read(2**16):
        if len(said) < MOST_HEAD:
            said += part


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A file of ours, in any format -> its metadata, from the sidecar where the file has none.

    Raises ValueError, in one line, for any other file, FileNotFoundError for none.
    """
    file = Path(path)
    try:
        found = _parse(_comment(file)) if _is_file(file) else None
        sidecar = name_sidecar(file)
        if found is None and _is_file(sidecar):
            found = _parse(_head(sidecar))
        elif not _is_file(file):
            raise _missing(path)
    except FileNotFoundError:
        raise
    except (*_BROKEN, Image.DecompressionBombError) as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} holds no metadata of cmdgen") from error
    if found is None:
        raise ValueError(f"{path} holds no metadata of cmdgen")
    return found


def parse_metadata(text: str | bytes) -> dict[str, Any]:
    """JSON as `write` makes it -> what it says; ValueError for anything else.

    That is, for what is no object, too deep, not Unicode, names a key twice or a number that is
    none.
    """
    try:
        metadata = json.loads(
            text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_unique
        )
        # half of a letter, which nothing could print
        json.dumps(metadata, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("JSON is too deep") from error
    if not isinstance(metadata, dict):
        raise ValueError("JSON is not an object")
    return metadata


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _parse(text: str | bytes) -> dict[str, Any] | None:
    try:
        return parse_metadata(text)
    except ValueError:
        return None


def _comment(file: Path) -> str | bytes:
    """The text that a file keeps metadata in, empty where it has none."""
    kind = _picture_kind(file)
    if kind in ("PNG", "GIF"):
        # it is before the first picture
        with _open_picture(BytesIO(_head(file)), kind) as image:
            comment = image.info.get("comment")
        return comment if isinstance(comment, str | bytes) else b""
    if kind == "WEBP":
        return _webp_comment(file)
    if kind:
        return b""
    if file.suffix.lower() == ".json":
        return _head(file)
    if file.suffix.lower() == ".safetensors":
        return _safetensors_comment(file)
    return _container_comment(file)


def _container_comment(file: Path) -> bytes:
    with _run(file, "-f", "ffmetadata") as (output, _):
        text = output.read(MOST_HEAD)
    # a value ends at the first newline that no backslash precedes, what is said of all at a "[";
    # nothing is tried again, as remembering each letter would take a hundred times its room
    for name, value in re.findall(
        rb"^(?:(\w+)=((?:\\.|[^\\\n])*+)|\[\w+\])$", text, re.MULTILINE | re.DOTALL
    ):
        if not name:
            break
        # upper case in a Matroska
        if name.lower() == b"comment":
            return re.sub(rb"\\(.)", rb"\1", value, flags=re.DOTALL)
    return b""


def _webp_comment(file: Path) -> bytes:
    with file.open("rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        place = 12
        while place + 8 <= end:
            stream.seek(place)
            name, length = struct.unpack("<4sI", stream.read(8))
            if name == b"EXIF":
                exif = Image.Exif()
                exif.load(stream.read(min(length, MOST_HEAD)))
                comment = exif.get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
                return comment.removeprefix(ASCII) if isinstance(comment, bytes) else b""
            place += 8 + length + length % 2
    return b""


def _safetensors_comment(file: Path) -> str:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = parse_metadata(stream.read(length)) if length <= MOST_HEAD else {}
    about = header.get("__metadata__")
    comment = about.get("comment") if isinstance(about, dict) else None
    return comment if isinstance(comment, str) else ""


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(MOST_HEAD)


def _picture_kind(file: Path) -> str:
    """The name that Pillow has for a file, by how it begins; empty where it is no picture."""
    try:
        with file.open("rb") as stream:
            start = stream.read(12)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    kind = next((kind for mark, kind in _PICTURES.items() if start.startswith(mark)), "")
    # other files than pictures are a RIFF too
    return "" if kind == "WEBP" and start[8:] != b"WEBP" else kind


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error


def _list_sequence(file: Path) -> list[Path]:
    try:
        return [each for each in list_frames(file) if _is_file(each)]
    except ValueError:
        return []


def _missing(path: str | os.PathLike[str]) -> OSError | ValueError:
    if os.path.lexists(path):
        return ValueError(f"{path} is not a file")
    return FileNotFoundError(f"{path} does not exist")
