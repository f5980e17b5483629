"""Captioned video files in a folder or in WebDataset tars as a source of clips, one from the beginning of each."""

import csv
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from reprlib import repr as short
from typing import IO, Any
from zlib import crc32

import torch
from torch import Tensor

from cmdgen.data.clips import SPLITS, Clips, Indices, Size
from cmdgen.files import MOST_TEXT, decode_text, parse_json, read_text, temporary_folder
from cmdgen.video.plain import MOST_BYTES, Decoders
from cmdgen.video.read import count_frames, read_clip

# the first that a folder has is read; the others are as the Hugging Face hub has them
_LISTS = ("captions.jsonl", "metadata.jsonl", "metadata.csv")
_FILES, _CAPTIONS = ("file", "file_name"), ("caption", "text", "prompt")
_SUFFIXES = re.compile(
    r"\.(mp4|m4v|webm|mov|mkv|avi|gif|webp|apng|m?ts|m2ts|mpe?g|wmv|asf|flv|ogv|3gp|3g2|y4m|ivf)", re.IGNORECASE
)
# bytes of a file of captions: those of millions of clips
_MOST = 2**30
# share of the files, chosen by name, that only the test split shows: at least one
_HELD_OUT = 0.1


@dataclass(frozen=True)
class Video:
    """A video file, or one in a tar, where it has a start and a size."""

    name: str
    captions: list[str]
    file: Path
    start: int | None = None
    size: int = 0

    def __str__(self) -> str:
        return str(self.file if self.start is None else self.file / self.name)

    def small(self) -> bytes:
        """Return the bytes of the file; none of a large one, and of one that cannot be read."""
        with suppress(OSError), self.file.open("rb") as file:
            size = os.fstat(file.fileno()).st_size if self.start is None else self.size
            return _part(file, self.start or 0, size) if size <= MOST_BYTES else b""
        return b""

    @contextmanager
    def unpacked(self) -> Iterator[Path]:
        """Give its path, of one in a tar that of a temporary copy."""
        if self.start is None:
            yield self.file
            return
        with temporary_folder(None) as folder, self.file.open("rb") as tar:
            # readers know some formats by their suffix
            (copy := folder / f"clip{PurePath(self.name).suffix}").write_bytes(_part(tar, self.start, self.size))
            try:
                yield copy
            except ValueError as error:
                raise ValueError(str(error).replace(str(copy), str(self))) from error


class Folder:
    """Videos named in a list, or at any depth with a .txt of captions beside each, or in tars.

    A line of captions.jsonl is {"file": path in the folder, "caption": text or a list of texts};
    metadata.jsonl and metadata.csv, with file_name and text, are read too; each line of a .txt is a
    caption. Names that start with a dot, and __MACOSX, are no clips; folders of frames are none
    either. Links are followed. ValueError names what is wrong with a caption or a name.

    A tar, or a folder of *.tar without a list, is read as WebDataset has it: KEY.mp4 beside KEY.txt, or
    beside KEY.json with a caption. Packed, the videos of a folder are the same clips in the same order.

    Where the number of `frames` at `fps` a second is given, files that cannot be read or are too
    short are `left_out`, with the reasons; ValueError names one where fewer than 2 are left.
    """

    def __init__(self, path: Path, *, fps: int = 8, frames: int | None = None) -> None:
        if not path.exists():
            raise ValueError(f"{path} is neither a folder nor a tar")
        videos = list(_find(path.absolute()))
        self.left_out: dict[str, str] = {}
        self._decoders = Decoders()
        if frames is not None:
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                reasons = threads.map(partial(_find_fault, self._decoders, fps=fps, frames=frames), videos)
                self.left_out = {video.name: reason for video, reason in zip(videos, reasons, strict=True) if reason}
        total, videos = len(videos), [video for video in videos if video.name not in self.left_out]
        if len(videos) < 2:
            why = next(iter(self.left_out.values()), "folders of frames are none")
            count = f"{total} captioned videos" + (f", {len(videos)} of use" if self.left_out else "")
            raise ValueError(f"{path} holds {count}, at least 2 are needed: {why}")
        self.fps, self._videos = fps, videos
        names, stats = [video.name for video in videos], [video.file.stat() for video in videos]
        # tells one set of clips from another, and when one of them was written
        sizes = [video.size or stat.st_size for video, stat in zip(videos, stats, strict=True)]
        self.contents = " ".join(f"{name}:{size}" for name, size in zip(names, sizes, strict=True))
        self.key = " ".join([f"{fps} fps", self.contents, *(str(stat.st_mtime_ns) for stat in stats)])
        order = sorted(range(len(names)), key=lambda i: crc32(names[i].encode()))
        held_out = max(1, int(_HELD_OUT * len(names)))
        test = sorted(order[:held_out])
        self._splits = {"train": sorted(order[held_out:]), "validation": test, "test": test}
        # decoders run in processes of their own
        self._threads = ThreadPoolExecutor(os.cpu_count())

    def __len__(self) -> int:
        return len(self._videos)

    def indices(self, split: str, count: int) -> Tensor:
        """-> (N,) int64: at most `count` files of "train", or of "validation" and "test", which are one."""
        if split not in self._splits:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        return torch.tensor(self._splits[split][:count])

    def captions(self, indices: Indices, variant: int = 0) -> list[str]:
        """Return one caption each; `variant` goes round those that a file has."""
        texts = [self._videos[i].captions for i in torch.as_tensor(indices).tolist()]
        return [choices[variant % len(choices)] for choices in texts]

    def render(self, indices: Indices, size: Size, frames: int = 16, device: str = "cpu") -> Clips:
        """(B,) -> clips of `size` (height, width): the first frames at the folder's rate, resized."""
        chosen = [self._videos[i] for i in torch.as_tensor(indices).tolist()]
        read = partial(_read, self._decoders, size=size, frames=frames, fps=self.fps)
        clips = torch.stack([*self._threads.map(read, chosen)])
        return Clips(clips.to(device), None)


def _find(root: Path) -> Iterable[Video]:
    """Return all videos of a folder or of tars; ValueError names what is wrong with one."""
    listed = next((root / name for name in _LISTS if (root / name).is_file()), None)
    tars = [] if listed else [root] if root.is_file() else sorted(root.glob("*.tar"))
    if tars:
        return _packed(tars)
    videos: dict[str, Video] = {}
    for where, name, captions in _beside(root) if listed is None else _listed(listed):
        _check_captions(where, captions)
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise ValueError(f"{where}: {short(name)} lies outside the folder")
        # False too where no file could have such a name
        if not os.path.isfile(root / name):
            raise ValueError(f"{where}: {short(name)} does not exist, or is no file")
        video = Video((root / name).relative_to(root).as_posix(), [], root / name)
        videos.setdefault(video.name, video).captions.extend(captions)
    return videos.values()


def _check_captions(where: object, captions: list[str]) -> None:
    if not captions or not all(captions):
        raise ValueError(f"{where}: the caption is missing, empty or not text")


def _listed(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    lines, table = _lines(path), path.suffix == ".csv"
    rows: Iterable[Any] = csv.DictReader(lines) if table else lines
    for number, row in enumerate(rows, 2 if table else 1):
        if not (table or row.strip()):
            continue
        where = f"{path} line {number}"
        try:
            row = row if table else parse_json(row)
        except ValueError as error:
            raise ValueError(f"{where}: not readable as JSON ({error})") from error
        name = next((row[key] for key in _FILES if key in row), None)
        texts = next((row[key] for key in _CAPTIONS if key in row), None)
        if not isinstance(name, str):
            raise ValueError(f'{where}: got {short(row)}, expected {{"file": ..., "caption": ...}}')
        yield where, name, _clean(texts)


def _clean(texts: Any) -> list[str]:
    """Return captions as lines of text; what is no text is empty."""
    texts = texts if isinstance(texts, list) else [texts]
    return [" ".join(text.split()) if isinstance(text, str) else "" for text in texts]


def _packed(tars: list[Path]) -> list[Video]:
    """Find the videos of tars, and the captions of the same keys; in the order of their names."""
    videos: dict[str, Video] = {}
    for tar in tars:
        captions: dict[str, list[str]] = {}
        packed: dict[str, Video] = {}
        try:
            # "r:" refuses compressed ones, which cannot be read from the middle
            with tarfile.open(tar, "r:") as archive, tar.open("rb") as file:
                for member in archive:
                    folder, _, base = member.name.removeprefix("./").rpartition("/")
                    # a key ends at the first dot
                    key, dot, kind = base.partition(".")
                    name = f"{folder}/{key}".lstrip("/")
                    if not member.isreg() or member.issparse() or not key:
                        continue
                    if kind in ("txt", "json"):
                        data = _part(file, member.offset_data, min(member.size, MOST_TEXT))
                        captions[name] = _read_captions(f"{tar}: {member.name}", decode_text(data), kind)
                    elif _SUFFIXES.fullmatch(dot + kind):
                        packed[name] = Video(f"{name}.{kind}", [], tar, member.offset_data, member.size)
        except (tarfile.TarError, UnicodeDecodeError, OSError) as error:
            raise ValueError(f"{tar} is not a readable tar: {error}") from error
        for name, video in packed.items():
            _check_captions(video, captions.get(name, []))
            video.captions.extend(captions[name])
            if videos.setdefault(video.name, video) is not video:
                raise ValueError(f"{video}: {videos[video.name]} has the same key: keys of a set must differ")
    return [videos[name] for name in sorted(videos, key=PurePath)]


def _part(file: IO[bytes], start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _read_captions(where: str, text: str, kind: str) -> list[str]:
    """Return the lines of a .txt, or what a .json has as its caption."""
    if kind == "txt":
        return [line for line in _clean(text.splitlines()) if line]
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where}: not readable as JSON ({error})") from error
    return _clean(next((values[key] for key in _CAPTIONS if key in values), None))


def _beside(root: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Find every video below the folder, and the lines of its .txt."""
    for file in sorted(root.rglob("*")):
        parts = file.relative_to(root).parts
        if _SUFFIXES.fullmatch(file.suffix) and not any(part[0] == "." or part == "__MACOSX" for part in parts):
            text = file.with_suffix(".txt")
            if not text.is_file():
                raise ValueError(f"{file} has no caption: there is neither {_LISTS[0]} nor {text.name}")
            captions = _read_captions(str(text), read_text(text, _MOST), "txt")
            yield str(text), file.relative_to(root).as_posix(), captions


def _lines(file: Path) -> list[str]:
    return read_text(file, _MOST).splitlines()


def _find_fault(decoders: Decoders, video: Video, *, fps: int, frames: int) -> str:
    """Return why a file is no clip to learn from; empty where it is one, as far as its header says."""
    try:
        if (count := decoders.count(video.small(), fps, frames)) is None:
            with video.unpacked() as file:
                count = count_frames(file, fps, frames)
    except ValueError as error:
        return str(error)
    return "" if count >= frames else _too_short(video, count, fps, frames)


def _too_short(video: Video, count: int, fps: int, frames: int) -> str:
    return f"{video} has {count} frames at {fps} fps, {frames} are needed"


def _read(decoders: Decoders, video: Video, *, size: tuple[int, int], frames: int, fps: int) -> Tensor:
    """-> (T, 3, H, W) uint8: the first `frames` frames at `fps`, cropped in the middle and resized."""
    if (clip := decoders.read(video.small(), frames=frames, size=size, fps=fps)) is None:
        with video.unpacked() as file:
            clip, source = read_clip(file, frames=frames, size=size, fps=fps)
        if source.held:
            raise ValueError(_too_short(video, frames - source.held, fps, frames))
    return torch.from_numpy(clip).permute(0, 3, 1, 2).contiguous()
