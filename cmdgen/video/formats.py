"""The formats of videos and stills: one table that writing, reading, checks and help share.

Imports no library: `cmdgen --help` needs the table.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from stat import S_ISCHR, S_ISFIFO
from types import MappingProxyType
from typing import Literal

from cmdgen.files import check_file

# how frames are handed to an encoder, by ffmpeg's names
Pixels = Literal["rgb24", "yuv420p"]
# where a file keeps its metadata: a tag of the container, a comment block, the user comment of
# EXIF, a text chunk, a header; nowhere
Storage = Literal["tag", "comment", "exif", "text", "header", ""]
# how bytes go to stdout: while frames are written, or as a whole at the end; never
Streaming = Literal["live", "whole", ""]

STDOUT = "-"
# bytes of a file, or of a sequence, that is hashed: hours of video
MOST_HASHED = 2**34


@dataclass(frozen=True)
class Codec:
    """How ffmpeg compresses: `crf` is the default, from 0 (best) to `worst`, 0 where lossless."""

    arguments: tuple[str, ...]
    crf: int = 0
    worst: int = 0


_H265 = ("-c:v", "libx265", "-x265-params", "log-level=error", "-tag:v", "hvc1")

CODECS: Mapping[str, Codec] = MappingProxyType(
    {
        # 0.25 s of CPU time where the default preset takes 0.60 for 16 frames of 512x1024, with equal sizes
        "h264": Codec(("-c:v", "libx264", "-preset", "veryfast"), 16, 51),
        # x265 logs to stderr what is no error; Apple's players want the tag hvc1
        "hevc": Codec(_H265, 18, 51),
        "av1": Codec(("-c:v", "libsvtav1", "-preset", "6"), 20, 63),
        # without a bit rate of 0, crf only limits the quality
        "vp9": Codec(("-c:v", "libvpx-vp9", "-b:v", "0", "-row-mt", "1"), 20, 63),
        "ffv1": Codec(("-c:v", "ffv1", "-level", "3")),
    }
)


@dataclass(frozen=True)
class Format:
    """A kind of file: the suffixes of its name, how it is written, and what it can hold.

    The first of `codecs` is the default. ffmpeg writes it with the arguments `muxer`, and with
    `stream` too where it goes to stdout live; a format without `muxer` is a picture file.
    `pixels` is what loses nothing: "yuv420p" where frames are stored so, in BT.709.
    """

    name: str
    suffixes: tuple[str, ...]
    codecs: tuple[str, ...] = ()
    muxer: tuple[str, ...] = ()
    stream: tuple[str, ...] = ()
    pixels: Pixels = "rgb24"
    metadata: Storage = ""
    stdout: Streaming = ""
    # whether it holds more than one frame, needs even sides, and says how often it plays
    video: bool = True
    even: bool = False
    loops: bool = False
    max_fps: float = 1000
    max_side: int = 65_535


def _to_yuv420p(matrix: str) -> str:
    """Return ffmpeg's filter from RGB to yuv420p of limited range."""
    flags = "flags=accurate_rnd+full_chroma_int"
    return f"scale=out_color_matrix={matrix}:out_range=tv:{flags},format=yuv420p"


# tagged as well as converted: players else guess the matrix from the size of the frame
_TAGS = "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709,setsar=1"
_BT709 = "-colorspace bt709 -color_primaries bt709 -color_trc bt709 -color_range tv -pix_fmt yuv420p"
# leaves out when a file was made, and by which version of ffmpeg
_PLAIN = "-fflags +bitexact -flags:v +bitexact"
# one palette for the clip and an ordered dither: what stands still does not flicker. Pillow's best
# palette without flicker is 1.6 dB worse on clips of mini
_PALETTE = "split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=bayer:bayer_scale=4"
_GIF = ("-filter_complex", _PALETTE, "-f", "gif")
_MP4 = ("-f", "mp4", "-movflags", "+faststart")
_FRAGMENTS = ("-movflags", "frag_keyframe+delay_moov+default_base_moof")
# a y4m cannot name its matrix, and readers take it for BT.601
_Y4M = ("-vf", f"{_to_yuv420p('bt601')},setsar=1", "-f", "yuv4mpegpipe")
# players show a frame for 0.1 s that asks for 0.01 s or less
_BRIEFEST = 90

_film = partial(Format, pixels="yuv420p", metadata="tag", even=True, max_side=16_384)
_animation = partial(Format, loops=True, max_fps=_BRIEFEST)
_TABLE = (
    _film("mp4", (".mp4", ".m4v"), ("h264", "hevc", "av1"), _MP4, _FRAGMENTS, stdout="live"),
    _film("webm", (".webm",), ("vp9", "av1"), ("-f", "webm")),
    _film("mkv", (".mkv",), ("h264", "hevc", "av1", "vp9", "ffv1"), ("-f", "matroska")),
    # a frame is shown for a whole number of 0.01 s, on average for as long as it should be
    _animation("gif", (".gif",), (), _GIF, metadata="comment", stdout="whole", max_fps=50),
    _animation("webp", (".webp",), metadata="exif", stdout="whole", max_side=16_383),
    _animation("apng", (".apng",), metadata="text"),
    Format("png", (".png",), metadata="text", video=False),
    # its name holds a number, such as %04d.png
    Format("frames", (), muxer=("-pix_fmt", "rgb24", "-f", "image2")),
    Format("y4m", (".y4m",), muxer=_Y4M, stdout="live", even=True),
    Format("raw", (".rgb", ".raw"), muxer=("-f", "rawvideo"), stdout="live"),
    Format("safetensors", (".safetensors",), metadata="header", video=False),
)
FORMATS: Mapping[str, Format] = MappingProxyType({kind.name: kind for kind in _TABLE})
_BY_SUFFIX = {suffix: kind for kind in _TABLE for suffix in kind.suffixes}

# a number, or %% for a percent sign
_FIELD = re.compile(r"(%%|%(?:0\d+)?d)")


@dataclass(frozen=True)
class Encoding:
    """How a video is written; raises ValueError, in one line, for what its format cannot do.

    `crf` and `codec` None are the format's own. `loop` is how often it plays, 0 for ever.
    `metadata` says whether the file holds it, `sidecar` whether NAME.json beside it does.
    """

    format: str
    crf: int | None = None
    codec: str | None = None
    loop: int = 0
    metadata: bool = True
    sidecar: bool = False

    def __post_init__(self) -> None:
        kind = _find_format(self.format)
        if self.codec is not None and self.codec not in kind.codecs:
            possible = f"one of {', '.join(kind.codecs)}" if kind.codecs else "none to choose"
            raise ValueError(f"codec {self.codec!r}: {kind.name} has {possible}")
        name = self.codec_used or kind.name
        worst = CODECS[name].worst if name in CODECS else 0
        if self.crf is not None and not worst:
            lossy = f"the lossy codecs of {_list_formats('codecs')}"
            raise ValueError(f"crf {self.crf}: {name} has none, {lossy} have one")
        if self.crf is not None and not 0 <= self.crf <= worst:
            raise ValueError(f"crf {self.crf} is not one of 0, the best, to {worst} for {name}")
        if self.loop:
            _check_loops(kind)
        if not 0 <= self.loop <= 65_535:
            raise ValueError(f"loop {self.loop} is not from 0, for ever, to 65535")
        if self.sidecar and not self.metadata:
            raise ValueError("a sidecar holds the metadata, which is to be left out")

    @property
    def kind(self) -> Format:
        """Return the row of the table."""
        return FORMATS[self.format]

    @property
    def codec_used(self) -> str:
        """Return the name of the codec, empty where the format has none to choose."""
        return self.codec or next(iter(self.kind.codecs), "")

    @property
    def pixels(self) -> Pixels:
        """Return how frames are best handed over: nothing is lost or converted twice."""
        return "rgb24" if self.codec_used == "ffv1" else self.kind.pixels

    def check(self, size: tuple[int, int], fps: float) -> None:
        """Raise ValueError, in one line, where the file cannot hold frames of `size` (H, W)."""
        height, width = size
        kind = self.kind
        if kind.even and self.codec_used != "ffv1" and (height % 2 or width % 2):
            raise ValueError(f"size {width}x{height} is odd: {kind.name} needs even sides")
        if not 1 <= min(size) <= max(size) <= kind.max_side:
            raise ValueError(f"size {width}x{height}: sides of {kind.name} are from 1 to {kind.max_side}")
        if not 0 < fps <= kind.max_fps:
            raise ValueError(f"fps {fps:g} is not above 0 and at most {kind.max_fps:g}, as {kind.name} needs it")

    def choose_arguments(self, pixels: Pixels, *, streams: bool) -> list[str]:
        """Return the arguments with which ffmpeg writes frames handed over as `pixels`."""
        kind, codec = self.kind, CODECS.get(self.codec_used)
        arguments = [*_PLAIN.split(), *kind.muxer, *(kind.stream if streams else ())]
        if codec is not None:
            arguments += codec.arguments
            if codec.worst:
                arguments += ["-crf", str(codec.crf if self.crf is None else self.crf)]
            if self.pixels == pixels == "rgb24":
                arguments += ["-pix_fmt", "bgr0"]
            else:
                convert = f"{_to_yuv420p('bt709')}," if pixels == "rgb24" else ""
                arguments += ["-vf", convert + _TAGS, *_BT709.split()]
        if kind.loops:
            # 0 is for ever, and else how often it is repeated
            arguments += ["-loop", str({0: 0, 1: -1}.get(self.loop, self.loop - 1))]
        return arguments


def is_stream(target: str) -> bool:
    """Return whether bytes go to a target one after another: to stdout, a named pipe, a device."""
    # a name may be too long, or hold a zero byte
    with suppress(OSError, ValueError):
        return target == STDOUT or S_ISFIFO(mode := os.stat(target).st_mode) or S_ISCHR(mode)
    return False


# the same for all clips of most batches
_encoding = lru_cache(64)(Encoding)


def choose_encoding(
    target: str,
    *,
    format: str | None = None,
    crf: int | None = None,
    codec: str | None = None,
    loop: int | None = None,
    metadata: bool = True,
    sidecar: bool = False,
) -> Encoding:
    """Return how to write `target`, a path or "-" for stdout; its suffix decides without `format`.

    Raises ValueError, in one line that says what is possible.
    """
    streams = is_stream(target)
    # without a suffix, as - and /dev/null
    plain = streams and not Path(target).suffix
    kind = _find_format(format or "y4m") if format or plain else _find_by_name(target)
    if streams and not kind.stdout:
        raise ValueError(f"{kind.name} cannot go to stdout or a pipe: {_list_formats('stdout')} can")
    if streams and sidecar:
        raise ValueError("a sidecar lies beside a file: give a name instead of -")
    if kind.name == "frames":
        parse_pattern(target)
        if Path(target).suffix.lower() != ".png":
            raise ValueError(f"{target}: the name of frames must end in .png, such as %04d.png")
    if loop is not None:
        _check_loops(kind)
    return _encoding(kind.name, crf, codec, loop or 0, metadata, sidecar)


def _list_formats(field: str) -> str:
    """Return the names of the formats in whose row a field is set."""
    return ", ".join(kind.name for kind in FORMATS.values() if getattr(kind, field))


def _find_format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"format {name!r} is not one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _find_by_name(target: str) -> Format:
    name = os.path.basename(target)
    suffix = os.path.splitext(name)[1].lower()
    if suffix == ".png" and "%" in name and {*_FIELD.findall(name)} - {"%%"}:
        return FORMATS["frames"]
    if suffix not in _BY_SUFFIX:
        raise ValueError(f"{target}: the name must end in {', '.join(_BY_SUFFIX)} or %04d.png, or give a format")
    return _BY_SUFFIX[suffix]


def _check_loops(kind: Format) -> None:
    if not kind.loops:
        raise ValueError(f"loop needs one of {_list_formats('loops')}, not {kind.name}")


def parse_pattern(target: str | Path) -> re.Pattern[str]:
    """Return what matches the names of the files of a sequence such as frame-%04d.png.

    Its group is the number. Raises ValueError where the name has not exactly one.
    """
    path = Path(target)
    # every second piece is a field
    pieces = _FIELD.split(path.name)
    numbers = [field for field in pieces[1::2] if field != "%%"]
    digits = int(numbers[0][2:-1] or 1) if numbers else 0
    if len(numbers) != 1 or not 1 <= digits <= 9 or any("%" in text for text in pieces[::2]):
        raise ValueError(f"{target}: the name of frames needs one number in it, such as %04d.png")
    names = (rf"(\d{{{digits},}})" if piece in numbers else re.escape(piece.replace("%%", "%")) for piece in pieces)
    return re.compile("".join(names), re.ASCII)


def list_frames(target: Path) -> list[Path]:
    """Return the files of a sequence such as frame-%04d.png, by number; [] where there are none."""
    pattern = parse_pattern(target)
    frames = {}
    for file in target.parent.iterdir() if target.parent.is_dir() else ():
        # of %d, 01 is no number
        if (match := pattern.fullmatch(file.name)) and file.name == target.name % (number := int(match[1])):
            frames[number] = file
    return [frames[number] for number in sorted(frames)]


def list_files(path: Path) -> list[Path]:
    """Return the files of a video: those of a sequence such as %04d.png, or `path` itself.

    Raises ValueError, which names it, where a picture between others is missing.
    """
    frames: list[Path] = []
    if not path.is_file():
        # a name that is no pattern is the name of a file
        with suppress(ValueError):
            frames = list_frames(path)
    if not frames:
        return [path]
    [first] = parse_pattern(path).findall(frames[0].name)
    for number, frame in enumerate(frames, int(first)):
        if frame.name != (name := path.name % number):
            raise ValueError(f"{path}: {name} is missing, there is {frames[0].name} to {frames[-1].name}")
    return frames


def describe_origin(path: Path) -> dict[str, str]:
    """Return what identifies a file, or a sequence of them (%04d.png), in metadata.

    That is its name, and SHA-256 of all its bytes. Raises FileNotFoundError where there is none,
    ValueError for a device or a pipe, and for more bytes than are hashed in seconds.
    """
    digest, files = hashlib.sha256(), list_files(path)
    for file in files:
        check_file(file)
    if sum(file.stat().st_size for file in files) > MOST_HASHED:
        raise ValueError(f"{path} is larger than {MOST_HASHED // 2**30} GiB: cut the part out that is needed")
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    # bytes that are no text are escaped
    name = os.fsencode(path.name).decode(errors="backslashreplace")
    return {"file": name, "sha256": digest.hexdigest()}


def name_sidecar(target: Path) -> Path:
    """Return where the metadata of `target` is kept beside it: clip.mp4.json, %04d.png.json."""
    return target.parent / f"{target.name}.json"


def list_outputs(target: str, encoding: Encoding, frames: int) -> list[str]:
    """Return the files of a clip of so many frames: a sidecar, if it has one, and those of the clip."""
    files = [target]
    if encoding.format == "frames":
        folder, name = os.path.split(target)
        files = [os.path.join(folder, name % number) for number in range(1, frames + 1)]
    return [f"{target}.json", *files] if encoding.sidecar else files
