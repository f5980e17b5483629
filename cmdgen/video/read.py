"""Video and picture files to frames, and the metadata that `video.write` put into a file.

Frames are what a player shows: upright, square pixels, sRGB, one field or frame at a time. Colours
without a tag are BT.709 from 720 lines on and BT.601 below, as players have it; HDR is shown with
its white of 203 nits as white, and highlights above 90 % of it bend towards it.

Files are untrusted: each is opened alone, whatever other files it names, and what it takes of
memory and time has a limit.
"""

import math
import os
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from threading import Timer
from time import monotonic
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from cmdgen.files import check_file, parse_json
from cmdgen.video.ffmpeg import run_ffmpeg
from cmdgen.video.formats import FORMATS, list_files, name_sidecar
from cmdgen.video.write import ASCII

# of one picture: 8192x8192
MOST_PIXELS = 2**26
# bytes of a file that Pillow may read whole
MOST_PICTURE = 2**28
# bytes at the start of a file that tell what it is
_START = 2**16
# bytes at the start of a file in which metadata is looked for
MOST_HEAD = 2**23
# bytes that ffmpeg may ask for: pictures of MOST_PIXELS wait in several places
MOST_MEMORY = 2**32
# until a file must have been read
MOST_SECONDS = 120

# containers that hold all that they show: a playlist names other files, and addresses
_CONTAINERS = "mov,matroska,avi,flv,mpeg,mpegvideo,mpegts,ogg,asf,ivf,nut,yuv4mpegpipe,h264,hevc,obu,m4v,dv"
# how picture files begin, by Pillow's formats
_PICTURES = re.compile(
    rb"(?P<png>\x89PNG)|(?P<gif>GIF8)|(?P<webp>RIFF.{4}WEBP)|(?P<jpeg>\xff\xd8\xff)|(?P<bmp>BM)"
    rb"|(?P<tiff>II[*+]\0|MM\0[*+])|(?P<ppm>P[1-6]\s)|(?P<jpeg2000>\0\0\0\x0cjP  |\xff\x4f\xff\x51)"
    # others are shown by ffmpeg, which knows HDR and tiles, and drops what says how transparent they are
    rb"|(?P<avif>.{4}ftypavi[fs].*?mpegB:cicp:systems:auxiliary:alpha)",
    re.DOTALL,
)
# other files of several pictures, such as a photograph with its depth, are shown as the first of them
_ANIMATED = ("png", "gif", "webp", "avif")
# nothing at its start tells a TGA
_BY_SUFFIX = {".tga": "tga"}
# what Pillow raises on its way through a broken file
_BROKEN = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
# pixels as wide as they are high, by making the longer side shorter
SQUARE = (
    "scale=w='if(gt(sar,1),iw,max(1,round(iw*sar)))':h='if(gt(sar,1),max(1,round(ih/sar)),ih)'"
    ":flags=bicubic+accurate_rnd+full_chroma_int",
    "format=rgb24",
)
# a stream, or a picture that phones store in tiles, as ffmpeg describes it: what is in the bracket
# behind its pixels' format, and its size
_STREAM = re.compile(
    r"^  Stream (?:#0:\S+: Video|group #0:(?P<tiles>\d+).*Tile Grid): "
    r".*?, \w+(?:\((?P<tags>.*?)\))?, (?P<width>\d+)x(?P<height>\d+)",
    re.MULTILINE,
)
# ffmpeg's names of curves of HDR, and of primaries beyond those of sRGB
_WIDE = re.compile("smpte2084|arib-std-b67|bt2020|smpte43[12]")
_TO_SRGB = (
    "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=mobius:param=0.9:desat=0,zscale=t=bt709:m=gbr:r=pc"
)
# of a picture whose colours are converted
_PIXELS_TOGETHER = 2**21
# lines from which colours without a tag are BT.709
HD = 720
UNTAGGED_HD = "setparams=colorspace=bt709"
_READABLE = f"videos, {', '.join(_PICTURES.groupindex)}, tga and heic"
File = str | os.PathLike[str]
# frames, each with the seconds for which it is shown
_Shown = Generator[tuple[np.ndarray, float], None, None]


@dataclass
class Source:
    """What is known of the file that a clip was read from.

    `width` and `height` are as it is shown: turned upright, with square pixels. `fps` is the mean,
    None for a still or a sequence of pictures, `seconds` the whole length, None where it is not
    known. `held` counts the frames at the clip's end that repeat the last one for want of more.
    `damaged` says that a part could not be decoded: what stands there is the decoder's guess.
    """

    width: int = 0
    height: int = 0
    fps: float | None = None
    seconds: float | None = None
    held: int = 0
    damaged: bool = False

    def __str__(self) -> str:
        """Return such as 1920x1080, 29.97 fps, 12.4 s."""
        rate = [] if self.fps is None else [f"{self.fps:.4g} fps"]
        length = [] if self.seconds is None else [f"{self.seconds:.4g} s"]
        return ", ".join((f"{self.width}x{self.height}", *rate, *length))


def read_clip(path: File, *, frames: int, size: tuple[int, int], fps: float | None) -> tuple[np.ndarray, Source]:
    """A video, picture or sequence (%04d.png) -> uint8 (T, H, W, 3) from its start, and its source.

    Each frame is what the file shows in the middle of its time, resized by `fit`; with `fps` None,
    the file's frames one by one. A still is repeated, the last frame of a short video held.
    Raises ValueError, in one line, for a file that cannot be read, FileNotFoundError for none.
    """
    clip = np.empty((frames, *size, 3), np.uint8)
    made, last = 0, None
    with _open(path, fps, frames) as (shown, source):
        for frame in islice(shown, frames):
            clip[made] = clip[made - 1] if frame is last else fit(frame, size)
            source.height, source.width, _ = frame.shape
            last, made = frame, made + 1
        if not made:
            raise EOFError
    clip[made:] = clip[made - 1]
    source.held = frames - made
    return clip, source


def read_frames(path: File, *, size: tuple[int, int], most: int) -> tuple[np.ndarray, Source]:
    """A file -> all its frames, each once, uint8 (T, H, W, 3), cropped in the middle and resized.

    Raises ValueError, in one line, for more than `most` and for a file that cannot be read.
    """
    with _open(path, None, most + 1) as (shown, source):
        frames = []
        for frame in islice(shown, most + 1):
            source.height, source.width, _ = frame.shape
            frames.append(fit(frame, size))
        if not frames:
            raise EOFError
    if len(frames) > most:
        raise ValueError(f"{path} has more than {most} frames of {size[1]}x{size[0]}: cut it first")
    return np.stack(frames), source


def read_video(path: File, *, max_frames: int | None = None) -> tuple[np.ndarray, float]:
    """A file -> uint8 (T, H, W, 3) and its frames per second; the first `max_frames` if given.

    Raises ValueError, in one line, for a file that cannot be read, FileNotFoundError for none.
    """
    with _open(path, None, max_frames) as (shown, source):
        frames = np.stack(list(islice(shown, max_frames)))
    return frames, source.fps or 1.0


def count_frames(path: File, fps: float, most: int) -> int:
    """Return how many frames at `fps` a file holds, at most `most`: a video as its header says.

    Raises what `read_clip` raises for a file that is none from its start.
    """
    file, source = Path(path), Source()
    if _picture_format(file):
        return most - read_clip(file, frames=most, size=(1, 1), fps=fps)[1].held
    with _decode(file) as (output, log):
        output.read()
    text = log.decode(errors="replace")
    try:
        _describe(text, source)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has more than the {MOST_PIXELS} pixels it may have") from error
    if not _STREAM.search(text):
        raise ValueError(f"{path} is not a readable video or picture")
    # a stream without a container has no length before its end
    return most if source.seconds is None else min(most, round(source.seconds * fps))


def fit(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (h, w, 3) -> (H, W, 3): the largest middle part of that shape, by a cubic filter."""
    tall, wide = frame.shape[:2]
    scale = min(tall / size[0], wide / size[1])
    height, width = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    top, left = (tall - height) // 2, (wide - width) // 2
    part = frame[top : top + height, left : left + width]
    if part.shape[:2] == size:
        return part
    # the filter is wider where it shrinks more: nothing flickers
    resized = Image.fromarray(part).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(resized)


@contextmanager
def _open(path: File, fps: float | None, limit: int | None) -> Iterator[tuple[Iterator[np.ndarray], Source]]:
    """Give the frames of a file, at `fps` unless None, and what is known of it in the end."""
    files, source = _find_files(path), Source()
    try:
        if files != [Path(path)]:
            frames = (next(_picture(file, Source()))[0] for file in files)
        elif _picture_format(files[0]):
            frames = _at_times(_picture(files[0], source), fps)
        else:
            frames = _video(files[0], fps, limit, source)
        with closing(frames):
            yield frames, source
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has more than the {MOST_PIXELS} pixels it may have") from error
    except _BROKEN as error:
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} is not a readable video or picture: {_READABLE} are") from error


def _picture(file: Path, source: Source) -> _Shown:
    """Give the frames of a picture file; a still is shown for ever."""
    late, seconds, format = monotonic() + MOST_SECONDS, 0.0, _picture_format(file)
    with _open_picture(file, format) as image:
        if format not in _ANIMATED or not getattr(image, "is_animated", False):
            # else a picture that stands upright is copied
            ImageOps.exif_transpose(image, in_place=True)
            yield _to_rgb(image), math.inf
            return
        for number, page in enumerate(ImageSequence.Iterator(image), 1):
            page.load()
            # players take 0.1 s where the file says nothing, or 0.01 s
            milliseconds = float(page.info.get("duration", 0))
            shown = milliseconds / 1000 if milliseconds > 10 else 0.1
            seconds += shown
            source.fps = number / seconds
            yield _to_rgb(page), shown
            if monotonic() > late:
                raise ValueError(f"{file} takes longer than {MOST_SECONDS} seconds to read")
    source.seconds = seconds


def _open_picture(file: Path | IO[bytes], format: str) -> Image.Image:
    if isinstance(file, Path) and file.stat().st_size > MOST_PICTURE:
        raise ValueError(f"{file} is larger than the {MOST_PICTURE} bytes a picture may have")
    with warnings.catch_warnings():
        # about large pictures, which are refused here too
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(file, formats=(format,))
    if image.width * image.height > MOST_PIXELS:
        image.close()
        raise Image.DecompressionBombError
    return image


def _to_rgb(image: Image.Image) -> np.ndarray:
    """-> uint8 (h, w, 3) in sRGB, on white where it is transparent; some rows at a time, to save memory."""
    frame = np.empty((image.height, image.width, 3), np.uint8)
    step = max(1, _PIXELS_TOGETHER // image.width)
    for top in range(0, image.height, step):
        bottom = min(top + step, image.height)
        frame[top:bottom] = _rows_to_rgb(image.crop((0, top, image.width, bottom)))
    return frame


def _rows_to_rgb(image: Image.Image) -> np.ndarray:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        # grey of 16 bits, which Pillow would clip
        grey = np.asarray(image).astype(np.int64) >> 8
        return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode not in ("L", "CMYK"):
        image = image.convert("RGB")
    if profile:
        # a moment to import, and most pictures do without
        from PIL import ImageCms

        # a profile that is damaged, or of another kind of colours, is left out
        with suppress(ImageCms.PyCMSError, OSError):
            sheet = ImageCms.ImageCmsProfile(BytesIO(profile))
            converted = ImageCms.profileToProfile(image, sheet, ImageCms.createProfile("sRGB"), outputMode="RGB")
            image = converted or image
    image = image.convert("RGB")
    return np.asarray(image if alpha is None else Image.composite(image, Image.new("RGB", image.size, "white"), alpha))


def _at_times(shown: _Shown, fps: float | None) -> Generator[np.ndarray, None, None]:
    """Give what is shown at 0.5 / fps, 1.5 / fps and so on; with `fps` None, each frame once."""
    number, end = 0, 0.0
    for frame, seconds in shown:
        end += seconds
        if fps is None:
            yield frame
        while fps is not None and number + 0.5 <= end * fps:
            yield frame
            number += 1


def _video(file: Path, fps: float | None, limit: int | None, source: Source) -> Generator[np.ndarray, None, None]:
    """Give the frames of a video as ffmpeg decodes them; a picture in tiles is shown for ever."""
    stream, scan, colours, whole = _choose_filters(file)
    rate = []
    if fps is not None and whole is None:
        assert limit is not None
        rate = set_rate(fps, limit)
    filters = ",".join([*scan, *rate, *colours, *SQUARE])
    arguments = ["-filter_complex", f"[0:{stream}]{filters}[v]", "-map", "[v]", "-fps_mode", "passthrough"]
    arguments += [] if limit is None else ["-frames:v", str(limit)]
    log = bytearray()
    try:
        with _decode(file, *arguments, "-f", "image2pipe", "-c:v", "ppm") as (output, log):
            for frame in _read_ppm(output):
                if whole is not None and {*frame.shape[:2]} != whole:
                    raise ValueError(f"{file} is a picture in tiles: this ffmpeg reads one, a newer imageio-ffmpeg all")
                yield frame
        while whole is not None and fps is not None:
            yield frame
    finally:
        _describe(log.decode(errors="replace"), source)


def set_rate(fps: float, limit: int) -> list[str]:
    """Return ffmpeg's filters that show a video at `fps`, for at least `limit` frames."""
    return [
        # where time leaps, ffmpeg makes all frames between at once: let it make no more than are
        # needed. The unit of time must be short for that
        "settb=intb/ceil(intb*1000)",
        f"setpts=min(PTS-STARTPTS\\,ceil({(limit + 2) / fps!r}/TB))",
        # rounded to the nearest: the last one that began by the middle of the time
        f"fps={float(fps)!r}:round=near",
    ]


def _choose_filters(file: Path) -> tuple[str, list[str], list[str], set[int] | None]:
    """Return ffmpeg's name of what to show, the filters of its scan and of its colours, and sides of tiles joined."""
    with _decode(file) as (output, log):
        output.read()
    stream = _STREAM.search(log.decode(errors="replace"))
    if stream is None:
        return "V:0", [], [], None
    tags, colours = stream["tags"] or "", []
    if _WIDE.search(tags):
        colours = [_TO_SRGB]
    elif not re.search("bt|smpte|fcc|gbr|ycgco", tags) and int(stream["height"]) >= HD:
        colours = [UNTAGGED_HD]
    scan = ["bwdif=mode=send_frame:deint=interlaced"] if "first" in tags else []
    if stream["tiles"] is None:
        return "V:0", scan, colours, None
    return f"g:{stream['tiles']}", scan, colours, {int(stream["width"]), int(stream["height"])}


def _describe(text: str, source: Source) -> None:
    """Read what ffmpeg says of a file."""
    if "max_pixels" in text:
        raise Image.DecompressionBombError
    source.damaged = re.search("conceal|corrupt|error while decoding|decode error|Invalid data", text) is not None
    if fps := re.search(r"^  Stream #0:.* Video: .*?([\d.]+) fps", text, re.MULTILINE):
        source.fps = float(fps[1]) or None
    if length := re.search(r"^  Duration: (\d+):(\d\d):(\d\d\.\d+)", text, re.MULTILINE):
        hours, minutes, seconds = map(float, length.groups())
        source.seconds = 3600 * hours + 60 * minutes + seconds


def _read_ppm(output: IO[bytes]) -> Iterator[np.ndarray]:
    """Give pictures one after another, each with its size before it, while they are whole."""
    start = re.compile(rb"P6\n(\d+) (\d+)\n255\n")
    while header := start.fullmatch(b"".join(islice(output, 3))):
        width, height = map(int, header.groups())
        pixels = output.read(height * width * 3)
        if len(pixels) < height * width * 3:
            return
        yield np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


@contextmanager
def _decode(file: Path, *arguments: str) -> Iterator[tuple[IO[bytes], bytearray]]:
    """Give what ffmpeg makes of a file, nothing without arguments, and the start of its stderr, complete at the end."""
    started = monotonic()
    limits = f"-protocol_whitelist file -format_whitelist {_CONTAINERS} -max_pixels {MOST_PIXELS}"
    # few threads: in each of them pictures wait in memory
    options = f"-nostdin -v info {limits} -threads 2".split()
    output = [*arguments, "pipe:1"] if arguments else []
    with run_ffmpeg(*options, "-i", f"file:{file}", *output) as (process, log):
        assert process.stdout is not None
        limit_memory(process.pid)
        timer = Timer(MOST_SECONDS, process.kill)
        timer.start()
        try:
            yield process.stdout, log
        finally:
            timer.cancel()
            process.kill()
    if monotonic() - started >= MOST_SECONDS:
        raise ValueError(f"{file} takes longer than {MOST_SECONDS} seconds to read")


def limit_memory(process: int) -> None:
    """Limit the memory of a program that reads untrusted files, where the system can."""
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = MOST_MEMORY if hard == resource.RLIM_INFINITY else min(MOST_MEMORY, hard)
        resource.prlimit(process, resource.RLIMIT_AS, (most, hard))


def read_metadata(path: File) -> dict[str, Any]:
    """Return the metadata of a file that cmdgen wrote, of its sidecar where the file has none.

    Raises ValueError, in one line, for any other file, FileNotFoundError where there is none.
    """
    for file in (Path(path), name_sidecar(Path(path))):
        with suppress(*_BROKEN):
            if file.is_file():
                return parse_json(_read_comment(file))
    _find_files(path)
    raise ValueError(f"{path} holds no metadata of cmdgen")


def _read_comment(file: Path) -> str | bytes:
    """Return the text that a file keeps metadata in; raise one of `_BROKEN` where it has none."""
    head, format = _read_head(file), _picture_format(file)
    if format:
        # in a WebP it is at the end, in others before the first frame
        at_end = format == "webp"
        with _open_picture(file if at_end else BytesIO(head), format) as image:
            info = image.info
        # found by the mark before it: parsing untrusted tags may take gigabytes
        return info["exif"].partition(ASCII)[2].rstrip(b"\0") if at_end else info["comment"]
    if file.suffix.lower() == ".json":
        return head
    if file.suffix.lower() in FORMATS["safetensors"].suffixes:
        length = int.from_bytes(head[:8], "little")
        return parse_json(head[8 : 8 + length])["__metadata__"]["comment"]
    with _decode(file, "-f", "ffmetadata") as (output, _):
        text = output.read(MOST_HEAD)
    # in upper case in a Matroska. The value ends at a newline without a backslash; `*+` keeps no
    # positions to go back to, which would take a hundred times the memory of the text
    tag = re.compile(rb"^comment=((?:\\.|[^\\\n])*+)$", re.MULTILINE | re.DOTALL | re.IGNORECASE)
    return re.sub(rb"\\(.)", rb"\1", tag.findall(text)[0], flags=re.DOTALL)


def _read_head(file: Path, size: int = MOST_HEAD) -> bytes:
    with file.open("rb") as stream:
        return stream.read(size)


def _picture_format(file: Path) -> str:
    """Return the format of a picture file by how it begins; empty where it is none."""
    start = _PICTURES.match(_read_head(file, _START))
    return start.lastgroup or "" if start else _BY_SUFFIX.get(file.suffix.lower(), "")


def _find_files(path: File) -> list[Path]:
    """Return the file, or those of a sequence (%04d.png), that can be read: at least one."""
    try:
        files = [file for file in list_files(Path(path)) if file.is_file()]
        for file in files[:1]:
            check_file(file)
            file.open("rb").close()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if not files and os.path.lexists(path):
        raise ValueError(f"{path} is not a file")
    if not files:
        raise FileNotFoundError(f"{path} does not exist")
    return files
