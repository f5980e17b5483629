"""What a video can be written as, and what each of those can hold; decides, and writes nothing."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

# how frames are handed to an encoder, by ffmpeg's names
Pixels = Literal["rgb24", "yuv420p"]

STDOUT = "-"


@dataclass(frozen=True)
class Codec:
    """How ffmpeg compresses; `crf` is from 0, the best, to `worst`, None where it loses nothing."""

    arguments: tuple[str, ...]
    crf: int | None = None
    worst: int = 0


CODECS: Mapping[str, Codec] = MappingProxyType(
    {
        "h264": Codec(("-c:v", "libx264"), 16, 51),
        # what is no error goes to stderr otherwise
        "hevc": Codec(("-c:v", "libx265", "-x265-params", "log-level=error"), 18, 51),
        "av1": Codec(("-c:v", "libsvtav1", "-preset", "6"), 20, 63),
        # without a rate of 0, crf is but a lower limit of quality
        "vp9": Codec(("-c:v", "libvpx-vp9", "-b:v", "0", "-row-mt", "1"), 20, 63),
        "ffv1": Codec(("-c:v", "ffv1", "-level", "3")),
    }
)


@dataclass(frozen=True)
class Format:
    """A kind of file: how its name ends, and what it can do.

    The first of `codecs` is the one that is used where none is named. `pixels` is what frames are
    best handed over as: "yuv420p" where they are stored so, and tagged. `even` where sides are,
    `stdout` where it can be a stream, `loops` where it says how often it plays, `comment` where it
    has room for metadata.
    """

    name: str
    suffixes: tuple[str, ...]
    codecs: tuple[str, ...] = ()
    pixels: Pixels = "rgb24"
    even: bool = False
    stdout: bool = False
    loops: bool = False
    comment: bool = True
    max_fps: float = 1000
    max_side: int = 16_384


# players show a frame for 0.1 s that asks for 0.01 s or less
_BRIEFEST = 90

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        each.name: each
        for each in (
            Format("mp4", (".mp4", ".m4v"), ("h264", "hevc", "av1"), "yuv420p", True, stdout=True),
            Format("webm", (".webm",), ("vp9", "av1"), "yuv420p", True),
            Format("mkv", (".mkv",), ("h264", "hevc", "av1", "vp9", "ffv1"), "yuv420p", True),
            # shows a frame for a whole number of 0.01 s: on the average, these are as long as asked
            Format("gif", (".gif",), stdout=True, loops=True, max_fps=50, max_side=65_535),
            Format("webp", (".webp",), stdout=True, loops=True, max_fps=_BRIEFEST, max_side=16_383),
            Format("apng", (".apng",), loops=True, max_fps=_BRIEFEST),
            Format("png", (".png",)),
            # its name has a number in it, such as %04d.png
            Format("frames", (), comment=False),
            # cannot tell that it is BT.709, so that readers take it for BT.601: it is converted
            Format("y4m", (".y4m",), even=True, stdout=True, comment=False),
            Format("raw", (".rgb", ".raw"), stdout=True, comment=False),
            Format("safetensors", (".safetensors",)),
        )
    }
)

# a number, and what stands for a percent sign
_FIELD = re.compile(r"%(?:%|(?:0(\d+))?d)")


@dataclass(frozen=True)
class Encoding:
    """How a video is written; ValueError, in one line, for what its format cannot do.

    `crf` and `codec` are the format's own where None. `loop` is how often it plays, 0 for ever.
    `metadata` says whether the file holds it, `sidecar` whether NAME.json beside it does.
    """

    format: str
    crf: int | None = None
    codec: str | None = None
    loop: int = 0
    metadata: bool = True
    sidecar: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format {self.format!r} is not one of {', '.join(FORMATS)}")
        kind = FORMATS[self.format]
        if self.codec is not None and self.codec not in kind.codecs:
            possible = f"one of {', '.join(kind.codecs)}" if kind.codecs else "none to choose"
            raise ValueError(f"codec {self.codec!r}: {kind.name} has {possible}")
        if self.crf is not None:
            codec = CODECS.get(self.codec_used)
            if codec is None or codec.crf is None:
                has = ", ".join(f"{each.name}" for each in FORMATS.values() if each.codecs)
                what = self.codec_used or kind.name
                raise ValueError(f"crf {self.crf}: {what} has none, of {has} the lossy codecs do")
            if not 0 <= self.crf <= codec.worst:
                raise ValueError(
                    f"crf {self.crf} is not one of 0, the best, to {codec.worst} for "
                    f"{self.codec_used}"
                )
        if self.loop and not kind.loops:
            raise _no_loop(kind)
        if not 0 <= self.loop <= 65_535:
            raise ValueError(f"loop {self.loop} is not from 0, for ever, to 65535")
        if self.sidecar and not self.metadata:
            raise ValueError("a sidecar holds the metadata, which is to be left out")

    @property
    def codec_used(self) -> str:
        """The codec's name, empty where the format has none to choose."""
        return self.codec or next(iter(FORMATS[self.format].codecs), "")

    @property
    def pixels(self) -> Pixels:
        """What frames are best handed over as: nothing is lost or converted twice."""
        return "rgb24" if self.codec_used == "ffv1" else FORMATS[self.format].pixels

    def check(self, size: tuple[int, int], fps: float) -> None:
        """Raise ValueError, in one line, where a video of `size` (H, W) and `fps` cannot be so."""
        height, width = size
        kind = FORMATS[self.format]
        if kind.even and self.codec_used != "ffv1" and (height % 2 or width % 2):
            raise ValueError(f"size {width}x{height} is odd: {kind.name} needs even sides")
        if not 1 <= min(size) <= max(size) <= kind.max_side:
            raise ValueError(
                f"size {width}x{height}: sides of {kind.name} are from 1 to {kind.max_side}"
            )
        if not 0 < fps <= kind.max_fps:
            raise ValueError(
                f"fps {fps:g} is not above 0 and at most {kind.max_fps:g}, as {kind.name} needs it"
            )


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
    """How to write `target`, a path or "-" for stdout: by its suffix, unless `format` is said.

    Raises ValueError, in one line that says what is possible, for what cannot be.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    if target == STDOUT:
        kind = FORMATS[format or "y4m"]
        if not kind.stdout:
            streams = ", ".join(each.name for each in FORMATS.values() if each.stdout)
            raise ValueError(f"{kind.name} cannot go to stdout: {streams} can")
        if sidecar:
            raise ValueError("a sidecar lies beside a file: give a name instead of -")
    else:
        kind = FORMATS[format] if format else _format_by_name(target)
    if kind.name == "frames":
        check_pattern(target)
    if loop is not None and not kind.loops:
        raise _no_loop(kind)
    return Encoding(kind.name, crf, codec, loop or 0, metadata, sidecar)


def _format_by_name(target: str) -> Format:
    path = Path(target)
    suffix = path.suffix.lower()
    if suffix == ".png" and any(field[0] != "%%" for field in _FIELD.finditer(path.name)):
        return FORMATS["frames"]
    for kind in FORMATS.values():
        if suffix in kind.suffixes:
            return kind
    suffixes = ", ".join(kind.suffixes[0] for kind in FORMATS.values() if kind.suffixes)
    raise ValueError(
        f"{target}: the name must end in {suffixes} or %04d.png, or the format must be said"
    )


def _no_loop(kind: Format) -> ValueError:
    loops = ", ".join(each.name for each in FORMATS.values() if each.loops)
    return ValueError(f"{kind.name} does not say how often it plays: {loops} do")


def check_pattern(target: str) -> None:
    """Raise ValueError where the name of a file has not exactly one number, such as %04d.png."""
    path = Path(target)
    fields = [field for field in _FIELD.finditer(path.name) if field[0] != "%%"]
    rest = _FIELD.sub("", path.name)
    if len(fields) != 1 or "%" in rest or int(fields[0][1] or 0) > 9:
        raise ValueError(f"{target}: the name of frames needs one number in it, such as %04d.png")
    if path.suffix.lower() != ".png":
        raise ValueError(f"{target}: the name of frames must end in .png, such as %04d.png")


def list_frames(target: Path) -> list[Path]:
    """The files of a sequence such as frame-%04d.png, by their numbers; [] where there are none."""
    check_pattern(str(target))
    name, position = [], 0
    for field in _FIELD.finditer(target.name):
        name.append(re.escape(target.name[position : field.start()]))
        name.append("%" if field[0] == "%%" else rf"(\d{{{field[1] or 1},}})")
        position = field.end()
    wanted = re.compile("".join([*name, re.escape(target.name[position:])]), re.ASCII)
    found = {}
    for file in target.parent.iterdir() if target.parent.is_dir() else ():
        if match := wanted.fullmatch(file.name):
            found[int(match[1])] = file
    return [found[number] for number in sorted(found)]


def name_sidecar(target: Path) -> Path:
    """Where the metadata of `target` is kept beside it: clip.mp4.json, %04d.png.json."""
    return target.with_name(f"{target.name}.json")
