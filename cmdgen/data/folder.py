"""A folder of captioned video files as a source of clips, one from the beginning of each file."""

import csv
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePath
from reprlib import repr as short
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from cmdgen.data.clips import SPLITS, Clips, Indices, Size
from cmdgen.files import parse_json, read_text
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


class Folder:
    """Videos named in a list, or at any depth with a .txt of captions beside each.

    A line of captions.jsonl is {"file": path in the folder, "caption": text or a list of texts};
    metadata.jsonl and metadata.csv, with file_name and text, are read too; each line of a .txt is a
    caption. Names that start with a dot, and __MACOSX, are no clips; folders of frames are none
    either. Links are followed. ValueError names what is wrong with a caption or a name.

    Where the number of `frames` at `fps` a second is given, files that cannot be read or are too
    short are `left_out`, with the reasons; ValueError names one where fewer than 2 are left.
    """

    def __init__(self, path: Path, *, fps: int = 8, frames: int | None = None) -> None:
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder")
        root = path.absolute()
        clips: dict[Path, list[str]] = {}
        for where, name, captions in _captioned(root):
            if not captions or not all(captions):
                raise ValueError(f"{where}: the caption is missing, empty or not text")
            if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                raise ValueError(f"{where}: {short(name)} lies outside the folder")
            # False too where no file could have such a name
            if not os.path.isfile(root / name):
                raise ValueError(f"{where}: {short(name)} does not exist, or is no file")
            clips.setdefault(root / name, []).extend(captions)
        self.left_out: dict[Path, str] = {}
        if frames is not None:
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                reasons = threads.map(partial(_find_fault, fps=fps, frames=frames), clips)
                self.left_out = {file: reason for file, reason in zip(clips, reasons, strict=True) if reason}
        found, clips = len(clips), {file: texts for file, texts in clips.items() if file not in self.left_out}
        if len(clips) < 2:
            why = next(iter(self.left_out.values()), "folders of frames are none")
            count = f"{found} captioned videos" + (f", {len(clips)} of use" if self.left_out else "")
            raise ValueError(f"{path} holds {count}, at least 2 are needed: {why}")
        self.fps = fps
        self._files, self._captions = list(clips), list(clips.values())
        names = [file.relative_to(root).as_posix() for file in self._files]
        stats = [file.stat() for file in self._files]
        # tells one set of clips from another, and when one of them was written
        self.contents = " ".join(f"{name}:{stat.st_size}" for name, stat in zip(names, stats, strict=True))
        self.key = " ".join([f"{fps} fps", self.contents, *(str(stat.st_mtime_ns) for stat in stats)])
        order = sorted(range(len(names)), key=lambda i: crc32(names[i].encode()))
        held_out = max(1, int(_HELD_OUT * len(names)))
        test = sorted(order[:held_out])
        self._splits = {"train": sorted(order[held_out:]), "validation": test, "test": test}

    def __len__(self) -> int:
        return len(self._files)

    def indices(self, split: str, count: int) -> Tensor:
        """-> (N,) int64: at most `count` files of "train", or of "validation" and "test", which are one."""
        if split not in self._splits:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        return torch.tensor(self._splits[split][:count])

    def captions(self, indices: Indices, variant: int = 0) -> list[str]:
        """Return one caption each; `variant` goes round those that a file has."""
        texts = [self._captions[i] for i in torch.as_tensor(indices).tolist()]
        return [choices[variant % len(choices)] for choices in texts]

    def render(self, indices: Indices, size: Size, frames: int = 16, device: str = "cpu", variant: int = 0) -> Clips:
        """(B,) -> clips of `size` (height, width): the first frames at the folder's rate, resized."""
        chosen = [self._files[i] for i in torch.as_tensor(indices).tolist()]
        clips = torch.stack([_read(file, size, frames, self.fps) for file in chosen])
        return Clips(clips.to(device), None, self.captions(indices, variant))


def _captioned(root: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Return where each clip is named, its name and its captions."""
    listed = next((root / name for name in _LISTS if (root / name).is_file()), None)
    return _beside(root) if listed is None else _listed(listed)


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
        texts = texts if isinstance(texts, list) else [texts]
        yield where, name, [" ".join(t.split()) if isinstance(t, str) else "" for t in texts]


def _beside(root: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Find every video below the folder, and the lines of its .txt."""
    for file in sorted(root.rglob("*")):
        parts = file.relative_to(root).parts
        if _SUFFIXES.fullmatch(file.suffix) and not any(part[0] == "." or part == "__MACOSX" for part in parts):
            text = file.with_suffix(".txt")
            if not text.is_file():
                raise ValueError(f"{file} has no caption: there is neither {_LISTS[0]} nor {text.name}")
            captions = [" ".join(line.split()) for line in _lines(text) if line.strip()]
            yield str(text), file.relative_to(root).as_posix(), captions


def _lines(file: Path) -> list[str]:
    return read_text(file, _MOST).splitlines()


def _find_fault(file: Path, *, fps: int, frames: int) -> str:
    """Return why a file is no clip to learn from; empty where it is one, as far as its header says."""
    try:
        count = count_frames(file, fps, frames)
    except ValueError as error:
        return str(error)
    return "" if count >= frames else _too_short(file, count, fps, frames)


def _too_short(file: Path, count: int, fps: int, frames: int) -> str:
    return f"{file} has {count} frames at {fps} fps, {frames} are needed"


def _read(file: Path, size: tuple[int, int], frames: int, fps: int) -> Tensor:
    """-> (T, 3, H, W) uint8: the first `frames` frames at `fps`, cropped in the middle and resized."""
    clip, source = read_clip(file, frames=frames, size=size, fps=fps)
    if source.held:
        raise ValueError(_too_short(file, frames - source.held, fps, frames))
    return torch.from_numpy(clip).permute(0, 3, 1, 2).contiguous()
