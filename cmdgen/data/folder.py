"""A folder of captioned video files as a source of clips, one from the beginning of each file."""

import os
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as short
from zlib import crc32

import torch
from torch import Tensor

from cmdgen.data.clips import Clips, Indices, Size
from cmdgen.files import parse_json, read_text
from cmdgen.video.read import read_clip

_LIST = "captions.jsonl"
_SUFFIXES = (".mp4", ".m4v", ".webm", ".mov", ".mkv", ".avi", ".gif")
# bytes of a file of captions: those of millions of clips
_MOST = 2**30
# share of the files, chosen by name, that only the test split shows: at least one
_HELD_OUT = 0.1


class Folder:
    """Videos named in captions.jsonl, or at any depth with a .txt of captions beside each.

    A line of captions.jsonl is {"file": path in the folder, "caption": text or a list of texts};
    each line of a .txt is a caption. All of it is checked here: ValueError names what is wrong.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder")
        root = path.resolve()
        clips: dict[Path, list[str]] = {}
        for where, name, captions in _listed(root) if (root / _LIST).is_file() else _beside(root):
            if not captions or not all(captions):
                raise ValueError(f"{where}: the caption is missing, empty or not text")
            # False too where no file could have such a name
            if not os.path.isfile(root / name):
                raise ValueError(f"{where}: {short(name)} does not exist, or is no file")
            file = (root / name).resolve()
            if not file.is_relative_to(root):
                raise ValueError(f"{where}: {short(name)} lies outside the folder")
            clips.setdefault(file, []).extend(captions)
        if len(clips) < 2:
            raise ValueError(f"{path} holds {len(clips)} captioned videos, at least 2 are needed")
        self._files, self._captions = list(clips), list(clips.values())
        names = [file.relative_to(root).as_posix() for file in self._files]
        stats = [file.stat() for file in self._files]
        # tells one set of clips from another, and when one of them was written
        self.contents = " ".join(f"{name}:{stat.st_size}" for name, stat in zip(names, stats, strict=True))
        self.key = " ".join([self.contents, *(str(stat.st_mtime_ns) for stat in stats)])
        order = sorted(range(len(names)), key=lambda i: crc32(names[i].encode()))
        held_out = max(1, int(_HELD_OUT * len(names)))
        self._splits = {"test": sorted(order[:held_out]), "train": sorted(order[held_out:])}

    def __len__(self) -> int:
        return len(self._files)

    def indices(self, split: str, count: int) -> Tensor:
        """-> (N,) int64: at most `count` files of "train" or "test"."""
        if split not in self._splits:
            raise ValueError(f"split {split!r} is not one of train, test")
        return torch.tensor(self._splits[split][:count])

    def captions(self, indices: Indices, variant: int = 0) -> list[str]:
        """Return one caption each; `variant` goes round those that a file has."""
        texts = [self._captions[i] for i in torch.as_tensor(indices).tolist()]
        return [choices[variant % len(choices)] for choices in texts]

    def render(self, indices: Indices, size: Size, frames: int = 16, device: str = "cpu", variant: int = 0) -> Clips:
        """(B,) -> clips of `size` (height, width): the middle of every frame, resized."""
        chosen = [self._files[i] for i in torch.as_tensor(indices).tolist()]
        clips = torch.stack([_read(file, size, frames) for file in chosen])
        return Clips(clips.to(device), None, self.captions(indices, variant))


def _listed(root: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Read captions.jsonl: where it stands there, a file and its captions."""
    for number, line in enumerate(_lines(root / _LIST), 1):
        if not line.strip():
            continue
        where = f"{root / _LIST} line {number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{where}: not readable as JSON ({error})") from error
        name, texts = row.get("file"), row.get("caption")
        if not isinstance(name, str):
            raise ValueError(f'{where}: got {short(row)}, expected {{"file": ..., "caption": ...}}')
        texts = texts if isinstance(texts, list) else [texts]
        yield where, name, [" ".join(t.split()) if isinstance(t, str) else "" for t in texts]


def _beside(root: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Find every video below the folder, and the lines of its .txt."""
    for file in sorted(root.rglob("*")):
        if file.suffix.lower() in _SUFFIXES:
            text = file.with_suffix(".txt")
            if not text.is_file():
                raise ValueError(f"{file} has no caption: there is neither {_LIST} nor {text.name}")
            captions = [" ".join(line.split()) for line in _lines(text) if line.strip()]
            yield str(text), file.relative_to(root).as_posix(), captions


def _lines(file: Path) -> list[str]:
    return read_text(file, _MOST).splitlines()


def _read(file: Path, size: tuple[int, int], frames: int) -> Tensor:
    """-> (T, 3, H, W) uint8: the first `frames` frames, cropped in the middle and resized."""
    clip, source = read_clip(file, frames=frames, size=size, fps=None)
    if source.held:
        raise ValueError(f"{file} has {frames - source.held} frames, {frames} are needed")
    return torch.from_numpy(clip).permute(0, 3, 1, 2).contiguous()
